//! Finds tool calls in what is not reasoning.
//!
//! ```text
//! text -mark-> open -{-> json -whole, a tool's-> after -mark or separator-> open ...
//!   ^-- everything held so far is content -- broken, or no tool's
//! ```
//! A call comes out once it is whole, and its name is one of the request's tools, and its arguments are an object: a
//! client never sees a part of a call that is none in the end. Only where a call is forced, and so its text constrained,
//! do arguments come out as they are said.

use std::sync::Arc;

use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use super::json::{JsonScan, Scan};
use super::{Delta, Deltas, SPACE_BYTES_MAX, Seek, ToolStyle, is_space};
use crate::tools::{TOOL_NAME_BYTES_MAX, ToolChoice, Tools, is_name};

/// Most bytes of one call; longer ones are content.
pub const CALL_BYTES_MAX: usize = 1 << 20;
/// Most calls of one choice; more are content.
pub const CALLS_MAX: u32 = 128;
/// Most bytes between `[TOOL_CALLS]` and the arguments: a name, and an id of the model's own.
const NAME_PART_BYTES_MAX: usize = TOOL_NAME_BYTES_MAX + 64;

#[derive(Clone, Debug)]
enum State {
    /// Nothing but white space so far, and a call needs no mark here.
    Start,
    /// In content.
    Text,
    /// After a mark, or inside a list of calls.
    Open { list: bool },
    /// In a name that stands before the arguments, from this place of what is held.
    Name { at: usize },
    /// In a call's object, from this place of what is held.
    Json { scan: JsonScan, at: usize, name: Option<String>, list: bool, sent: Sent },
    /// A call was made.
    After { list: bool },
}

/// How far a forced call has come out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    Nothing,
    /// Its name, and its arguments so far.
    Part,
    /// All of its arguments.
    Arguments,
}

/// The finder of one choice.
#[derive(Clone, Debug)]
pub(super) struct Calls {
    style: ToolStyle,
    names: Arc<[String]>,
    parallel: bool,
    /// Calls are forced.
    forced: bool,
    state: State,
    seek: Seek,
    /// What is content unless it is a call.
    held: String,
    /// Calls that have come out, the last one in parts maybe.
    made: u32,
    /// Calls that are whole.
    whole: u32,
}

/// A call that is whole.
struct Call {
    name: String,
    arguments: String,
}

impl Calls {
    pub(super) fn new(style: ToolStyle, tools: &Tools) -> Self {
        Calls {
            style,
            names: tools.list.iter().map(|tool| tool.name.clone()).collect(),
            parallel: tools.parallel,
            forced: matches!(tools.choice, ToolChoice::Required | ToolChoice::Named(_)),
            state: if style == ToolStyle::Llama { State::Start } else { State::Text },
            seek: Seek::new(style.open()),
            held: String::new(),
            made: 0,
            whole: 0,
        }
    }

    pub(super) fn made(&self) -> u32 {
        self.made
    }

    pub(super) fn over(&self) -> bool {
        self.whole > 0 && !self.parallel
    }

