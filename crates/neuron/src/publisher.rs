//! The one publisher of this node's status: every transition is logged and raises the generation.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use service::clock::Clock;
use tokio::sync::watch;
use words::{
    DrainPhase, Generation, Intent, ModelHistory, ModelId, ModelLoad, ModelState, ModelStatus, NodeState, NodeStatus,
    StateChange,
};

use crate::history::History;

/// What changes all the time of a model.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Refresh {
    pub(crate) id: ModelId,
    pub(crate) load: ModelLoad,
    /// The 99th percentile of the time between two tokens, in milliseconds.
    pub(crate) p99_ms: u32,
    pub(crate) idle_s: u32,
    pub(crate) eta_ms: Option<u64>,
}

/// Owns the status; hands out snapshots.
#[derive(Clone, Debug)]
pub(crate) struct Publisher {
    status: Arc<watch::Sender<NodeStatus>>,
    /// Models that are listed also while they are absent.
    catalogue: Arc<BTreeSet<ModelId>>,
    /// Held for one note or one copy.
    history: Arc<Mutex<History>>,
    clock: Clock,
}

pub(crate) fn state_name(state: NodeState) -> &'static str {
    match state {
        NodeState::Activating => "activating",
        NodeState::Ready => "ready",
        NodeState::Held => "held",
        NodeState::Draining(DrainPhase::Settle) => "draining:settle",
        NodeState::Draining(DrainPhase::Closed) => "draining:closed",
        NodeState::Draining(DrainPhase::Handoff) => "draining:handoff",
        NodeState::Draining(DrainPhase::Force) => "draining:force",
        NodeState::Drained => "drained",
        NodeState::Unloading => "unloading",
        NodeState::Stopped => "stopped",
        NodeState::Unknown => "unknown",
    }
}

pub(crate) fn intent_text(intent: Intent) -> String {
    match intent {
        Intent::None => String::new(),
        intent => format!("intent {}", format!("{intent:?}").to_lowercase()),
    }
}

impl Publisher {
    /// Begins with a first status, whose models are the configured ones.
    pub(crate) fn new(first: NodeStatus, clock: Clock) -> Self {
        let catalogue = Arc::new(first.models.iter().map(|model| model.id.clone()).collect());
        let history = Arc::default();
        let state = (first.state, first.intent);
        let publisher = Publisher { status: Arc::new(watch::Sender::new(first)), catalogue, history, clock };
        publisher.note_node(state);
        publisher
    }

    fn past(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_node(&self, (state, intent): (NodeState, Intent)) {
        let (state, why) = (state_name(state).to_string(), intent_text(intent));
        self.past().node(StateChange { state, at_unix_ms: self.clock.unix_ms(), why });
    }

    /// Returns the last changes of the node's own state and of its models', the oldest first.
    pub(crate) fn history(&self) -> (Vec<StateChange>, Vec<ModelHistory>) {
        self.past().read()
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
                self.note_node((to, intent));
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

    /// Puts a model's status in, or takes it out when it is absent and not configured.
    pub(crate) fn model(&self, model: ModelStatus) {
        let why = model.failure.clone().filter(|_| model.state == ModelState::Failed).unwrap_or_default();
        let change = StateChange { state: model.state.name().to_string(), at_unix_ms: self.clock.unix_ms(), why };
        self.past().model(&model.id, change);
        self.change(|status| {
            status.models.retain(|known| known.id != model.id);
            if model.state != ModelState::Absent || self.catalogue.contains(&model.id) {
                status.models.push(model);
                status.models.sort_by(|a, b| a.id.cmp(&b.id));
            }
        });
    }

    /// Refreshes what changes all the time, without a new generation.
    pub(crate) fn load(&self, in_flight: usize, loads: &[Refresh]) {
        self.status.send_if_modified(|status| {
            let mut changed = status.in_flight != in_flight as u32;
            status.in_flight = in_flight as u32;
            for Refresh { id, load, p99_ms, idle_s, eta_ms } in loads {
                if let Some(model) = status.models.iter_mut().find(|model| model.id == *id) {
                    // Idle time and estimates go with the next heartbeat.
                    changed |= model.load != *load || model.inter_token_p99_ms != *p99_ms;
                    (model.load, model.inter_token_p99_ms) = (*load, *p99_ms);
                    (model.idle_s, model.eta_ms) = (*idle_s, *eta_ms);
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use words::{Incarnation, NodeId};

    use super::*;

    #[test]
    fn a_configured_model_is_listed_also_while_it_is_absent() {
        let [known, other] = ["known", "other"].map(|name| ModelStatus::absent(ModelId::new(name).unwrap()));
        let first = NodeStatus::new(NodeId::new("n").unwrap(), Incarnation::default());
        let publisher = Publisher::new(NodeStatus { models: vec![known.clone()], ..first }, Clock::start());
        let ready = |model: &ModelStatus| ModelStatus { state: ModelState::Ready, ..model.clone() };
        [ready(&known), ready(&other)].into_iter().for_each(|model| publisher.model(model));
        assert_eq!(publisher.snapshot().models.len(), 2);
        [known.clone(), other].into_iter().for_each(|model| publisher.model(model));
        assert_eq!(publisher.snapshot().models, [known]);
    }

    #[test]
    fn each_new_state_is_in_the_past_once_with_its_reason() {
        let first = NodeStatus::new(NodeId::new("n").unwrap(), Incarnation::default());
        let publisher = Publisher::new(first, Clock::start());
        let absent = ModelStatus::absent(ModelId::new("m").unwrap());
        for (state, permille) in [(ModelState::Loading, 1), (ModelState::Loading, 2), (ModelState::Failed, 2)] {
            let failure = Some("no such file".to_string());
            publisher.model(ModelStatus { state, progress_permille: permille, failure, ..absent.clone() });
        }
        publisher.node(|status| status.state = NodeState::Ready);
        publisher.node(|status| status.intent = Intent::Cordon);
        let (node, models) = publisher.history();
        let text = |changes: &[StateChange]| -> Vec<String> {
            changes.iter().map(|change| format!("{} {}", change.state, change.why).trim().to_string()).collect()
        };
        assert_eq!(text(&node), ["activating", "ready", "ready intent cordon"]);
        assert_eq!(text(&models[0].states), ["loading", "failed no such file"]);
    }
}
