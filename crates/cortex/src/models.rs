//! `/api/models`: what the fleet's catalogues have, where it is, and orders to load and to unload.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use fleet::{FleetView, PlaceQuery, Room, place};
use futures_util::stream::{self, FuturesUnordered, StreamExt};
use serde::{Deserialize, Serialize};
use service::token::authorise;
use words::{Code, Error, ModelCard, ModelId, ModelState, ModelStatus, Moment, NodeMemory};

use crate::admin::{Admin, Refused};
use crate::{command, operate};

/// A line is sent at least this often.
const LINE_EVERY: Duration = Duration::from_secs(1);
/// An answer that is there this soon is told by its status; later ones are told in lines.
const AT_ONCE: Duration = Duration::from_millis(500);
/// A gateway that sends no line for this long is given up.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(20);

/// The answer to `GET /api/models`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct FleetModels {
    /// In order of name.
    pub(crate) models: Vec<FleetModel>,
    /// The workers and their memory.
    pub(crate) nodes: Vec<NodeRoom>,
}

/// One model over the fleet.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct FleetModel {
    /// Its name.
    pub(crate) id: ModelId,
    /// That of the replica that is nearest to serving.
    pub(crate) state: ModelState,
    /// What the catalogue says of it.
    pub(crate) card: ModelCard,
    /// Most tokens of prompt and answer; 0 while unknown.
    pub(crate) context_length: u32,
    /// Where it is, or could be.
    pub(crate) replicas: Vec<Replica>,
}

/// One model at one worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Replica {
    /// The worker's name.
    pub(crate) node: String,
    /// Whether the worker gets new requests.
    pub(crate) routable: bool,
    /// Where the model is.
    pub(crate) state: ModelState,
    /// Share of its load that is done, from 0 to 1.
    pub(crate) progress: f64,
    /// Seconds that its load still takes, where that can be estimated.
    pub(crate) eta_s: Option<f64>,
    /// Bytes that it takes, or that are set aside for it.
    pub(crate) memory_bytes: u64,
    /// Requests that run.
    pub(crate) running: u32,
    /// Requests that are queued.
    pub(crate) waiting: u32,
    /// Seconds without a request.
    pub(crate) idle_s: u32,
    /// Seconds of idleness until it is unloaded; `None` where it is not.
    pub(crate) ttl_left_s: Option<u64>,
    /// Whether it is never evicted.
    pub(crate) pinned: bool,
    /// Why its load failed.
    pub(crate) failure: Option<String>,
}

/// A worker's memory for models.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct NodeRoom {
    /// Its name.
    pub(crate) node: String,
    /// Whether it gets new requests.
    pub(crate) routable: bool,
    /// In bytes; a budget of 0 is unknown.
    pub(crate) memory: NodeMemory,
}

fn replica(node: &str, routable: bool, model: &ModelStatus) -> Replica {
    let card = &model.card;
    let expires = model.state == ModelState::Ready && card.ttl_s > 0 && !card.pinned;
    Replica {
        node: node.into(),
        routable,
        state: model.state,
        progress: f64::from(model.progress_permille.min(1000)) / 1000.0,
        eta_s: model.eta_ms.map(|ms| ms as f64 / 1000.0),
        memory_bytes: model.memory_bytes,
        running: model.load.running,
        waiting: model.load.waiting,
        idle_s: model.idle_s,
        ttl_left_s: expires.then(|| card.ttl_s.saturating_sub(u64::from(model.idle_s))),
        pinned: card.pinned,
        failure: model.failure.clone(),
    }
}

/// Collects what the view knows.
fn collect(view: &FleetView, now: Moment) -> FleetModels {
    let heard = || view.nodes().filter_map(|(_, node)| Some((node.routable(now).is_some(), node.status.as_ref()?)));
    let models = view.models().into_iter().map(|model| FleetModel {
        replicas: heard()
            .filter_map(|(routable, status)| Some(replica(status.node.as_str(), routable, status.model(&model.id)?)))
            .collect(),
        id: model.id,
        state: model.state,
        card: model.card,
        context_length: model.context_length,
    });
    let room = |(routable, status): (bool, &words::NodeStatus)| NodeRoom {
        node: status.node.to_string(),
        routable,
        memory: status.memory,
    };
    FleetModels { models: models.collect(), nodes: heard().map(room).collect() }
}

