//! A hook that is an HTTP call.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;

/// Most bytes of an answer that are read; they go into the log.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// Calls; `line` is told the answer's lines. The caller bounds the time.
///
/// # Errors
/// What went wrong, for operators; also a status outside 200 to 299.
pub(crate) async fn call(
    method: &Method,
    url: &str,
    headers: &[(String, String)],
    body: Vec<u8>,
    connect_timeout: Duration,
    mut line: impl FnMut(&str),
) -> Result<(), String> {
    let connector = service::https::connector(connect_timeout, url.starts_with("https:"))?;
    let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector);
    let mut request = Request::new(Full::new(Bytes::from(body)));
    *request.method_mut() = method.clone();
    *request.uri_mut() = url.parse().map_err(|error| format!("'{url}' is no URL: {error}"))?;
    request.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    for (name, value) in headers {
        let name = name.parse::<HeaderName>().map_err(|error| format!("header '{name}': {error}"))?;
        let value = HeaderValue::try_from(value).map_err(|error| format!("header '{name}': {error}"))?;
        request.headers_mut().insert(name, value);
    }
    let failed = |error: hyper_util::client::legacy::Error| {
        let source = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
        format!("{url} could not be called: {error}{source}")
    };
    let answer = client.request(request).await.map_err(failed)?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
    if let Ok(body) = body {
        String::from_utf8_lossy(&body.to_bytes()).lines().for_each(&mut line);
    }
    if status.is_success() { Ok(()) } else { Err(format!("{url} answered {status}")) }
}
