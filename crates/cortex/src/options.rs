//! Everything an operator can set on a gateway.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use fleet::JourneyLimits;
use lifecycle::DrainBudget;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use service::config::{DAY_MS, UnusableOption, check_address, check_bounds};
use service::server::ServerOptions;
use service::telemetry::LogOptions;

/// The gateway's configuration.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// The API that apps use.
    pub api: ApiOptions,
    /// Metrics, probes and the fleet's state.
    pub admin: AdminOptions,
    /// How requests are sent to workers.
    pub proxy: ProxyOptions,
    /// How the gateway knows its workers.
    pub fleet: FleetOptions,
    /// How the gateway leaves.
    pub drain: DrainOptions,
    /// How the fleet is restarted, node by node.
    pub rollout: RolloutOptions,
    /// The workers.
    pub neurons: Vec<NeuronEntry>,
    /// What is logged.
    pub log: LogOptions,
}

/// The API that apps use.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ApiOptions {
    /// Where it listens. Port 0 takes a free one.
    pub bind: SocketAddr,
    /// Threads that serve it, each with its own share of the clients and its own connections to the workers. 0 for one
    /// on each processor that the gateway may use.
    pub threads: usize,
    /// Largest request body, in bytes.
    pub max_body_bytes: usize,
    /// Longest time for a request body to arrive, in milliseconds.
    pub body_timeout_ms: u64,
    /// After this long without a first token a stream is committed with status 200 and kept alive by comments,
    /// in milliseconds.
    pub commit_after_ms: u64,
    /// A committed stream that is silent shows a sign of life this often, in milliseconds.
    pub keep_alive_ms: u64,
    /// Requests at once from one address (IPv6: from one /64); further ones get 429. 0 for no bound. Behind a proxy all
    /// clients have the proxy's address.
    pub max_requests_per_address: usize,
    /// Origins whose pages may call the API from a browser; '*' for all. None by default.
    pub cors_origins: Vec<String>,
    /// The listener's limits and timeouts.
    pub server: ServerOptions,
}

impl Default for ApiOptions {
    fn default() -> Self {
        ApiOptions {
            bind: SocketAddr::from(([127, 0, 0, 1], 31313)),
            threads: 0,
            max_body_bytes: 4 << 20,
            body_timeout_ms: 30_000,
            commit_after_ms: 5_000,
            keep_alive_ms: 1_000,
            max_requests_per_address: 1024,
            cors_origins: Vec::new(),
            server: ServerOptions { max_connections_per_address: 2048, ..ServerOptions::default() },
        }
    }
}

/// Metrics, probes and the fleet's state.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdminOptions {
    /// Where it listens. Port 0 takes a free one.
    pub bind: SocketAddr,
    /// The listener's limits and timeouts.
    pub server: ServerOptions,
}

impl Default for AdminOptions {
    fn default() -> Self {
        AdminOptions { bind: SocketAddr::from(([127, 0, 0, 1], 31314)), server: ServerOptions::default() }
    }
}

/// How requests are sent to workers. There is no total timeout: a long answer is not a fault.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ProxyOptions {
    /// Longest time to connect to a worker, in milliseconds.
    pub connect_timeout_ms: u64,
    /// Longest silence of a worker before its first token, in milliseconds. A worker that queues, loads or prefills
    /// shows a sign of life each second.
    pub first_event_timeout_ms: u64,
    /// Silence after the first token that counts as a stall, in milliseconds: at least this, and at least 20 times the
    /// worker's own 99th percentile between tokens. The stream then goes on at another worker.
    pub stall_min_ms: u64,
    /// Longest wait for a worker that can take a request, in milliseconds.
    pub route_wait_ms: u64,
    /// Longest wait of a request for the load of its model, in milliseconds, for as long as a worker says that the model
    /// is on its way. After it the client is told how far the load is, and when to come back.
    pub load_wait_ms: u64,
    /// Longest search for a worker that can go on with an answer that was begun, in milliseconds.
    pub continue_wait_ms: u64,
    /// Most times a request is sent elsewhere before its first token; hand-overs by a draining worker do not count.
    pub retries_max: u32,
    /// Retries the fleet can afford, as a share of its requests.
    pub retry_ratio: f64,
    /// Retries a second that are always affordable.
    pub retry_floor_per_second: f64,
    /// Idle connections kept to each worker, by all threads together.
    pub idle_connections: usize,
    /// Largest event of a worker's stream, in bytes.
    pub event_bytes_max: usize,
}

