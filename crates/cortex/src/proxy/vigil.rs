//! The watch over one attempt: how long its worker may be silent, and how long its model may be on its way.

use std::time::Duration;

use fleet::{Ending, Patience, PatienceFacts, PatienceLimits, Slot, Verdict, coming, still_loading};
use words::{Code, Error, Loading, ModelId, Moment};

use super::Proxy;
use super::attempt::silent;

/// The shell around `fleet::Patience`.
pub(super) struct Watch {
    patience: Patience,
    look_at: Moment,
    /// Until when the request waits for its model, over all its attempts.
    load_until: Moment,
    /// The worker has answered, so it has the model.
    answered: bool,
}

impl Watch {
    /// Begins with the request.
    pub(super) fn new(now: Moment, load_until: Moment) -> Self {
        Watch { patience: Patience::new(now), look_at: now, load_until, answered: false }
    }

    /// Begins anew with an attempt.
    pub(super) fn begin(&mut self, now: Moment) {
        *self = Watch::new(now, self.load_until);
    }

    /// Takes the head of the worker's answer.
    pub(super) fn answered(&mut self, now: Moment) {
        self.begin(now);
        self.answered = true;
    }

    /// Takes a sign of life of the stream.
    pub(super) fn heard(&mut self, now: Moment) {
        self.patience.heard(now);
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
        let options = &proxy.options.proxy;
        let limits = PatienceLimits {
            first_event: Duration::from_millis(options.first_event_timeout_ms),
            stall: Duration::from_millis(options.stall_min_ms),
            load_until: self.load_until,
        };
        match self.patience.look(now, &limits, &facts) {
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
