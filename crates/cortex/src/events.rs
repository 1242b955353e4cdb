//! The events of a stream that this program reads itself: a canary's answer, or a chat of the command line.

use bytes::Bytes;
use wire::{EventSplitter, EventTooLarge};

/// Why there is no further event.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EventsError {
    /// The connection ended before the stream did.
    #[error("the stream was lost: {0}")]
    Lost(#[from] reqwest::Error),
    /// An event passed the limit.
    #[error(transparent)]
    TooLarge(#[from] EventTooLarge),
}

/// Whole events of an answer, one after another.
#[derive(Debug)]
pub(crate) struct Events {
    response: reqwest::Response,
    splitter: EventSplitter,
}

impl Events {
    /// Reads `response`, whose events have at most `limit` bytes each.
    pub(crate) fn new(response: reqwest::Response, limit: usize) -> Self {
        Events { response, splitter: EventSplitter::new(limit) }
    }

    /// Returns the next event, `None` at the body's end; what is unfinished there is none.
    ///
    /// # Errors
    /// [`EventsError`]; nothing comes after it.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, EventsError> {
        loop {
            if let Some(event) = self.splitter.next_event()? {
                return Ok(Some(event));
            }
            match self.response.chunk().await? {
                Some(chunk) => self.splitter.push(chunk),
                None => return Ok(None),
            }
        }
    }
}
