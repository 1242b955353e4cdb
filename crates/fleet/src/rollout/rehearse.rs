//! A rollout on paper: in which waves it would go, and what stands in its way.

use std::collections::BTreeSet;

use serde::Serialize;
use words::{Code, Error, ModelId, ModelState, ModelStatus, NodeId};

use super::capacity::{Blocker, Capacity, comes_and_goes, find, ready_models};
use super::plan::World;
use super::policy::{MaxUnavailable, Policy};

/// Nodes that would be away together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Wave {
    /// Which.
    pub nodes: Vec<NodeId>,
    /// Each of their models, with the fewest replicas that any live gateway would keep; of models on demand also nodes that
    /// would load them count.
    pub left: Vec<(ModelId, u32)>,
}

/// Plays the whole rollout on the view as it is, as if every node came back as it was.
///
/// # Errors
/// `InvalidRequest` for a policy that makes no sense; `Conflict` when the rollout would not end, with each node that
/// can't go and why.
pub fn rehearse(policy: &Policy, world: &World<'_>) -> Result<Vec<Wave>, Error> {
    check(policy)?;
    let mut pending: Vec<&NodeId> = policy.targets.iter().collect();
    let mut waves = Vec::new();
    while !pending.is_empty() {
        let mut capacity = Capacity::new(policy, world);
        for id in &pending {
            if capacity.free(id) {
                let status = find(world.view, id).and_then(|(_, node)| node.status.as_ref());
                capacity.leave(id, status.into_iter().flat_map(ready_models));
            }
        }
        if capacity.nobody_away() {
            let blocked: Vec<_> = pending.iter().map(|id| (*id, capacity.blockers(id))).collect();
            return Err(refusal(&blocked));
        }
        let nodes: Vec<NodeId> = pending.iter().filter(|id| capacity.is_away(id)).copied().cloned().collect();
        pending.retain(|id| !capacity.is_away(id));
        waves.push(Wave { left: left(&capacity, &nodes), nodes });
    }
    Ok(waves)
}

fn check(policy: &Policy) -> Result<(), Error> {
    let mut seen = BTreeSet::new();
    if policy.targets.is_empty() {
        return Err(Error::invalid("order", "there is no node to restart"));
    }
    if let Some(twice) = policy.targets.iter().find(|id| !seen.insert(*id)) {
        return Err(Error::invalid("order", format!("the node {twice} is there twice")));
    }
    match policy.max_unavailable {
        MaxUnavailable::Count(0) | MaxUnavailable::Percent(0) => {
            Err(Error::invalid("max_unavailable", "with no node allowed to be away nothing can be restarted"))
        }
        MaxUnavailable::Percent(101..) => Err(Error::invalid("max_unavailable", "a share is at most 100%")),
        _ => Ok(()),
    }
}

fn refusal(blocked: &[(&NodeId, Vec<Blocker>)]) -> Error {
    let each = |(id, blockers): &(&NodeId, Vec<Blocker>)| {
        let why: Vec<_> = blockers.iter().map(Blocker::to_string).collect();
        format!("{id}: {}", why.join(", "))
    };
    let each: Vec<_> = blocked.iter().map(each).collect();
    let dark = blocked.iter().flat_map(|(_, blockers)| blockers).any(|blocker| matches!(blocker, Blocker::Dark { .. }));
    let hint = if dark { " (allow_dark permits a model to go dark)" } else { "" };
    Error::new(Code::Conflict, format!("the rollout could not end; {}{hint}", each.join("; ")))
}

fn left(capacity: &Capacity<'_>, nodes: &[NodeId]) -> Vec<(ModelId, u32)> {
    let statuses = capacity.world.view.nodes().filter_map(|(_, node)| node.status.as_ref());
    let statuses: Vec<_> = statuses.filter(|status| nodes.contains(&status.node)).collect();
    let models: BTreeSet<&ModelId> = statuses.iter().flat_map(|status| ready_models(status)).collect();
    let gateways = capacity.live_gateways();
    let fewest = |model: &ModelId| {
        let serving = |model: &&ModelStatus| model.state == ModelState::Ready;
        let mut replicas = statuses.iter().filter_map(|status| status.model(model)).filter(serving);
        let or_loads = replicas.all(|model| comes_and_goes(&model.card));
        gateways.iter().map(|gateway| capacity.replicas(model, gateway, None, or_loads)).min()
    };
    models.into_iter().map(|model| (model.clone(), fewest(model).unwrap_or(0))).collect()
}
