//! What comes back is what went in, or nothing: over swaps, restarts, crashes, damage, ages and full disks.
#![allow(clippy::unwrap_used)]
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;
use words::Fingerprint;

use super::*;

const OF: Fingerprint = Fingerprint([7; 32]);
const SALT: [u8; 32] = [0; 32];
const SIZE: usize = 4;

/// The blocks of `tokens`, each with content of its own.
fn chain(tokens: &[u32]) -> Vec<KvBlock> {
    let mut parent = None;
    let blocks = tokens.chunks_exact(SIZE).enumerate().map(|(depth, chunk)| {
        let bytes = chunk.iter().flat_map(|token| [*token as u8; 100]).collect();
        let block = KvBlock { parent, salt: SALT, tokens: chunk.to_vec(), depth: depth as u32, bytes };
        parent = Some(block.hash());
        block
    });
    blocks.collect()
}

fn keep(store: &KvStore, blocks: Vec<KvBlock>) -> usize {
    let mut blocks = blocks.into_iter();
    store.keep(OF, || blocks.next())
}

fn disk(folder: &Path) -> DiskOptions {
    DiskOptions { folder: folder.into(), bytes_max: 1 << 20, age_max: Duration::from_secs(86_400) }
}

fn open(folder: &Path, now: u64) -> KvStore {
    let store = KvStore::new(1 << 20);
    store.open_disk(disk(folder), now).unwrap();
    store
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let inside = |path: PathBuf| fs::read_dir(path).map(|entries| entries.map(|entry| entry.unwrap().path()).collect());
    let folders: Vec<PathBuf> = inside(folder.into()).unwrap();
    let mut files: Vec<PathBuf> = folders.into_iter().flat_map(|path| inside(path).unwrap_or_default()).collect();
    files.sort();
    files
}

#[test]
fn a_chain_survives_a_swap_in_memory_and_a_restart_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let tokens: Vec<u32> = (0..18).collect();
    let store = open(folder.path(), now());
    assert_eq!(keep(&store, chain(&tokens)), 4);
    assert_eq!(store.prefetch(OF, &SALT, &tokens, SIZE, now()), 4, "what fills no block is not stored");
    let spilled = store.spill(now(), || true);
    assert_eq!((spilled.written, spilled.left), (4, 0));
    drop(store);

    let store = open(folder.path(), now());
    assert_eq!(store.counts().disk_blocks, 4);
    let longer: Vec<u32> = (0..40).collect();
    assert_eq!(store.prefetch(OF, &SALT, &longer, SIZE, now()), 4);
    for block in chain(&tokens) {
        assert_eq!(*store.get(&OF, &block.hash()).unwrap(), block);
        store.forget(&OF, &block.hash());
    }
    assert_eq!(store.counts().ram_blocks, 0);
    let other = [&tokens[..8], &[99; 8]].concat();
    assert_eq!(store.prefetch(OF, &SALT, &other, SIZE, now()), 2, "the longest prefix");
    assert_eq!(store.prefetch(Fingerprint([8; 32]), &SALT, &tokens, SIZE, now()), 0, "another engine's");
    assert_eq!(store.prefetch(OF, &[1; 32], &tokens, SIZE, now()), 0, "another tenant's");
}

#[test]
fn a_disk_that_comes_late_finds_what_was_kept_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new): (Vec<u32>, Vec<u32>) = ((0..8).collect(), (100..108).collect());
    let store = open(folder.path(), now());
    keep(&store, chain(&old));
    store.spill(now(), || true);
    drop(store);

    let store = KvStore::new(1 << 20);
    assert!(!store.in_memory() && !store.on_disk() && !store.has_disk());
    keep(&store, chain(&new));
    assert!(store.in_memory() && !store.on_disk());
    assert_eq!(store.prefetch(OF, &SALT, &old, SIZE, now()), 0, "nobody has looked there yet");
    store.open_disk(disk(folder.path()), now()).unwrap();
    assert!(store.on_disk());
    assert_eq!(store.prefetch(OF, &SALT, &old, SIZE, now()), 2);
    assert_eq!(store.spill(now(), || true).written, 2);
    let again = store.open_disk(disk(&folder.path().join("other")), now()).unwrap_err();
    assert_eq!(again.kind(), std::io::ErrorKind::AlreadyExists);
}

