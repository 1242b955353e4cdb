//! The way to an external engine: one pooled client, and what is changed of a request on it.

use std::ops::ControlFlow;
use std::time::Duration;

use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderValue, Method, Request, Response, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Map, Value, json};
use tokio::sync::watch;
use wire::{Endpoint, foreign};
use words::{Code, Error};

use super::{Plan, Queue, Watched};

/// The engine is on this machine: it takes a connection at once or not at all.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// Connections without a request are used again for so long: servers close theirs soon, and would break a request.
const IDLE_MAX: Duration = Duration::from_secs(2);
/// Most bytes of an engine's refusal.
const REFUSAL_BYTES_MAX: usize = 64 << 10;
/// Longest wait for the body of a refusal.
const REFUSAL_MAX: Duration = Duration::from_secs(5);
/// Most bytes of an answer that is no stream.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// The body of an engine's answer.
pub(crate) type Incoming = axum::body::Body;

/// The client of all external engines; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Http {
    client: Client<HttpConnector, Full<Bytes>>,
}

impl Http {
    pub(crate) fn new() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_MAX));
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new()).pool_idle_timeout(IDLE_MAX).build(connector);
        Http { client }
    }

    /// Says whether a path answers 200. The caller bounds the time.
    pub(super) async fn is_ok(&self, port: u16, path: &str) -> bool {
        let Ok(uri) = format!("http://127.0.0.1:{port}{path}").parse() else { return false };
        let answer = self.client.get(uri).await;
        let Ok(answer) = answer else { return false };
        let ok = answer.status() == axum::http::StatusCode::OK;
        // Read to its end, so that the connection can be used again.
        ok && Limited::new(answer.into_body(), REFUSAL_BYTES_MAX).collect().await.is_ok()
    }
}

/// The way to one engine.
#[derive(Clone, Debug)]
pub(crate) struct Upstream {
    pub(crate) plan: Plan,
    pub(crate) queue: Queue,
    pub(crate) pid: u32,
    pub(crate) port: u16,
    pub(crate) watched: watch::Receiver<Watched>,
    pub(crate) http: Http,
}

fn failed(message: &'static str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(Code::UpstreamFailed, message).because(source)
}

impl Upstream {
    /// Returns a client's body as the engine gets it: as it is, but for the model's name where that differs.
    ///
    /// # Errors
    /// `InvalidRequest` when it is no object.
    pub(crate) fn body(&self, body: Bytes) -> Result<Bytes, Error> {
        let Some(name) = &self.plan.options.model else { return Ok(body) };
        let no_object =
            |error: serde_json::Error| Error::new(Code::InvalidRequest, format!("the body is no object: {error}"));
        let mut map: Map<String, Value> = serde_json::from_slice(&body).map_err(no_object)?;
        map.insert("model".into(), Value::String(name.clone()));
        Ok(serde_json::to_vec(&map).map_err(Error::internal)?.into())
    }

    /// Asks, and waits for the head of a good answer. The caller bounds the time.
    ///
    /// # Errors
    /// What the engine's refusal means; `UpstreamFailed` when it can't be reached or breaks off.
    pub(crate) async fn post(&self, endpoint: Endpoint, body: Bytes, headers: HeaderMap) -> Result<Incoming, Error> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        let uri = format!("http://127.0.0.1:{}{}", self.port, endpoint.path());
        *request.uri_mut() = uri.parse().map_err(Error::internal)?;
        *request.headers_mut() = headers;
        request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let answer = self.http.client.request(request).await.map_err(|error| match error.is_connect() {
            true => failed("the model's engine could not be reached", error),
            false => failed("the model's engine broke off before its answer", error),
        })?;
        if !answer.status().is_success() {
            return Err(refused(answer.map(Incoming::new)).await);
        }
        Ok(Incoming::new(answer.into_body()))
    }

    /// Asks a question of the node's own; `taken` sees the answer's text. What it answers of its first endpoint is asked.
    ///
    /// # Errors
    /// As [`Upstream::post`], and `UpstreamTimeout` past the engine's health deadline.
    pub(crate) async fn ask(
        &self,
        question: &str,
        max_tokens: usize,
        mut taken: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        let endpoint = self.plan.options.endpoints.first().map_or(Endpoint::Chat, |name| Endpoint::from(*name));
        let model = self.plan.options.model.as_deref().unwrap_or(self.plan.id.as_str());
        let body = match endpoint {
            Endpoint::Chat => {
                let messages = json!([{ "role": "user", "content": question }]);
                json!({ "model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0 })
            }
            Endpoint::Completions => {
                json!({ "model": model, "prompt": question, "max_tokens": max_tokens, "temperature": 0 })
            }
            Endpoint::Embeddings => json!({ "model": model, "input": question }),
            Endpoint::Tokenize => json!({ "model": model, "prompt": question }),
            Endpoint::Detokenize => json!({ "model": model, "tokens": [] }),
        };
        let whole = async {
            let answer = self.post(endpoint, body.to_string().into(), HeaderMap::new()).await?;
            whole(answer).await
        };
        let too_long =
            || Error::new(Code::UpstreamTimeout, "the model's engine did not answer a short question in time");
        let longest = self.plan.options.health_deadline();
        let answer = tokio::time::timeout(longest, whole).await.map_err(|_| too_long())??;
        let answer: Value =
            serde_json::from_slice(&answer).map_err(|error| failed("the model's engine answered no JSON", error))?;
        let choice = &answer["choices"][0];
        if let Some(text) = choice["message"]["content"].as_str().or(choice["text"].as_str()) {
            let _ = taken(text);
        }
        Ok(())
    }
}

/// Reads an answer that is no stream.
///
/// # Errors
/// `UpstreamFailed` when it breaks off or has no end.
pub(crate) async fn whole(answer: Incoming) -> Result<Bytes, Error> {
    let read = Limited::new(answer, ANSWER_BYTES_MAX).collect().await;
    Ok(read.map_err(|error| failed("the model's engine broke off its answer", error))?.to_bytes())
}

/// Reads an engine's error response.
async fn refused(answer: Response<Incoming>) -> Error {
    let status = answer.status().as_u16();
    let read = Limited::new(answer.into_body(), REFUSAL_BYTES_MAX).collect();
    let body = tokio::time::timeout(REFUSAL_MAX, read).await;
    let body = body.ok().and_then(Result::ok).map(http_body_util::Collected::to_bytes).unwrap_or_default();
    foreign::refusal(status, &body)
}
