//! Seeded links: what is sent over one connection comes in order or not at all; connections break; links go deaf in
//! one direction or both, and what was sent meanwhile comes when they hear again, as over TCP.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use words::{Code, GatewayId, Generation, Incarnation, IntentOrder, NodeStatus, RolloutId};

use crate::clock::{At, draw_ms};
use crate::context::{Context, Due, Party};
use crate::counters::Count;
use crate::talk::{Ask, Said};

/// Names a connection; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ConnId(pub(crate) usize);

/// The end that dialled.
pub(crate) const DIALLER: usize = 0;
/// The end that was dialled.
pub(crate) const ACCEPTOR: usize = 1;

/// What travels.
#[derive(Clone, Debug)]
pub(crate) enum Message {
    /// The other end is gone, or the connection.
    Closed,
    /// A gateway's first word on a control connection.
    Hello(GatewayId),
    /// A gateway has this generation in its view.
    Ack(Incarnation, Generation),
    /// A gateway's sign of life.
    Ping,
    /// A gateway asks for the status beside the stream.
    Poll,
    /// An operator's or a rollout's order.
    Order(Box<IntentOrder>),
    /// A rollout's release of a hold.
    Release { rollout: RolloutId, lease_revision: u64, prolong: Option<Duration> },
    /// A gateway's word that this request of its own is wanted no more.
    Cancel(usize, GatewayId),
    /// A node's answer to an order or a release, with what it says of itself since.
    Ordered(Result<Arc<NodeStatus>, Code>),
    /// A node's status, pushed or polled.
    Status(Arc<NodeStatus>),
    /// A node's answer to a ping.
    Pong,
    /// A request, as a gateway sends it to a node.
    Ask(Box<Ask>),
    /// An event of an answer.
    Said(Said),
}

#[derive(Debug, Default)]
struct Way {
    queue: VecDeque<Message>,
    /// Messages at the end of the queue that a deaf link holds back.
    held: usize,
    last: At,
    /// Messages that have come, and that the end has not taken in.
    untaken: usize,
}

#[derive(Debug)]
struct Conn {
    ends: [Party; 2],
    /// Whether each end still holds it.
    open: [bool; 2],
    /// Nothing gets through any more, though an end may not know.
    broken: bool,
    /// Towards each end.
    ways: [Way; 2],
}

/// All connections.
#[derive(Debug, Default)]
pub(crate) struct Net {
    conns: Vec<Conn>,
    open: BTreeSet<ConnId>,
    deaf: BTreeSet<(Party, Party)>,
}

impl Net {
    /// Returns who holds an end of a connection.
    pub(crate) fn end(&self, conn: ConnId, end: usize) -> Party {
        self.conns[conn.0].ends[end]
    }

    /// Returns whether an end still holds the connection.
    pub(crate) fn is_open(&self, conn: ConnId, end: usize) -> bool {
        self.conns[conn.0].open[end]
    }

    /// Returns how many messages wait on their way to an end.
    pub(crate) fn waiting(&self, conn: ConnId, to: usize) -> usize {
        let way = &self.conns[conn.0].ways[to];
        way.queue.len() + way.untaken
    }

    /// Notes how much of what has come an end has not taken in.
    pub(crate) fn set_untaken(&mut self, conn: ConnId, end: usize, count: usize) {
        self.conns[conn.0].ways[end].untaken = count;
    }

    /// Takes the message that is due towards an end, if it was not lost and the end still holds the connection.
    pub(crate) fn take(&mut self, conn: ConnId, to: usize) -> Option<Message> {
        let conn = &mut self.conns[conn.0];
        let message = conn.ways[to].queue.pop_front()?;
        conn.open[to].then_some(message)
    }

    /// Names the connections of a party that are open at its end.
    pub(crate) fn of(&self, party: Party) -> Vec<(ConnId, usize)> {
        let ends = |id: &ConnId| [(*id, 0), (*id, 1)];
        let all = self.open.iter().flat_map(ends);
        all.filter(|(id, end)| self.conns[id.0].ends[*end] == party && self.conns[id.0].open[*end]).collect()
    }

    /// Names all open connections.
    pub(crate) fn all(&self) -> Vec<ConnId> {
        self.open.iter().copied().collect()
    }

    /// Takes an end off a connection.
    pub(crate) fn mark_closed(&mut self, id: ConnId, end: usize) {
        let conn = &mut self.conns[id.0];
        conn.open[end] = false;
        if conn.open == [false; 2] {
            self.open.remove(&id);
            // Nobody reads it any more.
            conn.ways = Default::default();
        }
    }
}

/// How a connection's end that is lost tells the other one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Loss {
    /// What was sent before still comes.
    Clean,
    /// What is on its way is lost.
    Reset,
    /// As a reset, but the word of it comes late: the machine is gone.
    Silent,
}

