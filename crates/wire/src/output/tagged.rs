//! A call in tags, whose values stand as they are: `<function=NAME><parameter=KEY>VALUE</parameter></function>`, or with
//! `<arg_key>` and `<arg_value>`. Its arguments are written as JSON, by the types of the tool's definition.
//!
//! ```text
//! head -name-> between -key tag-> key -> gap -value tag-> value -end tag-> between ... -close or mark-> whole
//! ```
//! A text comes out as it is said; another value once it is whole, for only then is known what it is. What is no call
//! breaks before its name is certain. Afterwards what is none of its tags ends the call where it stands.

use std::sync::Arc;

use super::kinds::{Kinds, escaped};
use super::{SPACE_BYTES_MAX, Seek, is_space};
use crate::tools::{TOOL_NAME_BYTES_MAX, Tool, is_name};

/// Longest name of an argument, in bytes.
const KEY_BYTES_MAX: usize = 256;
/// Most bytes of a value that are held back to see what it is; a longer one is a text.
const VALUE_BYTES_MAX: usize = 1 << 20;

/// The tags of a form. Between any two of them white space may stand.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Tags {
    /// The mark before a call.
    pub(super) open: &'static str,
    /// Before and after the name; a name without them ends where a tag begins. A call may begin with the former: models
    /// forget the mark.
    pub(super) name: Option<(&'static str, &'static str)>,
    /// Before and after an argument's name.
    pub(super) key: (&'static str, &'static str),
    /// Before and after its value.
    pub(super) value: (&'static str, &'static str),
    /// Whether a line's end after the first tag of a value, and one before the last, are not the value's.
    pub(super) lines: bool,
    /// After the last argument; empty where the closing mark comes at once.
    pub(super) end: &'static str,
    /// The mark after a call.
    pub(super) close: &'static str,
}

/// What a character made of the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Open,
    /// It is whole; `closed` when its closing mark has come too.
    Whole {
        closed: bool,
    },
    /// It is none, or it is over where it stands; [`Tagged::rest`] is not its own.
    Broken,
}

#[derive(Clone, Debug)]
enum Part {
    /// Before the tag of the name.
    Head,
    Name,
    /// After the name or a value.
    Between,
    Key(Seek, String),
    /// After the argument's name, before its value.
    Gap(String),
    Value(Value),
}

#[derive(Clone, Debug)]
struct Value {
    kinds: Kinds,
    seek: Seek,
    /// Nothing has come yet.
    fresh: bool,
    /// More than white space has come.
    begun: bool,
    /// The value so far, while it may be more than a text.
    held: Option<String>,
}

/// A call on its way.
#[derive(Clone, Debug)]
pub(super) struct Tagged {
    tags: &'static Tags,
    tools: Arc<[Tool]>,
    part: Part,
    /// White space and what may be a tag, or the name.
    pending: String,
    /// The place of the tool whose name was said.
    tool: Option<usize>,
    /// Whether it can be nothing but a call.
    certain: bool,
    /// How many arguments have begun.
    arguments: usize,
    /// JSON that was not taken yet.
    said: String,
}

impl Tagged {
    /// Begins after the opening mark, or after the tag of the name.
    pub(super) fn new(tags: &'static Tags, mark: &str, tools: Arc<[Tool]>) -> Self {
        let part = if tags.name.is_some() && mark == tags.open { Part::Head } else { Part::Name };
        let (pending, said) = (String::new(), String::new());
        Tagged { tags, tools, part, pending, tool: None, certain: false, arguments: 0, said }
    }

    /// Returns the called tool's name, once it is certain.
    pub(super) fn name(&self) -> Option<&str> {
        self.tool.filter(|_| self.certain).map(|tool| self.tools[tool].name.as_str())
    }

    /// Takes what was said of the arguments since the last time.
    pub(super) fn said(&mut self) -> String {
        std::mem::take(&mut self.said)
    }

    /// Takes what came after the call and is not its own.
    pub(super) fn rest(&mut self) -> String {
        std::mem::take(&mut self.pending)
    }

    /// Takes a character.
    pub(super) fn push(&mut self, c: char) -> Step {
        match &mut self.part {
            Part::Head => self.head(c),
            Part::Name => self.name_part(c),
            Part::Between => self.between(c),
            Part::Key(seek, key) => {
                let whole = seek.push(c, &mut |text| key.push_str(text)).is_some();
                if key.len() > KEY_BYTES_MAX || c == '\n' {
                    let pending = format!("{}{key}{}", self.tags.key.0, seek.take());
                    return self.over(pending);
                }
                if whole {
                    let key = std::mem::take(key);
                    self.pending.clear();
                    match self.tags.value.0 {
                        "" => self.begin_value(&key),
                        _ => self.part = Part::Gap(key),
                    }
                }
                Step::Open
            }
            Part::Gap(key) => {
                let (key, tag) = (key.clone(), self.tags.value.0);
                match tag_of(&mut self.pending, c, &[tag]) {
                    Some(Ok(_)) => self.begin_value(&key),
                    Some(Err(())) => {
                        let pending = format!("{}{key}{}{}", self.tags.key.0, self.tags.key.1, self.rest());
                        return self.over(pending);
                    }
                    None => {}
                }
                Step::Open
            }
            Part::Value(value) => {
                let lines = self.tags.lines;
                if std::mem::take(&mut value.fresh) && lines && c == '\n' {
                    return Step::Open;
                }
                let mut text = String::new();
                let end = value.seek.push(c, &mut |more| text.push_str(more));
                if let Some(space) = &end {
                    text.push_str(if lines { space.strip_suffix('\n').unwrap_or(space) } else { space });
                }
                value.more(&text, &mut self.said);
                if end.is_some() {
                    value.end(&mut self.said);
                    self.part = Part::Between;
                }
                Step::Open
            }
        }
    }

