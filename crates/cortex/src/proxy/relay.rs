//! One client request over its attempts: routing, retries before the first token, the fence, the account.

use std::time::Duration;

use bytes::Bytes;
use fleet::{Fence, Route, RouteQuery, Slot, Target, route};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use wire::private::{Line, Meta};
use words::{Code, Error, Moment, Retry};

use super::attempt::{Attempt, Next};
use super::{Order, SharedProxy};

/// Most times a draining worker may hand one request back, so that no loop is endless.
const HAND_BACKS_MAX: u32 = 64;

/// The state of one request; dropping it ends its attempt and its account.
pub(crate) struct Relay {
    proxy: SharedProxy,
    order: Order,
    fence: Fence,
    attempt: Option<Attempt>,
    /// What the first attempt made of the request; a later one has to agree.
    meta: Option<Box<Meta>>,
    tried: Vec<Slot>,
    retries: u32,
    hand_backs: u32,
    wait_until: Moment,
    arrived: Moment,
    first_token: Option<Moment>,
    /// The worker said that everything was said.
    complete: bool,
    over: bool,
    outcome: Option<&'static str>,
    last_error: Option<Error>,
    rng: SmallRng,
    lines: Vec<Line>,
}

impl Relay {
    /// Begins.
    pub(crate) fn new(proxy: SharedProxy, order: Order) -> Self {
        let arrived = proxy.clock.now();
        proxy.deposit();
        Relay {
            wait_until: arrived + Duration::from_millis(proxy.options.proxy.route_wait_ms),
            rng: SmallRng::seed_from_u64(order.seed ^ order.created),
            fence: Fence::new(1),
            attempt: None,
            meta: None,
            tried: Vec::new(),
            retries: 0,
            hand_backs: 0,
            arrived,
            first_token: None,
            complete: false,
            over: false,
            outcome: None,
            last_error: None,
            lines: Vec::new(),
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
            let step = match &mut self.attempt {
                None => self.open().await.map(|()| None),
                Some(_) => self.step().await,
            };
            match step {
                Ok(Some(bytes)) if !bytes.is_empty() => return Some(Ok(bytes)),
                Ok(_) if self.over => return None,
                Ok(_) => {}
                Err(error) => {
                    if let Err(error) = self.after(error) {
                        self.over = true;
                        self.outcome = Some(error.code().row().code);
                        return Some(Err(error));
                    }
                }
            }
        }
    }

    /// Finds a worker and opens an attempt on it.
    async fn open(&mut self) -> Result<(), Error> {
        let target = self.find().await?;
        self.proxy.fleet.sent(target.slot);
        self.tried.push(target.slot);
        let number = self.fence.open();
        let node = target.node.clone();
        tracing::debug!(request_id = self.order.request_id, node = %node, attempt = number, "attempt");
        match Attempt::open(&self.proxy, &self.order, target, number).await {
            Ok(attempt) => {
                self.attempt = Some(attempt);
                Ok(())
            }
            Err(error) => {
                self.count_attempt(node.as_str(), error.code().row().code);
                Err(error)
            }
        }
    }

    async fn find(&mut self) -> Result<Target, Error> {
        let mut changes = self.proxy.fleet.watch();
        loop {
            let view = changes.borrow_and_update().clone();
            let query = RouteQuery {
                model: &self.order.model,
                tried: &self.tried,
                wait_until: self.wait_until,
                successor: None,
            };
            let sent = |slot| self.proxy.fleet.sent_since(slot);
            match route(&view, &query, sent, self.proxy.clock.now(), &mut self.rng) {
                Route::Forward(target) => return Ok(target),
                Route::Reject(error) => return Err(self.last_error.take().unwrap_or(error)),
                Route::Wait(until) => {
                    // Only a worker that handed the request back is worth waiting for again.
                    let handed_back = |error: &mut Error| error.code() != Code::Draining;
                    if let Some(error) = self.last_error.take_if(handed_back) {
                        return Err(error);
                    }
                    let deadline = self.proxy.clock.instant(until);
                    if let Ok(Ok(())) = tokio::time::timeout_at(deadline, changes.changed()).await {
                        // The view is newer than the refusals, so they no longer bind.
                        self.tried.clear();
                    }
                }
            }
        }
    }

    /// Takes one event of the open attempt.
    async fn step(&mut self) -> Result<Option<Bytes>, Error> {
        let Some(attempt) = &mut self.attempt else { return Ok(None) };
        let options = &self.proxy.options.proxy;
        let begun = self.first_token.is_some();
        let patience =
            Duration::from_millis(if begun { options.idle_timeout_ms } else { options.first_event_timeout_ms });
        self.lines.clear();
        match attempt.next(patience, &mut self.lines).await? {
            Next::Event(bytes) => {
                self.read_lines()?;
                Ok(Some(bytes))
            }
            Next::End if self.complete => {
                self.over = true;
                self.outcome = Some("ok");
                let node = attempt.target.node.clone();
                self.count_attempt(node.as_str(), "ok");
                Ok(None)
            }
            Next::End => Err(Error::new(Code::UpstreamFailed, "the worker ended the answer before it was complete")),
        }
    }

