//! The admission gate: counts requests in and out, and is closed once.

use std::sync::Arc;

use tokio::sync::watch;

/// What the gate knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GateState {
    /// Nothing is admitted any more.
    pub closed: bool,
    /// Requests admitted and not over.
    pub in_flight: usize,
}

/// The gate of one node. Readers watch it; only guards and `close` change it.
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

    /// Admits a request; DR1: nothing is admitted after the gate was closed, so `None` once the gate is closed.
    pub fn enter(&self) -> Option<Admission> {
        let mut admitted = false;
        self.state.send_modify(|state| {
            admitted = !state.closed;
            state.in_flight += usize::from(admitted);
        });
        admitted.then(|| Admission { gate: self.clone() })
    }

    /// Closes the gate for good.
    pub fn close(&self) {
        self.state.send_modify(|state| state.closed = true);
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
        self.gate.state.send_modify(|state| state.in_flight -= 1);
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
    }
}
