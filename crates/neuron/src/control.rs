//! The control port: gRPC for gateways, probes and metrics, from second 0 to the exit.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use control::proto;
use control::proto::control_server::{Control, ControlServer};
use control::{
    inspection_to_proto, intent_order_from_proto, model_status_to_proto, node_status_to_proto, status_from_error,
};
use futures_util::{Stream, StreamExt};
use tokio::sync::{mpsc, watch};
use tonic::{Request, Response, Status, Streaming};
use wire::models::LoadRequest;
use words::{Code, Error, GatewayId, Intent, ModelId, NodeState, RolloutId};

use crate::compat;
use crate::data::{HttpError, spec_from_request};
use crate::fetch::Downloads;
use crate::inspect::Inspector;
use crate::life::LifeHandle;
use crate::metrics::Metrics;
use crate::models::Models;
use crate::options::Options;
use crate::publisher::{Publisher, intent_text, state_name};
use crate::sessions::{Session, Sessions};
use crate::streams::{Asked, Streams, Which};
use crate::turns::Turns;
use crate::{logs, pull};

/// A status goes out at least this often.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// A gateway pings each second; one that was silent for this long has no session any more.
const SILENT_MAX: Duration = Duration::from_secs(4);
/// Statuses that wait for a gateway that reads slowly; one that lets them pile up is cut off.
const STATUS_QUEUE: usize = 8;
/// Most requests that a cancellation names in its answer; it counts them all.
const CANCELLED_TOLD_MAX: usize = 1000;
/// Most bytes of one control message.
const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// The control service.
#[derive(Clone)]
pub(crate) struct ControlPlane {
    pub(crate) publisher: Publisher,
    pub(crate) sessions: Sessions,
    pub(crate) models: Models,
    pub(crate) streams: Streams,
    pub(crate) turns: Turns,
    pub(crate) inspector: Inspector,
    pub(crate) life: LifeHandle,
    pub(crate) downloads: Downloads,
    pub(crate) options: Arc<Options>,
    pub(crate) token: Option<service::token::Token>,
    pub(crate) registry: service::metrics::Registry,
    pub(crate) metrics: Metrics,
}

impl ControlPlane {
    fn authorise<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let shown = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        self.allow(shown).map_err(|error| status_from_error(&error))
    }

    fn allow(&self, shown: Option<&str>) -> Result<(), Error> {
        match (&self.token, shown.and_then(|value| value.strip_prefix("Bearer "))) {
            (None, _) => Ok(()),
            (Some(token), Some(shown)) if token.matches(shown) => Ok(()),
            (Some(_), _) => Err(Error::new(Code::Unauthorized, "the control port needs the shared token")),
        }
    }
}

type NodeStream = Pin<Box<dyn Stream<Item = Result<proto::NodeMessage, Status>> + Send>>;

fn status_message(status: &words::NodeStatus) -> proto::NodeMessage {
    proto::NodeMessage { message: Some(proto::node_message::Message::Status(node_status_to_proto(status))) }
}

#[tonic::async_trait]
impl Control for ControlPlane {
    type AttachStream = NodeStream;
    type PullModelStream = pull::PullStream;
    type ModelLogsStream = logs::LogStream;

    async fn attach(&self, request: Request<Streaming<proto::GatewayMessage>>) -> Result<Response<NodeStream>, Status> {
        self.authorise(&request)?;
        let mut inbound = request.into_inner();
        let hello = tokio::time::timeout(HEARTBEAT * 5, inbound.message()).await;
        let hello = hello.map_err(|_| Status::deadline_exceeded("no hello came"))??;
        let Some(proto::gateway_message::Message::Hello(hello)) = hello.and_then(|message| message.message) else {
            return Err(Status::invalid_argument("the first message must be a hello"));
        };
        let gateway = GatewayId::new(hello.gateway_id).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let session = Session::attach(gateway, &self.sessions, &self.publisher);
        let (out, receiver) = mpsc::channel(STATUS_QUEUE);
        tokio::spawn(speak(session, inbound, self.publisher.watch(), out));
        Ok(Response::new(tokio_stream::wrappers::ReceiverStream::new(receiver).boxed()))
    }

    async fn list_models(
        &self,
        request: Request<proto::ListModelsRequest>,
    ) -> Result<Response<proto::ListModelsResponse>, Status> {
        self.authorise(&request)?;
        let status = Some(node_status_to_proto(&self.publisher.snapshot()));
        Ok(Response::new(proto::ListModelsResponse { status }))
    }

