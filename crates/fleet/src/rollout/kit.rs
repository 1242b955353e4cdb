//! A small world for the tests: nodes that obey orders as workers do, and a coordinator that sees what it is shown.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::time::Duration;

use words::{
    Capabilities, Code, Epoch, Error, GatewayId, Generation, Hold, Incarnation, Intent, IntentOrder, ModelCard,
    ModelId, ModelState, ModelStatus, Moment, NodeId, NodeState, NodeStatus, RolloutId,
};

use super::{Outcome, Plan, Policy, Rollout, Step, Timers, World, plan};
use crate::view::{FleetView, Slot};

pub(super) const TICK: Duration = Duration::from_millis(250);

pub(super) fn node_id(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

pub(super) fn model_id(name: &str) -> ModelId {
    ModelId::new(name).unwrap()
}

pub(super) fn gateway_id(name: &str) -> GatewayId {
    GatewayId::new(name).unwrap()
}

pub(super) fn model(id: &ModelId) -> ModelStatus {
    ModelStatus {
        state: ModelState::Ready,
        harness: "fake".into(),
        context_length: 4096,
        capabilities: Capabilities { chat: true, continuation: true },
        progress_permille: 1000,
        ..ModelStatus::absent(id.clone())
    }
}

/// A model of the catalogue that nobody has asked for.
fn listed(id: &ModelId) -> ModelStatus {
    let card = ModelCard { on_demand: true, ..ModelCard::default() };
    ModelStatus { card, ..ModelStatus::absent(id.clone()) }
}

/// A worker: what it says of itself, and what it does next by itself.
#[derive(Clone, Debug)]
pub(super) struct Worker {
    pub(super) status: NodeStatus,
    /// Loaded by each life.
    models: Vec<ModelId>,
    /// Brought by requests.
    pub(super) on_demand: Vec<ModelId>,
    /// A cordon that survives.
    pub(super) sticky: Intent,
    /// The next life is held by this rollout.
    claim: Option<(RolloutId, u64)>,
    /// When this life ends.
    leaves_at: Option<Moment>,
    /// When the next one serves; none while the process runs.
    pub(super) back_at: Option<Moment>,
    /// How long it takes to leave, and to come back.
    pub(super) leave: Duration,
    pub(super) away: Duration,
    /// Its answer to the canary.
    pub(super) answer: String,
    /// It is away by its own fault.
    pub(super) crashed: bool,
}

impl Worker {
    fn publish(&mut self) {
        self.status.generation = self.status.generation.next();
    }

    /// Obeys, or refuses.
    fn order(&mut self, now: Moment, order: &IntentOrder) -> Result<NodeStatus, Error> {
        if self.back_at.is_some() {
            return Err(Error::new(Code::UpstreamFailed, "nobody there"));
        }
        let stale = order.seen != self.status.epoch
            || order.intent == Intent::Restart
                && (order.incarnation != Some(self.status.incarnation) || self.leaves_at.is_some());
        if stale {
            return Err(Error::new(Code::Conflict, "stale"));
        }
        self.status.epoch = Epoch(self.status.epoch.0 + 1);
        self.status.intent = order.intent;
        if order.intent == Intent::Restart {
            let claim = order.rollout.as_ref().unwrap();
            self.claim = Some((claim.id.clone(), claim.lease_revision));
            self.status.rollout = Some(claim.id.clone());
            self.status.state = NodeState::Draining(words::DrainPhase::Settle);
            self.leaves_at = Some(now + self.leave);
        } else {
            self.sticky = order.intent;
        }
        self.publish();
        Ok(self.status.clone())
    }

    fn release(&mut self, rollout: &RolloutId) -> Result<NodeStatus, Error> {
        if self.back_at.is_some() {
            return Err(Error::new(Code::UpstreamFailed, "nobody there"));
        }
        if self.status.hold.as_ref().is_none_or(|hold| hold.rollout != *rollout) {
            return Err(Error::new(Code::Conflict, "not held"));
        }
        self.open();
        Ok(self.status.clone())
    }

    fn open(&mut self) {
        self.status.hold = None;
        self.status.state = NodeState::Ready;
        self.claim = None;
        self.publish();
    }

    /// Ends the process; the next one comes by itself.
    pub(super) fn crash(&mut self, now: Moment, away: Duration, fault: bool) {
        if self.back_at.is_none() {
            self.back_at = Some(now + away);
            self.leaves_at = None;
            self.crashed = fault;
            self.status.gateways.clear();
        }
    }

    fn live(&mut self, now: Moment, gateways: &BTreeSet<GatewayId>) {
        if self.leaves_at.is_some_and(|at| at <= now) {
            let away = self.away;
            self.crash(now, away, false);
        }
        if self.back_at.is_some_and(|at| at <= now) {
            let counter = self.status.incarnation.counter + 1;
            self.back_at = None;
            self.crashed = false;
            self.status.incarnation = Incarnation { counter, random: counter };
            self.status.generation = Generation(1);
            self.status.intent = self.sticky;
            self.status.rollout = self.claim.as_ref().map(|(id, _)| id.clone());
            self.status.state = if self.claim.is_some() { NodeState::Held } else { NodeState::Ready };
            self.status.hold =
                self.claim.clone().map(|(rollout, lease_revision)| Hold { rollout, lease_revision, ttl_ms: 60_000 });
            self.status.models = self.models.iter().map(model).chain(self.on_demand.iter().map(listed)).collect();
            self.status.gateways = gateways.clone();
        }
    }

    /// Loads a model for a request.
    pub(super) fn bring(&mut self, id: &ModelId) {
        for known in self.status.models.iter_mut().filter(|known| known.id == *id) {
            *known = ModelStatus { card: known.card.clone(), ..model(id) };
        }
        self.publish();
    }

    pub(super) fn serves(&self, id: &ModelId, gateway: &GatewayId) -> bool {
        self.back_at.is_none()
            && self.status.state == NodeState::Ready
            && self.status.intent == Intent::None
            && self.status.gateways.contains(gateway)
            && self.has(id)
    }

    pub(super) fn has(&self, id: &ModelId) -> bool {
        self.models.contains(id) || self.on_demand.contains(id)
    }
}

/// Workers, gateways, the store, and one coordinator.
#[derive(Debug)]
pub(super) struct Kit {
    pub(super) now: Moment,
    pub(super) workers: Vec<Worker>,
    pub(super) gateways: BTreeSet<GatewayId>,
    pub(super) me: GatewayId,
    pub(super) view: FleetView,
    pub(super) rollout: Rollout,
    pub(super) timers: Timers,
    /// Every order that a worker has taken.
    pub(super) restarted: Vec<NodeId>,
    /// Workers whose news do not reach the coordinator.
    pub(super) unseen: BTreeSet<usize>,
    /// The outcome of the next step is lost, though it is taken.
    pub(super) lose_next: bool,
    /// Orders of a coordinator that was stopped just before it sent them.
    pub(super) late: Vec<Step>,
}

impl Kit {
    /// Makes a fleet, all ready: for each worker its name and models.
    pub(super) fn new(workers: &[(&str, &[&str])]) -> Self {
        let gateways: BTreeSet<_> = [gateway_id("g1"), gateway_id("g2")].into();
        let make = |(name, models): &(&str, &[&str])| {
            let models: Vec<_> = models.iter().map(|name| model_id(name)).collect();
            let mut status = NodeStatus::new(node_id(name), Incarnation { counter: 1, random: 1 });
            status.state = NodeState::Ready;
            status.data_address = format!("{name}:1");
            status.models = models.iter().map(model).collect();
            status.gateways = gateways.clone();
            Worker {
                status,
                models,
                on_demand: Vec::new(),
                sticky: Intent::None,
                claim: None,
                leaves_at: None,
                back_at: None,
                leave: Duration::from_secs(2),
                away: Duration::from_secs(3),
                answer: "blue".into(),
                crashed: false,
            }
        };
        let targets = workers.iter().map(|(name, _)| node_id(name)).collect();
        let rollout = Rollout::new(RolloutId::new("r-1").unwrap(), Policy::new(targets));
        let mut kit = Kit {
            now: Moment::after_start(Duration::from_secs(100)),
            workers: workers.iter().map(make).collect(),
            me: gateway_id("g1"),
            gateways,
            view: FleetView::new(workers.iter().map(|(name, _)| (*name).to_string())),
            rollout,
            timers: Timers::new(),
            restarted: Vec::new(),
            unseen: BTreeSet::new(),
            lose_next: false,
            late: Vec::new(),
        };
        kit.look();
        kit
    }

    pub(super) fn policy(mut self, change: impl FnOnce(&mut Policy)) -> Self {
        change(&mut self.rollout.policy);
        self.rollout = Rollout::new(self.rollout.id.clone(), self.rollout.policy.clone());
        self
    }

    /// Puts a model into the catalogues of workers; those of `loaded` have it already.
    pub(super) fn on_demand(mut self, id: &str, of: &[&str], loaded: &[&str]) -> Self {
        let id = model_id(id);
        for name in of {
            let worker = self.worker(name);
            worker.on_demand.push(id.clone());
            worker.status.models.push(listed(&id));
            if loaded.contains(name) {
                worker.bring(&id);
            }
        }
        self.workers.iter_mut().for_each(Worker::publish);
        self.look();
        self
    }

    pub(super) fn worker(&mut self, name: &str) -> &mut Worker {
        self.workers.iter_mut().find(|worker| worker.status.node.as_str() == name).unwrap()
    }

    pub(super) fn progress(&self, name: &str) -> &'static str {
        self.rollout.node(&node_id(name)).unwrap().progress.name()
    }

    /// Cordons as an operator does.
    pub(super) fn cordon(&mut self, i: usize, intent: Intent) {
        let (now, worker) = (self.now, &mut self.workers[i]);
        if worker.status.intent != Intent::Restart {
            let order = IntentOrder { seen: worker.status.epoch, intent, ..IntentOrder::default() };
            let _ = worker.order(now, &order);
        }
    }

    /// Shows the coordinator what can be seen.
    pub(super) fn look(&mut self) {
        for (i, worker) in self.workers.iter().enumerate() {
            if worker.back_at.is_none() && !self.unseen.contains(&i) {
                self.view.observe(self.now, Slot(i), worker.status.clone());
            }
        }
    }

    pub(super) fn world(&self) -> World<'_> {
        World { view: &self.view, me: &self.me, now: self.now }
    }

    pub(super) fn plan(&mut self) -> Plan {
        let world = World { view: &self.view, me: &self.me, now: self.now };
        plan(&self.rollout, &mut self.timers, &world)
    }

    /// Lets a worker obey.
    pub(super) fn perform(&mut self, step: &Step) -> Outcome {
        let now = self.now;
        let id = step.node().clone();
        let rollout = self.rollout.id.clone();
        let worker = self.workers.iter_mut().find(|worker| worker.status.node == id).unwrap();
        let taken = match step {
            Step::Restart { order, .. } | Step::Fence { order, .. } => worker.order(now, order),
            Step::Release { .. } => worker.release(&rollout),
            Step::Canary { .. } if worker.back_at.is_some() => Err(Error::new(Code::UpstreamFailed, "nobody there")),
            Step::Canary { .. } => return Outcome::Answer { text: worker.answer.clone() },
        };
        if taken.is_ok() && matches!(step, Step::Restart { .. }) {
            self.restarted.push(id);
        }
        match taken {
            Ok(status) => Outcome::Taken(Box::new(status)),
            Err(error) if error.code() == Code::Conflict => Outcome::Refused(error),
            Err(error) => Outcome::Lost(error),
        }
    }

    /// One tick: time goes on, workers live, the coordinator looks, plans, stores, and takes one step.
    pub(super) fn tick(&mut self) -> Option<Step> {
        self.now = self.now + TICK;
        for worker in &mut self.workers {
            worker.live(self.now, &self.gateways);
        }
        self.look();
        let plan = self.plan();
        self.rollout = plan.rollout;
        let step = plan.steps.into_iter().next()?;
        let outcome = self.perform(&step);
        let lost = std::mem::take(&mut self.lose_next);
        let outcome = if lost { Outcome::Lost(Error::new(Code::UpstreamTimeout, "lost")) } else { outcome };
        self.rollout.settle(&step, &outcome);
        Some(step)
    }

    /// Ticks until `done`, or panics after `patience`.
    pub(super) fn until(&mut self, patience: u64, done: impl Fn(&Kit) -> bool) {
        let end = self.now + Duration::from_secs(patience);
        while !done(self) {
            assert!(self.now < end, "not within {patience} s: {:#?}", self.rollout);
            self.tick();
        }
    }

    /// Another gateway takes over: it has the store, and its own eyes.
    pub(super) fn successor(&mut self) {
        self.timers = Timers::new();
        self.rollout.lease_revision += 1;
        self.view = FleetView::new(self.workers.iter().map(|worker| worker.status.node.to_string()));
    }
}
