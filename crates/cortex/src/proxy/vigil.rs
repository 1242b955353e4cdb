//! The watch over one attempt: how long its worker may be silent, and how long its model may be on its way.

use std::time::Duration;

use fleet::{Ending, Patience, PatienceFacts, PatienceLimits, Slot, Verdict, coming, still_loading};
use words::{Code, Error, Loading, ModelId, Moment};

use super::Proxy;
use super::attempt::silent;
use crate::options::ProxyOptions;

/// The shell around `fleet::Patience`.
pub(super) struct Watch {
    patience: Patience,
    look_at: Moment,
    /// Longest wait for the model, from the last time that a worker had it.
    load_wait: Duration,
    load_until: Moment,
    /// The worker has answered, so it has the model.
    answered: bool,
}

impl Watch {
    /// Begins with the request.
    pub(super) fn new(now: Moment, load_wait: Duration) -> Self {
        let (patience, load_until) = (Patience::new(now), now + load_wait);
        Watch { patience, look_at: now, load_wait, load_until, answered: false }
    }

    /// Begins anew with an attempt; the wait for the model goes on.
    pub(super) fn begin(&mut self, options: &ProxyOptions, now: Moment) {
        let patience = Patience::new(now);
        let look_at = patience.first_look(&self.limits(options));
        (self.patience, self.look_at, self.answered) = (patience, look_at, false);
    }

    fn limits(&self, options: &ProxyOptions) -> PatienceLimits {
        PatienceLimits {
            first_event: Duration::from_millis(options.first_event_timeout_ms),
            stall: Duration::from_millis(options.stall_min_ms),
            load_until: self.load_until,
        }
    }

    /// Takes the head of the worker's answer.
    pub(super) fn answered(&mut self, options: &ProxyOptions, now: Moment) {
        self.load_until = now + self.load_wait;
        self.begin(options, now);
        self.answered = true;
    }

    /// Takes a sign of life of the stream.
    pub(super) fn heard(&mut self, now: Moment) {
        self.patience.heard(now);
        self.load_until = now + self.load_wait;
    }

    /// Returns when to look again.
    pub(super) fn look_at(&self) -> Moment {
        self.look_at
    }

    /// Judges the attempt's silence; `begun` says whether the client has a token.
    ///
    /// # Errors
    /// What ends the attempt.
    pub(super) fn look(&mut self, proxy: &Proxy, model: &ModelId, slot: Slot, begun: bool) -> Result<(), Ending> {
        let (now, view) = (proxy.clock.now(), proxy.fleet.view());
        let node = view.node(slot);
        let node_status = node.and_then(|node| node.status.as_ref());
        let status = node_status.and_then(|status| status.model(model));
        let facts = PatienceFacts {
            control_heard: node.map_or(Moment::ZERO, |node| node.heard_at),
            inter_token_p99: Duration::from_millis(status.map_or(0, |model| u64::from(model.inter_token_p99_ms))),
            begun,
            coming: !self.answered && node_status.is_some_and(|status| coming(status, model)),
        };
        match self.patience.look(now, &self.limits(&proxy.options.proxy), &facts) {
            Verdict::WaitUntil(at) => {
                self.look_at = at;
                Ok(())
            }
            Verdict::Stalled => Err(Ending::Failed(silent())),
            Verdict::Unreachable => {
                Err(Ending::Failed(Error::new(Code::UpstreamTimeout, "the worker is out of reach")))
            }
            Verdict::StillLoading => {
                let here = status.map(|status| Loading {
                    state: status.state,
                    progress_permille: status.progress_permille,
                    eta_ms: status.eta_ms,
                });
                let unsaid = || Error::new(Code::ModelLoading, format!("the model '{model}' is loading"));
                Err(Ending::NobodyFound(here.map_or_else(unsaid, |loading| still_loading(model, loading))))
            }
        }
    }
}

/// Says how far the load is, where a worker's refusal did not.
pub(super) fn with_loading(proxy: &Proxy, model: &ModelId, error: Error) -> Error {
    if error.code() != Code::ModelLoading || error.loading().is_some() {
        return error;
    }
    match proxy.fleet.view().loading(model) {
        Some(loading) => error.while_loading(loading),
        None => error,
    }
}
