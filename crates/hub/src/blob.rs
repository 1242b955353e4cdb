//! The thread that writes a blob: hashes what comes, and gives it its final name only when it is whole and right.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::HubError;
use crate::digest::{Etag, Hasher};
use crate::lock::BlobLock;

/// Pieces that wait for the disk before the network does.
const QUEUE: usize = 16;
/// Bytes that are read at once of what was there before.
const READ_BYTES: usize = 1 << 20;

/// What a blob is called and has to be.
#[derive(Clone, Debug)]
pub(crate) struct Blob {
    /// For errors: which file of which repo.
    pub(crate) what: String,
    pub(crate) folder: PathBuf,
    pub(crate) etag: Etag,
    pub(crate) size: u64,
}

impl Blob {
    pub(crate) fn path(&self) -> PathBuf {
        self.folder.join(self.etag.as_str())
    }

    pub(crate) fn incomplete(&self) -> PathBuf {
        self.folder.join(format!("{}.incomplete", self.etag.as_str()))
    }

    /// Returns whether it is here, as long as it should be. Only what was verified ever got this name from here.
    pub(crate) fn is_here(&self) -> bool {
        std::fs::metadata(self.path()).is_ok_and(|metadata| metadata.is_file() && metadata.len() == self.size)
    }
}

enum Piece {
    Bytes(Bytes),
    /// What came so far does not count.
    Restart,
    /// All has come.
    Finish,
}

/// A blob that is being written. Dropped before its end it leaves what came under the name `.incomplete`.
pub(crate) struct Writer {
    pieces: mpsc::Sender<Piece>,
    thread: JoinHandle<Result<(), HubError>>,
    /// Bytes that are there.
    pub(crate) offset: u64,
}

impl Writer {
    /// Begins, or goes on where an earlier download was cut. The lock is held until the file is left alone.
    ///
    /// # Errors
    /// `Io`.
    pub(crate) async fn open(blob: &Blob, lock: BlobLock) -> Result<Self, HubError> {
        let (pieces, receiver) = mpsc::channel(QUEUE);
        let (ready, offset) = oneshot::channel();
        let blob = blob.clone();
        let thread = tokio::task::spawn_blocking(move || {
            let outcome = write(&blob, receiver, ready);
            drop(lock);
            outcome
        });
        match offset.await {
            Ok(offset) => Ok(Writer { pieces, thread, offset }),
            Err(_) => Err(joined(thread.await).err().unwrap_or_else(lost)),
        }
    }

    /// Takes bytes; false once the thread has failed, which [`Writer::finish`] then tells.
    pub(crate) async fn put(&mut self, bytes: Bytes) -> bool {
        self.offset += bytes.len() as u64;
        self.pieces.send(Piece::Bytes(bytes)).await.is_ok()
    }

    /// Forgets what came so far.
    pub(crate) async fn restart(&mut self) -> bool {
        self.offset = 0;
        self.pieces.send(Piece::Restart).await.is_ok()
    }

    /// Checks the whole and gives it its name.
    ///
    /// # Errors
    /// `Checksum`, and then nothing is kept; `DiskFull`, `Io`.
    pub(crate) async fn finish(self) -> Result<(), HubError> {
        // A thread that failed has an outcome without it.
        let _ = self.pieces.send(Piece::Finish).await;
        drop(self.pieces);
        joined(self.thread.await)
    }
}

fn lost() -> HubError {
    HubError::Io { path: PathBuf::new(), source: std::io::Error::other("a download's thread is gone") }
}

fn joined(outcome: Result<Result<(), HubError>, tokio::task::JoinError>) -> Result<(), HubError> {
    outcome.unwrap_or_else(|_| Err(lost()))
}

fn disk(path: &Path) -> impl Fn(std::io::Error) -> HubError + '_ {
    move |source| match source.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => HubError::DiskFull { path: path.into() },
        _ => HubError::Io { path: path.into(), source },
    }
}

/// Hashes what is there of an earlier download; returns its length, 0 when nobody waits any more.
fn resume(file: &mut File, hasher: &mut Hasher, gone: impl Fn() -> bool) -> std::io::Result<u64> {
    let (mut buffer, mut length) = (vec![0; READ_BYTES], 0);
    while !gone() {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(length);
        }
        hasher.update(&buffer[..count]);
        length += count as u64;
    }
    Ok(0)
}

/// Takes what comes into `file`; true when it is all there, false when nobody waits any more.
fn take(
    file: &mut (impl Write + Seek + Truncate),
    pieces: &mut mpsc::Receiver<Piece>,
    hasher: &mut Hasher,
    fresh: impl Fn() -> Hasher,
) -> std::io::Result<bool> {
    while let Some(piece) = pieces.blocking_recv() {
        match piece {
            Piece::Bytes(bytes) => {
                file.write_all(&bytes)?;
                hasher.update(&bytes);
            }
            Piece::Restart => {
                file.empty()?;
                file.seek(SeekFrom::Start(0))?;
                *hasher = fresh();
            }
            Piece::Finish => return Ok(true),
        }
    }
    Ok(false)
}

