//! An engine whose next token is a hash of the context: any lost, doubled or foreign token changes all that follow.
//!
//! It chooses tokens by itself; rows that must not have that get logits, which are such hashes too.

use std::collections::BTreeMap;

use crate::engine::{Batch, BlockId, Capabilities, Engine, EngineError, Outputs, Row, RowOutput, Wanted};
use crate::text::TokenBytes;

/// The fake vocabulary: 256 bytes and the end token.
pub const FAKE_VOCABULARY: usize = 257;
/// Numbers in a fake hidden state.
pub const FAKE_WIDTH: usize = 24;
/// Ends a choice; the fake engine itself never says it.
pub const FAKE_END_TOKEN: u32 = 256;

/// Returns the fake vocabulary's bytes.
pub fn fake_token_bytes() -> TokenBytes {
    TokenBytes::new((0..=255u8).map(|byte| vec![byte]).chain([Vec::new()]))
}

const START: u64 = 0xcbf2_9ce4_8422_2325;

/// Folds one token into a context's hash (FNV-1a over the token's four bytes).
fn fold(hash: u64, token: u32) -> u64 {
    token.to_le_bytes().iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

fn pick(hash: u64, last: u32) -> u32 {
    // Fold the high bits down: FNV's low bits alone are weak.
    let draw = hash ^ (hash >> 29) ^ (hash >> 47);
    match (last, draw % 16) {
        // The second half of a two-byte character follows its first half.
        (0xc3, _) => 0x80 + (draw >> 8) as u32 % 64,
        (_, 0) => 0xc3,
        (_, 1..=3) => u32::from(b' '),
        _ => u32::from(b'a') + (draw >> 8) as u32 % 26,
    }
}

/// How far the token of the oracle stands out of the fake logits, which are otherwise below 1.
const FAKE_PEAK: f32 = 100.0;

/// Returns logits whose likeliest token is the oracle's; all others are noise.
fn logits(hash: u64, last: u32) -> Vec<f32> {
    let mut logits: Vec<f32> = (0..FAKE_VOCABULARY as u32).map(|id| noise(hash, id)).collect();
    logits[pick(hash, last) as usize] = FAKE_PEAK;
    logits
}

fn hidden(hash: u64) -> impl Iterator<Item = f32> {
    (0..FAKE_WIDTH as u32).map(move |index| noise(hash, index) * 2.0 - 1.0)
}

/// Returns a number from 0 up to 1 that is the context's alone.
fn noise(hash: u64, index: u32) -> f32 {
    let mixed = fold(hash, index);
    ((mixed ^ (mixed >> 31)) >> 16 & 0xffff) as f32 / 65_536.0
}

/// Returns the token that follows `context`: the oracle, computed from the whole context at once.
pub fn fake_next_token(context: &[u32]) -> u32 {
    pick(context.iter().fold(START, |hash, token| fold(hash, *token)), context.last().copied().unwrap_or(0))
}

/// Returns the logits that follow `context`, and its hidden state: oracles, as above.
#[cfg(test)]
pub(crate) fn fake_outputs(context: &[u32]) -> (Vec<f32>, Vec<f32>) {
    let hash = context.iter().fold(START, |hash, token| fold(hash, *token));
    (logits(hash, context.last().copied().unwrap_or(0)), hidden(hash).collect())
}

/// The fake engine. Its "KV" is the context's hash at each position, kept by block id, so that a wrong block
/// table or a wrong copy gives wrong tokens just as in a real engine.
#[derive(Debug)]
pub struct FakeEngine {
    capabilities: Capabilities,
    hashes: Vec<u64>,
}

impl FakeEngine {
    /// Makes an engine with these limits; `vocab_size` is always [`FAKE_VOCABULARY`], `width` [`FAKE_WIDTH`].
    pub fn new(capabilities: Capabilities) -> Self {
        let capabilities = Capabilities { vocab_size: FAKE_VOCABULARY, width: FAKE_WIDTH, ..capabilities };
        FakeEngine { capabilities, hashes: vec![0; capabilities.blocks * capabilities.block_tokens] }
    }

    fn slot(&self, row: &Row, position: usize) -> Result<usize, EngineError> {
        let size = self.capabilities.block_tokens;
        let block = row.blocks.get(position / size).map(|block| block.0 as usize);
        match block {
            Some(block) if block < self.capabilities.blocks => Ok(block * size + position % size),
            _ => Err(EngineError::BadBatch(format!("position {position} has no block"))),
        }
    }

    /// Returns the slots of one block.
    fn slots(&self, block: BlockId) -> Result<std::ops::Range<usize>, EngineError> {
        let (block, size) = (block.0 as usize, self.capabilities.block_tokens);
        if block >= self.capabilities.blocks {
            return Err(EngineError::BadBatch(format!("there is no block {block}")));
        }
        Ok(block * size..(block + 1) * size)
    }
}

/// Refuses a batch whose result would depend on the order of its rows or copies: a block written by two rows,
/// written by one and read by another, or the target of a copy that something else names.
fn check_sharing(batch: &Batch, size: usize) -> Result<(), EngineError> {
    let bad = |block: &BlockId, what: &str| Err(EngineError::BadBatch(format!("block {} is {what}", block.0)));
    let mut targets = BTreeMap::new();
    for copy in &batch.copies {
        if targets.insert(copy.to, None).is_some() {
            return bad(&copy.to, "the target of two copies");
        }
    }
    if let Some(copy) = batch.copies.iter().find(|copy| targets.contains_key(&copy.from)) {
        return bad(&copy.from, "the source and the target of copies");
    }
    let mut written = BTreeMap::new();
    for (i, row) in batch.rows.iter().enumerate() {
        for block in row.blocks.iter().skip(row.start / size) {
            if written.insert(*block, i).is_some() {
                return bad(block, "written by two rows");
            }
        }
    }
    for (i, row) in batch.rows.iter().enumerate() {
        for block in &row.blocks {
            if written.get(block).is_some_and(|writer| *writer != i) {
                return bad(block, "written by one row and read by another");
            }
            if let Some(reader) = targets.get_mut(block)
                && reader.replace(i).is_some_and(|other| other != i)
            {
                return bad(block, "the target of a copy and in two rows");
            }
        }
    }
    Ok(())
}

impl Engine for FakeEngine {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn step(&mut self, batch: &Batch) -> Result<Outputs, EngineError> {
        let size = self.capabilities.block_tokens;
        if batch.rows.len() > self.capabilities.max_batch || batch.tokens() > self.capabilities.max_step_tokens {
            return Err(EngineError::BadBatch("too many rows or tokens".into()));
        }
        check_sharing(batch, size)?;
        for copy in &batch.copies {
            let (from, to) = (self.slots(copy.from)?, self.slots(copy.to)?);
            self.hashes.copy_within(from, to.start);
        }
        let mut rows = Vec::with_capacity(batch.rows.len());
        for row in &batch.rows {
            let (Some(&last), wanted) = (row.tokens.last(), row.wanted.positions()) else {
                return Err(EngineError::BadBatch("a row without tokens".into()));
            };
            if wanted > row.tokens.len() {
                return Err(EngineError::BadBatch("outputs of more positions than the row has".into()));
            }
            let (mut all, first) = (Vec::new(), row.tokens.len() - wanted);
            if row.start + row.tokens.len() > self.capabilities.context_length {
                return Err(EngineError::BadBatch("a row past the context".into()));
            }
            let mut hash = if row.start == 0 { START } else { self.hashes[self.slot(row, row.start - 1)?] };
            for (i, token) in row.tokens.iter().enumerate() {
                hash = fold(hash, *token);
                let slot = self.slot(row, row.start + i)?;
                self.hashes[slot] = hash;
                match row.wanted {
                    Wanted::Logits(_) if i >= first => all.extend(logits(hash, *token)),
                    Wanted::Hidden(_) if i >= first => {
                        all.extend(hidden(hash));
                    }
                    _ => {}
                }
            }
            rows.push(match row.wanted {
                Wanted::Nothing => RowOutput::Nothing,
                Wanted::Token => RowOutput::Token(pick(hash, last)),
                Wanted::Logits(_) => RowOutput::Logits(all),
                Wanted::Hidden(_) => RowOutput::Hidden(all),
            });
        }
        Ok(Outputs { rows })
    }

    fn block_bytes(&self) -> usize {
        self.capabilities.block_tokens * size_of::<u64>()
    }

    fn export_block(&mut self, block: BlockId) -> Result<Vec<u8>, EngineError> {
        let slots = self.slots(block)?;
        Ok(self.hashes[slots].iter().flat_map(|hash| hash.to_le_bytes()).collect())
    }

    fn import_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<(), EngineError> {
        let slots = self.slots(block)?;
        if bytes.len() != self.block_bytes() {
            return Err(EngineError::BadBatch(format!(
                "a block has {} bytes, not {}",
                self.block_bytes(),
                bytes.len()
            )));
        }
        for (hash, bytes) in self.hashes[slots].iter_mut().zip(bytes.chunks_exact(size_of::<u64>())) {
            *hash = bytes.iter().rev().fold(0, |hash, byte| hash << 8 | u64::from(*byte));
        }
        Ok(())
    }
}
