//! From token ids to text that may be shown: whole UTF-8 characters, stop strings held back.
//!
//! What is released is a pure function of the ids so far, never of a timer, so a replay releases the same.

use std::sync::Arc;

use crate::request::FinishReason;

/// The bytes each token adds to the output, by id; control tokens add none.
#[derive(Clone, Debug, Default)]
pub struct TokenBytes {
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

impl TokenBytes {
    /// Makes the table from the tokens' bytes in order of id.
    pub fn new<B: AsRef<[u8]>>(tokens: impl IntoIterator<Item = B>) -> Self {
        let mut table = TokenBytes::default();
        for token in tokens {
            table.bytes.extend_from_slice(token.as_ref());
            table.ends.push(table.bytes.len() as u32);
        }
        table
    }

    /// Returns the bytes of token `id`, none for an id outside the table.
    pub fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// Returns how many tokens there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Returns whether the table is empty.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }
}

/// When a choice ends by what it says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopRules {
    /// Texts that end the choice and are not shown; none is empty.
    pub strings: Vec<String>,
    /// Tokens that end the choice and are not shown.
    pub tokens: Vec<u32>,
}

/// What one token released.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Text that is now certain; may be empty.
    pub text: String,
    /// Set when the token ended the choice.
    pub finish: Option<FinishReason>,
}

/// Turns one choice's ids into text.
#[derive(Clone, Debug)]
pub struct Assembler {
    table: Arc<TokenBytes>,
    rules: Arc<StopRules>,
    /// Bytes of a character that is not whole yet: at most three.
    partial: Vec<u8>,
    /// Text that may yet turn out to be the start of a stop string: shorter than the longest one.
    held: String,
    ids: usize,
    max_tokens: usize,
}

impl Assembler {
    /// Makes an assembler for one choice of at most `max_tokens` tokens.
    pub fn new(table: Arc<TokenBytes>, rules: Arc<StopRules>, max_tokens: usize) -> Self {
        Assembler { table, rules, partial: Vec::new(), held: String::new(), ids: 0, max_tokens }
    }

    /// Returns the tokens that end the choice.
    pub(crate) fn ends(&self) -> &[u32] {
        &self.rules.tokens
    }

    /// Takes the next id and releases what is certain.
    pub fn push(&mut self, id: u32) -> Piece {
        self.ids += 1;
        if self.rules.tokens.contains(&id) {
            return Piece { text: self.flush(), finish: Some(FinishReason::Stop) };
        }
        self.partial.extend_from_slice(self.table.get(id));
        self.move_whole_characters();
        if let Some(text) = self.cut_at_stop() {
            return Piece { text, finish: Some(FinishReason::Stop) };
        }
        if self.ids >= self.max_tokens {
            return Piece { text: self.flush(), finish: Some(FinishReason::Length) };
        }
        let keep = self.longest_stop_prefix();
        let text = self.held.drain(..self.held.len() - keep).collect();
        Piece { text, finish: None }
    }

