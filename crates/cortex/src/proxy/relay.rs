//! One client request over its attempts: the shell around `fleet::Journey`.

mod account;
mod lines;

use std::time::Duration;

use bytes::Bytes;
use fleet::{
    Ending, FleetView, Journey, Placements, Room, Route, RouteQuery, Slot, Step, Successor, Target, route,
    worth_waiting,
};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use service::metrics::prometheus::IntCounter;
use service::traces::{KeyValue, Span, SpanKind};
use tokio::sync::OwnedSemaphorePermit;
use wire::private::{Line, Meta, MetaText, Resume, ResumeChoice};
use words::{Code, Error, Moment};

use super::attempt::{Attempt, Next, Unopened};
use super::flights::Place;
use super::vigil::{Watch, with_loading};
use super::{Order, SharedProxy};
use crate::fleet_task::LoadWait;

/// How long a worker has to end a request that was cancelled: a step of its engine, and the way here.
const CANCEL_MAX: Duration = Duration::from_secs(5);
/// How often an offer that found no successor is looked at again.
const OFFER_AGAIN: Duration = Duration::from_millis(250);

/// The state of one request; dropping it ends its attempt and its account.
pub(crate) struct Relay {
    proxy: SharedProxy,
    order: Order,
    /// Its place among the requests that run.
    place: Place,
    /// Set once it is cancelled: until then its worker may end it.
    end_by: Option<Moment>,
    journey: Journey,
    attempt: Option<Attempt>,
    /// What the first attempt made of the request; a later one has to agree.
    meta: Option<Box<Meta>>,
    /// The same as it was said, until somebody needs it: most requests end before.
    unread: Option<MetaText>,
    watch: Watch,
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
            place: proxy.flights.enter(&order, arrived),
            end_by: None,
            journey: Journey::new(order.choices as usize, order.stream, proxy.options.proxy.journey(), arrived),
            rng: SmallRng::seed_from_u64(order.seed ^ order.created),
            attempt: None,
            meta: None,
            unread: None,
            watch: Watch::new(arrived, Duration::from_millis(proxy.options.proxy.load_wait_ms)),
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
                    return Some(Err(with_loading(&self.proxy, &self.order.model, error)));
                }
            }
        }
    }

    /// Finds a worker and opens an attempt on it.
    async fn open(&mut self) -> Result<(), Ending> {
        let mut routing = self.span.child("route", SpanKind::Internal);
        let (target, wait) = self.find().await.map_err(|error| {
            routing.fail(error.code().row().code);
            Ending::NobodyFound(error)
        })?;
        drop(routing);
        self.proxy.fleet.sent(target.slot);
        let number = self.journey.open(target.slot);
        self.place.flight.sent(number, target.slot);
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
        let (begun, loads) = (self.proxy.clock.now(), target.room.is_some());
        self.watch.begin(&self.proxy.options.proxy, begun);
        let (span, watch, flight) = (&self.attempt_span, &mut self.watch, &self.place.flight);
        // The worker ends what it has and knows why: a connection that goes says only that somebody left.
        let cancelled_in_vain = async {
            flight.cancelled().await;
            tokio::time::sleep(CANCEL_MAX).await;
        };
        let opened = tokio::select! {
            biased;
            opened = Attempt::open(&self.proxy, &self.order, body, target, number, span, watch) => opened,
            () = cancelled_in_vain => Err(Unopened { ending: Ending::Failed(cancelled()), sent: false }),
        };
        drop(wait);
        if loads {
            let waited = self.proxy.clock.now().since(begun).as_secs_f64();
            self.proxy.metrics.load_wait.with_label_values(&[self.order.model.as_str()]).observe(waited);
        }
        match opened {
            Ok(attempt) => {
                self.journey.reached();
                self.attempt = Some(attempt);
                Ok(())
            }
            Err(Unopened { ending, sent }) => {
                // What waited for its model was not at work.
                if sent && !loads {
                    self.journey.reached();
                }
                self.count_attempt(node.as_str(), reason(&ending));
                Err(ending)
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

    /// Asks for a way; one that may lead to a load is taken at once, so that the next request follows it.
    fn way(&mut self, view: &FleetView, successor: Option<&Successor>) -> (Route, Option<LoadWait>) {
        let fleet = &self.proxy.fleet;
        let (model, tried, wait_until) = (&self.order.model, self.journey.tried(), self.journey.wait_until());
        let mut placements = fleet.placements();
        let query = RouteQuery { model, tried, wait_until, successor, placements: &placements };
        let way = route(view, &query, |slot| fleet.sent_since(slot), self.proxy.clock.now(), &mut self.rng);
        let Route::Forward(Target { slot, room, on_demand: true, .. }) = &way else { return (way, None) };
        let wait = fleet.wait_at(&mut placements, model, *slot);
        drop(placements);
        if let Some(room) = room.filter(|room| *room != Room::Coming) {
            self.proxy.metrics.loads.with_label_values(&[model.as_str(), room.name()]).inc();
            tracing::info!(request_id = self.order.request_id, %model, room = room.name(), "a load for a request");
        }
        (way, Some(wait))
    }

    async fn find(&mut self) -> Result<(Target, Option<LoadWait>), Error> {
        let mut changes = self.proxy.fleet.watch();
        let successor = self.journey.successor();
        loop {
            if self.place.flight.is_cancelled() {
                return Err(cancelled());
            }
            let view = changes.borrow_and_update().clone();
            if let Some(id) = view.alias(&self.order.model).cloned() {
                self.order.rename(id)?;
                self.place.flight.resolved(&self.order.model);
            }
            let (way, wait) = self.way(&view, successor.as_ref());
            let until = match way {
                Route::Forward(target) if successor.is_none() => return Ok((target, wait)),
                Route::Forward(target) => match self.proxy.fleet.prefill(target.slot) {
                    Some(permit) => {
                        self.prefill = Some(permit);
                        return Ok((target, wait));
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
            drop(wait);
            let deadline = self.proxy.clock.instant(until);
            tokio::select! {
                changed = tokio::time::timeout_at(deadline, changes.changed()) => if let Ok(Ok(())) = changed {
                    // The view is newer than the refusals, so they no longer bind.
                    self.journey.forget_tried();
                },
                () = self.place.flight.cancelled() => {}
            }
        }
    }

    /// Takes one event of the open attempt.
    async fn step(&mut self) -> Result<Option<Bytes>, Ending> {
        self.take_offer()?;
        let Some(attempt) = &mut self.attempt else { return Ok(None) };
        self.lines.clear();
        let ends = [self.offered, self.end_by].into_iter().flatten();
        let until = ends.fold(self.watch.look_at(), Moment::min);
        let next = tokio::select! {
            biased;
            next = attempt.next(self.proxy.clock.instant(until), &mut self.lines) => next,
            () = self.place.flight.cancelled(), if self.end_by.is_none() => {
                self.end_by = Some(self.proxy.clock.now() + CANCEL_MAX);
                return Ok(None);
            }
        };
        let next = match next {
            // The answer is whole; how its connection ends is nobody's concern.
            Err(_) if self.complete => Next::End,
            next => next.map_err(Ending::Failed)?,
        };
        match next {
            Next::Event(bytes) => {
                let now = self.proxy.clock.now();
                self.watch.heard(now);
                self.read_lines(now).map_err(Ending::Failed)?;
                Ok(Some(bytes))
            }
            Next::Quiet if self.complete => {
                // The end of the body does not come; without it the connection is of no more use.
                (self.over, self.outcome) = (true, Some(self.proper()));
                Ok(None)
            }
            Next::Quiet if self.end_by.is_some_and(|end| self.proxy.clock.now() >= end) => {
                Err(Ending::Failed(cancelled()))
            }
            Next::Quiet => {
                let Some(slot) = self.slot() else { return Ok(None) };
                let begun = self.journey.begun() || self.journey.bound();
                self.watch.look(&self.proxy, &self.order.model, slot, begun)?;
                Ok(None)
            }
            Next::End if self.complete => {
                let node = attempt.target.node.clone();
                self.over = true;
                self.outcome = Some(self.proper());
                self.count_attempt(node.as_str(), "ok");
                Ok(None)
            }
            Next::End => {
                let error = Error::new(Code::UpstreamFailed, "the worker ended the answer before it was complete");
                Err(Ending::Failed(error))
            }
        }
    }

    /// Returns how a whole answer ended.
    fn proper(&self) -> &'static str {
        if self.place.flight.is_cancelled() { Code::Cancelled.row().code } else { "ok" }
    }

    /// Takes a leaving worker's offer as soon as another worker could go on.
    fn take_offer(&mut self) -> Result<(), Ending> {
        let (Some(slot), Some(again)) = (self.slot(), self.offered) else { return Ok(()) };
        if self.journey.bound() {
            return Ok(());
        }
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
            placements: &Placements::default(),
        };
        match route(&view, &query, |slot| self.proxy.fleet.sent_since(slot), now, &mut self.rng) {
            // A stream that runs is not moved to where it would have to wait for a load.
            Route::Forward(target) if target.room.is_none() && self.proxy.fleet.may_prefill(target.slot) => {
                Err(Ending::HandedOver)
            }
            // It runs on where it is; the worker knows that some offers are not taken.
            _ => Ok(()),
        }
    }

    fn slot(&self) -> Option<Slot> {
        self.attempt.as_ref().map(|attempt| attempt.target.slot)
    }

    fn count_attempt(&mut self, node: &str, outcome: &'static str) {
        self.proxy.metrics.attempts.with_label_values(&[node, outcome]).inc();
        end_span(std::mem::take(&mut self.attempt_span), outcome);
    }

    /// Does what the journey decides after an attempt that did not complete the answer; returns the bytes that
    /// complete it where no worker is needed for that.
    fn after(&mut self, ending: Ending) -> Result<Option<Bytes>, Error> {
        let reason = reason(&ending);
        if let Some(attempt) = self.attempt.take() {
            self.count_attempt(attempt.target.node.as_str(), reason);
        }
        self.place.flight.landed();
        (self.prefill, self.offered) = (None, None);
        // Whatever ended the attempt: nobody wants another one.
        let ending = if self.place.flight.is_cancelled() { Ending::Failed(cancelled()) } else { ending };
        self.read_meta();
        if let Ending::Failed(error) | Ending::NobodyFound(error) = &ending {
            let (request_id, source) = (&self.order.request_id, std::error::Error::source(error));
            // What a client did wrong is no warning to an operator, and a client could fill the log with such.
            if error.code().row().http < 500 {
                tracing::info!(request_id, %error, source, "attempt refused");
            } else {
                tracing::warn!(request_id, %error, source, "attempt failed");
            }
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
                let finished = self.journey.choices().iter().all(|choice| choice.finished);
                self.over = true;
                self.outcome = Some(if finished { "ok" } else { Code::Cancelled.row().code });
                self.proxy.metrics.completed.inc();
                let (choices, reasoning) = (self.journey.choices(), self.reasoning.iter().sum());
                Ok(Some(self.order.completion(self.meta.as_deref(), choices, reasoning)))
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

fn reason(ending: &Ending) -> &'static str {
    match ending {
        Ending::Failed(error) | Ending::NobodyFound(error) => error.code().row().code,
        Ending::HandedOver => "handed_over",
    }
}

/// Ends the span of an attempt or a request. An error's code means that it failed, unless its client left.
fn end_span(mut span: Span, outcome: &'static str) {
    span.note(|| [KeyValue::new("cortex.outcome", outcome)]);
    let failed = |code: Code| !matches!(code, Code::ClientClosed | Code::Cancelled);
    if span.recording() && Code::from_text(outcome).is_some_and(failed) {
        span.fail(outcome);
    }
}

fn cancelled() -> Error {
    Error::new(Code::Cancelled, "the request was cancelled by an operator before there was an answer to give")
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