impl Default for ProxyOptions {
    fn default() -> Self {
        ProxyOptions {
            connect_timeout_ms: 2_000,
            first_event_timeout_ms: 30_000,
            stall_min_ms: 5_000,
            route_wait_ms: 10_000,
            load_wait_ms: 600_000,
            continue_wait_ms: 60_000,
            retries_max: 2,
            retry_ratio: 0.1,
            retry_floor_per_second: 3.0,
            idle_connections: 256,
            event_bytes_max: 16 << 20,
        }
    }
}

impl ProxyOptions {
    /// Returns the bounds of one request's way.
    pub fn journey(&self) -> JourneyLimits {
        JourneyLimits {
            retries_max: self.retries_max,
            route_wait: Duration::from_millis(self.route_wait_ms),
            continue_wait: Duration::from_millis(self.continue_wait_ms),
        }
    }
}

/// How the gateway knows its workers.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FleetOptions {
    /// The gateway's name; drawn at start when absent.
    pub gateway_id: Option<String>,
    /// A file with the token that the workers' control ports want.
    pub token_file: Option<PathBuf>,
    /// The slow reconcile beside the control stream, in milliseconds.
    pub poll_ms: u64,
    /// The API opens when every worker was heard from, or after this long, in milliseconds.
    pub ready_after_ms: u64,
}

impl Default for FleetOptions {
    fn default() -> Self {
        FleetOptions { gateway_id: None, token_file: None, poll_ms: 10_000, ready_after_ms: 3_000 }
    }
}

/// How the fleet is restarted, node by node.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RolloutOptions {
    /// A file for the progress of rollouts, made when it is not there; the gateways of one host share it, so that one
    /// goes on where another ended. It must not lie on a network file system. Without it there are no rollouts.
    pub store: Option<PathBuf>,
}

/// How the gateway leaves. The whole exit takes at most `settle_ms` or `deadline_s`, whichever is longer, plus
/// `cut_max_ms`; systemd's TimeoutStopSec must be larger.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DrainOptions {
    /// Time between the readiness probe's no and the refusal of new requests, for load balancers, in milliseconds.
    pub settle_ms: u64,
    /// Time that open streams have to finish, in seconds; what still runs then is cut.
    pub deadline_s: f64,
    /// Longest wait for cut streams to be flushed, in milliseconds.
    pub cut_max_ms: u64,
}

impl Default for DrainOptions {
    fn default() -> Self {
        DrainOptions { settle_ms: 1_000, deadline_s: 600.0, cut_max_ms: 2_000 }
    }
}

impl DrainOptions {
    /// Returns the drain machine's budget.
    pub fn budget(&self) -> DrainBudget {
        DrainBudget {
            settle_max: Duration::from_millis(self.settle_ms),
            handoff: None,
            deadline: Duration::try_from_secs_f64(self.deadline_s).unwrap_or_default(),
            cut_max: Duration::from_millis(self.cut_max_ms),
        }
    }

    /// Returns the longest time from the signal to the exit.
    pub fn exit_budget(&self) -> Duration {
        self.budget().total() + SHUTDOWN_MAX
    }
}

/// Most threads that serve the API.
const THREADS_MAX: u64 = 1024;

/// Longest wait for connections to close once the drain is over.
pub const SHUTDOWN_MAX: Duration = Duration::from_secs(1);

/// A worker.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NeuronEntry {
    /// Its control address, host:port. Everything else it says by itself.
    pub control: String,
}