    async fn load_model(
        &self,
        request: Request<proto::LoadModelRequest>,
    ) -> Result<Response<proto::LoadModelResponse>, Status> {
        self.authorise(&request)?;
        let message = request.into_inner();
        let given = |text: String| (!text.is_empty()).then_some(text);
        let request = LoadRequest {
            model_id: message.model_id,
            harness: given(message.harness),
            quant: given(message.quant),
            device: given(message.device),
            path: given(message.path),
            make_room: Some(message.make_room),
        };
        let spec = spec_from_request(&self.options, request).map_err(|error| status_from_error(&error))?;
        let id = spec.model_id.clone();
        self.models.load(spec, message.make_room).await.map_err(|failure| status_from_error(&failure.error))?;
        let model = self.models.status(&id).as_ref().map(model_status_to_proto);
        Ok(Response::new(proto::LoadModelResponse { model }))
    }

    async fn pull_model(
        &self,
        request: Request<proto::PullModelRequest>,
    ) -> Result<Response<pull::PullStream>, Status> {
        self.authorise(&request)?;
        let begun = pull::begin(&self.downloads, &self.options, &request.into_inner().model);
        begun.map(Response::new).map_err(|error| status_from_error(&error))
    }

    async fn unload_model(
        &self,
        request: Request<proto::UnloadModelRequest>,
    ) -> Result<Response<proto::UnloadModelResponse>, Status> {
        self.authorise(&request)?;
        let id = ModelId::new(request.into_inner().model_id)
            .map_err(|error| status_from_error(&Error::invalid("model_id", error.to_string())))?;
        self.models.unload(&id, Some(self.options.drain.budget())).await.map_err(|error| status_from_error(&error))?;
        Ok(Response::new(proto::UnloadModelResponse {}))
    }

    async fn set_intent(
        &self,
        request: Request<proto::SetIntentRequest>,
    ) -> Result<Response<proto::SetIntentResponse>, Status> {
        self.authorise(&request)?;
        let order = intent_order_from_proto(request.into_inner()).map_err(|error| status_from_error(&error))?;
        let status = self.life.order(order).await.map_err(|error| status_from_error(&error))?;
        Ok(Response::new(proto::SetIntentResponse { status: Some(node_status_to_proto(&status)) }))
    }

    async fn release_hold(
        &self,
        request: Request<proto::ReleaseHoldRequest>,
    ) -> Result<Response<proto::ReleaseHoldResponse>, Status> {
        self.authorise(&request)?;
        let message = request.into_inner();
        let rollout = RolloutId::new(message.rollout_id)
            .map_err(|error| status_from_error(&Error::invalid("rollout_id", error.to_string())))?;
        let prolong = message.prolong_ms.map(Duration::from_millis);
        let released = self.life.release(rollout, message.lease_revision, prolong).await;
        let status = released.map_err(|error| status_from_error(&error))?;
        Ok(Response::new(proto::ReleaseHoldResponse { status: Some(node_status_to_proto(&status)) }))
    }

    async fn cancel_requests(
        &self,
        request: Request<proto::CancelRequestsRequest>,
    ) -> Result<Response<proto::CancelRequestsResponse>, Status> {
        self.authorise(&request)?;
        let which = which(request.into_inner()).map_err(|error| status_from_error(&error))?;
        let ended = self.streams.cancel(&which);
        if !ended.is_empty() {
            tracing::info!(?which, count = ended.len(), "cancelled");
        }
        let count = ended.len() as u32;
        let running = |asked: Asked| proto::RunningRequest {
            request_id: asked.request_id,
            completion_id: asked.completion_id,
            model_id: asked.model.to_string(),
        };
        let requests = ended.into_iter().take(CANCELLED_TOLD_MAX).map(running).collect();
        Ok(Response::new(proto::CancelRequestsResponse { count, requests }))
    }

    async fn get_lifecycle(
        &self,
        request: Request<proto::GetLifecycleRequest>,
    ) -> Result<Response<proto::GetLifecycleResponse>, Status> {
        self.authorise(&request)?;
        Ok(Response::new(inspection_to_proto(&self.inspector.look().await)))
    }

    async fn model_logs(&self, request: Request<proto::ModelLogsRequest>) -> Result<Response<logs::LogStream>, Status> {
        self.authorise(&request)?;
        let begun = logs::begin(&self.turns, &self.publisher, &request.into_inner());
        begun.map(Response::new).map_err(|error| status_from_error(&error))
    }
}

