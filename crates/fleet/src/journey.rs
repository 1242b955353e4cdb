//! One client request over its attempts: what follows when an attempt ends before the answer does.
//!
//! Before the first token a request may simply be tried elsewhere. From then on the client holds tokens, so only a
//! *continuation* may follow: another worker of the same continue-fingerprint that goes on after the last accepted
//! token. Hand-overs of leaving workers are free; crashes are counted, and two in a row without a new token are poison.
//! What an engine says that nobody can continue binds the request to it: from then on its end is the request's.

use std::time::Duration;

use words::{Code, Error, Fingerprint, Moment, Retry, RolloutId};

use crate::attempt::{Accepted, Fence, FenceError};
use crate::budget::RetryBudget;
use crate::view::Slot;

/// Bounds of one request's way.
#[derive(Clone, Copy, Debug)]
pub struct JourneyLimits {
    /// Most tries elsewhere before the first token, apart from what leaving workers hand back.
    pub retries_max: u32,
    /// Longest search for a worker that can take it.
    pub route_wait: Duration,
    /// Longest search for a worker that can continue it.
    pub continue_wait: Duration,
}

/// Most times that a request may be handed back or over, or find that a worker won't continue it.
pub const HAND_BACKS_MAX: u32 = 64;
/// Most continuations after crashes.
pub const CONTINUATIONS_MAX: u32 = 8;
/// Crashes in a row, each of an attempt without a newly accepted token, that end a request.
pub const POISON_CRASHES: u32 = 2;

/// What the first attempt made of the request; every later one has to agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The prompt, as its worker read it.
    pub prompt_hash: Fingerprint,
    /// Who may continue.
    pub continue_fingerprint: Fingerprint,
    /// Who gives equal bytes.
    pub exact_fingerprint: Fingerprint,
}

/// What routing needs to know of a continuation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Successor {
    /// Only its like may continue.
    pub continue_fingerprint: Fingerprint,
    /// Its like is preferred.
    pub exact_fingerprint: Fingerprint,
    /// The rollout that drives the request away: workers that it restarted already are preferred.
    pub rollout: Option<RolloutId>,
}

/// What follows an attempt.
#[derive(Debug)]
pub enum Step {
    /// Another attempt: from the start, or after the accepted tokens when there are any.
    Again,
    /// The client of a stream has all that it will get, and is owed a proper end: every choice has finished and only the
    /// bookkeeping was lost, or the request was cancelled.
    Complete,
    /// The request ends with this error.
    Fail(Error),
}

/// How an attempt ended without completing the answer.
#[derive(Debug)]
pub enum Ending {
    /// Its worker's connection or silence, or its engine, failed.
    Failed(Error),
    /// The gateway took the offer of a leaving worker.
    HandedOver,
    /// The search for a worker found nobody in its time. The worker before, if there was one, has been judged already.
    NobodyFound(Error),
}

/// The way of one request. Holds every token that was accepted.
#[derive(Clone, Debug)]
pub struct Journey {
    fence: Fence,
    limits: JourneyLimits,
    streamed: bool,
    origin: Option<Origin>,
    /// The present attempt's request is with its worker, and not known to wait in its queue: a crash may be its doing.
    at_work: bool,
    /// The present attempt left the queue.
    ran: bool,
    /// Tokens accepted when the present attempt was opened.
    held: usize,
    tried: Vec<Slot>,
    retries: u32,
    hand_backs: u32,
    continuations: u32,
    barren: u32,
    /// Clients hold what nobody else can go on from.
    bound: bool,
    poisoned: bool,
    wait_until: Moment,
    rollout: Option<RolloutId>,
}

impl Journey {
    /// Begins the way of a request with `choices` choices, whose client reads a stream or one JSON.
    pub fn new(choices: usize, streamed: bool, limits: JourneyLimits, now: Moment) -> Self {
        Journey {
            fence: Fence::new(choices),
            limits,
            streamed,
            origin: None,
            at_work: false,
            ran: false,
            held: 0,
            tried: Vec::new(),
            retries: 0,
            hand_backs: 0,
            continuations: 0,
            barren: 0,
            bound: false,
            poisoned: false,
            wait_until: now + limits.route_wait,
            rollout: None,
        }
    }

