//! The data path: from a parsed request to the client's bytes, over as many attempts as it takes.

mod attempt;
mod body;
mod relay;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fleet::RetryBudget;
use http_body_util::Full;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use service::clock::Clock;
use tokio::sync::watch;
use words::{GatewayId, ModelId};

use crate::fleet_task::Fleet;
use crate::metrics::Metrics;
use crate::options::Options;
pub(crate) use body::{BoxBody, Pace, full, respond};
pub(crate) use relay::Relay;

/// The client towards the workers' data planes.
pub(crate) type Upstream = Client<HttpConnector, Full<Bytes>>;

/// What every request needs.
pub(crate) struct Proxy {
    pub(crate) fleet: Fleet,
    pub(crate) upstream: Upstream,
    pub(crate) metrics: Metrics,
    pub(crate) clock: Clock,
    pub(crate) options: Options,
    pub(crate) gateway: GatewayId,
    /// Held for two additions and a comparison.
    pub(crate) budget: std::sync::Mutex<RetryBudget>,
    /// True once the drain's deadline has come: open streams end with words.
    pub(crate) cut: watch::Receiver<bool>,
}

/// One request as every attempt sends it.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    pub(crate) model: ModelId,
    pub(crate) stream: bool,
    pub(crate) body: Bytes,
    pub(crate) request_id: String,
    pub(crate) completion_id: String,
    pub(crate) created: u64,
    pub(crate) seed: u64,
    pub(crate) traceparent: Option<http::HeaderValue>,
}

impl Proxy {
    /// Counts a request in for the retry budget.
    pub(crate) fn deposit(&self) {
        self.budget.lock().unwrap_or_else(std::sync::PoisonError::into_inner).deposit();
    }

    /// Takes a retry out of the budget.
    fn withdraw(&self) -> bool {
        let now = self.clock.now();
        self.budget.lock().unwrap_or_else(std::sync::PoisonError::into_inner).withdraw(now)
    }
}

/// Makes the client: connections are reused, sent without delay, and closed before a worker would.
pub(crate) fn upstream(options: &Options) -> Upstream {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(Duration::from_millis(options.proxy.connect_timeout_ms)));
    Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_MAX)
        .pool_max_idle_per_host(options.proxy.idle_connections)
        .build(connector)
}

/// Below the workers' own idle timeout, so that a connection is not used just as it is closed.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// Shared by all requests.
pub(crate) type SharedProxy = Arc<Proxy>;
