//! Splits the reasoning off the front of an answer.

use super::{Deltas, Opening, ReasoningStyle, SPACE_BYTES_MAX, Seek, is_space};

#[derive(Clone, Debug)]
enum Phase {
    /// The opening tag may come; holds white space and what may be its start.
    Before(String),
    /// In the reasoning; nothing but white space so far when `blank`.
    Inside { blank: bool, seek: Seek },
    /// White space after the closing tag.
    Gap,
    /// In the rest.
    After,
}

/// The splitter of one choice.
#[derive(Clone, Debug)]
pub(super) struct Reasoning {
    tags: ReasoningStyle,
    phase: Phase,
}

impl Reasoning {
    pub(super) fn new(tags: ReasoningStyle, opening: Opening) -> Self {
        let phase = match opening {
            Opening::Free => Phase::Before(String::new()),
            Opening::Inside => Phase::Inside { blank: true, seek: Seek::new(tags.close) },
            Opening::Over => Phase::Gap,
        };
        Reasoning { tags, phase }
    }

    /// Takes a character; returns what is not reasoning.
    pub(super) fn push(&mut self, c: char, out: &mut Deltas) -> String {
        match &mut self.phase {
            Phase::Before(held) => {
                held.push(c);
                let rest = held.trim_start_matches(is_space);
                if rest == self.tags.open {
                    self.phase = Phase::Inside { blank: true, seek: Seek::new(self.tags.close) };
                } else if !self.tags.open.starts_with(rest) || held.len() - rest.len() > SPACE_BYTES_MAX {
                    let held = std::mem::take(held);
                    self.phase = Phase::After;
                    return held;
                }
            }
            Phase::Inside { blank, seek } => {
                let mut release = |text: &str| {
                    let text = if *blank { text.trim_start_matches(is_space) } else { text };
                    *blank &= text.is_empty();
                    out.reasoning(text);
                };
                if seek.push(c, &mut release).is_some() {
                    self.phase = Phase::Gap;
                }
            }
            Phase::Gap if is_space(c) => {}
            Phase::Gap | Phase::After => {
                self.phase = Phase::After;
                return c.to_string();
            }
        }
        String::new()
    }

    /// Takes the end; returns what is not reasoning of what was held back.
    pub(super) fn finish(&mut self, out: &mut Deltas) -> String {
        match &mut self.phase {
            Phase::Before(held) => std::mem::take(held),
            Phase::Inside { blank, seek } => {
                let held = seek.take();
                out.reasoning(if *blank { held.trim_start_matches(is_space) } else { &held });
                String::new()
            }
            Phase::Gap | Phase::After => String::new(),
        }
    }
}
