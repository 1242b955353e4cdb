//! One client request over its attempts: the shell around `fleet::Journey`, and the account at the end.

use std::time::Duration;

use bytes::Bytes;
use fleet::{
    Ending, Journey, Origin, Patience, PatienceFacts, PatienceLimits, Route, RouteQuery, Slot, Step, Target, Verdict,
    route, worth_waiting,
};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use service::metrics::prometheus::IntCounter;
use service::traces::{KeyValue, Span, SpanKind};
use tokio::sync::OwnedSemaphorePermit;
use wire::private::{Line, Meta, MetaText, Resume, ResumeChoice};
use words::{Code, Error, Moment};

use super::attempt::{Attempt, Next, Unopened, silent};
use super::{Order, SharedProxy};

/// How often an offer that found no successor is looked at again.
const OFFER_AGAIN: Duration = Duration::from_millis(250);

/// The state of one request; dropping it ends its attempt and its account.
pub(crate) struct Relay {
    proxy: SharedProxy,
    order: Order,
    journey: Journey,
    attempt: Option<Attempt>,
    /// What the first attempt made of the request; a later one has to agree.
    meta: Option<Box<Meta>>,
    /// The same as it was said, until somebody needs it: most requests end before.
    unread: Option<MetaText>,
    patience: Patience,
    look_at: Moment,
    /// The worker is leaving and the stream may be taken elsewhere; looked at from then on.
    offered: Option<Moment>,
    /// Held while a worker computes anew what another one had.
    prefill: Option<OwnedSemaphorePermit>,
    arrived: Moment,
    /// For each choice how many of its tokens were reasoning, as its worker counts.
    reasoning: Vec<u32>,
    first_token: Option<Moment>,
    last_token: Moment,
    /// Looked up once, at the first token.
    tokens: Option<IntCounter>,
    /// Attempts after the first token.
    continuations: u32,
    /// The worker said that everything was said.
    complete: bool,
    over: bool,
    outcome: Option<&'static str>,
    last_error: Option<Error>,
    rng: SmallRng,
    lines: Vec<Line>,
    /// The request's span, and that of its open attempt.
    span: Span,
    attempt_span: Span,
}

impl Relay {
    /// Begins.
    pub(crate) fn new(proxy: SharedProxy, order: Order, span: Span) -> Self {
        let arrived = proxy.clock.now();
        proxy.deposit();
        Relay {
            journey: Journey::new(order.choices as usize, order.stream, proxy.options.proxy.journey(), arrived),
            rng: SmallRng::seed_from_u64(order.seed ^ order.created),
            attempt: None,
            meta: None,
            unread: None,
            patience: Patience::new(arrived),
            look_at: arrived,
            offered: None,
            prefill: None,
            arrived,
            reasoning: vec![0; order.choices as usize],
            first_token: None,
            last_token: arrived,
            tokens: None,
            continuations: 0,
            complete: false,
            over: false,
            outcome: None,
            last_error: None,
            lines: Vec::new(),
            span,
            attempt_span: Span::default(),
            proxy,
            order,
        }
    }

    /// Returns the next bytes for the client: whole events. `None` at the proper end.
    ///
    /// # Errors
    /// Whatever ends the request; nothing follows.
    pub(crate) async fn next(&mut self) -> Option<Result<Bytes, Error>> {
        if self.over {
            return None;
        }
        loop {
            let step = match &self.attempt {
                None => self.open().await.map(|()| None),
                Some(_) => self.step().await,
            };
            let step = match step {
                Ok(bytes) => Ok(bytes),
                Err(ending) => self.after(ending),
            };
            match step {
                Ok(Some(bytes)) if !bytes.is_empty() => return Some(Ok(bytes)),
                Ok(_) if self.over => return None,
                Ok(_) => {}
                Err(error) => {
                    self.over = true;
                    self.outcome = Some(error.code().row().code);
                    return Some(Err(error));
                }
            }
        }
    }

