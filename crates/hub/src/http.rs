//! Requests to a hub: each within its bounds, redirects by hand, and the token for the hub's own address alone.

use std::time::Duration;

use ::http::header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderValue, LOCATION, RANGE, RETRY_AFTER, USER_AGENT};
use ::http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::time::timeout;

use crate::{HubError, Limits, Settings};

/// Most redirects of one request.
const REDIRECTS_MAX: usize = 8;
/// Most bytes of a token's file.
const TOKEN_BYTES_MAX: u64 = 4096;
const AGENT: &str = concat!("cortex-hub/", env!("CARGO_PKG_VERSION"));

/// Whether redirects to other hosts are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Follow {
    /// Only on the hub itself: its own headers say what a file is.
    Hub,
    /// Everywhere: to where the bytes are.
    All,
}

/// A client of one hub.
pub(crate) struct Http {
    client: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
    endpoint: String,
    origin: Uri,
    authorization: Option<HeaderValue>,
    limits: Limits,
}

/// What an answer says of its request, for errors.
pub(crate) struct Asked<'a> {
    /// What was asked, as a person would say it.
    pub(crate) what: &'a str,
    /// The repo.
    pub(crate) repo: &'a str,
}

fn same_origin(a: &Uri, b: &Uri) -> bool {
    let port = |uri: &Uri| uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
    a.scheme() == b.scheme() && a.host().map(str::to_lowercase) == b.host().map(str::to_lowercase) && port(a) == port(b)
}

/// Resolves a `location` against the URL that sent it. A redirect from `https` to `http` leads nowhere.
fn redirected(from: &Uri, location: &str) -> Option<Uri> {
    let absolute = if location.starts_with("//") {
        format!("{}:{location}", from.scheme_str()?)
    } else if location.starts_with('/') {
        format!("{}://{}{location}", from.scheme_str()?, from.authority()?)
    } else {
        location.to_string()
    };
    let to: Uri = absolute.parse().ok()?;
    to.host()?;
    match (from.scheme_str()?, to.scheme_str()?) {
        (_, "https") | ("http", "http") => Some(to),
        _ => None,
    }
}

fn read_token(settings: &Settings) -> Option<String> {
    if settings.token.is_some() {
        return settings.token.clone();
    }
    let path = settings.token_file.as_deref()?;
    let fits = std::fs::metadata(path).is_ok_and(|metadata| metadata.len() <= TOKEN_BYTES_MAX);
    let text = fits.then(|| std::fs::read_to_string(path).ok()).flatten()?;
    Some(text.trim().to_string()).filter(|token| !token.is_empty())
}

impl Http {
    /// Makes the client, with the system's certificates.
    ///
    /// # Errors
    /// `Endpoint` when the URL is none, or there are no certificates to trust.
    pub(crate) fn new(settings: &Settings) -> Result<Self, HubError> {
        let endpoint = settings.endpoint().to_string();
        let unusable = |problem: String| HubError::Endpoint { endpoint: endpoint.clone(), problem };
        let origin: Uri = endpoint.parse().map_err(|error: ::http::uri::InvalidUri| unusable(error.to_string()))?;
        if !matches!(origin.scheme_str(), Some("http" | "https")) || origin.host().is_none() || origin.query().is_some()
        {
            return Err(unusable("it must be http://HOST or https://HOST".into()));
        }
        let needs_tls = origin.scheme_str() == Some("https");
        let connector = service::https::connector(settings.limits.connect, needs_tls).map_err(&unusable)?;
        let client = Client::builder(TokioExecutor::new()).build(connector);
        let bearer = |token: String| HeaderValue::try_from(format!("Bearer {token}"));
        let authorization = read_token(settings).map(bearer).transpose();
        let mut authorization =
            authorization.map_err(|_| unusable("the token has characters that no token has".into()))?;
        if let Some(value) = &mut authorization {
            value.set_sensitive(true);
        }
        Ok(Http { client, endpoint, origin, authorization, limits: settings.limits })
    }

    /// Asks once; the head of the answer comes within [`Limits::stall`]. Without `all` a redirect to another host is the
    /// answer.
    ///
    /// # Errors
    /// `Unreachable`, or what the status means.
    pub(crate) async fn ask(
        &self,
        asked: &Asked<'_>,
        method: Method,
        path: &str,
        offset: u64,
        follow: Follow,
    ) -> Result<Response<Incoming>, HubError> {
        let strange = |problem: String| HubError::Strange { what: asked.what.into(), problem };
        let mut uri: Uri =
            format!("{}/{path}", self.endpoint).parse().map_err(|error| strange(format!("its URL: {error}")))?;
        for _ in 0..=REDIRECTS_MAX {
            let mut request = Request::new(Empty::new());
            *request.method_mut() = method.clone();
            let headers = request.headers_mut();
            headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
            // What is compressed on the way has no length and no ranges.
            headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
            if offset > 0 {
                headers.insert(
                    RANGE,
                    HeaderValue::try_from(format!("bytes={offset}-")).map_err(|e| strange(e.to_string()))?,
                );
            }
            if let Some(value) = self.authorization.as_ref().filter(|_| same_origin(&uri, &self.origin)) {
                headers.insert(AUTHORIZATION, value.clone());
            }
            *request.uri_mut() = uri.clone();
            let answer = match timeout(self.limits.stall, self.client.request(request)).await {
                Ok(answer) => answer.map_err(|error| HubError::of_connection(asked.what, &error))?,
                Err(_) => return Err(HubError::silent(asked.what, self.limits.stall)),
            };
            if !answer.status().is_redirection() {
                return self.judge(asked, answer);
            }
            let location = answer.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let next = location.and_then(|location| redirected(&uri, location));
            let next = next.ok_or_else(|| strange("it redirects to no usable address".into()))?;
            if follow == Follow::Hub && !same_origin(&next, &self.origin) {
                return Ok(answer);
            }
            uri = next;
        }
        Err(strange("it redirects again and again".into()))
    }

