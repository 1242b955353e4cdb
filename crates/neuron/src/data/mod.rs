//! The data plane: OpenAI's API and the model list, over HTTP.

mod account;
mod admission;
mod answer;
mod cancel;
mod chat;
mod completions;
mod embeddings;
mod errors;
mod forward;
mod manage;
mod outgoing;
mod output;
mod parts;
mod stack;
mod telling;
mod texts;
mod tokens;

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::Method;
use axum::routing::{get, post};
use wire::Endpoint;
use wire::chat::ChatRequest;
use wire::embeddings::EmbeddingRequest;
use wire::text::CompletionRequest;
use words::{Code, Error};

use crate::metrics::Metrics;
use crate::models::Models;
use crate::options::Options;
use crate::publisher::Publisher;
use crate::stopped::StopTeller;
use crate::streams::Streams;
pub(crate) use errors::HttpError;
pub(crate) use manage::spec_from_request;
use service::clock::Clock;
use service::gate::Gate;
use service::traces::Traces;
pub(crate) use stack::stack;
pub(crate) use texts::Texts;

/// What handlers need.
pub(crate) struct DataPlane {
    pub(crate) models: Models,
    pub(crate) gate: Gate,
    pub(crate) streams: Streams,
    pub(crate) texts: Texts,
    /// Where requests that were cancelled are told of.
    pub(crate) stopped: StopTeller,
    pub(crate) publisher: Publisher,
    pub(crate) metrics: Metrics,
    pub(crate) traces: Traces,
    pub(crate) clock: Clock,
    pub(crate) options: Options,
    pub(crate) token: Option<service::token::Token>,
}

/// Makes the routes.
pub(crate) fn router(plane: Arc<DataPlane>) -> Router {
    Router::new()
        .route(Endpoint::Chat.path(), post(admission::answer::<ChatRequest>))
        .route(Endpoint::Completions.path(), post(admission::answer::<CompletionRequest>))
        .route(Endpoint::Embeddings.path(), post(admission::answer::<EmbeddingRequest>))
        .route(Endpoint::Tokenize.path(), post(tokens::tokenize))
        .route(Endpoint::Detokenize.path(), post(tokens::detokenize))
        .route("/v1/models", get(manage::list_openai))
        .route("/v1/models/{*id}", get(manage::get_openai))
        .route("/models", get(manage::list))
        .route("/models/load", post(manage::load))
        .route("/models/unload", post(manage::unload))
        .route("/models/{*rest}", get(manage::endpoint))
        .route("/requests/{id}/cancel", post(cancel::cancel))
        .route("/health", get(health))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        // Bodies are read with our own bound and deadline.
        .layer(DefaultBodyLimit::disable())
        .with_state(plane)
}

async fn health(State(plane): State<Arc<DataPlane>>) -> axum::Json<serde_json::Value> {
    let status = plane.publisher.snapshot();
    axum::Json(serde_json::json!({ "node": status.node, "status": status.state, "in_flight": plane.gate.in_flight() }))
}

async fn no_route(uri: axum::http::Uri) -> HttpError {
    Error::new(Code::RouteNotFound, format!("there is nothing at {}; this server has {}", uri.path(), Endpoint::list()))
        .into()
}

async fn no_method(method: Method, uri: axum::http::Uri) -> HttpError {
    Error::new(Code::MethodNotAllowed, format!("{} does not take {method}", uri.path())).into()
}
