//! The metric registry, handed down and never global; it also knows what it can say, for the reference.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};

pub use prometheus;
use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{
    CounterVec, Encoder, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, TextEncoder,
};

/// What registration can fail with: a name that is taken, or none.
pub type MetricsError = prometheus::Error;

/// Time to a first token and the like, in seconds; vLLM's buckets.
pub const LATENCY_SECONDS: &[f64] =
    &[0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
/// Time between two tokens, in seconds; vLLM's buckets.
pub const TIME_PER_OUTPUT_TOKEN_SECONDS: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0];
/// Time of a whole request, in seconds; vLLM's buckets.
pub const REQUEST_SECONDS: &[f64] =
    &[0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0];

/// Returns the sum over all labels of a family.
pub fn total(family: &IntCounterVec) -> u64 {
    let families = family.collect();
    families.iter().flat_map(|family| family.get_metric()).map(|metric| metric.get_counter().get_value() as u64).sum()
}

/// The content type of [`Registry::render`].
pub const TEXT_FORMAT: &str = prometheus::TEXT_FORMAT;

/// What a family of metrics is, as its registration said.
#[derive(Clone, Debug)]
struct Description {
    kind: &'static str,
    labels: Vec<String>,
    help: String,
}

/// One program's metrics.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    registry: prometheus::Registry,
    /// By name; a family without samples yet is here and not in a scrape.
    described: Arc<Mutex<BTreeMap<String, Description>>>,
}

impl Registry {
    /// Makes an empty registry.
    pub fn new() -> Self {
        Registry::default()
    }

    fn register<C: Collector + Clone + 'static>(&self, kind: &'static str, metric: C) -> Result<C, MetricsError> {
        self.registry.register(Box::new(metric.clone()))?;
        let mut described = self.described.lock().unwrap_or_else(PoisonError::into_inner);
        for desc in metric.desc() {
            let (labels, help) = (desc.variable_labels.clone(), desc.help.clone());
            described.insert(desc.fq_name.clone(), Description { kind, labels, help });
        }
        Ok(metric)
    }

    /// Registers whole counters.
    ///
    /// # Errors
    /// A name that is taken or malformed; so below.
    pub fn counter_vec(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, MetricsError> {
        self.register("counter", IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    /// Registers counters of fractions, seconds for instance.
    #[allow(clippy::missing_errors_doc)]
    pub fn float_counter_vec(&self, name: &str, help: &str, labels: &[&str]) -> Result<CounterVec, MetricsError> {
        self.register("counter", CounterVec::new(Opts::new(name, help), labels)?)
    }

    /// Registers whole gauges.
    #[allow(clippy::missing_errors_doc)]
    pub fn gauge_vec(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, MetricsError> {
        self.register("gauge", IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    /// Registers gauges of fractions.
    #[allow(clippy::missing_errors_doc)]
    pub fn float_gauge_vec(&self, name: &str, help: &str, labels: &[&str]) -> Result<GaugeVec, MetricsError> {
        self.register("gauge", GaugeVec::new(Opts::new(name, help), labels)?)
    }

    /// Registers histograms.
    #[allow(clippy::missing_errors_doc)]
    pub fn histogram_vec(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: &[f64],
    ) -> Result<HistogramVec, MetricsError> {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.register("histogram", HistogramVec::new(options, labels)?)
    }

    /// Returns all metrics in Prometheus' text format 0.0.4.
    pub fn render(&self) -> String {
        render(&self.gather())
    }

    /// Returns the families that have samples, by name.
    pub fn gather(&self) -> Vec<MetricFamily> {
        self.registry.gather()
    }

    /// Returns all that is registered as a table in Markdown: names, types, labels, help.
    pub fn reference(&self) -> String {
        let mut out = "| name | type | labels | help |\n|---|---|---|---|\n".to_string();
        for (name, Description { kind, labels, help }) in
            self.described.lock().unwrap_or_else(PoisonError::into_inner).iter()
        {
            let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
            let _ = writeln!(out, "| `{name}` | {kind} | {} | {} |", labels.join(", "), help.replace('|', "\\|"));
        }
        out
    }
}

/// Returns families in Prometheus' text format 0.0.4.
pub fn render(families: &[MetricFamily]) -> String {
    let mut out = Vec::new();
    if let Err(error) = TextEncoder::new().encode(families, &mut out) {
        tracing::error!(%error, "metrics could not be encoded");
    }
    String::from_utf8(out).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_reference_names_also_what_has_no_samples_yet() {
        let registry = Registry::new();
        registry.counter_vec("a_total", "Counts a | b.", &["x", "y"]).unwrap();
        registry.histogram_vec("b_seconds", "Times.", &[], LATENCY_SECONDS).unwrap();
        assert_eq!(registry.render(), "");
        let lines = "| `a_total` | counter | `x`, `y` | Counts a \\| b. |\n| `b_seconds` | histogram |  | Times. |\n";
        assert!(registry.reference().ends_with(lines), "{}", registry.reference());
        assert!(registry.gauge_vec("a_total", "Another.", &[]).is_err(), "a name is taken once");
    }
}
