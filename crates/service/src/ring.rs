//! The last lines of a log, in bounded memory, for those who look when it is too late and those who watch live.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// Longest line; the rest of a longer one is cut off.
pub const LINE_BYTES_MAX: usize = 8 << 10;

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// Its number in this ring, from 1 on, without gaps.
    pub sequence: u64,
    /// When it came, in milliseconds of Unix time.
    pub at_ms: u64,
    /// Who wrote it: a hook's name, or a program's.
    pub source: Arc<str>,
    /// The line, without its end.
    pub text: String,
}

#[derive(Debug, Default)]
struct Kept {
    lines: VecDeque<LogLine>,
    bytes: usize,
}

#[derive(Debug)]
struct Inner {
    bytes_max: usize,
    /// Held for one push or one read.
    kept: Mutex<Kept>,
    newest: watch::Sender<u64>,
}

/// The ring; cheap to clone.
#[derive(Clone, Debug)]
pub struct LogRing {
    inner: Arc<Inner>,
}

impl LogRing {
    /// Makes a ring that keeps at most `bytes_max` bytes of text.
    pub fn new(bytes_max: usize) -> Self {
        let inner = Inner { bytes_max, kept: Mutex::default(), newest: watch::Sender::new(0) };
        LogRing { inner: Arc::new(inner) }
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.inner.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a line; the oldest ones go when there is no room. `at_ms` is Unix time.
    pub fn push(&self, at_ms: u64, source: &Arc<str>, text: &str) {
        let mut end = text.len().min(LINE_BYTES_MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let mut kept = self.kept();
        let sequence = self.inner.newest.borrow().saturating_add(1);
        kept.bytes += end;
        kept.lines.push_back(LogLine { sequence, at_ms, source: source.clone(), text: text[..end].to_string() });
        while kept.bytes > self.inner.bytes_max || kept.lines.len() > self.inner.bytes_max / 16 {
            let Some(gone) = kept.lines.pop_front() else { break };
            kept.bytes -= gone.text.len();
        }
        self.inner.newest.send_replace(sequence);
    }

    /// Returns at most `most` lines that came after number `after`, oldest first. A first number above `after + 1`
    /// says that lines between are gone.
    pub fn read(&self, after: u64, most: usize) -> Vec<LogLine> {
        let kept = self.kept();
        let first = kept.lines.partition_point(|line| line.sequence <= after);
        kept.lines.iter().skip(first).take(most).cloned().collect()
    }

    /// Returns the last `most` lines, oldest first.
    pub fn tail(&self, most: usize) -> Vec<LogLine> {
        let kept = self.kept();
        kept.lines.iter().skip(kept.lines.len().saturating_sub(most)).cloned().collect()
    }

    /// Returns a reader of the newest line's number.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.inner.newest.subscribe()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_oldest_lines_go_first_and_their_numbers_say_so() {
        let (ring, source) = (LogRing::new(100), Arc::from("hook"));
        (0..50).for_each(|i| ring.push(i, &source, &format!("line {i:04}")));
        let lines = ring.read(0, 100);
        let bytes: usize = lines.iter().map(|line| line.text.len()).sum();
        assert!(bytes <= 100 && !lines.is_empty(), "{bytes}");
        assert_eq!(lines.last().unwrap().text, "line 0049");
        assert!(lines.windows(2).all(|pair| pair[1].sequence == pair[0].sequence + 1) && lines[0].sequence > 1);
        assert_eq!(ring.read(49, 100).len(), 1);
        assert_eq!(ring.tail(2).first().unwrap().text, "line 0048");
        assert_eq!(*ring.watch().borrow(), 50);
    }

    #[test]
    fn a_line_without_end_is_cut_at_a_character() {
        let ring = LogRing::new(1 << 20);
        ring.push(0, &Arc::from("x"), &"é".repeat(LINE_BYTES_MAX));
        let text = ring.tail(1).remove(0).text;
        assert!(text.len() <= LINE_BYTES_MAX && text.ends_with('é'));
    }

    #[test]
    fn empty_lines_are_bounded_too() {
        let ring = LogRing::new(1600);
        (0..10_000).for_each(|i| ring.push(i, &Arc::from("x"), ""));
        assert!(ring.read(0, usize::MAX).len() <= 100);
    }
}
