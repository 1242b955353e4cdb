//! `plan(rollout, timers, world) -> (rollout, steps)`, recomputed every tick.

use std::time::Duration;

use words::{
    Canary, GatewayId, HandoffPolicy, Intent, IntentOrder, ModelState, ModelStatus, Moment, NodeId, NodeState,
    NodeStatus, RolloutClaim,
};

use super::capacity::{Blocker, Capacity, find, fresh, in_words, ready_models, serving};
use super::policy::{Before, NodeProgress, Phase, Policy, Progress, Reason, Rollout};
use super::timers::{Timer, Timers};
use crate::view::{FleetView, NodeView, Slot};

/// Longest time for a hold to be opened, and for a permit to be taken back.
const OPEN_WITHIN: Duration = Duration::from_secs(60);

/// What a coordinator sees.
#[derive(Clone, Copy, Debug)]
pub struct World<'a> {
    /// Its fleet.
    pub view: &'a FleetView,
    /// Itself.
    pub me: &'a GatewayId,
    /// The present.
    pub now: Moment,
}

/// What a coordinator may do to one node; any of them may be done twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Order the restart.
    Restart {
        /// The node.
        node: NodeId,
        /// Where it is in the view.
        slot: Slot,
        /// The order, bound to one life and one epoch.
        order: IntentOrder,
    },
    /// Raise the node's epoch by asking what it does already, so that an order under way is void.
    Fence {
        /// The node.
        node: NodeId,
        /// Where it is in the view.
        slot: Slot,
        /// The order.
        order: IntentOrder,
    },
    /// Ask the canary through the data plane.
    Canary {
        /// The node.
        node: NodeId,
        /// `host:port` of its data plane.
        data_address: String,
        /// The question.
        canary: Canary,
    },
    /// Open the node.
    Release {
        /// The node.
        node: NodeId,
        /// Where it is in the view.
        slot: Slot,
    },
}

impl Step {
    /// Returns the node that it is about.
    pub fn node(&self) -> &NodeId {
        match self {
            Step::Restart { node, .. }
            | Step::Fence { node, .. }
            | Step::Canary { node, .. }
            | Step::Release { node, .. } => node,
        }
    }
}

/// What a tick gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The rollout as it is now; to be stored before any step is taken.
    pub rollout: Rollout,
    /// What may be done, the most urgent first. Take one, settle it, and plan again.
    pub steps: Vec<Step>,
}

/// Plans. To be called each second or more often; a longer pause restarts all waits ([`super::ASLEEP`]).
pub fn plan(rollout: &Rollout, timers: &mut Timers, world: &World<'_>) -> Plan {
    timers.tick(world.now, rollout.turns);
    let mut rollout = rollout.clone();
    if rollout.phase.over() {
        return Plan { rollout, steps: Vec::new() };
    }
    for i in 0..rollout.nodes.len() {
        let timer = timers.of(world.now, &rollout.nodes[i], &rollout.phase);
        let look = Look::at(&rollout, &rollout.nodes[i], world);
        let Some(seen) = look.observe(timer) else { continue };
        let id = rollout.nodes[i].node.clone();
        match seen {
            Seen::Failed(reason) => rollout.fail(&id, reason),
            Seen::Back(life) => {
                rollout.nodes[i].back = Some(life);
                rollout.nodes[i].go(Progress::Back);
            }
            Seen::Is(progress) => rollout.nodes[i].go(progress),
        }
    }
    let mut steps = Vec::new();
    match rollout.phase {
        Phase::Running => run(&mut rollout, timers, world, &mut steps),
        Phase::Aborting => abort(&mut rollout, timers, world, &mut steps),
        Phase::Paused { .. } | Phase::Done | Phase::Aborted => timers.blocked_since = None,
    }
    // Nodes that are back come before nodes that go.
    steps.sort_by_key(|step| match step {
        Step::Release { .. } => 0,
        Step::Canary { .. } => 1,
        Step::Fence { .. } | Step::Restart { .. } => 2,
    });
    Plan { rollout, steps }
}

