//! Of two writers one wins; what can't be used says so.
#![allow(clippy::unwrap_used)]
use fleet::rollout::Policy;
use words::{NodeId, RolloutId};

use super::*;

/// A store that is forgotten with its test.
#[derive(Default)]
pub(crate) struct MemoryStore {
    stored: Mutex<Stored>,
}

impl RolloutStore for MemoryStore {
    fn load(&self) -> Result<Stored, StoreError> {
        Ok(self.stored.lock().unwrap().clone())
    }

    fn swap(&self, expected: u64, fence: Option<u64>, rollout: &Rollout) -> Result<u64, StoreError> {
        let mut stored = self.stored.lock().unwrap();
        if stored.revision != expected || fence.is_some_and(|fence| fence != stored.lease.revision) {
            return Err(StoreError::Conflict);
        }
        (stored.rollout, stored.revision) = (Some(rollout.clone()), expected + 1);
        Ok(stored.revision)
    }

    fn swap_lease(&self, expected: &Lease, next: &Lease) -> Result<(), StoreError> {
        let mut stored = self.stored.lock().unwrap();
        if (stored.lease.beat, stored.lease.revision) != (expected.beat, expected.revision) {
            return Err(StoreError::Conflict);
        }
        stored.lease = next.clone();
        Ok(())
    }
}

fn rollout(name: &str) -> Rollout {
    Rollout::new(RolloutId::new(name).unwrap(), Policy::new(vec![NodeId::new("a").unwrap()]))
}

fn held(by: &str, beat: u64, revision: u64) -> Lease {
    Lease { holder: Some(GatewayId::new(by).unwrap()), beat, revision }
}

/// Both stores keep the same rules.
fn check_rules(first: &dyn RolloutStore, second: &dyn RolloutStore) {
    let empty = first.load().unwrap();
    assert!(empty.rollout.is_none());
    assert_eq!((empty.revision, &empty.lease), (0, &Lease::default()));
    // Of two that saw the same, one wins.
    assert_eq!(first.swap(0, None, &rollout("r-1")).unwrap(), 1);
    assert!(matches!(second.swap(0, None, &rollout("r-2")), Err(StoreError::Conflict)));
    let stored = second.load().unwrap();
    assert_eq!((stored.rollout, stored.revision), (Some(rollout("r-1")), 1));
    // The lease likewise, also against one who still believes to have it.
    first.swap_lease(&empty.lease, &held("g1", 1, 1)).unwrap();
    assert!(matches!(second.swap_lease(&empty.lease, &held("g2", 1, 1)), Err(StoreError::Conflict)));
    second.swap_lease(&held("g1", 1, 1), &held("g2", 2, 2)).unwrap();
    assert!(matches!(first.swap_lease(&held("g1", 1, 1), &held("g1", 2, 1)), Err(StoreError::Conflict)));
    assert!(matches!(first.swap(1, Some(1), &rollout("r-3")), Err(StoreError::Conflict)), "the fence");
    assert_eq!(second.swap(1, Some(2), &rollout("r-3")).unwrap(), 2);
    assert_eq!(first.load().unwrap().lease, held("g2", 2, 2));
}

#[test]
fn of_two_writers_one_wins_in_either_store() {
    let memory = MemoryStore::default();
    check_rules(&memory, &memory);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rollout.sqlite");
    check_rules(&SqliteStore::new(&path), &SqliteStore::new(&path));
}

#[test]
fn what_is_stored_outlives_its_writer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rollout.sqlite");
    SqliteStore::new(&path).swap(0, None, &rollout("r-1")).unwrap();
    assert_eq!(SqliteStore::new(&path).load().unwrap().rollout, Some(rollout("r-1")));
}

#[test]
fn threads_that_swap_at_once_never_both_win() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rollout.sqlite");
    SqliteStore::new(&path).load().unwrap();
    let stores: Vec<_> = (0..4).map(|_| SqliteStore::new(&path)).collect();
    for expected in 0..20 {
        let wins: usize = std::thread::scope(|scope| {
            let swap = |store| scope.spawn(move || SqliteStore::swap(store, expected, None, &rollout("r")).is_ok());
            stores
                .iter()
                .map(swap)
                .collect::<Vec<_>>()
                .into_iter()
                .map(|thread| usize::from(thread.join().unwrap()))
                .sum()
        });
        assert_eq!(wins, 1);
    }
}

