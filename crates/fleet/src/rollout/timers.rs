//! How long a coordinator has seen things as they are; counted anew by each coordinator.

use std::collections::BTreeMap;
use std::time::Duration;

use words::{Incarnation, Moment, NodeId};

use super::policy::{NodeProgress, Phase, Progress};

/// A coordinator that did not plan for this long was not scheduled, and knows nothing of the time between.
pub const ASLEEP: Duration = Duration::from_secs(2);

/// One coordinator's sense of time. It is not stored: a successor waits a little longer, never a little less.
#[derive(Clone, Debug, Default)]
pub struct Timers {
    planned_at: Option<Moment>,
    /// How often the rollout had been resumed or aborted then.
    turns: u32,
    nodes: BTreeMap<NodeId, Timer>,
    pub(super) blocked_since: Option<Moment>,
}

/// One node's.
#[derive(Clone, Debug)]
pub(super) struct Timer {
    of: (Progress, Option<Incarnation>, &'static str),
    /// Since when it is in its state.
    pub(super) since: Moment,
    /// Since when it is silent.
    pub(super) gone_since: Option<Moment>,
    /// Since when it is healthy.
    pub(super) healthy_since: Option<Moment>,
}

impl Timers {
    /// Begins with nothing.
    pub fn new() -> Self {
        Timers::default()
    }

    /// Takes note that time goes on. After a sleep and after an operator's word all waits begin anew.
    pub(super) fn tick(&mut self, now: Moment, turns: u32) {
        if self.planned_at.is_some_and(|last| now.since(last) > ASLEEP) || self.turns != turns {
            *self = Timers { turns, ..Timers::default() };
        }
        self.planned_at = Some(now);
    }

    /// Returns a node's timer; it is set anew whenever the node or the rollout has moved on.
    pub(super) fn of(&mut self, now: Moment, node: &NodeProgress, phase: &Phase) -> &mut Timer {
        let of = (node.progress.clone(), node.back, phase.name());
        let fresh = Timer { of, since: now, gone_since: None, healthy_since: None };
        let timer = self.nodes.entry(node.node.clone()).or_insert_with(|| fresh.clone());
        if timer.of != fresh.of {
            *timer = fresh;
        }
        timer
    }
}
