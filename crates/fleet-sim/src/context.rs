//! What every actor of the simulation has at hand: time, chance, the queue of what is due, the links, the log.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use words::{DrainPhase, NodeState};

use crate::clock::At;
use crate::counters::{Count, Counters};
use crate::log::Log;
use crate::net::{ConnId, Message, Net};
use crate::plan::Plan;
use crate::planted::Planted;

/// A process of the fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Party {
    /// A gateway, by its place.
    Gateway(usize),
    /// A node, by its place.
    Node(usize),
}

/// Something that is due.
#[derive(Debug)]
pub(crate) enum Due {
    /// The front message towards one end of a connection.
    Deliver { conn: ConnId, to: usize },
    /// A message that goes its own way, apart from the order of its connection.
    Loose { conn: ConnId, to: usize, message: Message },
    /// A process looks at its timers; only in the life that asked for it.
    Tick { party: Party, life: u32 },
    /// A model's step is over.
    StepOver { node: usize, life: u32, model: usize },
    /// A model's load is over.
    LoadOver { node: usize, life: u32, model: usize, load: u64 },
    /// A process starts, if none runs.
    Start(Party),
    /// A client sends its request.
    Arrive,
    /// A client leaves, or begins to read again.
    Client { request: usize, what: ClientDue },
    /// The next entry of the schedule of faults.
    Fault(usize),
    /// A link hears again.
    Heal { from: Party, to: Party },
    /// The operator does something.
    Operate,
    /// The run looks whether everything has come to rest.
    Inspect,
}

/// What a client does by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClientDue {
    /// It goes away.
    Leave,
    /// It stops reading.
    StopReading,
    /// It reads again.
    Read,
    /// An operator cancels its request.
    Cancel,
}

/// An invariant that did not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The invariant's id.
    pub invariant: &'static str,
    /// What was seen.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.invariant, self.what)
    }
}

struct Entry {
    at: At,
    order: u64,
    due: Due,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// Shared by all actors; handed to each as it acts.
pub(crate) struct Context {
    pub(crate) now: At,
    pub(crate) rng: SmallRng,
    pub(crate) net: Net,
    pub(crate) plan: Plan,
    pub(crate) counters: Counters,
    pub(crate) violation: Option<Violation>,
    log: Log,
    planted: Option<Planted>,
    queue: BinaryHeap<Reverse<Entry>>,
    order: u64,
}

impl Context {
    pub(crate) fn new(seed: u64, plan: Plan, log: Log, planted: Option<Planted>) -> Self {
        Context {
            now: At::default(),
            rng: SmallRng::seed_from_u64(seed),
            net: Net::default(),
            plan,
            counters: Counters::default(),
            violation: None,
            log,
            planted,
            queue: BinaryHeap::new(),
            order: 0,
        }
    }

    /// Makes something due.
    pub(crate) fn at(&mut self, at: At, due: Due) {
        self.order += 1;
        self.queue.push(Reverse(Entry { at: at.max(self.now), order: self.order, due }));
    }

    /// Makes something due after a while.
    pub(crate) fn after(&mut self, span: Duration, due: Due) {
        self.at(self.now.after(span), due);
    }

    /// Takes the next thing that is due and moves the time to it.
    pub(crate) fn next(&mut self) -> Option<Due> {
        let Reverse(entry) = self.queue.pop()?;
        self.now = entry.at;
        Some(entry.due)
    }

    /// Notes something in the log; each `#` of the text stands for the next number.
    pub(crate) fn note(&mut self, text: &'static str, numbers: &[u64]) {
        self.log.note(self.now, text, numbers);
    }

    /// Counts something.
    pub(crate) fn count(&mut self, count: Count) {
        self.counters.add(count);
    }

    /// Counts a node's new state.
    pub(crate) fn count_state(&mut self, state: NodeState) {
        let count = match state {
            NodeState::Ready => Count::Ready,
            NodeState::Held => Count::Held,
            NodeState::Draining(DrainPhase::Settle) => Count::Settle,
            NodeState::Draining(DrainPhase::Closed) => Count::Closed,
            NodeState::Draining(DrainPhase::Handoff) => Count::Handoff,
            NodeState::Drained => Count::Drained,
            NodeState::Unloading => Count::Unloading,
            _ => return,
        };
        self.count(count);
    }

    /// Returns whether a bug is planted; none is without the feature.
    pub(crate) fn planted(&self, bug: Planted) -> bool {
        cfg!(feature = "planted") && self.planted == Some(bug)
    }

    /// Returns whether faults happen now.
    pub(crate) fn stormy(&self) -> bool {
        !self.plan.calm && self.now < self.plan.faults_until
    }

    /// Draws whether a process dies between one act and the next.
    pub(crate) fn crash_point(&mut self) -> bool {
        let dies = self.stormy() && self.rng.random_bool(0.03);
        if dies {
            self.count(Count::CrashPoint);
        }
        dies
    }

    /// Takes a breach of an invariant; the first one ends the run.
    pub(crate) fn breach(&mut self, invariant: &'static str, what: impl FnOnce() -> String) {
        if self.violation.is_none() {
            self.violation = Some(Violation { invariant, what: what() });
        }
    }

    /// Takes a breach unless `holds`.
    pub(crate) fn check(&mut self, holds: bool, invariant: &'static str, what: impl FnOnce() -> String) {
        if !holds {
            self.breach(invariant, what);
        }
    }

    /// Writes the log out.
    pub(crate) fn render_log(&self) -> String {
        self.log.render()
    }
}
