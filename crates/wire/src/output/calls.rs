//! Finds tool calls in what is not reasoning.
//!
//! ```text
//! text -mark-> open -{-> json -name is certain-> said -end-> after -mark or separator-> open ...
//!   ^-- everything held so far is content -- broken, or no tool's
//! ```
//! The name comes out once it is certain that a call is made: it is one of the request's tools, and an object of
//! arguments begins. The arguments then come out as they are said, also where they turn out to be no JSON: so far a client
//! has them already. What broke off before that is content to the last byte. A call that says its arguments before its
//! name, or as a text, comes out once it is whole.

use std::sync::Arc;

use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use super::json::{Brackets, JsonScan, Scan};
use super::tagged::{Step, Tagged};
use super::{Delta, Deltas, SPACE_BYTES_MAX, Seek, ToolStyle, is_space};
use crate::tools::{TOOL_NAME_BYTES_MAX, Tool, Tools, is_name};

/// Most bytes of one call that are held back; a longer one is content.
pub const CALL_BYTES_MAX: usize = 1 << 20;
/// Most calls of one choice; more are content.
pub const CALLS_MAX: u32 = 128;
/// Most bytes between a mark and the arguments, where the name stands there: and maybe an id of the model's own.
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
    /// In a call's object, from this place of what is held; its name is not certain.
    Json { scan: JsonScan, at: usize, name: Option<String>, list: bool },
    /// In a call whose name is out.
    Said { part: Part, outer: usize, list: bool },
    /// In a call of tags.
    Tagged { call: Box<Tagged>, said: bool },
    /// A call was made.
    After { list: bool },
}

/// Where a call is whose name is out.
#[derive(Clone, Debug)]
enum Part {
    /// In its arguments.
    Arguments(JsonScan),
    /// In arguments that are no JSON any more. They end by their brackets, or where the closing mark comes.
    Loose(Brackets, Option<Seek>),
    /// After its arguments, in its object; nothing but the object's end is looked for after loose ones.
    Rest(Option<JsonScan>),
}