    /// Turns statuses into errors.
    fn judge(&self, asked: &Asked<'_>, answer: Response<Incoming>) -> Result<Response<Incoming>, HubError> {
        let what = asked.what.to_string();
        match answer.status() {
            status if status.is_success() => Ok(answer),
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                let page = format!("{}/{}", self.endpoint, asked.repo);
                Err(HubError::Refused { what, status: status.as_u16(), page })
            }
            StatusCode::NOT_FOUND => Err(HubError::NotFound { what, endpoint: self.endpoint.clone() }),
            status @ (StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS) => {
                Err(HubError::Status { what, status: status.as_u16(), retry_after: retry_after(answer.headers()) })
            }
            status if status.is_server_error() => {
                Err(HubError::Status { what, status: status.as_u16(), retry_after: retry_after(answer.headers()) })
            }
            status => Err(HubError::Strange { what, problem: format!("its status is {status}") }),
        }
    }

    /// Reads a whole body of at most `limit` bytes.
    ///
    /// # Errors
    /// `Unreachable` when it breaks off or stalls, `Strange` when it is longer.
    pub(crate) async fn read(&self, what: &str, mut body: Incoming, limit: usize) -> Result<Vec<u8>, HubError> {
        let mut bytes = Vec::new();
        while let Some(piece) = self.piece(what, &mut body).await? {
            bytes.extend_from_slice(&piece);
            if bytes.len() > limit {
                let problem = format!("it is longer than {limit} bytes");
                return Err(HubError::Strange { what: what.into(), problem });
            }
        }
        Ok(bytes)
    }

    /// Reads the next piece of a body; `None` at its end.
    ///
    /// # Errors
    /// `Unreachable` when it breaks off or stalls.
    pub(crate) async fn piece(&self, what: &str, body: &mut Incoming) -> Result<Option<Bytes>, HubError> {
        loop {
            match timeout(self.limits.stall, body.frame()).await {
                Err(_) => return Err(HubError::silent(what, self.limits.stall)),
                Ok(None) => return Ok(None),
                Ok(Some(Err(error))) => return Err(HubError::of_connection(what, &error)),
                Ok(Some(Ok(frame))) => {
                    if let Ok(bytes) = frame.into_data() {
                        return Ok(Some(bytes));
                    }
                }
            }
        }
    }

    /// Does something again while only the network fails it, with growing pauses. `begin` says how often at most.
    ///
    /// # Errors
    /// The last one.
    pub(crate) async fn insist<T, F>(&self, tries: u32, mut work: impl FnMut() -> F) -> Result<T, HubError>
    where
        F: Future<Output = Result<T, HubError>>,
    {
        let mut failed = 0;
        loop {
            match work().await {
                Err(error) if error.is_transient() && failed + 1 < tries => {
                    failed += 1;
                    self.pause(failed, &error).await;
                }
                outcome => return outcome,
            }
        }
    }

    /// Waits after a failure, the longer the more there were in a row.
    pub(crate) async fn pause(&self, failed: u32, error: &HubError) {
        let Limits { pause, pause_max, .. } = self.limits;
        let own = pause.saturating_mul(1 << failed.saturating_sub(1).min(16)).min(pause_max);
        // Many workers that lost the same hub don't come back in one moment.
        let own = own.mul_f64(rand::random_range(0.75..1.25));
        let wait = error.retry_after().unwrap_or_default().min(pause_max).max(own);
        tracing::warn!(%error, failed, wait_s = wait.as_secs_f64(), "the hub failed; will try again");
        tokio::time::sleep(wait).await;
    }
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn redirects_are_resolved_and_never_lose_their_secrecy() {
        let check =
            |from: &str, location: &str| redirected(&from.parse().unwrap(), location).map(|uri| uri.to_string());
        let hub = "https://hub.example/a/b";
        assert_eq!(check(hub, "/c?d=1"), Some("https://hub.example/c?d=1".into()));
        assert_eq!(check(hub, "//cdn.example/c"), Some("https://cdn.example/c".into()));
        assert_eq!(check("http://127.0.0.1:1/a", "http://localhost/x"), Some("http://localhost/x".into()));
        for nowhere in ["http://cdn.example/c", "file:///etc/passwd", "ftp://x/y", "c/d", ""] {
            assert_eq!(check(hub, nowhere), None, "{nowhere}");
        }
    }

    #[test]
    fn another_port_is_another_host() {
        let same = |a: &str, b: &str| same_origin(&a.parse().unwrap(), &b.parse().unwrap());
        assert!(same("https://hub/x", "https://HUB:443/y"));
        assert!(!same("http://hub:1/", "http://hub:2/") && !same("https://hub/", "http://hub/"));
        assert!(!same("https://hub.evil/", "https://hub/"));
    }

    #[test]
    fn an_endpoint_that_is_no_url_is_an_error() {
        for endpoint in ["hub", "ftp://hub", "http://", "http://hub?x=1", "file:///x"] {
            let settings = Settings { endpoint: Some(endpoint.into()), ..Settings::default() };
            assert!(matches!(Http::new(&settings), Err(HubError::Endpoint { .. })), "{endpoint}");
        }
    }
}
