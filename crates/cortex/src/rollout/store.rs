//! Where the progress of rollouts is kept: one rollout and one lease, each changed by compare-and-swap.
//!
//! The lease says who coordinates (liveness); the swaps make sure that only one can (safety). No clock is stored: who
//! wants the lease watches its beat, and takes it once that has stood still for a while by his own clock. So a clock
//! that jumps changes nothing, here or there.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

pub(crate) use fleet::rollout::Lease;
use fleet::rollout::Rollout;
use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use words::{Code, Error, GatewayId};

/// Longest wait for another access, of this gateway or another one.
const BUSY_MAX: Duration = Duration::from_secs(2);
/// Pause between two tries to be the only access of this gateway.
const LOCK_PAUSE: Duration = Duration::from_millis(2);
/// Longest time for one access; a disk that hangs must not hang a gateway.
const ACCESS_MAX: Duration = Duration::from_secs(5);
/// The layout of the tables, as SQLite's `user_version`.
const LAYOUT: i64 = 1;

/// Why the store did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// Somebody else wrote in between, or has the lease now: look again.
    #[error("somebody else changed the rollout at the same time")]
    Conflict,
    /// It can't be read or written.
    #[error("the rollout store {} can't be used: {detail}", path.display())]
    Unusable {
        /// Which file.
        path: PathBuf,
        /// The database's words.
        detail: String,
    },
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        let code = if matches!(error, StoreError::Conflict) { Code::Conflict } else { Code::Internal };
        Error::new(code, error.to_string())
    }
}

/// All that is stored.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stored {
    /// The last rollout, over or not.
    pub(crate) rollout: Option<Rollout>,
    /// Rises with each swap.
    pub(crate) revision: u64,
    /// Who coordinates.
    pub(crate) lease: Lease,
}

/// A place for one rollout. Every call blocks, and is bounded by [`Shelf`].
pub(crate) trait RolloutStore: Send + Sync + 'static {
    /// Reads everything, as of one moment.
    fn load(&self) -> Result<Stored, StoreError>;

    /// Puts `rollout` in place of the revision `expected`; returns the new revision. With `fence` the lease must
    /// still have that revision, checked in the same moment.
    fn swap(&self, expected: u64, fence: Option<u64>, rollout: &Rollout) -> Result<u64, StoreError>;

    /// Puts `next` in place of `expected`.
    fn swap_lease(&self, expected: &Lease, next: &Lease) -> Result<(), StoreError>;
}

/// A store in a SQLite file, shared by the gateways of one host.
pub(crate) struct SqliteStore {
    path: PathBuf,
    /// Opened at the first use, and anew after a failure.
    connection: Mutex<Option<Connection>>,
}

impl SqliteStore {
    /// Names the file; nothing is opened yet.
    pub(crate) fn new(path: &Path) -> Self {
        SqliteStore { path: path.into(), connection: Mutex::new(None) }
    }

    fn unusable(&self, detail: impl Into<String>) -> StoreError {
        StoreError::Unusable { path: self.path.clone(), detail: detail.into() }
    }

    /// Waits for this gateway's own other accesses. One that hangs is not joined by ever more.
    fn wait(&self) -> Result<MutexGuard<'_, Option<Connection>>, StoreError> {
        let begun = Instant::now();
        loop {
            match self.connection.try_lock() {
                Ok(slot) => return Ok(slot),
                Err(TryLockError::Poisoned(slot)) => return Ok(slot.into_inner()),
                Err(TryLockError::WouldBlock) if begun.elapsed() >= BUSY_MAX => {
                    return Err(self.unusable("an earlier access has not ended"));
                }
                Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_PAUSE),
            }
        }
    }

    /// Runs `work`; a connection that failed is not used again.
    fn with<T>(&self, work: impl FnOnce(&mut Connection) -> Result<T, Fault>) -> Result<T, StoreError> {
        let mut slot = self.wait()?;
        let run = || -> Result<T, Fault> {
            if slot.is_none() {
                *slot = Some(open(&self.path)?);
            }
            slot.as_mut().map_or(Err(Fault::Layout), work)
        };
        run().map_err(|fault| {
            if !matches!(fault, Fault::Conflict) {
                *slot = None;
            }
            match fault {
                Fault::Conflict => StoreError::Conflict,
                Fault::Database(error) => self.unusable(error.to_string()),
                Fault::Content(error) => self.unusable(format!("what is stored is no rollout: {error}")),
                Fault::Layout => self.unusable("another version of this program made it"),
            }
        })
    }
}

/// What can go wrong below.
#[derive(Debug)]
enum Fault {
    Conflict,
    Database(rusqlite::Error),
    Content(String),
    Layout,
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        Fault::Database(error)
    }
}

