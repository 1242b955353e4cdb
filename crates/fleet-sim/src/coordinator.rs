//! A gateway's part in rollouts: the shell around the lease's claim and the planner, as the executor is.

use std::sync::Arc;
use std::time::Duration;

use fleet::rollout::{Claim, Outcome, Plan, Progress, Rollout, Step, Timers, World as Seen, plan};
use fleet::{FleetView, Slot};
use inference::{Priority, StopRules};
use rand::Rng;
use words::{Canary, Code, Error, Moment, NodeId, NodeStatus};

use crate::client::model_id;
use crate::clock::ms;
use crate::context::{Context, Party};
use crate::counters::Count;
use crate::gateway::Gateway;
use crate::net::{ConnId, DIALLER, Loss, Message};
use crate::planted::Planted;
use crate::store::{Store, Stored};
use crate::talk::{Ask, Order, Said};

/// The pace of rounds.
const ROUND: Duration = ms(500);
/// Pause after a step that was not taken.
const AGAIN_AFTER: Duration = ms(1_000);
/// Longest time for one step.
const STEP_MAX: Duration = ms(5_000);
/// The client's number in a canary, which no client has.
const CANARY: usize = usize::MAX;

/// A step on its way.
struct Hand {
    step: Step,
    conn: ConnId,
    since: Moment,
}

/// What a gateway keeps of rollouts.
pub(crate) struct Coordinator {
    claim: Claim,
    timers: Timers,
    hand: Option<Hand>,
    /// A step that is over, until its outcome is stored.
    over: Option<(Step, Outcome)>,
    round_at: Moment,
    rest_until: Moment,
    /// What was read last.
    read: Option<Stored>,
    /// The node that was just sent an order to restart.
    pub(crate) sent: Option<usize>,
}

impl Coordinator {
    pub(crate) fn new(me: words::GatewayId) -> Self {
        let (timers, claim) = (Timers::new(), Claim::new(me));
        Coordinator {
            claim,
            timers,
            hand: None,
            over: None,
            round_at: Moment::ZERO,
            rest_until: Moment::ZERO,
            read: None,
            sent: None,
        }
    }
}

/// The request that carries a canary's question.
pub(crate) fn canary_order(canary: &Canary) -> Order {
    Order {
        model: canary.model.clone(),
        prompt: canary.prompt.bytes().map(u32::from).collect(),
        choices: 1,
        max_tokens: 8,
        stop: Arc::new(StopRules::default()),
        priority: Priority::High,
        streamed: false,
    }
}

fn lost(text: &str) -> Outcome {
    Outcome::Lost(Error::new(Code::UpstreamFailed, text))
}

