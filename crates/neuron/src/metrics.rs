//! What Prometheus sees of a worker. Names follow vLLM's meanings with the prefix `neuron_`.

use hooks::HookMetrics;
use inference::{EventKind, Load};
use service::metrics::prometheus::{
    CounterVec, Gauge, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
};
use service::metrics::{
    LATENCY_SECONDS, MetricsError, REQUEST_SECONDS, Registry, TIME_PER_OUTPUT_TOKEN_SECONDS, total,
};
use service::server::ServerMetrics;
use service::traces::TraceMetrics;
use words::{NodeMemory, NodeState, NodeStatus};

/// Everything that a worker registers.
pub(crate) struct Families {
    pub(crate) worker: Metrics,
    pub(crate) control: ServerMetrics,
    pub(crate) data: ServerMetrics,
    pub(crate) traces: TraceMetrics,
    pub(crate) hooks: HookMetrics,
}

impl Families {
    /// Registers all of it.
    pub(crate) fn register(registry: &Registry) -> Result<Self, MetricsError> {
        Ok(Families {
            worker: Metrics::new(registry)?,
            control: ServerMetrics::register(registry, "neuron_control")?,
            data: ServerMetrics::register(registry, "neuron_data")?,
            traces: TraceMetrics::register(registry, "neuron")?,
            hooks: HookMetrics::register(registry, "neuron")?,
        })
    }
}

/// The states of a node, as `neuron_node_state` names them.
const STATES: [&str; 7] = ["activating", "ready", "held", "draining", "drained", "unloading", "stopped"];

fn state_name(state: NodeState) -> &'static str {
    match state {
        NodeState::Activating => "activating",
        NodeState::Ready => "ready",
        NodeState::Held => "held",
        NodeState::Draining(_) => "draining",
        NodeState::Drained => "drained",
        NodeState::Unloading => "unloading",
        NodeState::Stopped => "stopped",
        NodeState::Unknown => "unknown",
    }
}

/// All metrics of one worker.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    info: IntGaugeVec,
    state: IntGaugeVec,
    drain_remaining: Gauge,
    requests: IntCounterVec,
    disconnects: IntCounterVec,
    cancelled: IntCounterVec,
    unknown_fields: IntCounterVec,
    prompt_tokens: IntCounterVec,
    generation_tokens: IntCounterVec,
    engine_failures: IntCounterVec,
    first_token: HistogramVec,
    inter_token: HistogramVec,
    request_seconds: HistogramVec,
    queue_seconds: HistogramVec,
    prefill_seconds: HistogramVec,
    decode_seconds: HistogramVec,
    running: IntGaugeVec,
    waiting: IntGaugeVec,
    kv_usage: GaugeVec,
    kv_cached: GaugeVec,
    preemptions: IntCounterVec,
    prefix_queries: IntCounterVec,
    prefix_hits: IntCounterVec,
    restored_blocks: IntCounterVec,
    load_seconds: CounterVec,
    engine_restarts: IntCounterVec,
    loads: IntCounterVec,
    swap_seconds: HistogramVec,
    load_wait_seconds: HistogramVec,
    evictions: IntCounterVec,
    ttl_unloads: IntCounterVec,
    memory_budget: IntGauge,
    memory_used: IntGauge,
    download_bytes: IntCounterVec,
    download_seconds: CounterVec,
    downloads: IntCounterVec,
    /// Running requests offered to other workers.
    pub(crate) handoffs_offered: IntCounter,
    /// Requests cancelled because their gateway is gone.
    pub(crate) orphaned_requests: IntCounter,
}

impl Metrics {
    /// Returns what only rises while something gets on: tokens made and bytes fetched.
    pub(crate) fn work_done(&self) -> u64 {
        [&self.prompt_tokens, &self.generation_tokens, &self.download_bytes].map(total).iter().sum()
    }

