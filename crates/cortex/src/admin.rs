//! The admin port: metrics, probes, and the fleet's state as JSON.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use service::clock::Clock;
use service::metrics::Registry;

use crate::fleet_task::Fleet;
use crate::gateway::Readiness;

/// What the handlers need.
pub(crate) struct Admin {
    pub(crate) fleet: Fleet,
    pub(crate) registry: Registry,
    pub(crate) readiness: Readiness,
    pub(crate) clock: Clock,
    pub(crate) gateway: words::GatewayId,
}

/// Makes the routes.
pub(crate) fn router(admin: Arc<Admin>) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/api/status", get(status))
        .with_state(admin)
}

async fn readyz(State(admin): State<Arc<Admin>>) -> impl IntoResponse {
    admin.readiness.probe()
}

async fn metrics(State(admin): State<Arc<Admin>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, service::metrics::TEXT_FORMAT)], admin.registry.render())
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
                "heard_s_ago": node.status.as_ref().map(|_| now.since(node.heard_at).as_secs_f64()),
                "status": node.status,
            })
        })
        .collect();
    Json(serde_json::json!({ "gateway": admin.gateway, "ready": admin.readiness.is_ready(), "nodes": nodes }))
}