    /// Finds a worker and opens an attempt on it.
    async fn open(&mut self) -> Result<(), Ending> {
        let mut routing = self.span.child("route", SpanKind::Internal);
        let target = self.find().await.map_err(|error| {
            routing.fail(error.code().row().code);
            Ending::NobodyFound(error)
        })?;
        drop(routing);
        self.proxy.fleet.sent(target.slot);
        let number = self.journey.open(target.slot);
        let body = self.body().map_err(Ending::Failed)?;
        let node = target.node.clone();
        let accepted = self.journey.accepted();
        tracing::debug!(request_id = self.order.request_id, node = %node, attempt = number, accepted, "attempt");
        self.attempt_span = self.span.child("proxy", SpanKind::Client);
        self.attempt_span.note(|| {
            [
                KeyValue::new("cortex.node", node.to_string()),
                KeyValue::new("cortex.attempt", i64::from(number)),
                KeyValue::new("cortex.accepted_tokens", accepted as i64),
                KeyValue::new("server.address", target.data_address.clone()),
            ]
        });
        match Attempt::open(&self.proxy, &self.order, body, target, number, &self.attempt_span).await {
            Ok(attempt) => {
                self.journey.reached();
                self.attempt = Some(attempt);
                self.patience = Patience::new(self.proxy.clock.now());
                self.look_at = self.patience.first_look(&self.limits());
                Ok(())
            }
            Err(Unopened { error, sent }) => {
                if sent {
                    self.journey.reached();
                }
                self.count_attempt(node.as_str(), error.code().row().code);
                Err(Ending::Failed(error))
            }
        }
    }

    /// Returns the body of the next attempt: the client's own, or with what it already has.
    fn body(&self) -> Result<Bytes, Error> {
        let Some(meta) = self.meta.as_ref().filter(|_| self.journey.begun()) else {
            return Ok(self.order.body.clone());
        };
        let choices = self.journey.choices().iter().map(|choice| ResumeChoice { ids: choice.ids.clone() });
        Resume { choices: choices.collect(), meta: (**meta).clone() }.splice(&self.order.body)
    }

    async fn find(&mut self) -> Result<Target, Error> {
        let mut changes = self.proxy.fleet.watch();
        let successor = self.journey.successor();
        loop {
            let view = changes.borrow_and_update().clone();
            let wait_until = self.journey.wait_until();
            let (model, tried) = (&self.order.model, self.journey.tried());
            let query = RouteQuery { model, tried, wait_until, successor: successor.as_ref() };
            let sent = |slot| self.proxy.fleet.sent_since(slot);
            let until = match route(&view, &query, sent, self.proxy.clock.now(), &mut self.rng) {
                Route::Forward(target) if successor.is_none() => return Ok(target),
                Route::Forward(target) => match self.proxy.fleet.prefill(target.slot) {
                    Some(permit) => {
                        self.prefill = Some(permit);
                        return Ok(target);
                    }
                    // Others compute their answers' past there just now; it takes a prefill's time.
                    None => self.proxy.clock.now() + PREFILL_AGAIN,
                },
                Route::Reject(error) => return Err(self.last_error.take().unwrap_or(error)),
                Route::Wait(until) => {
                    // As long as the client has nothing to lose.
                    let hopeless = |error: &mut Error| successor.is_none() && !worth_waiting(error.code());
                    if let Some(error) = self.last_error.take_if(hopeless) {
                        return Err(error);
                    }
                    until
                }
            };
            let deadline = self.proxy.clock.instant(until);
            if let Ok(Ok(())) = tokio::time::timeout_at(deadline, changes.changed()).await {
                // The view is newer than the refusals, so they no longer bind.
                self.journey.forget_tried();
            }
        }
    }

    /// Takes one event of the open attempt.
    async fn step(&mut self) -> Result<Option<Bytes>, Ending> {
        self.take_offer()?;
        let Some(attempt) = &mut self.attempt else { return Ok(None) };
        self.lines.clear();
        let until = self.offered.map_or(self.look_at, |again| self.look_at.min(again));
        let next = match attempt.next(self.proxy.clock.instant(until), &mut self.lines).await {
            // The answer is whole; how its connection ends is nobody's concern.
            Err(_) if self.complete => Next::End,
            next => next.map_err(Ending::Failed)?,
        };
        match next {
            Next::Event(bytes) => {
                let now = self.proxy.clock.now();
                self.patience.heard(now);
                self.read_lines(now).map_err(Ending::Failed)?;
                Ok(Some(bytes))
            }
            Next::Quiet if self.complete => {
                // The end of the body does not come; without it the connection is of no more use.
                (self.over, self.outcome) = (true, Some("ok"));
                Ok(None)
            }
            Next::Quiet => {
                self.look().map_err(Ending::Failed)?;
                Ok(None)
            }
            Next::End if self.complete => {
                self.over = true;
                self.outcome = Some("ok");
                let node = attempt.target.node.clone();
                self.count_attempt(node.as_str(), "ok");
                Ok(None)
            }
            Next::End => {
                let error = Error::new(Code::UpstreamFailed, "the worker ended the answer before it was complete");
                Err(Ending::Failed(error))
            }
        }
    }