/// The finder of one choice.
#[derive(Clone, Debug)]
pub(super) struct Calls {
    style: ToolStyle,
    tools: Arc<[Tool]>,
    parallel: bool,
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
            tools: tools.list.as_slice().into(),
            parallel: tools.parallel,
            state: if style == ToolStyle::Llama { State::Start } else { State::Text },
            seek: Seek::new(style.open()).or(style.tags().and_then(|tags| tags.name).map(|(before, _)| before)),
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
        match &mut self.state {
            State::Text => {
                if let Some(space) = self.seek.push(c, &mut |text| out.content(text)) {
                    self.opened(space);
                }
                return;
            }
            State::Said { .. } => return self.said(c, out),
            State::Tagged { .. } => return self.tagged(c, out),
            _ => self.held.push(c),
        }
        match &mut self.state {
            State::Text | State::Said { .. } | State::Tagged { .. } => {}
            State::Start if is_space(c) && self.held.len() <= SPACE_BYTES_MAX => {}
            State::Start if c == '{' => self.begin(None, false, out),
            State::Start => self.again(out),
            State::Open { .. } if is_space(c) && self.held.len() <= CALL_BYTES_MAX => {}
            State::Open { list } => {
                let list = *list;
                let named = self.style == ToolStyle::Mistral && !list;
                match c {
                    '{' => self.begin(None, list, out),
                    '[' if named => self.state = State::Open { list: true },
                    _ if named && is_name(c.encode_utf8(&mut [0; 4])) => {
                        self.state = State::Name { at: self.held.len() - 1 };
                    }
                    _ => self.broken(c.encode_utf8(&mut [0; 4]), out),
                }
            }
            State::Name { at } => {
                let part = &self.held[*at..];
                match name_before_arguments(self.style, part) {
                    Some(name) => self.begin(Some(name), false, out),
                    None if c == '{' || part.len() > NAME_PART_BYTES_MAX => {
                        self.broken(c.encode_utf8(&mut [0; 4]), out)
                    }
                    None => {}
                }
            }
            State::Json { scan, .. } => {
                let before = scan.depth();
                match scan.push(c) {
                    Scan::Open if c == '{' && self.certain(before, out) => {}
                    Scan::Open if self.held.len() <= CALL_BYTES_MAX => {}
                    Scan::Whole => self.whole(out),
                    Scan::Open | Scan::Broken => self.broken(c.encode_utf8(&mut [0; 4]), out),
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
        let closes = self.closes(held.trim_start_matches(is_space));
        match &mut self.state {
            State::Text => held = self.seek.take(),
            // A part of what would have closed the call.
            State::After { .. } if closes => held.clear(),
            State::Said { part: Part::Loose(_, Some(seek)), .. } => {
                let more = seek.take();
                out.arguments(self.made - 1, &more);
            }
            _ => {}
        }
        if self.made == 0 || !held.chars().all(is_space) {
            out.content(&held);
        }
        self.state = State::Text;
    }

    /// A mark has come, after this white space.
    fn opened(&mut self, space: String) {
        let mark = self.seek.found;
        self.held = space + mark;
        self.state = match self.style.tags() {
            Some(tags) => State::Tagged { call: Box::new(Tagged::new(tags, mark, self.tools.clone())), said: false },
            None if self.style == ToolStyle::Functionary => State::Name { at: self.held.len() },
            None => State::Open { list: false },
        };
    }

    /// Begins a call's object with the bracket that was just held.
    fn begin(&mut self, name: Option<String>, list: bool, out: &mut Deltas) {
        let mut scan = JsonScan::new(name.is_none());
        scan.push('{');
        self.state = State::Json { scan, at: self.held.len() - 1, name, list };
        self.certain(0, out);
    }

    /// Lets the call out if the bracket that was just held begins the arguments of a tool. `before` is how deep it was.
    fn certain(&mut self, before: usize, out: &mut Deltas) -> bool {
        let State::Json { scan, at, name, list } = &mut self.state else { return false };
        let outer = usize::from(name.is_none());
        if (before, scan.depth()) != (outer, outer + 1) || self.made == CALLS_MAX {
            return false;
        }
        let said = name.clone().or_else(|| name_said(scan, &self.held[*at..]));
        let Some(name) = said.filter(|name| self.tools.iter().any(|tool| tool.name == *name)) else { return false };
        let part = Part::Arguments(std::mem::replace(scan, JsonScan::new(false)));
        self.state = State::Said { part, outer, list: *list };
        self.call(name, out);
        out.arguments(self.made - 1, "{");
        true
    }

    /// Lets a call's name out.
    fn call(&mut self, name: String, out: &mut Deltas) {
        out.0.push(Delta::Call { index: self.made, name });
        self.made += 1;
        self.held.clear();
    }

    /// Takes a character of a call whose name is out.
    fn said(&mut self, c: char, out: &mut Deltas) {
        let State::Said { part, outer, list } = &mut self.state else { return };
        let (index, outer, list) = (self.made - 1, *outer, *list);
        let over = match part {
            Part::Arguments(scan) => match scan.push(c) {
                Scan::Broken => {
                    *part = Part::Loose(Brackets::of(scan, outer), self.style.close().map(Seek::new));
                    return self.said(c, out);
                }
                _ => {
                    out.arguments(index, c.encode_utf8(&mut [0; 4]));
                    (scan.depth() == outer).then(|| Part::Rest(Some(scan.clone())))
                }
            },
            Part::Loose(brackets, seek) => {
                let mut release = |text: &str| out.arguments(index, text);
                let closed = match seek {
                    Some(seek) => seek.push(c, &mut release).is_some(),
                    None => {
                        release(c.encode_utf8(&mut [0; 4]));
                        false
                    }
                };
                if closed {
                    self.whole += 1;
                    self.state = State::Text;
                    return;
                }
                (brackets.push(c) == 0).then_some(Part::Rest(None))
            }
            Part::Rest(scan) => {
                let scanned = match scan {
                    Some(scan) => scan.push(c),
                    None if is_space(c) => Scan::Open,
                    None if c == '}' => Scan::Whole,
                    None => Scan::Broken,
                };
                if scanned != Scan::Open {
                    self.made_whole(list);
                }
                // The object's end is missing; the call is none the less whole.
                if scanned == Scan::Broken {
                    self.push(c, out);
                }
                return;
            }
        };
        match over {
            Some(_) if outer == 0 => self.made_whole(list),
            Some(rest) => *part = rest,
            None => {}
        }
    }

    fn made_whole(&mut self, list: bool) {
        self.whole += 1;
        self.held.clear();
        self.state = State::After { list };
    }

    /// Takes a character of a call in tags.
    fn tagged(&mut self, c: char, out: &mut Deltas) {
        let State::Tagged { call, said } = &mut self.state else { return };
        if !*said {
            self.held.push(c);
        }
        let step = call.push(c);
        if !*said
            && self.made < CALLS_MAX
            && let Some(name) = call.name().map(str::to_string)
        {
            *said = true;
            self.call(name, out);
        }
        let State::Tagged { call, said } = &mut self.state else { return };
        let said = *said;
        if said {
            out.arguments(self.made - 1, &call.said());
        }
        match step {
            Step::Open if said || (call.name().is_none() && self.held.len() <= CALL_BYTES_MAX) => {}
            _ if !said => {
                let rest = call.rest();
                let rest = Some(rest).filter(|rest| !rest.is_empty() && self.held.ends_with(rest.as_str()));
                self.broken(&rest.unwrap_or_else(|| c.to_string()), out);
            }
            Step::Whole { closed: false } => self.made_whole(false),
            Step::Whole { closed: true } => {
                self.whole += 1;
                self.state = State::Text;
            }
            Step::Open | Step::Broken => {
                let rest = call.rest();
                self.whole += 1;
                self.state = State::Text;
                rest.chars().for_each(|c| self.push(c, out));
            }
        }
    }

    /// Makes what was held a call, or content.
    fn whole(&mut self, out: &mut Deltas) {
        let State::Json { scan, at, name, list } = std::mem::replace(&mut self.state, State::Text) else {
            return;
        };
        let known = |call: &Call| self.tools.iter().any(|tool| tool.name == call.name);
        match whole_call(&scan, &self.held[at..], name).filter(known) {
            Some(Call { name, arguments }) if self.made < CALLS_MAX => {
                self.call(name, out);
                out.arguments(self.made - 1, &arguments);
                self.made_whole(list);
            }
            _ => out.content(&std::mem::take(&mut self.held)),
        }
    }

    /// Between two calls.
    fn between(&mut self, c: char, list: bool, out: &mut Deltas) {
        let rest = self.held.trim_start_matches(is_space);
        match self.style {
            _ if self.held.len() > SPACE_BYTES_MAX => self.again(out),
            ToolStyle::Llama if c == '{' => self.begin(None, false, out),
            ToolStyle::Mistral if list && rest == "," => self.state = State::Open { list },
            ToolStyle::Mistral if list && rest == "]" => {
                self.held.clear();
                self.state = State::Text;
            }
            ToolStyle::Mistral if !list => self.again(out),
            _ if self.style.close() == Some(rest) => {
                self.held.clear();
                self.state = State::Text;
            }
            _ if self.closes(rest) => {}
            _ => self.again(out),
        }
    }

    /// Whether this may stand after a call, or begin what may.
    fn closes(&self, rest: &str) -> bool {
        match self.style {
            ToolStyle::Llama => rest.strip_prefix(';').unwrap_or(rest).chars().all(is_space),
            style => style.close().unwrap_or_default().starts_with(rest),
        }
    }

    /// What was held is text, in which a mark may be.
    fn again(&mut self, out: &mut Deltas) {
        self.state = State::Text;
        for c in std::mem::take(&mut self.held).chars() {
            self.push(c, out);
        }
    }

    /// What was held is content but for its last part, a bounded one: looking through all of it again could take a time
    /// that grows with the square of its length.
    fn broken(&mut self, last: &str, out: &mut Deltas) {
        self.held.truncate(self.held.len() - last.len());
        out.content(&self.held);
        self.held.clear();
        self.state = State::Text;
        last.chars().for_each(|c| self.push(c, out));
    }
}

/// The keys of a call's arguments.
const ARGUMENTS: &[&str] = &["arguments", "parameters"];

/// Reads a call whose object is whole.
fn whole_call(scan: &JsonScan, json: &str, name: Option<String>) -> Option<Call> {
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

/// Reads `name`, `name[ARGS]` or `name[CALL_ID]id[ARGS]` before an opening bracket, or Functionary's `name>`.
fn name_before_arguments(style: ToolStyle, part: &str) -> Option<String> {
    let part = part.strip_suffix('{')?.trim_end_matches(is_space);
    if style == ToolStyle::Functionary {
        return part.strip_suffix('>').filter(|name| is_name(name)).map(str::to_string);
    }
    let part = part.strip_suffix("[ARGS]").unwrap_or(part);
    let name = part.split_once("[CALL_ID]").map_or(part, |(name, _)| name).trim_end_matches(is_space);
    is_name(name).then(|| name.to_string())
}
