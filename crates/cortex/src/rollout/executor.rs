//! The task that carries a rollout out: reads, plans, stores, takes one step, settles it, and begins again.
//!
//! Before each step the rollout is stored by compare-and-swap under the lease's revision, and after it too. So of two
//! gateways that both believe to coordinate one is refused by the store before it acts, and what an operator stored in
//! between (a pause, an abort) is seen before the next step.

use std::sync::Arc;
use std::time::Duration;

use fleet::rollout::{Claim, Outcome, Phase, Rollout, Step, Timers, World, plan};
use service::clock::Clock;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use words::{GatewayId, Moment, RolloutId};

use super::hands::{Errand, Hands};
use super::metrics::RolloutMetrics;
use super::store::{Shelf, StoreError};
use crate::fleet_task::Fleet;

/// The pace of the coordinator.
const TICK: Duration = Duration::from_millis(250);
/// The pace of those who watch, and of a coordinator whose store fails.
const WATCH_TICK: Duration = Duration::from_secs(1);
/// Pause after a step that was not taken.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// What the task needs.
pub(crate) struct Executor {
    pub(crate) fleet: Fleet,
    pub(crate) clock: Clock,
    pub(crate) gateway: GatewayId,
    pub(crate) shelf: Shelf,
    pub(crate) hands: Arc<dyn Hands>,
    pub(crate) metrics: RolloutMetrics,
}

/// A running task; it ends when this is dropped, at the latest.
pub(crate) struct Running {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Running {
    /// Ends the task and gives the lease back, so that another gateway goes on at once.
    pub(crate) async fn stop(self) {
        self.stop.send_replace(true);
        if tokio::time::timeout(AGAIN_AFTER * 2, self.task).await.is_err() {
            tracing::warn!("the lease of the rollout could not be given back in time; it runs out by itself");
        }
    }
}

impl Executor {
    /// Starts the task.
    pub(crate) fn spawn(self) -> Running {
        let (stop, mut stopped) = watch::channel(false);
        let task = tokio::spawn(async move {
            let mut work = Work::new(self);
            loop {
                let pause = work.tick().await;
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = work.step_over() => {}
                    _ = stopped.changed() => break,
                }
            }
            work.leave().await;
        });
        Running { stop, task }
    }
}

/// The task's own state.
struct Work {
    executor: Executor,
    /// The store can't be used.
    failing: bool,
    claim: Claim,
    timers: Timers,
    /// The step in hand.
    hand: Option<(RolloutId, Step, JoinHandle<Outcome>)>,
    /// A step that is over, until its outcome is stored.
    over: Option<(RolloutId, Step, Outcome)>,
    /// No step before this.
    rest_until: Moment,
}

impl Work {
    fn new(executor: Executor) -> Self {
        let claim = Claim::new(executor.gateway.clone());
        let timers = Timers::new();
        Work { executor, failing: false, claim, timers, hand: None, over: None, rest_until: Moment::ZERO }
    }

    /// Waits for the step in hand; for ever when there is none.
    async fn step_over(&mut self) {
        let Some((_, _, doing)) = &mut self.hand else { return std::future::pending().await };
        let outcome = doing.await;
        let Some((rollout, step, _)) = self.hand.take() else { return };
        match outcome {
            Ok(outcome) => self.finished(rollout, step, outcome),
            Err(error) => tracing::error!(%error, "a step of the rollout ended early"),
        }
    }

    fn finished(&mut self, rollout: RolloutId, step: Step, outcome: Outcome) {
        let node = step.node();
        match &outcome {
            Outcome::Taken(_) => tracing::info!(%node, step = name(&step), "rollout: step taken"),
            Outcome::Answer { .. } => tracing::info!(%node, "rollout: the canary was answered"),
            Outcome::Refused(error) | Outcome::Lost(error) => {
                tracing::warn!(%node, step = name(&step), %error, "rollout: step not taken");
                self.rest_until = self.executor.clock.now() + AGAIN_AFTER;
            }
        }
        self.over = Some((rollout, step, outcome));
    }

