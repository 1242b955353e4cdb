//! A node: the machine of its life, its models, its sessions with gateways, and the record that survives it.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use lifecycle::{Act, Claims, DrainBudget, ExitKind, NodeFacts, NodeLife, NodeRules, Record};
use rand::Rng;
use words::{
    Code, Door, GatewayId, Generation, Incarnation, IntentOrder, ModelState, Moment, NodeId, NodeState, NodeStatus,
};

use crate::client::{answer, model_id, read_prompt};
use crate::clock::{At, ProcessClock, draw_ms, ms};
use crate::context::{Context, Due, Party};
use crate::coordinator::canary_order;
use crate::counters::Count;
use crate::demand::Waiting;
use crate::model::{Command, Model};
use crate::net::{ConnId, Loss};
use crate::plan::{Build, NodePlan};
use crate::planted::Planted;
use crate::rollouts::{BAD_READS, BAD_UPGRADE};
use crate::serve::Streams;

pub(crate) use crate::model::CONTEXT_LENGTH;

/// How often a process looks at its timers.
const TICK: Duration = ms(100);
/// A status goes out at least this often.
const HEARTBEAT: Duration = ms(1_000);
/// Acts and machine steps that one input may cause.
const STEPS_MAX: usize = 64;

/// What one status said, for those who check others' deeds by it.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    /// New work was welcome.
    pub(crate) open: bool,
    /// Places of the models that were ready.
    pub(crate) ready: Vec<usize>,
    /// Places of the models that a request brings.
    pub(crate) listed: Vec<usize>,
}

/// A host with a supervisor and a disk; at times a process runs on it.
pub(crate) struct Node {
    pub(crate) place: usize,
    pub(crate) id: NodeId,
    pub(crate) plan: NodePlan,
    pub(crate) life: u32,
    pub(crate) paused_until: At,
    pub(crate) clock: ProcessClock,
    /// On disk.
    starts: u64,
    pub(crate) record: Record,
    pub(crate) disk_full: bool,
    /// After the next crash nobody is there for a while to start it again.
    pub(crate) stays_away: bool,
    /// A bad upgrade was installed.
    bad: bool,
    /// Since when it truly does not serve a model that it is meant to.
    pub(crate) unserving_since: BTreeMap<usize, At>,
    pub(crate) process: Option<Process>,
    /// What each generation of each life said.
    pub(crate) told: BTreeMap<(u64, Generation), Told>,
}

/// A gateway's session.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Session {
    pub(crate) conn: ConnId,
    pub(crate) acked: Generation,
    pub(crate) heard: Moment,
}

/// A running process.
pub(crate) struct Process {
    pub(crate) machine: NodeLife,
    pub(crate) status: NodeStatus,
    /// The gate, as the machine last set it.
    pub(crate) door: Door,
    /// The generation of the machine's last word.
    pub(crate) announced: Generation,
    pub(crate) models: Vec<Model>,
    /// Default models that the activation has still to load.
    pub(crate) pass: Option<VecDeque<usize>>,
    pub(crate) unloading: bool,
    pub(crate) sessions: BTreeMap<GatewayId, Session>,
    pub(crate) orphans: BTreeMap<GatewayId, Moment>,
    pub(crate) streams: Streams,
    /// Memory for models. Those that are loaded by default have theirs from the start.
    pub(crate) claims: Claims,
    /// Requests that wait for their model.
    pub(crate) waiting: Vec<Waiting>,
    pub(crate) heartbeat: Moment,
    /// Since when its gateways may know that it will close.
    pub(crate) settles_since: Option<Moment>,
    /// It was told not to wait for them.
    hasty: bool,
    signals: u32,
    /// Control connections of gateways, also those that a later one has replaced.
    pub(crate) attached: BTreeMap<ConnId, GatewayId>,
    pub(crate) canary_at: Option<(Moment, bool)>,
    pub(crate) upgrade_at: Option<(Moment, String)>,
    pub(crate) exit: Option<ExitKind>,
    /// When the drain that runs must be over, by the true clock.
    pub(crate) drain_by: Option<At>,
}

/// Budgets, small enough for every phase to be met within one run.
pub(crate) fn rules(old: bool) -> NodeRules {
    let drain = DrainBudget {
        settle_max: ms(2_000),
        handoff: (!old).then_some(ms(3_000)),
        deadline: ms(12_000),
        cut_max: ms(1_000),
    };
    NodeRules { drain, unload_max: ms(3_000), upgrade_max: ms(4_000), durable: true }
}

