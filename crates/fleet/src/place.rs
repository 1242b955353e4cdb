//! Where a model that serves nowhere is loaded for a request: deterministic, so that a burst and several gateways choose
//! one node, and each load flies alone.

use std::collections::BTreeMap;
use std::time::Duration;

use lifecycle::{Held, Room as Plan};
use words::{ModelId, ModelState, ModelStatus, Moment, NodeId, NodeState, NodeStatus};

use crate::catalogue::{comes_on_demand, on_its_way};
use crate::view::{FleetView, Slot};

/// How a node would take a model, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Room {
    /// It is on its way there, or requests of this gateway wait for it there.
    Coming,
    /// There is free memory for it.
    Free,
    /// Models that nobody uses have to go for it.
    Evict,
    /// Models have to go that are in use just now.
    Wait,
    /// It fits by no means that the node says; the node itself has the last word.
    Never,
}

/// A node for a load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its place in the view.
    pub slot: Slot,
    /// How the model comes in there.
    pub room: Room,
}

/// Requests of this gateway that a node has not answered yet and that may wait for their model there: the next ones
/// follow the first, whatever the node has said meanwhile. One entry for each model and node that is waited for.
#[derive(Clone, Debug, Default)]
pub struct Placements {
    waiting: BTreeMap<(ModelId, Slot), u32>,
}

impl Room {
    /// Returns its name, as metrics have it.
    pub fn name(self) -> &'static str {
        match self {
            Room::Coming => "coming",
            Room::Free => "free",
            Room::Evict => "evict",
            Room::Wait => "wait",
            Room::Never => "never",
        }
    }
}

impl Placements {
    /// Counts a request in.
    pub fn enter(&mut self, model: &ModelId, slot: Slot) {
        *self.waiting.entry((model.clone(), slot)).or_default() += 1;
    }

    /// Counts it out.
    pub fn leave(&mut self, model: &ModelId, slot: Slot) {
        let key = (model.clone(), slot);
        if let Some(count) = self.waiting.get_mut(&key) {
            *count -= 1;
            if *count == 0 {
                self.waiting.remove(&key);
            }
        }
    }

    fn waits(&self, model: &ModelId, slot: Slot) -> bool {
        !self.waiting.is_empty() && self.waiting.contains_key(&(model.clone(), slot))
    }

    /// Memory that loads will take at a node which has not said so yet, apart from `model`'s own.
    fn pending(&self, model: &ModelId, slot: Slot, status: &NodeStatus) -> u64 {
        let here = self.waiting.keys().filter(|(other, at)| *at == slot && other != model);
        let unsaid = here.filter_map(|(other, _)| status.model(other)).filter(|other| comes_on_demand(other));
        unsaid.map(|other| other.card.memory_estimate).fold(0, u64::saturating_add)
    }
}

/// What is asked of [`place`].
#[derive(Clone, Copy, Debug)]
pub struct PlaceQuery<'a> {
    /// The model's id.
    pub model: &'a ModelId,
    /// Nodes that already refused it.
    pub tried: &'a [Slot],
    /// Requests that wait.
    pub placements: &'a Placements,
    /// An operator asks: what failed a moment ago is tried again, and what no request would load is loaded.
    pub ordered: bool,
}

