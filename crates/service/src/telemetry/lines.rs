//! Where lines of the log go: at once while there are few, gathered while there are many.
//!
//! A line that comes long after the one before is written where it is said, as is every warning and error with all that
//! waits before it. What comes sooner is gathered for some milliseconds and written at once by a thread of its own, so
//! that a busy program does not pay the system for each line. No line is dropped: whoever finds the gathered ones at
//! their bound writes them, and waits as long as that takes.

use std::io::{self, Write};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::MakeWriter;

/// How long lines are gathered. A killed process loses that much of its log at most.
const GATHER: Duration = Duration::from_millis(10);
/// Most bytes that wait.
const GATHERED_MAX: usize = 1 << 20;

struct Gathered {
    bytes: Vec<u8>,
    /// When something was written last.
    wrote: Option<Instant>,
}

struct Shared<W> {
    /// Held while something is written, before `gathered`.
    out: Mutex<W>,
    /// Held for a copy.
    gathered: Mutex<Gathered>,
    /// Wakes the thread that writes.
    due: SyncSender<()>,
}

/// The log's end; cheap to clone.
pub(super) struct Lines<W>(Arc<Shared<W>>);

impl<W> Clone for Lines<W> {
    fn clone(&self) -> Self {
        Lines(self.0.clone())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<W: Write + Send + 'static> Lines<W> {
    /// Makes the end of a log that is written to `out`, and starts its thread.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(super) fn start(out: W) -> io::Result<Self> {
        let (due, wake) = sync_channel(1);
        let gathered = Mutex::new(Gathered { bytes: Vec::new(), wrote: None });
        let lines = Lines(Arc::new(Shared { out: Mutex::new(out), gathered, due }));
        let weak = Arc::downgrade(&lines.0);
        std::thread::Builder::new().name("log".into()).spawn(move || {
            while wake.recv().is_ok() {
                std::thread::sleep(GATHER);
                let Some(shared) = weak.upgrade() else { return };
                shared.flush();
            }
        })?;
        Ok(lines)
    }

    /// Writes what waits.
    pub(super) fn flush(&self) {
        self.0.flush();
    }
}

impl<W: Write> Shared<W> {
    fn flush(&self) {
        let mut out = lock(&self.out);
        let mut gathered = lock(&self.gathered);
        let bytes = std::mem::take(&mut gathered.bytes);
        gathered.wrote = Some(Instant::now());
        drop(gathered);
        // A log that can't be written has nobody to tell it to.
        let _ = out.write_all(&bytes).and_then(|()| out.flush());
        drop(out);
        let mut gathered = lock(&self.gathered);
        if gathered.bytes.is_empty() && bytes.capacity() <= GATHERED_MAX {
            gathered.bytes = bytes;
            gathered.bytes.clear();
        }
    }

    fn line(&self, line: &[u8], urgent: bool) {
        let mut gathered = lock(&self.gathered);
        let begins = gathered.bytes.is_empty();
        let sparse = begins && gathered.wrote.is_none_or(|wrote| wrote.elapsed() >= GATHER);
        gathered.bytes.extend_from_slice(line);
        let full = gathered.bytes.len() > GATHERED_MAX;
        drop(gathered);
        if urgent || full || sparse {
            self.flush();
        } else if begins {
            // It is awake already where there is no room.
            let _ = self.due.try_send(());
        }
    }
}

/// One line's way.
pub(super) struct Line<'a, W> {
    shared: &'a Shared<W>,
    urgent: bool,
}

impl<W: Write> Write for Line<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.shared.line(bytes, self.urgent);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a, W: Write + 'a> MakeWriter<'a> for Lines<W> {
    type Writer = Line<'a, W>;

    fn make_writer(&'a self) -> Self::Writer {
        Line { shared: &self.0, urgent: true }
    }

    fn make_writer_for(&'a self, about: &tracing::Metadata<'_>) -> Self::Writer {
        Line { shared: &self.0, urgent: *about.level() <= tracing::Level::WARN }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Remembers each write.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<Vec<u8>>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            lock(&self.0).push(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Sink {
        fn text(&self) -> String {
            String::from_utf8(lock(&self.0).concat()).unwrap()
        }
    }

    #[test]
    fn the_first_line_and_every_urgent_one_is_out_when_it_is_said() {
        let sink = Sink::default();
        let lines = Lines::start(sink.clone()).unwrap();
        lines.0.line(b"one\n", false);
        assert_eq!(sink.text(), "one\n");
        lines.0.line(b"two\n", false);
        lines.0.line(b"three\n", true);
        assert_eq!(sink.text(), "one\ntwo\nthree\n", "a warning takes along what waits before it");
    }

    #[test]
    fn many_lines_take_few_writes_and_none_is_lost_or_out_of_turn() {
        let sink = Sink::default();
        let lines = Lines::start(sink.clone()).unwrap();
        let says = |thread: usize| {
            let lines = lines.clone();
            move || (0..2000).for_each(|i| lines.0.line(format!("{thread} {i}\n").as_bytes(), false))
        };
        let threads: Vec<_> = (0..4).map(|thread| std::thread::spawn(says(thread))).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let until = Instant::now() + Duration::from_secs(20);
        while sink.text().lines().count() < 8000 && Instant::now() < until {
            std::thread::sleep(GATHER);
        }
        let text = sink.text();
        for thread in 0..4 {
            let prefix = format!("{thread} ");
            let said: Vec<usize> = text.lines().filter_map(|line| line.strip_prefix(&prefix)?.parse().ok()).collect();
            assert_eq!(said, (0..2000).collect::<Vec<_>>());
        }
        assert!(lock(&sink.0).len() < 4000, "{} writes", lock(&sink.0).len());
    }

    #[test]
    fn what_waits_has_a_bound_and_a_line_over_it_is_not_dropped() {
        let sink = Sink::default();
        let lines = Lines::start(sink.clone()).unwrap();
        let line = [b'x'; 64 << 10];
        for _ in 0..64 {
            lines.0.line(&line, false);
            assert!(lock(&lines.0.gathered).bytes.len() <= GATHERED_MAX);
        }
        lines.flush();
        assert_eq!(sink.text().len(), 64 * line.len());
    }
}
