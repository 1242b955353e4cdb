//! The store on disk: one folder a fingerprint, one file a block, one process at a time.
//!
//! A file gets its name by a rename once it is whole. Files that are damaged, too old or of another layout are removed;
//! what is none of ours is left alone.

use std::collections::HashMap;
use std::fs::{self, File, FileTimes, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use inference::PrefixHash;
use rustix::fs::{FlockOperation, flock};
use words::Fingerprint;

use crate::KvBlock;
use crate::file::{FileError, HEADER_BYTES, decode, encode, header};

/// Most files that are looked at when a folder is opened.
const FILES_MAX: usize = 1 << 20;
const ENDING: &str = ".kv";
const UNFINISHED: &str = ".part-";

/// Where blocks are kept, and how many for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// The folder; nobody else writes to it.
    pub folder: PathBuf,
    /// Most bytes of all files.
    pub bytes_max: u64,
    /// A block that was not used for this long is removed.
    pub age_max: Duration,
}

#[derive(Clone, Debug)]
struct Known {
    bytes: u64,
    depth: u32,
    /// Unix seconds.
    used: u64,
}

/// The open folder. Its lock is held as long as this lives.
#[derive(Debug)]
pub(crate) struct Disk {
    options: DiskOptions,
    blocks: HashMap<(Fingerprint, PrefixHash), Known>,
    bytes: u64,
    damaged: u64,
    _lock: File,
}

