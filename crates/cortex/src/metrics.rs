//! What Prometheus sees of a gateway.

use service::metrics::prometheus::{HistogramVec, IntCounter, IntCounterVec, IntGaugeVec};
use service::metrics::{LATENCY_SECONDS, MetricsError, REQUEST_SECONDS, Registry, total};
use service::server::ServerMetrics;
use service::traces::TraceMetrics;

use crate::rollout::RolloutMetrics;

/// Everything that a gateway registers.
pub(crate) struct Families {
    pub(crate) gateway: Metrics,
    pub(crate) rollouts: RolloutMetrics,
    pub(crate) admin: ServerMetrics,
    pub(crate) api: ServerMetrics,
    pub(crate) traces: TraceMetrics,
}

impl Families {
    /// Registers all of it.
    pub(crate) fn register(registry: &Registry) -> Result<Self, MetricsError> {
        Ok(Families {
            gateway: Metrics::new(registry)?,
            rollouts: RolloutMetrics::new(registry)?,
            admin: ServerMetrics::register(registry, "cortex_admin")?,
            api: ServerMetrics::register(registry, "cortex_api")?,
            traces: TraceMetrics::register(registry, "cortex")?,
        })
    }
}

/// All metrics of one gateway.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    /// 1, with who it is.
    pub(crate) info: IntGaugeVec,
    /// Requests that ended.
    pub(crate) requests: IntCounterVec,
    /// Attempts by worker and outcome.
    pub(crate) attempts: IntCounterVec,
    /// Requests sent elsewhere.
    pub(crate) retries: IntCounterVec,
    /// Streams that went on at another worker.
    pub(crate) continuations: IntCounterVec,
    /// Answers whose end the gateway said itself.
    pub(crate) completed: IntCounter,
    /// What a client sees of a continuation.
    pub(crate) gap: HistogramVec,
    /// Clients that left.
    pub(crate) client_left: IntCounter,
    /// Requests refused for their address.
    pub(crate) limited: IntCounter,
    /// Tokens passed on.
    pub(crate) tokens: IntCounterVec,
    /// From arrival to first token.
    pub(crate) first_token: HistogramVec,
    /// From arrival to end.
    pub(crate) request_seconds: HistogramVec,
    /// Loads that requests caused.
    pub(crate) loads: IntCounterVec,
    /// How long requests waited for loads.
    pub(crate) load_wait: HistogramVec,
    /// 1 for a worker that may get new requests.
    pub(crate) routable: IntGaugeVec,
    /// 1 for a worker whose control stream is up.
    pub(crate) attached: IntGaugeVec,
    /// 1 for a worker whose name another live process uses.
    pub(crate) conflicted: IntGaugeVec,
    /// Workers that may get new requests for a model.
    pub(crate) replicas: IntGaugeVec,
}

impl Metrics {
    /// Returns the tokens passed on, of all models.
    pub(crate) fn tokens_total(&self) -> u64 {
        total(&self.tokens)
    }

    /// Registers them.
    pub(crate) fn new(registry: &Registry) -> Result<Self, MetricsError> {
        Ok(Metrics {
            info: registry.gauge_vec(
                "cortex_info",
                "1, with the gateway's name and version.",
                &["gateway", "version"],
            )?,
            requests: registry.counter_vec(
                "cortex_requests_total",
                "Requests that ended, by outcome: ok, an error's code, or client_closed_request.",
                &["model", "outcome"],
            )?,
            attempts: registry.counter_vec(
                "cortex_attempts_total",
                "Attempts that ended, by worker and outcome.",
                &["node", "outcome"],
            )?,
            retries: registry.counter_vec(
                "cortex_retries_total",
                "Requests sent elsewhere before their first token, by reason.",
                &["reason"],
            )?,
            continuations: registry.counter_vec(
                "cortex_continuations_total",
                "Answers that went on at another worker after their first token, by what ended the attempt before.",
                &["reason"],
            )?,
            completed: registry
                .counter_vec(
                    "cortex_completions_ended_here_total",
                    "Answers that had finished when their worker was lost, and whose end the gateway said itself.",
                    &[],
                )?
                .with_label_values::<&str>(&[]),
            gap: registry.histogram_vec(
                "cortex_continuation_gap_seconds",
                "From the last token of one worker to the first of the next, as the client sees it.",
                &["model"],
                LATENCY_SECONDS,
            )?,
            client_left: registry
                .counter_vec("cortex_client_disconnects_total", "Clients that left before the end.", &[])?
                .with_label_values::<&str>(&[]),
            limited: registry
                .counter_vec(
                    "cortex_requests_limited_total",
                    "Requests refused, for their client's address had too many.",
                    &[],
                )?
                .with_label_values::<&str>(&[]),
            tokens: registry.counter_vec("cortex_generation_tokens_total", "Tokens passed on.", &["model"])?,
            first_token: registry.histogram_vec(
                "cortex_time_to_first_token_seconds",
                "From the request's arrival to its first token.",
                &["model"],
                LATENCY_SECONDS,
            )?,
            request_seconds: registry.histogram_vec(
                "cortex_e2e_request_latency_seconds",
                "From the request's arrival to its end.",
                &["model"],
                REQUEST_SECONDS,
            )?,
            loads: registry.counter_vec(
                "cortex_model_loads_total",
                "Loads that requests caused, by the room that the chosen worker had: free, evict (idle models go), \
                 wait (models in use go first), never (by its own figures).",
                &["model", "room"],
            )?,
            load_wait: registry.histogram_vec(
                "cortex_model_load_wait_seconds",
                "From sending a request to a worker that has to load its model to the worker's answer or refusal.",
                &["model"],
                REQUEST_SECONDS,
            )?,
            routable: registry.gauge_vec(
                "cortex_node_routable",
                "1 for a worker that may get new requests.",
                &["control_address"],
            )?,
            attached: registry.gauge_vec(
                "cortex_node_attached",
                "1 for a worker whose control stream is up.",
                &["control_address"],
            )?,
            conflicted: registry.gauge_vec(
                "cortex_node_conflicted",
                "1 for a worker whose node id another live process uses; neither gets requests.",
                &["control_address"],
            )?,
            replicas: registry.gauge_vec(
                "cortex_model_routable_replicas",
                "Workers that may get new requests for a model that some worker is configured with or has.",
                &["model"],
            )?,
        })
    }
}
