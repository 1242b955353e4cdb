//! Cells as people and as programs read them.

use serde_json::json;

/// The middle of some values.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Prints cells: a table, or one line of JSON a cell. A ratio above 1 means that we are better; numbers that are not
/// there are NaN, and null in JSON.
pub(crate) struct Report {
    pub(crate) json: bool,
}

#[allow(clippy::print_stdout)]
impl Report {
    pub(crate) fn text(&self, text: &str) {
        if !self.json {
            println!("{text}");
        }
    }

    /// A cell in which less is better.
    pub(crate) fn less(&self, cell: &str, ours: f64, peer: f64, unit: &str) {
        self.cell(cell, ours, peer, peer / ours, unit);
    }

    /// A cell in which more is better.
    #[cfg_attr(not(feature = "engine"), allow(dead_code))]
    pub(crate) fn more(&self, cell: &str, ours: f64, peer: f64, unit: &str) {
        self.cell(cell, ours, peer, ours / peer, unit);
    }

    fn cell(&self, cell: &str, ours: f64, peer: f64, ratio: f64, unit: &str) {
        if self.json {
            println!("{}", json!({"cell": cell, "ours": ours, "peer": peer, "ratio": ratio}));
        } else {
            println!("{cell:<44} {ours:>9.3} against {peer:>9.3} {unit}, ratio {ratio:.2}");
        }
    }
}