impl Context {
    /// Opens a connection; whether anybody accepts it shows by what comes back.
    pub(crate) fn dial(&mut self, from: Party, to: Party) -> ConnId {
        let id = ConnId(self.net.conns.len());
        let ends = [from, to];
        self.net.conns.push(Conn { ends, open: [true; 2], broken: false, ways: Default::default() });
        self.net.open.insert(id);
        id
    }

    /// Sends from one end to the other.
    pub(crate) fn send(&mut self, conn: ConnId, from: usize, message: Message) {
        let known = &self.net.conns[conn.0];
        if known.open == [true; 2] && !known.broken {
            self.post(conn, 1 - from, message);
        }
    }

    fn post(&mut self, id: ConnId, to: usize, message: Message) {
        let delay = self.delay();
        let conn = &mut self.net.conns[id.0];
        let deaf = self.net.deaf.contains(&(conn.ends[1 - to], conn.ends[to]));
        let way = &mut conn.ways[to];
        way.queue.push_back(message);
        if deaf {
            way.held += 1;
            return;
        }
        let at = self.now.after(delay).max(way.last);
        way.last = at;
        self.at(at, Due::Deliver { conn: id, to });
    }

    /// Sends a control message, which now and then comes a second time, or late and beside the others.
    pub(crate) fn send_control(&mut self, conn: ConnId, from: usize, message: Message) {
        let odd = self.plan.odd_control;
        if odd > 0.0 && self.rng.random_bool(odd) {
            let late = draw_ms(&mut self.rng, 1, 1_500);
            let twice = self.rng.random_bool(0.5);
            self.count(if twice { Count::DuplicateControl } else { Count::LateControl });
            self.after(late, Due::Loose { conn, to: 1 - from, message: message.clone() });
            if !twice {
                return;
            }
        }
        self.send(conn, from, message);
    }

    fn delay(&mut self) -> Duration {
        let most = if self.rng.random_bool(0.01) { self.plan.delay_rare_us } else { self.plan.delay_us };
        Duration::from_micros(self.rng.random_range(50..=most))
    }

    /// Ends a connection at one end; the other one hears of it.
    pub(crate) fn close(&mut self, conn: ConnId, end: usize, loss: Loss) {
        if !self.net.conns[conn.0].open[end] {
            return;
        }
        self.net.mark_closed(conn, end);
        self.tell_closed(conn, 1 - end, loss);
    }

    fn tell_closed(&mut self, conn: ConnId, to: usize, loss: Loss) {
        if !self.net.conns[conn.0].open[to] {
            return;
        }
        if loss != Loss::Clean {
            let way = &mut self.net.conns[conn.0].ways[to];
            // What is due already finds an empty queue.
            way.queue.clear();
            way.held = 0;
        }
        if loss == Loss::Silent {
            let late = draw_ms(&mut self.rng, 3_000, 40_000);
            self.after(late, Due::Loose { conn, to, message: Message::Closed });
        } else if loss == Loss::Reset {
            // Beside the order: stale deliveries may still be due on this way.
            let delay = self.delay();
            self.after(delay, Due::Loose { conn, to, message: Message::Closed });
        } else {
            self.post(conn, to, Message::Closed);
        }
    }

    /// Breaks a connection under both ends.
    pub(crate) fn drop_connection(&mut self, conn: ConnId) {
        self.net.conns[conn.0].broken = true;
        for end in [DIALLER, ACCEPTOR] {
            self.tell_closed(conn, end, Loss::Reset);
        }
    }

    /// Ends all connections of a process that is gone.
    pub(crate) fn hang_up(&mut self, party: Party, loss: Loss) {
        for (conn, end) in self.net.of(party) {
            self.close(conn, end, loss);
        }
    }

    /// Makes a link deaf for a while.
    pub(crate) fn deafen(&mut self, from: Party, to: Party, span: Duration) {
        if self.net.deaf.insert((from, to)) {
            self.after(span, Due::Heal { from, to });
        }
    }

    /// Lets a link hear again: what was sent meanwhile comes now.
    pub(crate) fn heal(&mut self, from: Party, to: Party) {
        self.net.deaf.remove(&(from, to));
        for id in self.net.all() {
            for end in [DIALLER, ACCEPTOR] {
                if self.net.conns[id.0].ends[end] != to || self.net.conns[id.0].ends[1 - end] != from {
                    continue;
                }
                let held = std::mem::take(&mut self.net.conns[id.0].ways[end].held);
                let mut at = self.net.conns[id.0].ways[end].last;
                for _ in 0..held {
                    at = self.now.after(self.delay()).max(at);
                    self.at(at, Due::Deliver { conn: id, to: end });
                }
                self.net.conns[id.0].ways[end].last = at;
            }
        }
    }
}
