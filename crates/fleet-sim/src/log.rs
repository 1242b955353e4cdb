//! What happened, kept cheaply: a text with holes and the numbers for them, put together only when somebody reads it.

use std::collections::VecDeque;
use std::fmt::Write;

use crate::clock::At;

/// Entries kept when nobody asked for all.
const RING: usize = 4_000;

#[derive(Clone, Copy, Debug)]
struct Entry {
    at: At,
    text: &'static str,
    numbers: [u64; 4],
}

/// The log of one run.
#[derive(Debug)]
pub(crate) struct Log {
    entries: VecDeque<Entry>,
    whole: bool,
    dropped: u64,
}

impl Log {
    /// Makes a log that keeps the last few thousand entries, or all of them.
    pub(crate) fn new(whole: bool) -> Self {
        Log { entries: VecDeque::with_capacity(RING), whole, dropped: 0 }
    }

    /// Notes something; each `#` of the text stands for the next number.
    pub(crate) fn note(&mut self, at: At, text: &'static str, numbers: &[u64]) {
        if !self.whole && self.entries.len() == RING {
            self.entries.pop_front();
            self.dropped += 1;
        }
        let mut kept = [0; 4];
        for (to, from) in kept.iter_mut().zip(numbers) {
            *to = *from;
        }
        self.entries.push_back(Entry { at, text, numbers: kept });
    }

    /// Writes it out, one line an entry.
    pub(crate) fn render(&self) -> String {
        let mut out = String::new();
        if self.dropped > 0 {
            let _ = writeln!(out, "({} earlier entries are not kept; a replay keeps all)", self.dropped);
        }
        for entry in &self.entries {
            let _ = write!(out, "{:>4}.{:06} ", entry.at.0 / 1_000_000, entry.at.0 % 1_000_000);
            let mut numbers = entry.numbers.iter();
            for part in entry.text.split_inclusive('#') {
                match (part.strip_suffix('#'), numbers.clone().next()) {
                    (Some(text), Some(number)) => {
                        numbers.next();
                        let _ = write!(out, "{text}{number}");
                    }
                    _ => out.push_str(part),
                }
            }
            out.push('\n');
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_filled_in_order() {
        let mut log = Log::new(true);
        log.note(At(1_000_002), "node # hears # twice", &[3, 7]);
        assert_eq!(log.render(), "   1.000002 node 3 hears 7 twice\n");
    }
}
