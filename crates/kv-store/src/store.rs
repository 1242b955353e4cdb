//! Memory and disk as one store.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use inference::{PrefixHash, prefix_hash};
use words::Fingerprint;

use crate::disk::Disk;
use crate::ram::Ram;
use crate::{DiskOptions, KvBlock};

/// What a store holds and has met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Blocks in memory.
    pub ram_blocks: usize,
    /// Their bytes.
    pub ram_bytes: u64,
    /// Blocks on disk.
    pub disk_blocks: usize,
    /// Their bytes.
    pub disk_bytes: u64,
    /// Files that were no longer what was written; never falls.
    pub damaged: u64,
}

/// What a spill has done.
#[derive(Debug, Default)]
pub struct Spilled {
    /// Blocks that were written.
    pub written: usize,
    /// Blocks that stayed in memory alone: there was no time, or no room.
    pub left: usize,
    /// What stopped it.
    pub error: Option<io::Error>,
}

/// The store and what to tell of its opening.
#[derive(Debug)]
pub struct Opened {
    /// The store; without its disk when that can't be used.
    pub store: KvStore,
    /// Why the disk can't be used.
    pub unusable: Option<io::Error>,
}

#[derive(Debug)]
struct Inner {
    /// Held for a look-up; never while the disk works.
    ram: Mutex<Ram>,
    /// Held while the disk works, and taken before `ram`.
    disk: Option<Mutex<Disk>>,
}

/// The store; cheap to clone.
#[derive(Clone, Debug)]
pub struct KvStore {
    inner: Arc<Inner>,
}

fn held<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KvStore {
    /// Opens a store with at most `ram_bytes` in memory, and on disk where there are options for it. Reads the folder.
    pub fn open(ram_bytes: u64, disk: Option<DiskOptions>, now: u64) -> Opened {
        let (disk, unusable) = match disk.map(|options| Disk::open(options, now)) {
            Some(Ok(disk)) => (Some(disk), None),
            Some(Err(error)) => (None, Some(error)),
            None => (None, None),
        };
        let inner = Inner { ram: Mutex::new(Ram::new(ram_bytes)), disk: disk.map(Mutex::new) };
        Opened { store: KvStore { inner: Arc::new(inner) }, unusable }
    }

    /// Keeps the blocks of one engine in memory. They come hottest first and parents before children, as
    /// `Scheduler::export_prefixes` lists them; `next` gives one after another, `None` at the end or when there is no
    /// more time. Returns how many were kept; it stops when there is no room.
    pub fn keep(&self, of: Fingerprint, mut next: impl FnMut() -> Option<KvBlock>) -> usize {
        held(&self.inner.ram).begin();
        let mut kept = 0;
        while let Some(block) = next() {
            let hash = block.hash();
            if !held(&self.inner.ram).keep(of, hash, Arc::new(block)) {
                break;
            }
            kept += 1;
        }
        kept
    }

    /// Returns a block that is in memory. Never touches the disk.
    pub fn get(&self, of: &Fingerprint, hash: &PrefixHash) -> Option<Arc<KvBlock>> {
        held(&self.inner.ram).get(of, hash)
    }

    /// Gives a block's memory back, once an engine has it again. A copy on disk stays.
    pub fn forget(&self, of: &Fingerprint, hash: &PrefixHash) {
        held(&self.inner.ram).forget(of, hash);
    }

    /// Brings the longest prefix of `tokens` that is stored into memory, in blocks of `block_tokens`; returns how many
    /// blocks of it are there. Reads the disk.
    pub fn prefetch(&self, of: Fingerprint, salt: &[u8; 32], tokens: &[u32], block_tokens: usize, now: u64) -> usize {
        let mut parent: Option<PrefixHash> = None;
        let mut found = 0;
        let mut begun = false;
        for chunk in tokens.chunks_exact(block_tokens.max(1)) {
            let hash = prefix_hash(parent.as_ref(), salt, chunk.iter().copied());
            if held(&self.inner.ram).get(&of, &hash).is_none() {
                let block = self.inner.disk.as_ref().and_then(|disk| held(disk).read(&of, &hash, now));
                let Some(block) = block.filter(|block| block.tokens == chunk && block.salt == *salt) else { break };
                let mut ram = held(&self.inner.ram);
                if !std::mem::replace(&mut begun, true) {
                    ram.begin();
                }
                if !ram.keep(of, hash, Arc::new(block)) {
                    break;
                }
            }
            found += 1;
            parent = Some(hash);
        }
        found
    }

    /// Whether anything of this engine may be stored: a prompt need not be looked up otherwise.
    pub fn is_empty(&self) -> bool {
        let on_disk = self.inner.disk.as_ref().map_or(0, |disk| held(disk).len());
        on_disk == 0 && held(&self.inner.ram).len() == 0
    }

    /// Whether it has a disk.
    pub fn has_disk(&self) -> bool {
        self.inner.disk.is_some()
    }

    /// Writes what is in memory to disk, hottest first, as long as `time_left` says. Does nothing without a disk.
    pub fn spill(&self, now: u64, time_left: impl Fn() -> bool) -> Spilled {
        let blocks = held(&self.inner.ram).hottest();
        let mut spilled = Spilled { left: blocks.len(), ..Spilled::default() };
        let Some(disk) = &self.inner.disk else { return spilled };
        for ((of, hash), block) in blocks {
            if !time_left() {
                break;
            }
            let mut disk = held(disk);
            match disk.write(&of, &hash, &block, now) {
                Ok(written) => {
                    spilled.written += usize::from(written);
                    spilled.left -= usize::from(disk.has(&of, &hash));
                }
                Err(error) => {
                    spilled.error = Some(error);
                    break;
                }
            }
        }
        spilled
    }

    /// Returns what it holds.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        if let Some(disk) = &self.inner.disk {
            let disk = held(disk);
            (counts.disk_blocks, counts.disk_bytes, counts.damaged) = (disk.len(), disk.bytes(), disk.damaged());
        }
        let ram = held(&self.inner.ram);
        (counts.ram_blocks, counts.ram_bytes) = (ram.len(), ram.bytes());
        counts
    }
}
