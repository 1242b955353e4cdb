//! A gateway: its view of the fleet, kept by control sessions, and the requests of its clients.

use std::collections::BTreeMap;
use std::time::Duration;

use fleet::{FleetView, Observation, Placements, RetryBudget, SILENT_AFTER, Slot};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use words::{DrainPhase, GatewayId, Generation, Incarnation, Moment, NodeState, NodeStatus};

use crate::clock::{At, ProcessClock, draw_ms, ms};
use crate::context::{Context, Due, Party};
use crate::coordinator::Coordinator;
use crate::counters::Count;
use crate::net::{ConnId, DIALLER, Loss, Message};
use crate::planted::Planted;
use crate::relay::Relay;

const TICK: Duration = ms(100);
const PING_EVERY: Duration = ms(1_000);
const POLL_EVERY: Duration = ms(7_000);
const SILENT_MAX: Duration = SILENT_AFTER.saturating_mul(2);
const REDIAL: Duration = ms(150);

/// One control session, or the pause before the next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Session {
    pub(crate) conn: Option<ConnId>,
    heard: Moment,
    pinged: Moment,
    polled: Moment,
    redial_at: Moment,
}

/// A place where a gateway runs.
pub(crate) struct Gateway {
    pub(crate) place: usize,
    /// It is of the version before.
    pub(crate) old: bool,
    pub(crate) life: u32,
    pub(crate) paused_until: At,
    /// What it knows may be older than usual until then.
    pub(crate) troubled_until: At,
    pub(crate) clock: ProcessClock,
    pub(crate) process: Option<Process>,
}

/// A running gateway.
pub(crate) struct Process {
    pub(crate) id: GatewayId,
    pub(crate) view: FleetView,
    pub(crate) sent: Vec<u32>,
    pub(crate) sessions: Vec<Session>,
    pub(crate) budget: RetryBudget,
    /// By client.
    pub(crate) relays: BTreeMap<usize, Relay>,
    /// The client of each attempt's connection.
    pub(crate) attempts: BTreeMap<ConnId, usize>,
    /// Requests that may wait for loads.
    pub(crate) placements: Placements,
    /// When its requests were looked at.
    pub(crate) looked: Moment,
    pub(crate) rng: SmallRng,
    /// The newest word of each node that ever came, kept apart from the view, to judge it by.
    pub(crate) newest: Vec<(Incarnation, Generation)>,
    pub(crate) coordinator: Coordinator,
    /// What each node said last while it served, for the bug that goes by that.
    pub(crate) said: Vec<Option<NodeStatus>>,
}

impl Gateway {
    pub(crate) fn new(place: usize, old: bool) -> Self {
        let (paused_until, troubled_until, clock) = (At::default(), At::default(), ProcessClock::default());
        Gateway { place, old, life: 0, paused_until, troubled_until, clock, process: None }
    }

    pub(crate) fn party(&self) -> Party {
        Party::Gateway(self.place)
    }

    pub(crate) fn now(&self, context: &Context) -> Moment {
        self.clock.moment(context.now)
    }

    /// Starts a process.
    pub(crate) fn start(&mut self, context: &mut Context) {
        if self.process.is_some() {
            return;
        }
        self.life += 1;
        self.clock = ProcessClock::start(context.now, &mut context.rng);
        context.note("gateway # starts", &[self.place as u64]);
        let count = context.plan.nodes.len();
        let (zero, id) = (Moment::ZERO, format!("g{}-{}", self.place, self.life));
        let session = Session { conn: None, heard: zero, pinged: zero, polled: zero, redial_at: zero };
        let id = GatewayId::new(id).unwrap_or_else(|_| unreachable!("a plain name"));
        self.process = Some(Process {
            coordinator: Coordinator::new(id.clone()),
            id,
            view: FleetView::new((0..count).map(|node| format!("n{node}:1"))),
            sent: vec![0; count],
            sessions: vec![session; count],
            budget: RetryBudget::new(zero, 0.2, 10.0),
            relays: BTreeMap::new(),
            attempts: BTreeMap::new(),
            placements: Placements::default(),
            looked: Moment::ZERO,
            rng: SmallRng::seed_from_u64(context.now.0 ^ self.place as u64),
            newest: vec![Default::default(); count],
            said: vec![None; count],
        });
        self.tick(context);
    }

