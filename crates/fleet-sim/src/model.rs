//! One model on a node: the load, the real scheduler over the real fake engine, and steps paced by simulated time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use inference::engine::{Batch, Capabilities, Engine, EngineError, Outputs};
use inference::{Event, FAKE_VOCABULARY, FakeEngine, Limits, RequestKey, Scheduler, Submission, fake_token_bytes};
use lifecycle::{ModelInput, next_model_state};
use rand::Rng;
use words::{Code, Fingerprint, ModelCard, ModelLoad, ModelState, ModelStatus, Moment};

use crate::client::model_id;
use crate::clock::{At, draw_ms, ms};
use crate::context::{Context, Due};
use crate::counters::Count;
use crate::plan::{Build, memory_of};
use crate::talk::fingerprint;

/// Most tokens of prompt and completion together.
pub(crate) const CONTEXT_LENGTH: usize = 320;
const BLOCK_TOKENS: usize = 16;

/// Something for the engine's thread; it looks between two steps.
#[derive(Debug)]
pub(crate) enum Command {
    Submit(Box<Submission>),
    Cancel(RequestKey),
    /// To end it with what it has.
    End(RequestKey),
    HandBack,
    FailAll(Code),
}

/// What a command or a step gave its node to pass on.
#[derive(Debug, Default)]
pub(crate) struct Given {
    pub(crate) events: Vec<Event>,
    pub(crate) refused: Vec<(RequestKey, Code)>,
}

/// A model's place on a node.
pub(crate) struct Model {
    pub(crate) number: usize,
    node: usize,
    life: u32,
    pub(crate) build: Build,
    /// A request brings it; others are loaded by default.
    pub(crate) on_demand: bool,
    pub(crate) state: ModelState,
    /// It lets nobody in for now.
    pub(crate) shut: bool,
    /// When it came into its state, and when its last request ended.
    pub(crate) since: At,
    pub(crate) idle_since: At,
    /// Counts loads; the end of an earlier one means nothing.
    load: u64,
    loads_running: u32,
    unload_by: Option<At>,
    pub(crate) again_at: Option<At>,
    scheduler: Scheduler,
    engine: FakeEngine,
    step: Option<(Batch, Result<Outputs, EngineError>)>,
    /// When that began.
    step_since: At,
    inbox: Vec<Command>,
    pub(crate) hang_until: At,
    live: BTreeSet<RequestKey>,
}

fn scheduler(sizes: usize) -> (Scheduler, FakeEngine) {
    let max_running = 3 + sizes % 4;
    let capabilities = Capabilities {
        max_batch: max_running,
        max_step_tokens: max_running + 32,
        block_tokens: BLOCK_TOKENS,
        // Room for less than the batch, so that requests wait for blocks and preempt each other.
        blocks: CONTEXT_LENGTH.div_ceil(BLOCK_TOKENS) * 3,
        context_length: CONTEXT_LENGTH,
        width: 0,
        vocab_size: FAKE_VOCABULARY,
    };
    let limits = Limits {
        max_running,
        max_waiting: 6,
        max_wait: Duration::from_secs(20),
        prefill_tokens: 32,
        max_choices: 4,
        prefix_cache: sizes.is_multiple_of(3),
    };
    (Scheduler::new(capabilities, limits, Arc::new(fake_token_bytes())), FakeEngine::new(capabilities))
}

impl Model {
    pub(crate) fn new(node: usize, life: u32, number: usize, build: Build, on_demand: bool) -> Self {
        let (scheduler, engine) = scheduler(node + number);
        Model {
            number,
            node,
            life,
            build,
            on_demand,
            state: ModelState::Absent,
            shut: false,
            since: At::default(),
            idle_since: At::default(),
            load: 0,
            loads_running: 0,
            unload_by: None,
            again_at: None,
            scheduler,
            engine,
            step: None,
            step_since: At::default(),
            inbox: Vec::new(),
            hang_until: At::default(),
            live: BTreeSet::new(),
        }
    }

    fn go(&mut self, context: &mut Context, input: ModelInput) -> bool {
        match next_model_state(self.state, input) {
            Ok(state) => {
                let numbers = [self.node as u64, self.number as u64, self.state as u64, state as u64];
                context.note("node #: model # goes from state # to #", &numbers);
                (self.state, self.since, self.idle_since, self.shut) = (state, context.now, context.now, false);
                true
            }
            Err(_) => false,
        }
    }