impl Node {
    pub(crate) fn new(place: usize, plan: NodePlan) -> Self {
        Node {
            place,
            id: NodeId::new(format!("n{place}")).unwrap_or_else(|_| unreachable!("a plain name")),
            plan,
            life: 0,
            paused_until: At::default(),
            clock: ProcessClock::default(),
            starts: 0,
            record: Record::default(),
            disk_full: false,
            stays_away: false,
            bad: false,
            unserving_since: BTreeMap::new(),
            process: None,
            told: BTreeMap::new(),
        }
    }

    pub(crate) fn party(&self) -> Party {
        Party::Node(self.place)
    }

    pub(crate) fn now(&self, context: &Context) -> Moment {
        self.clock.moment(context.now)
    }

    /// Starts a process, as the supervisor does.
    pub(crate) fn start(&mut self, context: &mut Context) {
        if self.process.is_some() {
            return;
        }
        self.life += 1;
        self.starts += 1;
        self.clock = ProcessClock::start(context.now, &mut context.rng);
        let incarnation = Incarnation { counter: self.starts, random: context.rng.random() };
        context.note("node #: life # starts", &[self.place as u64, self.starts]);
        let machine = NodeLife::start(incarnation, self.record.clone(), rules(self.plan.old));
        let mut status = NodeStatus::new(self.id.clone(), incarnation);
        machine.show(Moment::ZERO, &mut status);
        let build = |(number, build): &(usize, Build), on_demand: bool| {
            let reads = if self.bad { BAD_READS } else { build.reads };
            Model::new(self.place, self.life, *number, Build { reads, ..*build }, on_demand)
        };
        let resident = self.plan.models.iter().map(|model| build(model, false));
        let models = resident.chain(self.plan.catalogue.iter().map(|model| build(model, true))).collect();
        self.process = Some(Process {
            machine,
            status,
            door: Door::Nobody,
            announced: Generation(1),
            models,
            pass: Some((0..self.plan.models.len()).collect()),
            unloading: false,
            sessions: BTreeMap::new(),
            orphans: BTreeMap::new(),
            streams: Streams::default(),
            claims: self.claims(),
            waiting: Vec::new(),
            heartbeat: Moment::ZERO,
            settles_since: None,
            hasty: false,
            signals: 0,
            attached: BTreeMap::new(),
            canary_at: None,
            upgrade_at: None,
            exit: None,
            drain_by: None,
        });
        self.remember();
        self.tick(context);
    }

    /// Ends the process without a word of its own.
    pub(crate) fn crash(&mut self, context: &mut Context, loss: Loss) {
        if self.process.take().is_some() {
            context.note("node #: life # is gone", &[self.place as u64, self.starts]);
            self.note_serving(context.now);
            self.life += 1;
            context.hang_up(self.party(), loss);
            let back = match std::mem::take(&mut self.stays_away) {
                true => draw_ms(&mut context.rng, 6_000, 25_000),
                false => draw_ms(&mut context.rng, 300, 3_000),
            };
            context.after(back, Due::Start(self.party()));
        }
    }

    /// Looks at all timers.
    pub(crate) fn tick(&mut self, context: &mut Context) {
        let now = self.now(context);
        self.note_serving(context.now);
        self.go_on_loading(context);
        self.look_at_models(context);
        self.look_at_waiting(context);
        self.look_at_sessions(context, now);
        self.signs_of_life(context, now);
        let Some(process) = &mut self.process else { return };
        if let Some((_, right)) = process.canary_at.take_if(|(at, _)| now >= *at) {
            let answer = if right { Ok(()) } else { Err("a wrong answer".to_string()) };
            let acts = process.machine.canary_answered(now, answer);
            self.act(context, acts, None);
        }
        let Some(process) = &mut self.process else { return };
        if let Some((_, name)) = process.upgrade_at.take_if(|(at, _)| now >= *at) {
            let ok = name == BAD_UPGRADE || context.rng.random_bool(0.9);
            let at = self.clock.wall_ms(context.now);
            let outcome = words::UpgradeOutcome { name, ok, detail: String::new(), at };
            let acts = process.machine.upgraded(outcome);
            self.act(context, acts, None);
        }
        self.drive(context);
        let Some(process) = &self.process else { return };
        let now = self.now(context);
        if now.since(process.heartbeat) >= HEARTBEAT {
            self.push_status(context);
        }
        let Some(process) = &self.process else { return };
        let wake = process.machine.wake_at().map(|at| self.clock.at(context.now, at));
        let next = context.now.after(TICK);
        let at = wake.map_or(next, |wake| wake.min(next)).max(context.now.after(ms(1)));
        context.at(at, Due::Tick { party: self.party(), life: self.life });
    }