    /// Ends the process; returns the clients that lose their connection with it.
    pub(crate) fn crash(&mut self, context: &mut Context, loss: Loss) -> Vec<usize> {
        let Some(process) = self.process.take() else { return Vec::new() };
        self.life += 1;
        context.note("gateway # is gone", &[self.place as u64]);
        context.hang_up(self.party(), loss);
        let back = draw_ms(&mut context.rng, 300, 3_000);
        context.after(back, Due::Start(self.party()));
        process.relays.into_keys().collect()
    }

    /// Looks at all timers but those of requests.
    pub(crate) fn tick(&mut self, context: &mut Context) {
        let now = self.now(context);
        let me = (self.party(), self.life);
        let Some(process) = &mut self.process else { return };
        let mut lost = Vec::new();
        for (node, session) in process.sessions.iter_mut().enumerate() {
            let Some(conn) = session.conn else {
                if now >= session.redial_at {
                    let conn = context.dial(me.0, Party::Node(node));
                    context.send(conn, DIALLER, Message::Hello(process.id.clone()));
                    (session.conn, session.heard, session.polled) = (Some(conn), now, now);
                }
                continue;
            };
            if now.since(session.heard) >= SILENT_MAX {
                lost.push(conn);
                continue;
            }
            if now.since(session.pinged) >= PING_EVERY {
                session.pinged = now;
                context.send_control(conn, DIALLER, Message::Ping);
            }
            if now.since(session.polled) >= POLL_EVERY {
                session.polled = now;
                context.send_control(conn, DIALLER, Message::Poll);
            }
        }
        for conn in lost {
            context.close(conn, DIALLER, Loss::Clean);
            self.session_lost(context, conn);
        }
        context.after(TICK, Due::Tick { party: me.0, life: me.1 });
    }

    /// Takes the end of a control session; returns whether it was one.
    pub(crate) fn session_lost(&mut self, context: &mut Context, conn: ConnId) -> bool {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return false };
        let Some(node) = process.sessions.iter().position(|session| session.conn == Some(conn)) else { return false };
        let session = &mut process.sessions[node];
        (session.conn, session.redial_at) = (None, now + REDIAL);
        process.view.lost(Slot(node));
        context.note("gateway #: lost its session with node #", &[self.place as u64, node as u64]);
        true
    }

    /// Takes a control message of a node; returns whether the view may have changed.
    pub(crate) fn control(&mut self, context: &mut Context, conn: ConnId, message: Message) -> bool {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return false };
        let Some(node) = process.sessions.iter().position(|session| session.conn == Some(conn)) else { return false };
        process.sessions[node].heard = now;
        match message {
            Message::Status(status) => {
                let mut status = NodeStatus::clone(&status);
                if self.old {
                    forget_news(&mut status);
                }
                self.observe(context, node, status, now);
                let Some(process) = &self.process else { return false };
                let Some(known) = process.view.node(Slot(node)).and_then(|node| node.status.as_ref()) else {
                    return false;
                };
                let ack = Message::Ack(known.incarnation, known.generation);
                context.send_control(conn, DIALLER, ack);
                true
            }
            Message::Pong => {
                process.view.heard(now, Slot(node));
                true
            }
            _ => false,
        }
    }

    fn observe(&mut self, context: &mut Context, node: usize, status: NodeStatus, now: Moment) {
        let Some(process) = &mut self.process else { return };
        let word = (status.incarnation, status.generation);
        let newest = &mut process.newest[node];
        let older = word.0.counter < newest.0.counter || (word.0 == newest.0 && word.1 < newest.1);
        if !older {
            *newest = word;
        }
        if context.planted(Planted::StaleCapacity) {
            process.said[node] = Some(status.clone());
        }
        let seen = process.view.observe(now, Slot(node), status);
        match seen {
            Observation::Fresh { .. } => process.sent[node] = 0,
            Observation::Stale => context.count(Count::StaleStatus),
        }
        let shown = process.view.node(Slot(node)).and_then(|node| node.status.as_ref());
        let shown = shown.map(|status| (status.incarnation, status.generation));
        context.check(shown == Some(*newest), "GN1", || {
            format!("the view has {shown:?} of node {node}, its newest word is {newest:?}")
        });
    }
}

/// What the version before makes of a status: states that it has no name for are unknown.
fn forget_news(status: &mut NodeStatus) {
    if matches!(status.state, NodeState::Held | NodeState::Drained | NodeState::Draining(DrainPhase::Handoff)) {
        status.state = NodeState::Unknown;
    }
    (status.hold, status.rollout) = (None, None);
}
