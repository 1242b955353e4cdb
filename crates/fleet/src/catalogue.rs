//! What the catalogues of a fleet say together: which names lead to which model, and what clients can use.

use std::collections::{BTreeMap, BTreeSet};

use words::{Loading, ModelCard, ModelId, ModelState, ModelStatus, NodeStatus};

/// Names that are no ids of the fleet, each with the models that some catalogue means by it.
pub(crate) type Aliases = BTreeMap<ModelId, BTreeSet<ModelId>>;

/// Collects them. An id wins over an alias.
pub(crate) fn aliases<'a>(statuses: impl Iterator<Item = &'a NodeStatus> + Clone) -> Aliases {
    let mut aliases = Aliases::new();
    let models = statuses.flat_map(|status| &status.models).filter(|model| model.state != ModelState::Unknown);
    for model in models.clone() {
        for alias in &model.card.aliases {
            aliases.entry(alias.clone()).or_default().insert(model.id.clone());
        }
    }
    if !aliases.is_empty() {
        models.for_each(|model| drop(aliases.remove(&model.id)));
    }
    aliases
}

/// Returns whether a load of the model runs.
pub fn on_its_way(state: ModelState) -> bool {
    use ModelState as S;
    matches!(state, S::Fetching | S::Loading | S::Warming | S::Recovering)
}

/// Returns whether the model is not on its node, or will not be in a moment, and a request would bring it. One that ends
/// what it runs takes nothing, and is not brought back before it has gone.
pub(crate) fn comes_on_demand(model: &ModelStatus) -> bool {
    use ModelState as S;
    model.card.on_demand && matches!(model.state, S::Absent | S::Failed | S::Unloading)
}

/// Returns whether a request that was sent to a node can be waiting there for its model: that is on its way, or will be
/// as soon as there is memory for it, or lets nobody in for now, for another one needs its memory.
pub fn coming(status: &NodeStatus, model: &ModelId) -> bool {
    use ModelState as S;
    let others = || status.models.iter().any(|other| other.id != *model && on_its_way(other.state));
    status.model(model).is_some_and(|model| match model.state {
        S::Absent | S::Draining | S::Unloading => model.card.on_demand,
        S::Ready => model.card.on_demand && others(),
        state => on_its_way(state),
    })
}

/// How near to serving a model is; more is nearer.
fn nearness(model: &ModelStatus) -> (u8, u32) {
    let rank = match model.state {
        ModelState::Ready => 6,
        ModelState::Warming => 5,
        ModelState::Loading => 4,
        ModelState::Fetching => 3,
        ModelState::Recovering => 2,
        _ if comes_on_demand(model) => 1,
        _ => 0,
    };
    (rank, model.progress_permille)
}

/// Says how far the model's nearest load is; `None` where it serves, or none is to be waited for.
pub(crate) fn loading<'a>(replicas: impl Iterator<Item = &'a ModelStatus>) -> Option<Loading> {
    let nearest = replicas.max_by_key(|model| nearness(model))?;
    let coming = on_its_way(nearest.state) || comes_on_demand(nearest);
    let (progress_permille, eta_ms) =
        if on_its_way(nearest.state) { (nearest.progress_permille, nearest.eta_ms) } else { (0, None) };
    coming.then_some(Loading { state: nearest.state, progress_permille, eta_ms })
}

/// Returns one entry a model, in order of name: the replica that is nearest to serving, with the first card that says
/// something. Without those that are absent and that no request brings.
pub(crate) fn merged<'a>(statuses: impl Iterator<Item = &'a NodeStatus>) -> Vec<ModelStatus> {
    let mut found: BTreeMap<&ModelId, (&ModelStatus, &ModelCard)> = BTreeMap::new();
    let empty = ModelCard::default();
    for model in statuses.flat_map(|status| &status.models) {
        let known = found.entry(&model.id).or_insert((model, &model.card));
        if nearness(model) > nearness(known.0) {
            known.0 = model;
        }
        if *known.1 == empty {
            known.1 = &model.card;
        }
    }
    let there = |model: &ModelStatus| !matches!(model.state, ModelState::Absent | ModelState::Unknown);
    let found = found.into_values().filter(|(model, card)| there(model) || card.on_demand);
    found.map(|(model, card)| ModelStatus { card: card.clone(), ..model.clone() }).collect()
}

#[cfg(test)]
#[path = "catalogue_tests.rs"]
mod tests;