impl Gateway {
    /// Goes a round, when it is time.
    pub(crate) fn coordinate(&mut self, context: &mut Context, store: &mut Store) {
        let now = self.now(context);
        if self.old {
            return;
        }
        let Some(process) = &mut self.process else { return };
        let coordinator = &mut process.coordinator;
        if now.since(coordinator.round_at) < ROUND {
            return;
        }
        coordinator.round_at = now;
        if let Some(hand) = coordinator.hand.take_if(|hand| now.since(hand.since) > STEP_MAX) {
            context.close(hand.conn, DIALLER, Loss::Clean);
            coordinator.over = Some((hand.step, lost("it took too long")));
        }
        let Ok(newest) = store.load(context.now) else { return };
        // At times an access takes long, and what was read is old by the time that it is used.
        let slow = context.stormy() && context.rng.random_bool(0.02);
        let before = coordinator.read.replace(newest.clone());
        let mut stored = before.filter(|_| slow).unwrap_or(newest);
        let active = stored.rollout.as_ref().is_some_and(|rollout| !rollout.phase.over());
        if let Some(next) = coordinator.claim.next(now, &stored.lease, active) {
            if store.swap_lease(context.now, &stored.lease, next.clone()).is_err() {
                context.count(Count::SwapRefused);
                return;
            }
            if next.revision != stored.lease.revision {
                context.count(Count::LeaseTaken);
                context.note("gateway #: coordinates with lease #", &[self.place as u64, next.revision]);
            }
            coordinator.claim.wrote(now, next.clone());
            stored.lease = next;
        }
        let (Some(rollout), Some(revision)) = (stored.rollout, coordinator.claim.holds(now)) else {
            if let Some(hand) = coordinator.hand.take() {
                context.close(hand.conn, DIALLER, Loss::Clean);
            }
            (coordinator.over, coordinator.timers) = (None, Timers::new());
            return;
        };
        let mut next = rollout.clone();
        next.lease_revision = revision;
        if let Some((step, outcome)) = &coordinator.over {
            next.settle(step, outcome);
        }
        let policy = next.policy.clone();
        if context.planted(Planted::RestartLast) {
            next.policy.allow_dark = (0..context.plan.models).map(model_id).collect();
        }
        let seen = Seen { view: &process.view, me: &process.id, now };
        let mut plan = plan(&next, &mut coordinator.timers, &seen);
        if context.planted(Planted::StaleCapacity) {
            permit_by_memory(&mut plan, &next, &coordinator.timers, &seen, &process.said);
        }
        plan.rollout.policy = policy;
        if context.planted(Planted::PermitOnStart) {
            let started = plan.rollout.nodes.iter_mut().filter(|node| node.progress == Progress::Back);
            started.for_each(|node| node.progress = Progress::Done);
        }
        let rested = coordinator.hand.is_none() && now >= coordinator.rest_until;
        let step = plan.steps.into_iter().next().filter(|_| rested);
        if plan.rollout != rollout || step.is_some() {
            if store.swap(context.now, stored.revision, Some(revision), plan.rollout.clone()).is_err() {
                context.count(Count::SwapRefused);
                return;
            }
            note_changes(context, &rollout, &plan.rollout);
        }
        coordinator.over = None;
        if let Some(step) = step {
            self.step(context, &plan.rollout, revision, step, now);
        }
    }

    fn step(&mut self, context: &mut Context, rollout: &Rollout, revision: u64, step: Step, now: Moment) {
        let party = self.party();
        let Some(process) = &mut self.process else { return };
        if context.crash_point() {
            // The coordinator stored its plan and dies before the step; it is made to crash by its own silence.
            context.note("gateway #: forgets its step", &[self.place as u64]);
            return;
        }
        context.count(Count::RolloutStep);
        let (place, message) = match &step {
            Step::Restart { slot, order, .. } | Step::Fence { slot, order, .. } => {
                (slot.0, Message::Order(Box::new(order.clone())))
            }
            Step::Release { slot, .. } => {
                let rollout = rollout.id.clone();
                (slot.0, Message::Release { rollout, lease_revision: revision, prolong: None })
            }
            Step::Canary { data_address, canary, .. } => {
                // Addresses are `n<place>:1`.
                let place = data_address.trim_start_matches('n').split(':').next().and_then(|text| text.parse().ok());
                let ask = Ask {
                    request: CANARY,
                    attempt: 1,
                    gateway: process.id.clone(),
                    order: Arc::new(canary_order(canary)),
                    resume: None,
                    canary: Some(rollout.id.clone()),
                };
                (place.unwrap_or(0), Message::Ask(Box::new(ask)))
            }
        };
        context.note("gateway #: takes a step with node #", &[self.place as u64, place as u64]);
        process.coordinator.sent = matches!(step, Step::Restart { .. }).then_some(place);
        let conn = context.dial(party, Party::Node(place));
        context.send(conn, DIALLER, message);
        process.coordinator.hand = Some(Hand { step, conn, since: now });
    }

