//! Who holds which KV block. The engine owns the bytes; this owns the account.
//!
//! A block is free, held (by one sequence or more, counted), or cached: nobody holds it, but its content is known
//! and may be found again. Cached blocks are as good as free ones to whoever needs room.

use crate::engine::BlockId;
use crate::prefix::{PrefixBlock, PrefixCache, PrefixHash, Publication, prefix_hash};

/// Counts blocks out and in. Invariant KV1: free + held + cached = total, after every call.
#[derive(Clone, Debug)]
pub struct Ledger {
    free: Vec<BlockId>,
    /// Holders, by block.
    holders: Vec<u32>,
    /// Blocks with a holder.
    held: usize,
    prefixes: PrefixCache,
    block_tokens: usize,
    /// Counts what may make room for somebody.
    changes: u64,
}

impl Ledger {
    /// Makes the account of `blocks` free blocks that hold `block_tokens` tokens each.
    pub fn new(blocks: usize, block_tokens: usize) -> Self {
        let free = (0..blocks as u32).rev().map(BlockId).collect();
        let prefixes = PrefixCache::default();
        Ledger { free, holders: vec![0; blocks], held: 0, prefixes, block_tokens: block_tokens.max(1), changes: 0 }
    }

    /// Returns how many tokens a block holds, at least one.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// Returns how many blocks `tokens` positions take.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens)
    }

    /// Returns how many hold `block`; none hold one that does not exist.
    pub fn holders(&self, block: BlockId) -> usize {
        self.holders.get(block.0 as usize).map_or(0, |holders| *holders as usize)
    }

    /// Takes `count` blocks that nobody else holds, or nothing at all when there are too few. Free blocks go first,
    /// then cached ones, whose content is forgotten, those used longest ago first.
    pub fn take(&mut self, count: usize) -> Option<Vec<BlockId>> {
        if count > self.available() {
            return None;
        }
        let mut taken = self.free.split_off(self.free.len().saturating_sub(count));
        while taken.len() < count
            && let Some(block) = self.prefixes.evict()
        {
            taken.push(block);
        }
        for block in &taken {
            self.holders[block.0 as usize] = 1;
        }
        self.held += taken.len();
        self.check();
        Some(taken)
    }

    /// Adds a holder to a block that is held or cached. A free block has no content to share; it stays free.
    pub fn share(&mut self, block: BlockId) {
        let Some(holders) = self.holders.get_mut(block.0 as usize) else { return };
        if *holders == 0 {
            self.prefixes.wake(block);
            self.held += 1;
        }
        *holders += 1;
        self.check();
    }

    /// Takes one holder off a block. A block that is not held is a fault of the caller; it is not freed twice.
    ///
    /// Blocks of one sequence are released from its end, so that the cache loses the end of a chain first.
    pub fn release(&mut self, block: BlockId) {
        let holders = self.holders.get_mut(block.0 as usize);
        debug_assert!(holders.as_deref().is_some_and(|count| *count > 0), "KV1: block {} released twice", block.0);
        let Some(holders) = holders.filter(|count| **count > 0) else { return };
        *holders -= 1;
        if *holders == 0 {
            self.changes += 1;
            self.held -= 1;
            if !self.prefixes.rest(block) {
                self.free.push(block);
            }
        }
        self.check();
    }

    /// Finds the computed block with exactly these tokens after `parent` for holders of `salt`; it adds no holder.
    pub fn find(
        &self,
        hash: &PrefixHash,
        parent: Option<&PrefixHash>,
        salt: &[u8; 32],
        tokens: impl Iterator<Item = u32>,
    ) -> Option<BlockId> {
        self.prefixes.find(hash, parent, salt, tokens)
    }

    /// Makes a held block findable, whose content is whole and computed and won't be written again. The first
    /// block of a content stays the one that is found.
    pub fn publish(&mut self, content: PrefixBlock) -> Publication {
        debug_assert!(self.holders(content.block) > 0, "block {} is published by nobody", content.block.0);
        self.prefixes.publish(content)
    }

    /// Takes a free block into the cache for content that comes from elsewhere; it counts as used before all
    /// others. `None` when no block is free, the parent is unknown, or the content is known already.
    pub fn import(
        &mut self,
        parent: Option<PrefixHash>,
        salt: [u8; 32],
        tokens: Vec<u32>,
    ) -> Option<(BlockId, PrefixHash)> {
        let block = *self.free.last()?;
        if tokens.len() != self.block_tokens {
            return None;
        }
        let hash = prefix_hash(parent.as_ref(), &salt, tokens.iter().copied());
        let content = PrefixBlock { hash, parent, salt, tokens, block };
        if self.prefixes.publish(content) != Publication::Published {
            return None;
        }
        self.free.pop();
        self.prefixes.rest_as_oldest(block);
        self.check();
        Some((block, hash))
    }

    /// Whether a block with this address can be found.
    pub fn has_prefix(&self, hash: &PrefixHash) -> bool {
        self.prefixes.has(hash)
    }

    /// Forgets a cached block that no known block follows, and frees it; `false` when it is none.
    pub fn forget(&mut self, hash: &PrefixHash) -> bool {
        let forgotten = self.prefixes.forget(hash);
        self.free.extend(forgotten);
        self.check();
        forgotten.is_some()
    }

    /// Lists the known blocks: a parent before its children, what is held or was used last first.
    pub fn export(&self) -> Vec<PrefixBlock> {
        self.prefixes.export()
    }

    /// Returns all blocks there are.
    pub fn total(&self) -> usize {
        self.holders.len()
    }

    /// Returns the blocks with a holder.
    pub fn used(&self) -> usize {
        self.held
    }

    /// Returns the blocks that only the cache holds.
    pub fn cached(&self) -> usize {
        self.prefixes.idle()
    }

    /// Returns the blocks that [`Ledger::take`] can give.
    pub fn available(&self) -> usize {
        self.free.len() + self.cached()
    }

    /// Returns a number that grows whenever a block loses its last holder. Whoever found no room need not look
    /// again while it stands still; a block published meanwhile may shorten what they lack, but is not worth a look
    /// at their whole prompt in each step.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    fn check(&self) {
        debug_assert_eq!(self.available() + self.held, self.total(), "KV1: free + held + cached = total");
    }

    /// Returns whether a block can be found.
    #[cfg(test)]
    pub(crate) fn knows(&self, block: BlockId) -> bool {
        self.prefixes.knows(block)
    }

    /// Counts everything anew: each block is in exactly one of the three states, and chains are whole.
    #[cfg(test)]
    pub(crate) fn audit(&self) {
        let mut seen = vec![false; self.total()];
        for block in &self.free {
            assert!(!std::mem::replace(&mut seen[block.0 as usize], true), "block {} is free twice", block.0);
            assert_eq!(self.holders(*block), 0, "block {} is free and held", block.0);
            assert!(!self.prefixes.knows(*block), "block {} is free and known", block.0);
        }
        let idle = |block: &BlockId| self.holders(*block) == 0 && self.prefixes.knows(*block);
        let held = self.holders.iter().filter(|count| **count > 0).count();
        let cached = (0..self.total() as u32).map(BlockId).filter(idle).count();
        assert_eq!((held, cached, held + cached + self.free.len()), (self.held, self.cached(), self.total()), "KV1");
        let mut before = std::collections::BTreeMap::new();
        for known in self.export() {
            let holders = self.holders(known.block);
            if let Some(parent) = &known.parent {
                let parent = before.get(parent).copied();
                assert!(parent.is_some_and(|parent: usize| parent > 0 || holders == 0), "a chain is cut");
            }
            before.insert(known.hash, holders);
        }
    }
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
