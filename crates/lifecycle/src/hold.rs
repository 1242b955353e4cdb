//! A life that a rollout holds: opened by its coordinator, or by the right answer to the node's own canary.

use std::time::Duration;

use words::{Error, Moment, RolloutId};

use crate::node::{Act, CANARY_AGAIN_FIRST, CANARY_AGAIN_MAX, CANARY_MAX, HoldStep, Holding, NodeLife, ORDER_SPAN_MAX};
use crate::order::conflict;

impl NodeLife {
    /// Takes the coordinator's word: opens the node, or keeps holding it for `prolong`. Before the restart that the
    /// hold follows, it takes the claim on the next life back, or sets its time to live. Without any hold there is
    /// nothing to open, which is fine.
    ///
    /// # Errors
    /// `Conflict` when another rollout holds, for an older lease, or to prolong what is not there.
    pub fn release_hold(
        &mut self,
        now: Moment,
        rollout: &RolloutId,
        lease_revision: u64,
        prolong: Option<Duration>,
    ) -> Result<Vec<Act>, Error> {
        self.check_lease(rollout, lease_revision)?;
        let restarting = self.record.restart.as_ref().and_then(|restart| restart.claim.as_ref());
        let holder = self.hold.as_ref().map(|hold| &hold.claim).into_iter().chain(restarting).map(|claim| &claim.id);
        let (ours, others) = holder.fold((0, 0), |(ours, others), id| match id == rollout {
            true => (ours + 1, others),
            false => (ours, others + 1),
        });
        match (ours, others, prolong) {
            (0, 0, None) => return Ok(Vec::new()),
            (0, 0, Some(_)) => return Err(conflict("this worker is not held")),
            (0, _, _) => return Err(conflict("another rollout holds this worker")),
            _ => {}
        }
        self.record.lease = Some((rollout.clone(), lease_revision));
        let span = prolong.map(|span| span.min(ORDER_SPAN_MAX));
        if let Some(restart) = &mut self.record.restart
            && restart.claim.as_ref().is_some_and(|claim| claim.id == *rollout)
        {
            match (span, &mut restart.claim) {
                (Some(span), Some(claim)) => claim.hold_ttl_ms = span.as_millis() as u64,
                _ => restart.claim = None,
            }
        }
        let mut acts = Vec::new();
        match &mut self.hold {
            Some(hold) if hold.claim.id == *rollout => match span {
                Some(span) => {
                    hold.claim.lease_revision = lease_revision;
                    hold.step = HoldStep::Waiting { until: now + span };
                    self.record.hold = Some(hold.claim.clone());
                    self.persist(&mut acts);
                    acts.push(Act::Publish);
                }
                None => self.open(&mut acts),
            },
            _ => {
                self.persist(&mut acts);
                acts.push(Act::Publish);
            }
        }
        Ok(acts)
    }

    /// Ends the hold.
    fn open(&mut self, acts: &mut Vec<Act>) {
        self.hold = None;
        self.record.hold = None;
        self.persist(acts);
        self.admit(acts);
        acts.push(Act::Publish);
    }

    /// Takes the end of the node's own canary: the right answer opens it, anything else is named and tried again.
    pub fn canary_answered(&mut self, now: Moment, answer: Result<(), String>) -> Vec<Act> {
        let mut acts = Vec::new();
        let Some(Holding { step, .. }) = &mut self.hold else { return acts };
        let HoldStep::Asking { pause, .. } = *step else { return acts };
        match answer {
            Ok(()) => self.open(&mut acts),
            Err(reason) => {
                let longer = (pause * 2).min(CANARY_AGAIN_MAX);
                *step = HoldStep::Failed { again_at: now + pause, pause: longer, reason };
                acts.push(Act::Publish);
            }
        }
        acts
    }

    pub(crate) fn advance_hold(&mut self, now: Moment, acts: &mut Vec<Act>) {
        let Some(Holding { claim, step }) = &mut self.hold else { return };
        let pause = match step {
            HoldStep::Waiting { until } if now >= *until => CANARY_AGAIN_FIRST,
            HoldStep::Failed { again_at, pause, .. } if now >= *again_at => *pause,
            HoldStep::Asking { by, .. } if now >= *by => {
                let late = format!("it was not answered within {} s", CANARY_MAX.as_secs());
                acts.extend(self.canary_answered(now, Err(late)));
                return;
            }
            _ => return,
        };
        match claim.canary.clone() {
            None => self.open(acts),
            Some(canary) => {
                *step = HoldStep::Asking { by: now + CANARY_MAX, pause };
                acts.extend([Act::Publish, Act::RunCanary(canary)]);
            }
        }
    }
}
