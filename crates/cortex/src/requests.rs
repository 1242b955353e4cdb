//! The requests that run: listed, and cancelled by id or model. What has an attempt open is ended by its worker, which
//! alone has all of its text; the rest ends here.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use fleet::{FleetView, NodeView, Slot};
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use service::token::authorise;
use words::{Code, Error, ModelId};

use crate::admin::{Admin, Refused};
use crate::command::{self, Which};

use crate::proxy::Flight;

/// Most requests that an answer names; it counts them all.
const TOLD_MAX: usize = 1000;
/// Longest wait for one worker's word. What it did not hear in time ends here all the same.
const WORKER_MAX: Duration = Duration::from_secs(3);

/// A request, for those who look.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Request {
    /// `x-request-id`, which clients may use twice.
    pub(crate) request_id: String,
    /// The completion's.
    pub(crate) completion_id: String,
    /// The model.
    pub(crate) model: String,
    /// The worker that has it; none while it waits for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) node: Option<String>,
    /// The present attempt, from 1; 0 before the first.
    pub(crate) attempt: u32,
    /// Tokens so far, of all choices.
    pub(crate) tokens: u64,
    /// Since it came.
    pub(crate) seconds: f64,
}

/// The answer to `GET /api/requests`: the oldest first.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Running {
    /// How many there are; of more than 1000 the newest are not named.
    pub(crate) total: usize,
    pub(crate) requests: Vec<Request>,
}

/// The answer to a cancellation.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Cancelled {
    /// How many end now.
    pub(crate) cancelled: usize,
    /// Which, 1000 at most.
    pub(crate) requests: Vec<Request>,
    /// Workers that did not answer: requests that came to them another way may still run.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) unreachable: Vec<String>,
}

fn name_of(node: &NodeView) -> String {
    node.status.as_ref().map_or_else(|| node.control_address.clone(), |status| status.node.to_string())
}

fn request(admin: &Admin, view: &FleetView, flight: &Flight) -> Request {
    let (attempt, slot, tokens) = flight.progress();
    Request {
        request_id: flight.request_id.clone(),
        completion_id: flight.completion_id.clone(),
        model: flight.model().to_string(),
        node: slot.and_then(|slot| view.node(slot)).map(name_of),
        attempt,
        tokens,
        seconds: admin.clock.now().since(flight.arrived).as_secs_f64(),
    }
}

/// `GET /api/requests`
pub(crate) async fn list(State(admin): State<Arc<Admin>>) -> Json<Running> {
    let view = admin.fleet.view();
    let flights = admin.flights.find(|_| true);
    let requests = flights.iter().take(TOLD_MAX).map(|flight| request(&admin, &view, flight)).collect();
    Json(Running { total: flights.len(), requests })
}

/// `POST /api/requests/{id}/cancel`: the id is the request's `x-request-id` or its completion's. One that this gateway
/// does not know is looked for at every worker: it may have come through another gateway, or straight to its worker.
pub(crate) async fn cancel(
    State(admin): State<Arc<Admin>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Cancelled>, Refused> {
    authorise(admin.token.as_ref(), &headers)?;
    let ours = admin.flights.cancel(&id);
    let ended = if ours.is_empty() {
        let everywhere = orders(&admin.fleet.view(), |_| vec![Which::RequestId(id.clone())]);
        give(&admin, ours, everywhere).await
    } else {
        let mut theirs: BTreeMap<Slot, Vec<Which>> = BTreeMap::new();
        for flight in &ours {
            if let (_, Some(slot), _) = flight.progress() {
                theirs.entry(slot).or_default().push(Which::RequestId(flight.completion_id.clone()));
            }
        }
        let orders = orders(&admin.fleet.view(), |slot| theirs.remove(&slot).unwrap_or_default());
        give(&admin, ours, orders).await
    };
    if ended.cancelled == 0 {
        let silent = match ended.unreachable.as_slice() {
            [] => String::new(),
            nodes => format!("; {} did not answer", nodes.join(", ")),
        };
        let message = format!(
            "no request '{id}' runs; its x-request-id and the answer's id name it, and one that waits in another gateway \
             is cancelled there{silent}"
        );
        return Err(Error::new(Code::RouteNotFound, message).at("id").into());
    }
    tracing::info!(id, cancelled = ended.cancelled, "cancelled");
    Ok(Json(ended))
}

/// `POST /api/models/{model}/cancel`: all requests of a model, at this gateway and at every worker.
pub(crate) async fn cancel_model(
    State(admin): State<Arc<Admin>>,
    Path(model): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Cancelled>, Refused> {
    authorise(admin.token.as_ref(), &headers)?;
    let id = ModelId::new(model).map_err(|error| Error::invalid("model", error.to_string()))?;
    let view = admin.fleet.view();
    let ours = admin.flights.cancel_model(&id);
    if ours.is_empty() && !view.lists(&id) {
        let message = format!("no worker has the model '{id}', and nobody asks for it; cortex status lists them");
        return Err(Error::new(Code::ModelNotFound, message).at("model").into());
    }
    let orders = orders(&view, |_| vec![Which::ModelId(id.to_string())]);
    let ended = give(&admin, ours, orders).await;
    tracing::info!(model = %id, cancelled = ended.cancelled, "cancelled");
    Ok(Json(ended))
}

/// What a worker is told.
struct Orders {
    node: String,
    control: String,
    orders: Vec<Which>,
}

fn orders(view: &FleetView, mut of: impl FnMut(Slot) -> Vec<Which>) -> Vec<Orders> {
    let heard = view.nodes().filter(|(_, node)| node.status.is_some());
    let orders = heard.map(|(slot, node)| Orders {
        node: name_of(node),
        control: node.control_address.clone(),
        orders: of(slot),
    });
    orders.filter(|orders| !orders.orders.is_empty()).collect()
}

/// Tells the workers, all at once, and sums up with what ended here.
async fn give(admin: &Admin, ours: Vec<Arc<Flight>>, orders: Vec<Orders>) -> Cancelled {
    let view = admin.fleet.view();
    let mut ended: BTreeMap<String, Request> =
        ours.iter().map(|flight| (flight.completion_id.clone(), request(admin, &view, flight))).collect();
    let (mut unreachable, mut unnamed) = (Vec::new(), 0);
    let told = orders.into_iter().map(async |orders| {
        let work = join_all(
            orders
                .orders
                .into_iter()
                .map(async |which| command::cancel(&orders.control, admin.token.as_ref(), which).await),
        );
        (orders.node, tokio::time::timeout(WORKER_MAX, work).await)
    });
    for (node, answers) in join_all(told).await {
        let Ok(Ok(answers)) = answers.map(|answers| answers.into_iter().collect::<Result<Vec<_>, Error>>()) else {
            unreachable.push(node);
            continue;
        };
        for answer in answers {
            unnamed += (answer.count as usize).saturating_sub(answer.requests.len());
            for theirs in answer.requests {
                let request = Request {
                    request_id: theirs.request_id,
                    completion_id: theirs.completion_id.clone(),
                    model: theirs.model_id,
                    node: Some(node.clone()),
                    ..Request::default()
                };
                ended.entry(theirs.completion_id).or_insert(request);
            }
        }
    }
    let cancelled = ended.len() + unnamed;
    Cancelled { cancelled, requests: ended.into_values().take(TOLD_MAX).collect(), unreachable }
}