    pub(super) fn push(&mut self, c: char, out: &mut Deltas) {
        if self.over() {
            return;
        }
        if let State::Text = self.state {
            if let Some(space) = self.seek.push(c, &mut |text| out.content(text)) {
                self.held = space + self.style.open();
                self.state = State::Open { list: false };
            }
            return;
        }
        self.held.push(c);
        match &mut self.state {
            State::Text => {}
            State::Start if is_space(c) && self.held.len() <= SPACE_BYTES_MAX => {}
            State::Start if c == '{' => self.begin(None, false),
            State::Start => self.again(out),
            State::Open { .. } if is_space(c) && self.held.len() <= CALL_BYTES_MAX => {}
            State::Open { list } => {
                let list = *list;
                let named = self.style == ToolStyle::Mistral && !list;
                match c {
                    '{' => self.begin(None, list),
                    '[' if named => self.state = State::Open { list: true },
                    _ if named && is_name(c.encode_utf8(&mut [0; 4])) => {
                        self.state = State::Name { at: self.held.len() - 1 };
                    }
                    _ => self.broken(c, out),
                }
            }
            State::Name { at } => {
                let part = &self.held[*at..];
                match name_before_arguments(part) {
                    Some(name) => {
                        self.begin(Some(name), false);
                        if self.forced {
                            self.pass_on(c, 0, out);
                        }
                    }
                    None if c == '{' || part.len() > NAME_PART_BYTES_MAX => self.broken(c, out),
                    None => {}
                }
            }
            State::Json { scan, .. } => {
                let before = scan.depth();
                let scanned = scan.push(c);
                if self.forced && scanned != Scan::Broken {
                    self.pass_on(c, before, out);
                }
                match scanned {
                    Scan::Open if self.held.len() <= CALL_BYTES_MAX => {}
                    Scan::Whole => self.whole(out),
                    Scan::Open | Scan::Broken => self.broken(c, out),
                }
            }
            State::After { list } => {
                let list = *list;
                self.between(c, list, out);
            }
        }
    }

    /// Takes the end.
    pub(super) fn finish(&mut self, out: &mut Deltas) {
        let mut held = std::mem::take(&mut self.held);
        match self.state {
            State::Text => held = self.seek.take(),
            // A part of what would have closed the call.
            State::After { .. } if self.closes(held.trim_start_matches(is_space)) => held.clear(),
            State::Json { sent: Sent::Part | Sent::Arguments, .. } => held.clear(),
            _ => {}
        }
        if self.made == 0 || !held.chars().all(is_space) {
            out.content(&held);
        }
        self.state = State::Text;
    }

    /// Begins a call's object with the bracket that was just held.
    fn begin(&mut self, name: Option<String>, list: bool) {
        let mut scan = JsonScan::new(name.is_none());
        scan.push('{');
        self.state = State::Json { scan, at: self.held.len() - 1, name, list, sent: Sent::Nothing };
    }

    /// Lets a forced call's name and arguments out as far as they are said. `before` is how deep the character was.
    fn pass_on(&mut self, c: char, before: usize, out: &mut Deltas) {
        let State::Json { scan, at, name, sent, .. } = &mut self.state else { return };
        let outer = usize::from(name.is_none());
        let depth = scan.depth();
        if *sent == Sent::Nothing && (before, depth, c) == (outer, outer + 1, '{') && self.made < CALLS_MAX {
            let json = &self.held[*at..];
            let named = name.clone().or_else(|| name_said(scan, json));
            if let Some(name) = named.filter(|name| self.names.contains(name)) {
                out.0.push(Delta::Call { index: self.made, name });
                self.made += 1;
                *sent = Sent::Part;
            }
        }
        if *sent == Sent::Part {
            out.arguments(self.made - 1, c.encode_utf8(&mut [0; 4]));
            if depth == outer {
                *sent = Sent::Arguments;
            }
        }
    }

    /// Makes what was held a call, or content.
    fn whole(&mut self, out: &mut Deltas) {
        let State::Json { scan, at, name, list, sent } = std::mem::replace(&mut self.state, State::Text) else {
            return;
        };
        if sent != Sent::Nothing {
            self.whole += 1;
            self.state = State::After { list };
            self.held.clear();
            return;
        }
        let call = self.call(&scan, &self.held[at..], name).filter(|call| self.names.contains(&call.name));
        match call {
            Some(Call { name, arguments }) if self.made < CALLS_MAX => {
                let index = self.made;
                out.0.push(Delta::Call { index, name });
                out.0.push(Delta::Arguments { index, text: arguments });
                self.made += 1;
                self.whole += 1;
                self.state = State::After { list };
            }
            _ => out.content(&self.held),
        }
        self.held.clear();
    }

