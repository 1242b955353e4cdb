//! One download of a blob at a time, on the whole host: a lock on a file, where `huggingface_hub` has it too.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use tokio::time::Instant;

use crate::HubError;

/// How often a lock that another holds is tried.
const EVERY: Duration = Duration::from_millis(50);

/// A lock; it is free again once this is dropped, or the process is gone.
#[derive(Debug)]
pub(crate) struct BlobLock {
    _file: File,
}

fn attempt(path: &Path) -> std::io::Result<Option<BlobLock>> {
    let file = OpenOptions::new().create(true).write(true).truncate(false).open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    // Whoever held it before may have removed the file; then this lock keeps nobody out.
    let same = std::fs::metadata(path).is_ok_and(|now| file.metadata().is_ok_and(|own| own.ino() == now.ino()));
    Ok(same.then_some(BlobLock { _file: file }))
}

/// Takes the lock. While another holds it, `watch` is asked how far that one is; it may take as long as it gets on.
///
/// # Errors
/// `Locked` after `patience` without progress, `Io` where the folder can't be written or its file system has no locks.
pub(crate) async fn take(
    path: PathBuf,
    patience: Duration,
    mut watch: impl FnMut() -> u64,
) -> Result<BlobLock, HubError> {
    let io = |source| HubError::Io { path: path.clone(), source };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(io)?;
    }
    let (mut seen, mut since) = (None, Instant::now());
    loop {
        if let Some(lock) = attempt(&path).map_err(io)? {
            return Ok(lock);
        }
        let now = Some(watch());
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
        if since.elapsed() >= patience {
            return Err(HubError::Locked { path, seconds: patience.as_secs() });
        }
        tokio::time::sleep(EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn a_lock_keeps_others_out_until_it_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b.lock");
        let patience = Duration::from_millis(120);
        let held = take(path.clone(), patience, || 0).await.unwrap();
        assert!(matches!(take(path.clone(), patience, || 7).await, Err(HubError::Locked { .. })));
        let mut progress = 0;
        let waiting = take(path.clone(), patience, || {
            progress += 1;
            progress
        });
        let release = async {
            tokio::time::sleep(patience * 3).await;
            drop(held);
        };
        // The one that holds it gets on, so it is waited for longer than the patience.
        assert!(tokio::join!(waiting, release).0.is_ok());
    }
}