    /// Registers them.
    pub(crate) fn new(registry: &Registry) -> Result<Self, MetricsError> {
        let model = &["model"];
        let counter = |name: &str, help: &str| {
            registry.counter_vec(name, help, &[]).map(|family| family.with_label_values::<&str>(&[]))
        };
        let gauge = |name: &str, help: &str| {
            registry.gauge_vec(name, help, &[]).map(|family| family.with_label_values::<&str>(&[]))
        };
        let parts = |name: &str, help: &str| registry.histogram_vec(name, help, model, REQUEST_SECONDS);
        Ok(Metrics {
            info: registry.gauge_vec("neuron_info", "1, with the worker's name and version.", &["node", "version"])?,
            state: registry.gauge_vec(
                "neuron_node_state",
                "1 for the state that the worker is in: activating, ready, held, draining, drained, unloading or stopped.",
                &["state"],
            )?,
            drain_remaining: registry
                .float_gauge_vec(
                    "neuron_drain_remaining_seconds",
                    "Time until what still runs is ended by force, while the worker drains or unloads; 0 otherwise.",
                    &[],
                )?
                .with_label_values::<&str>(&[]),
            requests: registry.counter_vec(
                "neuron_requests_total",
                "Requests that ended, by outcome: stop, length, an error's code, or client_closed_request.",
                &["model", "outcome"],
            )?,
            disconnects: registry.counter_vec(
                "neuron_client_disconnects_total",
                "Requests whose client (or gateway) left before the end.",
                model,
            )?,
            cancelled: registry.counter_vec(
                "neuron_requests_cancelled_total",
                "Requests that an operator cancelled, by how they were named: id, model or gateway.",
                &["model", "reason"],
            )?,
            unknown_fields: registry.counter_vec(
                "neuron_unknown_request_fields_total",
                "Fields of requests that this version does not know and ignored.",
                model,
            )?,
            prompt_tokens: registry.counter_vec("neuron_prompt_tokens_total", "Prompt tokens taken in.", model)?,
            generation_tokens: registry.counter_vec("neuron_generation_tokens_total", "Tokens generated.", model)?,
            engine_failures: registry.counter_vec(
                "neuron_engine_failures_total",
                "Steps that the engine failed.",
                model,
            )?,
            first_token: registry.histogram_vec(
                "neuron_time_to_first_token_seconds",
                "From the request's arrival to its first token.",
                model,
                LATENCY_SECONDS,
            )?,
            inter_token: registry.histogram_vec(
                "neuron_inter_token_latency_seconds",
                "Between two tokens of one request.",
                model,
                TIME_PER_OUTPUT_TOKEN_SECONDS,
            )?,
            request_seconds: registry.histogram_vec(
                "neuron_e2e_request_latency_seconds",
                "From the request's arrival to its end.",
                model,
                REQUEST_SECONDS,
            )?,
            queue_seconds: parts("neuron_request_queue_time_seconds", "From a request's arrival to its first step.")?,
            prefill_seconds: parts(
                "neuron_request_prefill_time_seconds",
                "From a request's first step to its first token.",
            )?,
            decode_seconds: parts("neuron_request_decode_time_seconds", "From a request's first token to its last.")?,
            running: registry.gauge_vec("neuron_num_requests_running", "Requests in the batch.", model)?,
            waiting: registry.gauge_vec("neuron_num_requests_waiting", "Requests queued.", model)?,
            kv_usage: registry.float_gauge_vec(
                "neuron_kv_cache_usage_ratio",
                "Share of the KV blocks in use, 0 to 1.",
                model,
            )?,
            kv_cached: registry.float_gauge_vec(
                "neuron_kv_cache_kept_ratio",
                "Share of the KV blocks that only the prefix cache holds, 0 to 1; whoever needs them gets them.",
                model,
            )?,
            preemptions: registry.counter_vec(
                "neuron_num_preemptions_total",
                "Times a running request made room for a more urgent one, to be recomputed later.",
                model,
            )?,
            prefix_queries: registry.counter_vec(
                "neuron_prefix_cache_queries_total",
                "Tokens that were looked up in the prefix cache.",
                model,
            )?,
            prefix_hits: registry.counter_vec(
                "neuron_prefix_cache_hits_total",
                "Tokens that were found in the prefix cache.",
                model,
            )?,
            restored_blocks: registry.counter_vec(
                "neuron_kv_blocks_restored_total",
                "KV blocks that were taken back from the store that outlives the model.",
                model,
            )?,
            load_seconds: registry.float_counter_vec(
                "neuron_model_load_seconds_total",
                "Time spent loading, warm-up included.",
                model,
            )?,
            loads: registry.counter_vec(
                "neuron_model_loads_total",
                "Loads that ended, by outcome: ok, failed, cancelled, or no_room for one that did not fit or found no room in time.",
                &["model", "outcome"],
            )?,
            swap_seconds: registry.histogram_vec(
                "neuron_model_swap_seconds",
                "From the word that a model is wanted until it serves: its files, its wait for room, its load and warm-up.",
                model,
                REQUEST_SECONDS,
            )?,
            load_wait_seconds: registry.histogram_vec(
                "neuron_model_load_wait_seconds",
                "What a request waited for its model, where that had to be loaded.",
                model,
                REQUEST_SECONDS,
            )?,
            evictions: registry.counter_vec(
                "neuron_model_evictions_total",
                "Times a model without work was unloaded to make room for another.",
                model,
            )?,
            ttl_unloads: registry.counter_vec(
                "neuron_model_ttl_unloads_total",
                "Times a model was unloaded because nobody asked for it for its time.",
                model,
            )?,
            memory_budget: gauge("neuron_memory_budget_bytes", "Memory for all models together; 0: unknown.")?,
            memory_used: gauge(
                "neuron_memory_used_bytes",
                "Memory that loaded models take, and that is set aside for those that load.",
            )?,
            engine_restarts: registry.counter_vec(
                "neuron_engine_restarts_total",
                "Times an engine that had ended by itself was started again.",
                model,
            )?,
            download_bytes: registry.counter_vec(
                "neuron_download_bytes_total",
                "Bytes of model files that came over the network.",
                model,
            )?,
            download_seconds: registry.float_counter_vec(
                "neuron_download_seconds_total",
                "Time spent fetching model files.",
                model,
            )?,
            downloads: registry.counter_vec(
                "neuron_downloads_total",
                "Fetches of a model's files that ended, by outcome: ok or failed. One that finds them all here is ok.",
                &["model", "outcome"],
            )?,
            handoffs_offered: counter(
                "neuron_handoffs_offered_total",
                "Running requests that a drain offered to other workers.",
            )?,
            orphaned_requests: counter(
                "neuron_orphaned_requests_total",
                "Requests cancelled because their gateway's session was lost for longer than its lease.",
            )?,
        })
    }