    /// Lets the machine go on as far as the facts allow.
    pub(crate) fn drive(&mut self, context: &mut Context) {
        for _ in 0..STEPS_MAX {
            let now = self.now(context);
            let Some(process) = &mut self.process else { return };
            let unaware = process.unaware();
            let facts = NodeFacts {
                in_flight: process.in_flight(),
                unaware_gateways: if context.planted(Planted::SkipSettle) { 0 } else { unaware },
                offers_open: process.streams.offered(),
            };
            let acts = process.machine.advance(now, &facts);
            if acts.is_empty() {
                return self.check_drain(context);
            }
            self.act(context, acts, None);
        }
        context.breach("DR2", || "the machine of a node's life does not come to rest".into());
    }

    /// Does what the machine says, in order. `before` is the machine to go back to when an order can't be recorded;
    /// returns whether it all was done.
    pub(crate) fn act(&mut self, context: &mut Context, acts: Vec<Act>, before: Option<NodeLife>) -> bool {
        for act in acts {
            let now = self.now(context);
            let Some(process) = &mut self.process else { return false };
            match act {
                Act::Persist(_) if self.disk_full && before.is_some() => {
                    if let Some(before) = before {
                        process.machine = before;
                    }
                    context.count(Count::OrderUnrecorded);
                    return false;
                }
                Act::Persist(_) if self.disk_full => {}
                Act::Persist(record) => {
                    self.record = *record;
                    if context.crash_point() {
                        context.note("node #: dies right after it wrote its record", &[self.place as u64]);
                        self.crash(context, Loss::Reset);
                        return false;
                    }
                }
                Act::Admit(door) => {
                    if process.door == Door::All {
                        process.check_settled(context, now);
                    }
                    process.door = door;
                }
                Act::HandBack => self.hand_back(context),
                Act::Reopen => {}
                Act::Publish => self.announce(context),
                Act::Offer { open_at_most } => self.offer(context, open_at_most),
                Act::Withdraw => self.withdraw(context),
                Act::Cut => {
                    context.count(Count::Cut);
                    self.command_all(context, || Command::FailAll(Code::StreamCut));
                }
                Act::Unload => {
                    process.unloading = true;
                    process.pass = None;
                    for model in &mut process.models {
                        model.begin_unload(context, context.now);
                    }
                }
                Act::Load => {
                    process.unloading = false;
                    process.pass = Some((0..self.plan.models.len()).collect());
                }
                Act::RunCanary(canary) => {
                    context.count(Count::OwnCanary);
                    let order = canary_order(&canary);
                    let model = process.models.iter().find(|model| model_id(model.number) == canary.model);
                    let ready = model.filter(|model| model.state == ModelState::Ready);
                    let says = |model: &Model| answer(&read_prompt(&order.prompt, model.build.reads), &order);
                    let right = ready.is_some_and(|model| says(model).contains(&canary.answer));
                    process.canary_at = Some((now + ms(300), right));
                }
                Act::Upgrade(name) => {
                    context.count(Count::Upgrade);
                    self.bad = name == BAD_UPGRADE;
                    if self.bad {
                        context.count(Count::BadUpgrade);
                    }
                    process.upgrade_at = Some((now + ms(1_500), name));
                }
                Act::Exit(kind) => {
                    process.exit = Some(kind);
                    context.count(Count::CleanExit);
                    context.note("node #: life # exits", &[self.place as u64, self.starts]);
                    self.crash(context, Loss::Clean);
                    return false;
                }
            }
        }
        true
    }