#[test]
fn accesses_of_one_gateway_wait_for_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::new(&folder.path().join("rollout.sqlite"));
    store.swap(0, None, &rollout("r-1")).unwrap();
    let read = || (0..50).all(|_| store.load().is_ok());
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..8).map(|_| scope.spawn(read)).collect();
        for revision in 1..20 {
            store.swap(revision, None, &rollout("r-1")).unwrap();
        }
        assert!(readers.into_iter().all(|reader| reader.join().unwrap()));
    });
}

fn unusable<T: std::fmt::Debug>(result: Result<T, StoreError>) -> String {
    match result {
        Err(error @ StoreError::Unusable { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_damaged_file_is_named_and_a_mended_one_is_used_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rollout.sqlite");
    std::fs::write(&path, "this is no database, and never was one; ".repeat(100)).unwrap();
    let store = SqliteStore::new(&path);
    let words = unusable(store.load());
    assert!(words.contains("rollout.sqlite") && words.contains("not a database"), "{words}");
    assert!(unusable(store.swap(0, None, &rollout("r-1"))).contains("not a database"));
    std::fs::remove_file(&path).unwrap();
    assert_eq!(store.swap(0, None, &rollout("r-1")).unwrap(), 1);
    // A row that is no rollout.
    Connection::open(&path).unwrap().execute("UPDATE rollout SET body = '{}'", []).unwrap();
    assert!(unusable(store.load()).contains("no rollout"));
    Connection::open(&path).unwrap().pragma_update(None, "user_version", 9).unwrap();
    assert!(unusable(store.load()).contains("another version"));
}

#[test]
fn a_full_disk_refuses_the_write_and_keeps_what_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rollout.sqlite");
    let store = SqliteStore::new(&path);
    store.swap(0, None, &rollout("r-1")).unwrap();
    // The database may not grow; a rollout of many nodes needs more pages.
    store.with(|connection| Ok(connection.pragma_update(None, "max_page_count", 1)?)).unwrap();
    let mut large = rollout("r-1");
    let names = (0..1000).map(|i| NodeId::new(format!("node-{i}-{}", "x".repeat(50))).unwrap());
    large.policy.targets = names.collect();
    assert!(unusable(store.swap(1, None, &large)).contains("full"));
    assert_eq!(store.load().unwrap().rollout, Some(rollout("r-1")));
}

#[test]
fn a_store_that_can_only_be_read_refuses_the_write() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rollout.sqlite");
    let store = SqliteStore::new(&path);
    store.swap(0, None, &rollout("r-1")).unwrap();
    store.with(|connection| Ok(connection.pragma_update(None, "query_only", true)?)).unwrap();
    assert!(unusable(store.swap(1, None, &rollout("r-2"))).contains("readonly"));
    assert_eq!(store.load().unwrap().rollout, Some(rollout("r-1")));
    // A place where nothing can be made.
    assert!(unusable(SqliteStore::new(Path::new("/proc/none/rollout.sqlite")).load()).contains("unable to open"));
}

#[tokio::test]
async fn a_store_that_hangs_holds_nobody_for_long() {
    struct Hangs;
    impl RolloutStore for Hangs {
        fn load(&self) -> Result<Stored, StoreError> {
            std::thread::sleep(ACCESS_MAX + Duration::from_secs(1));
            Ok(Stored::default())
        }
        fn swap(&self, _: u64, _: Option<u64>, _: &Rollout) -> Result<u64, StoreError> {
            Err(StoreError::Conflict)
        }
        fn swap_lease(&self, _: &Lease, _: &Lease) -> Result<(), StoreError> {
            Err(StoreError::Conflict)
        }
    }
    let begun = std::time::Instant::now();
    assert!(unusable(Shelf::new(Arc::new(Hangs), Path::new("x")).load().await).contains("in time"));
    assert!(begun.elapsed() < ACCESS_MAX + Duration::from_millis(900));
}