/// Chooses the node at which a model that serves nowhere is loaded; `None` where nobody would take it just now.
///
/// First where it is on its way, the furthest first; then where memory is free, the most free first; then where models
/// that nobody uses make room, the lowest priority and the longest idle first; then where it must wait; last where it
/// can't fit by the node's own figures. A load that failed a moment ago is not tried again. Equals are told apart by a
/// hash of model and node, the same at every gateway.
pub fn place(view: &FleetView, query: &PlaceQuery<'_>, now: Moment) -> Option<Place> {
    let candidates = view.nodes().filter(|(slot, _)| !query.tried.contains(slot)).filter_map(|(slot, node)| {
        let status = node.routable(now).filter(|status| status.state == NodeState::Ready)?;
        let model = status.model(query.model)?;
        let failed = !query.ordered && node.failed_lately(query.model, now);
        let brings =
            comes_on_demand(model) || (query.ordered && matches!(model.state, ModelState::Absent | ModelState::Failed));
        let coming = on_its_way(model.state) && (model.card.on_demand || query.ordered);
        if failed || !(coming || brings) {
            return None;
        }
        let waits = brings && model.state != ModelState::Failed && query.placements.waits(query.model, slot);
        let rank = if coming || waits {
            Rank { room: Room::Coming, first: i64::from(!coming), then: -i64::from(model.progress_permille) }
        } else {
            room(status, model, query.placements.pending(query.model, slot, status))
        };
        Some(((rank, toss(query.model, &status.node), slot), Place { slot, room: rank.room }))
    });
    candidates.min_by(|(one, _), (other, _)| one.cmp(other)).map(|(_, place)| place)
}

/// Says whether a request that finds a model nowhere would bring it to a node, by what the node says: it stands in the
/// catalogue, there can be memory for it, and nothing is wrong with it there.
pub(crate) fn can_bring(status: &NodeStatus, id: &ModelId) -> bool {
    use ModelState as S;
    status.model(id).filter(|model| model.card.on_demand).is_some_and(|model| match model.state {
        S::Absent | S::Unloading => room(status, model, 0).room != Room::Never,
        S::Fetching | S::Loading | S::Warming => true,
        _ => false,
    })
}

/// Less is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    room: Room,
    first: i64,
    then: i64,
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// Judges a node by what it says of its memory, as it will itself; `pending` is what it does not know of yet.
fn room(status: &NodeStatus, model: &ModelStatus, pending: u64) -> Rank {
    let (need, budget) = (model.card.memory_estimate, status.memory.budget);
    let mut held: Vec<Held> = status.models.iter().filter(|other| other.memory_bytes > 0).map(holds).collect();
    let named = held.iter().fold(0, |sum: u64, other| sum.saturating_add(other.bytes));
    let unnamed = status.memory.used.saturating_sub(named).saturating_add(pending);
    held.push(Held { bytes: unnamed, in_use: true, ..holds(model) });
    let free = budget.saturating_sub(named).saturating_sub(unnamed);
    match lifecycle::room(&held, budget, need, true) {
        // Of a node that does not know its memory nothing is known; those that do come first.
        Plan::Fits => Rank { room: Room::Free, first: -signed(free), then: 0 },
        Plan::Evict(victims) => {
            let victims = || victims.iter().filter_map(|victim| status.model(victim));
            let dearest = victims().map(|victim| victim.card.priority).max().unwrap_or_default();
            let freshest = victims().map(|victim| victim.idle_s).min().unwrap_or_default();
            Rank { room: Room::Evict, first: i64::from(dearest), then: -i64::from(freshest) }
        }
        plan => {
            let works = |other: &ModelStatus| i64::from(other.load.running) + i64::from(other.load.waiting);
            let busy = status.models.iter().map(works).sum();
            let room = if plan == Plan::Wait { Room::Wait } else { Room::Never };
            Rank { room, first: busy, then: -signed(free) }
        }
    }
}

/// What a model holds on its node. Only the order of the moments counts.
fn holds(model: &ModelStatus) -> Held {
    let leaving = matches!(model.state, ModelState::Draining | ModelState::Unloading);
    Held {
        model: model.id.clone(),
        bytes: model.memory_bytes,
        in_use: model.state != ModelState::Ready || model.load.running + model.load.waiting > 0,
        leaving,
        pinned: model.card.pinned,
        priority: model.card.priority,
        idle_since: Moment::after_start(Duration::from_secs(u64::from(u32::MAX - model.idle_s))),
    }
}

/// A hash (FNV-1a, then mixed) that every gateway computes alike.
fn toss(model: &ModelId, node: &NodeId) -> u64 {
    let bytes = model.as_str().bytes().chain([0]).chain(node.as_str().bytes());
    let hash = bytes
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^ (hash >> 33)
}

#[cfg(test)]
#[path = "place_tests.rs"]
mod tests;