    /// Takes an order; the answer goes back to whoever gave it.
    pub(crate) fn order(&mut self, context: &mut Context, order: &IntentOrder) -> Result<(), Code> {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return Err(Code::UpstreamFailed) };
        if self.plan.old {
            return Err(Code::RouteNotFound);
        }
        let before = process.machine.clone();
        let kept = self.record.clone();
        process.hasty |= order.deadline.is_some_and(|deadline| deadline <= rules(false).drain.settle_max);
        let mut taken = order.clone();
        if context.planted(Planted::IgnoreEpochs) {
            taken.seen = before.epoch();
        }
        match process.machine.order(now, &taken) {
            Ok(acts) => {
                let stale = order.seen != before.epoch();
                context.check(!stale, "GN1", || format!("an order of epoch {:?} was taken", order.seen));
                context.count(Count::OrderTaken);
                let done = self.act(context, acts, Some(before));
                self.drive(context);
                if done || self.process.is_none() { Ok(()) } else { Err(Code::Internal) }
            }
            Err(error) => {
                let same = process.machine.record() == before.record() && self.record == kept;
                context.check(same, "GN1", || "a refused order changed something".into());
                context.count(Count::OrderRefused);
                Err(error.code())
            }
        }
    }

    /// Takes a rollout's word on its hold.
    pub(crate) fn release(
        &mut self,
        context: &mut Context,
        rollout: &words::RolloutId,
        lease_revision: u64,
        prolong: Option<Duration>,
    ) -> Result<(), Code> {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return Err(Code::UpstreamFailed) };
        let before = process.machine.clone();
        match process.machine.release_hold(now, rollout, lease_revision, prolong) {
            Ok(acts) => {
                let done = self.act(context, acts, Some(before));
                self.drive(context);
                if done || self.process.is_none() { Ok(()) } else { Err(Code::Internal) }
            }
            Err(error) => Err(error.code()),
        }
    }

    /// Takes a SIGTERM.
    pub(crate) fn terminate(&mut self, context: &mut Context) {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return };
        process.signals += 1;
        process.hasty |= process.signals > 1;
        let acts = process.machine.terminate(now);
        self.act(context, acts, None);
        self.drive(context);
    }

    /// DR1: whether a request may be let in now, and whether what was published agrees.
    pub(crate) fn admits(&self, context: &mut Context, canary: Option<&words::RolloutId>) -> bool {
        let Some(process) = &self.process else { return false };
        let admitted = process.door.admits(canary) || context.planted(Planted::AcceptAfterClosed);
        let state = process.status.state;
        let closed = match state {
            NodeState::Ready => process.door != Door::All,
            NodeState::Draining(phase) => phase != words::DrainPhase::Settle,
            NodeState::Held => canary.is_none(),
            _ => true,
        };
        context.check(!(admitted && closed), "DR1", || format!("a node that said {state:?} let a request in"));
        admitted
    }

    pub(crate) fn begin_drain_watch(&mut self, context: &mut Context, was: NodeState) {
        let Some(process) = &mut self.process else { return };
        let draining = |state| matches!(state, NodeState::Draining(_));
        match (draining(was), draining(process.status.state)) {
            (false, true) => {
                let left = process.status.drain.as_ref().map_or(0, |drain| drain.deadline_ms);
                // Settle is part of the deadline, the cut comes after it; clocks run a little slow.
                let longest = ms(left + left / 50) + rules(false).drain.cut_max + ms(300);
                process.drain_by = Some(context.now.after(longest));
            }
            (_, false) => process.drain_by = None,
            _ => {}
        }
    }

    fn check_drain(&mut self, context: &mut Context) {
        let Some(by) = self.process.as_ref().and_then(|process| process.drain_by) else { return };
        // A process that stood still could do nothing.
        let by = by.max(self.paused_until.after(rules(false).drain.cut_max + ms(300)));
        context.check(context.now <= by, "DR2", || "a drain goes on past its deadline".into());
    }
}

impl Process {
    /// Counts the requests that are let in and not over.
    pub(crate) fn in_flight(&self) -> usize {
        self.streams.len() + self.waiting.len()
    }

    /// Counts the attached gateways that do not know the machine's last word.
    fn unaware(&self) -> usize {
        self.sessions.values().filter(|session| session.acked < self.announced).count()
    }

    /// DR1, the other half: nobody closes before its gateways know, or have had their time.
    fn check_settled(&self, context: &mut Context, now: Moment) {
        let since = self.settles_since.map_or(Duration::ZERO, |since| now.since(since));
        let settled = self.hasty || self.unaware() == 0 || since >= rules(false).drain.settle_max;
        context.check(settled, "DR1", || format!("a node closed before its gateways knew, after {since:?}"));
    }
}

/// A state as the log shows it.
pub(crate) fn state_number(state: NodeState) -> u64 {
    match state {
        NodeState::Activating => 0,
        NodeState::Ready => 1,
        NodeState::Held => 2,
        NodeState::Draining(phase) => 3 + phase as u64,
        NodeState::Drained => 7,
        NodeState::Unloading => 8,
        NodeState::Stopped => 9,
        NodeState::Unknown => 10,
    }
}
