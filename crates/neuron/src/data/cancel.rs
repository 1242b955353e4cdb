//! `POST /requests/{id}/cancel`: a running request ends with what it has.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use words::{Code, Error};

use super::manage::authorise;
use super::{DataPlane, HttpError};
use crate::streams::Which;

/// The id is the request's `x-request-id` or its completion's. Two requests of one `x-request-id` both end.
pub(super) async fn cancel(
    State(plane): State<Arc<DataPlane>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Json<serde_json::Value>, HttpError> {
    authorise(&plane, &headers)?;
    let ended = plane.streams.cancel(&Which::Id(id.clone()));
    if ended.is_empty() {
        let message = format!("no request '{id}' runs here; its x-request-id and the answer's id name it");
        return Err(Error::new(Code::RouteNotFound, message).at("id").into());
    }
    tracing::info!(id, count = ended.len(), "cancelled");
    Ok(Json(serde_json::json!({ "id": id, "cancelled": ended.len() })))
}
