//! The folder that outlives the process: how often it was started, and what it was ordered.

use std::io::{Error, ErrorKind, Result, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lifecycle::Record;
use rustix::fs::{FlockOperation, flock};

const STARTS: &str = "starts";
/// Written and removed by whoever asks whether the folder can be written.
const PROBE: &str = "probe";
const PROBE_BYTES: usize = 1024;
const RECORD: &str = "intent.json";
/// Locked by the process whose folder it is.
const LOCK: &str = "lock";
/// Longest wait for the disk. What takes longer is refused, though the disk may still take it.
const WRITE_MAX: Duration = Duration::from_secs(5);

/// The state directory; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    /// Held as long as the process has the folder; nobody who only looks at it has it.
    _lock: Option<Arc<std::fs::File>>,
}

impl StateDir {
    /// Looks at the folder of whichever process has it.
    pub(crate) fn new(path: &Path) -> Self {
        StateDir { path: path.into(), _lock: None }
    }

    /// Takes the folder, and makes it when it is not there.
    ///
    /// # Errors
    /// When it can't be written to; `ResourceBusy` when another process has it: it would read this one's breadcrumbs as
    /// those of a crash.
    pub(crate) fn take(path: &Path) -> Result<Self> {
        std::fs::create_dir_all(path)?;
        let lock = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(path.join(LOCK))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => Error::new(ErrorKind::ResourceBusy, "another worker that runs uses it"),
            error => error.into(),
        })?;
        Ok(StateDir { path: path.into(), _lock: Some(Arc::new(lock)) })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn read(&self, name: &str) -> Result<Option<String>> {
        match std::fs::read_to_string(self.path.join(name)) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Replaces a file whole: at every moment the old one or the new one is there.
    fn replace(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let fresh = self.path.join(format!("{name}.new"));
        let mut file = std::fs::File::create(&fresh)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&fresh, self.path.join(name))?;
        std::fs::File::open(&self.path)?.sync_all()
    }

    /// Counts this start.
    pub(crate) fn count_start(&self) -> Result<u64> {
        let path = self.path.join(STARTS);
        let damaged = |_| {
            let message = format!("{} holds no number; remove it to start counting anew", path.display());
            Error::new(ErrorKind::InvalidData, message)
        };
        let before = match self.read(STARTS)? {
            Some(text) => text.trim().parse::<u64>().map_err(damaged)?,
            None => 0,
        };
        self.replace(STARTS, format!("{}\n", before + 1).as_bytes())?;
        Ok(before + 1)
    }

    /// Reads what the life before left; the default where there was none.
    ///
    /// # Errors
    /// When it can't be read, or is damaged: nobody guesses whether a node was cordoned.
    pub(crate) fn read_record(&self) -> Result<Record> {
        let Some(text) = self.read(RECORD)? else { return Ok(Record::default()) };
        serde_json::from_str(&text).map_err(|error| {
            let path = self.path.join(RECORD);
            let message = format!("{} is damaged ({error}); remove it to start without any intent", path.display());
            Error::new(ErrorKind::InvalidData, message)
        })
    }

    /// Says why nothing can be written there, if so; asks the disk, off the runtime.
    pub(crate) async fn unwritable(&self, longest: Duration) -> Option<String> {
        let path = self.path.join(PROBE);
        let write = tokio::task::spawn_blocking(move || {
            // As much as a record: a full disk still has names to give.
            let written = std::fs::write(&path, [b' '; PROBE_BYTES]);
            std::fs::remove_file(&path).and(written)
        });
        match tokio::time::timeout(longest, write).await {
            Ok(Ok(written)) => written.err().map(|error| error.to_string()),
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("the disk took longer than {longest:?}")),
        }
    }

    /// Writes a record down, off the runtime; on disk once this returns.
    ///
    /// # Errors
    /// When the disk is full, read-only or too slow.
    pub(crate) async fn write_record(&self, record: &Record) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(record).map_err(Error::other)?;
        text.push(b'\n');
        let dir = self.clone();
        let write = tokio::task::spawn_blocking(move || dir.replace(RECORD, &text));
        match tokio::time::timeout(WRITE_MAX, write).await {
            Ok(written) => written.map_err(Error::other)?,
            Err(_) => Err(Error::new(ErrorKind::TimedOut, format!("the disk took longer than {WRITE_MAX:?}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use words::{Epoch, Intent};

    use super::*;

    #[test]
    fn starts_are_counted_across_lives_and_a_damaged_count_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let dir = StateDir::take(&folder.path().join("state")).unwrap();
        assert_eq!([dir.count_start().unwrap(), dir.count_start().unwrap()], [1, 2]);
        std::fs::write(dir.path().join(STARTS), "many").unwrap();
        assert_eq!(dir.count_start().unwrap_err().kind(), ErrorKind::InvalidData);
    }

    #[test]
    fn a_folder_has_one_process_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let dir = StateDir::take(folder.path()).unwrap();
        assert_eq!(StateDir::take(folder.path()).unwrap_err().kind(), ErrorKind::ResourceBusy);
        assert_eq!(StateDir::new(folder.path()).read_record().unwrap(), Record::default(), "to look is free");
        drop(dir.clone());
        assert!(StateDir::take(folder.path()).is_err(), "somebody still has it");
        drop(dir);
        assert!(StateDir::take(folder.path()).is_ok());
    }

    #[tokio::test]
    async fn a_record_is_there_for_the_next_life_and_a_damaged_one_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let dir = StateDir::new(folder.path());
        assert_eq!(dir.read_record().unwrap(), Record::default());
        let record = Record { epoch: Epoch(7), intent: Intent::Cordon, ..Record::default() };
        dir.write_record(&record).await.unwrap();
        assert_eq!(dir.read_record().unwrap(), record);
        std::fs::write(folder.path().join(RECORD), "{\"epoch\":").unwrap();
        let error = dir.read_record().unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidData && error.to_string().contains(RECORD), "{error}");
        let gone = StateDir::new(&folder.path().join("gone"));
        assert!(gone.write_record(&record).await.is_err());
        let longest = Duration::from_secs(5);
        assert!(dir.unwritable(longest).await.is_none() && gone.unwritable(longest).await.is_some());
    }
}