fn run(rollout: &mut Rollout, timers: &mut Timers, world: &World<'_>, steps: &mut Vec<Step>) {
    let before = rollout.clone();
    let mut capacity = Capacity::of(&before, world);
    let nobody_away = capacity.nobody_away();
    let (mut pending, mut permitted) = (false, false);
    for i in 0..rollout.nodes.len() {
        let node = &rollout.nodes[i];
        match node.progress {
            Progress::Pending => {
                pending = true;
                if permitted {
                    continue;
                }
                let free = capacity.free(&node.node);
                let seen = find(world.view, &node.node).and_then(|(_, seen)| seen.status.as_ref());
                let Some(status) = seen.filter(|_| free) else { continue };
                capacity.leave(&node.node, ready_models(status));
                permitted = true;
                let before = Before {
                    incarnation: status.incarnation,
                    epoch: status.epoch,
                    models: ready_models(status).cloned().collect(),
                    upgraded_at: status.upgrade.as_ref().map(|upgrade| upgrade.at),
                };
                let node = &mut rollout.nodes[i];
                (node.before, node.back) = (Some(before), None);
                // Refusals of the last permit still count.
                node.progress = Progress::Permitted;
                steps.extend(Look::at(rollout, &rollout.nodes[i], world).restart());
            }
            // Not sent yet, or nobody knows: the capacity is looked at again.
            Progress::Permitted if capacity.free(&node.node) => {
                steps.extend(Look::at(rollout, node, world).restart());
            }
            Progress::Back => steps.extend(Look::at(rollout, node, world).canary()),
            Progress::Answered => steps.extend(Look::at(rollout, node, world).release()),
            _ => {}
        }
    }
    if !pending && nobody_away {
        rollout.phase = Phase::Done;
    }
    if !(pending && nobody_away && !permitted) {
        timers.blocked_since = None;
    } else if world.now.since(*timers.blocked_since.get_or_insert(world.now)) > rollout.policy.blocked_max {
        let pending = rollout.nodes.iter().filter(|node| node.progress == Progress::Pending);
        let nodes = pending.map(|node| named(&node.node, &capacity.blockers(&node.node))).collect();
        rollout.phase = Phase::Paused { node: None, why: Reason::Blocked { nodes } };
    }
}

fn abort(rollout: &mut Rollout, timers: &mut Timers, world: &World<'_>, steps: &mut Vec<Step>) {
    let mut under_way = false;
    for i in 0..rollout.nodes.len() {
        let waited = world.now.since(timers.of(world.now, &rollout.nodes[i], &rollout.phase).since);
        let look = Look::at(rollout, &rollout.nodes[i], world);
        let (held, open) = (look.held(), look.open());
        let next = match &rollout.nodes[i].progress {
            Progress::Pending if !held => Progress::Skipped,
            Progress::Permitted if waited > OPEN_WITHIN => Progress::Skipped,
            Progress::Permitted => {
                steps.extend(look.fence());
                Progress::Permitted
            }
            Progress::Back if held => Progress::Answered,
            Progress::Back if open => Progress::Done,
            Progress::Opened => Progress::Done,
            // Also one that was given up: a late order, or a late return, may have left it held. So is one that came
            // back and was to be restarted once more.
            Progress::Pending | Progress::Failed { .. } | Progress::Skipped | Progress::Done
                if held && waited <= OPEN_WITHIN =>
            {
                steps.extend(look.release());
                under_way = true;
                continue;
            }
            Progress::Pending => Progress::Skipped,
            other => other.clone(),
        };
        if next == Progress::Answered {
            steps.extend(Look::at(rollout, &rollout.nodes[i], world).release());
        }
        if next != rollout.nodes[i].progress {
            rollout.nodes[i].go(next);
        }
        under_way |= !matches!(
            rollout.nodes[i].progress,
            Progress::Done | Progress::Skipped | Progress::Failed { .. } | Progress::Pending
        );
    }
    if !under_way {
        rollout.phase = Phase::Aborted;
    }
}

/// What a look at a node gave.
enum Seen {
    Is(Progress),
    Back(words::Incarnation),
    Failed(Reason),
}

/// One node of a rollout, as stored and as seen.
struct Look<'a> {
    rollout: &'a Rollout,
    node: &'a NodeProgress,
    world: &'a World<'a>,
    /// The node in the view.
    found: Option<(Slot, &'a NodeView)>,
    /// What it said lately.
    status: Option<&'a NodeStatus>,
}

impl<'a> Look<'a> {
    fn at(rollout: &'a Rollout, node: &'a NodeProgress, world: &'a World<'a>) -> Self {
        let found = find(world.view, &node.node);
        let status = found.and_then(|(_, seen)| fresh(seen, world.now));
        // A life before the one that was to leave is old news.
        let oldest = node.back.or(node.before.as_ref().map(|before| before.incarnation));
        let status = status.filter(|status| oldest.is_none_or(|oldest| status.incarnation.counter >= oldest.counter));
        Look { rollout, node, world, found, status }
    }

