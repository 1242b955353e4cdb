//! The API that apps use, on bare hyper: paths, bodies, headers, CORS.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use rand::Rng;
use service::addresses::Addresses;
use service::gate::Gate;
use service::server::Peer;
use service::traces::{KeyValue, Span};
use wire::models::{Model, ModelList};
use wire::private::REQUEST_ID_HEADER;
use wire::{Endpoint, Peek, without_private_fields};
use words::{Code, Error, ModelId, ModelState, RequestId, random_name};

use crate::gateway::Readiness;
use crate::proxy::{BoxBody, Order, Pace, Relay, SharedProxy, full, respond};

// Made once: to look a name up by its text is to read the text.
const REQUEST_ID: HeaderName = HeaderName::from_static(REQUEST_ID_HEADER);
const TRACE_PARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACE_STATE: HeaderName = HeaderName::from_static("tracestate");

/// What the handlers need.
pub(crate) struct Front {
    pub(crate) proxy: SharedProxy,
    pub(crate) gate: Gate,
    pub(crate) readiness: Readiness,
    pub(crate) addresses: Addresses,
}

impl Front {
    /// Answers one request.
    pub(crate) async fn handle(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<BoxBody>, Infallible> {
        let origin = self.allowed_origin(request.headers());
        let request_id = request_id(request.headers());
        let mut response = match self.dispatch(request, &request_id).await {
            Ok(response) => response,
            Err(error) => refuse(&error, &request_id),
        };
        if let Ok(value) = HeaderValue::from_str(&request_id) {
            response.headers_mut().insert(REQUEST_ID, value);
        }
        if let Some(origin) = origin {
            response.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            response.headers_mut().insert(header::VARY, HeaderValue::from_static("origin"));
            let exposed = HeaderValue::from_static("x-request-id, retry-after");
            response.headers_mut().insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
        }
        Ok(response)
    }

    async fn dispatch(&self, request: Request<Incoming>, request_id: &str) -> Result<Response<BoxBody>, Error> {
        let path = request.uri().path();
        let wanted = match path {
            _ if Endpoint::at(path).is_some() => Method::POST,
            "/v1/models" | "/livez" | "/readyz" | "/health" => Method::GET,
            _ if path.starts_with("/v1/models/") => Method::GET,
            _ => {
                let message = format!("there is nothing at {path}; this server has {}", Endpoint::list());
                return Err(Error::new(Code::RouteNotFound, message));
            }
        };
        match request.method() {
            &Method::OPTIONS => return Ok(preflight(&wanted, request.headers())),
            method if *method == wanted || (wanted == Method::GET && *method == Method::HEAD) => {}
            method => {
                return Err(Error::new(Code::MethodNotAllowed, format!("{path} takes {wanted}, not {method}")));
            }
        }
        if let Some(endpoint) = Endpoint::at(path) {
            return self.ask(endpoint, request, request_id).await;
        }
        match path {
            "/v1/models" => Ok(json(&self.models())),
            "/livez" => Ok(Response::new(full("ok\n"))),
            "/readyz" | "/health" => Ok(self.readiness.response()),
            _ => self.model(&path["/v1/models/".len()..]),
        }
    }

    async fn ask(
        &self,
        endpoint: Endpoint,
        request: Request<Incoming>,
        request_id: &str,
    ) -> Result<Response<BoxBody>, Error> {
        let mut span = self.proxy.traces.request(request.headers(), endpoint.operation());
        let answer = self.relay(endpoint, request, request_id, &mut span).await;
        if let Err(error) = &answer {
            span.fail(error.code().row().code);
        }
        answer
    }

    /// Has a request answered; the relay takes the span over.
    async fn relay(
        &self,
        endpoint: Endpoint,
        request: Request<Incoming>,
        request_id: &str,
        span: &mut Span,
    ) -> Result<Response<BoxBody>, Error> {
        let draining = || Error::new(Code::Draining, "this gateway is draining and takes no new requests");
        let admission = self.gate.enter().ok_or_else(draining)?;
        let place = request.extensions().get::<Peer>().map(|peer| self.addresses.enter(peer.0));
        let place = place.map(|place| place.ok_or_else(|| self.too_many())).transpose()?;
        check_media_type(request.headers())?;
        let trace = [TRACE_PARENT, TRACE_STATE].map(|name| {
            let value = request.headers().get(&name).cloned();
            (name, value)
        });
        let api = &self.proxy.options.api;
        let deadline = Duration::from_millis(api.body_timeout_ms);
        let body = service::body::read(request.into_body(), api.max_body_bytes, deadline).await?;
        let peek = Peek::parse(&body)?;
        let (model, stream) = (peek.model_id()?, endpoint.generates() && peek.stream.unwrap_or(false));
        let (choices, include_usage) = (peek.choices(endpoint)?, peek.include_usage());
        let private = peek.resume.is_some();
        let body = if private { without_private_fields(&body)?.into() } else { body };
        let (model, body) = match self.proxy.fleet.alias(&model) {
            Some(id) => (id.clone(), wire::with_model(&body, &id)?.into()),
            None => (model, body),
        };
        self.proxy.refuse_poison(&body)?;
        let (completion, seed): (u128, u64) = rand::rng().random();
        let order = Order {
            endpoint,
            model,
            stream,
            body,
            request_id: request_id.to_string(),
            completion_id: endpoint.answer_id(completion),
            created: self.proxy.clock.unix_seconds(),
            seed,
            trace,
            choices,
            include_usage,
        };
        let pace = Pace {
            commit_after: Duration::from_millis(api.commit_after_ms),
            keep_alive: Duration::from_millis(api.keep_alive_ms),
        };
        describe(span, &order);
        let relay = Box::new(Relay::new(self.proxy.clone(), order, std::mem::take(span)));
        respond(relay, stream, pace, self.proxy.cut.clone(), (admission, place)).await
    }

    fn too_many(&self) -> Error {
        self.proxy.metrics.limited.inc();
        let most = self.proxy.options.api.max_requests_per_address;
        Error::new(Code::RateLimited, format!("{most} requests of this address are running; wait until one has ended"))
    }

    fn models(&self) -> ModelList {
        let models = self.proxy.fleet.view().models();
        let usable = models.iter().filter(|status| status.state == ModelState::Ready || status.card.on_demand);
        ModelList::new(usable.map(Model::from).collect())
    }

    /// `GET /v1/models/{id}`, or with an alias: slashes raw or percent-encoded.
    fn model(&self, encoded: &str) -> Result<Response<BoxBody>, Error> {
        let id = percent_decode(encoded);
        let view = self.proxy.fleet.view();
        let name = ModelId::new(id.clone()).ok();
        let name = name.map(|name| view.alias(&name).cloned().unwrap_or(name));
        if let Some(status) = view.models().iter().find(|status| Some(&status.id) == name.as_ref()) {
            return Ok(json(&Model::from(status)));
        }
        if !view.all_heard() {
            let message = "not every worker has been heard from yet, and none of the others has this model";
            return Err(Error::new(Code::NoReplica, message));
        }
        let message = format!("the model '{id}' does not exist; GET /v1/models lists those that do");
        Err(Error::new(Code::ModelNotFound, message).at("model"))
    }

    fn allowed_origin(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        let origin = headers.get(header::ORIGIN)?;
        let allowed = &self.proxy.options.api.cors_origins;
        allowed.iter().any(|known| known == "*" || known.as_bytes() == origin.as_bytes()).then(|| origin.clone())
    }
}

/// Says what is asked, in the words of OpenTelemetry's conventions for generative models; never what is in it.
fn describe(span: &mut Span, order: &Order) {
    let operation = order.endpoint.operation();
    span.rename(|| format!("{operation} {}", order.model).into());
    span.note(|| {
        [
            KeyValue::new("gen_ai.operation.name", operation),
            KeyValue::new("gen_ai.provider.name", "cortex"),
            KeyValue::new("gen_ai.request.model", order.model.to_string()),
            KeyValue::new("gen_ai.request.choice.count", i64::from(order.choices)),
            KeyValue::new("gen_ai.response.model", order.model.to_string()),
            KeyValue::new("gen_ai.response.id", order.completion_id.clone()),
            KeyValue::new("http.request.method", "POST"),
            KeyValue::new("url.path", order.endpoint.path()),
            KeyValue::new("cortex.request_id", order.request_id.clone()),
            KeyValue::new("cortex.stream", order.stream),
        ]
    });
}

/// Answers a browser that asks before it sends. Only pages of allowed origins may read the answer, and those may send
/// whatever headers they name: OpenAI's own client sends a dozen.
fn preflight(wanted: &Method, asked: &HeaderMap) -> Response<BoxBody> {
    let mut response = Response::new(full(""));
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    if let Ok(methods) = HeaderValue::from_str(&format!("{wanted}, OPTIONS")) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods.clone());
        headers.insert(header::ALLOW, methods);
    }
    let usual = HeaderValue::from_static("authorization, content-type, x-request-id, traceparent");
    let allowed = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned().unwrap_or(usual);
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, allowed);
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    response
}

