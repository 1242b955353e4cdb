//! What a model says, taken apart: reasoning, content, tool calls.
//!
//! A parser takes one choice's text in pieces. It steps by characters, and all it knows is what the characters so far
//! said; so deltas depend on the text alone, put together they are the same whatever the pieces were, and a choice
//! that goes on elsewhere goes on equally once its text so far was pushed. What may yet become a tag or a call is held
//! back, within bounds, and released at the finish. Nothing that is said is lost, but for the tags themselves and the
//! white space around them.

mod calls;
mod count;
mod json;
mod kinds;
mod reasoning;
mod style;
mod tagged;

pub use calls::{CALL_BYTES_MAX, CALLS_MAX};
pub use json::ARGUMENTS_DEPTH_MAX;
pub use kinds::texts_of;
pub use style::{Opening, Overrides, ReasoningStyle, Style, ToolStyle};

use crate::tools::Tools;
use calls::Calls;
use count::ReasoningCount;
use reasoning::Reasoning;

/// Most bytes of white space that are held back to see what follows.
const SPACE_BYTES_MAX: usize = 64;

/// A part of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delta {
    /// More of `reasoning_content`.
    Reasoning(String),
    /// More of `content`.
    Content(String),
    /// A call begins.
    Call {
        /// Its place among the choice's calls, from 0, without gaps.
        index: u32,
        /// The tool's name, one of the request's.
        name: String,
    },
    /// More of a call's arguments.
    Arguments {
        /// Which call's.
        index: u32,
        /// A piece of JSON.
        text: String,
    },
}

/// Deltas in order; neighbours of one kind are one.
#[derive(Debug, Default)]
struct Deltas(Vec<Delta>);

impl Deltas {
    fn reasoning(&mut self, more: &str) {
        match self.0.last_mut() {
            _ if more.is_empty() => {}
            Some(Delta::Reasoning(text)) => text.push_str(more),
            _ => self.0.push(Delta::Reasoning(more.to_string())),
        }
    }

    fn content(&mut self, more: &str) {
        match self.0.last_mut() {
            _ if more.is_empty() => {}
            Some(Delta::Content(text)) => text.push_str(more),
            _ => self.0.push(Delta::Content(more.to_string())),
        }
    }

    fn arguments(&mut self, index: u32, more: &str) {
        match self.0.last_mut() {
            _ if more.is_empty() => {}
            Some(Delta::Arguments { index: last, text }) if *last == index => text.push_str(more),
            _ => self.0.push(Delta::Arguments { index, text: more.to_string() }),
        }
    }
}

/// One choice's text on its way into parts. The default one searches for nothing.
#[derive(Clone, Debug, Default)]
pub struct OutputParser {
    reasoning: Option<Reasoning>,
    calls: Option<Calls>,
    count: Option<ReasoningCount>,
}

impl OutputParser {
    /// Makes the parser of one choice; without a style nothing is searched for, and all text is content.
    pub fn new(style: &Style, opening: Opening, tools: &Tools) -> Self {
        let calls = style.tools.filter(|_| tools.active()).map(|style| Calls::new(style, tools));
        let reasoning = style.reasoning.map(|tags| Reasoning::new(tags, opening));
        OutputParser { reasoning, calls, count: style.reasoning.map(|tags| ReasoningCount::new(tags, opening)) }
    }

    /// Takes the bytes of the next token, for the count of reasoning alone.
    pub fn count(&mut self, token: &[u8]) {
        if let Some(count) = &mut self.count {
            count.push(token);
        }
    }

    /// Returns how many of the counted tokens were reasoning.
    pub fn reasoning_tokens(&self) -> u32 {
        self.count.as_ref().map_or(0, ReasoningCount::tokens)
    }

    /// Whether all text is content.
    pub fn plain(&self) -> bool {
        self.reasoning.is_none() && self.calls.is_none()
    }

    /// Takes more text. After the end, and once [`OutputParser::over`], there are no more deltas.
    pub fn push(&mut self, text: &str) -> Vec<Delta> {
        let mut out = Deltas::default();
        match (&mut self.reasoning, &mut self.calls) {
            (None, None) => out.content(text),
            (None, Some(calls)) => text.chars().for_each(|c| calls.push(c, &mut out)),
            (Some(reasoning), calls) => {
                for c in text.chars() {
                    let body = reasoning.push(c, &mut out);
                    pass(calls, &body, &mut out);
                }
            }
        }
        out.0
    }

    /// Takes the end, and releases what was held back.
    pub fn finish(&mut self) -> Vec<Delta> {
        let mut out = Deltas::default();
        if let Some(reasoning) = &mut self.reasoning {
            let body = reasoning.finish(&mut out);
            pass(&mut self.calls, &body, &mut out);
        }
        if let Some(calls) = &mut self.calls {
            calls.finish(&mut out);
        }
        out.0
    }

    /// Whether a tool was called.
    pub fn called(&self) -> bool {
        self.calls.as_ref().is_some_and(|calls| calls.made() > 0)
    }

    /// Whether nothing more may come: the one call that was allowed is made.
    pub fn over(&self) -> bool {
        self.calls.as_ref().is_some_and(Calls::over)
    }
}

fn pass(calls: &mut Option<Calls>, body: &str, out: &mut Deltas) {
    match calls {
        Some(calls) => body.chars().for_each(|c| calls.push(c, out)),
        None => out.content(body),
    }
}

/// Names a call: nine letters and digits, as the strictest templates want them. The same for every attempt.
pub fn call_id(completion_id: &str, choice: u32, index: u32) -> String {
    const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let hash = blake3::hash(format!("{completion_id} {choice} {index}").as_bytes());
    let letter = |byte: &u8| char::from(ALPHABET[usize::from(*byte) % ALPHABET.len()]);
    hash.as_bytes().iter().take(9).map(letter).collect()
}

/// Waits for a tag in a text, and holds back what may be its start, and the white space before that.
#[derive(Clone, Debug)]
struct Seek {
    tag: &'static str,
    /// One that will do as well.
    other: Option<&'static str>,
    held: String,
    /// The tag that was found last.
    found: &'static str,
}

impl Seek {
    fn new(tag: &'static str) -> Self {
        Seek { tag, other: None, held: String::new(), found: tag }
    }

    /// Waits for another tag too.
    fn or(self, other: Option<&'static str>) -> Self {
        Seek { other, ..self }
    }

    /// Takes a character; once the tag is whole, it is gone, and the white space before it is returned.
    fn push(&mut self, c: char, release: &mut impl FnMut(&str)) -> Option<String> {
        self.held.push(c);
        loop {
            let rest = self.held.trim_start_matches(is_space);
            let space = self.held.len() - rest.len();
            let mut tags = [Some(self.tag), self.other].into_iter().flatten();
            if let Some(tag) = tags.clone().find(|tag| *tag == rest) {
                self.found = tag;
                self.held.truncate(space);
                return Some(self.take());
            }
            if space <= SPACE_BYTES_MAX && tags.any(|tag| tag.starts_with(rest)) {
                return None;
            }
            // Of nothing but white space the last of it stays: a tag may follow.
            let gone = rest.chars().next().map_or(1, |first| space + first.len_utf8());
            release(&self.held[..gone]);
            self.held.drain(..gone);
        }
    }

    /// Gives up what was held back.
    fn take(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\n' | '\r' | '\t')
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
