//! KV blocks that outlive their model and their process.
//!
//! A block is addressed by what it was computed from: the exact fingerprint of its engine, and the chain of hashes over
//! salt and token ids (`inference::prefix_hash`). Both are compared again at every read, so nothing is believed because
//! of a name. Blocks go to memory when a model is unloaded, from there to disk when the process ends and the operator
//! wants it, and come back by the longest prefix of what somebody asks.
//!
//! All calls are synchronous, and those that touch the disk say so. `now` is Unix time in seconds.

mod disk;
mod file;
mod ram;
mod store;

pub use disk::DiskOptions;
pub use file::{FORMAT_VERSION, FileError};
pub use store::{Counts, KvStore, Spilled};

use inference::{PrefixHash, prefix_hash};

/// One block with its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvBlock {
    /// The address of the block before it; `None` for a prompt's first.
    pub parent: Option<PrefixHash>,
    /// The salt of whoever may use it.
    pub salt: [u8; 32],
    /// The token ids it holds.
    pub tokens: Vec<u32>,
    /// Blocks before it in its chain.
    pub depth: u32,
    /// What the engine exported.
    pub bytes: Vec<u8>,
}

impl KvBlock {
    /// Returns its address.
    pub fn hash(&self) -> PrefixHash {
        prefix_hash(self.parent.as_ref(), &self.salt, self.tokens.iter().copied())
    }

    /// Returns the memory it takes, in bytes.
    pub fn size(&self) -> u64 {
        (self.bytes.len() + 4 * self.tokens.len() + 256) as u64
    }
}

#[cfg(test)]
mod tests;
