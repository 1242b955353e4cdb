//! The admission gate: counts requests in and out, and says who is let in.

use std::sync::Arc;

use tokio::sync::watch;
use words::{Door, RolloutId};

/// What the gate knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GateState {
    /// Who is let in.
    pub door: Door,
    /// Requests admitted and not over.
    pub in_flight: usize,
}

/// The gate of one node. Readers watch it; only guards and its owner's `set` change it. They wake for each request that
/// begins or ends while not everybody is let in: nobody waits for the count of an open gate, and a busy one would wake
/// them thousands of times a second.
#[derive(Clone, Debug)]
pub struct Gate {
    state: Arc<watch::Sender<GateState>>,
}

/// A request's admission; dropping it ends the request's count.
#[derive(Debug)]
pub struct Admission {
    gate: Gate,
}

impl Default for Gate {
    fn default() -> Self {
        Gate::new()
    }
}

impl Gate {
    /// Makes an open gate.
    pub fn new() -> Self {
        Gate { state: Arc::new(watch::Sender::new(GateState::default())) }
    }

    /// Admits a request; DR1: `None` once the gate is closed.
    pub fn enter(&self) -> Option<Admission> {
        self.admit(None)
    }

    /// Admits the canary of a rollout's coordinator, which a held node lets in alone.
    pub fn enter_canary(&self, rollout: &RolloutId) -> Option<Admission> {
        self.admit(Some(rollout))
    }

    fn admit(&self, canary_of: Option<&RolloutId>) -> Option<Admission> {
        // The look and the count are one step: nobody slips in between a close and the count that its owner reads.
        let mut admitted = false;
        self.state.send_if_modified(|state| {
            admitted = state.door.admits(canary_of);
            state.in_flight += usize::from(admitted);
            admitted && state.door != Door::All
        });
        admitted.then(|| Admission { gate: self.clone() })
    }

    /// Says who is let in from now on.
    pub fn set(&self, door: Door) {
        self.state.send_modify(|state| state.door = door);
    }

    /// Closes the gate.
    pub fn close(&self) {
        self.set(Door::Nobody);
    }

    /// Returns a reader.
    pub fn watch(&self) -> watch::Receiver<GateState> {
        self.state.subscribe()
    }

    /// Returns the requests admitted and not over.
    pub fn in_flight(&self) -> usize {
        self.state.borrow().in_flight
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.gate.state.send_if_modified(|state| {
            state.in_flight -= 1;
            state.door != Door::All
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn nothing_is_admitted_after_close_and_guards_count_down() {
        let gate = Gate::new();
        let first = gate.enter().unwrap();
        gate.close();
        assert!(gate.enter().is_none());
        assert_eq!(gate.in_flight(), 1);
        drop(first);
        assert_eq!(gate.in_flight(), 0);
        gate.set(Door::All);
        assert!(gate.enter().is_some(), "a gate that was closed can be opened again");
    }

    #[tokio::test]
    async fn whoever_waits_for_the_last_request_of_a_closed_gate_hears_of_it() {
        let gate = Gate::new();
        let (first, second) = (gate.enter().unwrap(), gate.enter().unwrap());
        let mut watch = gate.watch();
        drop(first);
        assert!(!watch.has_changed().unwrap(), "an open gate wakes nobody");
        gate.close();
        watch.mark_unchanged();
        let waiting = tokio::spawn(async move { watch.wait_for(|state| state.in_flight == 0).await.map(drop) });
        tokio::task::yield_now().await;
        drop(second);
        waiting.await.unwrap().unwrap();
    }

    #[test]
    fn a_held_gate_lets_its_own_canary_in_alone() {
        let [ours, other] = ["r-1", "r-2"].map(|name| RolloutId::new(name).unwrap());
        let gate = Gate::new();
        gate.set(Door::Canary(ours.clone()));
        assert!(gate.enter().is_none() && gate.enter_canary(&other).is_none());
        assert!(gate.enter_canary(&ours).is_some());
        gate.close();
        assert!(gate.enter_canary(&ours).is_none());
    }
}