    /// Counts a request's end.
    pub(crate) fn ended(&self, model: &str, outcome: &str, seconds: f64) {
        self.requests.with_label_values(&[model, outcome]).inc();
        self.request_seconds.with_label_values(&[model]).observe(seconds);
    }

    /// Counts a client that left.
    pub(crate) fn client_left(&self, model: &str) {
        self.disconnects.with_label_values(&[model]).inc();
    }

    /// Counts a request that was cancelled.
    pub(crate) fn cancelled(&self, model: &str, reason: &str) {
        self.cancelled.with_label_values(&[model, reason]).inc();
    }

    /// Counts fields nobody knows.
    pub(crate) fn unknown_fields(&self, model: &str, count: usize) {
        if count > 0 {
            self.unknown_fields.with_label_values(&[model]).inc_by(count as u64);
        }
    }

    /// Adds a load's own time, and that since it was wanted.
    pub(crate) fn loaded(&self, model: &str, seconds: f64, since_wanted: f64) {
        self.load_seconds.with_label_values(&[model]).inc_by(seconds);
        self.swap_seconds.with_label_values(&[model]).observe(since_wanted);
    }

    /// Adds what a request waited for its model's load.
    pub(crate) fn waited_for_load(&self, model: &str, seconds: f64) {
        self.load_wait_seconds.with_label_values(&[model]).observe(seconds);
    }

    /// Counts a load's end.
    pub(crate) fn load_ended(&self, model: &str, outcome: &str) {
        self.loads.with_label_values(&[model, outcome]).inc();
    }

    /// Counts a model that made room.
    pub(crate) fn evicted(&self, model: &str) {
        self.evictions.with_label_values(&[model]).inc();
    }

    /// Counts a model whose time without a request is over.
    pub(crate) fn ttl_over(&self, model: &str) {
        self.ttl_unloads.with_label_values(&[model]).inc();
    }

    /// Shows what models may take and take.
    pub(crate) fn show_memory(&self, memory: NodeMemory) {
        self.memory_budget.set(i64::try_from(memory.budget).unwrap_or(i64::MAX));
        self.memory_used.set(i64::try_from(memory.used).unwrap_or(i64::MAX));
    }

    /// Counts the restart of an engine that was lost.
    pub(crate) fn engine_restarted(&self, model: &str) {
        self.engine_restarts.with_label_values(&[model]).inc();
    }

    /// Adds bytes of model files.
    pub(crate) fn downloaded(&self, model: &str, bytes: u64) {
        self.download_bytes.with_label_values(&[model]).inc_by(bytes);
    }

    /// Counts a fetch's end.
    pub(crate) fn download_ended(&self, model: &str, ok: bool, seconds: f64) {
        self.downloads.with_label_values(&[model, if ok { "ok" } else { "failed" }]).inc();
        self.download_seconds.with_label_values(&[model]).inc_by(seconds);
    }

