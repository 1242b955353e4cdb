//! The store in memory: what was kept last, hottest first, within its bytes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use inference::PrefixHash;
use words::Fingerprint;

use crate::KvBlock;

type Address = (Fingerprint, PrefixHash);
/// Who goes first has the least: the older batch, and within one the later place.
type Rank = (u64, std::cmp::Reverse<u64>);

/// Blocks in memory.
#[derive(Debug, Default)]
pub(crate) struct Ram {
    bytes_max: u64,
    bytes: u64,
    batch: u64,
    place: u64,
    blocks: HashMap<Address, (Rank, Arc<KvBlock>)>,
    by_rank: BTreeMap<Rank, Address>,
}

impl Ram {
    pub(crate) fn new(bytes_max: u64) -> Self {
        Ram { bytes_max, ..Ram::default() }
    }

    /// Begins a batch, whose blocks come hottest first, parents before children; they push out those of older batches
    /// and never each other.
    pub(crate) fn begin(&mut self) {
        self.batch += 1;
        self.place = 0;
    }

    /// Keeps a block; `false` when there is no room for it beside hotter ones of its batch.
    pub(crate) fn keep(&mut self, of: Fingerprint, hash: PrefixHash, block: Arc<KvBlock>) -> bool {
        self.forget(&of, &hash);
        let size = block.size();
        while self.bytes + size > self.bytes_max {
            let Some((rank, (of, hash))) = self.by_rank.first_key_value() else { return false };
            if rank.0 >= self.batch {
                return false;
            }
            let (of, hash) = (*of, *hash);
            self.forget(&of, &hash);
        }
        self.place += 1;
        let rank = (self.batch, std::cmp::Reverse(self.place));
        self.bytes += size;
        self.by_rank.insert(rank, (of, hash));
        self.blocks.insert((of, hash), (rank, block));
        true
    }

    pub(crate) fn get(&self, of: &Fingerprint, hash: &PrefixHash) -> Option<Arc<KvBlock>> {
        self.blocks.get(&(*of, *hash)).map(|(_, block)| block.clone())
    }

    pub(crate) fn forget(&mut self, of: &Fingerprint, hash: &PrefixHash) -> bool {
        let Some((rank, block)) = self.blocks.remove(&(*of, *hash)) else { return false };
        self.by_rank.remove(&rank);
        self.bytes -= block.size();
        true
    }

    /// Lists the blocks, those to keep longest first.
    pub(crate) fn hottest(&self) -> Vec<(Address, Arc<KvBlock>)> {
        let blocks = self.by_rank.values().rev();
        blocks.filter_map(|address| self.blocks.get(address).map(|(_, block)| (*address, block.clone()))).collect()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }
}
