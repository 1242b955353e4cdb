//! The queue to an external engine: who is let through, who waits, and how all of them are told that it is over.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use inference::{Load, RequestKey};
use lifecycle::{Turn, Turnstile, TurnstileLimits};
use service::clock::Clock;
use tokio::sync::watch;
use words::{Code, Error, Moment};

use crate::engine_thread::millis;

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Waits,
    Runs,
    Over(Code, &'static str),
}

#[derive(Debug)]
struct State {
    turnstile: Turnstile,
    places: BTreeMap<u64, watch::Sender<Place>>,
}

#[derive(Debug)]
struct Inner {
    clock: Clock,
    /// Longest wait for a turn.
    max_wait: Duration,
    /// Held for one arrival or one end.
    state: Mutex<State>,
    load: watch::Sender<Load>,
    turns: Arc<AtomicU64>,
    /// When the engine was last found healthy: milliseconds of the program's clock.
    healthy_at: Arc<AtomicU64>,
    stop: watch::Sender<bool>,
}

/// The queue; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Queue {
    inner: Arc<Inner>,
}

/// A request's place; dropping it makes room.
#[derive(Debug)]
pub(crate) struct Seat {
    key: u64,
    until: Moment,
    queue: Queue,
    place: watch::Receiver<Place>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.queue.change(|state| {
            state.places.remove(&self.key);
            if let Some(next) = state.turnstile.leave(self.key) {
                tell(state, next, Place::Runs);
            }
        });
    }
}

fn tell(state: &State, key: u64, place: Place) {
    if let Some(sender) = state.places.get(&key) {
        // What is over stays so.
        sender.send_if_modified(|known| {
            let news = !matches!(known, Place::Over(..));
            if news {
                *known = place;
            }
            news
        });
    }
}

impl Queue {
    pub(crate) fn new(clock: Clock, limits: TurnstileLimits, max_wait: Duration) -> Self {
        let state = Mutex::new(State { turnstile: Turnstile::new(limits), places: BTreeMap::new() });
        let (load, stop) = (watch::Sender::default(), watch::Sender::new(false));
        let healthy_at = Arc::new(AtomicU64::new(millis(clock.now())));
        Queue { inner: Arc::new(Inner { clock, max_wait, state, load, turns: Arc::default(), healthy_at, stop }) }
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.inner.state.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut state);
        let load = Load { running: state.turnstile.running(), waiting: state.turnstile.waiting(), ..Load::default() };
        // Under the lock, so that no older load comes after a newer one.
        self.inner.load.send_if_modified(|known| std::mem::replace(known, load) != load);
        result
    }

    /// Takes a request in.
    ///
    /// # Errors
    /// `Overloaded` when there is no room to wait in, `Draining` once the queue is closed.
    pub(crate) fn enter(&self, key: RequestKey) -> Result<Seat, Error> {
        let now = self.inner.clock.now();
        self.change(|state| {
            let place = match state.turnstile.enter(key.0) {
                Turn::Runs => Place::Runs,
                Turn::Waits => Place::Waits,
                Turn::Refused if state.turnstile.closed() => {
                    return Err(Error::new(Code::Draining, "the model goes, or its engine is gone"));
                }
                Turn::Refused => {
                    return Err(Error::new(Code::Overloaded, "the model's queue is full; try again shortly"));
                }
            };
            let (sender, place) = watch::channel(place);
            state.places.insert(key.0, sender);
            Ok(Seat { key: key.0, until: now + self.inner.max_wait, queue: self.clone(), place })
        })
    }

    /// Ends one request.
    pub(crate) fn cancel(&self, key: RequestKey) {
        self.change(|state| tell(state, key.0, Place::Over(Code::ClientClosed, "nobody reads the answer any more")));
    }

    /// Ends one request with what it has.
    pub(crate) fn end(&self, key: RequestKey) {
        self.change(|state| tell(state, key.0, Place::Over(Code::Cancelled, "the request was cancelled")));
    }

    /// Hands those back who wait.
    pub(crate) fn hand_back(&self) {
        self.change(|state| {
            for key in state.turnstile.hand_back() {
                tell(
                    state,
                    key,
                    Place::Over(
                        Code::Draining,
                        "the request was still queued, and its model goes or its engine is gone",
                    ),
                );
            }
        });
    }

    /// Ends all requests.
    pub(crate) fn fail_all(&self, code: Code, message: &'static str) {
        self.change(|state| {
            state.turnstile.hand_back();
            state.places.keys().for_each(|key| tell(state, *key, Place::Over(code, message)));
        });
    }

    /// Closes the queue for good and ends the engine.
    pub(crate) fn stop(&self) {
        self.change(|state| state.turnstile.close());
        self.fail_all(Code::ModelNotHere, "the model was unloaded");
        self.inner.stop.send_replace(true);
    }

    /// Closes the queue for good because the engine is gone: hands those back who wait, and ends those who run.
    pub(super) fn lost(&self) {
        self.change(|state| state.turnstile.close());
        self.hand_back();
        self.fail_all(Code::EngineFailed, "the model's engine ended under the request");
    }

    /// Returns a reader of the load.
    pub(crate) fn watch(&self) -> watch::Receiver<Load> {
        self.inner.load.subscribe()
    }

    /// The engine was found healthy.
    pub(super) fn healthy(&self) {
        self.inner.turns.fetch_add(1, Ordering::Relaxed);
        self.inner.healthy_at.store(millis(self.inner.clock.now()), Ordering::Relaxed);
    }

    /// Returns what rises whenever the engine is found healthy.
    pub(crate) fn turns(&self) -> Arc<AtomicU64> {
        self.inner.turns.clone()
    }

    /// Returns when the engine was last found healthy.
    pub(crate) fn stepped(&self) -> Arc<AtomicU64> {
        self.inner.healthy_at.clone()
    }

    /// Returns what turns true when the engine has to stop.
    pub(super) fn stopping(&self) -> watch::Receiver<bool> {
        self.inner.stop.subscribe()
    }
}

