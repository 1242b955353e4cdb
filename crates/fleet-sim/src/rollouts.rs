//! Operators of rollouts, and the floor that a rollout must keep, judged by the true state of the fleet.

use fleet::rollout::{MaxUnavailable, Phase, Policy, Rollout, World as Seen, rehearse};
use rand::Rng;
use words::{Canary, HandoffPolicy, Intent, ModelState, NodeState, RolloutId};

use crate::client::{answer, model_id, read_prompt};
use crate::clock::{At, ms};
use crate::coordinator::canary_order;
use crate::counters::Count;
use crate::model::Model;
use crate::net::Loss;
use crate::node::Node;
use crate::world::World;

/// The upgrade that leaves a node which answers wrongly.
pub(crate) const BAD_UPGRADE: &str = "bad";
/// What such a node reads prompts as.
pub(crate) const BAD_READS: u64 = 9;
/// How old a coordinator's knowledge may be as it sends an order: what is silent for longer counts as down.
pub(crate) const KNOWLEDGE: std::time::Duration = ms(3_500);
/// How old it may be when the order arrives, through whatever link.
pub(crate) const KNOWLEDGE_ON_THE_WAY: std::time::Duration = ms(20_000);

impl World {
    /// Whether a rollout is under way.
    pub(crate) fn rolling(&self) -> bool {
        self.store.peek().is_some_and(|rollout| !rollout.phase.over())
    }

    /// Begins a rollout through a gateway, if nothing speaks against it.
    pub(crate) fn begin_rollout(&mut self) {
        let able: Vec<usize> = (0..self.gateways.len()).filter(|place| !self.gateways[*place].old).collect();
        if able.is_empty() || self.rolling() {
            return;
        }
        let place = able[self.context.rng.random_range(0..able.len())];
        let policy = self.draw_policy();
        let now = self.gateways[place].now(&self.context);
        let Some(process) = &self.gateways[place].process else { return };
        let seen = Seen { view: &process.view, me: &process.id, now };
        if rehearse(&policy, &seen).is_err() {
            self.context.count(Count::RolloutRefused);
            return;
        }
        let Ok(stored) = self.store.load(self.context.now) else { return };
        let id = RolloutId::new(format!("r{}", stored.revision)).unwrap_or_else(|_| unreachable!("a plain name"));
        if self.store.swap(self.context.now, stored.revision, None, Rollout::new(id, policy)).is_ok() {
            self.context.count(Count::Rollout);
            self.context.note("operator: begins a rollout through gateway #", &[place as u64]);
        }
    }

    fn draw_policy(&mut self) -> Policy {
        let (calm, bad) = (self.context.plan.calm, self.context.plan.bad_upgrades);
        let models = self.context.plan.models;
        let rng = &mut self.context.rng;
        let mut targets: Vec<_> = self.nodes.iter().map(|node| node.id.clone()).collect();
        for i in (1..targets.len()).rev() {
            targets.swap(i, rng.random_range(0..=i));
        }
        if rng.random_bool(0.3) {
            targets.truncate(rng.random_range(1..=targets.len()));
        }
        let canary = rng.random_bool(0.6).then(|| {
            let mut canary =
                Canary { model: model_id(rng.random_range(0..models)), prompt: "right".into(), answer: "".into() };
            let order = canary_order(&canary);
            canary.answer = answer(&read_prompt(&order.prompt, 0), &order);
            canary
        });
        let mut policy = Policy::new(targets);
        policy.max_unavailable = MaxUnavailable::Count(if calm { 1 } else { rng.random_range(1..=2) });
        if !calm && rng.random_bool(0.2) {
            policy.allow_dark = (0..models + self.context.plan.on_demand).map(model_id).collect();
        }
        policy.upgrade = match rng.random_range(0..10) {
            0 | 1 => Some("engine".into()),
            2..=5 if bad && canary.is_some() => Some(BAD_UPGRADE.into()),
            _ => None,
        };
        policy.min_available.default = if rng.random_bool(0.3) { 2 } else { 1 };
        policy.canary = canary;
        policy.hold_ttl = ms(6_000);
        policy.deadline_ms = Some(9_000);
        policy.handoff = if rng.random_bool(0.5) { HandoffPolicy::Now } else { HandoffPolicy::Soft };
        policy.health_for = ms(2_000);
        policy.back_within = ms(20_000);
        policy.blocked_max = ms(15_000);
        policy
    }

