//! The one publisher of this node's status: every transition is logged and raises the generation.

use std::sync::Arc;

use tokio::sync::watch;
use words::{Generation, ModelId, ModelLoad, ModelState, ModelStatus, NodeStatus};

/// Owns the status; hands out snapshots.
#[derive(Clone, Debug)]
pub(crate) struct Publisher {
    status: Arc<watch::Sender<NodeStatus>>,
}

impl Publisher {
    pub(crate) fn new(first: NodeStatus) -> Self {
        Publisher { status: Arc::new(watch::Sender::new(first)) }
    }

    /// Changes the status and raises the generation.
    pub(crate) fn change(&self, change: impl FnOnce(&mut NodeStatus)) {
        self.status.send_modify(|status| {
            change(status);
            status.generation = status.generation.next();
        });
    }

    /// Lets the node's own machine write what it knows, and logs a new state; returns the generation of it.
    pub(crate) fn node(&self, write: impl FnOnce(&mut NodeStatus)) -> Generation {
        let mut generation = Generation(0);
        self.change(|status| {
            let before = (status.state, status.intent);
            write(status);
            generation = status.generation.next();
            if before != (status.state, status.intent) {
                let (from, to, intent) = (before.0, status.state, status.intent);
                tracing::info!(?from, ?to, ?intent, generation = generation.0, "node state");
            }
        });
        generation
    }

    /// Refreshes how far a drain or a hold has come, without a new generation.
    pub(crate) fn progress(&self, write: impl FnOnce(&mut NodeStatus)) {
        self.status.send_if_modified(|status| {
            let mut fresh = status.clone();
            write(&mut fresh);
            let changed = fresh.drain != status.drain || fresh.hold != status.hold;
            (status.drain, status.hold) = (fresh.drain, fresh.hold);
            changed
        });
    }

    /// Puts a model's status in, or takes it out when it is absent.
    pub(crate) fn model(&self, model: ModelStatus) {
        self.change(|status| {
            status.models.retain(|known| known.id != model.id);
            if model.state != ModelState::Absent {
                status.models.push(model);
                status.models.sort_by(|a, b| a.id.cmp(&b.id));
            }
        });
    }

    /// Refreshes what changes all the time, without a new generation.
    pub(crate) fn load(&self, in_flight: usize, loads: &[(ModelId, ModelLoad, u32)]) {
        self.status.send_if_modified(|status| {
            let mut changed = status.in_flight != in_flight as u32;
            status.in_flight = in_flight as u32;
            for (id, load, p99) in loads {
                if let Some(model) = status.models.iter_mut().find(|model| model.id == *id) {
                    changed |= model.load != *load || model.inter_token_p99_ms != *p99;
                    (model.load, model.inter_token_p99_ms) = (*load, *p99);
                }
            }
            changed
        });
    }

    /// Returns a snapshot.
    pub(crate) fn snapshot(&self) -> NodeStatus {
        self.status.borrow().clone()
    }

    /// Returns a reader.
    pub(crate) fn watch(&self) -> watch::Receiver<NodeStatus> {
        self.status.subscribe()
    }
}
