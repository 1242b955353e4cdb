//! One request's account: its metrics, its span, and the log line that ends it.

use std::sync::Arc;

use axum::body::Bytes;
use service::traces::{KeyValue, Span, list};
use wire::private::Line;
use words::{Code, Moment};

use super::DataPlane;
use crate::models::InUse;
use crate::stopped::Stopped;
use crate::streams::Reason;

/// What the end's log line and metrics need.
pub(super) struct Account {
    pub(super) plane: Arc<DataPlane>,
    /// Its place in its model.
    pub(super) model: InUse,
    request_id: String,
    completion_id: String,
    arrived: Moment,
    stream: bool,
    /// Since when it is no longer queued.
    pub(super) begun: Option<Moment>,
    first_token: Option<Moment>,
    last_token: Option<Moment>,
    pub(super) tokens: u32,
    /// A finish reason or an error's code; a client that left has none.
    pub(super) outcome: Option<&'static str>,
    /// Set once somebody has cancelled it.
    pub(super) cancelled: Option<Reason>,
    span: Span,
}

impl Account {
    pub(super) fn new(
        plane: Arc<DataPlane>,
        model: InUse,
        (request_id, completion_id): (String, String),
        arrived: Moment,
        stream: bool,
        span: Span,
    ) -> Self {
        Account {
            plane,
            model,
            request_id,
            completion_id,
            arrived,
            stream,
            begun: None,
            first_token: None,
            last_token: None,
            tokens: 0,
            outcome: None,
            cancelled: None,
            span,
        }
    }

    /// Tells of the end of a request that was cancelled; nobody waits for those who hear it.
    fn tell(&mut self, seconds: f64) {
        let Some(reason) = self.cancelled else { return };
        self.plane.stopped.tell(Stopped {
            model: self.model.id.clone(),
            request_id: std::mem::take(&mut self.request_id),
            completion_id: std::mem::take(&mut self.completion_id),
            reason,
            tokens: self.tokens,
            seconds,
        });
    }

    /// Makes the sign of life that a gateway gets.
    pub(super) fn progress(&self) -> Bytes {
        let load = self.model.engine.load();
        Line::Progress(format!("waiting running={} queued={}", load.running, load.waiting)).event()
    }

    /// Takes a token that was said just now.
    pub(super) fn token(&mut self) {
        let now = self.plane.clock.now();
        match self.last_token {
            Some(last) => self.model.inter_token(now.since(last)),
            None => {
                self.first_token = Some(now);
                self.model.metrics.first_token.observe(now.since(self.arrived).as_secs_f64());
            }
        }
        self.last_token = Some(now);
        self.tokens += 1;
    }

    /// Takes the time of each part of the request that it came to.
    fn parts(&self) {
        let metrics = &self.model.metrics;
        let wall = self.span.recording().then(|| self.plane.clock.wall());
        for (name, part, from, to) in [
            ("queue", &metrics.queue_seconds, Some(self.arrived), self.begun),
            ("prefill", &metrics.prefill_seconds, self.begun, self.first_token),
            ("decode", &metrics.decode_seconds, self.first_token, self.last_token),
        ] {
            let (Some(from), Some(to)) = (from, to) else { continue };
            part.observe(to.since(from).as_secs_f64());
            if let Some(wall) = &wall {
                self.span.past(name, wall(from), wall(to));
            }
        }
    }

    /// Ends the request's span. An outcome that is no error's code is a finish reason; a client that left is no failure.
    fn end_span(&mut self, outcome: &'static str) {
        self.span.note(|| {
            [
                KeyValue::new("gen_ai.usage.output_tokens", i64::from(self.tokens)),
                KeyValue::new("cortex.outcome", outcome),
            ]
        });
        match Code::from_text(outcome) {
            None => self.span.note(|| [list("gen_ai.response.finish_reasons", &[outcome])]),
            Some(Code::ClientClosed | Code::Cancelled) => {}
            Some(_) => self.span.fail(outcome),
        }
        drop(std::mem::take(&mut self.span));
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let now = self.plane.clock.now();
        let model = self.model.id.as_str();
        let outcome = self.outcome.unwrap_or_else(|| {
            self.plane.metrics.client_left(model);
            Code::ClientClosed.row().code
        });
        let seconds = now.since(self.arrived).as_secs_f64();
        self.plane.metrics.ended(model, outcome, seconds);
        self.parts();
        let trace_id = self.span.trace_id();
        let first_token_s = self.first_token.map(|first| first.since(self.arrived).as_secs_f64());
        let (request_id, tokens, stream) = (&self.request_id, self.tokens, self.stream);
        let client_left = self.outcome.is_none();
        tracing::info!(
            request_id,
            model,
            stream,
            tokens,
            first_token_s,
            seconds,
            outcome,
            client_left,
            trace_id,
            "request ended"
        );
        self.end_span(outcome);
        self.tell(seconds);
    }
}