    /// Opens the next attempt, on `slot`; whatever an earlier one still says is refused from now on.
    pub fn open(&mut self, slot: Slot) -> u32 {
        self.tried.push(slot);
        (self.at_work, self.ran) = (false, false);
        self.held = self.accepted();
        self.fence.open()
    }

    /// The request has reached the worker.
    pub fn reached(&mut self) {
        self.at_work = true;
    }

    /// The worker shows life without having begun: the request waits in its queue.
    pub fn queued(&mut self) {
        self.at_work = self.ran;
    }

    /// The worker has begun to run the request.
    pub fn runs(&mut self) {
        (self.at_work, self.ran) = (true, true);
    }

    /// Takes what an attempt before the first token made of the request, from somebody who did not read it when it was
    /// said. Must be told before the attempt's end, or a successor, is asked for.
    pub fn originates(&mut self, origin: Origin) {
        self.origin = Some(origin);
    }

    /// Takes what the present attempt made of the request, which it says as it begins to run it.
    ///
    /// # Errors
    /// `ResumeMismatch` when an attempt that continues read something else than the one before.
    pub fn began(&mut self, origin: Origin) -> Result<(), Error> {
        self.runs();
        match self.origin {
            Some(known) if self.fence.begun() => {
                let same = known.prompt_hash == origin.prompt_hash
                    && known.continue_fingerprint == origin.continue_fingerprint;
                let mismatch =
                    || Error::new(Code::ResumeMismatch, "the worker read another prompt than the one before");
                same.then_some(()).ok_or_else(mismatch)
            }
            _ => {
                self.origin = Some(origin);
                Ok(())
            }
        }
    }

    /// Accepts tokens; see [`Fence::accept`].
    ///
    /// # Errors
    /// [`FenceError`] when they are old, out of turn or nobody's.
    pub fn accept(
        &mut self,
        attempt: u32,
        choice: u32,
        index: u32,
        ids: &[u32],
        finished: bool,
    ) -> Result<(), FenceError> {
        self.fence.accept(attempt, choice, index, ids, finished)?;
        self.barren = 0;
        Ok(())
    }

    /// Takes words that are no tokens: the client has them, and only this attempt can go on from them.
    pub fn bind(&mut self) {
        (self.at_work, self.ran, self.bound) = (true, true, true);
        self.barren = 0;
    }

    /// Names the rollout that drives the request from its worker.
    pub fn driven_by(&mut self, rollout: Option<RolloutId>) {
        self.rollout = rollout.or(self.rollout.take());
    }

    /// Takes the end of the present attempt, or of the search for one, and decides what follows.
    pub fn ended(&mut self, now: Moment, ending: Ending, budget: &mut RetryBudget) -> Step {
        if self.fence.finished() && self.streamed {
            return Step::Complete;
        }
        if let Ending::Failed(error) | Ending::NobodyFound(error) = &ending
            && error.code() == Code::Cancelled
            && self.fence.begun()
            && self.streamed
        {
            // What it has is its answer; one JSON can be made by a worker alone.
            return Step::Complete;
        }
        if self.bound {
            return Step::Fail(match ending {
                Ending::Failed(error) | Ending::NobodyFound(error) => error,
                Ending::HandedOver => Error::new(Code::StreamCut, "nobody else can go on with this answer"),
            });
        }
        let error = match ending {
            Ending::HandedOver => return self.free(now, Error::new(Code::Draining, "the worker is leaving")),
            Ending::NobodyFound(error) => return Step::Fail(error),
            Ending::Failed(error) => error,
        };
        if self.fence.attempt() == 0 {
            return Step::Fail(error);
        }
        if self.at_work && crashed(error.code()) {
            // An attempt that got on is no sign of poison, but of a neighbour's.
            self.barren = if self.accepted() > self.held { 0 } else { self.barren + 1 };
            if self.barren >= POISON_CRASHES {
                self.poisoned = true;
                let message = "the request was given up: workers failed on it again and again without a new token";
                return Step::Fail(Error::new(Code::PoisonRequest, message).because(error));
            }
        }
        if self.fence.begun() { self.go_on(now, error) } else { self.retry(now, error, budget) }
    }

