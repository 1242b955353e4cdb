//! Orders from this gateway to a neuron's control port: one call, one connection, each within its bound.

use std::time::Duration;

use control::proto::control_client::ControlClient;
use control::proto::{self};
use control::{error_from_status, inspection_from_proto, intent_order_to_proto, node_status_from_proto};
use service::program::first_cause;
use service::token::Token;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};
use words::{Code, Error, Inspection, IntentOrder, ModelId, NodeStatus, RolloutId};

/// Longest time to connect.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// Longest time for an order to be on the neuron's disk and published.
const ORDER_MAX: Duration = Duration::from_secs(10);

/// Longest time for a load or an unload that is watched; it goes on without its watcher.
const MODEL_MAX: Duration = Duration::from_secs(2 * 3600);

/// Puts the shared token on a request.
pub(crate) fn with_token<T>(token: Option<&Token>, message: T) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(bearer) = token.and_then(|token| MetadataValue::try_from(token.bearer()).ok()) {
        request.metadata_mut().insert("authorization", bearer);
    }
    request
}

/// Connects to a control port.
///
/// # Errors
/// The transport's status.
pub(crate) async fn dial(control_address: &str) -> Result<ControlClient<Channel>, Status> {
    let endpoint = Endpoint::from_shared(format!("http://{control_address}"))
        .map_err(|error| Status::invalid_argument(error.to_string()))?
        .connect_timeout(CONNECT_MAX)
        .tcp_nodelay(true);
    let channel = endpoint.connect().await.map_err(|error| Status::unavailable(first_cause(&error)))?;
    Ok(ControlClient::new(channel))
}

fn read(status: Option<proto::NodeStatus>) -> Result<NodeStatus, Error> {
    let status = status.ok_or_else(|| Error::new(Code::UpstreamFailed, "the worker answered without its status"))?;
    node_status_from_proto(status).map_err(Error::internal)
}

/// Runs one call within [`ORDER_MAX`].
async fn call<T>(work: impl Future<Output = Result<T, Status>>) -> Result<T, Error> {
    call_within(ORDER_MAX, work).await
}

async fn call_within<T>(most: Duration, work: impl Future<Output = Result<T, Status>>) -> Result<T, Error> {
    match tokio::time::timeout(most, work).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(status)) => Err(error_from_status(&status)),
        Err(_) => Err(Error::new(Code::UpstreamTimeout, "the worker's control port did not answer in time")),
    }
}

/// Orders an intent; returns the status that the neuron published of it.
///
/// # Errors
/// The neuron's own refusal (`Conflict` for another epoch), or `UpstreamFailed` and `UpstreamTimeout`; after those
/// two the order may or may not have been taken, which the next status says.
pub(crate) async fn set_intent(
    control_address: &str,
    token: Option<&Token>,
    order: &IntentOrder,
) -> Result<NodeStatus, Error> {
    let request = with_token(token, intent_order_to_proto(order));
    let answer = call(async { dial(control_address).await?.set_intent(request).await }).await?;
    read(answer.into_inner().status)
}

/// Opens a node that a rollout holds, or keeps holding it for `prolong`.
///
/// # Errors
/// As [`set_intent`].
pub(crate) async fn release_hold(
    control_address: &str,
    token: Option<&Token>,
    rollout: &RolloutId,
    lease_revision: u64,
    prolong: Option<Duration>,
) -> Result<NodeStatus, Error> {
    let message = proto::ReleaseHoldRequest {
        rollout_id: rollout.to_string(),
        lease_revision,
        prolong_ms: prolong.map(|span| span.as_millis() as u64),
    };
    let request = with_token(token, message);
    let answer = call(async { dial(control_address).await?.release_hold(request).await }).await?;
    read(answer.into_inner().status)
}

/// Reads the neuron's status of now.
///
/// # Errors
/// `UpstreamFailed` or `UpstreamTimeout`.
pub(crate) async fn status(control_address: &str, token: Option<&Token>) -> Result<NodeStatus, Error> {
    let request = with_token(token, proto::ListModelsRequest {});
    let answer = call(async { dial(control_address).await?.list_models(request).await }).await?;
    read(answer.into_inner().status)
}

/// Has the neuron fetch a model's files; the stream tells how far it is, and stops the download when it is dropped.
///
/// # Errors
/// The neuron's refusal, `UpstreamFailed` or `UpstreamTimeout`.
pub(crate) async fn pull(
    control_address: &str,
    token: Option<&Token>,
    model: String,
) -> Result<Streaming<proto::PullProgress>, Error> {
    let request = with_token(token, proto::PullModelRequest { model });
    let answer = call(async { dial(control_address).await?.pull_model(request).await }).await?;
    Ok(answer.into_inner())
}

/// Which requests a cancellation means.
pub(crate) use control::proto::cancel_requests_request::Which;

/// Has the neuron end running requests; returns how many that were.
///
/// # Errors
/// The neuron's refusal, `UpstreamFailed` or `UpstreamTimeout`.
pub(crate) async fn cancel(
    control_address: &str,
    token: Option<&Token>,
    which: Which,
) -> Result<proto::CancelRequestsResponse, Error> {
    let request = with_token(token, proto::CancelRequestsRequest { which: Some(which) });
    let answer = call(async { dial(control_address).await?.cancel_requests(request).await }).await?;
    Ok(answer.into_inner())
}

/// Reads a log of the neuron; the stream ends when it is dropped, or with what is there.
///
/// # Errors
/// The neuron's refusal, `UpstreamFailed` or `UpstreamTimeout`.
pub(crate) async fn logs(
    control_address: &str,
    token: Option<&Token>,
    wanted: proto::ModelLogsRequest,
) -> Result<Streaming<proto::LogLines>, Error> {
    let request = with_token(token, wanted);
    let answer = call(async { dial(control_address).await?.model_logs(request).await }).await?;
    Ok(answer.into_inner())
}

/// Has the neuron's inspector look.
///
/// # Errors
/// The neuron's refusal, `UpstreamFailed` or `UpstreamTimeout`.
pub(crate) async fn inspect(control_address: &str, token: Option<&Token>) -> Result<Inspection, Error> {
    let request = with_token(token, proto::GetLifecycleRequest {});
    let answer = call(async { dial(control_address).await?.get_lifecycle(request).await }).await?;
    inspection_from_proto(answer.into_inner()).map_err(Error::internal)
}

/// Loads a model as the neuron's configuration says, or joins its load; returns when it is ready.
///
/// # Errors
/// The neuron's refusal, `UpstreamFailed` or `UpstreamTimeout`.
pub(crate) async fn load(
    control_address: &str,
    token: Option<&Token>,
    model: &ModelId,
    make_room: bool,
) -> Result<(), Error> {
    let message = proto::LoadModelRequest { model_id: model.to_string(), make_room, ..Default::default() };
    let request = with_token(token, message);
    call_within(MODEL_MAX, async { dial(control_address).await?.load_model(request).await }).await.map(drop)
}

/// Unloads a model; returns when its memory is free.
///
/// # Errors
/// As [`load`].
pub(crate) async fn unload(control_address: &str, token: Option<&Token>, model: &ModelId) -> Result<(), Error> {
    let request = with_token(token, proto::UnloadModelRequest { model_id: model.to_string() });
    call_within(MODEL_MAX, async { dial(control_address).await?.unload_model(request).await }).await.map(drop)
}
