//! Where a server's connections run: threads that each have an event loop of their own.
//!
//! A connection stays on the thread that it was given to, with all that is done for it there: no other thread is woken
//! for it, and nothing of it moves between cores. In return a thread's connections wait for one another, so that
//! nothing may run there which takes long.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// Blocking work that a lane has at once: names that are looked up.
const BLOCKING_MAX: usize = 8;

/// Threads for connections, or the runtime that is there anyway; cheap to clone. The threads end with the last clone,
/// and drop what still runs on them.
#[derive(Clone, Debug)]
pub struct Lanes(Arc<[Lane]>);

#[derive(Debug)]
struct Lane {
    runtime: Handle,
    /// Connections that run here.
    taken: Arc<AtomicUsize>,
    /// Dropping it ends the thread; `None` for a runtime that is not ours.
    _thread: Option<oneshot::Sender<()>>,
}

/// A connection's seat in a lane; dropping it frees it.
#[derive(Debug)]
pub(crate) struct Seat {
    /// The lane's number, from 0.
    pub(crate) lane: usize,
    taken: Arc<AtomicUsize>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Lanes {
    /// The runtime that this is called on, as a single lane.
    ///
    /// # Panics
    /// Outside a runtime.
    pub fn here() -> Self {
        Lanes([Lane { runtime: Handle::current(), taken: Arc::default(), _thread: None }].into())
    }

    /// Starts so many threads, and at least one, with names that begin with `name`.
    ///
    /// # Errors
    /// When the system has no thread, or no event queue, to give.
    pub fn start(name: &str, threads: usize) -> io::Result<Self> {
        let lane = |number| {
            let runtime = Builder::new_current_thread().enable_all().max_blocking_threads(BLOCKING_MAX).build()?;
            let handle = runtime.handle().clone();
            let (thread, ended) = oneshot::channel::<()>();
            std::thread::Builder::new().name(format!("{name}-{number}")).spawn(move || {
                // Never sent: it comes when the other end is dropped.
                let _ = runtime.block_on(ended);
                runtime.shutdown_background();
            })?;
            Ok(Lane { runtime: handle, taken: Arc::default(), _thread: Some(thread) })
        };
        Ok(Lanes((0..threads.max(1)).map(lane).collect::<io::Result<_>>()?))
    }

    /// Returns how many lanes there are; at least one.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Takes a seat where the fewest are taken. Only one task may take seats, or two may get the same.
    pub(crate) fn seat(&self) -> Seat {
        let all = self.0.iter().enumerate();
        let (lane, fewest) = all.min_by_key(|(_, lane)| lane.taken.load(Ordering::Relaxed)).expect("at least one lane");
        fewest.taken.fetch_add(1, Ordering::Relaxed);
        Seat { lane, taken: fewest.taken.clone() }
    }

    /// Runs a connection where its seat is.
    pub(crate) fn spawn(&self, seat: Seat, connection: impl Future<Output = ()> + Send + 'static) {
        let runtime = &self.0[seat.lane].runtime;
        runtime.spawn(async move {
            connection.await;
            drop(seat);
        });
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn connections_are_spread_evenly_and_stay_on_their_thread() {
        let lanes = Lanes::start("lane", 3).unwrap();
        let (sender, receiver) = mpsc::channel();
        let mut ends = Vec::new();
        for _ in 0..9 {
            let (end, ended) = oneshot::channel::<()>();
            ends.push(end);
            let sender = sender.clone();
            lanes.spawn(lanes.seat(), async move {
                let at = || std::thread::current().name().unwrap().to_string();
                let first = at();
                tokio::time::sleep(Duration::from_millis(1)).await;
                assert_eq!(at(), first);
                sender.send(first).unwrap();
                let _ = ended.await;
            });
        }
        let mut per_lane = BTreeMap::new();
        for _ in 0..9 {
            *per_lane.entry(receiver.recv_timeout(Duration::from_secs(5)).unwrap()).or_insert(0) += 1;
        }
        let names = ["lane-0", "lane-1", "lane-2"].map(|name| (name.to_string(), 3));
        assert_eq!(per_lane, BTreeMap::from(names));
        // Where connections have ended there is room.
        drop(ends.remove(4));
        while lanes.0[1].taken.load(Ordering::Relaxed) != 2 {
            tokio::task::yield_now().await;
        }
        assert_eq!(lanes.seat().lane, 1);
    }

    #[tokio::test]
    async fn what_runs_on_a_thread_ends_with_the_lanes() {
        let lanes = Lanes::start("lane", 1).unwrap();
        let (held, dropped) = oneshot::channel::<()>();
        lanes.spawn(lanes.seat(), async move {
            std::future::pending::<()>().await;
            drop(held);
        });
        drop(lanes);
        assert!(tokio::time::timeout(Duration::from_secs(5), dropped).await.unwrap().is_err());
    }
}
