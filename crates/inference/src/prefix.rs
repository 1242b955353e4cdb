//! The prefix cache: which computed block holds which tokens after which prefix.
//!
//! A full block is addressed by a BLAKE3 chain over (parent's hash, or the salt at the root) and its token ids.
//! Parent, salt and tokens are kept and compared, so a collision of hashes is never believed.
//!
//! Invariant: the parent of a known block is known, and an idle block (one that no sequence holds) was used no
//! later than its parent. So taking the one used longest ago never cuts a chain in its middle.

use std::collections::{BTreeMap, HashMap};

use crate::engine::BlockId;

/// A full block's address: the hash of all tokens up to the block's end, and of the salt.
pub type PrefixHash = [u8; 32];

/// One block's place in the prefix cache: what a store that outlives the process keeps beside the block's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefixBlock {
    /// Its address.
    pub hash: PrefixHash,
    /// The address of the block before it; `None` for a prompt's first.
    pub parent: Option<PrefixHash>,
    /// The salt of whoever may use it.
    pub salt: [u8; 32],
    /// The token ids it holds, as many as a block has positions.
    pub tokens: Vec<u32>,
    /// Where its content is.
    pub block: BlockId,
}

/// Returns the address of a block with `tokens` after `parent`.
pub fn prefix_hash(parent: Option<&PrefixHash>, salt: &[u8; 32], tokens: impl IntoIterator<Item = u32>) -> PrefixHash {
    let mut bytes = parent.unwrap_or(salt).to_vec();
    bytes.extend(tokens.into_iter().flat_map(u32::to_le_bytes));
    *blake3::hash(&bytes).as_bytes()
}

#[derive(Clone, Debug)]
struct Entry {
    content: PrefixBlock,
    /// Blocks before it in its chain.
    depth: u32,
    /// Known blocks right after it.
    children: u32,
    /// When it was last let go, on the cache's own counter; `None` while a sequence holds it.
    idle: Option<i64>,
}

/// What became of a block that was offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Publication {
    /// It can be found now.
    Published,
    /// This other block has the same content and is found in its place.
    Known(BlockId),
    /// It can't be found: another content has its address, or its parent is unknown.
    Refused,
}

/// Content to block. It counts no holders: the ledger says when a block falls idle and when it is held again.
#[derive(Clone, Debug, Default)]
pub(crate) struct PrefixCache {
    entries: HashMap<PrefixHash, Entry>,
    by_block: BTreeMap<BlockId, PrefixHash>,
    /// Idle blocks, the one used longest ago first.
    idle: BTreeMap<i64, BlockId>,
    newest: i64,
    oldest: i64,
}

impl PrefixCache {
    /// Finds the block with exactly this content.
    pub(crate) fn find(
        &self,
        hash: &PrefixHash,
        parent: Option<&PrefixHash>,
        salt: &[u8; 32],
        tokens: impl Iterator<Item = u32>,
    ) -> Option<BlockId> {
        let content = &self.entries.get(hash)?.content;
        let same = content.parent.as_ref() == parent && content.salt == *salt;
        (same && content.tokens.iter().copied().eq(tokens)).then_some(content.block)
    }

    /// Whether a block with this address can be found.
    pub(crate) fn has(&self, hash: &PrefixHash) -> bool {
        self.entries.contains_key(hash)
    }

    /// Makes a held block findable.
    pub(crate) fn publish(&mut self, content: PrefixBlock) -> Publication {
        if let Some(entry) = self.entries.get(&content.hash) {
            let PrefixBlock { parent, salt, tokens, .. } = &entry.content;
            let same = *parent == content.parent && *salt == content.salt && *tokens == content.tokens;
            return if same { Publication::Known(entry.content.block) } else { Publication::Refused };
        }
        let mut depth = 0;
        if let Some(parent) = &content.parent {
            let Some(entry) = self.entries.get_mut(parent) else { return Publication::Refused };
            if entry.content.salt != content.salt {
                return Publication::Refused;
            }
            entry.children += 1;
            depth = entry.depth + 1;
        }
        self.by_block.insert(content.block, content.hash);
        self.entries.insert(content.hash, Entry { content, depth, children: 0, idle: None });
        Publication::Published
    }

    /// Notes that nobody holds the block any more; `false` when it is not known here.
    ///
    /// A chain is let go from its end, which makes the parent the one used later.
    pub(crate) fn rest(&mut self, block: BlockId) -> bool {
        self.newest += 1;
        self.set_idle(block, Some(self.newest))
    }

    /// Like [`PrefixCache::rest`], but the block counts as used before all others.
    pub(crate) fn rest_as_oldest(&mut self, block: BlockId) -> bool {
        self.oldest -= 1;
        self.set_idle(block, Some(self.oldest))
    }

    /// Notes that the block is held again.
    pub(crate) fn wake(&mut self, block: BlockId) {
        self.set_idle(block, None);
    }

    fn set_idle(&mut self, block: BlockId, stamp: Option<i64>) -> bool {
        let Some(entry) = self.by_block.get(&block).and_then(|hash| self.entries.get_mut(hash)) else { return false };
        if let Some(old) = std::mem::replace(&mut entry.idle, stamp) {
            self.idle.remove(&old);
        }
        if let Some(stamp) = stamp {
            self.idle.insert(stamp, block);
        }
        true
    }

    /// Forgets the idle block that was used longest ago.
    pub(crate) fn evict(&mut self) -> Option<BlockId> {
        let block = *self.idle.first_key_value()?.1;
        let hash = *self.by_block.get(&block)?;
        let forgotten = self.forget(&hash);
        debug_assert!(forgotten.is_some(), "block {} leaves children behind", block.0);
        forgotten
    }

    /// Forgets one idle block that no known block follows.
    pub(crate) fn forget(&mut self, hash: &PrefixHash) -> Option<BlockId> {
        let entry = self.entries.get(hash)?;
        let (block, parent, stamp) = (entry.content.block, entry.content.parent, entry.idle?);
        if entry.children > 0 {
            return None;
        }
        self.entries.remove(hash);
        self.by_block.remove(&block);
        self.idle.remove(&stamp);
        if let Some(entry) = parent.and_then(|parent| self.entries.get_mut(&parent)) {
            entry.children -= 1;
        }
        Some(block)
    }

    /// Returns how many blocks only the cache holds.
    pub(crate) fn idle(&self) -> usize {
        self.idle.len()
    }

    /// Returns whether a block is known.
    #[cfg(test)]
    pub(crate) fn knows(&self, block: BlockId) -> bool {
        self.by_block.contains_key(&block)
    }

    /// Lists what is known: held blocks first, then by last use, the latest first; a parent before its children.
    pub(crate) fn export(&self) -> Vec<PrefixBlock> {
        let mut entries: Vec<&Entry> = self.entries.values().collect();
        let hotness = |entry: &Entry| std::cmp::Reverse(entry.idle.unwrap_or(i64::MAX));
        entries.sort_unstable_by_key(|entry| (hotness(entry), entry.depth, entry.content.block));
        entries.into_iter().map(|entry| entry.content.clone()).collect()
    }
}

#[cfg(test)]
#[path = "prefix_tests.rs"]
mod tests;