    /// Moves whole characters from `partial` to `held`; bytes that can't become one turn into U+FFFD.
    fn move_whole_characters(&mut self) {
        let bytes = std::mem::take(&mut self.partial);
        let mut rest = bytes.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.held.push_str(text);
                    return;
                }
                Err(error) => {
                    let (good, bad) = rest.split_at(error.valid_up_to());
                    self.held.push_str(&String::from_utf8_lossy(good));
                    match error.error_len() {
                        Some(length) => {
                            self.held.push(char::REPLACEMENT_CHARACTER);
                            rest = &bad[length..];
                        }
                        None => {
                            self.partial = bad.to_vec();
                            return;
                        }
                    }
                }
            }
        }
    }

    fn cut_at_stop(&mut self) -> Option<String> {
        let first = self.rules.strings.iter().filter_map(|stop| self.held.find(stop.as_str())).min()?;
        self.held.truncate(first);
        self.partial.clear();
        Some(std::mem::take(&mut self.held))
    }

    fn longest_stop_prefix(&self) -> usize {
        let mut keep = 0;
        for stop in &self.rules.strings {
            for (length, _) in stop.char_indices().skip(1) {
                if length > keep && self.held.ends_with(&stop[..length]) {
                    keep = length;
                }
            }
        }
        keep
    }

    /// Releases all that is left; a character that never became whole turns into U+FFFD.
    pub(crate) fn flush(&mut self) -> String {
        let mut text = std::mem::take(&mut self.held);
        if !std::mem::take(&mut self.partial).is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
        }
        text
    }

    /// Releases what may still become a stop string, for an answer that ends early. Bytes of a character that is not
    /// whole are no text yet, and are left out.
    pub(crate) fn give_up(&mut self) -> String {
        self.partial.clear();
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn bytes_table() -> Arc<TokenBytes> {
        Arc::new(TokenBytes::new((0..=255u8).map(|b| [b])))
    }

    fn run(stops: &[&str], tokens: &[u32], text: &[u8], max: usize) -> (Vec<String>, Option<FinishReason>) {
        let rules = StopRules { strings: stops.iter().map(|s| s.to_string()).collect(), tokens: tokens.to_vec() };
        let mut assembler = Assembler::new(bytes_table(), Arc::new(rules), max);
        let mut pieces = Vec::new();
        for byte in text {
            let piece = assembler.push(u32::from(*byte));
            pieces.push(piece.text);
            if piece.finish.is_some() {
                return (pieces, piece.finish);
            }
        }
        (pieces, None)
    }

    #[test]
    fn a_stop_string_over_token_borders_is_never_shown() {
        let (pieces, finish) = run(&["END"], &[], b"an ENEND tail", 100);
        assert_eq!(pieces.concat(), "an EN");
        assert_eq!(finish, Some(FinishReason::Stop));
    }

    #[test]
    fn the_earliest_stop_wins_and_a_false_start_is_released() {
        assert_eq!(run(&["bcd", "c"], &[], b"abcd", 100).0.concat(), "ab");
        assert_eq!(run(&["xyz"], &[], b"xy!xyz", 100).0, ["", "", "xy!", "", "", ""]);
    }

    #[test]
    fn a_character_is_released_whole() {
        let (pieces, _) = run(&[], &[], "é🙂".as_bytes(), 100);
        assert_eq!(pieces, ["", "é", "", "", "", "🙂"]);
    }

    #[test]
    fn broken_bytes_become_one_replacement_character() {
        assert_eq!(run(&[], &[], b"a\xffb", 100).0.concat(), "a\u{fffd}b");
        let (pieces, finish) = run(&[], &[], "x🙂".as_bytes(), 3);
        assert_eq!((pieces.concat().as_str(), finish), ("x\u{fffd}", Some(FinishReason::Length)));
    }

    #[test]
    fn an_end_token_flushes_what_was_held_back() {
        let (pieces, finish) = run(&["stop"], &[0], b"a sto\0", 100);
        assert_eq!((pieces.concat().as_str(), finish), ("a sto", Some(FinishReason::Stop)));
    }

    proptest! {
        #[test]
        fn text_is_what_lossy_decoding_gives_up_to_the_first_stop(
            text in proptest::collection::vec(proptest::sample::select(b"abEND\xc3\xa9\xf0\x9f".to_vec()), 1..60),
        ) {
            let (pieces, finish) = run(&["END", "ba"], &[], &text, text.len());
            let whole = String::from_utf8_lossy(&text).into_owned();
            let cut = ["END", "ba"].iter().filter_map(|s| whole.find(s)).min();
            let shown = pieces.concat();
            match cut {
                Some(at) => {
                    prop_assert_eq!(shown, &whole[..at]);
                    prop_assert_eq!(finish, Some(FinishReason::Stop));
                }
                None => prop_assert_eq!(shown, whole),
            }
        }
    }
}