    /// Whether a connection carries a step.
    pub(crate) fn is_step(&self, conn: ConnId) -> bool {
        let hand = self.process.as_ref().and_then(|process| process.coordinator.hand.as_ref());
        hand.is_some_and(|hand| hand.conn == conn)
    }

    /// Takes a message of a step's connection; nothing for its end.
    pub(crate) fn step_answer(&mut self, context: &mut Context, conn: ConnId, message: Option<Message>) {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return };
        let coordinator = &mut process.coordinator;
        let Some(hand) = coordinator.hand.take_if(|hand| hand.conn == conn) else { return };
        let outcome = match message {
            Some(Message::Ordered(Ok(status))) => Outcome::Taken(Box::new(NodeStatus::clone(&status))),
            Some(Message::Ordered(Err(code))) | Some(Message::Said(Said::Refused(code))) => {
                Outcome::Refused(Error::new(code, "the node refused"))
            }
            Some(Message::Said(Said::Done(_, answers))) => {
                context.count(Count::Canary);
                Outcome::Answer { text: answers.into_iter().map(|(text, _)| text).collect() }
            }
            Some(_) => {
                coordinator.hand = Some(hand);
                return;
            }
            None => lost("the connection ended"),
        };
        context.close(conn, DIALLER, Loss::Clean);
        if matches!(outcome, Outcome::Refused(_) | Outcome::Lost(_)) {
            coordinator.rest_until = now + AGAIN_AFTER;
        }
        coordinator.over = Some((hand.step, outcome));
        coordinator.round_at = Moment::ZERO;
    }
}

/// Gives the permits that the last words of silent nodes would allow.
fn permit_by_memory(plan: &mut Plan, rollout: &Rollout, timers: &Timers, seen: &Seen<'_>, said: &[Option<NodeStatus>]) {
    let mut view = FleetView::new(seen.view.nodes().map(|(_, node)| node.control_address.clone()));
    for (place, status) in said.iter().enumerate().filter_map(|(place, said)| Some((place, said.clone()?))) {
        view.observe(seen.now, Slot(place), status);
    }
    let remembered = fleet::rollout::plan(rollout, &mut timers.clone(), &Seen { view: &view, ..*seen });
    let restarts = remembered.steps.into_iter().find(|step| matches!(step, Step::Restart { .. }));
    let Some(step) = restarts.filter(|_| !plan.steps.iter().any(|step| matches!(step, Step::Restart { .. }))) else {
        return;
    };
    let permitted = remembered.rollout.nodes.into_iter().find(|node| node.node == *step.node());
    let waiting = plan.rollout.nodes.iter_mut().find(|node| node.node == *step.node());
    if let Some((waiting, permitted)) = waiting.filter(|node| node.progress == Progress::Pending).zip(permitted) {
        *waiting = permitted;
        plan.steps.push(step);
    }
}

fn note_changes(context: &mut Context, before: &Rollout, after: &Rollout) {
    let number = |node: &NodeId| node.as_str().trim_start_matches('n').parse().unwrap_or(0);
    for (old, new) in before.nodes.iter().zip(&after.nodes) {
        if old.progress == new.progress {
            continue;
        }
        let names = fleet::rollout::Progress::NAMES;
        let place = |name: &str| names.iter().position(|known| *known == name).unwrap_or(0) as u64;
        let numbers = [number(&new.node), place(old.progress.name()), place(new.progress.name())];
        context.note("rollout: node # goes from # to #", &numbers);
    }
    if before.phase.name() != after.phase.name() {
        let names = fleet::rollout::Phase::NAMES;
        let place = names.iter().position(|known| *known == after.phase.name()).unwrap_or(0);
        context.note("rollout: goes to phase #", &[place as u64]);
        context.count(match after.phase {
            fleet::rollout::Phase::Done => Count::RolloutDone,
            fleet::rollout::Phase::Aborted => Count::RolloutAborted,
            fleet::rollout::Phase::Paused { .. } => Count::RolloutPaused,
            _ => return,
        });
    }
}
