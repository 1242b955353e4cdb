//! SentencePiece's BPE: adjacent symbols merge by the best score of what they would become; what is left over
//! becomes byte tokens.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::{Piece, TYPE_CONTROL, TokenizerError};

const SPACE: char = '\u{2581}';
const TYPE_UNKNOWN: i64 = 2;
const TYPE_USER: i64 = 4;
const TYPE_BYTE: i64 = 6;

pub(super) struct Spm {
    ids: HashMap<String, u32>,
    scores: Vec<f32>,
    bytes: [Option<u32>; 256],
    unknown: u32,
    /// Tokens that a text may spell out, longest first.
    spelled: Vec<(String, u32)>,
    spaced: bool,
}

struct Symbol {
    start: usize,
    length: usize,
    before: Option<usize>,
    after: Option<usize>,
}

#[derive(PartialEq)]
struct Bigram {
    score: f32,
    left: usize,
    right: usize,
    length: usize,
}

impl Eq for Bigram {}

impl Ord for Bigram {
    /// The best score first, the leftmost of equals.
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Bigram {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Reads `<0xNN>`.
fn byte_token(text: &str) -> Option<u8> {
    u8::from_str_radix(text.strip_prefix("<0x")?.strip_suffix('>')?, 16).ok()
}

impl Spm {
    /// Whether a space is put before each text.
    pub(super) fn spaced(&self) -> bool {
        self.spaced
    }

    pub(super) fn new(texts: &[String], types: &[i64], scores: &[f32], spaced: bool) -> Result<Self, TokenizerError> {
        if scores.len() != texts.len() {
            return Err(TokenizerError::Damaged("it has no scores".into()));
        }
        let (mut ids, mut bytes, mut spelled) = (HashMap::new(), [None; 256], Vec::new());
        let mut unknown = 0;
        for (id, (text, kind)) in texts.iter().zip(types).enumerate() {
            let id = id as u32;
            match *kind {
                TYPE_BYTE => {
                    if let Some(byte) = byte_token(text) {
                        bytes[byte as usize] = Some(id);
                    }
                }
                TYPE_CONTROL | TYPE_USER if !text.is_empty() => spelled.push((text.clone(), id)),
                TYPE_UNKNOWN => unknown = id,
                _ => drop(ids.insert(text.clone(), id)),
            }
        }
        spelled.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
        Ok(Spm { ids, scores: scores.to_vec(), bytes, unknown, spelled, spaced })
    }

    pub(super) fn encode(&self, text: &str, out: &mut Vec<u32>) {
        let mut rest = text;
        while !rest.is_empty() {
            let next =
                self.spelled.iter().filter_map(|(word, id)| rest.find(word.as_str()).map(|at| (at, word.len(), *id)));
            // The earliest, and of those at one place the longest: the list is ordered by length.
            match next.min_by_key(|(at, length, _)| (*at, std::cmp::Reverse(*length))) {
                Some((at, length, id)) => {
                    self.plain(&rest[..at], out);
                    out.push(id);
                    rest = &rest[at + length..];
                }
                None => {
                    self.plain(rest, out);
                    rest = "";
                }
            }
        }
    }

    /// Encodes text without spelled-out tokens: the start of a text, or what follows such a token.
    fn plain(&self, text: &str, out: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        let mut spaced = String::with_capacity(text.len() + 8);
        if self.spaced {
            spaced.push(SPACE);
        }
        text.chars().for_each(|c| spaced.push(if c == ' ' { SPACE } else { c }));
        for piece in self.merge(&spaced) {
            match self.ids.get(piece) {
                Some(id) => out.push(*id),
                None => out.extend(piece.bytes().map(|byte| self.bytes[byte as usize].unwrap_or(self.unknown))),
            }
        }
    }

    fn merge<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let mut symbols: Vec<Symbol> = Vec::new();
        for (start, character) in text.char_indices() {
            let i = symbols.len();
            let length = character.len_utf8();
            symbols.push(Symbol { start, length, before: i.checked_sub(1), after: Some(i + 1) });
        }
        if let Some(last) = symbols.last_mut() {
            last.after = None;
        }
        let mut heap = BinaryHeap::new();
        for right in 1..symbols.len() {
            self.offer(text, &symbols, right - 1, right, &mut heap);
        }
        while let Some(Bigram { left, right, length, .. }) = heap.pop() {
            let (a, b) = (&symbols[left], &symbols[right]);
            // Either side may have merged with another meanwhile.
            if a.length == 0 || b.length == 0 || a.length + b.length != length || a.after != Some(right) {
                continue;
            }
            let after = b.after;
            symbols[left].length = length;
            symbols[left].after = after;
            symbols[right].length = 0;
            if let Some(after) = after {
                symbols[after].before = Some(left);
                self.offer(text, &symbols, left, after, &mut heap);
            }
            if let Some(before) = symbols[left].before {
                self.offer(text, &symbols, before, left, &mut heap);
            }
        }
        let whole = symbols.iter().filter(|symbol| symbol.length > 0);
        whole.map(|symbol| &text[symbol.start..symbol.start + symbol.length]).collect()
    }

    fn offer(&self, text: &str, symbols: &[Symbol], left: usize, right: usize, heap: &mut BinaryHeap<Bigram>) {
        let length = symbols[left].length + symbols[right].length;
        let start = symbols[left].start;
        if let Some(id) = self.ids.get(&text[start..start + length]) {
            heap.push(Bigram { score: self.scores[*id as usize], left, right, length });
        }
    }
}

pub(super) fn pieces(texts: &[String], types: &[i64]) -> Vec<Piece> {
    let piece = |(text, kind): (&String, &i64)| match *kind {
        TYPE_CONTROL | TYPE_UNKNOWN => Piece { bytes: Vec::new(), control: true },
        TYPE_BYTE => Piece { bytes: byte_token(text).into_iter().collect(), control: false },
        _ => Piece { bytes: text.replace(SPACE, " ").into_bytes(), control: false },
    };
    texts.iter().zip(types).map(piece).collect()
}
