//! What a restart would take away: replicas as every live gateway sees them.

use std::collections::BTreeSet;
use std::fmt;

use words::{GatewayId, Intent, ModelCard, ModelId, ModelState, ModelStatus, Moment, NodeId, NodeState, NodeStatus};

use super::plan::World;
use super::policy::{Policy, Rollout};
use crate::place::can_bring;
use crate::view::{FleetView, NodeView, SILENT_AFTER, Slot};

/// What is in the way of restarting a node now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Blocker {
    /// It is not configured here, or was not heard from for 2 seconds: nothing can be ordered.
    Unheard,
    /// Two live processes use its name.
    Conflicted,
    /// It starts, leaves, or is restarted already.
    Busy(NodeState),
    /// A model would have too few replicas elsewhere in a live gateway's view.
    Dark {
        /// Which.
        model: ModelId,
        /// In whose view.
        gateway: GatewayId,
        /// How many would stay.
        left: u32,
        /// How many must.
        wanted: u32,
    },
    /// Too many nodes would be out of service.
    Unavailable {
        /// Those that are out already.
        out: Vec<NodeId>,
        /// How many may be.
        max: usize,
    },
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Blocker::Unheard => f.write_str("it is not heard from"),
            Blocker::Conflicted => f.write_str("two live processes use its name"),
            Blocker::Busy(state) => write!(f, "it is busy ({})", in_words(*state)),
            Blocker::Dark { model, gateway, left: 0, .. } => {
                write!(f, "the model '{model}' would go dark for gateway {gateway}")
            }
            Blocker::Dark { model, gateway, left, wanted } => {
                write!(f, "the model '{model}' would have {left} replicas of {wanted} for gateway {gateway}")
            }
            Blocker::Unavailable { out, max } => {
                let out: Vec<_> = out.iter().map(NodeId::to_string).collect();
                write!(f, "at most {max} nodes may be out of service, and these are: {}", out.join(", "))
            }
        }
    }
}

/// Returns a node's state as operators read it.
pub(super) fn in_words(state: NodeState) -> &'static str {
    match state {
        NodeState::Activating => "loading its models",
        NodeState::Ready => "ready",
        NodeState::Held => "held",
        NodeState::Draining(_) => "draining",
        NodeState::Drained => "drained",
        NodeState::Unloading => "unloading",
        NodeState::Stopped => "stopped",
        NodeState::Unknown => "in a state of a newer version",
    }
}

/// The fleet, as far as capacity goes. Nodes in `away` hold permits and count as gone, whatever they say.
pub(super) struct Capacity<'a> {
    policy: &'a Policy,
    pub(super) world: &'a World<'a>,
    away: BTreeSet<NodeId>,
    /// Models on demand that some node has loaded, or had as it got its permit: they keep their floor also at nodes that
    /// have not loaded them, for these are who would.
    in_use: BTreeSet<ModelId>,
}

/// Returns whether the node was heard from lately.
pub(super) fn fresh(node: &NodeView, now: Moment) -> Option<&NodeStatus> {
    node.status.as_ref().filter(|_| now.since(node.heard_at) <= SILENT_AFTER)
}

/// Finds a node by its name; of two, the one that was heard from last.
pub(super) fn find<'a>(view: &'a FleetView, id: &NodeId) -> Option<(Slot, &'a NodeView)> {
    let named = view.nodes().filter(|(_, node)| node.status.as_ref().is_some_and(|status| status.node == *id));
    named.max_by_key(|(_, node)| node.heard_at)
}

/// Returns the status of a node that takes any new work: open, ready, and under no intent.
pub(super) fn serving(node: &NodeView, now: Moment) -> Option<&NodeStatus> {
    node.routable(now).filter(|status| status.state == NodeState::Ready && status.intent == Intent::None)
}

/// Returns the models that a node offers.
pub(super) fn ready_models(status: &NodeStatus) -> impl Iterator<Item = &ModelId> {
    status.models.iter().filter(|model| model.state == ModelState::Ready).map(|model| &model.id)
}

/// Whether a node has the model by request alone, so that another one may have it as well.
pub(super) fn comes_and_goes(card: &ModelCard) -> bool {
    card.on_demand && !card.pinned
}

impl<'a> Capacity<'a> {
    /// Makes the capacity of a fleet of which nobody holds a permit.
    pub(super) fn new(policy: &'a Policy, world: &'a World<'a>) -> Self {
        let heard = world.view.nodes().filter_map(|(_, node)| fresh(node, world.now));
        let loaded = |model: &&ModelStatus| model.state == ModelState::Ready && comes_and_goes(&model.card);
        let in_use = heard.flat_map(|status| &status.models).filter(loaded).map(|model| model.id.clone()).collect();
        Capacity { policy, world, away: BTreeSet::new(), in_use }
    }