    /// Pauses, resumes or aborts what is there.
    pub(crate) fn steer_rollout(&mut self) {
        let Ok(stored) = self.store.load(self.context.now) else { return };
        let Some(mut rollout) = stored.rollout else { return };
        let place = self.context.rng.random_range(0..self.gateways.len());
        let now = self.gateways[place].now(&self.context);
        let Some(process) = &self.gateways[place].process else { return };
        let seen = Seen { view: &process.view, me: &process.id, now };
        let changed = match rollout.phase {
            Phase::Running if self.context.rng.random_bool(0.3) && self.context.stormy() => rollout.pause(),
            Phase::Paused { .. } if self.context.rng.random_bool(0.7) => {
                self.context.count(Count::RolloutResumed);
                rollout.resume(&seen)
            }
            Phase::Paused { .. } => rollout.abort(),
            // What came back too late is opened by another abort.
            Phase::Aborted if self.nodes.iter().any(Node::is_held) => rollout.abort(),
            _ => return,
        };
        if changed.is_ok() {
            self.context.note("operator: steers the rollout", &[]);
            let _ = self.store.swap(self.context.now, stored.revision, None, rollout);
        }
    }

    /// Takes a bystander away for long, in the middle of a rollout: the next node must wait for it.
    pub(crate) fn lose_a_bystander(&mut self) {
        let bystanders: Vec<usize> =
            self.nodes.iter().filter(|node| !node.is_out_by_rollout()).map(|node| node.place).collect();
        if bystanders.is_empty() {
            return;
        }
        let place = bystanders[self.context.rng.random_range(0..bystanders.len())];
        self.context.count(Count::NodeVanish);
        self.nodes[place].stays_away = true;
        self.nodes[place].crash(&mut self.context, Loss::Silent);
    }

    /// RO1: as a node takes a rollout's order, each of its models keeps its floor elsewhere. Nodes that are out by a
    /// fault or an operator since a moment ago are faults; those that are out by the rollout are none.
    pub(crate) fn check_floor(&mut self, place: usize, served: &[usize], knowledge: std::time::Duration) {
        let Some(rollout) = self.store.peek() else { return };
        let (policy, now) = (&rollout.policy, self.context.now);
        // What it did not serve it does not take away.
        for number in served {
            let model = model_id(*number);
            if policy.allow_dark.contains(&model) {
                continue;
            }
            let others = || self.nodes.iter().filter(|node| node.place != place && node.has(*number));
            let serving = others().filter(|node| node.serves(*number, now)).count();
            let recent = |since: &At| now.since(*since) <= knowledge;
            let faulty = |node: &&Node| {
                !node.serves(*number, now)
                    && !node.is_out_by_rollout()
                    && node.unserving_since.get(number).is_none_or(recent)
            };
            let faults = others().filter(faulty).count();
            let wanted = policy.min_available.of(&model) as usize;
            if serving + faults < wanted {
                self.context.breach("RO1", || {
                    format!("node {place} takes a rollout's order, and model {number} has {serving} other replicas")
                });
            }
        }
    }

    /// RO2: once faults have stopped, a rollout is over.
    pub(crate) fn check_rollout_over(&mut self) {
        let phase = self.store.peek().map(|rollout| rollout.phase.clone());
        let over = phase.as_ref().is_none_or(Phase::over);
        self.context.check(over, "RO2", || format!("long after the last fault the rollout is {phase:?}"));
    }
}

impl Node {
    /// Whether it is meant to have a model, always or when somebody asks for it.
    pub(crate) fn has(&self, number: usize) -> bool {
        self.plan.models.iter().chain(&self.plan.catalogue).any(|(known, _)| *known == number)
    }

    /// Names the models that it truly has loaded, and serves.
    pub(crate) fn served(&self, now: At) -> Vec<usize> {
        let models = self.process.iter().flat_map(|process| &process.models);
        let loaded = models.filter(|model| model.state == ModelState::Ready).map(|model| model.number);
        loaded.filter(|number| self.serves(*number, now)).collect()
    }

    /// Whether it truly serves a model to everybody; one that comes on demand also where it would load it.
    pub(crate) fn serves(&self, number: usize, now: At) -> bool {
        let Some(process) = &self.process else { return false };
        let able = |model: &&Model| match model.state {
            ModelState::Ready => true,
            ModelState::Draining | ModelState::Failed => false,
            _ => model.on_demand,
        };
        now >= self.paused_until
            && process.machine.state() == NodeState::Ready
            && process.machine.intent() == Intent::None
            && process.models.iter().filter(able).any(|model| model.number == number)
    }

    /// Whether it came up and a rollout holds it.
    fn is_held(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.machine.state() == NodeState::Held)
    }

    /// Whether a rollout has it restart, or holds it.
    pub(crate) fn is_out_by_rollout(&self) -> bool {
        let restarts = self.record.restart.as_ref().is_some_and(|restart| restart.claim.is_some());
        restarts || self.record.hold.is_some()
    }

    /// Notes since when it does not serve.
    pub(crate) fn note_serving(&mut self, now: At) {
        for (number, _) in self.plan.models.iter().chain(&self.plan.catalogue) {
            if self.serves(*number, now) {
                self.unserving_since.remove(number);
            } else {
                self.unserving_since.entry(*number).or_insert(now);
            }
        }
    }
}