    fn head(&mut self, c: char) -> Step {
        let Some((before, _)) = self.tags.name else { return Step::Broken };
        match tag_of(&mut self.pending, c, &[before]) {
            Some(Ok(_)) => self.part = Part::Name,
            Some(Err(())) => return Step::Broken,
            None => {}
        }
        Step::Open
    }

    fn name_part(&mut self, c: char) -> Step {
        let over = match self.tags.name {
            Some((_, after)) => after.starts_with(c),
            None => is_space(c) || c == '<',
        };
        if !over || self.pending.is_empty() {
            let leads = self.pending.is_empty() && is_space(c);
            if !leads {
                self.pending.push(c);
            }
            let fits = leads || (is_name(c.encode_utf8(&mut [0; 4])) && self.pending.len() <= TOOL_NAME_BYTES_MAX);
            return if fits { Step::Open } else { Step::Broken };
        }
        let name = self.rest();
        let Some(tool) = self.tools.iter().position(|tool| tool.name == name) else { return Step::Broken };
        (self.tool, self.part) = (Some(tool), Part::Between);
        // A bare name may begin a sentence; a tag after it makes it a call.
        self.certain = self.tags.name.is_some();
        if self.certain { Step::Open } else { self.between(c) }
    }

    fn between(&mut self, c: char) -> Step {
        let tags = [self.tags.key.0, self.tags.close, self.tags.end];
        let known = if self.tags.end.is_empty() { &tags[..2] } else { &tags };
        match tag_of(&mut self.pending, c, known) {
            None => Step::Open,
            Some(Err(())) => {
                let pending = self.rest();
                self.over(pending)
            }
            Some(Ok(tag)) if tag == self.tags.key.0 => {
                self.certain = true;
                self.part = Part::Key(Seek::new(self.tags.key.1), String::new());
                Step::Open
            }
            Some(Ok(tag)) => {
                self.certain = true;
                self.close();
                Step::Whole { closed: tag == self.tags.close }
            }
        }
    }

    /// Ends the call before this text, which is none of its tags.
    fn over(&mut self, text: String) -> Step {
        self.close();
        self.pending = text;
        Step::Broken
    }

    fn close(&mut self) {
        self.said.push_str(if self.arguments == 0 { "{}" } else { "}" });
    }

    fn begin_value(&mut self, key: &str) {
        let key = key.trim_matches(is_space);
        let before = if self.arguments == 0 { "{" } else { ", " };
        self.arguments += 1;
        self.said.push_str(&format!("{before}\"{}\": ", escaped(key)));
        let kinds = Kinds::of(self.tool.and_then(|tool| self.tools[tool].parameters.as_ref()), key);
        let (seek, held) = (Seek::new(self.tags.value.1), Some(String::new()));
        let mut value = Value { kinds, seek, fresh: true, begun: false, held };
        if kinds.only_text(None) {
            value.spill(&mut self.said);
        }
        self.part = Part::Value(value);
    }
}

impl Value {
    /// Takes more of the value.
    fn more(&mut self, text: &str, said: &mut String) {
        let Some(held) = &mut self.held else { return said.push_str(&escaped(text)) };
        held.push_str(text);
        let first = text.chars().find(|c| !is_space(*c)).filter(|_| !self.begun);
        self.begun |= first.is_some();
        if held.len() > VALUE_BYTES_MAX || first.is_some_and(|first| self.kinds.only_text(Some(first))) {
            self.spill(said);
        }
    }

    /// Begins a text with what was held.
    fn spill(&mut self, said: &mut String) {
        said.push('"');
        if let Some(held) = self.held.take() {
            said.push_str(&escaped(&held));
        }
    }

    fn end(&mut self, said: &mut String) {
        match self.held.take() {
            Some(held) => said.push_str(&self.kinds.json(&held)),
            None => said.push('"'),
        }
    }
}

/// Takes a character on the way to one of some tags, before which white space may stand: the tag once it is whole, an error
/// once there can be none.
fn tag_of(pending: &mut String, c: char, tags: &[&'static str]) -> Option<Result<&'static str, ()>> {
    pending.push(c);
    let rest = pending.trim_start_matches(is_space);
    if let Some(tag) = tags.iter().find(|tag| **tag == rest) {
        pending.clear();
        return Some(Ok(tag));
    }
    let may_be = pending.len() - rest.len() <= SPACE_BYTES_MAX && tags.iter().any(|tag| tag.starts_with(rest));
    if may_be { None } else { Some(Err(())) }
}