/// `GET /api/models`
pub(crate) async fn list(State(admin): State<Arc<Admin>>) -> Json<FleetModels> {
    Json(collect(&admin.fleet.view(), admin.clock.now()))
}

/// The body of `POST /api/models/load` and `/unload`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Wanted {
    /// The model's id, or another name of it.
    pub(crate) model: String,
    /// The worker: its name, or its control address. The gateway chooses when absent; to unload, all that have it.
    #[serde(default)]
    pub(crate) node: Option<String>,
    /// Whether idle models may be unloaded for a load; they may when absent.
    #[serde(default)]
    pub(crate) make_room: Option<bool>,
}

/// One line of the answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Line {
    /// The worker.
    pub(crate) node: String,
    /// Where the model is there.
    pub(crate) state: ModelState,
    /// Share of the load that is done, from 0 to 1.
    #[serde(default)]
    pub(crate) progress: f64,
    /// Seconds that it still takes, where that can be estimated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) eta_s: Option<f64>,
    /// The worker has done what was ordered; in its last line.
    #[serde(default)]
    pub(crate) done: bool,
    /// Why it has not; in its last line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

/// An order under way: at which worker, and what came of it.
type Call = std::pin::Pin<Box<dyn Future<Output = (String, Result<(), Error>)> + Send>>;

/// The orders of one request.
struct Orders {
    admin: Arc<Admin>,
    model: ModelId,
    calls: FuturesUnordered<Call>,
    /// Workers that have not answered.
    left: Vec<String>,
}

impl Orders {
    fn line(&self, node: &str, outcome: Option<Result<(), Error>>) -> Line {
        let view = self.admin.fleet.view();
        let mut nodes = view.nodes().filter_map(|(_, known)| known.status.as_ref());
        let model = nodes.find(|status| status.node.as_str() == node).and_then(|status| status.model(&self.model));
        let (done, error) = match outcome {
            Some(Ok(())) => (true, None),
            Some(Err(error)) => (false, Some(error.message().to_string())),
            None => (false, None),
        };
        Line {
            node: node.into(),
            state: model.map_or(ModelState::Absent, |model| model.state),
            progress: model.map_or(0.0, |model| f64::from(model.progress_permille.min(1000)) / 1000.0),
            eta_s: model.and_then(|model| model.eta_ms).map(|ms| ms as f64 / 1000.0),
            done,
            error,
        }
    }

    /// Waits for an outcome, for a while; says where things are otherwise. `None` once all is said.
    async fn next(&mut self) -> Option<Line> {
        let first = self.left.first()?.clone();
        match tokio::time::timeout(LINE_EVERY, self.calls.next()).await {
            Ok(Some((node, outcome))) => {
                self.left.retain(|left| *left != node);
                Some(self.line(&node, Some(outcome)))
            }
            Ok(None) => None,
            Err(_) => Some(self.line(&first, None)),
        }
    }

    /// Answers with lines; an order to one worker that is refused at once is a refusal of the request.
    async fn answer(mut self) -> Result<Response, Refused> {
        let mut said = Vec::new();
        if self.left.len() == 1
            && let Ok(Some((node, outcome))) = tokio::time::timeout(AT_ONCE, self.calls.next()).await
        {
            outcome?;
            self.left.clear();
            said.push(self.line(&node, Some(Ok(()))));
        }
        let said = stream::iter(said);
        let rest = stream::unfold(self, |mut orders| async move { Some((orders.next().await?, orders)) });
        let lines = said.chain(rest).map(|line| serde_json::to_string(&line).map(|text| Bytes::from(text + "\n")));
        let kind = [(header::CONTENT_TYPE, "application/x-ndjson")];
        Ok((kind, Body::from_stream(lines)).into_response())
    }
}

/// Reads the order, and the model's own id.
async fn read(admin: &Admin, headers: &HeaderMap, body: Body) -> Result<(Wanted, ModelId), Error> {
    authorise(admin.token.as_ref(), headers)?;
    let wanted: Wanted = operate::read_json(body).await?;
    let name = ModelId::new(wanted.model.clone()).map_err(|error| Error::invalid("model", error.to_string()))?;
    let id = admin.fleet.alias(&name).unwrap_or(name);
    Ok((wanted, id))
}

