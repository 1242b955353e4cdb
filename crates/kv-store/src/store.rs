//! Memory and disk as one store.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

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

#[derive(Debug)]
struct Inner {
    /// Held for a look-up; never while the disk works.
    ram: Mutex<Ram>,
    /// There once its folder was read. Held while the disk works, and taken before `ram`.
    disk: OnceLock<Mutex<Disk>>,
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
    /// Makes a store with at most `ram_bytes` in memory, and no disk yet.
    pub fn new(ram_bytes: u64) -> KvStore {
        let inner = Inner { ram: Mutex::new(Ram::new(ram_bytes)), disk: OnceLock::new() };
        KvStore { inner: Arc::new(inner) }
    }

    /// Adds a disk; what is in memory by then stays there. Reads the folder, which may take seconds, and holds up nobody
    /// who uses the store meanwhile.
    ///
    /// # Errors
    /// When the folder can't be used, or another process has it, or the store has a disk already: it goes on as before.
    pub fn open_disk(&self, options: DiskOptions, now: u64) -> io::Result<()> {
        let taken = |_| io::Error::new(io::ErrorKind::AlreadyExists, "the store has a folder already");
        self.inner.disk.set(Mutex::new(Disk::open(options, now)?)).map_err(taken)
    }

    fn disk(&self) -> Option<MutexGuard<'_, Disk>> {
        self.inner.disk.get().map(held)
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
                let block = self.disk().and_then(|mut disk| disk.read(&of, &hash, now));
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

    /// Whether anything is in memory: nothing needs to be looked up there otherwise. Never touches the disk.
    pub fn in_memory(&self) -> bool {
        held(&self.inner.ram).len() > 0
    }

    /// Whether anything is on disk: nothing needs to be brought from there otherwise. Waits while the disk works.
    pub fn on_disk(&self) -> bool {
        self.disk().is_some_and(|disk| disk.len() > 0)
    }

    /// Whether it has a disk.
    pub fn has_disk(&self) -> bool {
        self.inner.disk.get().is_some()
    }

    /// Writes what is in memory to disk, hottest first, as long as `time_left` says. Does nothing without a disk.
    pub fn spill(&self, now: u64, time_left: impl Fn() -> bool) -> Spilled {
        let blocks = held(&self.inner.ram).hottest();
        let mut spilled = Spilled { left: blocks.len(), ..Spilled::default() };
        for ((of, hash), block) in blocks {
            if !time_left() {
                break;
            }
            let Some(mut disk) = self.disk() else { break };
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
        if let Some(disk) = self.disk() {
            (counts.disk_blocks, counts.disk_bytes, counts.damaged) = (disk.len(), disk.bytes(), disk.damaged());
        }
        let ram = held(&self.inner.ram);
        (counts.ram_blocks, counts.ram_bytes) = (ram.len(), ram.bytes());
        counts
    }
}