impl Options {
    /// Checks what types can't.
    ///
    /// # Errors
    /// [`UnusableOption`] with the key's path.
    pub fn check(&self) -> Result<(), UnusableOption> {
        let wrong = |key: &str, problem: String| Err(UnusableOption { key: key.into(), problem });
        for (i, neuron) in self.neurons.iter().enumerate() {
            let key = format!("neurons[{i}].control");
            check_address(&neuron.control).map_err(|problem| UnusableOption { key: key.clone(), problem })?;
            if self.neurons[..i].iter().any(|known| known.control == neuron.control) {
                return wrong(&key, format!("'{}' is there twice", neuron.control));
            }
        }
        self.api.server.check("api.server")?;
        self.admin.server.check("admin.server")?;
        if let Some(id) = &self.fleet.gateway_id
            && let Err(error) = words::GatewayId::new(id.clone())
        {
            return wrong("fleet.gateway_id", error.to_string());
        }
        if !(0.0..=86_400.0).contains(&self.drain.deadline_s) {
            return wrong("drain.deadline_s", format!("must be from 0 to 86400, it is {}", self.drain.deadline_s));
        }
        check_bounds(&[
            ("api.threads", self.api.threads as u64, 0, THREADS_MAX),
            ("api.body_timeout_ms", self.api.body_timeout_ms, 1, DAY_MS),
            ("api.commit_after_ms", self.api.commit_after_ms, 0, DAY_MS),
            ("api.keep_alive_ms", self.api.keep_alive_ms, 1, DAY_MS),
            ("api.max_body_bytes", self.api.max_body_bytes as u64, 1024, 1 << 30),
            ("proxy.connect_timeout_ms", self.proxy.connect_timeout_ms, 1, DAY_MS),
            ("proxy.first_event_timeout_ms", self.proxy.first_event_timeout_ms, 1, DAY_MS),
            ("proxy.stall_min_ms", self.proxy.stall_min_ms, 1, DAY_MS),
            ("proxy.route_wait_ms", self.proxy.route_wait_ms, 0, DAY_MS),
            ("proxy.load_wait_ms", self.proxy.load_wait_ms, 0, DAY_MS),
            ("proxy.continue_wait_ms", self.proxy.continue_wait_ms, 0, DAY_MS),
            ("proxy.event_bytes_max", self.proxy.event_bytes_max as u64, 1024, 1 << 30),
            ("fleet.poll_ms", self.fleet.poll_ms, 100, DAY_MS),
            ("fleet.ready_after_ms", self.fleet.ready_after_ms, 0, DAY_MS),
            ("drain.settle_ms", self.drain.settle_ms, 0, DAY_MS),
            ("drain.cut_max_ms", self.drain.cut_max_ms, 0, DAY_MS),
        ])?;
        let share = |share: f64| (0.0..=10_000.0).contains(&share);
        if !share(self.proxy.retry_ratio) || !share(self.proxy.retry_floor_per_second) {
            return wrong("proxy.retry_ratio", "it and retry_floor_per_second must be from 0 to 10000".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_could_never_work_is_refused_with_its_key() {
        let fault = |change: &dyn Fn(&mut Options)| {
            let mut options = Options::default();
            change(&mut options);
            options.check().unwrap_err().key
        };
        let neuron = |control: &str| NeuronEntry { control: control.into() };
        assert!(Options { neurons: vec![neuron("a:1"), neuron("[::1]:1")], ..Options::default() }.check().is_ok());
        assert_eq!(fault(&|options| options.neurons = vec![neuron("http://a:1")]), "neurons[0].control");
        assert_eq!(fault(&|options| options.neurons = vec![neuron("a:1"), neuron("a:1")]), "neurons[1].control");
        // A program that never leaves, and waits that no clock can add.
        assert_eq!(fault(&|options| options.drain.settle_ms = u64::MAX), "drain.settle_ms");
        assert_eq!(fault(&|options| options.proxy.route_wait_ms = u64::MAX), "proxy.route_wait_ms");
        assert_eq!(fault(&|options| options.proxy.connect_timeout_ms = 0), "proxy.connect_timeout_ms");
        assert_eq!(fault(&|options| options.api.max_body_bytes = 1), "api.max_body_bytes");
        assert_eq!(fault(&|options| options.api.threads = 1025), "api.threads");
    }
}