/// Reads which requests are meant.
///
/// # Errors
/// `InvalidRequest` when none are, or the name is none.
fn which(message: proto::CancelRequestsRequest) -> Result<Which, Error> {
    use proto::cancel_requests_request::Which as Named;
    let bad = |field: &str, error: words::IdError| Error::invalid(field, error.to_string());
    match message.which {
        Some(Named::RequestId(id)) if !id.is_empty() => Ok(Which::Id(id)),
        Some(Named::ModelId(id)) => ModelId::new(id).map(Which::Model).map_err(|error| bad("model_id", error)),
        Some(Named::GatewayId(id)) => GatewayId::new(id).map(Which::Gateway).map_err(|error| bad("gateway_id", error)),
        _ => Err(Error::invalid("which", "say which requests: a request_id, a model_id or a gateway_id")),
    }
}

/// Speaks with one gateway until either side leaves.
async fn speak(
    session: Session,
    mut inbound: Streaming<proto::GatewayMessage>,
    mut status: watch::Receiver<words::NodeStatus>,
    out: mpsc::Sender<Result<proto::NodeMessage, Status>>,
) {
    use proto::gateway_message::Message;
    let mut heartbeat = tokio::time::interval(HEARTBEAT);
    heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut changes = true;
    let mut silent_at = tokio::time::Instant::now() + SILENT_MAX;
    loop {
        let reply = tokio::select! {
            message = inbound.message() => {
                silent_at = tokio::time::Instant::now() + SILENT_MAX;
                session.heard();
                let Ok(Some(message)) = message else { return };
                match message.message {
                    Some(Message::Ack(ack)) => {
                        session.ack(ack.generation);
                        continue;
                    }
                    Some(Message::Ping(ping)) => {
                        let pong = proto::node_message::Message::Pong(proto::Pong { sequence: ping.sequence });
                        proto::NodeMessage { message: Some(pong) }
                    }
                    _ => continue,
                }
            }
            () = tokio::time::sleep_until(silent_at) => {
                return tracing::warn!(gateway = %session.gateway, "the gateway is silent; its session ends");
            }
            changed = status.changed(), if changes => {
                changes = changed.is_ok();
                status_message(&status.borrow_and_update())
            }
            _ = heartbeat.tick() => status_message(&status.borrow_and_update()),
        };
        // A gateway that does not read is no gateway: its session ends rather than hold ours.
        if tokio::time::timeout(HEARTBEAT * 2, out.send(Ok(reply))).await.is_ok_and(|sent| sent.is_ok()) {
            continue;
        }
        return;
    }
}

/// Makes the routes of the control port: gRPC, probes, metrics.
pub(crate) fn router(plane: ControlPlane) -> Router {
    let grpc = ControlServer::new(plane.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let probes = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/api/lifecycle", get(lifecycle))
        .with_state(plane);
    tonic::service::Routes::new(grpc).into_axum_router().merge(probes)
}

async fn readyz(State(plane): State<ControlPlane>) -> impl IntoResponse {
    let status = plane.publisher.snapshot();
    let open = status.state == NodeState::Ready && status.intent == Intent::None;
    let code = if open { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let activation = format!("default models {}/{}", status.activation.done, status.activation.total);
    let words = [state_name(status.state).to_string(), intent_text(status.intent), activation];
    let told: Vec<String> = words.into_iter().filter(|words| !words.is_empty()).collect();
    (code, told.join(", ") + "\n")
}

/// `GET /api/lifecycle`: the inspector's snapshot, under the token of the port's orders, for it names commands and paths.
async fn lifecycle(
    State(plane): State<ControlPlane>,
    headers: header::HeaderMap,
) -> Result<axum::Json<words::Inspection>, HttpError> {
    plane.allow(headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()))?;
    Ok(axum::Json(plane.inspector.look().await))
}

/// What a scrape may ask for.
#[derive(Debug, serde::Deserialize)]
struct Scrape {
    /// Another program whose names are wanted.
    compat: Option<String>,
}

async fn metrics(
    State(plane): State<ControlPlane>,
    Query(scrape): Query<Scrape>,
) -> Result<impl IntoResponse, HttpError> {
    // Loads and state are read at the scrape, so that they are never older than it.
    plane.models.loads();
    plane.metrics.show_status(&plane.publisher.snapshot());
    let text = match scrape.compat.as_deref() {
        None => plane.registry.render(),
        Some("vllm") => compat::vllm(&plane.registry),
        Some(other) => {
            let message = format!("'{other}' names no other program; 'vllm' does, and without it the names are ours");
            return Err(Error::invalid("compat", message).into());
        }
    };
    Ok(([(header::CONTENT_TYPE, service::metrics::TEXT_FORMAT)], text))
}