    fn policy(&self) -> &'a Policy {
        &self.rollout.policy
    }

    /// Restarted, or about to be, by this rollout.
    fn ours(&self, status: &NodeStatus) -> bool {
        status.rollout.as_ref() == Some(&self.rollout.id)
    }

    /// Held by this rollout.
    fn held(&self) -> bool {
        let hold = self.status.and_then(|status| status.hold.as_ref());
        hold.is_some_and(|hold| hold.rollout == self.rollout.id)
    }

    /// Serving, or standing as its operators want it to.
    fn open(&self) -> bool {
        let Some((status, (_, seen))) = self.status.zip(self.found) else { return false };
        match status.intent {
            Intent::None => serving(seen, self.world.now).is_some(),
            Intent::Cordon => status.state == NodeState::Ready && !seen.conflicted,
            Intent::Drain => matches!(status.state, NodeState::Drained | NodeState::Draining(_)),
            Intent::Restart => false,
        }
    }

    fn observe(&self, timer: &mut Timer) -> Option<Seen> {
        let (now, policy) = (self.world.now, self.policy());
        let waited = now.since(timer.since);
        match (&self.node.progress, self.node.before.as_ref(), self.node.back) {
            (Progress::Permitted, Some(before), _) => {
                if waited > policy.blocked_max {
                    let nodes = vec![format!("{}: its order could not be sent", self.node.node)];
                    return Some(Seen::Failed(Reason::Blocked { nodes }));
                }
                let status = self.status?;
                if status.incarnation != before.incarnation {
                    let restarted = self.ours(status);
                    return Some(if restarted { Seen::Back(status.incarnation) } else { Seen::Is(Progress::Pending) });
                }
                if status.intent == Intent::Restart && self.ours(status) {
                    return Some(Seen::Is(Progress::Ordered { epoch: status.epoch }));
                }
                // Somebody else's order makes ours void.
                (status.epoch > before.epoch).then_some(Seen::Is(Progress::Pending))
            }
            (Progress::Ordered { epoch }, Some(before), _) => {
                let Some(status) = self.status else {
                    let gone = now.since(*timer.gone_since.get_or_insert(now));
                    let late = gone > policy.back_within || waited > policy.leave_within() + policy.back_within;
                    return late.then(|| self.not_back());
                };
                if status.incarnation != before.incarnation {
                    return Some(Seen::Back(status.incarnation));
                }
                timer.gone_since = None;
                let serves = matches!(status.state, NodeState::Ready | NodeState::Held | NodeState::Drained);
                if serves && status.intent != Intent::Restart && status.epoch >= *epoch {
                    return Some(Seen::Failed(Reason::OrderUndone));
                }
                (waited > policy.leave_within()).then_some(Seen::Failed(Reason::NotLeft))
            }
            (Progress::Back, _, Some(life)) => {
                let seen = self.status.and_then(|status| self.came_back(status, life));
                seen.or_else(|| (waited > policy.back_within).then(|| self.not_back()))
            }
            (Progress::Answered, _, Some(life)) => {
                let seen = self.status.and_then(|status| self.ended_or_failed(status, life));
                let opened = || (self.open() && !self.held()).then_some(Seen::Is(Progress::Opened));
                let late = || {
                    let detail = "it was neither open nor held by this rollout".into();
                    (waited > OPEN_WITHIN).then_some(Seen::Failed(Reason::NotOpened { detail }))
                };
                seen.or_else(opened).or_else(late)
            }
            (Progress::Opened, _, Some(life)) => {
                if let Some(failed) = self.status.and_then(|status| self.ended_or_failed(status, life)) {
                    return Some(failed);
                }
                if !self.healthy() {
                    timer.healthy_since = None;
                    return (waited > policy.back_within).then_some(Seen::Failed(Reason::NotHealthy));
                }
                let healthy = now.since(*timer.healthy_since.get_or_insert(now));
                (healthy >= policy.health_for).then_some(Seen::Is(Progress::Done))
            }
            _ => None,
        }
    }

    fn came_back(&self, status: &NodeStatus, life: words::Incarnation) -> Option<Seen> {
        if let Some(failed) = self.ended_or_failed(status, life) {
            return Some(failed);
        }
        if let Some(detail) = self.upgrade_failed(status) {
            return Some(Seen::Failed(Reason::UpgradeFailed { detail }));
        }
        let asked = self.question(status).is_some();
        ((self.held() || self.open()) && !asked).then_some(Seen::Is(Progress::Answered))
    }

    fn ended_or_failed(&self, status: &NodeStatus, life: words::Incarnation) -> Option<Seen> {
        if status.incarnation != life {
            return Some(Seen::Failed(Reason::Crashed));
        }
        let had = |id| self.node.before.as_ref().is_some_and(|before| before.models.contains(id));
        let failed = status.models.iter().find(|model| model.state == ModelState::Failed && had(&model.id))?;
        let detail = failed.failure.clone().unwrap_or_default();
        Some(Seen::Failed(Reason::ModelFailed { model: failed.id.clone(), detail }))
    }

    fn upgrade_failed(&self, status: &NodeStatus) -> Option<String> {
        let name = self.policy().upgrade.as_ref()?;
        let before = self.node.before.as_ref().and_then(|before| before.upgraded_at);
        match &status.upgrade {
            Some(outcome) if outcome.name == *name && Some(outcome.at) != before => {
                (!outcome.ok).then(|| outcome.detail.clone())
            }
            _ => Some(format!("the upgrade '{name}' did not run")),
        }
    }

    /// Open, with every model that it had before and still lists; what a request brings is there when one comes.
    fn healthy(&self) -> bool {
        let Some(status) = self.status else { return false };
        let had = self.node.before.as_ref().map(|before| before.models.as_slice()).unwrap_or_default();
        let there = |model: &ModelStatus| model.state == ModelState::Ready || model.card.on_demand;
        let all = status.models.iter().all(|model| there(model) || !had.contains(&model.id));
        self.open() && !self.held() && all
    }

    fn not_back(&self) -> Seen {
        let detail = match self.status {
            None => "it is not heard from".to_string(),
            Some(status) => format!("it is {}", in_words(status.state)),
        };
        Seen::Failed(Reason::NotBack { detail })
    }

    /// The canary, where it applies: to nodes that had its model. One that has opened itself under a cordon has
    /// answered it already, and takes no other work.
    fn question(&self, status: &NodeStatus) -> Option<&'a Canary> {
        let canary = self.policy().canary.as_ref()?;
        let had = self.node.before.as_ref().is_some_and(|before| before.models.contains(&canary.model));
        (had && (self.held() || status.intent == Intent::None)).then_some(canary)
    }

    fn restart(&self) -> Option<Step> {
        let ((slot, _), before) = self.found.zip(self.node.before.as_ref())?;
        let status = self.status.filter(|status| status.incarnation == before.incarnation)?;
        let claim = RolloutClaim {
            id: self.rollout.id.clone(),
            lease_revision: self.rollout.lease_revision,
            hold_ttl_ms: self.policy().hold_ttl.as_millis() as u64,
            canary: self.policy().canary.clone().filter(|canary| before.models.contains(&canary.model)),
        };
        let order = IntentOrder {
            seen: before.epoch,
            intent: Intent::Restart,
            incarnation: Some(before.incarnation),
            deadline: self.policy().deadline_ms.map(Duration::from_millis),
            handoff: self.policy().handoff,
            rollout: Some(claim),
            upgrade: self.policy().upgrade.clone(),
        };
        Some(Step::Restart { node: status.node.clone(), slot, order })
    }

    fn fence(&self) -> Option<Step> {
        let ((slot, _), before) = self.found.zip(self.node.before.as_ref())?;
        let status = self.status.filter(|status| status.incarnation == before.incarnation)?;
        let order = IntentOrder {
            seen: before.epoch,
            intent: status.intent,
            incarnation: None,
            deadline: None,
            handoff: HandoffPolicy::default(),
            rollout: None,
            upgrade: None,
        };
        (status.intent != Intent::Restart).then(|| Step::Fence { node: status.node.clone(), slot, order })
    }

    fn canary(&self) -> Option<Step> {
        let status = self.status.filter(|status| Some(status.incarnation) == self.node.back)?;
        let canary = self.question(status)?.clone();
        let reachable = (self.held() || self.open()) && !status.data_address.is_empty();
        let (node, data_address) = (status.node.clone(), status.data_address.clone());
        reachable.then_some(Step::Canary { node, data_address, canary })
    }

    fn release(&self) -> Option<Step> {
        let (slot, _) = self.found?;
        self.held().then(|| Step::Release { node: self.node.node.clone(), slot })
    }
}

