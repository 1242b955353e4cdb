//! The node's stored KV: its folder is read beside the activation, and memory is written to it at the end.

use std::time::Duration;

use kv_store::KvStore;
use service::clock::Clock;
use tokio::sync::watch;
use words::Moment;

use crate::options::KvStoreOptions;

/// Longest time that an activation waits for the folder to be read. Whoever asks before that is over finds less.
const OPENING_MAX: Duration = Duration::from_secs(10);

/// The store and how far its opening is; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct StoredKv {
    store: KvStore,
    clock: Clock,
    /// Set once the folder was read or can't be used.
    opened: watch::Receiver<bool>,
}

impl StoredKv {
    /// Makes the store, and begins to read its folder where there is one; what can't be used of it is said once, and
    /// goes without.
    pub(crate) fn open(options: &KvStoreOptions, clock: Clock) -> StoredKv {
        let store = KvStore::new((options.ram_mib as u64) << 20);
        let (over, opened) = watch::channel(false);
        match options.disk() {
            Some(disk) => {
                let store = store.clone();
                tokio::task::spawn_blocking(move || {
                    let folder = disk.folder.clone();
                    if let Err(error) = store.open_disk(disk, clock.unix_seconds()) {
                        tracing::warn!(%error, ?folder, "KV is kept in memory alone: its folder can't be used");
                    }
                    tell(&store);
                    over.send_replace(true);
                });
            }
            None => _ = over.send_replace(true),
        }
        StoredKv { store, clock, opened }
    }

    pub(crate) fn store(&self) -> KvStore {
        self.store.clone()
    }

    /// Waits until the folder was read, and not for ever.
    pub(crate) async fn opened(&self) {
        if !self.opened_within(OPENING_MAX).await {
            tracing::warn!("the folder of stored KV is still being read; going on with what is in memory");
        }
    }

    async fn opened_within(&self, longest: Duration) -> bool {
        let mut opened = self.opened.clone();
        // An opening that ended otherwise is over as well.
        tokio::time::timeout(longest, opened.wait_for(|opened| *opened)).await.is_ok()
    }

    /// Writes what is kept in memory to disk, until `by`.
    pub(crate) async fn spill(&self, by: Moment) {
        let (store, clock) = (self.store.clone(), self.clock);
        if !store.in_memory() || !self.opened_within(clock.until(by)).await || !store.has_disk() {
            return;
        }
        let work = tokio::task::spawn_blocking(move || store.spill(clock.unix_seconds(), || clock.now() < by));
        match work.await {
            Ok(spilled) => {
                let (written, left) = (spilled.written, spilled.left);
                match spilled.error {
                    None => tracing::info!(written, left, "KV written for the next life"),
                    Some(error) => {
                        tracing::warn!(written, left, %error, "not all KV could be written for the next life")
                    }
                }
            }
            Err(error) => tracing::error!(%error, "KV could not be written"),
        }
    }
}

/// Says what an earlier life has left.
fn tell(store: &KvStore) {
    let counts = store.counts();
    if counts.damaged > 0 {
        tracing::warn!(files = counts.damaged, "stored KV was damaged or of another version, and is removed");
    }
    if counts.disk_blocks > 0 {
        tracing::info!(blocks = counts.disk_blocks, bytes = counts.disk_bytes, "KV of an earlier life is there");
    }
}
