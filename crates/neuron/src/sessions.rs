//! The gateways that hold a session here: how far each has followed, and whose lease is over.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use service::clock::Clock;
use tokio::sync::watch;
use words::{GatewayId, Generation, Moment};

use crate::publisher::Publisher;

/// A gateway that lost its session and has no other by then is gone, and nobody reads its answers.
pub(crate) const LEASE: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct Attached {
    /// Which of the gateway's sessions it is: a late end of an old one must not end the new one.
    number: u64,
    acked: Generation,
    /// When it said something last.
    heard: Moment,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    attached: BTreeMap<GatewayId, Attached>,
    lost: BTreeMap<GatewayId, Moment>,
}

/// The table of sessions; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Sessions {
    clock: Clock,
    table: Arc<Mutex<Table>>,
    changed: Arc<watch::Sender<u64>>,
}

impl Sessions {
    pub(crate) fn new(clock: Clock) -> Self {
        Sessions { clock, table: Arc::default(), changed: Arc::default() }
    }

    fn edit<T>(&self, change: impl FnOnce(&mut Table) -> T) -> T {
        let result = change(&mut self.table.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.send_modify(|version| *version += 1);
        result
    }

    /// Returns how many attached gateways have not acknowledged `generation`.
    pub(crate) fn unaware(&self, generation: Generation) -> usize {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.attached.values().filter(|session| session.acked < generation).count()
    }

    /// Returns a reader that wakes at each change.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Returns the gateways whose lease is over, each once.
    pub(crate) fn expired(&self, now: Moment) -> Vec<GatewayId> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let over = table.lost.iter().filter(|(_, lost)| now.since(**lost) >= LEASE);
        let over: Vec<GatewayId> = over.map(|(gateway, _)| gateway.clone()).collect();
        table.lost.retain(|gateway, _| !over.contains(gateway));
        over
    }

    /// Returns how long each attached gateway has been silent.
    pub(crate) fn silences(&self, now: Moment) -> Vec<(String, Duration)> {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.attached.iter().map(|(gateway, session)| (gateway.to_string(), now.since(session.heard))).collect()
    }

    fn names(&self) -> BTreeSet<GatewayId> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).attached.keys().cloned().collect()
    }
}

/// One gateway's session; dropping it detaches the gateway.
pub(crate) struct Session {
    pub(crate) gateway: GatewayId,
    number: u64,
    sessions: Sessions,
    publisher: Publisher,
}

impl Session {
    pub(crate) fn attach(gateway: GatewayId, sessions: &Sessions, publisher: &Publisher) -> Self {
        tracing::info!(%gateway, "gateway attached");
        let now = sessions.clock.now();
        let number = sessions.edit(|table| {
            table.next += 1;
            table.lost.remove(&gateway);
            table.attached.insert(gateway.clone(), Attached { number: table.next, acked: Generation(0), heard: now });
            table.next
        });
        publisher.change(|status| status.gateways = sessions.names());
        Session { gateway, number, sessions: sessions.clone(), publisher: publisher.clone() }
    }

    /// Takes a sign of life; wakes nobody.
    pub(crate) fn heard(&self) {
        let now = self.sessions.clock.now();
        let mut table = self.sessions.table.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = table.attached.get_mut(&self.gateway).filter(|known| known.number == self.number) {
            known.heard = now;
        }
    }

    /// Takes an acknowledgement.
    pub(crate) fn ack(&self, generation: u64) {
        self.sessions.edit(|table| {
            if let Some(known) = table.attached.get_mut(&self.gateway).filter(|known| known.number == self.number) {
                known.acked = Generation(generation).max(known.acked);
            }
        });
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let now = self.sessions.clock.now();
        let detached = self.sessions.edit(|table| {
            let ours = table.attached.get(&self.gateway).is_some_and(|known| known.number == self.number);
            if ours {
                table.attached.remove(&self.gateway);
                table.lost.insert(self.gateway.clone(), now);
            }
            ours
        });
        if detached {
            tracing::info!(gateway = %self.gateway, "gateway detached");
            self.publisher.change(|status| status.gateways = self.sessions.names());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use words::{Incarnation, NodeId, NodeStatus};

    use super::*;

    #[test]
    fn a_lease_outlives_its_session_by_its_time_unless_the_gateway_comes_back() {
        let (clock, id) = (Clock::start(), GatewayId::new("g").unwrap());
        let sessions = Sessions::new(clock);
        let status = NodeStatus::new(NodeId::new("n").unwrap(), Incarnation::default());
        let publisher = Publisher::new(status, clock);
        let attach = || Session::attach(id.clone(), &sessions, &publisher);
        let (old, new) = (attach(), attach());
        new.ack(5);
        drop(old);
        assert_eq!((sessions.unaware(Generation(5)), publisher.snapshot().gateways.len()), (0, 1));
        assert!(sessions.expired(clock.now() + LEASE * 2).is_empty(), "an old session's end is not the gateway's");
        drop(new);
        assert!(sessions.expired(clock.now()).is_empty());
        assert_eq!(sessions.expired(clock.now() + LEASE), std::slice::from_ref(&id));
        assert!(sessions.expired(clock.now() + LEASE).is_empty(), "once");
        drop(attach());
        let _back = attach();
        assert!(sessions.expired(clock.now() + LEASE).is_empty());
    }
}
