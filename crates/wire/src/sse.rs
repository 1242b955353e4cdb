//! Server-sent events: the encoder of one event, and the splitter that finds whole events in any chunking.
//!
//! Follows the WHATWG event stream format; the unit of passing on is the whole event, released at its blank line.

use bytes::{Bytes, BytesMut};

/// The content type of a stream.
pub const HTTP_SSE_CONTENT_TYPE: &str = "text/event-stream; charset=utf-8";
/// The last event of a successful stream.
pub const DONE_EVENT: &[u8] = b"data: [DONE]\n\n";
/// A comment that clients skip.
pub const KEEP_ALIVE_EVENT: &[u8] = b": keep-alive\n\n";

/// Makes the event whose data is one line of JSON.
pub fn data_event(json: &str) -> Bytes {
    let mut event = Vec::with_capacity(json.len() + 8);
    event.extend_from_slice(b"data: ");
    event.extend_from_slice(json.as_bytes());
    event.extend_from_slice(b"\n\n");
    event.into()
}

/// An event passed the limit before it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventTooLarge {
    /// The limit, in bytes.
    pub limit: usize,
}

impl std::fmt::Display for EventTooLarge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "an event of the stream has more than {} bytes", self.limit)
    }
}

impl std::error::Error for EventTooLarge {}

/// Cuts a byte stream into whole events, blank line included. Bytes are neither changed nor parsed; only an event that
/// came in pieces is copied.
#[derive(Debug)]
pub struct EventSplitter {
    /// What was pushed last and not taken yet; empty while an event is in pieces.
    chunk: Bytes,
    /// An event in pieces, and what came after it.
    pieces: BytesMut,
    scanned: usize,
    limit: usize,
}

impl EventSplitter {
    /// Makes a splitter that holds at most `limit` bytes of an unfinished event.
    pub fn new(limit: usize) -> Self {
        EventSplitter { chunk: Bytes::new(), pieces: BytesMut::new(), scanned: 0, limit }
    }

    /// Takes the next chunk.
    pub fn push(&mut self, chunk: Bytes) {
        if self.chunk.is_empty() && self.pieces.is_empty() {
            self.chunk = chunk;
            return;
        }
        self.keep();
        self.pieces.extend_from_slice(&chunk);
    }

    fn keep(&mut self) {
        self.pieces.extend_from_slice(&std::mem::take(&mut self.chunk));
    }

    /// Returns the next whole event of what was pushed.
    ///
    /// # Errors
    /// [`EventTooLarge`] when the unfinished rest has passed the limit.
    pub fn next_event(&mut self) -> Result<Option<Bytes>, EventTooLarge> {
        if self.pieces.is_empty() {
            if let Some(end) = event_end(&self.chunk, 0) {
                return Ok(Some(self.chunk.split_to(end)));
            }
            self.keep();
        } else if let Some(end) = event_end(&self.pieces, self.scanned) {
            self.scanned = 0;
            return Ok(Some(self.pieces.split_to(end).freeze()));
        }
        if self.pieces.len() > self.limit {
            return Err(EventTooLarge { limit: self.limit });
        }
        // A blank line may straddle the border: up to three bytes of it can be here.
        self.scanned = self.pieces.len().saturating_sub(3);
        Ok(None)
    }

    /// Drops what is left at the end of an attempt; returns how many bytes that were.
    pub fn discard_partial(&mut self) -> usize {
        let rest = self.chunk.len() + self.pieces.len();
        self.chunk.clear();
        self.pieces.clear();
        self.scanned = 0;
        rest
    }
}

/// Finds the end of the first event: just past its blank line. Lines end with LF, CRLF or CR.
fn event_end(bytes: &[u8], from: usize) -> Option<usize> {
    let mut at = from;
    while at < bytes.len() {
        let first = line_end(bytes, at)?;
        match line_break(bytes, first) {
            Some(length) if length > 0 => {
                let next = first;
                return Some(next + length);
            }
            _ => at = first,
        }
    }
    None
}

/// Returns the position just past the next line break at or after `at`.
fn line_end(bytes: &[u8], at: usize) -> Option<usize> {
    let found = at + memchr::memchr2(b'\n', b'\r', &bytes[at..])?;
    line_break(bytes, found).map(|length| found + length)
}

