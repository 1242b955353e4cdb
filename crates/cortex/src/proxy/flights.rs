//! The requests that this gateway answers just now, so that they can be listed, and cancelled by their names.
//!
//! On a request's way it costs one insert and one remove under a lock that few others take, and a relaxed write an
//! attempt and an event. Whoever looks for one walks through all of them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::Poll;

use fleet::Slot;
use futures_util::task::AtomicWaker;
use words::{ModelId, Moment};

use super::Order;

/// Parts of the table, each under its own lock.
const SHARDS: usize = 32;
/// No attempt is open.
const NOWHERE: usize = usize::MAX;

/// One request.
#[derive(Debug)]
pub(crate) struct Flight {
    /// `x-request-id`, which clients may use twice.
    pub(crate) request_id: String,
    pub(crate) completion_id: String,
    /// As the client named it.
    asked: ModelId,
    /// The model's own id, where that was an alias.
    resolved: OnceLock<ModelId>,
    pub(crate) arrived: Moment,
    attempt: AtomicU32,
    slot: AtomicUsize,
    tokens: AtomicU64,
    cancelled: AtomicBool,
    waker: AtomicWaker,
}

impl Flight {
    /// Notes what an alias means; the first word counts.
    pub(super) fn resolved(&self, model: &ModelId) {
        let _ = self.resolved.set(model.clone());
    }

    /// Returns the model's own id as far as it is known.
    pub(crate) fn model(&self) -> &ModelId {
        self.resolved.get().unwrap_or(&self.asked)
    }

    /// Notes that an attempt was opened.
    pub(super) fn sent(&self, attempt: u32, slot: Slot) {
        self.attempt.store(attempt, Ordering::Relaxed);
        self.slot.store(slot.0, Ordering::Relaxed);
    }

    /// Notes that no attempt is open any more.
    pub(super) fn landed(&self) {
        self.slot.store(NOWHERE, Ordering::Relaxed);
    }

    /// Counts tokens that the client was told.
    pub(super) fn tokens(&self, count: u64) {
        self.tokens.fetch_add(count, Ordering::Relaxed);
    }

    /// Returns the present attempt's number, the worker it is at, and the tokens so far.
    pub(crate) fn progress(&self) -> (u32, Option<Slot>, u64) {
        let slot = self.slot.load(Ordering::Relaxed);
        let slot = (slot != NOWHERE).then_some(Slot(slot));
        (self.attempt.load(Ordering::Relaxed), slot, self.tokens.load(Ordering::Relaxed))
    }

    /// Has the request end: no further attempt begins, and the present one has little time left.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Whether somebody has cancelled it.
    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Waits until somebody cancels it. One task alone may wait. Safe to cancel.
    pub(super) async fn cancelled(&self) {
        std::future::poll_fn(|context| {
            if self.is_cancelled() {
                return Poll::Ready(());
            }
            self.waker.register(context.waker());
            if self.is_cancelled() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await
    }

    /// Whether it is known by this `x-request-id` or completion's id.
    pub(crate) fn is_named(&self, id: &str) -> bool {
        self.request_id == id || self.completion_id == id
    }
}

/// The table; cheap to clone. What bounds the requests bounds it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Flights {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: AtomicU64,
    /// Each held for one insert, one remove, or one walk.
    shards: [Mutex<BTreeMap<u64, Arc<Flight>>>; SHARDS],
}

impl Inner {
    fn shard(&self, number: u64) -> std::sync::MutexGuard<'_, BTreeMap<u64, Arc<Flight>>> {
        self.shards[number as usize % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request's place in the table; dropping it takes the request out.
#[derive(Debug)]
pub(crate) struct Place {
    pub(super) flight: Arc<Flight>,
    number: u64,
    table: Arc<Inner>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.table.shard(self.number).remove(&self.number);
    }
}

impl Flights {
    /// Enters a request.
    pub(super) fn enter(&self, order: &Order, arrived: Moment) -> Place {
        let number = self.inner.next.fetch_add(1, Ordering::Relaxed);
        let flight = Arc::new(Flight {
            request_id: order.request_id.clone(),
            completion_id: order.completion_id.clone(),
            asked: order.model.clone(),
            resolved: OnceLock::new(),
            arrived,
            attempt: AtomicU32::new(0),
            slot: AtomicUsize::new(NOWHERE),
            tokens: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
            waker: AtomicWaker::new(),
        });
        self.inner.shard(number).insert(number, flight.clone());
        Place { flight, number, table: self.inner.clone() }
    }

    /// Returns the requests for which `which` holds, the oldest first.
    pub(crate) fn find(&self, which: impl Fn(&Flight) -> bool) -> Vec<Arc<Flight>> {
        let mut found: Vec<(u64, Arc<Flight>)> = Vec::new();
        for number in 0..SHARDS as u64 {
            let shard = self.inner.shard(number);
            found.extend(
                shard.iter().filter(|(_, flight)| which(flight)).map(|(number, flight)| (*number, flight.clone())),
            );
        }
        found.sort_unstable_by_key(|(number, _)| *number);
        found.into_iter().map(|(_, flight)| flight).collect()
    }

    /// Has the requests of a model end; returns them.
    pub(crate) fn cancel_model(&self, model: &ModelId) -> Vec<Arc<Flight>> {
        let ended = self.find(|flight| flight.model() == model && !flight.is_cancelled());
        ended.iter().for_each(|flight| flight.cancel());
        ended
    }

    /// Has the requests of that name end; returns them.
    pub(crate) fn cancel(&self, id: &str) -> Vec<Arc<Flight>> {
        let ended = self.find(|flight| flight.is_named(id) && !flight.is_cancelled());
        ended.iter().for_each(|flight| flight.cancel());
        ended
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use bytes::Bytes;
    use wire::Endpoint;

    use super::*;

    fn order(model: &str, id: &str) -> Order {
        Order {
            endpoint: Endpoint::Chat,
            model: ModelId::new(model).unwrap(),
            stream: true,
            body: Bytes::new(),
            request_id: id.into(),
            completion_id: format!("chatcmpl-{id}"),
            created: 0,
            seed: 0,
            trace: ["traceparent", "tracestate"].map(|name| (http::HeaderName::from_static(name), None)),
            choices: 1,
            include_usage: false,
        }
    }

    #[tokio::test]
    async fn a_request_is_found_by_its_names_until_it_ends_and_hears_of_its_cancellation_once() {
        let flights = Flights::default();
        let enter = |model: &str, id: &str| flights.enter(&order(model, id), Moment::ZERO);
        let [a, b, c] = [("m", "a"), ("m", "b"), ("other", "c")].map(|(model, id)| enter(model, id));
        assert_eq!((flights.cancel("chatcmpl-a").len(), flights.cancel("a").len()), (1, 0));
        a.flight.cancelled().await;
        let waits = tokio::spawn({
            let flight = b.flight.clone();
            async move { flight.cancelled().await }
        });
        tokio::task::yield_now().await;
        assert_eq!(flights.cancel_model(&ModelId::new("m").unwrap()).len(), 1);
        waits.await.unwrap();
        assert!(!c.flight.is_cancelled());
        c.flight.sent(2, Slot(1));
        c.flight.tokens(3);
        assert_eq!(c.flight.progress(), (2, Some(Slot(1)), 3));
        c.flight.landed();
        drop((a, b));
        let left = flights.find(|_| true);
        assert_eq!(left.iter().map(|flight| flight.request_id.as_str()).collect::<Vec<_>>(), ["c"]);
        assert_eq!(left[0].progress(), (2, None, 3));
    }
}
