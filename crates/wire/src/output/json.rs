//! A JSON object, character by character: where it ends, and where its members are.

use std::ops::Range;

/// Deepest nesting of a call, its own object included.
pub const ARGUMENTS_DEPTH_MAX: usize = 64;

/// Most members of a call's own object; one with more is none.
const MEMBERS_MAX: usize = 16;

/// What a character made of the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scan {
    /// More has to come.
    Open,
    /// It is whole.
    Whole,
    /// It can't become one.
    Broken,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Value,
    ValueOrEnd,
    Key,
    KeyOrEnd,
    Colon,
    CommaOrEnd,
    /// In a string; whether it is a key, and whether the character before was a backslash.
    Text {
        key: bool,
        escaped: bool,
    },
    /// In a number or a word.
    Word,
}

/// A member of the outermost object, by places in the scanned text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    /// The key with its quotes, white space after it included.
    pub(super) key: Range<usize>,
    /// The value, white space after it included.
    pub(super) value: Range<usize>,
}

/// The scanner. It knows strings, nesting and order; what numbers and words are is left to a parser of the whole.
#[derive(Clone, Debug)]
pub(super) struct JsonScan {
    expect: Expect,
    /// Closing brackets that are due.
    open: Vec<char>,
    at: usize,
    members: Vec<Member>,
    /// Whether the members of the outermost object are of interest, and bounded.
    is_call: bool,
}

impl JsonScan {
    /// Begins; the object is a call, or else the arguments of one.
    pub(super) fn new(is_call: bool) -> Self {
        JsonScan { expect: Expect::Value, open: Vec::new(), at: 0, members: Vec::new(), is_call }
    }

    pub(super) fn members(&self) -> &[Member] {
        &self.members
    }

    /// Returns how many brackets are open.
    pub(super) fn depth(&self) -> usize {
        self.open.len()
    }

    pub(super) fn push(&mut self, c: char) -> Scan {
        let scan = self.step(c);
        self.at += c.len_utf8();
        scan
    }

    fn step(&mut self, c: char) -> Scan {
        if let Expect::Text { key, escaped } = self.expect {
            match c {
                _ if escaped => self.expect = Expect::Text { key, escaped: false },
                '\\' => self.expect = Expect::Text { key, escaped: true },
                '"' if key => self.expect = Expect::Colon,
                '"' => self.expect = Expect::CommaOrEnd,
                c if c < ' ' => return Scan::Broken,
                _ => {}
            }
            return Scan::Open;
        }
        if self.expect == Expect::Word {
            if c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.') {
                return Scan::Open;
            }
            self.expect = Expect::CommaOrEnd;
        }
        if super::is_space(c) {
            return Scan::Open;
        }
        match (self.expect, c) {
            (Expect::Value | Expect::ValueOrEnd, '{') => self.enter('}', Expect::KeyOrEnd),
            // Only an object is scanned.
            (Expect::Value, _) if self.open.is_empty() => Scan::Broken,
            (Expect::Value | Expect::ValueOrEnd, '[') => self.enter(']', Expect::ValueOrEnd),
            (Expect::Value | Expect::ValueOrEnd, '"') => self.go(Expect::Text { key: false, escaped: false }),
            (Expect::Value | Expect::ValueOrEnd, '-' | '0'..='9' | 't' | 'f' | 'n') => self.go(Expect::Word),
            (Expect::Key | Expect::KeyOrEnd, '"') => {
                if self.is_call && self.open.len() == 1 {
                    if self.members.len() == MEMBERS_MAX {
                        return Scan::Broken;
                    }
                    self.members.push(Member { key: self.at..self.at, value: 0..0 });
                }
                self.go(Expect::Text { key: true, escaped: false })
            }
            (Expect::Colon, ':') => {
                let at = self.at;
                if let Some(member) = self.member() {
                    (member.key.end, member.value) = (at, at + 1..at + 1);
                }
                self.go(Expect::Value)
            }
            (Expect::CommaOrEnd, ',') => {
                self.end_member();
                let object = self.open.last() == Some(&'}');
                self.go(if object { Expect::Key } else { Expect::Value })
            }
            (Expect::CommaOrEnd | Expect::KeyOrEnd | Expect::ValueOrEnd, '}' | ']') if self.open.last() == Some(&c) => {
                self.end_member();
                self.open.pop();
                self.expect = Expect::CommaOrEnd;
                if self.open.is_empty() { Scan::Whole } else { Scan::Open }
            }
            _ => Scan::Broken,
        }
    }

    fn go(&mut self, expect: Expect) -> Scan {
        self.expect = expect;
        Scan::Open
    }

    fn enter(&mut self, close: char, expect: Expect) -> Scan {
        if self.open.len() == ARGUMENTS_DEPTH_MAX {
            return Scan::Broken;
        }
        self.open.push(close);
        self.go(expect)
    }

    /// Returns the member that is open, of the outermost object.
    fn member(&mut self) -> Option<&mut Member> {
        if self.open.len() == 1 { self.members.last_mut() } else { None }
    }

    fn end_member(&mut self) {
        let at = self.at;
        if let Some(member) = self.member() {
            member.value.end = at;
        }
    }
}

/// Finds the end of arguments that are no JSON any more: by their brackets, outside of strings.
#[derive(Clone, Copy, Debug)]
pub(super) struct Brackets {
    depth: usize,
    text: bool,
    escaped: bool,
}

impl Brackets {
    /// Goes on where a scan broke, of which the arguments are what is deeper than `outer`.
    pub(super) fn of(scan: &JsonScan, outer: usize) -> Self {
        let text = matches!(scan.expect, Expect::Text { .. });
        Brackets { depth: scan.depth() - outer, text, escaped: false }
    }

    /// Takes a character; returns how many brackets are open.
    pub(super) fn push(&mut self, c: char) -> usize {
        let escaped = std::mem::take(&mut self.escaped);
        match c {
            _ if self.text && escaped => {}
            '\\' if self.text => self.escaped = true,
            '"' => self.text = !self.text,
            '{' | '[' if !self.text => self.depth += 1,
            '}' | ']' if !self.text => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        self.depth
    }
}