    /// Shows who and where the worker is.
    pub(crate) fn show_status(&self, status: &NodeStatus) {
        self.info.with_label_values(&[status.node.as_str(), status.version.as_str()]).set(1);
        for name in STATES {
            self.state.with_label_values(&[name]).set(i64::from(name == state_name(status.state)));
        }
        let leaving = matches!(status.state, NodeState::Draining(_) | NodeState::Unloading);
        let left_ms = status.drain.as_ref().filter(|_| leaving).map_or(0, |drain| drain.deadline_ms);
        self.drain_remaining.set(left_ms as f64 / 1000.0);
    }

    /// Shows a model's load.
    pub(crate) fn show_load(&self, model: &str, load: &Load) {
        self.running.with_label_values(&[model]).set(load.running as i64);
        self.waiting.with_label_values(&[model]).set(load.waiting as i64);
        let usage = load.blocks_used as f64 / load.blocks.max(1) as f64;
        self.kv_usage.with_label_values(&[model]).set(usage);
        let kept = load.blocks_cached as f64 / load.blocks.max(1) as f64;
        self.kv_cached.with_label_values(&[model]).set(kept);
    }

    /// Returns one model's own handles, looked up once.
    pub(crate) fn model(&self, model: &str) -> ModelMetrics {
        ModelMetrics {
            prompt_tokens: self.prompt_tokens.with_label_values(&[model]),
            generation_tokens: self.generation_tokens.with_label_values(&[model]),
            engine_failures: self.engine_failures.with_label_values(&[model]),
            first_token: self.first_token.with_label_values(&[model]),
            inter_token: self.inter_token.with_label_values(&[model]),
            queue_seconds: self.queue_seconds.with_label_values(&[model]),
            prefill_seconds: self.prefill_seconds.with_label_values(&[model]),
            decode_seconds: self.decode_seconds.with_label_values(&[model]),
            preemptions: self.preemptions.with_label_values(&[model]),
            prefix_queries: self.prefix_queries.with_label_values(&[model]),
            prefix_hits: self.prefix_hits.with_label_values(&[model]),
            restored_blocks: self.restored_blocks.with_label_values(&[model]),
        }
    }
}

/// One model's handles for what happens at every token.
#[derive(Clone, Debug)]
pub(crate) struct ModelMetrics {
    pub(crate) prompt_tokens: IntCounter,
    pub(crate) generation_tokens: IntCounter,
    pub(crate) engine_failures: IntCounter,
    pub(crate) first_token: Histogram,
    pub(crate) inter_token: Histogram,
    pub(crate) restored_blocks: IntCounter,
    pub(crate) queue_seconds: Histogram,
    pub(crate) prefill_seconds: Histogram,
    pub(crate) decode_seconds: Histogram,
    preemptions: IntCounter,
    prefix_queries: IntCounter,
    prefix_hits: IntCounter,
}

impl ModelMetrics {
    /// Counts what happened between two looks at one scheduler.
    pub(crate) fn count_load(&self, before: &Load, now: &Load) {
        self.preemptions.inc_by(now.preemptions.saturating_sub(before.preemptions));
        self.prefix_queries.inc_by(now.prefix_query_tokens.saturating_sub(before.prefix_query_tokens));
        self.prefix_hits.inc_by(now.prefix_hit_tokens.saturating_sub(before.prefix_hit_tokens));
    }

    /// Counts what an event tells.
    pub(crate) fn count(&self, event: &EventKind) {
        if let EventKind::Token { .. } = event {
            self.generation_tokens.inc();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use words::{DrainPhase, DrainProgress, Incarnation, NodeId};

    use super::*;

    #[test]
    fn exactly_one_state_is_shown_and_time_is_left_only_on_the_way_out() {
        let registry = Registry::new();
        let metrics = Metrics::new(&registry).unwrap();
        let drain = Some(DrainProgress { deadline_ms: 1500, waiting_for: "x".into() });
        let first = NodeStatus::new(NodeId::new("n").unwrap(), Incarnation::default());
        let mut status = NodeStatus { drain, ..first };
        for (state, name, left) in [
            (NodeState::Held, "held", 0.0),
            (NodeState::Draining(DrainPhase::Closed), "draining", 1.5),
            (NodeState::Unloading, "unloading", 1.5),
            (NodeState::Drained, "drained", 0.0),
        ] {
            status.state = state;
            metrics.show_status(&status);
            let text = registry.render();
            let shown = text.lines().filter(|line| line.starts_with("neuron_node_state") && line.ends_with(" 1"));
            assert_eq!(shown.collect::<Vec<_>>(), [format!("neuron_node_state{{state=\"{name}\"}} 1")]);
            assert_eq!(metrics.drain_remaining.get(), left, "{name}");
        }
    }
}
