//! Where a request goes: `(view, query, now, rng) -> Forward | Wait | Reject`.

use std::time::Duration;

use rand::Rng;
use words::{Code, DrainPhase, Error, Loading, ModelId, ModelState, ModelStatus, Moment, NodeId, NodeState};

use crate::catalogue::on_its_way;
use crate::journey::Successor;
use crate::place::{PlaceQuery, Placements, Room, place};
use crate::view::{FAILED_PAUSE, FleetView, Slot};

/// What routing needs to know of a request.
#[derive(Clone, Copy, Debug)]
pub struct RouteQuery<'a> {
    /// The model, as the client named it.
    pub model: &'a ModelId,
    /// Neurons that already refused it.
    pub tried: &'a [Slot],
    /// Until when it may wait for a worker.
    pub wait_until: Moment,
    /// Set for a continuation: who may take it.
    pub successor: Option<&'a Successor>,
    /// Requests of this gateway that wait for loads.
    pub placements: &'a Placements,
}

/// A worker to send the request to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its place in the view.
    pub slot: Slot,
    /// Its name, for metrics and logs.
    pub node: NodeId,
    /// `host:port` of its data plane.
    pub data_address: String,
    /// Set where the model does not serve yet: the worker loads it for the request, which waits there.
    pub room: Option<Room>,
    /// Whether requests bring the model there: then this one counts among [`Placements`] until it is answered, for the
    /// model may go as it comes.
    pub on_demand: bool,
}

/// The decision.
#[derive(Debug)]
pub enum Route {
    /// Send it there.
    Forward(Target),
    /// Nobody can take it now; look again when the view changes, until the moment given.
    Wait(Moment),
    /// It can't be served.
    Reject(Error),
}

/// Decides. `sent_since` counts what this gateway sent to a neuron since that neuron's last report, so that a
/// burst between two reports does not go to one neuron.
///
/// A model that serves nowhere goes where [`place`] says; one that serves somewhere is not loaded a second time for its
/// load alone.
///
/// Least loaded by the workers' own reports, as a share of what each runs at once; the rng breaks ties. A
/// continuation goes only to an equal continue-fingerprint, best to one that gives equal bytes, then to a worker that
/// the rollout that drives it away has restarted already, for it will not have to move again.
pub fn route(
    view: &FleetView,
    query: &RouteQuery<'_>,
    sent_since: impl Fn(Slot) -> u32,
    now: Moment,
    rng: &mut impl Rng,
) -> Route {
    let mut best: Option<((u32, f64), Target)> = None;
    let successor = query.successor;
    let mut ties = 0u32;
    for (slot, node) in view.nodes().filter(|(slot, _)| !query.tried.contains(slot)) {
        let Some(status) = node.routable(now) else { continue };
        let Some(model) = status.model(query.model).filter(|model| takes(model, successor)) else { continue };
        let busy = model.load.running + model.load.waiting + sent_since(slot);
        let share = f64::from(busy) / f64::from(model.load.max_running.max(1));
        // A node that is about to close is a last resort.
        let mut class = 4 * u32::from(status.state == NodeState::Draining(DrainPhase::Settle));
        if let Some(successor) = successor {
            class += 2 * u32::from(model.exact_fingerprint != successor.exact_fingerprint);
            class += u32::from(successor.rollout.is_some() && status.rollout != successor.rollout);
        }
        let rank = (class, share);
        let better = match &best {
            None => true,
            Some((known, _)) if rank == *known => {
                ties += 1;
                rng.random_range(0..=ties) == 0
            }
            Some((known, _)) => {
                let less = rank < *known;
                ties = if less { 0 } else { ties };
                less
            }
        };
        if better {
            let data_address = status.data_address.clone();
            best = Some((
                rank,
                Target { slot, node: status.node.clone(), data_address, room: None, on_demand: model.card.on_demand },
            ));
        }
    }
    match best.map(|(_, target)| target).or_else(|| load(view, query, now)) {
        Some(target) => Route::Forward(target),
        None => nobody(view, query, now),
    }
}

