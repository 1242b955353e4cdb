//! Operators: drains, cordons, restarts and signals, at random, by what one gateway's view shows them.

use fleet::Slot;
use rand::Rng;
use words::{HandoffPolicy, Incarnation, Intent, IntentOrder, NodeState};

use crate::clock::{At, draw_ms, ms};
use crate::context::{Due, Party};
use crate::counters::Count;
use crate::net::{DIALLER, Message};
use crate::world::World;

/// What operators remember.
#[derive(Default)]
pub(crate) struct Operator {
    /// The node that is out by their doing; one at a time where nothing may be lost.
    out: Option<usize>,
    /// When that began.
    since: At,
}

impl World {
    /// Does something, and plans the next time.
    pub(crate) fn operate(&mut self) {
        let quiet = self.context.now >= self.context.plan.faults_until;
        let next = if quiet { ms(1_000) } else { draw_ms(&mut self.context.rng, 500, 6_000) };
        self.context.after(next, Due::Operate);
        if quiet {
            return self.restore();
        }
        if self.context.plan.calm {
            return self.operate_calmly();
        }
        if self.rolling() && self.context.rng.random_bool(0.15) {
            return self.lose_a_bystander();
        }
        let node = self.context.rng.random_range(0..self.nodes.len());
        match self.context.rng.random_range(0..15) {
            12 => self.begin_rollout(),
            13 | 14 if self.rolling() => self.steer_rollout(),
            13 | 14 => self.begin_rollout(),
            0 => self.signal(node),
            1 => self.load_or_unload(node),
            2 => self.order(node, Intent::Cordon),
            3 | 4 => self.order(node, Intent::Drain),
            5 | 6 => self.order(node, Intent::Restart),
            // Mostly what is out is brought back, so that the fleet is rarely empty.
            _ => {
                let out = |node: &usize| self.nodes[*node].record.intent != Intent::None;
                let node = (0..self.nodes.len()).find(out).unwrap_or(node);
                self.order(node, Intent::None);
            }
        }
    }

    /// One node at a time, and the next only when that one is back.
    fn operate_calmly(&mut self) {
        if let Some(node) = self.operator.out {
            let long = self.context.now.since(self.operator.since) > ms(4_000);
            let state = self.nodes[node].process.as_ref().map(|process| process.machine.state());
            let known = self.known_open(node);
            let intent = self.nodes[node].record.intent;
            match state {
                Some(NodeState::Ready) if known && intent == Intent::None => self.operator.out = None,
                Some(NodeState::Ready | NodeState::Drained) if long && intent != Intent::None => {
                    self.order(node, Intent::None);
                }
                Some(NodeState::Draining(_)) if long && self.context.rng.random_bool(0.2) => {
                    self.order(node, Intent::None);
                }
                _ => {}
            }
            return;
        }
        if self.rolling() {
            if self.context.rng.random_bool(0.1) {
                self.steer_rollout();
            }
            return;
        }
        let all_ready = (0..self.nodes.len()).all(|node| self.known_open(node));
        if !all_ready {
            return;
        }
        if self.context.rng.random_bool(0.4) {
            return self.begin_rollout();
        }
        let node = self.context.rng.random_range(0..self.nodes.len());
        (self.operator.out, self.operator.since) = (Some(node), self.context.now);
        match self.context.rng.random_range(0..5) {
            0 => self.signal(node),
            1 => self.order(node, Intent::Cordon),
            2 | 3 => self.order(node, Intent::Drain),
            _ => self.order(node, Intent::Restart),
        }
    }

    /// Whether every gateway knows a node as open with all its models.
    pub(crate) fn known_open(&self, node: usize) -> bool {
        let models = self.nodes[node].plan.models.len();
        self.gateways.iter().all(|gateway| {
            let now = gateway.now(&self.context);
            let view = gateway.process.as_ref().and_then(|process| process.view.node(Slot(node)));
            let status = view.and_then(|node| node.routable(now));
            let ready = |model: &&words::ModelStatus| model.state == words::ModelState::Ready && !model.card.on_demand;
            status.is_some_and(|status| {
                status.state == NodeState::Ready
                    && status.intent == Intent::None
                    && status.models.iter().filter(ready).count() == models
            })
        })
    }

    /// Lifts every intent, until every node serves.
    fn restore(&mut self) {
        if self.context.rng.random_bool(0.1) {
            self.steer_rollout();
        }
        for node in 0..self.nodes.len() {
            let Some(process) = &self.nodes[node].process else { continue };
            let lifted = process.machine.intent() == Intent::None;
            if !lifted && !process.machine.is_leaving() && !self.rolling() {
                self.order(node, Intent::None);
            }
            self.load_all(node);
        }
    }

    fn load_all(&mut self, node: usize) {
        for model in 0..self.nodes[node].plan.models.len() {
            self.nodes[node].load(&mut self.context, model);
        }
    }

    fn signal(&mut self, node: usize) {
        self.context.count(Count::Signal);
        self.context.note("operator: SIGTERM to node #", &[node as u64]);
        self.nodes[node].terminate(&mut self.context);
    }

    fn load_or_unload(&mut self, node: usize) {
        let models = self.nodes[node].plan.models.len();
        if models == 0 {
            return;
        }
        let model = self.context.rng.random_range(0..models);
        if self.context.rng.random_bool(0.5) {
            self.nodes[node].load(&mut self.context, model);
        } else {
            self.nodes[node].unload(&mut self.context, model);
        }
    }

    /// Sends an order through a gateway, by what that one knows.
    fn order(&mut self, node: usize, intent: Intent) {
        let gateway = self.context.rng.random_range(0..self.gateways.len());
        let party = Party::Gateway(gateway);
        let Some(process) = &self.gateways[gateway].process else { return };
        let Some(status) = process.view.node(Slot(node)).and_then(|node| node.status.as_ref()) else { return };
        let (seen, incarnation) = (status.epoch, status.incarnation);
        let rng = &mut self.context.rng;
        let calm = self.context.plan.calm;
        let handoff = match rng.random_range(0..3) {
            0 => HandoffPolicy::Now,
            1 if !calm => HandoffPolicy::Never,
            _ => HandoffPolicy::Soft,
        };
        let deadline = (!calm && rng.random_bool(0.5)).then(|| draw_ms(rng, 300, 8_000));
        let restart = intent == Intent::Restart;
        let order = IntentOrder {
            seen,
            intent,
            incarnation: restart.then_some(if !calm && rng.random_bool(0.05) {
                Incarnation::default()
            } else {
                incarnation
            }),
            deadline,
            handoff,
            rollout: None,
            upgrade: (restart && rng.random_bool(0.2)).then(|| "engine".to_string()),
        };
        let numbers = [node as u64, intent as u64, seen.0];
        self.context.note("operator: order to node #, intent #, saw epoch #", &numbers);
        let conn = self.context.dial(party, Party::Node(node));
        let message = Message::Order(Box::new(order));
        if self.context.stormy() && self.context.rng.random_bool(0.2) {
            self.context.count(Count::StaleOrder);
            let late = draw_ms(&mut self.context.rng, 50, 8_000);
            self.context.after(late, Due::Loose { conn, to: 1 - DIALLER, message: message.clone() });
        }
        self.context.send(conn, DIALLER, message);
    }
}