    fn limits(&self) -> PatienceLimits {
        let options = &self.proxy.options.proxy;
        PatienceLimits {
            first_event: Duration::from_millis(options.first_event_timeout_ms),
            stall: Duration::from_millis(options.stall_min_ms),
        }
    }

    /// Judges the attempt's silence.
    fn look(&mut self) -> Result<(), Error> {
        let Some(slot) = self.slot() else { return Ok(()) };
        let (now, view) = (self.proxy.clock.now(), self.proxy.fleet.view());
        let node = view.node(slot);
        let model = node.and_then(|node| node.status.as_ref()?.model(&self.order.model));
        let facts = PatienceFacts {
            control_heard: node.map_or(Moment::ZERO, |node| node.heard_at),
            inter_token_p99: Duration::from_millis(model.map_or(0, |model| u64::from(model.inter_token_p99_ms))),
            begun: self.journey.begun(),
        };
        match self.patience.look(now, &self.limits(), &facts) {
            Verdict::WaitUntil(at) => {
                self.look_at = at;
                Ok(())
            }
            Verdict::Stalled => Err(silent()),
            Verdict::Unreachable => Err(Error::new(Code::UpstreamTimeout, "the worker is out of reach")),
        }
    }

    /// Takes a leaving worker's offer as soon as another worker could go on.
    fn take_offer(&mut self) -> Result<(), Ending> {
        let (Some(slot), Some(again)) = (self.slot(), self.offered) else { return Ok(()) };
        let now = self.proxy.clock.now();
        if now < again {
            return Ok(());
        }
        self.offered = Some(now + OFFER_AGAIN);
        self.read_meta();
        let view = self.proxy.fleet.view();
        let rollout = view.node(slot).and_then(|node| node.status.as_ref()?.rollout.clone());
        self.journey.driven_by(rollout);
        let successor = self.journey.successor();
        let query = RouteQuery {
            model: &self.order.model,
            tried: &[slot],
            wait_until: Moment::ZERO,
            successor: successor.as_ref(),
        };
        match route(&view, &query, |slot| self.proxy.fleet.sent_since(slot), now, &mut self.rng) {
            Route::Forward(target) if self.proxy.fleet.may_prefill(target.slot) => Err(Ending::HandedOver),
            // It runs on where it is; the worker knows that some offers are not taken.
            _ => Ok(()),
        }
    }

    fn slot(&self) -> Option<Slot> {
        self.attempt.as_ref().map(|attempt| attempt.target.slot)
    }

    fn read_lines(&mut self, now: Moment) -> Result<(), Error> {
        let mut lines = std::mem::take(&mut self.lines);
        for line in lines.drain(..) {
            match line {
                Line::Tokens { attempt, choice, index, ids, finish, reasoning } => {
                    let accepted = self.journey.accept(attempt, choice, index, &ids, finish.is_some());
                    accepted.map_err(|error| {
                        Error::new(Code::UpstreamFailed, "the worker's tokens are out of turn").because(error)
                    })?;
                    self.note_tokens(now, ids.len() as u64);
                    if let Some(tokens) = self.reasoning.get_mut(choice as usize) {
                        *tokens = reasoning;
                    }
                }
                Line::Usage(_) => self.complete = true,
                Line::Refusal(refusal) => return Err(refusal.into()),
                Line::Meta(meta) => self.note_meta(meta)?,
                Line::Offer => self.offered = Some(now),
                Line::Progress(_) => self.journey.queued(),
                Line::More => {}
            }
        }
        self.lines = lines;
        Ok(())
    }

    /// The first attempt's word on the request binds all later ones that go on from its tokens.
    fn note_meta(&mut self, text: MetaText) -> Result<(), Error> {
        if !self.journey.begun() {
            self.journey.runs();
            self.unread = Some(text);
            return Ok(());
        }
        self.read_meta();
        text.read().map_or(Ok(()), |meta| self.journey.began(origin(&meta)))
    }