/// Finds a worker that loads the model for the request.
fn load(view: &FleetView, query: &RouteQuery<'_>, now: Moment) -> Option<Target> {
    // One that serves refused it, or one that loads the model: a second replica is not loaded for that.
    let refused = |slot: Slot, model: &ModelStatus| query.tried.contains(&slot) && on_its_way(model.state);
    let mut replicas = view.nodes().filter_map(|(slot, node)| Some((slot, node.routable(now)?.model(query.model)?)));
    if replicas.any(|(slot, model)| takes(model, query.successor) || refused(slot, model)) {
        return None;
    }
    let place_query =
        PlaceQuery { model: query.model, tried: query.tried, placements: query.placements, ordered: false };
    let place = place(view, &place_query, now)?;
    let status = view.node(place.slot)?.status.as_ref()?;
    let (node, data_address) = (status.node.clone(), status.data_address.clone());
    Some(Target { slot: place.slot, node, data_address, room: Some(place.room), on_demand: true })
}

/// Whether a worker with this model takes the request.
fn takes(model: &ModelStatus, successor: Option<&Successor>) -> bool {
    model.state == ModelState::Ready && successor.is_none_or(|successor| may_continue(model, successor))
}

fn may_continue(model: &ModelStatus, successor: &Successor) -> bool {
    model.capabilities.continuation && model.continue_fingerprint == successor.continue_fingerprint
}

fn nobody(view: &FleetView, query: &RouteQuery<'_>, now: Moment) -> Route {
    let listed = view.lists(query.model);
    // A client that has half an answer waits for whoever may come back.
    if !listed && view.all_heard() && query.successor.is_none() {
        let message = format!("the model '{}' does not exist; GET /v1/models lists those that do", query.model);
        return Route::Reject(Error::new(Code::ModelNotFound, message).at("model"));
    }
    // Who can only wait for a worker that failed to load it a moment ago is better told so.
    if query.successor.is_none()
        && let Some(left) = pause(view, query, now)
    {
        let message = format!("the model '{}' could not be loaded; the fleet's status says why", query.model);
        return Route::Reject(Error::new(Code::NoReplica, message).retry_after(left));
    }
    if now < query.wait_until {
        return Route::Wait(query.wait_until);
    }
    if let Some(loading) = view.loading(query.model).filter(|loading| on_its_way(loading.state)) {
        return Route::Reject(still_loading(query.model, loading));
    }
    let message = if query.successor.is_some() {
        "the worker was lost, and no other one could go on with this answer in time".to_string()
    } else if listed {
        format!("no worker that has the model '{}' can take the request now", query.model)
    } else {
        format!("not every worker has been heard from, and none of the others has the model '{}'", query.model)
    };
    Route::Reject(Error::new(Code::NoReplica, message))
}

/// Returns how long a model that failed to load is left alone, where no worker but such ones would load it.
fn pause(view: &FleetView, query: &RouteQuery<'_>, now: Moment) -> Option<Duration> {
    let here = view.nodes().filter(|(_, node)| {
        let status = node.routable(now).and_then(|status| status.model(query.model));
        status.is_some_and(|model| model.card.on_demand || model.state == ModelState::Ready)
    });
    let mut left = None;
    for (_, node) in here {
        let since = node.failed.get(query.model).filter(|_| node.failed_lately(query.model, now))?;
        let rest = (*since + FAILED_PAUSE) - now;
        left = Some(left.map_or(rest, |known: Duration| known.min(rest)));
    }
    left
}

/// The error of a request whose wait for a load is over.
pub fn still_loading(model: &ModelId, loading: Loading) -> Error {
    let message = match loading.state {
        ModelState::Absent => format!("the model '{model}' waits for memory"),
        _ => format!("the model '{model}' is loading"),
    };
    Error::new(Code::ModelLoading, message).while_loading(loading)
}

#[cfg(test)]
#[path = "route_tests.rs"]
mod tests;