    /// After the first token.
    fn go_on(&mut self, now: Moment, error: Error) -> Step {
        let code = error.code();
        let movable = matches!(error.retry(), Retry::Elsewhere) || matches!(code, Code::ModelLoading | Code::StreamCut);
        if !movable || self.origin.is_none() {
            return Step::Fail(error);
        }
        if !(self.at_work && crashed(code)) {
            return self.free(now, error);
        }
        self.continuations += 1;
        if self.continuations > CONTINUATIONS_MAX {
            return Step::Fail(error);
        }
        self.search(now);
        Step::Again
    }

    /// Before the first token.
    fn retry(&mut self, now: Moment, error: Error, budget: &mut RetryBudget) -> Step {
        let code = error.code();
        if code == Code::Draining {
            return self.free(now, error);
        }
        // A worker that no longer has the model knows better than the view.
        let elsewhere = matches!(error.retry(), Retry::Elsewhere) || code == Code::ModelLoading;
        if !elsewhere || self.retries >= self.limits.retries_max || !budget.withdraw(now) {
            return Step::Fail(error);
        }
        self.retries += 1;
        self.search(now);
        Step::Again
    }

    /// A move that costs nothing but is bounded, so that no loop is endless.
    fn free(&mut self, now: Moment, error: Error) -> Step {
        self.hand_backs += 1;
        if self.hand_backs > HAND_BACKS_MAX {
            return Step::Fail(error);
        }
        self.search(now);
        Step::Again
    }

    /// The time spent with a worker does not count against the search for another one. One that made progress may
    /// be asked again.
    fn search(&mut self, now: Moment) {
        let begun = self.fence.begun();
        self.wait_until = now + if begun { self.limits.continue_wait } else { self.limits.route_wait };
        if self.accepted() > self.held {
            let last = self.tried.pop();
            self.tried.clear();
            self.tried.extend(last);
        }
    }

    /// Forgets who was tried: the view is newer than their refusals.
    pub fn forget_tried(&mut self) {
        self.tried.clear();
    }

    /// Returns who was tried since the last progress.
    pub fn tried(&self) -> &[Slot] {
        &self.tried
    }

    /// Returns until when a worker may be searched.
    pub fn wait_until(&self) -> Moment {
        self.wait_until
    }

    /// Returns whom a continuation may go to; `None` before the first token.
    pub fn successor(&self) -> Option<Successor> {
        let origin = self.origin.filter(|_| self.fence.begun())?;
        Some(Successor {
            continue_fingerprint: origin.continue_fingerprint,
            exact_fingerprint: origin.exact_fingerprint,
            rollout: self.rollout.clone(),
        })
    }

    /// Returns whether it was given up because workers failed on it.
    pub fn poisoned(&self) -> bool {
        self.poisoned
    }

    /// Returns the present attempt's number, 0 before the first.
    pub fn attempt(&self) -> u32 {
        self.fence.attempt()
    }

    /// Returns whether any token was accepted.
    pub fn begun(&self) -> bool {
        self.fence.begun()
    }

    /// Returns whether the client holds words that only the present attempt can go on from.
    pub fn bound(&self) -> bool {
        self.bound
    }

    /// Returns what each choice has.
    pub fn choices(&self) -> &[Accepted] {
        self.fence.choices()
    }

    /// Returns how many tokens were accepted.
    pub fn accepted(&self) -> usize {
        self.fence.choices().iter().map(|choice| choice.ids.len()).sum()
    }
}

/// Returns whether a request that failed so before its first token waits when nobody can take it just then: its worker
/// broke or is leaving, and may be back. Every other failure is a considered word that its client can have at once.
pub fn worth_waiting(code: Code) -> bool {
    code == Code::Draining || crashed(code)
}

/// Failures under which a worker, or the way to it, broke; every other one is its own considered word.
fn crashed(code: Code) -> bool {
    matches!(code, Code::UpstreamFailed | Code::UpstreamTimeout | Code::EngineFailed)
}

#[cfg(test)]
#[path = "journey_tests.rs"]
mod tests;
