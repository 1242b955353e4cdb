//! What the service manager is told of this node's life, and the deadman that ends a wedged exit.

use std::time::Duration;

use lifecycle::NodeLife;
use service::clock::Clock;
use service::deadman::{self, Deadman};
use service::exit;
use service::notify::Notifier;
use service::supervision::Supervision;
use words::{DrainPhase, ModelId, ModelState, Moment, NodeState, NodeStatus};

use crate::options::SHUTDOWN_MAX;

/// What the service manager is asked for beyond a command's own time.
const EXTENSION: Duration = Duration::from_secs(5);

/// How far this life is.
#[derive(Debug, PartialEq)]
struct Mark {
    state: NodeState,
    models: Vec<(ModelId, ModelState, u32)>,
    in_flight: u32,
    work_done: u64,
}

/// The side of the service manager.
#[derive(Debug)]
pub(crate) struct Manager {
    clock: Clock,
    supervision: Supervision<Mark>,
    deadman: Option<(Moment, Deadman)>,
}

impl Manager {
    pub(crate) fn new(clock: Clock, notifier: Notifier) -> Self {
        Manager { clock, supervision: Supervision::new(notifier), deadman: None }
    }

    /// Returns whether the activation was over once.
    pub(crate) fn was_ready(&self) -> bool {
        self.supervision.was_ready()
    }

    /// Returns how often [`Manager::look`] must be called at least.
    pub(crate) fn look_every(&self) -> Option<Duration> {
        self.supervision.look_every()
    }

    /// The process is on its way out and nothing calls it off.
    pub(crate) fn stopping(&mut self) {
        self.supervision.stopping();
    }

    /// Something begins that takes this long at most.
    pub(crate) fn begins(&self, longest: Duration) {
        self.supervision.begins(longest + EXTENSION);
    }

    /// Arms the deadman for the exit's budget whenever that changes, or disarms it. Call before anything is logged: the
    /// log may be what is stuck.
    pub(crate) fn guard(&mut self, life: &NodeLife) {
        let by = life.exit_by();
        if by == self.deadman.as_ref().map(|(at, _)| *at) {
            return;
        }
        let fresh = self.deadman.is_none();
        // A deadman that can't be armed is no reason to stay; the service manager has its own.
        self.deadman = by.and_then(|by| {
            let budget = self.clock.until(by) + SHUTDOWN_MAX * 2;
            let deadman = deadman::arm(budget, exit::WEDGED).ok()?;
            if fresh {
                tracing::info!(budget_s = budget.as_secs_f64(), "leaving");
            }
            Some((by, deadman))
        });
    }

    /// Tells what is new of `life`.
    pub(crate) fn tell(&mut self, life: &NodeLife) {
        let state = life.state();
        if matches!(state, NodeState::Ready | NodeState::Held | NodeState::Drained) {
            self.supervision.ready();
        }
        if life.is_leaving() && state == NodeState::Unloading {
            self.stopping();
        }
        self.guard(life);
    }

    /// Says from time to time what this life does, and that it gets on.
    pub(crate) fn look(&mut self, status: &NodeStatus, in_flight: usize, work_done: u64) {
        let models = status.models.iter().map(|model| (model.id.clone(), model.state, model.progress_permille));
        let mark = Mark { state: status.state, models: models.collect(), in_flight: in_flight as u32, work_done };
        self.supervision.look(self.clock.now(), mark, one_line(status, in_flight));
    }

    /// Returns the moment by which this life should be over, and the deadman behind it, still armed.
    pub(crate) fn into_deadman(self) -> Option<(Moment, Deadman)> {
        self.deadman
    }
}

/// Returns what `systemctl status` shows.
fn one_line(status: &NodeStatus, in_flight: usize) -> String {
    let ready = status.models.iter().filter(|model| model.state == ModelState::Ready).count();
    match status.state {
        NodeState::Activating => {
            let progress = &status.activation;
            let current = status.models.iter().find(|model| Some(&model.id) == progress.current.as_ref());
            let Some(model) = current else { return "starting".into() };
            let (number, percent) = (progress.done + 1, model.progress_permille / 10);
            format!("loading {} ({number} of {}), {percent} %", model.id, progress.total)
        }
        NodeState::Ready if status.intent == words::Intent::Cordon => format!("cordoned; models: {ready}"),
        NodeState::Ready => format!("serving; models: {ready}"),
        NodeState::Held => "held by a rollout".into(),
        NodeState::Draining(DrainPhase::Handoff) => format!("draining, handing over: {in_flight} requests left"),
        NodeState::Draining(_) => format!("draining: {in_flight} requests left"),
        NodeState::Drained => "drained".into(),
        NodeState::Unloading => "unloading".into(),
        NodeState::Stopped | NodeState::Unknown => "leaving".into(),
    }
}
