//! The admin port: metrics, probes, and the fleet's state as JSON.

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use service::clock::Clock;
use service::metrics::Registry;
use service::token::Token;
use words::{Code, Error};

use crate::fleet_task::Fleet;
use crate::gateway::Readiness;
use crate::proxy::Flights;
use crate::{lifecycle, logs, models, operate, pull, requests};

/// What the handlers need.
pub(crate) struct Admin {
    pub(crate) fleet: Fleet,
    /// The requests that run.
    pub(crate) flights: Flights,
    pub(crate) registry: Registry,
    pub(crate) readiness: Readiness,
    pub(crate) clock: Clock,
    pub(crate) gateway: words::GatewayId,
    /// Wanted for what changes the fleet, and shown to the workers.
    pub(crate) token: Option<Token>,
}

/// An error on its way out of the admin port.
#[derive(Debug)]
pub(crate) struct Refused(Error);

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Refused(error)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let code = self.0.code().row().code;
        tracing::info!(code, error = %self.0, source = std::error::Error::source(&self.0), "admin call refused");
        let parts = wire::ErrorResponse::from(&self.0);
        let mut response = Response::new(parts.body.into());
        *response.status_mut() = StatusCode::from_u16(parts.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        for (name, value) in parts.headers {
            if let Ok(value) = HeaderValue::from_str(&value)
                && !name.starts_with(wire::private::HEADER_PREFIX)
            {
                response.headers_mut().insert(name, value);
            }
        }
        response
    }
}

/// Makes the routes.
pub(crate) fn router(admin: Arc<Admin>) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/api/status", get(status))
        .route("/api/targets", get(targets))
        .route("/api/models", get(models::list))
        .route("/api/models/load", post(models::load))
        .route("/api/models/unload", post(models::unload))
        .route("/api/lifecycle", get(lifecycle::inspect))
        .route("/api/requests", get(requests::list))
        .route("/api/requests/{id}/cancel", post(requests::cancel))
        .route("/api/models/{model}/cancel", post(requests::cancel_model))
        .route("/api/models/{model}/logs", get(logs::of_model))
        .route("/api/nodes/{node}/logs", get(logs::of_node))
        .route("/api/nodes/{node}/pull", post(pull::pull))
        .route("/api/nodes/{node}/{action}", post(operate::order))
        .fallback(nothing_there)
        .method_not_allowed_fallback(other_method)
        // Bodies are read with our own bound and deadline.
        .layer(DefaultBodyLimit::disable())
        .with_state(admin)
}

/// What answers where there is no route.
async fn nothing_there(uri: Uri) -> Refused {
    let message = format!("there is nothing at {}; deploy/README.md lists the paths of this port", uri.path());
    Error::new(Code::RouteNotFound, message).into()
}

/// What answers where a path takes other methods.
async fn other_method(method: Method, uri: Uri) -> Refused {
    Error::new(Code::MethodNotAllowed, format!("{} does not take {method}", uri.path())).into()
}

async fn readyz(State(admin): State<Arc<Admin>>) -> impl IntoResponse {
    admin.readiness.probe()
}

async fn metrics(State(admin): State<Arc<Admin>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, service::metrics::TEXT_FORMAT)], admin.registry.render())
}

/// The workers for Prometheus' discovery over HTTP.
async fn targets(State(admin): State<Arc<Admin>>) -> Json<serde_json::Value> {
    let view = admin.fleet.view();
    Json(crate::targets::targets(view.nodes().map(|(_, node)| node.control_address.as_str())))
}

/// Every configured worker: its last status, how old that is, and whether it gets requests.
async fn status(State(admin): State<Arc<Admin>>) -> Json<serde_json::Value> {
    let now = admin.clock.now();
    let view = admin.fleet.view();
    let nodes: Vec<_> = view
        .nodes()
        .map(|(_, node)| {
            serde_json::json!({
                "control": node.control_address,
                "routable": node.routable(now).is_some(),
                "conflicted": node.conflicted,
                "same_as": node.same_as.and_then(|slot| view.node(slot)).map(|first| &first.control_address),
                "problem": node.problem,
                "heard_s_ago": node.status.as_ref().map(|_| now.since(node.heard_at).as_secs_f64()),
                "status": node.status,
            })
        })
        .collect();
    Json(serde_json::json!({ "gateway": admin.gateway, "ready": admin.readiness.is_ready(), "nodes": nodes }))
}