    fn read_lines(&mut self) -> Result<(), Error> {
        for line in std::mem::take(&mut self.lines) {
            match line {
                Line::Tokens { attempt, choice, index, ids, finish } => {
                    let accepted = self.fence.accept(attempt, choice, index, &ids, finish.is_some());
                    accepted.map_err(|error| {
                        Error::new(Code::UpstreamFailed, "the worker's tokens are out of turn").because(error)
                    })?;
                    self.note_tokens(ids.len() as u64);
                }
                Line::Usage(_) => self.complete = true,
                Line::Refusal(refusal) => return Err(refusal.into()),
                Line::Meta(meta) => self.note_meta(meta)?,
                Line::Progress(_) => {}
            }
        }
        Ok(())
    }

    /// The first attempt's word on the request binds all later ones that go on from its tokens.
    fn note_meta(&mut self, meta: Box<Meta>) -> Result<(), Error> {
        match &self.meta {
            Some(known) if self.fence.begun() && known.prompt_hash != meta.prompt_hash => {
                Err(Error::new(Code::ResumeMismatch, "the worker read another prompt than the one before it"))
            }
            _ => {
                self.meta = Some(meta);
                Ok(())
            }
        }
    }

    fn note_tokens(&mut self, count: u64) {
        let model = self.order.model.as_str();
        self.proxy.metrics.tokens.with_label_values(&[model]).inc_by(count);
        if self.first_token.is_none() {
            let now = self.proxy.clock.now();
            self.first_token = Some(now);
            let waited = now.since(self.arrived).as_secs_f64();
            self.proxy.metrics.first_token.with_label_values(&[model]).observe(waited);
        }
    }

    fn count_attempt(&self, node: &str, outcome: &str) {
        self.proxy.metrics.attempts.with_label_values(&[node, outcome]).inc();
    }

    /// Decides what follows a failed attempt: another one, or the end of the request with this error.
    fn after(&mut self, error: Error) -> Result<(), Error> {
        let code = error.code();
        if let Some(attempt) = self.attempt.take() {
            self.count_attempt(attempt.target.node.as_str(), code.row().code);
        }
        if let Some(source) = std::error::Error::source(&error) {
            tracing::warn!(request_id = self.order.request_id, code = code.row().code, %source, "attempt failed");
        }
        if self.fence.begun() {
            // The client has tokens: without a continuation the stream can only end with words.
            return Err(error);
        }
        // A worker that no longer has the model knows better than the view.
        let elsewhere = matches!(error.retry(), Retry::Elsewhere) || code == Code::ModelLoading;
        if !elsewhere || self.fence.attempt() == 0 {
            return Err(error);
        }
        if code == Code::Draining {
            self.hand_backs += 1;
            // The time it spent in that worker's queue must not count against the search for another one.
            let wait = Duration::from_millis(self.proxy.options.proxy.route_wait_ms);
            self.wait_until = self.proxy.clock.now() + wait;
            if self.hand_backs > HAND_BACKS_MAX {
                return Err(error);
            }
        } else {
            let options = &self.proxy.options.proxy;
            let kept = self.order.body.len() <= options.retry_body_bytes;
            if !kept || self.retries >= options.retries_max || !self.proxy.withdraw() {
                return Err(public(error));
            }
            self.retries += 1;
        }
        self.proxy.metrics.retries.with_label_values(&[code.row().code]).inc();
        self.last_error = Some(public(error));
        Ok(())
    }
}

/// Clients can't go elsewhere: what is worker's talk becomes a gateway's word.
fn public(error: Error) -> Error {
    match error.code() {
        Code::ModelNotHere => Error::new(Code::NoReplica, "no worker that has the model can take the request now"),
        _ => error,
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let model = self.order.model.as_str();
        let outcome = self.outcome.unwrap_or_else(|| {
            self.proxy.metrics.client_left.inc();
            Code::ClientClosed.row().code
        });
        let seconds = self.proxy.clock.now().since(self.arrived).as_secs_f64();
        self.proxy.metrics.requests.with_label_values(&[model, outcome]).inc();
        self.proxy.metrics.request_seconds.with_label_values(&[model]).observe(seconds);
        let tokens: usize = self.fence.choices().iter().map(|choice| choice.ids.len()).sum();
        let first_token_s = self.first_token.map(|first| first.since(self.arrived).as_secs_f64());
        tracing::info!(
            request_id = self.order.request_id,
            model,
            stream = self.order.stream,
            attempts = self.fence.attempt(),
            tokens,
            first_token_s,
            seconds,
            outcome,
            client_left = self.outcome.is_none(),
            "request ended"
        );
    }
}