/// Returns the length of the line break at `at`, if one is there and whole: a CR at the very end may be half.
fn line_break(bytes: &[u8], at: usize) -> Option<usize> {
    match (bytes.get(at), bytes.get(at + 1)) {
        (Some(b'\n'), _) => Some(1),
        (Some(b'\r'), Some(b'\n')) => Some(2),
        (Some(b'\r'), Some(_)) => Some(1),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn split(bytes: &[u8], cuts: &[usize]) -> Vec<Vec<u8>> {
        let mut splitter = EventSplitter::new(1 << 20);
        let mut events = Vec::new();
        let mut last = 0;
        let ends = cuts.iter().map(|cut| cut % (bytes.len() + 1)).chain([bytes.len()]);
        let mut ends: Vec<usize> = ends.collect();
        ends.sort_unstable();
        for end in ends {
            let chunk = Bytes::copy_from_slice(&bytes[last..end]);
            last = end;
            splitter.push(chunk);
            while let Some(event) = splitter.next_event().unwrap() {
                events.push(event.to_vec());
            }
        }
        events
    }

    #[test]
    fn events_end_at_the_blank_line_in_all_three_dialects() {
        assert_eq!(split(b"data: 1\n\ndata: 2\n\ndata: ha", &[]), [b"data: 1\n\n".to_vec(), b"data: 2\n\n".to_vec()]);
        assert_eq!(split(b"a: b\r\n\r\n: c\r\n\r\n", &[]), [b"a: b\r\n\r\n".to_vec(), b": c\r\n\r\n".to_vec()]);
        assert_eq!(split(b"x\r\ry\r\rz", &[]), [b"x\r\r".to_vec(), b"y\r\r".to_vec()]);
    }

    #[test]
    fn an_endless_event_is_an_error() {
        let mut splitter = EventSplitter::new(10);
        splitter.push(Bytes::from_static(b"data: 0123456789"));
        assert_eq!(splitter.next_event(), Err(EventTooLarge { limit: 10 }));
    }

    #[test]
    fn recorded_streams_come_out_byte_for_byte() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/anthropic-sse");
        let Ok(recording) = std::fs::read(format!("{folder}/basic_response.txt")) else {
            assert!(std::env::var("CORTEX_TEST_DATA").as_deref() != Ok("required"), "the recordings are missing");
            eprintln!("SKIPPED: the recorded streams are not beside this checkout");
            return;
        };
        let events = split(&recording, &[7, 100, 101, 102, 333]);
        assert!(events.len() > 3);
        assert!(recording.starts_with(&events.concat()));
    }

    #[test]
    fn whole_events_of_a_chunk_are_not_copied() {
        let chunk = Bytes::from(b"data: 1\n\ndata: 2\n\ndata".to_vec());
        let mut splitter = EventSplitter::new(100);
        splitter.push(chunk.clone());
        for at in [0, 9] {
            let event = splitter.next_event().unwrap().unwrap();
            assert_eq!(event.as_ptr(), chunk[at..].as_ptr());
        }
        assert_eq!(splitter.next_event(), Ok(None));
        splitter.push(Bytes::from_static(b": 3\n"));
        assert_eq!(splitter.next_event(), Ok(None));
        splitter.push(Bytes::from_static(b"\ndata: 4\n\n"));
        assert_eq!(splitter.next_event().unwrap().unwrap(), "data: 3\n\n");
        assert_eq!(splitter.next_event().unwrap().unwrap(), "data: 4\n\n");
        assert_eq!(splitter.discard_partial(), 0);
    }

    proptest! {
        #[test]
        fn chunking_changes_nothing(
            text in "[a\n\r]{0,60}", cuts in proptest::collection::vec(0usize..64, 0..8)
        ) {
            let whole = split(text.as_bytes(), &[]);
            let cut = split(text.as_bytes(), &cuts);
            prop_assert_eq!(cut.concat(), whole.concat());
            if !text.contains('\r') {
                prop_assert_eq!(cut, whole);
            }
        }
    }
}