    /// One round; returns the pause until the next one.
    async fn tick(&mut self) -> Duration {
        let round = self.round().await;
        let failing = match &round {
            Err(error @ StoreError::Unusable { .. }) => {
                if !self.failing {
                    tracing::error!(%error, "rollouts stand still");
                }
                true
            }
            Ok(_) | Err(StoreError::Conflict) => false,
        };
        if self.failing && !failing {
            tracing::info!("the rollout store can be used again");
        }
        self.failing = failing;
        self.executor.metrics.show_store(failing);
        // After a conflict somebody else was faster: look again.
        if matches!(round, Ok(true) | Err(StoreError::Conflict)) { TICK } else { WATCH_TICK }
    }

    /// Returns whether this gateway coordinates.
    async fn round(&mut self) -> Result<bool, StoreError> {
        let clock = self.executor.clock;
        let mut stored = self.executor.shelf.load().await?;
        let active = stored.rollout.as_ref().is_some_and(|rollout| !rollout.phase.over());
        let begun = clock.now();
        if let Some(next) = self.claim.next(begun, &stored.lease, active) {
            self.executor.shelf.swap_lease(&stored.lease, &next).await?;
            if next.revision != stored.lease.revision {
                tracing::info!(revision = next.revision, "this gateway coordinates the rollout");
            }
            self.claim.wrote(begun, next.clone());
            stored.lease = next;
        }
        let (Some(rollout), Some(revision)) = (stored.rollout.clone(), self.claim.holds(clock.now())) else {
            self.drop_hand();
            self.executor.metrics.show(stored.rollout.as_ref());
            return Ok(false);
        };
        let mut next = rollout.clone();
        next.lease_revision = revision;
        if let Some((_, step, outcome)) = self.over.as_ref().filter(|(of, ..)| *of == next.id) {
            next.settle(step, outcome);
        }
        let view = self.executor.fleet.view();
        let world = World { view: &view, me: &self.executor.gateway, now: clock.now() };
        let plan = plan(&next, &mut self.timers, &world);
        let rested = self.hand.is_none() && world.now >= self.rest_until;
        let step = plan.steps.into_iter().next().filter(|_| rested);
        if plan.rollout != rollout || step.is_some() {
            self.executor.shelf.swap(stored.revision, Some(revision), &plan.rollout).await?;
            log_changes(&rollout, &plan.rollout);
        }
        self.over = None;
        // The swap may have taken long: who has not renewed in time acts no more.
        if let Some(step) = step.filter(|_| self.claim.holds(clock.now()) == Some(revision)) {
            let slot = match &step {
                Step::Restart { slot, .. } | Step::Fence { slot, .. } | Step::Release { slot, .. } => Some(*slot),
                Step::Canary { .. } => None,
            };
            let errand = Errand {
                step: step.clone(),
                control_address: slot
                    .and_then(|slot| view.node(slot))
                    .map_or(String::new(), |node| node.control_address.clone()),
                rollout: plan.rollout.id.clone(),
                lease_revision: revision,
            };
            let id = errand.rollout.clone();
            self.hand = Some((id, step, tokio::spawn(self.executor.hands.take(errand))));
        }
        self.executor.metrics.show(Some(&plan.rollout));
        Ok(true)
    }

    /// Forgets what only a coordinator knows.
    fn drop_hand(&mut self) {
        if let Some((_, _, doing)) = self.hand.take() {
            doing.abort();
        }
        self.over = None;
        self.timers = Timers::new();
    }

    async fn leave(mut self) {
        self.drop_hand();
        if let Some((mine, next)) = self.claim.give_back()
            && let Err(error) = self.executor.shelf.swap_lease(&mine, &next).await
        {
            tracing::warn!(%error, "the lease of the rollout was not given back; it runs out by itself");
        }
    }
}

fn name(step: &Step) -> &'static str {
    match step {
        Step::Restart { .. } => "restart",
        Step::Fence { .. } => "fence",
        Step::Canary { .. } => "canary",
        Step::Release { .. } => "release",
    }
}

fn log_changes(before: &Rollout, after: &Rollout) {
    for (old, new) in before.nodes.iter().zip(&after.nodes) {
        if old.progress != new.progress {
            tracing::info!(rollout = %after.id, node = %new.node, from = old.progress.name(), to = new.progress.name(), "rollout");
        }
    }
    if before.phase != after.phase {
        let why = match &after.phase {
            Phase::Paused { why, .. } => why.to_string(),
            _ => String::new(),
        };
        tracing::info!(rollout = %after.id, from = before.phase.name(), to = after.phase.name(), why, "rollout");
    }
}

#[cfg(test)]
#[path = "executor_tests.rs"]
mod tests;
