//! What a node's life shows: its state, what it waits for and until when.

use std::time::Duration;

use words::{DrainPhase, DrainProgress, Hold, Intent, Moment, NodeState, NodeStatus};

use crate::node::{HoldStep, Holding, Leaving, NodeLife, OFFER_EVERY, Stage};

/// `1 request`, `2 requests`.
fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

impl NodeLife {
    /// Returns the node's state.
    pub fn state(&self) -> NodeState {
        match self.stage {
            Stage::Activating => NodeState::Activating,
            Stage::Open { .. } if self.hold.is_some() => NodeState::Held,
            Stage::Open { .. } => NodeState::Ready,
            Stage::Draining { drain, .. } => NodeState::Draining(drain.phase()),
            Stage::Unloading { .. } | Stage::Upgrading { .. } => NodeState::Unloading,
            Stage::Drained => NodeState::Drained,
            Stage::Stopped => NodeState::Stopped,
        }
    }

    /// Returns the intent in force.
    pub fn intent(&self) -> Intent {
        if self.record.restart.is_some() { Intent::Restart } else { self.record.intent }
    }

    /// Returns whether the process is on its way out, by an order or a signal.
    pub fn is_leaving(&self) -> bool {
        self.leaving.is_some()
    }

    /// Writes into `status` all that the machine knows.
    pub fn show(&self, now: Moment, status: &mut NodeStatus) {
        status.state = self.state();
        status.epoch = self.record.epoch;
        status.intent = self.intent();
        status.rollout = self.rollout.clone();
        status.upgrade = self.record.upgrade.clone();
        status.hold = self.hold.as_ref().map(|hold| self.show_hold(now, hold));
        status.drain = self.progress(now);
    }

    fn show_hold(&self, now: Moment, hold: &Holding) -> Hold {
        let left = match &hold.step {
            HoldStep::Unset => Duration::from_millis(hold.claim.hold_ttl_ms),
            HoldStep::Waiting { until } => until.since(now),
            HoldStep::Asking { .. } | HoldStep::Failed { .. } => Duration::ZERO,
        };
        Hold {
            rollout: hold.claim.id.clone(),
            lease_revision: hold.claim.lease_revision,
            ttl_ms: left.as_millis() as u64,
        }
    }

    /// Returns what the node waits for, and how long at most; `None` when it waits for nothing.
    fn progress(&self, now: Moment) -> Option<DrainProgress> {
        let (by, waiting_for) = match self.stage {
            Stage::Open { close_at: Some(at) } => (at, self.unaware()),
            Stage::Open { close_at: None } => return self.hold.as_ref().map(|hold| hold_progress(now, hold)),
            Stage::Draining { drain, .. } => {
                let running = count(self.facts.in_flight, "request");
                let text = match (drain.phase(), drain.handoff_at()) {
                    (DrainPhase::Settle, _) => self.unaware(),
                    (DrainPhase::Closed, Some(at)) => {
                        format!("{running} to end; handed over in {} s", at.since(now).as_secs())
                    }
                    (DrainPhase::Closed, None) => format!("{running} to end"),
                    (DrainPhase::Handoff, _) => {
                        format!("{running} to end or be taken over; {} offered", self.facts.offers_open)
                    }
                    (DrainPhase::Force, _) => format!("{running} to be told that they are cut"),
                };
                let force = drain.phase() == DrainPhase::Force;
                (if force { drain.over_at() } else { drain.cut_at() }, text)
            }
            Stage::Unloading { by } => (by, "the models to be unloaded".into()),
            Stage::Upgrading { by } => {
                let upgrade = self.record.restart.as_ref().and_then(|restart| restart.upgrade.as_deref());
                (by, format!("the upgrade '{}'", upgrade.unwrap_or_default()))
            }
            Stage::Activating | Stage::Drained | Stage::Stopped => return None,
        };
        Some(DrainProgress { deadline_ms: by.since(now).as_millis() as u64, waiting_for })
    }

    fn unaware(&self) -> String {
        format!("{} to know", count(self.facts.unaware_gateways, "gateway"))
    }

    /// Returns the moment by which `advance` must be called again.
    pub fn wake_at(&self) -> Option<Moment> {
        match self.stage {
            Stage::Open { close_at: Some(at) } => Some(at),
            Stage::Open { close_at: None } => match &self.hold.as_ref()?.step {
                HoldStep::Unset => None,
                HoldStep::Waiting { until: at } | HoldStep::Asking { by: at, .. } => Some(*at),
                HoldStep::Failed { again_at, .. } => Some(*again_at),
            },
            Stage::Draining { drain, offered } => {
                let offers = offered.filter(|_| drain.phase() == DrainPhase::Handoff);
                let again = offers.map(|(at, _)| at + OFFER_EVERY);
                Some(again.map_or(drain.wake_at(), |again| again.min(drain.wake_at())))
            }
            Stage::Unloading { by } | Stage::Upgrading { by } => Some(by),
            Stage::Activating | Stage::Drained | Stage::Stopped => None,
        }
    }

    /// Returns the moment by which [`crate::Act::Exit`] comes, when the node leaves; `None` when it stays.
    pub fn exit_by(&self) -> Option<Moment> {
        let leaving = self.leaving?;
        let restart = self.record.restart.as_ref().filter(|_| leaving == Leaving::Restart);
        let upgrade = if restart.is_some_and(|restart| restart.upgrade.is_some()) {
            self.rules.upgrade_max
        } else {
            Duration::ZERO
        };
        match self.stage {
            Stage::Draining { drain, .. } => Some(drain.over_at() + self.rules.unload_max + upgrade),
            Stage::Unloading { by } => Some(by + upgrade),
            Stage::Upgrading { by } => Some(by),
            Stage::Activating | Stage::Open { .. } | Stage::Drained | Stage::Stopped => None,
        }
    }
}

fn hold_progress(now: Moment, hold: &Holding) -> DrainProgress {
    let (at, waiting_for) = match &hold.step {
        HoldStep::Unset => (now, "the coordinator's word".to_string()),
        HoldStep::Waiting { until } => (*until, "the coordinator's word".to_string()),
        HoldStep::Asking { by, .. } => (*by, "the answer of its own canary".to_string()),
        HoldStep::Failed { again_at, reason, .. } => (*again_at, format!("a right answer to its canary: {reason}")),
    };
    DrainProgress { deadline_ms: at.since(now).as_millis() as u64, waiting_for }
}
