//! What operators and outcomes do to a rollout.

use words::{Code, Error, Intent, NodeId, NodeStatus};

use super::capacity::find;
use super::plan::{Step, World};
use super::policy::{NodeProgress, Phase, Progress, Reason, Rollout};

/// Refusals of one step after which it has failed; fewer may come from a view that was a moment old.
const REFUSALS_MAX: u32 = 3;
/// Most bytes of a wrong answer that are kept.
const ANSWER_BYTES_MAX: usize = 200;

/// How a step ended.
#[derive(Debug)]
pub enum Outcome {
    /// The node has taken it; what it says of itself since.
    Taken(Box<NodeStatus>),
    /// The node refused it.
    Refused(Error),
    /// Nobody knows whether it was taken; the next status will tell.
    Lost(Error),
    /// The canary was answered.
    Answer {
        /// With this text.
        text: String,
    },
}

impl Rollout {
    /// Takes the outcome of a step. The rollout may have moved on since the step was planned; then nothing changes.
    pub fn settle(&mut self, step: &Step, outcome: &Outcome) {
        let Some(node) = self.node_mut(step.node()) else { return };
        match (step, outcome) {
            (Step::Restart { .. }, Outcome::Taken(status)) if node.progress == Progress::Permitted => {
                node.go(Progress::Ordered { epoch: status.epoch });
            }
            (Step::Restart { .. }, Outcome::Refused(error)) if node.progress == Progress::Permitted => {
                let again = error.code() == Code::Conflict && node.refused + 1 < REFUSALS_MAX;
                if again {
                    // The view was old: the order is void, and another epoch may be named.
                    node.refused += 1;
                    node.progress = Progress::Pending;
                } else {
                    let reason = Reason::OrderRefused { detail: error.to_string() };
                    self.fail(step.node(), reason);
                }
            }
            // The epoch has moved on or the node says so itself: no order of ours is under way any more.
            (Step::Fence { .. }, Outcome::Taken(_) | Outcome::Refused(_)) if node.progress == Progress::Permitted => {
                node.go(Progress::Skipped);
            }
            (Step::Canary { canary, .. }, Outcome::Answer { text }) if node.progress == Progress::Back => {
                if text.contains(&canary.answer) {
                    node.go(Progress::Answered);
                } else {
                    let got = beginning(text).to_string();
                    self.fail(step.node(), Reason::CanaryWrong { got });
                }
            }
            (Step::Canary { .. }, Outcome::Refused(error)) if node.progress == Progress::Back => {
                node.refused += 1;
                if node.refused >= REFUSALS_MAX {
                    let detail = format!("the canary was refused: {error}");
                    self.fail(step.node(), Reason::NotBack { detail });
                }
            }
            (Step::Release { .. }, Outcome::Taken(_)) if node.progress == Progress::Answered => {
                node.go(Progress::Opened);
            }
            (Step::Release { .. }, Outcome::Refused(error)) if node.progress == Progress::Answered => {
                node.refused += 1;
                if node.refused >= REFUSALS_MAX {
                    let detail = error.to_string();
                    self.fail(step.node(), Reason::NotOpened { detail });
                }
            }
            // Lost ones are taken again, within the bounds of the node's state.
            _ => {}
        }
    }

    /// Marks a node as failed; a rollout that runs pauses.
    pub(super) fn fail(&mut self, id: &NodeId, reason: Reason) {
        if let Some(node) = self.node_mut(id) {
            node.go(Progress::Failed { reason: reason.clone() });
        }
        if self.phase == Phase::Running {
            self.phase = Phase::Paused { node: Some(id.clone()), why: reason };
        }
    }

    /// Pauses: no more orders.
    ///
    /// # Errors
    /// `Conflict` when it does not run.
    pub fn pause(&mut self) -> Result<(), Error> {
        if self.phase != Phase::Running {
            return Err(self.not("running"));
        }
        self.phase = Phase::Paused { node: None, why: Reason::Operator };
        Ok(())
    }

    /// Goes on; nodes that failed are looked at again.
    ///
    /// # Errors
    /// `Conflict` when it is not paused.
    pub fn resume(&mut self, world: &World<'_>) -> Result<(), Error> {
        if !matches!(self.phase, Phase::Paused { .. }) {
            return Err(self.not("paused"));
        }
        let id = self.id.clone();
        for node in &mut self.nodes {
            if let Progress::Failed { reason } = &node.progress {
                let status = find(world.view, &node.node).and_then(|(_, seen)| seen.status.as_ref());
                let again = retry(node, matches!(reason, Reason::UpgradeFailed { .. }), status, |status| {
                    status.intent == Intent::Restart && status.rollout.as_ref() == Some(&id)
                });
                node.go(again);
            }
            if node.progress == Progress::Back {
                let status = find(world.view, &node.node).and_then(|(_, seen)| seen.status.as_ref());
                node.back = status.map(|status| status.incarnation).or(node.back);
            }
        }
        self.phase = Phase::Running;
        self.turns += 1;
        Ok(())
    }

    /// Ends the rollout early: permits are taken back, nodes under way come back and are opened. An aborted rollout
    /// can be aborted again, to open what came back too late.
    ///
    /// # Errors
    /// `Conflict` when it is done.
    pub fn abort(&mut self) -> Result<(), Error> {
        if self.phase == Phase::Done {
            return Err(self.not("under way"));
        }
        self.phase = Phase::Aborting;
        self.turns += 1;
        Ok(())
    }

    fn not(&self, wanted: &str) -> Error {
        Error::new(Code::Conflict, format!("the rollout {} is not {wanted}, it is {}", self.id, self.phase.name()))
    }
}

/// Where a failed node is looked at again.
fn retry(
    node: &mut NodeProgress,
    restart: bool,
    status: Option<&NodeStatus>,
    leaving: impl Fn(&NodeStatus) -> bool,
) -> Progress {
    let Some(before) = node.before.as_ref().filter(|_| !restart) else {
        (node.before, node.back) = (None, None);
        return Progress::Pending;
    };
    match status {
        Some(status) if status.incarnation == before.incarnation && leaving(status) => {
            Progress::Ordered { epoch: status.epoch }
        }
        Some(status) if status.incarnation == before.incarnation => {
            (node.before, node.back) = (None, None);
            Progress::Pending
        }
        Some(status) if status.incarnation.counter >= before.incarnation.counter => Progress::Back,
        // It was not heard from by this gateway: it is waited for.
        _ => Progress::Ordered { epoch: before.epoch },
    }
}

fn beginning(text: &str) -> &str {
    let end = (0..=text.len().min(ANSWER_BYTES_MAX)).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}
