//! What operators ask of one worker through the gateway: the order is the worker's to take or to refuse.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use fleet::NodeView;
use serde::Deserialize;
use service::token::authorise;
use words::{Code, Error, HandoffPolicy, Incarnation, Intent, IntentOrder, NodeStatus};

use crate::admin::{Admin, Refused};
use crate::{command, rollout};

/// Largest body of an order.
const BODY_BYTES_MAX: usize = 16 << 10;
/// Longest time for it to arrive.
const BODY_MAX: Duration = Duration::from_secs(10);

/// The body of `POST /api/nodes/{node}/drain` and `/restart`; the others have none.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Details {
    /// Seconds until what still runs is cut; the worker's own when absent.
    deadline_s: Option<f64>,
    /// When running requests are handed over.
    handoff: HandoffPolicy,
    /// The worker's `[upgrade.NAME]` to run on a restart.
    upgrade: Option<String>,
}

/// Reads a small JSON body; none at all is an empty object.
///
/// # Errors
/// `InvalidRequest`, `BodyTooLarge`, `RequestTimeout`.
pub(crate) async fn read_json<T: serde::de::DeserializeOwned>(body: Body) -> Result<T, Error> {
    let bytes = service::body::read(body, BODY_BYTES_MAX, BODY_MAX).await?;
    let bytes: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
    serde_json::from_slice(bytes)
        .map_err(|error| Error::new(Code::InvalidRequest, format!("the request body does not fit: {error}")))
}

/// `POST /api/nodes/{node}/{action}`
pub(crate) async fn order(
    State(admin): State<Arc<Admin>>,
    Path((node, action)): Path<(String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<serde_json::Value>, Refused> {
    authorise(admin.token.as_ref(), &headers)?;
    let intent = match action.as_str() {
        "drain" => Intent::Drain,
        "cordon" => Intent::Cordon,
        "undrain" | "uncordon" => Intent::None,
        "restart" => Intent::Restart,
        _ => {
            let message = format!("'{action}' is no order; there are drain, undrain, cordon, uncordon and restart");
            return Err(Error::new(Code::RouteNotFound, message).into());
        }
    };
    let details: Details = read_json(body).await?;
    let deadline = details.deadline_s.map(|seconds| rollout::span("deadline_s", seconds));
    let (control, known) = find(&admin, &node)?;
    let order = IntentOrder {
        seen: known.epoch,
        intent,
        incarnation: (intent == Intent::Restart).then_some(known.incarnation),
        deadline: deadline.transpose()?,
        handoff: details.handoff,
        rollout: None,
        upgrade: details.upgrade,
    };
    let (incarnation, status) = give(&admin, &control, order, known.incarnation).await?;
    tracing::info!(node = %status.node, action, epoch = status.epoch.0, "ordered");
    Ok(Json(serde_json::json!({ "incarnation": incarnation, "status": status })))
}

/// Gives the order. The view may be a moment old, so a conflict is looked at once: an order for the node is given
/// again with the epoch of now, one for a life only while that life lasts.
async fn give(
    admin: &Admin,
    control: &str,
    order: IntentOrder,
    incarnation: Incarnation,
) -> Result<(Incarnation, NodeStatus), Error> {
    let token = admin.token.as_ref();
    let refused = match command::set_intent(control, token, &order).await {
        Ok(status) => return Ok((status.incarnation, status)),
        Err(error) if error.code() == Code::Conflict => error,
        Err(error) => return Err(error),
    };
    let now = command::status(control, token).await?;
    let same_life = now.incarnation == incarnation;
    if now.epoch == order.seen || (order.intent == Intent::Restart && !same_life) {
        return Err(refused);
    }
    let order = IntentOrder { seen: now.epoch, ..order };
    let status = command::set_intent(control, token, &order).await?;
    Ok((status.incarnation, status))
}

/// Finds a worker by its name or its control address.
///
/// # Errors
/// `RouteNotFound` that names those known; `NoReplica` for one that was never heard from; `Conflict` for a name that
/// two live processes use.
pub(crate) fn find(admin: &Admin, name: &str) -> Result<(String, NodeStatus), Error> {
    let view = admin.fleet.view();
    let named = |node: &NodeView| {
        node.control_address == name || node.status.as_ref().is_some_and(|status| status.node.as_str() == name)
    };
    let Some((_, node)) = view.nodes().find(|(_, node)| named(node)) else {
        let known = view.nodes().map(|(_, node)| match &node.status {
            Some(status) => format!("{} ({})", status.node, node.control_address),
            None => node.control_address.clone(),
        });
        let known = known.collect::<Vec<_>>().join(", ");
        let message = format!("there is no worker '{name}' here; this gateway knows {known}");
        return Err(Error::new(Code::RouteNotFound, message));
    };
    let Some(status) = &node.status else {
        let why = node.problem.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        let message = format!("the worker at {} was never heard from{why}", node.control_address);
        return Err(Error::new(Code::NoReplica, message));
    };
    if node.conflicted && node.control_address != name {
        let message = format!("two live processes use the name '{name}'; say the control address");
        return Err(Error::new(Code::Conflict, message));
    }
    Ok((node.control_address.clone(), status.clone()))
}
