//! A model's door: who is in, who waits before it, and whether it lets anybody in.
//!
//! Whoever has to do with a model holds a place at its door, from the first look to the last byte. So "nobody is in" and
//! "nobody gets in" are one step, and no eviction finds a request between two of its own.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use lifecycle::DoorFacts;
use service::clock::Clock;
use tokio::sync::{Notify, watch};
use words::Moment;

use crate::ready::ReadyModel;

#[derive(Default)]
struct Places {
    /// Set while it lets requests in.
    ready: Option<Arc<ReadyModel>>,
    /// It lets nobody in for now, so that those inside come to an end.
    shut: bool,
    inside: usize,
    waiting: usize,
    /// When the last one left, or when it opened.
    idle_since: Moment,
    opened_at: Moment,
}

/// The door; cheap to clone. It outlives its model's loads.
#[derive(Clone)]
pub(crate) struct Door {
    /// Readers are woken when it opens, shuts or closes, and never by those who pass.
    places: Arc<watch::Sender<Places>>,
    /// Told whenever somebody leaves last.
    emptied: Arc<Notify>,
    clock: Clock,
}

impl Door {
    /// Makes a closed one.
    pub(crate) fn new(clock: Clock, emptied: Arc<Notify>) -> Self {
        Door { places: Arc::default(), emptied, clock }
    }

    fn with<T>(&self, change: impl FnOnce(&mut Places) -> (T, bool)) -> Option<T> {
        let mut result = None;
        self.places.send_if_modified(|places| {
            let (value, told) = change(places);
            result = Some(value);
            told
        });
        result
    }

    /// Goes in, or takes a place before it; `None` where `most` have one already and it is closed.
    pub(crate) fn enter(&self, most: usize) -> Option<Result<InUse, Waiting>> {
        let entered = self.with(|places| match places.ready.clone().filter(|_| !places.shut) {
            Some(ready) => {
                places.inside += 1;
                (Some(Ok(ready)), false)
            }
            None if places.waiting >= most => (None, false),
            None => {
                places.waiting += 1;
                (Some(Err(())), false)
            }
        });
        entered.flatten().map(|entered| match entered {
            Ok(ready) => Ok(InUse { ready, door: self.clone() }),
            Err(()) => Err(Waiting { door: self.clone(), places: self.places.subscribe(), over: false }),
        })
    }

    /// Opens.
    pub(crate) fn open(&self, ready: Arc<ReadyModel>) {
        let now = self.clock.now();
        self.with(|places| {
            (places.ready, places.shut) = (Some(ready), false);
            (places.idle_since, places.opened_at) = (now, now);
            ((), true)
        });
    }

    /// Closes, whoever is inside.
    pub(crate) fn close(&self) {
        self.with(|places| {
            (places.ready, places.shut) = (None, false);
            ((), true)
        });
    }

    /// Closes if nobody is inside, and, unless it is shut, nobody waits; says whether it did. With a time, also only if
    /// that long nobody was there.
    pub(crate) fn close_if_idle(&self, idle: Duration) -> bool {
        let now = self.clock.now();
        let closed = self.with(|places| {
            let empty = places.inside == 0 && (places.waiting == 0 || places.shut);
            let closes = places.ready.is_some() && empty && now.since(places.idle_since) >= idle;
            if closes {
                (places.ready, places.shut) = (None, false);
            }
            (closes, closes)
        });
        closed.unwrap_or(false)
    }

    /// Lets nobody in for now, or lets them in again; those inside stay.
    pub(crate) fn shut(&self, shut: bool) {
        self.with(|places| {
            let told = places.shut != shut && places.ready.is_some();
            places.shut = shut && places.ready.is_some();
            ((), told)
        });
    }

    /// Returns the model while it lets requests in.
    pub(crate) fn ready(&self) -> Option<Arc<ReadyModel>> {
        self.places.borrow().ready.clone()
    }

    /// Says how it is.
    pub(crate) fn facts(&self) -> DoorFacts {
        let places = self.places.borrow();
        DoorFacts {
            open: places.ready.is_some(),
            shut: places.shut,
            inside: places.inside > 0,
            waiting: places.waiting > 0,
            idle_since: places.idle_since,
            opened_at: places.opened_at,
        }
    }
}

/// A place inside: the model serves until it is given back.
pub(crate) struct InUse {
    ready: Arc<ReadyModel>,
    door: Door,
}

impl Deref for InUse {
    type Target = ReadyModel;

    fn deref(&self) -> &ReadyModel {
        &self.ready
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let now = self.door.clock.now();
        let last = self.door.with(|places| {
            places.inside -= 1;
            if places.inside == 0 {
                places.idle_since = now;
            }
            (places.inside == 0, false)
        });
        if last == Some(true) {
            self.door.emptied.notify_one();
        }
    }
}

/// A place before a closed door.
pub(crate) struct Waiting {
    door: Door,
    places: watch::Receiver<Places>,
    over: bool,
}

impl Waiting {
    /// Waits until it opens, and goes in. Safe to cancel.
    pub(crate) async fn opened(&mut self) -> InUse {
        loop {
            // Before the look, so that nothing is missed after it.
            self.places.mark_unchanged();
            if let Some(inside) = self.try_enter() {
                return inside;
            }
            if self.places.changed().await.is_err() {
                // The door lives as long as this place before it.
                std::future::pending::<()>().await;
            }
        }
    }

    fn try_enter(&mut self) -> Option<InUse> {
        let ready = self.door.with(|places| {
            let ready = places.ready.clone().filter(|_| !places.shut);
            if ready.is_some() {
                places.inside += 1;
                places.waiting -= 1;
            }
            (ready, false)
        });
        let ready = ready.flatten()?;
        self.over = true;
        Some(InUse { ready, door: self.door.clone() })
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if !self.over {
            self.door.with(|places| {
                places.waiting -= 1;
                ((), false)
            });
            self.door.emptied.notify_one();
        }
    }
}