    fn call(&self, scan: &JsonScan, json: &str, name: Option<String>) -> Option<Call> {
        serde_json::from_str::<IgnoredAny>(json).ok()?;
        if let Some(name) = name {
            return Some(Call { name, arguments: json.to_string() });
        }
        let name = serde_json::from_str(member(scan, json, &["name"])?).ok()?;
        let arguments = match member(scan, json, ARGUMENTS) {
            None | Some("null") => "{}".to_string(),
            Some(object) if object.starts_with('{') => object.to_string(),
            // Some models write the object as a string, as OpenAI's API does.
            Some(text) => {
                let text: String = serde_json::from_str(text).ok()?;
                serde_json::from_str::<Map<String, Value>>(&text).ok()?;
                text
            }
        };
        Some(Call { name, arguments })
    }

    /// Between two calls.
    fn between(&mut self, c: char, list: bool, out: &mut Deltas) {
        let rest = self.held.trim_start_matches(is_space);
        match self.style {
            _ if self.held.len() > SPACE_BYTES_MAX => self.again(out),
            ToolStyle::Hermes if rest == "</tool_call>" => {
                self.held.clear();
                self.state = State::Text;
            }
            ToolStyle::Llama if c == '{' => self.begin(None, false),
            ToolStyle::Mistral if list && rest == "," => self.state = State::Open { list },
            ToolStyle::Mistral if list && rest == "]" => {
                self.held.clear();
                self.state = State::Text;
            }
            ToolStyle::Mistral if !list => self.again(out),
            _ if self.closes(rest) => {}
            _ => self.again(out),
        }
    }

    /// Whether this may stand after a call, or begin what may.
    fn closes(&self, rest: &str) -> bool {
        match self.style {
            ToolStyle::Hermes => "</tool_call>".starts_with(rest),
            ToolStyle::Llama => rest.strip_prefix(';').unwrap_or(rest).chars().all(is_space),
            ToolStyle::Mistral => rest.is_empty(),
        }
    }

    /// What was held is text, in which a mark may be.
    fn again(&mut self, out: &mut Deltas) {
        self.state = State::Text;
        for c in std::mem::take(&mut self.held).chars() {
            self.push(c, out);
        }
    }

    /// What was held up to its last character is content: looking through it again could take a time that grows with
    /// the square of its length.
    fn broken(&mut self, last: char, out: &mut Deltas) {
        self.held.truncate(self.held.len() - last.len_utf8());
        if !matches!(self.state, State::Json { sent: Sent::Part | Sent::Arguments, .. }) {
            out.content(&self.held);
        }
        self.held.clear();
        self.state = State::Text;
        self.push(last, out);
    }
}

/// The keys of a call's arguments.
const ARGUMENTS: &[&str] = &["arguments", "parameters"];

/// Returns the value of the last member with one of these keys.
fn member<'a>(scan: &JsonScan, json: &'a str, wanted: &[&str]) -> Option<&'a str> {
    let named = scan.members().iter().rev().find(|member| {
        let key = serde_json::from_str::<String>(&json[member.key.clone()]);
        key.is_ok_and(|key| wanted.contains(&key.as_str()))
    });
    named.map(|member| json[member.value.clone()].trim_matches(is_space))
}

/// Returns the name in a call whose arguments just begin.
fn name_said(scan: &JsonScan, json: &str) -> Option<String> {
    let key: String = serde_json::from_str(&json[scan.members().last()?.key.clone()]).ok()?;
    let name = ARGUMENTS.contains(&key.as_str()).then(|| member(scan, json, &["name"]))??;
    serde_json::from_str(name).ok()
}

/// Reads `name`, `name[ARGS]` or `name[CALL_ID]id[ARGS]` before an opening bracket.
fn name_before_arguments(part: &str) -> Option<String> {
    let part = part.strip_suffix('{')?.trim_end_matches(is_space);
    let part = part.strip_suffix("[ARGS]").unwrap_or(part);
    let name = part.split_once("[CALL_ID]").map_or(part, |(name, _)| name).trim_end_matches(is_space);
    is_name(name).then(|| name.to_string())
}
