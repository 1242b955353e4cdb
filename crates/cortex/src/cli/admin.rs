//! The command line's side of a gateway's admin port.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Args;
use serde::Serialize;
use serde::de::DeserializeOwned;
use service::program::first_cause;
use service::token::Token;
use wire::ErrorEnvelope;
use words::NodeStatus;

/// Longest wait for one answer: an order waits for its worker.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// Which gateway, and what it wants to see.
#[derive(Clone, Debug, Args)]
pub(crate) struct AdminArgs {
    /// The gateway's admin URL.
    #[arg(long, env = "CORTEX_ADMIN_URL", default_value = "http://127.0.0.1:31314", global = true)]
    admin: String,
    /// A file with the token that the gateway wants for what changes something.
    #[arg(long, env = "CORTEX_TOKEN_FILE", global = true)]
    token_file: Option<PathBuf>,
}

/// A gateway's admin port.
#[derive(Debug)]
pub(crate) struct Admin {
    http: reqwest::Client,
    url: String,
    token: Option<Token>,
}

/// A gateway's answer to `GET /api/status`, as far as the command line reads it.
#[derive(Debug, serde::Deserialize)]
pub(super) struct FleetStatus {
    /// The gateway's name.
    pub(super) gateway: String,
    /// Whether it takes requests.
    pub(super) ready: bool,
    /// Its configured workers.
    pub(super) nodes: Vec<NodeView>,
}

/// One configured worker.
#[derive(Debug, serde::Deserialize)]
pub(super) struct NodeView {
    /// Its control address.
    pub(super) control: String,
    /// Whether it gets new requests.
    pub(super) routable: bool,
    /// How long ago it was heard, in seconds.
    pub(super) heard_s_ago: Option<f64>,
    /// Another live worker has its name.
    #[serde(default)]
    pub(super) conflicted: bool,
    /// The address before it under which the same worker is listed.
    #[serde(default)]
    pub(super) same_as: Option<String>,
    /// Why it can't be heard.
    #[serde(default)]
    pub(super) problem: Option<String>,
    /// Its last status.
    pub(super) status: Option<NodeStatus>,
}

impl FleetStatus {
    /// Finds a worker by its name or its control address.
    pub(super) fn node(&self, name: &str) -> Option<&NodeView> {
        let named = |node: &&NodeView| {
            node.control == name || node.status.as_ref().is_some_and(|status| status.node.as_str() == name)
        };
        self.nodes.iter().find(named)
    }
}

impl Admin {
    pub(crate) fn new(args: &AdminArgs) -> Result<Self> {
        let token = args.token_file.as_deref().map(Token::read).transpose()?;
        let url = args.admin.trim_end_matches('/').to_string();
        ensure!(url.starts_with("http://"), "the admin URL must begin with http://, it is '{url}'");
        Ok(Admin { http: super::client()?, url, token })
    }

    /// Sends a request; returns the answer once it is known to be no error.
    async fn ask(&self, request: reqwest::RequestBuilder) -> Result<reqwest::Response> {
        let request = match &self.token {
            Some(token) => request.header("authorization", token.bearer()),
            None => request,
        };
        let response = request.send().await.map_err(|error| {
            let (url, why) = (&self.url, first_cause(&error));
            anyhow!(
                "no answer of the gateway's admin port at {url}: {why}; --admin or CORTEX_ADMIN_URL says where it is"
            )
        })?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        match serde_json::from_slice::<ErrorEnvelope>(&response.bytes().await?) {
            Ok(envelope) => bail!("{}", envelope.error.message),
            Err(_) => bail!("{}: {status}", self.url),
        }
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Result<bytes::Bytes> {
        Ok(self.ask(request.timeout(ANSWER_MAX)).await?.bytes().await?)
    }

    /// Posts JSON to a path whose answer comes bit by bit.
    pub(super) async fn post_stream(&self, path: &str, body: &impl Serialize) -> Result<reqwest::Response> {
        let ask = self.ask(self.http.post(format!("{}{path}", self.url)).json(body));
        tokio::time::timeout(ANSWER_MAX, ask).await.context("the gateway did not answer in time")?
    }

    /// Gets a path whose answer comes bit by bit.
    pub(super) async fn get_stream(&self, path: &str) -> Result<reqwest::Response> {
        let ask = self.ask(self.http.get(format!("{}{path}", self.url)));
        tokio::time::timeout(ANSWER_MAX, ask).await.context("the gateway did not answer in time")?
    }

    /// Gets a path.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let bytes = self.send(self.http.get(format!("{}{path}", self.url))).await?;
        serde_json::from_slice(&bytes).with_context(|| format!("{path} answered what this version can't read"))
    }

    /// Posts JSON to a path.
    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        let bytes = self.send(self.http.post(format!("{}{path}", self.url)).json(body)).await?;
        serde_json::from_slice(&bytes).with_context(|| format!("{path} answered what this version can't read"))
    }
}

/// Writes a name as one segment of a path, or one value of a query.
pub(super) fn segment(name: &str) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(byte);
    name.bytes().map(|byte| if plain(&byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::segment;

    #[test]
    fn a_name_with_slashes_is_one_segment() {
        assert_eq!(segment("org/Na-me_1.5~x"), "org%2FNa-me_1.5~x");
        assert_eq!(segment("a b&é"), "a%20b%26%C3%A9");
    }
}