    /// Begins to load, where the machine of models allows it.
    pub(crate) fn begin_load(&mut self, context: &mut Context) -> bool {
        if !self.go(context, ModelInput::Load) {
            return false;
        }
        (self.load, self.loads_running, self.again_at) = (self.load + 1, self.loads_running + 1, None);
        let running = self.loads_running;
        context.check(running == 1, "LC1", || format!("{running} loads of one model run at once"));
        let (node, life, model, load) = (self.node, self.life, self.number, self.load);
        let takes = draw_ms(&mut context.rng, 100, 1_500);
        context.after(takes, Due::LoadOver { node, life, model, load });
        true
    }

    /// Takes the end of a load; returns whether something changed.
    pub(crate) fn load_over(&mut self, context: &mut Context, load: u64) -> bool {
        if load != self.load || self.loads_running == 0 {
            return false;
        }
        self.loads_running -= 1;
        if self.state == ModelState::Unloading {
            // It was called off.
            return false;
        }
        if context.stormy() && context.rng.random_bool(0.05) && self.go(context, ModelInput::Fail) {
            context.count(Count::LoadFailure);
            // Who wants one that comes on demand says so again.
            self.again_at = (!self.on_demand).then(|| context.now.after(ms(3_000)));
            return true;
        }
        let steps = [ModelInput::Fetched, ModelInput::Loaded, ModelInput::Warmed];
        // A recovering model has its files already.
        let changed = steps.into_iter().filter(|input| self.go(context, *input)).count() > 0;
        if self.state == ModelState::Ready {
            context.count(Count::Loaded);
        }
        changed
    }

    /// Begins to unload: what runs has until then. Returns whether something changed.
    pub(crate) fn begin_unload(&mut self, context: &mut Context, by: At) -> bool {
        if !self.go(context, ModelInput::Unload) {
            return false;
        }
        self.again_at = None;
        self.unload_by = Some(by);
        self.inbox.push(Command::HandBack);
        true
    }

    /// Goes on with an unload that time or emptiness allows; returns whether something changed.
    pub(crate) fn go_on_unloading(&mut self, context: &mut Context, given: &mut Given) -> bool {
        match self.state {
            ModelState::Draining => {
                let late = self.unload_by.is_none_or(|by| context.now >= by);
                if late && !self.live.is_empty() {
                    self.inbox.push(Command::FailAll(Code::ModelNotHere));
                    self.run(context, Moment::ZERO, given);
                }
                self.live.is_empty() && self.step.is_none() && self.go(context, ModelInput::Emptied)
            }
            ModelState::Unloading if self.step.is_none() && self.loads_running == 0 => {
                let over = self.go(context, ModelInput::Unloaded);
                let used = self.scheduler.load().blocks_used;
                context.check(used == 0, "KV2", || format!("an unloaded model holds {used} blocks"));
                let (scheduler, engine) = scheduler(self.node + self.number);
                (self.scheduler, self.engine) = (scheduler, engine);
                context.count(Count::Unloaded);
                over
            }
            _ => false,
        }
    }

    /// Puts a command in.
    pub(crate) fn command(&mut self, context: &mut Context, now: Moment, command: Command, given: &mut Given) {
        self.inbox.push(command);
        if self.step.is_none() {
            self.run(context, now, given);
        }
    }

    /// Takes the commands that wait and begins the next step, if there is one.
    pub(crate) fn run(&mut self, context: &mut Context, now: Moment, given: &mut Given) {
        if self.step.is_some() {
            return;
        }
        for command in std::mem::take(&mut self.inbox) {
            match command {
                Command::Submit(submission) => {
                    let key = submission.request;
                    match self.scheduler.submit(now, *submission) {
                        Ok(()) => _ = self.live.insert(key),
                        Err(error) => given.refused.push((key, error.code())),
                    }
                }
                Command::Cancel(key) => {
                    self.live.remove(&key);
                    self.scheduler.cancel(key);
                }
                Command::End(key) => drop(self.scheduler.stop(key, &mut given.events)),
                Command::HandBack => self.scheduler.hand_back(&mut given.events),
                Command::FailAll(code) => self.scheduler.fail_all(code, "the node ends it", &mut given.events),
            }
        }
        if let Some(batch) = self.scheduler.plan(now, &mut given.events) {
            let outputs = self.engine.step(&batch);
            if let Err(error) = &outputs {
                context.breach("KV1", || format!("a batch broke the engine's contract: {error}"));
            }
            (self.step, self.step_since) = (Some((batch, outputs)), context.now);
            let takes = draw_ms(&mut context.rng, 8, 30) + self.hang_until.since(context.now);
            let (node, life, model) = (self.node, self.life, self.number);
            context.after(takes, Due::StepOver { node, life, model });
        }
        self.forget_ended(given);
        self.check(context);
    }

