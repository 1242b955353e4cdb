//! Listing, loading and unloading models.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::http::header::HOST;
use serde::de::DeserializeOwned;
use service::token;
use wire::models::{Endpoint, LoadRequest, Model, ModelList, UnloadRequest};
use words::{Code, Error, ModelId, ModelState, ModelStatus};

use super::{DataPlane, HttpError};
use crate::activation::spec_of;
use crate::data::admission::read_body;
use crate::harness::{DEFAULT_HARNESS, LoadSpec};
use crate::options::{ModelEntry, Options};

type Plane = State<Arc<DataPlane>>;

pub(super) async fn list_openai(State(plane): Plane) -> Json<ModelList> {
    Json(ModelList::new(plane.models.statuses().iter().filter(|status| shown(status)).map(Model::from).collect()))
}

pub(super) async fn get_openai(State(plane): Plane, Path(id): Path<String>) -> Result<Json<Model>, HttpError> {
    let status = find(&plane, &id, shown)?;
    Ok(Json(Model::from(&status)))
}

/// Says whether a request for a model is answered: one of the catalogue wherever it is just now.
fn shown(status: &ModelStatus) -> bool {
    status.state == ModelState::Ready || status.card.on_demand
}

fn find(plane: &DataPlane, id: &str, wanted: impl Fn(&ModelStatus) -> bool) -> Result<ModelStatus, Error> {
    let found = ModelId::new(id).ok().and_then(|id| plane.models.status(&plane.models.resolve(&id)));
    found.filter(wanted).ok_or_else(|| {
        let message = format!("the model '{id}' is not on this worker; GET /models lists those that are");
        Error::new(Code::ModelNotFound, message).at("model")
    })
}

pub(super) async fn list(State(plane): Plane) -> Json<Vec<ModelStatus>> {
    let loads = plane.models.loads();
    let mut statuses = plane.models.statuses();
    for status in &mut statuses {
        if let Some(known) = loads.iter().find(|known| known.id == status.id) {
            (status.load, status.inter_token_p99_ms) = (known.load, known.p99_ms);
        }
    }
    Json(statuses)
}

/// `GET /models/{id}/endpoint`, whatever slashes the id has.
pub(super) async fn endpoint(
    State(plane): Plane,
    Path(rest): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Endpoint>, HttpError> {
    let Some(id) = rest.strip_suffix("/endpoint") else {
        let message =
            "there is nothing here; GET /models lists the models, GET /models/{id}/endpoint says where one is";
        return Err(Error::new(Code::RouteNotFound, message).into());
    };
    let here = |status: &ModelStatus| status.state != ModelState::Absent || status.card.on_demand;
    let status = find(&plane, id, here)?;
    let address = plane.publisher.snapshot().data_address;
    // Who listens on every address is where it was asked.
    let everywhere = address.parse::<SocketAddr>().is_ok_and(|address| address.ip().is_unspecified());
    let asked = headers.get(HOST).filter(|_| everywhere).and_then(|host| host.to_str().ok());
    let address = asked.unwrap_or(&address);
    Ok(Json(Endpoint { model_id: id.to_string(), url: format!("http://{address}/v1"), state: status.state }))
}

/// Checks the control token, where there is one; without one orders come from this host alone.
///
/// # Errors
/// `Unauthorized`.
pub(super) fn authorise(plane: &DataPlane, headers: &HeaderMap) -> Result<(), Error> {
    if plane.token.is_none() && !plane.options.data.bind.ip().is_loopback() {
        let message = "orders from other hosts need a token: set control.token_file";
        return Err(Error::new(Code::Unauthorized, message));
    }
    token::authorise(plane.token.as_ref(), headers)
}

async fn read_json<T: DeserializeOwned>(plane: &DataPlane, body: Body) -> Result<T, Error> {
    let bytes = read_body(plane, body).await?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::new(Code::InvalidRequest, format!("the request body does not fit: {error}")))
}

/// Makes a load from its request; what it leaves open is taken from the configured entry of that name.
pub(crate) fn spec_from_request(options: &Options, request: LoadRequest) -> Result<LoadSpec, Error> {
    let known = options.entry(&request.model_id).cloned();
    let entry = known.unwrap_or_else(|| ModelEntry { id: request.model_id, ..ModelEntry::default() });
    let harness = request.harness.or(entry.harness).unwrap_or_else(|| DEFAULT_HARNESS.to_string());
    spec_of(&ModelEntry {
        harness: Some(harness),
        path: request.path.map(PathBuf::from).or(entry.path),
        quant: request.quant.or(entry.quant),
        device: request.device.or(entry.device),
        ..entry
    })
}

pub(super) async fn load(
    State(plane): Plane,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Option<ModelStatus>>, HttpError> {
    authorise(&plane, &headers)?;
    let request: LoadRequest = read_json(&plane, body).await?;
    let make_room = request.make_room.unwrap_or(true);
    let spec = spec_from_request(&plane.options, request)?;
    let id = spec.model_id.clone();
    plane.models.load(spec, make_room).await.map_err(|failure| failure.error)?;
    Ok(Json(plane.models.status(&id)))
}

pub(super) async fn unload(
    State(plane): Plane,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<serde_json::Value>, HttpError> {
    authorise(&plane, &headers)?;
    let request: UnloadRequest = read_json(&plane, body).await?;
    let id = ModelId::new(request.model_id).map_err(|error| Error::invalid("model_id", error.to_string()))?;
    let cut = plane.models.unload(&id, Some(plane.options.drain.budget())).await?;
    Ok(Json(serde_json::json!({ "model_id": id, "state": ModelState::Absent, "streams_cut": cut })))
}
