//! How far something long is, for a person: a bar on a terminal, lines elsewhere.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// How often a bar moves by itself, so that a silent network does not look like a dead program.
const TICK: Duration = Duration::from_millis(200);

/// A download's progress on stderr; gone once this is dropped.
pub struct Bar {
    what: String,
    bar: Option<ProgressBar>,
    /// Tenths that have had their line, where lines are wanted.
    lines: Option<AtomicU64>,
}

impl Bar {
    /// Makes a bar where there is a terminal, and nothing elsewhere.
    pub fn on_terminal(what: String) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0).with_message(what.clone());
            let style = "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
            if let Ok(style) = ProgressStyle::with_template(style) {
                bar.set_style(style);
            }
            bar.enable_steady_tick(TICK);
            bar
        });
        Bar { what, bar, lines: None }
    }

    /// Makes a bar where there is a terminal, and lines elsewhere.
    pub fn or_lines(what: String) -> Self {
        let mut bar = Bar::on_terminal(what);
        bar.lines = bar.bar.is_none().then(AtomicU64::default);
        bar
    }

    /// Shows how many bytes of how many are done.
    pub fn show(&self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        }
        if let Some(lines) = &self.lines
            && let Some(line) = line(done, total, lines.load(Ordering::Relaxed))
        {
            lines.store(line, Ordering::Relaxed);
            let (done, total) = (done >> 20, total >> 20);
            eprintln!("{}: {}0 %, {done} of {total} MiB", self.what, line);
        }
    }
}

/// Returns the tenth whose line is due.
fn line(done: u64, total: u64, said: u64) -> Option<u64> {
    let tenth = done.saturating_mul(10) / total.max(1);
    (total > 0 && tenth > said).then_some(tenth)
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_comes_once_a_tenth_and_never_before_the_size_is_known() {
        let lines = [(0, 0, 0), (9, 100, 0), (10, 100, 0), (19, 100, 1), (100, 100, 1), (100, 100, 10)];
        let due = lines.map(|(done, total, said)| line(done, total, said));
        assert_eq!(due, [None, None, Some(1), None, Some(10), None]);
    }
}