/// What can be emptied.
trait Truncate {
    fn empty(&mut self) -> std::io::Result<()>;
}

impl Truncate for File {
    fn empty(&mut self) -> std::io::Result<()> {
        self.set_len(0)
    }
}

fn write(blob: &Blob, mut pieces: mpsc::Receiver<Piece>, ready: oneshot::Sender<u64>) -> Result<(), HubError> {
    let path = blob.incomplete();
    let disk = disk(&path);
    std::fs::create_dir_all(&blob.folder).map_err(&disk)?;
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(&disk)?;
    let fresh = || blob.etag.hasher(blob.size);
    let mut hasher = fresh();
    if file.metadata().map_err(&disk)?.len() > blob.size {
        file.set_len(0).map_err(&disk)?;
    }
    let offset = resume(&mut file, &mut hasher, || ready.is_closed()).map_err(&disk)?;
    if ready.send(offset).is_err() {
        return Ok(());
    }
    if !take(&mut file, &mut pieces, &mut hasher, fresh).map_err(&disk)? {
        return Ok(());
    }
    let found = hasher.finish();
    if found != blob.etag.as_str() {
        std::fs::remove_file(&path).map_err(&disk)?;
        return Err(HubError::Checksum { what: blob.what.clone(), found, wanted: blob.etag.as_str().into() });
    }
    file.sync_all().map_err(&disk)?;
    std::fs::rename(&path, blob.path()).map_err(&disk)?;
    File::open(&blob.folder).and_then(|folder| folder.sync_all()).map_err(disk)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const HELLO: &str = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";

    fn blob(folder: &Path) -> Blob {
        Blob { what: "a file".into(), folder: folder.into(), etag: Etag::new(HELLO).unwrap(), size: 6 }
    }

    async fn open(blob: &Blob) -> Writer {
        let path = blob.folder.join("lock");
        let lock = crate::lock::take(path, std::time::Duration::from_secs(5), || 0).await.unwrap();
        Writer::open(blob, lock).await.unwrap()
    }

    #[tokio::test]
    async fn what_was_cut_is_kept_and_gone_on_with() {
        let folder = tempfile::tempdir().unwrap();
        let blob = blob(folder.path());
        let mut writer = open(&blob).await;
        assert!(writer.put(Bytes::from_static(b"hel")).await);
        drop(writer);
        // The lock is free only once the thread has left the file alone.
        let mut writer = open(&blob).await;
        assert_eq!(writer.offset, 3);
        assert!(!blob.path().exists());
        assert!(writer.put(Bytes::from_static(b"lo\n")).await);
        writer.finish().await.unwrap();
        assert_eq!(std::fs::read(blob.path()).unwrap(), b"hello\n");
        assert!(blob.is_here() && !blob.incomplete().exists());
    }

    #[tokio::test]
    async fn a_wrong_content_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let blob = blob(folder.path());
        let mut writer = open(&blob).await;
        assert!(writer.put(Bytes::from_static(b"hallo\n")).await);
        assert!(matches!(writer.finish().await, Err(HubError::Checksum { .. })));
        assert!(!blob.path().exists() && !blob.incomplete().exists());
        let mut writer = open(&blob).await;
        assert!(writer.put(Bytes::from_static(b"hallo\n")).await && writer.restart().await);
        assert!(writer.put(Bytes::from_static(b"hello\n")).await);
        writer.finish().await.unwrap();
    }

    #[tokio::test]
    async fn what_is_longer_than_it_may_be_is_begun_anew() {
        let folder = tempfile::tempdir().unwrap();
        let blob = blob(folder.path());
        std::fs::write(blob.incomplete(), "much too long").unwrap();
        assert_eq!(open(&blob).await.offset, 0);
    }

    /// `/dev/full` with the two calls that a device refuses.
    struct Full(File);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Seek for Full {
        fn seek(&mut self, _: SeekFrom) -> std::io::Result<u64> {
            Ok(0)
        }
    }

    impl Truncate for Full {
        fn empty(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_says_so() {
        let mut full = Full(OpenOptions::new().write(true).open("/dev/full").unwrap());
        let etag = Etag::new(HELLO).unwrap();
        let (sender, mut receiver) = mpsc::channel(4);
        sender.try_send(Piece::Bytes(Bytes::from_static(b"x"))).unwrap_or_default();
        let error = take(&mut full, &mut receiver, &mut etag.hasher(1), || etag.hasher(1)).unwrap_err();
        assert!(matches!(disk(Path::new("/p"))(error), HubError::DiskFull { .. }));
    }
}
