//! What a node accepts of operators and rollouts: the one table, compare-and-set by epoch and lease.

use std::time::Duration;

use words::{Code, Epoch, Error, HandoffPolicy, Intent, IntentOrder, Moment, RolloutId};

use crate::drain::DrainBudget;
use crate::node::{Act, Leaving, NodeLife, ORDER_SPAN_MAX, RestartRecord, Stage};

pub(crate) fn conflict(message: impl Into<String>) -> Error {
    Error::new(Code::Conflict, message)
}

impl NodeLife {
    /// Takes an order. The one table of what is accepted:
    ///
    /// | while | None | Cordon | Drain | Restart |
    /// |---|---|---|---|---|
    /// | activating, ready, held, cordoned | yes | yes | yes | yes |
    /// | draining by a drain | lifts it | no | may only hasten | yes |
    /// | draining by a restart | lifts it | no | no | may only hasten |
    /// | drained | loads again | no | yes | yes |
    /// | unloading, upgrading, stopped, or after a signal | no | no | no | no |
    ///
    /// # Errors
    /// `Conflict` for another epoch, an older lease, another life, or a "no" of the table; `InvalidRequest` for what
    /// this node can't do. Nothing has changed then.
    pub fn order(&mut self, now: Moment, order: &IntentOrder) -> Result<Vec<Act>, Error> {
        self.check(order)?;
        let mut acts = Vec::new();
        self.record.epoch = Epoch(self.record.epoch.0 + 1);
        if let Some(claim) = &order.rollout {
            self.record.lease = Some((claim.id.clone(), claim.lease_revision));
        }
        let budget = self.budget(order);
        match order.intent {
            Intent::None => self.lift(&mut acts),
            Intent::Cordon => self.cordon(now, &mut acts),
            Intent::Drain => {
                self.record.intent = Intent::Drain;
                self.persist(&mut acts);
                self.drain(now, budget, &mut acts);
            }
            Intent::Restart => {
                // A life that is held and restarted is held again: only its rollout opens it.
                let held = self.hold.as_ref().map(|hold| hold.claim.clone());
                let claim = order.rollout.clone().or(held);
                self.rollout = claim.as_ref().map(|claim| claim.id.clone()).or(self.rollout.take());
                if order.upgrade.is_some() {
                    self.record.upgrade = None;
                }
                let upgrade = order.upgrade.clone();
                self.record.restart = Some(RestartRecord { incarnation: self.incarnation, claim, upgrade });
                self.leaving = Some(Leaving::Restart);
                self.persist(&mut acts);
                self.drain(now, budget, &mut acts);
            }
        }
        Ok(acts)
    }

    fn check(&self, order: &IntentOrder) -> Result<(), Error> {
        if order.seen != self.record.epoch {
            let (seen, epoch) = (order.seen.0, self.record.epoch.0);
            return Err(conflict(format!("the order saw epoch {seen}, this worker is at {epoch}: look again")));
        }
        if let Some(claim) = &order.rollout {
            self.check_lease(&claim.id, claim.lease_revision)?;
        }
        match (self.stage, self.leaving, order.intent) {
            (_, Some(Leaving::Signal { .. }), _) => {
                return Err(conflict("this worker is leaving by a signal, which nothing calls off"));
            }
            (Stage::Unloading { .. } | Stage::Upgrading { .. } | Stage::Stopped, ..) => {
                return Err(conflict("this worker is unloading; order it when that is over"));
            }
            (Stage::Draining { .. }, Some(Leaving::Restart), Intent::Cordon | Intent::Drain) => {
                return Err(conflict("this worker is restarting; lift that first"));
            }
            (Stage::Draining { .. } | Stage::Drained, _, Intent::Cordon) => {
                return Err(conflict("this worker is drained, which is more than a cordon; undrain it first"));
            }
            _ => {}
        }
        if order.intent == Intent::Restart && order.incarnation != Some(self.incarnation) {
            let message = format!("the order is for another life of this worker; this one is {}", self.incarnation);
            return Err(conflict(message));
        }
        if order.upgrade.is_some() && order.intent != Intent::Restart {
            return Err(Error::invalid("upgrade", "an upgrade goes with a restart only"));
        }
        let remembered = matches!(order.intent, Intent::Cordon | Intent::Drain);
        if !self.rules.durable && (remembered || order.rollout.is_some()) {
            let message = "this worker has no node.state_dir, so it could not remember the order over a restart";
            return Err(Error::new(Code::InvalidRequest, message));
        }
        if order.deadline.is_some_and(|deadline| deadline > ORDER_SPAN_MAX) {
            return Err(Error::invalid("deadline_ms", "a deadline is at most a day"));
        }
        Ok(())
    }

    pub(crate) fn check_lease(&self, rollout: &RolloutId, revision: u64) -> Result<(), Error> {
        match &self.record.lease {
            Some((known, newest)) if known == rollout && revision < *newest => {
                Err(conflict(format!("the rollout's lease {revision} is over; {newest} has spoken")))
            }
            _ => Ok(()),
        }
    }

    /// The order's budget. With another deadline than the node's own the hand-over begins at the same share of it.
    fn budget(&self, order: &IntentOrder) -> DrainBudget {
        let own = self.rules.drain;
        let deadline = order.deadline.unwrap_or(own.deadline);
        let share = |soft: Duration| match own.deadline.is_zero() {
            true => Duration::ZERO,
            false => deadline.mul_f64((soft.as_secs_f64() / own.deadline.as_secs_f64()).min(1.0)),
        };
        let handoff = match order.handoff {
            HandoffPolicy::Now => Some(Duration::ZERO),
            HandoffPolicy::Soft => own.handoff.map(share),
            HandoffPolicy::Never => None,
        };
        DrainBudget { handoff, deadline, ..own }
    }

    fn lift(&mut self, acts: &mut Vec<Act>) {
        self.record.intent = Intent::None;
        self.record.restart = None;
        self.leaving = None;
        self.cut = false;
        self.persist(acts);
        let was = self.stage;
        self.stage = match was {
            Stage::Draining { .. } if self.loaded => Stage::Open { close_at: None },
            Stage::Draining { .. } | Stage::Drained => Stage::Activating,
            Stage::Open { .. } => Stage::Open { close_at: None },
            other => other,
        };
        if matches!(was, Stage::Draining { .. } | Stage::Drained) {
            acts.extend([Act::Withdraw, Act::Reopen]);
        }
        self.admit(acts);
        acts.push(Act::Publish);
        if matches!(was, Stage::Draining { .. } | Stage::Drained) && matches!(self.stage, Stage::Activating) {
            acts.push(Act::Load);
        }
    }

    fn cordon(&mut self, now: Moment, acts: &mut Vec<Act>) {
        let fresh = self.record.intent != Intent::Cordon;
        self.record.intent = Intent::Cordon;
        self.persist(acts);
        if let Stage::Open { close_at } = &mut self.stage
            && fresh
        {
            *close_at = Some(now + self.rules.drain.settle_max);
        }
        acts.push(Act::Publish);
    }
}
