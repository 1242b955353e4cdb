//! A request's account at its end: metrics, its span, and the line of the log.

use service::traces::KeyValue;
use words::Code;

use super::{Relay, end_span};

impl Drop for Relay {
    fn drop(&mut self) {
        let ran = self.meta.is_some() || self.unread.is_some();
        if self.span.recording() {
            self.read_meta();
        }
        let model = self.order.model.as_str();
        // What clients make up is no label: each would stay in memory for ever.
        let known = ran || self.proxy.fleet.view().lists(&self.order.model);
        let label = if known { model } else { "unknown" };
        let outcome = self.outcome.unwrap_or_else(|| {
            self.proxy.metrics.client_left.inc();
            Code::ClientClosed.row().code
        });
        let seconds = self.proxy.clock.now().since(self.arrived).as_secs_f64();
        self.proxy.metrics.requests.with_label_values(&[label, outcome]).inc();
        self.proxy.metrics.request_seconds.with_label_values(&[label]).observe(seconds);
        let first_token_s = self.first_token.map(|first| first.since(self.arrived).as_secs_f64());
        end_span(std::mem::take(&mut self.attempt_span), outcome);
        let trace_id = self.span.trace_id();
        self.span.note(|| {
            [
                KeyValue::new(
                    "gen_ai.usage.input_tokens",
                    self.meta.as_ref().map_or(0, |meta| i64::from(meta.prompt_tokens)),
                ),
                KeyValue::new("gen_ai.usage.output_tokens", self.journey.accepted() as i64),
                KeyValue::new("cortex.attempts", i64::from(self.journey.attempt())),
                KeyValue::new("cortex.continuations", i64::from(self.continuations)),
            ]
        });
        end_span(std::mem::take(&mut self.span), outcome);
        tracing::info!(
            request_id = self.order.request_id,
            model,
            stream = self.order.stream,
            attempts = self.journey.attempt(),
            continuations = self.continuations,
            tokens = self.journey.accepted(),
            first_token_s,
            seconds,
            outcome,
            client_left = self.outcome.is_none(),
            trace_id,
            "request ended"
        );
    }
}