impl Seat {
    /// Returns whether it has to wait.
    pub(crate) fn waits(&self) -> bool {
        *self.place.borrow() == Place::Waits
    }

    /// Waits until it may ask.
    ///
    /// # Errors
    /// `Overloaded` when that takes too long; what it was told when it is over.
    pub(crate) async fn turn(&mut self) -> Result<(), Error> {
        let until = self.queue.inner.clock.instant(self.until);
        let came = self.place.wait_for(|place| *place != Place::Waits);
        match tokio::time::timeout_at(until, came).await {
            Ok(Ok(place)) => match *place {
                Place::Over(code, message) => Err(Error::new(code, message)),
                Place::Waits | Place::Runs => Ok(()),
            },
            Ok(Err(_)) => Err(Error::internal("a place in a queue was lost")),
            Err(_) => Err(Error::new(Code::Overloaded, "the request waited too long in the model's queue")),
        }
    }

    /// Waits for the word that it is over. Safe to cancel.
    pub(crate) async fn over(&mut self) -> Error {
        match self.place.wait_for(|place| matches!(place, Place::Over(..))).await.map(|place| *place) {
            Ok(Place::Over(code, message)) => Error::new(code, message),
            // A place is over or its sender is there.
            Ok(_) | Err(_) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn queue(max_wait: Duration) -> Queue {
        Queue::new(Clock::start(), TurnstileLimits { max_running: 1, max_waiting: 2 }, max_wait)
    }

    #[tokio::test]
    async fn a_place_comes_free_when_its_owner_goes_and_everybody_hears_of_the_end() {
        let queue = queue(Duration::from_secs(60));
        let mut first = queue.enter(RequestKey(1)).unwrap();
        first.turn().await.unwrap();
        let [mut second, mut third] = [2, 3].map(|key| queue.enter(RequestKey(key)).unwrap());
        assert_eq!(queue.enter(RequestKey(4)).unwrap_err().code(), Code::Overloaded);
        assert!(second.waits());
        drop(first);
        second.turn().await.unwrap();
        assert_eq!((queue.watch().borrow().running, queue.watch().borrow().waiting), (1, 1));
        queue.hand_back();
        assert_eq!(third.turn().await.unwrap_err().code(), Code::Draining);
        queue.lost();
        assert_eq!(second.over().await.code(), Code::EngineFailed);
        assert_eq!(queue.enter(RequestKey(5)).unwrap_err().code(), Code::Draining);
        drop((second, third));
        assert_eq!(*queue.watch().borrow(), Load::default());
    }

    #[tokio::test]
    async fn nobody_waits_longer_than_allowed() {
        let queue = queue(Duration::from_millis(5));
        let _first = queue.enter(RequestKey(1)).unwrap();
        let mut second = queue.enter(RequestKey(2)).unwrap();
        assert_eq!(second.turn().await.unwrap_err().code(), Code::Overloaded);
        drop(second);
        assert_eq!(queue.watch().borrow().waiting, 0);
    }
}