/// Chooses a worker for a load: one that has the model, or as a request's would be chosen.
///
/// # Errors
/// `ModelNotFound` where no catalogue has it, `NoReplica` where nobody takes it now.
fn choose(admin: &Admin, model: &ModelId, make_room: bool) -> Result<(String, String), Error> {
    let (view, now) = (admin.fleet.view(), admin.clock.now());
    let named = |slot| {
        let node = view.node(slot)?;
        Some((node.control_address.clone(), node.status.as_ref()?.node.to_string()))
    };
    let serves = |status: &words::NodeStatus| status.model(model).is_some_and(|m| m.state == ModelState::Ready);
    let ready = view.nodes().find(|(_, node)| node.routable(now).is_some_and(serves));
    if let Some(found) = ready.and_then(|(slot, _)| named(slot)) {
        return Ok(found);
    }
    let placements = admin.fleet.placements().clone();
    let query = PlaceQuery { model, tried: &[], placements: &placements, ordered: true };
    let Some(place) = place(&view, &query, now) else {
        if !view.lists(model) && view.all_heard() {
            let message =
                format!("no worker's catalogue has the model '{model}'; name a worker to load it there by reference");
            return Err(Error::new(Code::ModelNotFound, message).at("model"));
        }
        return Err(Error::new(Code::NoReplica, format!("no worker that knows the model '{model}' loads it just now")));
    };
    if !make_room && !matches!(place.room, Room::Coming | Room::Free) {
        return Err(Error::new(Code::NoReplica, no_free_memory(&view, model)));
    }
    named(place.slot).ok_or_else(|| Error::internal("a worker that was chosen is gone"))
}

fn no_free_memory(view: &FleetView, model: &ModelId) -> String {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let nodes = view.nodes().filter_map(|(_, node)| {
        let status = node.status.as_ref()?;
        let need = status.model(model)?.card.memory_estimate;
        let free = mib(status.memory.free()?);
        Some(format!("{} has {free} MiB of {} free and it needs {}", status.node, mib(status.memory.budget), mib(need)))
    });
    let nodes = nodes.collect::<Vec<_>>().join("; ");
    format!("no worker has free memory for the model '{model}' without unloading others: {nodes}")
}

/// `POST /api/models/load`: the answer is a line of JSON at least each second, the last one says what came of it. A
/// caller that leaves does not end the load.
pub(crate) async fn load(State(admin): State<Arc<Admin>>, headers: HeaderMap, body: Body) -> Result<Response, Refused> {
    let (wanted, model) = read(&admin, &headers, body).await?;
    let make_room = wanted.make_room.unwrap_or(true);
    let (control, node) = match &wanted.node {
        Some(name) => operate::find(&admin, name).map(|(control, status)| (control, status.node.to_string()))?,
        None => choose(&admin, &model, make_room)?,
    };
    tracing::info!(node, %model, make_room, "load ordered");
    let (token, id, name) = (admin.token.clone(), model.clone(), node.clone());
    let call: Call = Box::pin(async move {
        let outcome = command::load(&control, token.as_ref(), &id, make_room).await;
        (name, outcome)
    });
    Orders { admin, model, calls: FuturesUnordered::from_iter([call]), left: vec![node] }.answer().await
}

/// `POST /api/models/unload`: as a load; without a worker, wherever the model is.
pub(crate) async fn unload(
    State(admin): State<Arc<Admin>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Refused> {
    let (wanted, model) = read(&admin, &headers, body).await?;
    let view = admin.fleet.view();
    let nodes: Vec<(String, String)> = match &wanted.node {
        Some(name) => operate::find(&admin, name).map(|(control, status)| vec![(control, status.node.to_string())])?,
        None => {
            let here = view.nodes().filter_map(|(_, node)| {
                let status = node.status.as_ref()?;
                let there = status.model(&model).is_some_and(|m| m.state != ModelState::Absent);
                there.then(|| (node.control_address.clone(), status.node.to_string()))
            });
            here.collect()
        }
    };
    if nodes.is_empty() {
        let message = format!("the model '{model}' is loaded on no worker; GET /api/models says what is where");
        return Err(Error::new(Code::ModelNotFound, message).at("model").into());
    }
    let left: Vec<String> = nodes.iter().map(|(_, node)| node.clone()).collect();
    tracing::info!(nodes = left.join(", "), %model, "unload ordered");
    let calls = nodes.into_iter().map(|(control, node)| {
        let (token, id) = (admin.token.clone(), model.clone());
        let call: Call = Box::pin(async move {
            let outcome = command::unload(&control, token.as_ref(), &id).await;
            (node, outcome)
        });
        call
    });
    let calls = calls.collect();
    Orders { admin, model, calls, left }.answer().await
}
