//! Who holds which KV block. The engine owns the bytes; this owns the account.

use crate::engine::BlockId;

/// Counts blocks out and in. Invariant KV1: free + used = total, after every call.
#[derive(Clone, Debug)]
pub struct Ledger {
    free: Vec<BlockId>,
    held: Vec<bool>,
    block_tokens: usize,
}

impl Ledger {
    /// Makes the account of `blocks` free blocks that hold `block_tokens` tokens each.
    pub fn new(blocks: usize, block_tokens: usize) -> Self {
        let free = (0..blocks as u32).rev().map(BlockId).collect();
        Ledger { free, held: vec![false; blocks], block_tokens: block_tokens.max(1) }
    }

    /// Returns how many blocks `tokens` positions take.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens)
    }

    /// Takes blocks for `tokens` positions, or nothing at all when there are too few.
    pub fn reserve(&mut self, tokens: usize) -> Option<Vec<BlockId>> {
        let wanted = self.blocks_for(tokens);
        if wanted > self.free.len() {
            return None;
        }
        let taken = self.free.split_off(self.free.len() - wanted);
        for block in &taken {
            self.held[block.0 as usize] = true;
        }
        Some(taken)
    }

    /// Gives blocks back. A block that is not held is a fault of the caller; it is not taken twice.
    pub fn release(&mut self, blocks: Vec<BlockId>) {
        for block in blocks {
            let held = self.held.get_mut(block.0 as usize);
            debug_assert!(held.as_deref() == Some(&true), "KV1: block {} released twice", block.0);
            if let Some(held) = held
                && std::mem::take(held)
            {
                self.free.push(block);
            }
        }
    }

    /// Returns all blocks there are.
    pub fn total(&self) -> usize {
        self.held.len()
    }

    /// Returns the blocks in use.
    pub fn used(&self) -> usize {
        self.total() - self.free.len()
    }
}