fn named(node: &NodeId, blockers: &[Blocker]) -> String {
    let why: Vec<_> = blockers.iter().map(Blocker::to_string).collect();
    format!("{node}: {}", why.join(", "))
}

/// Says what each node waits for, for those who watch.
pub fn notes(rollout: &Rollout, world: &World<'_>) -> Vec<(NodeId, String)> {
    let capacity = Capacity::of(rollout, world);
    let note = |node: &NodeProgress| {
        let look = Look::at(rollout, node, world);
        match (&node.progress, look.status) {
            (Progress::Pending | Progress::Permitted, _) if !rollout.phase.over() => {
                capacity.blockers(&node.node).iter().map(Blocker::to_string).collect::<Vec<_>>().join(", ")
            }
            (Progress::Failed { reason }, _) => reason.to_string(),
            (Progress::Ordered { .. }, None) => "it is away".into(),
            (Progress::Ordered { .. }, Some(status)) => match &status.drain {
                Some(drain) => format!("{} left; {}", status.in_flight, drain.waiting_for),
                None => format!("it is {}", in_words(status.state)),
            },
            (Progress::Back | Progress::Answered | Progress::Opened, Some(status)) => in_words(status.state).into(),
            _ => String::new(),
        }
    };
    rollout.nodes.iter().map(|node| (node.node.clone(), note(node))).collect()
}