#[test]
fn files_are_their_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path(), now());
    keep(&store, chain(&[1; 8]));
    store.spill(now(), || true);
    for file in files(folder.path()) {
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(file.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
    }
}

#[test]
fn a_damaged_file_is_as_if_it_were_not_there_whatever_its_damage() {
    let tokens: Vec<u32> = (0..8).collect();
    let damages: [fn(&mut Vec<u8>); 6] = [
        |file| file.truncate(file.len() - 1),
        |file| file.truncate(20),
        |file| file.clear(),
        |file| file.push(0),
        |file| file[8] = 2,
        |file| *file.last_mut().unwrap() ^= 1,
    ];
    for damage in damages {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path(), now());
        keep(&store, chain(&tokens));
        store.spill(now(), || true);
        drop(store);
        for path in files(folder.path()) {
            let mut file = fs::read(&path).unwrap();
            damage(&mut file);
            fs::write(&path, file).unwrap();
        }
        let store = open(folder.path(), now());
        assert_eq!(store.prefetch(OF, &SALT, &tokens, SIZE, now()), 0);
        assert!(store.counts().damaged > 0);
        assert!(files(folder.path()).len() <= 1, "what was found to be damaged is gone");
    }
}

#[test]
fn what_is_none_of_ours_is_left_alone_and_what_is_unfinished_goes() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path(), now());
    keep(&store, chain(&[1; 8]));
    store.spill(now(), || true);
    drop(store);
    let beside = files(folder.path())[0].parent().unwrap().to_path_buf();
    fs::write(beside.join("notes.txt"), "mine").unwrap();
    fs::write(folder.path().join("README"), "mine").unwrap();
    fs::write(beside.join(".part-0123456789abcdef"), "half").unwrap();
    let store = open(folder.path(), now());
    assert_eq!(store.counts().disk_blocks, 2);
    assert!(beside.join("notes.txt").exists() && folder.path().join("README").exists());
    assert!(!beside.join(".part-0123456789abcdef").exists());
}

#[test]
fn a_second_process_on_the_folder_goes_without_it() {
    let folder = tempfile::tempdir().unwrap();
    let first = open(folder.path(), now());
    let second = KvStore::new(1 << 20);
    let refused = second.open_disk(disk(folder.path()), now()).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ResourceBusy);
    keep(&second, chain(&[1; 8]));
    assert_eq!(second.spill(now(), || true).written, 0);
    drop(first);
    assert!(second.open_disk(disk(folder.path()), now()).is_ok());
    assert_eq!(second.spill(now(), || true).written, 2, "what came in between is not lost");
}

#[test]
fn an_unusable_folder_and_a_full_disk_lose_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "").unwrap();
    let store = KvStore::new(1 << 20);
    assert!(store.open_disk(disk(&folder.path().join("file")), now()).is_err());
    assert_eq!(keep(&store, chain(&[1; 8])), 2);

    // A place where nothing can be written: the folder of this engine is a file.
    let store = open(folder.path(), now());
    let engine: String = OF.0.iter().map(|byte| format!("{byte:02x}")).collect();
    fs::write(folder.path().join(engine), "").unwrap();
    keep(&store, chain(&[1; 8]));
    let spilled = store.spill(now(), || true);
    assert!(spilled.error.is_some() && spilled.written == 0 && spilled.left == 2);
    assert_eq!(store.prefetch(OF, &SALT, &[1; 8], SIZE, now()), 2, "memory has it still");
}

