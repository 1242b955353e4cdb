//! A node's control plane: what it publishes, to whom, and for how long a gateway may be silent.

use std::sync::Arc;
use std::time::Duration;

use words::{Code, Door, DrainPhase, Generation, Intent, ModelState, Moment, NodeMemory, NodeState};

use crate::clock::ms;
use crate::context::Context;
use crate::counters::Count;
use crate::net::{ACCEPTOR, ConnId, Loss, Message};
use crate::node::{Node, Session, Told, state_number};
use crate::planted::Planted;

/// A session without a word of its gateway for this long is lost.
const SESSION_SILENT: Duration = ms(4_000);
/// The requests of a gateway whose session is lost end after this long.
const LEASE: Duration = ms(5_000);

impl Node {
    /// Tells of the machine's state, under a new generation.
    pub(crate) fn announce(&mut self, context: &mut Context) {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return };
        let was = process.status.state;
        process.machine.show(now, &mut process.status);
        let state = process.status.state;
        let closing = process.status.intent == Intent::Cordon || state == NodeState::Draining(DrainPhase::Settle);
        process.settles_since = closing.then(|| process.settles_since.unwrap_or(now));
        if was != state {
            let numbers = [self.place as u64, state_number(was), state_number(state)];
            context.note("node #: goes from state # to #", &numbers);
            context.count_state(state);
        }
        if process.status.intent == Intent::Cordon {
            context.count(Count::Cordoned);
        }
        self.publish(context);
        if let Some(process) = &mut self.process {
            process.announced = process.status.generation;
        }
        self.begin_drain_watch(context, was);
    }

    pub(crate) fn show_models(&mut self, context: &mut Context) {
        let (now, continuation) = (context.now, !self.plan.old);
        if let Some(process) = &mut self.process {
            process.status.models = process.models.iter().map(|model| model.status(now, continuation)).collect();
            process.status.memory = NodeMemory { budget: process.claims.budget(), used: process.claims.used() };
            self.publish(context);
        }
    }

    /// Sends what changed to every session, under a new generation.
    pub(crate) fn publish(&mut self, context: &mut Context) {
        let Some(process) = &mut self.process else { return };
        process.status.generation = process.status.generation.next();
        process.status.gateways = process.sessions.keys().cloned().collect();
        // The data port is bound once the activation is over.
        if process.status.data_address.is_empty() && process.status.state != NodeState::Activating {
            process.status.data_address = format!("{}:1", self.id);
        }
        self.remember();
        self.push_status(context);
    }

    pub(crate) fn remember(&mut self) {
        let Some(process) = &self.process else { return };
        let status = &process.status;
        let open = matches!(status.state, NodeState::Ready | NodeState::Draining(words::DrainPhase::Settle))
            && (status.intent != Intent::Cordon || process.door == Door::All);
        let ready = process.models.iter().filter(|model| model.state == ModelState::Ready);
        let listed = process.models.iter().filter(|model| model.on_demand);
        let (ready, listed) = (ready.map(|model| model.number).collect(), listed.map(|model| model.number).collect());
        let told = Told { open, ready, listed };
        self.told.insert((status.incarnation.counter, status.generation), told);
    }

    pub(crate) fn push_status(&mut self, context: &mut Context) {
        let (now, continuation) = (self.now(context), !self.plan.old);
        let Some(process) = &mut self.process else { return };
        process.heartbeat = now;
        process.status.models = process.models.iter().map(|model| model.status(context.now, continuation)).collect();
        process.status.in_flight = process.in_flight() as u32;
        let status = Arc::new(process.status.clone());
        for session in process.sessions.values() {
            context.send_control(session.conn, ACCEPTOR, Message::Status(status.clone()));
        }
    }

    pub(crate) fn look_at_sessions(&mut self, context: &mut Context, now: Moment) {
        let Some(process) = &mut self.process else { return };
        let silent = process.sessions.values().filter(|s| now.since(s.heard) >= SESSION_SILENT);
        for conn in silent.map(|session| session.conn).collect::<Vec<_>>() {
            context.close(conn, ACCEPTOR, Loss::Clean);
            self.detach(context, conn);
        }
        let Some(process) = &mut self.process else { return };
        let lost = process.orphans.iter().filter(|(_, since)| now.since(**since) >= LEASE);
        for gateway in lost.map(|(gateway, _)| gateway.clone()).collect::<Vec<_>>() {
            if let Some(process) = &mut self.process {
                process.orphans.remove(&gateway);
            }
            self.orphan(context, &gateway);
        }
    }

    /// Takes a control message of a gateway.
    pub(crate) fn control(&mut self, context: &mut Context, conn: ConnId, message: Message) {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return };
        if let Some(session) = process.sessions.values_mut().find(|session| session.conn == conn) {
            session.heard = now;
        }
        match message {
            Message::Hello(gateway) => {
                process.orphans.remove(&gateway);
                process.attached.insert(conn, gateway.clone());
                let session = Session { conn, acked: Generation(0), heard: now };
                let old = process.sessions.insert(gateway, session);
                if let Some(old) = old.filter(|_| !context.planted(Planted::DoubleRelease)) {
                    process.attached.remove(&old.conn);
                    context.close(old.conn, ACCEPTOR, Loss::Clean);
                }
                self.publish(context);
            }
            Message::Ack(incarnation, generation) => {
                let ours = incarnation == process.status.incarnation;
                if let Some(session) = process.sessions.values_mut().find(|s| s.conn == conn && ours) {
                    session.acked = session.acked.max(generation);
                }
                self.drive(context);
            }
            Message::Ping => context.send_control(conn, ACCEPTOR, Message::Pong),
            Message::Poll => {
                let status = Arc::new(process.status.clone());
                context.send_control(conn, ACCEPTOR, Message::Status(status));
            }
            Message::Order(order) => {
                let answer = self.order(context, &order);
                self.answer_order(context, conn, answer);
            }
            Message::Cancel(request, gateway) => self.cancel_request(context, request, &gateway),
            Message::Release { rollout, lease_revision, prolong } => {
                let answer = self.release(context, &rollout, lease_revision, prolong);
                self.answer_order(context, conn, answer);
            }
            _ => {}
        }
    }

    pub(crate) fn answer_order(&self, context: &mut Context, conn: ConnId, answer: Result<(), Code>) {
        let Some(process) = &self.process else { return };
        let answer = answer.map(|()| Arc::new(process.status.clone()));
        context.send(conn, ACCEPTOR, Message::Ordered(answer));
    }

    /// Takes the end of a gateway's session.
    pub(crate) fn detach(&mut self, context: &mut Context, conn: ConnId) {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return };
        let attached = process.attached.remove(&conn).filter(|_| context.planted(Planted::DoubleRelease));
        let of = process.sessions.iter().find(|(_, session)| session.conn == conn);
        if let Some(gateway) = attached.or(of.map(|(gateway, _)| gateway.clone())) {
            process.sessions.remove(&gateway);
            process.orphans.insert(gateway, now);
            self.publish(context);
            self.drive(context);
        }
    }
}