    /// Takes the end of the step that runs.
    pub(crate) fn step_over(&mut self, context: &mut Context, now: Moment, given: &mut Given) {
        let Some((batch, outputs)) = self.step.take() else { return };
        let fault = context.stormy() && context.rng.random_bool(0.001);
        match outputs {
            Ok(outputs) if !fault => self.scheduler.complete(&batch, outputs, &mut given.events),
            _ => {
                context.count(Count::DeviceFault);
                self.scheduler.step_failed(&batch, &mut given.events);
            }
        }
        self.forget_ended(given);
        self.check(context);
        self.run(context, now, given);
    }

    fn forget_ended(&mut self, given: &Given) {
        for event in &given.events {
            if matches!(event.kind, inference::EventKind::Done(_) | inference::EventKind::Failed(..)) {
                self.live.remove(&event.request);
            }
        }
    }

    /// KV1, KV2 and AD1.
    fn check(&self, context: &mut Context) {
        let (load, number) = (self.scheduler.load(), self.number);
        let fits = load.blocks_used + load.blocks_cached <= load.blocks;
        context.check(fits, "KV1", || format!("model {number} counts more blocks than there are: {load:?}"));
        if self.live.is_empty() {
            context.check(load.blocks_used == 0, "KV2", || format!("nobody runs, and blocks are used: {load:?}"));
        }
        let known = load.running + load.waiting == self.live.len();
        context.check(known, "AD1", || format!("{} requests are live, the load says {load:?}", self.live.len()));
        let bounded = load.running <= 3 + (self.node + number) % 4;
        context.check(bounded, "AD1", || format!("too many requests run: {load:?}"));
    }

    /// Keeps a request out of the batch while its reader is behind, or lets it in again.
    pub(crate) fn pause(&mut self, request: RequestKey, paused: bool) {
        self.scheduler.set_paused(request, paused);
    }

    /// Returns whether anything runs or waits.
    pub(crate) fn is_idle(&self) -> bool {
        self.live.is_empty() && self.inbox.is_empty()
    }

    /// Counts the requests that run or wait, or are on their way in.
    pub(crate) fn live(&self) -> usize {
        let mut live = self.live.clone();
        for command in &self.inbox {
            match command {
                Command::Submit(submission) => _ = live.insert(submission.request),
                Command::Cancel(key) => _ = live.remove(key),
                Command::End(_) | Command::HandBack | Command::FailAll(_) => {}
            }
        }
        live.len()
    }

    /// Returns whether the engine's thread waits for something to do.
    pub(crate) fn rests(&self) -> bool {
        self.step.is_none()
    }

    /// Returns whether it takes memory: on its way in, serving, or on its way out.
    pub(crate) fn in_memory(&self) -> bool {
        !matches!(self.state, ModelState::Absent | ModelState::Failed)
    }

    /// Returns whether the step that ran then runs still.
    pub(crate) fn steps_since(&self, then: At) -> bool {
        self.step.is_some() && self.step_since <= then
    }

    /// Returns the fingerprints of its build.
    pub(crate) fn prints(&self) -> (Fingerprint, Fingerprint) {
        let number = self.number as u32;
        let reads = fingerprint(1 + self.build.reads, &[number]);
        (reads, fingerprint(1 + self.build.reads, &[number, self.build.computes as u32]))
    }

    /// Shows it, as statuses carry it.
    pub(crate) fn status(&self, now: At, continuation: bool) -> ModelStatus {
        let (load, prints) = (self.scheduler.load(), self.prints());
        let bytes = memory_of(self.number);
        let card = ModelCard {
            on_demand: self.on_demand,
            pinned: !self.on_demand,
            memory_estimate: bytes,
            ..ModelCard::default()
        };
        ModelStatus {
            card,
            memory_bytes: if self.in_memory() { bytes } else { 0 },
            idle_s: if self.state == ModelState::Ready { now.since(self.idle_since).as_secs() as u32 } else { 0 },
            since_unix_ms: self.since.0 / 1_000 + 1,
            state: self.state,
            context_length: CONTEXT_LENGTH as u32,
            continue_fingerprint: prints.0,
            exact_fingerprint: prints.1,
            capabilities: words::Capabilities { chat: true, continuation },
            load: ModelLoad {
                running: load.running as u32,
                waiting: load.waiting as u32,
                max_running: 3 + (self.node + self.number) as u32 % 4,
                max_waiting: 6,
                kv_blocks: load.blocks as u32,
                kv_blocks_used: load.blocks_used as u32,
            },
            inter_token_p99_ms: 30,
            ..ModelStatus::absent(model_id(self.number))
        }
    }
}
