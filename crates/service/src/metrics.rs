//! The metric registry, handed down and never global.

pub use prometheus;
use prometheus::core::Collector;
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

/// One program's metrics.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    registry: prometheus::Registry,
}

impl Registry {
    /// Makes an empty registry.
    pub fn new() -> Self {
        Registry::default()
    }

    fn register<C: Collector + Clone + 'static>(&self, metric: C) -> Result<C, MetricsError> {
        self.registry.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    /// Registers whole counters.
    ///
    /// # Errors
    /// A name that is taken or malformed; so below.
    pub fn counter_vec(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, MetricsError> {
        self.register(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    /// Registers counters of fractions, seconds for instance.
    #[allow(clippy::missing_errors_doc)]
    pub fn float_counter_vec(&self, name: &str, help: &str, labels: &[&str]) -> Result<CounterVec, MetricsError> {
        self.register(CounterVec::new(Opts::new(name, help), labels)?)
    }

    /// Registers whole gauges.
    #[allow(clippy::missing_errors_doc)]
    pub fn gauge_vec(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, MetricsError> {
        self.register(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    /// Registers gauges of fractions.
    #[allow(clippy::missing_errors_doc)]
    pub fn float_gauge_vec(&self, name: &str, help: &str, labels: &[&str]) -> Result<GaugeVec, MetricsError> {
        self.register(GaugeVec::new(Opts::new(name, help), labels)?)
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
        self.register(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels)?)
    }

    /// Returns all metrics in Prometheus' text format 0.0.4.
    pub fn render(&self) -> String {
        let mut out = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut out) {
            tracing::error!(%error, "metrics could not be encoded");
        }
        String::from_utf8(out).unwrap_or_default()
    }
}
