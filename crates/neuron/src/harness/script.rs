//! What a model says by the book: for tests of what is made of its words.

use std::collections::BTreeMap;

use inference::FAKE_END_TOKEN;
use inference::engine::{Batch, BlockId, Row, Wanted};

/// Begins a script in a prompt of bytes; [`END`] ends it. What is said is the script's bytes, from the next line on.
const START: u32 = 0x02;
const END: u32 = 0x03;

/// The tokens of all contexts, kept by block as an engine keeps their KV: nothing else is remembered of a sequence, so
/// that one that goes on elsewhere goes on equally.
#[derive(Debug)]
pub(super) struct Scripts {
    block_tokens: usize,
    blocks: BTreeMap<BlockId, Vec<u32>>,
}

impl Scripts {
    pub(super) fn new(block_tokens: usize) -> Self {
        Scripts { block_tokens, blocks: BTreeMap::new() }
    }

    /// Takes a batch, and returns what is said after each wanted position of its rows, where a script tells.
    pub(super) fn step(&mut self, batch: &Batch) -> Vec<Vec<Option<u32>>> {
        for copy in &batch.copies {
            if let Some(tokens) = self.blocks.get(&copy.from).cloned() {
                self.blocks.insert(copy.to, tokens);
            }
        }
        batch.rows.iter().map(|row| self.row(row)).collect()
    }

    fn row(&mut self, row: &Row) -> Vec<Option<u32>> {
        let size = self.block_tokens;
        for (i, token) in row.tokens.iter().enumerate() {
            let at = row.start + i;
            let Some(block) = row.blocks.get(at / size) else { return Vec::new() };
            let block = self.blocks.entry(*block).or_default();
            block.resize(size, 0);
            block[at % size] = *token;
        }
        if !matches!(row.wanted, Wanted::Token | Wanted::Logits(_)) {
            return Vec::new();
        }
        let length = row.start + row.tokens.len();
        let blocks = row.blocks.iter().filter_map(|block| self.blocks.get(block));
        let context: Vec<u32> = blocks.flatten().copied().take(length).collect();
        (length - row.wanted.positions()..length).map(|last| next(context.get(..=last)?)).collect()
    }
}

/// Returns what follows a context with a script.
fn next(context: &[u32]) -> Option<u32> {
    let start = context.iter().position(|token| *token == START)? + 1;
    let end = start + context[start..].iter().position(|token| *token == END)?;
    let line = u32::from(b'\n');
    let said = end + context[end..].iter().position(|token| *token == line)? + 1;
    Some(context[start..end].get(context.len() - said).copied().unwrap_or(FAKE_END_TOKEN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_is_said_from_the_line_after_it_on() {
        let context = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
        let said = |text: &str| next(&context(text));
        assert_eq!(said("user:\u{2}ab\u{3}<think>\n"), Some(u32::from(b'a')));
        assert_eq!(said("user:\u{2}ab\u{3}\na"), Some(u32::from(b'b')));
        assert_eq!(said("user:\u{2}ab\u{3}\nab"), Some(FAKE_END_TOKEN));
        assert_eq!((said("user:ab\n"), said("user:\u{2}ab\n"), said("user:\u{2}ab\u{3}")), (None, None, None));
    }
}