fn open(path: &Path) -> Result<Connection, Fault> {
    let mut connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_MAX)?;
    // Readers and the writer don't wait for each other; a commit is on the disk before an order is sent.
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    let change = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    match change.pragma_query_value(None, "user_version", |row| row.get(0))? {
        LAYOUT => {}
        0 => change.execute_batch(
            "CREATE TABLE rollout (id INTEGER PRIMARY KEY CHECK (id = 1), revision INTEGER NOT NULL, body TEXT);
             CREATE TABLE lease (id INTEGER PRIMARY KEY CHECK (id = 1), holder TEXT, beat INTEGER NOT NULL,
                                 revision INTEGER NOT NULL);
             INSERT INTO rollout VALUES (1, 0, NULL);
             INSERT INTO lease VALUES (1, NULL, 0, 0);
             PRAGMA user_version = 1;",
        )?,
        _ => return Err(Fault::Layout),
    }
    change.commit()?;
    Ok(connection)
}

fn read_lease(connection: &Connection) -> Result<Lease, Fault> {
    let read = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?, row.get(2)?));
    let row: Option<(Option<String>, i64, i64)> =
        connection.query_row("SELECT holder, beat, revision FROM lease", [], read).optional()?;
    let (holder, beat, revision) = row.ok_or(Fault::Layout)?;
    let holder = holder.map(GatewayId::new).transpose().map_err(|error| Fault::Content(error.to_string()))?;
    Ok(Lease { holder, beat: beat as u64, revision: revision as u64 })
}

impl RolloutStore for SqliteStore {
    fn load(&self) -> Result<Stored, StoreError> {
        self.with(|connection| {
            let moment = connection.transaction()?;
            let read = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?));
            let row: Option<(i64, Option<String>)> =
                moment.query_row("SELECT revision, body FROM rollout", [], read).optional()?;
            let (revision, body) = row.ok_or(Fault::Layout)?;
            let parse = |body: String| serde_json::from_str(&body).map_err(|error| Fault::Content(error.to_string()));
            let rollout = body.map(parse).transpose()?;
            Ok(Stored { rollout, revision: revision as u64, lease: read_lease(&moment)? })
        })
    }

    fn swap(&self, expected: u64, fence: Option<u64>, rollout: &Rollout) -> Result<u64, StoreError> {
        self.with(|connection| {
            let body = serde_json::to_string(rollout).map_err(|error| Fault::Content(error.to_string()))?;
            let change = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let lease = read_lease(&change)?;
            if fence.is_some_and(|fence| fence != lease.revision) {
                return Err(Fault::Conflict);
            }
            let changed = change.execute(
                "UPDATE rollout SET revision = revision + 1, body = ?1 WHERE revision = ?2",
                params![body, expected as i64],
            )?;
            if changed != 1 {
                return Err(Fault::Conflict);
            }
            change.commit()?;
            Ok(expected + 1)
        })
    }

    fn swap_lease(&self, expected: &Lease, next: &Lease) -> Result<(), StoreError> {
        self.with(|connection| {
            let holder = next.holder.as_ref().map(GatewayId::as_str);
            let changed = connection.execute(
                "UPDATE lease SET holder = ?1, beat = ?2, revision = ?3 WHERE beat = ?4 AND revision = ?5",
                params![holder, next.beat as i64, next.revision as i64, expected.beat as i64, expected.revision as i64],
            )?;
            if changed == 1 { Ok(()) } else { Err(Fault::Conflict) }
        })
    }
}

/// The store as tasks use it: every access off the runtime, each within its bound.
#[derive(Clone)]
pub(crate) struct Shelf {
    store: Arc<dyn RolloutStore>,
    path: PathBuf,
}

impl Shelf {
    /// Takes a store, and its file's name for errors.
    pub(crate) fn new(store: Arc<dyn RolloutStore>, path: &Path) -> Self {
        Shelf { store, path: path.into() }
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn RolloutStore) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = self.store.clone();
        let late = |detail: &str| StoreError::Unusable { path: self.path.clone(), detail: detail.into() };
        let access = tokio::task::spawn_blocking(move || work(store.as_ref()));
        match tokio::time::timeout(ACCESS_MAX, access).await {
            Ok(Ok(done)) => done,
            Ok(Err(_)) => Err(late("the access ended early")),
            Err(_) => Err(late("the access did not end in time")),
        }
    }

    /// See [`RolloutStore::load`].
    pub(crate) async fn load(&self) -> Result<Stored, StoreError> {
        self.run(|store| store.load()).await
    }

    /// See [`RolloutStore::swap`].
    pub(crate) async fn swap(&self, expected: u64, fence: Option<u64>, rollout: &Rollout) -> Result<u64, StoreError> {
        let rollout = rollout.clone();
        self.run(move |store| store.swap(expected, fence, &rollout)).await
    }

    /// See [`RolloutStore::swap_lease`].
    pub(crate) async fn swap_lease(&self, expected: &Lease, next: &Lease) -> Result<(), StoreError> {
        let (expected, next) = (expected.clone(), next.clone());
        self.run(move |store| store.swap_lease(&expected, &next)).await
    }
}

#[cfg(test)]
#[path = "store_tests.rs"]
pub(crate) mod tests;
