//! Counts the tokens of a choice's reasoning, by its tokens alone.

use super::{Opening, ReasoningStyle, SPACE_BYTES_MAX};

#[derive(Clone, Debug)]
enum Phase {
    /// The opening tag may come; so many tokens may belong to it.
    Before(u32),
    Inside,
    After,
}

/// A token counts when the reasoning was not over before it; those of the tags do.
#[derive(Clone, Debug)]
pub(super) struct ReasoningCount {
    tags: ReasoningStyle,
    phase: Phase,
    /// The last bytes, as far as a tag may begin in them.
    tail: Vec<u8>,
    tokens: u32,
}

impl ReasoningCount {
    /// Makes the count of one choice.
    pub(super) fn new(tags: ReasoningStyle, opening: Opening) -> Self {
        let phase = match opening {
            Opening::Free => Phase::Before(0),
            Opening::Inside => Phase::Inside,
            Opening::Over => Phase::After,
        };
        ReasoningCount { tags, phase, tail: Vec::new(), tokens: 0 }
    }

    /// Takes the next token's bytes.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        if matches!(self.phase, Phase::After) {
            return;
        }
        self.tail.extend_from_slice(bytes);
        if let Phase::Before(pending) = &mut self.phase {
            *pending += 1;
            let rest = self.tail.trim_ascii_start();
            let (open, space) = (self.tags.open.as_bytes(), self.tail.len() - rest.len());
            if rest.starts_with(open) {
                // This token is counted below.
                self.tokens += *pending - 1;
                self.phase = Phase::Inside;
                self.tail.drain(..space + open.len());
            } else if !open.starts_with(rest) || space > SPACE_BYTES_MAX {
                self.phase = Phase::After;
            }
        }
        if let Phase::Inside = self.phase {
            self.tokens += 1;
            let close = self.tags.close.as_bytes();
            if self.tail.windows(close.len()).any(|window| window == close) {
                self.phase = Phase::After;
            }
            let keep = self.tail.len().min(close.len() - 1);
            self.tail.drain(..self.tail.len() - keep);
        }
    }

    /// Returns the tokens of the reasoning so far.
    pub(super) fn tokens(&self) -> u32 {
        self.tokens
    }
}
