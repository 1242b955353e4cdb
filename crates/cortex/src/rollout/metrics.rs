//! What Prometheus sees of rollouts.

use fleet::rollout::{Phase, Progress, Rollout};
use service::metrics::prometheus::{IntGauge, IntGaugeVec};
use service::metrics::{MetricsError, Registry};

/// All metrics of rollouts.
#[derive(Clone, Debug)]
pub(crate) struct RolloutMetrics {
    /// 1 for the state that the last rollout is in.
    state: IntGaugeVec,
    /// Nodes of the last rollout.
    nodes: IntGaugeVec,
    /// 1 while somebody must decide.
    paused: IntGauge,
    /// 1 while the store can't be used.
    store_failed: IntGauge,
}

impl RolloutMetrics {
    /// Registers them.
    pub(crate) fn new(registry: &Registry) -> Result<Self, MetricsError> {
        let plain =
            |name, help| Ok::<_, MetricsError>(registry.gauge_vec(name, help, &[])?.with_label_values::<&str>(&[]));
        Ok(RolloutMetrics {
            state: registry.gauge_vec(
                "cortex_rollout_state",
                "1 for the state that the last rollout is in: running, paused, aborting, done or aborted.",
                &["state"],
            )?,
            nodes: registry.gauge_vec("cortex_rollout_nodes", "Nodes of the last rollout, by state.", &["state"])?,
            paused: plain("cortex_rollout_paused", "1 while a rollout waits for an operator to resume or abort it.")?,
            store_failed: plain("cortex_rollout_store_failed", "1 while the store of rollouts can't be used.")?,
        })
    }

    /// Shows the rollout as it is stored.
    pub(crate) fn show(&self, rollout: Option<&Rollout>) {
        for name in Phase::NAMES {
            let is = rollout.is_some_and(|rollout| rollout.phase.name() == name);
            self.state.with_label_values(&[name]).set(i64::from(is));
        }
        for name in Progress::NAMES {
            let nodes = rollout.into_iter().flat_map(|rollout| &rollout.nodes);
            let count = nodes.filter(|node| node.progress.name() == name).count();
            self.nodes.with_label_values(&[name]).set(count as i64);
        }
        self.paused.set(i64::from(rollout.is_some_and(|rollout| matches!(rollout.phase, Phase::Paused { .. }))));
    }

    /// Shows whether the store can be used.
    pub(crate) fn show_store(&self, failed: bool) {
        self.store_failed.set(i64::from(failed));
    }
}