    /// Makes the capacity of a fleet in which nodes hold this rollout's permits.
    pub(super) fn of(rollout: &'a Rollout, world: &'a World<'a>) -> Self {
        let mut capacity = Capacity::new(&rollout.policy, world);
        for node in rollout.nodes.iter().filter(|node| node.progress.away()) {
            capacity.leave(&node.node, node.before.iter().flat_map(|before| &before.models));
        }
        capacity
    }

    /// Counts a node as gone, with the models that it had.
    pub(super) fn leave<'m>(&mut self, id: &NodeId, had: impl Iterator<Item = &'m ModelId>) {
        self.away.insert(id.clone());
        self.in_use.extend(had.cloned());
    }

    /// Returns whether nobody holds a permit.
    pub(super) fn nobody_away(&self) -> bool {
        self.away.is_empty()
    }

    /// Returns whether a node holds one.
    pub(super) fn is_away(&self, id: &NodeId) -> bool {
        self.away.contains(id)
    }

    /// Returns all gateways that hold a session anywhere, and this one.
    pub(super) fn live_gateways(&self) -> BTreeSet<GatewayId> {
        let heard = self.world.view.nodes().filter_map(|(_, node)| fresh(node, self.world.now));
        let mut gateways: BTreeSet<_> = heard.flat_map(|status| status.gateways.iter().cloned()).collect();
        gateways.insert(self.world.me.clone());
        gateways
    }

    /// Counts the replicas of a model that a gateway can reach on nodes other than `leaving`; with `or_loads` also nodes
    /// that would load it for the first request.
    pub(super) fn replicas(
        &self,
        model: &ModelId,
        gateway: &GatewayId,
        leaving: Option<&NodeId>,
        or_loads: bool,
    ) -> u32 {
        let count = self.world.view.nodes().filter_map(|(_, node)| serving(node, self.world.now)).filter(|status| {
            Some(&status.node) != leaving
                && !self.away.contains(&status.node)
                && status.gateways.contains(gateway)
                && (ready_models(status).any(|ready| ready == model) || (or_loads && can_bring(status, model)))
        });
        count.count() as u32
    }

    /// Returns the configured nodes that are out of service, by name where it is known, and how many have none.
    fn out(&self) -> (BTreeSet<&NodeId>, usize) {
        let mut out = BTreeSet::new();
        let mut nameless = 0;
        for (_, node) in self.world.view.nodes() {
            match &node.status {
                None => nameless += 1,
                Some(status) if serving(node, self.world.now).is_none() || self.away.contains(&status.node) => {
                    out.insert(&status.node);
                }
                Some(_) => {}
            }
        }
        (out, nameless)
    }

    /// Returns whether `id` may be restarted now.
    pub(super) fn free(&self, id: &NodeId) -> bool {
        self.look(id, false).is_empty()
    }

    /// Returns all that is in the way of restarting `id` now.
    pub(super) fn blockers(&self, id: &NodeId) -> Vec<Blocker> {
        self.look(id, true)
    }

    /// The models are looked at last, being the longest look; and not at all when `all` is not asked for and something
    /// else is in the way.
    fn look(&self, id: &NodeId, all: bool) -> Vec<Blocker> {
        let Some((_, node)) = find(self.world.view, id) else { return vec![Blocker::Unheard] };
        if node.conflicted {
            return vec![Blocker::Conflicted];
        }
        let Some(status) = fresh(node, self.world.now) else { return vec![Blocker::Unheard] };
        let idle = matches!(status.state, NodeState::Ready | NodeState::Held | NodeState::Drained);
        if !idle || status.intent == Intent::Restart {
            return vec![Blocker::Busy(status.state)];
        }
        let mut found = Vec::new();
        let max = self.policy.max_unavailable.of(self.world.view.nodes().count());
        let (mut out, nameless) = self.out();
        // A node that serves nobody takes nothing away, but it fills a place all the same.
        out.remove(id);
        if out.len() + nameless + 1 > max {
            found.push(Blocker::Unavailable { out: out.into_iter().cloned().collect(), max });
        }
        if serving(node, self.world.now).is_some() && (all || found.is_empty()) {
            found.extend(self.dark(status));
        }
        found
    }

    fn dark(&self, status: &NodeStatus) -> Vec<Blocker> {
        let gateways = self.live_gateways();
        let mut found = Vec::new();
        for ModelStatus { id: model, state, card, .. } in &status.models {
            let serves = *state == ModelState::Ready;
            let taken = serves || (self.in_use.contains(model) && can_bring(status, model));
            if !taken || self.policy.allow_dark.contains(model) {
                continue;
            }
            let (wanted, or_loads) = (self.policy.min_available.of(model), !serves || comes_and_goes(card));
            let left = |gateway| self.replicas(model, gateway, Some(&status.node), or_loads);
            let worst = gateways.iter().map(|gateway| (left(gateway), gateway)).min();
            if let Some((left, gateway)) = worst.filter(|(left, _)| *left < wanted) {
                found.push(Blocker::Dark { model: model.clone(), gateway: gateway.clone(), left, wanted });
            }
        }
        found
    }
}
