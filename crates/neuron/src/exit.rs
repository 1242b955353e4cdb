//! The way out: the drain machine's shell, then the unloading, each with its bound.

use std::time::Duration;

use lifecycle::{Drain, DrainFacts, DrainStep};
use service::notify::Notifier;
use service::server::Server;
use service::signals::Signal;
use tokio::sync::mpsc;
use words::{Code, DrainPhase, Generation, NodeState};

use crate::control::Sessions;
use crate::models::Models;
use crate::options::DrainOptions;
use crate::publisher::Publisher;
use service::clock::Clock;
use service::gate::Gate;

/// What the drain touches.
pub(crate) struct Leaving<'a> {
    pub(crate) clock: Clock,
    pub(crate) gate: &'a Gate,
    pub(crate) models: &'a Models,
    pub(crate) publisher: &'a Publisher,
    pub(crate) sessions: &'a Sessions,
    pub(crate) data: Option<&'a Server>,
    pub(crate) notifier: &'a Notifier,
    pub(crate) options: &'a DrainOptions,
}

impl Leaving<'_> {
    /// Drains; returns how many streams were cut.
    pub(crate) async fn drain(&self, signals: &mut mpsc::Receiver<Signal>) -> usize {
        let begun = self.clock.now();
        self.models.close();
        self.publisher.node_state(NodeState::Draining(DrainPhase::Settle));
        let announced: Generation = self.publisher.snapshot().generation;
        let mut drain = Drain::begin(begun, self.options.budget());
        let mut in_flight = self.gate.watch();
        let mut acks = self.sessions.watch();
        let (mut forced, mut cut, mut reported) = (false, 0, usize::MAX);
        loop {
            let running = in_flight.borrow_and_update().in_flight;
            acks.mark_unchanged();
            let facts = DrainFacts { in_flight: running, unaware_gateways: self.sessions.unaware(announced), forced };
            match drain.advance(self.clock.now(), facts) {
                Some(DrainStep::Close) => self.close(),
                Some(DrainStep::Cut) => cut = self.cut(running),
                Some(DrainStep::Finish) => break,
                None => {
                    if running < reported {
                        // Progress is real, so the manager may wait for the rest of the budget.
                        self.notifier.extend_timeout(self.clock.until(drain.wake_at()) + Duration::from_secs(5));
                        self.notifier.status(&format!("draining: {running} requests left"));
                        reported = running;
                    }
                    tokio::select! {
                        _ = in_flight.changed() => {}
                        _ = acks.changed() => {}
                        () = tokio::time::sleep_until(self.clock.instant(drain.wake_at())) => {}
                        Some(signal) = signals.recv() => {
                            tracing::warn!(?signal, "second signal: cutting what still runs");
                            forced = true;
                        }
                    }
                }
            }
        }
        let seconds = self.clock.now().since(begun).as_secs_f64();
        tracing::info!(seconds, cut, "drained");
        cut
    }

    fn close(&self) {
        self.gate.close();
        self.publisher.node_state(NodeState::Draining(DrainPhase::Closed));
        for (_, engine) in self.models.engines() {
            engine.hand_back();
        }
        if let Some(data) = self.data {
            data.begin_close();
        }
    }

    fn cut(&self, running: usize) -> usize {
        tracing::warn!(running, "the drain's deadline has come: cutting what still runs");
        self.publisher.node_state(NodeState::Draining(DrainPhase::Force));
        for (_, engine) in self.models.engines() {
            engine.fail_all(Code::StreamCut, "the worker is leaving and its time to finish this answer is over");
        }
        running
    }

    /// Unloads every model, all at once, each within the bound; one that fails never keeps the rest.
    pub(crate) async fn unload(&self) {
        self.publisher.node_state(NodeState::Unloading);
        let bound = Duration::try_from_secs_f64(self.options.unload_max_s).unwrap_or_default();
        let unload = |id: words::ModelId| async move {
            match tokio::time::timeout(bound, self.models.unload(&id, Duration::ZERO)).await {
                Ok(Ok(_)) => tracing::info!(model = %id, "unloaded"),
                Ok(Err(error)) => tracing::warn!(model = %id, %error, "unload failed; going on"),
                Err(_) => tracing::warn!(model = %id, ?bound, "unload took too long; going on"),
            }
        };
        futures_util::future::join_all(self.models.ids().into_iter().map(unload)).await;
        self.publisher.node_state(NodeState::Stopped);
    }
}