fn json(value: &impl serde::Serialize) -> Response<BoxBody> {
    let mut response = Response::new(full(serde_json::to_vec(value).unwrap_or_default()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Turns an error into a response; the private code stays inside.
fn refuse(error: &Error, request_id: &str) -> Response<BoxBody> {
    let parts = wire::ErrorResponse::from(error);
    if let Some(source) = std::error::Error::source(error) {
        tracing::warn!(request_id, code = error.code().row().code, %source, "request failed");
    } else {
        tracing::info!(request_id, code = error.code().row().code, why = error.message(), "request refused");
    }
    let mut response = Response::new(full(parts.body));
    *response.status_mut() = StatusCode::from_u16(parts.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    for (name, value) in parts.headers {
        let (name, value) = (HeaderName::from_static(name), HeaderValue::from_str(&value));
        if let Ok(value) = value
            && !name.as_str().starts_with(wire::private::HEADER_PREFIX)
        {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

/// Takes the client's request id, or makes one.
fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let given = given.and_then(|text| RequestId::new(text).ok());
    given.map_or_else(|| random_name("req", rand::rng().random()), |id| id.to_string())
}

fn check_media_type(headers: &HeaderMap) -> Result<(), Error> {
    // What is no text is no name of a type either.
    let said = |name| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
    wire::check_media_type(said(header::CONTENT_TYPE), said(header::CONTENT_ENCODING))
}

/// Decodes `%XX`; what is no such triple stays as it is.
fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = bytes.get(i + 1..i + 3).and_then(|pair| std::str::from_utf8(pair).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) if bytes[i] == b'%' => {
                out.push(byte);
                i += 3;
            }
            _ => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::percent_decode;

    #[test]
    fn model_ids_may_come_encoded() {
        assert_eq!(percent_decode("org%2Fname"), "org/name");
        assert_eq!(percent_decode("org/name"), "org/name");
        assert_eq!(percent_decode("50%-%2"), "50%-%2");
    }
}