#[test]
fn a_full_file_system_leaves_no_half_file() {
    // A file system of its own, of one megabyte; only where this user may mount one.
    let folder = tempfile::tempdir().unwrap();
    let mut command = std::process::Command::new("mount");
    command.args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"]).arg(folder.path());
    let mounted = command.output().is_ok_and(|output| output.status.success());
    let mut mount = mounted.then(|| Unmount(folder.path().into()));
    if mount.is_none() {
        eprintln!("SKIPPED: no file system can be mounted here");
        return;
    }
    let store = open(folder.path(), now());
    let tokens: Vec<u32> = (0..SIZE as u32 * 2000).collect();
    keep(&store, chain(&tokens));
    let spilled = store.spill(now(), || true);
    assert_eq!(spilled.error.unwrap().kind(), std::io::ErrorKind::StorageFull);
    assert!(spilled.written > 0 && spilled.left > 0);
    assert_eq!(files(folder.path()).len(), spilled.written, "no unfinished file is left");
    drop(store);
    assert_eq!(open(folder.path(), now()).prefetch(OF, &SALT, &tokens, SIZE, now()), spilled.written);
    drop(mount.take());
}

struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn the_quota_holds_children_go_before_their_parents_and_old_ones_before_new() {
    let folder = tempfile::tempdir().unwrap();
    let size = crate::file::HEADER_BYTES as u64 + 32 + 4 * SIZE as u64 + 400;
    let options = DiskOptions { bytes_max: 10 * size, ..disk(folder.path()) };
    let (old, new): (Vec<u32>, Vec<u32>) = ((0..32).collect(), (100..132).collect());
    let open = || {
        let store = KvStore::new(1 << 20);
        store.open_disk(options.clone(), now()).unwrap();
        store
    };
    let store = open();
    keep(&store, chain(&old));
    assert_eq!(store.spill(now() - 100, || true).written, 8);
    keep(&store, chain(&new));
    store.spill(now(), || true);
    assert!(store.counts().disk_bytes <= options.bytes_max);
    drop(store);
    let store = open();
    assert_eq!(store.prefetch(OF, &SALT, &new, SIZE, now()), 8);
    let left = store.counts().disk_blocks - 8;
    assert!(left > 0 && left < 8, "{left}");
    assert_eq!(store.prefetch(OF, &SALT, &old, SIZE, now()), left, "what is left of the old one is its beginning");
}

#[test]
fn blocks_that_nobody_used_for_a_day_are_gone() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path(), now());
    keep(&store, chain(&[1; 8]));
    store.spill(now(), || true);
    drop(store);
    assert_eq!(open(folder.path(), now() + 3600).counts().disk_blocks, 2);
    assert_eq!(open(folder.path(), now() + 90_000).counts().disk_blocks, 0);
    assert!(files(folder.path()).is_empty());
}

#[test]
fn memory_holds_the_hottest_of_the_newest_and_never_more_than_its_bytes() {
    let size = chain(&[0; 4])[0].size();
    let store = KvStore::new(10 * size);
    let (first, second): (Vec<u32>, Vec<u32>) = ((0..24).collect(), (100..180).collect());
    assert_eq!(keep(&store, chain(&first)), 6);
    assert_eq!(keep(&store, chain(&second)), 10, "the older batch makes room, its own does not");
    assert_eq!(store.prefetch(OF, &SALT, &first, SIZE, 0), 0);
    assert_eq!(store.prefetch(OF, &SALT, &second, SIZE, 0), 10);
    assert!(store.counts().ram_bytes <= 10 * size);
}

#[test]
fn a_spill_without_time_writes_nothing_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path(), now());
    keep(&store, chain(&[1; 16]));
    let left = std::cell::Cell::new(2);
    let spilled = store.spill(now(), || left.replace(left.get() - 1) > 0);
    assert_eq!((spilled.written, spilled.left), (2, 2));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn no_change_of_a_file_is_believed(at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<bool>()) {
        let block = chain(&(0..8).collect::<Vec<_>>()).remove(1);
        let mut file = crate::file::encode(&OF, &block.hash(), &block);
        prop_assert_eq!(&crate::file::decode(&OF, &block.hash(), &file).unwrap(), &block);
        let at = at.index(file.len());
        if cut { file.truncate(at) } else { file[at] ^= 1 << bit }
        prop_assert!(crate::file::decode(&OF, &block.hash(), &file).is_err());
    }

    #[test]
    fn any_bytes_are_a_block_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..400), head in any::<bool>()) {
        let mut file = if head { b"cortexkv\x01\0\0\0".to_vec() } else { Vec::new() };
        file.extend(bytes);
        prop_assert!(crate::file::decode(&OF, &[0; 32], &file).is_err());
    }
}