    /// Reads what the first attempt made of the request, before somebody asks for it.
    fn read_meta(&mut self) {
        if let Some(meta) = self.unread.take().and_then(|text| text.read()) {
            self.journey.originates(origin(&meta));
            self.meta = Some(Box::new(meta));
        }
    }

    fn note_tokens(&mut self, now: Moment, count: u64) {
        let (model, metrics) = (self.order.model.as_str(), &self.proxy.metrics);
        self.tokens.get_or_insert_with(|| metrics.tokens.with_label_values(&[model])).inc_by(count);
        if self.first_token.is_none() {
            self.first_token = Some(now);
            metrics.first_token.with_label_values(&[model]).observe(now.since(self.arrived).as_secs_f64());
        } else if self.prefill.take().is_some() {
            let gap = now.since(self.last_token).as_secs_f64();
            metrics.gap.with_label_values(&[model]).observe(gap);
        }
        self.last_token = now;
    }

    fn count_attempt(&mut self, node: &str, outcome: &'static str) {
        self.proxy.metrics.attempts.with_label_values(&[node, outcome]).inc();
        end_span(std::mem::take(&mut self.attempt_span), outcome);
    }

    /// Does what the journey decides after an attempt that did not complete the answer; returns the bytes that
    /// complete it where no worker is needed for that.
    fn after(&mut self, ending: Ending) -> Result<Option<Bytes>, Error> {
        let reason = match &ending {
            Ending::Failed(error) | Ending::NobodyFound(error) => error.code().row().code,
            Ending::HandedOver => "handed_over",
        };
        if let Some(attempt) = self.attempt.take() {
            self.count_attempt(attempt.target.node.as_str(), reason);
        }
        (self.prefill, self.offered) = (None, None);
        self.read_meta();
        if let Ending::Failed(error) | Ending::NobodyFound(error) = &ending {
            let source = std::error::Error::source(error);
            tracing::warn!(request_id = self.order.request_id, %error, source, "attempt failed");
        }
        let last_error = match &ending {
            Ending::Failed(error) => Some(public(Error::new(error.code(), error.message()))),
            Ending::HandedOver | Ending::NobodyFound(_) => None,
        };
        match self.proxy.decide(&mut self.journey, ending) {
            Step::Again => {
                self.last_error = last_error;
                let metrics = &self.proxy.metrics;
                if self.journey.begun() {
                    self.continuations += 1;
                    metrics.continuations.with_label_values(&[reason]).inc();
                } else {
                    metrics.retries.with_label_values(&[reason]).inc();
                }
                Ok(None)
            }
            Step::Complete => {
                (self.over, self.outcome) = (true, Some("ok"));
                self.proxy.metrics.completed.inc();
                let (tokens, reasoning) = (self.journey.accepted(), self.reasoning.iter().sum());
                Ok(Some(self.order.completion(self.meta.as_deref(), tokens, reasoning)))
            }
            Step::Fail(error) => {
                if self.journey.poisoned() {
                    self.proxy.suspect(&self.order);
                }
                Err(public(error))
            }
        }
    }
}

/// Ends the span of an attempt or a request. An error's code means that it failed, unless its client left.
fn end_span(mut span: Span, outcome: &'static str) {
    span.note(|| [KeyValue::new("cortex.outcome", outcome)]);
    if span.recording() && Code::from_text(outcome).is_some_and(|code| code != Code::ClientClosed) {
        span.fail(outcome);
    }
}

fn origin(meta: &Meta) -> Origin {
    Origin {
        prompt_hash: meta.prompt_hash,
        continue_fingerprint: meta.continue_fingerprint,
        exact_fingerprint: meta.exact_fingerprint,
    }
}

/// How soon a worker that computes others' past is asked again.
const PREFILL_AGAIN: Duration = Duration::from_millis(20);

/// Clients can't go elsewhere: what is worker's talk becomes a gateway's word.
fn public(error: Error) -> Error {
    match error.code() {
        Code::ModelNotHere => Error::new(Code::NoReplica, "no worker that has the model can take the request now"),
        Code::ResumeMismatch => Error::new(Code::NoReplica, "the worker was lost, and no other one can go on"),
        _ => error,
    }
}

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
