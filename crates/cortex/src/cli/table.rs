//! Tables for terminals: columns as wide as what stands in them.

/// Rows under one head; what is said of a row stands below it.
pub(super) struct Table {
    /// Which columns end where the next begins.
    right: Vec<bool>,
    rows: Vec<Row>,
}

enum Row {
    Cells(Vec<String>),
    Note(String),
}

impl Table {
    /// Begins a table; columns whose head begins with '>' are written to the right.
    pub(super) fn new(heads: &[&str]) -> Self {
        let right = heads.iter().map(|head| head.starts_with('>')).collect();
        let heads = heads.iter().map(|head| head.trim_start_matches('>').to_string()).collect();
        Table { right, rows: vec![Row::Cells(heads)] }
    }

    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(Row::Cells(cells.into()));
    }

    /// Says something of the row before, from the second column on.
    pub(super) fn note(&mut self, text: String) {
        self.rows.push(Row::Note(text));
    }

    /// Returns the lines.
    fn text(&self) -> String {
        let mut widths = vec![0; self.right.len()];
        for row in &self.rows {
            let Row::Cells(cells) = row else { continue };
            for (width, cell) in widths.iter_mut().zip(cells) {
                *width = cell.chars().count().max(*width);
            }
        }
        let mut text = String::new();
        for row in &self.rows {
            let line = match row {
                Row::Note(note) => format!("{:1$}  {note}", "", widths.first().copied().unwrap_or(0)),
                Row::Cells(cells) => {
                    let columns = cells.iter().zip(&widths).zip(&self.right);
                    let padded = columns.map(|((cell, width), right)| match right {
                        true => format!("{cell:>width$}"),
                        false => format!("{cell:<width$}"),
                    });
                    padded.collect::<Vec<_>>().join("  ")
                }
            };
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    pub(super) fn print(&self) {
        service::terminal::write(format_args!("{}", self.text()));
    }
}

#[cfg(test)]
mod tests {
    use super::Table;

    #[test]
    fn columns_are_as_wide_as_what_stands_in_them() {
        let mut table = Table::new(&["NAME", ">COUNT", "WHAT"]);
        table.row(["an-unusually-long-name".into(), "7".into(), "x".into()]);
        table.note("what is to be said of it".into());
        table.row(["é".into(), "1234567".into(), String::new()]);
        let wanted = "NAME                      COUNT  WHAT\n\
                      an-unusually-long-name        7  x\n                        what is to be said of it\n\
                      é                       1234567\n";
        assert_eq!(table.text(), wanted);
    }
}