fn hex(bytes: &[u8; 32]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 || digits.iter().any(|digit| !matches!(digit, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

fn private_folder(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn seconds(time: io::Result<SystemTime>) -> u64 {
    time.ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).map_or(0, |since| since.as_secs())
}

fn time(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

impl Disk {
    /// Opens the folder and looks at what is there; removes what is too old, damaged at its head, or unfinished.
    ///
    /// # Errors
    /// When the folder can't be used, or another process has it.
    pub(crate) fn open(options: DiskOptions, now: u64) -> io::Result<Disk> {
        private_folder(&options.folder)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(options.folder.join("lock"))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => {
                io::Error::new(io::ErrorKind::ResourceBusy, "another process uses this folder")
            }
            error => error.into(),
        })?;
        let mut disk = Disk { options, blocks: HashMap::new(), bytes: 0, damaged: 0, _lock: lock };
        disk.scan(now)?;
        disk.shrink(0, u64::MAX);
        Ok(disk)
    }

    fn path(&self, of: &Fingerprint, hash: &PrefixHash) -> PathBuf {
        self.options.folder.join(hex(&of.0)).join(hex(hash) + ENDING)
    }

    fn scan(&mut self, now: u64) -> io::Result<()> {
        let mut seen = 0;
        for folder in fs::read_dir(&self.options.folder)? {
            let folder = folder?;
            let Some(of) = folder.file_name().to_str().and_then(unhex) else { continue };
            let Ok(files) = fs::read_dir(folder.path()) else { continue };
            for entry in files.flatten() {
                seen += 1;
                if seen > FILES_MAX {
                    return Ok(());
                }
                let name = entry.file_name();
                let Some(name) = name.to_str() else { continue };
                if name.starts_with(UNFINISHED) {
                    let _ = fs::remove_file(entry.path());
                    continue;
                }
                let Some(hash) = name.strip_suffix(ENDING).and_then(unhex) else { continue };
                match self.look(&entry.path(), Fingerprint(of), hash) {
                    Ok(known) if now.saturating_sub(known.used) <= self.options.age_max.as_secs() => {
                        self.bytes += known.bytes;
                        self.blocks.insert((Fingerprint(of), hash), known);
                    }
                    Ok(_) => drop(fs::remove_file(entry.path())),
                    Err(_) => {
                        self.damaged += 1;
                        let _ = fs::remove_file(entry.path());
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads a file's head and length alone; the rest is checked when somebody wants it.
    fn look(&self, path: &Path, of: Fingerprint, hash: PrefixHash) -> Result<Known, FileError> {
        let mut head = [0; HEADER_BYTES];
        let mut file = File::open(path).map_err(|_| FileError::Foreign)?;
        file.read_exact(&mut head).map_err(|_| FileError::Length)?;
        let header = header(&head)?;
        let metadata = file.metadata().map_err(|_| FileError::Foreign)?;
        if header.file_bytes() != metadata.len() {
            return Err(FileError::Length);
        }
        if (header.of, header.hash) != (of, hash) {
            return Err(FileError::Address);
        }
        Ok(Known { bytes: metadata.len(), depth: header.depth, used: seconds(metadata.modified()) })
    }

    pub(crate) fn has(&self, of: &Fingerprint, hash: &PrefixHash) -> bool {
        self.blocks.contains_key(&(*of, *hash))
    }

    /// Reads a block and notes its use. A file that is not what it should be is removed, and counted.
    pub(crate) fn read(&mut self, of: &Fingerprint, hash: &PrefixHash, now: u64) -> Option<KvBlock> {
        let bytes = self.blocks.get(&(*of, *hash))?.bytes;
        let path = self.path(of, hash);
        let read = File::open(&path).and_then(|file| {
            let mut content = Vec::with_capacity(bytes as usize);
            (&file).take(bytes + 1).read_to_end(&mut content)?;
            // Its age counts from here; where that can't be noted it only goes sooner.
            let _ = file.set_times(FileTimes::new().set_modified(time(now)));
            Ok(content)
        });
        match read.ok().and_then(|content| decode(of, hash, &content).ok()) {
            Some(block) => {
                if let Some(known) = self.blocks.get_mut(&(*of, *hash)) {
                    known.used = now;
                }
                Some(block)
            }
            None => {
                self.damaged += 1;
                self.remove(of, hash);
                None
            }
        }
    }

    fn remove(&mut self, of: &Fingerprint, hash: &PrefixHash) {
        if let Some(known) = self.blocks.remove(&(*of, *hash)) {
            self.bytes -= known.bytes;
            let _ = fs::remove_file(self.path(of, hash));
        }
    }

    /// Makes room for `more` bytes, of blocks that were not used since `since`: the one used longest ago goes first,
    /// children before their parents. `false` when that is not enough.
    fn shrink(&mut self, more: u64, since: u64) -> bool {
        if self.bytes + more <= self.options.bytes_max {
            return true;
        }
        let old = self.blocks.iter().filter(|(_, known)| known.used < since);
        let mut order: Vec<_> = old.map(|(address, known)| (known.used, u32::MAX - known.depth, *address)).collect();
        order.sort_unstable_by_key(|(used, height, _)| (*used, *height));
        // A tenth at once, so that a long spill does not sort for every block.
        let goal = (self.options.bytes_max / 10 * 9).saturating_sub(more);
        for (.., (of, hash)) in order {
            if self.bytes <= goal {
                break;
            }
            self.remove(&of, &hash);
        }
        self.bytes + more <= self.options.bytes_max
    }

    /// Writes a block: whole under its name, or not at all. `false` when it is there already, or has no room beside
    /// what was used in this very second.
    ///
    /// # Errors
    /// Of the file system; nothing is left then.
    pub(crate) fn write(&mut self, of: &Fingerprint, hash: &PrefixHash, block: &KvBlock, now: u64) -> io::Result<bool> {
        if let Some(known) = self.blocks.get_mut(&(*of, *hash)) {
            // Used as late as what is written beside it, so that a colder block never takes its room.
            known.used = now;
            let _ = File::open(self.path(of, hash)).and_then(|file| file.set_modified(time(now)));
            return Ok(false);
        }
        let content = encode(of, hash, block);
        let bytes = content.len() as u64;
        if !self.shrink(bytes, now) {
            return Ok(false);
        }
        let path = self.path(of, hash);
        let folder = path.parent().unwrap_or(&self.options.folder).to_path_buf();
        private_folder(&folder)?;
        let unfinished = folder.join(format!("{UNFINISHED}{:016x}", rand::random::<u64>()));
        let written = (|| {
            let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&unfinished)?;
            file.write_all(&content)?;
            file.set_times(FileTimes::new().set_modified(time(now)))?;
            // Before the name is given, or a crash of the machine leaves a whole name on half a file.
            file.sync_data()?;
            fs::rename(&unfinished, &path)
        })();
        if let Err(error) = written {
            let _ = fs::remove_file(&unfinished);
            return Err(error);
        }
        self.bytes += bytes;
        self.blocks.insert((*of, *hash), Known { bytes, depth: block.depth, used: now });
        Ok(true)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }

    pub(crate) fn damaged(&self) -> u64 {
        self.damaged
    }
}
