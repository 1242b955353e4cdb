//! What the service manager is told of this node's life, and the deadman that ends a wedged exit.

use std::time::Duration;

use lifecycle::NodeLife;
use service::clock::Clock;
use service::deadman::{self, Deadman};
use service::exit;
use service::notify::Notifier;
use words::{Moment, NodeState};

use crate::options::SHUTDOWN_MAX;

/// What the service manager is asked for beyond the phase in hand.
const EXTENSION: Duration = Duration::from_secs(5);

/// The side of the service manager.
#[derive(Debug)]
pub(crate) struct Manager {
    clock: Clock,
    notifier: Notifier,
    ready: bool,
    stopping: bool,
    /// The least number of running requests that it was told of.
    running: Option<usize>,
    deadman: Option<(Moment, Deadman)>,
}

impl Manager {
    pub(crate) fn new(clock: Clock, notifier: Notifier) -> Self {
        Manager { clock, notifier, ready: false, stopping: false, running: None, deadman: None }
    }

    /// Returns whether the activation was over once.
    pub(crate) fn was_ready(&self) -> bool {
        self.ready
    }

    /// The process is on its way out and nothing calls it off.
    pub(crate) fn stopping(&mut self) {
        if !std::mem::replace(&mut self.stopping, true) {
            self.notifier.stopping();
        }
    }

    /// Something begins that takes this long at most.
    pub(crate) fn begins(&self, longest: Duration) {
        if self.stopping {
            self.notifier.extend_timeout(longest + EXTENSION);
        }
    }

    /// Tells what is new of `life`, and arms the deadman for its exit's budget, or disarms it.
    pub(crate) fn tell(&mut self, life: &NodeLife, running: usize) {
        let state = life.state();
        if !self.ready && matches!(state, NodeState::Ready | NodeState::Held | NodeState::Drained) {
            self.ready = true;
            self.notifier.ready();
        }
        if life.is_leaving() && state == NodeState::Unloading {
            self.stopping();
        }
        let by = life.exit_by();
        if by != self.deadman.as_ref().map(|(at, _)| *at) {
            let fresh = self.deadman.is_none();
            // A deadman that can't be armed is no reason to stay; the service manager has its own.
            self.deadman = by.and_then(|by| {
                let budget = self.clock.until(by) + SHUTDOWN_MAX * 2;
                if fresh {
                    tracing::info!(budget_s = budget.as_secs_f64(), "leaving");
                }
                Some((by, deadman::arm(budget, exit::WEDGED).ok()?))
            });
        }
        if self.stopping && self.running.is_none_or(|before| running < before) {
            // Progress is real, so the manager may wait for the rest of the budget.
            let wake = life.wake_at().map_or(Duration::ZERO, |at| self.clock.until(at));
            self.begins(wake);
            self.notifier.status(&format!("draining: {running} requests left"));
            self.running = Some(running);
        }
    }

    /// Returns the deadman, still armed.
    pub(crate) fn into_deadman(self) -> Option<Deadman> {
        self.deadman.map(|(_, deadman)| deadman)
    }
}
