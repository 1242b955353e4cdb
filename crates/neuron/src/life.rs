//! The owner of this node's life: orders, signals, facts and time in, the machine's acts out, one after another.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use lifecycle::{Act, ExitKind, HookEvent, NodeFacts, NodeLife, Record};
use service::clock::Clock;
use service::command::{self, Order};
use service::deadman::Deadman;
use service::gate::Gate;
use service::server::Server;
use service::signals::Signal;
use tokio::sync::{mpsc, oneshot};
use words::{
    Code, DrainPhase, Error, Generation, IntentOrder, Moment, NodeState, NodeStatus, RolloutId, UpgradeOutcome,
};

use crate::activation::activate;
use crate::canary;
use crate::kv::StoredKv;
use crate::manager::Manager;
use crate::metrics::Metrics;
use crate::models::Models;
use crate::node::{DataPort, NodeError};
use crate::options::Options;
use crate::publisher::Publisher;
use crate::sessions::Sessions;
use crate::state_dir::StateDir;
use crate::streams::Streams;
use crate::turns::Turns;

/// Orders that wait.
const INBOX: usize = 16;
/// How often leases are looked at and progress is shown.
const TICK: Duration = Duration::from_millis(500);

type Reply = oneshot::Sender<Result<NodeStatus, Error>>;

/// What the control service asks.
#[derive(Debug)]
pub(crate) enum Command {
    /// An order of an operator or a rollout.
    Order(Box<IntentOrder>, Reply),
    /// A coordinator's word on its hold: open, or hold on for the time given.
    Release(RolloutId, u64, Option<Duration>, Reply),
}

/// The way to the owner; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct LifeHandle {
    inbox: mpsc::Sender<Command>,
}

/// Makes the way in, and its other end.
pub(crate) fn inbox() -> (LifeHandle, mpsc::Receiver<Command>) {
    let (inbox, commands) = mpsc::channel(INBOX);
    (LifeHandle { inbox }, commands)
}

impl LifeHandle {
    /// Gives an order; returns once it is on disk and published.
    ///
    /// # Errors
    /// The machine's refusal; `Internal` when it could not be written down. Nothing has changed then.
    pub(crate) async fn order(&self, order: IntentOrder) -> Result<NodeStatus, Error> {
        self.ask(|reply| Command::Order(Box::new(order), reply)).await
    }

    /// Gives a coordinator's word on its hold.
    ///
    /// # Errors
    /// As [`LifeHandle::order`].
    pub(crate) async fn release(
        &self,
        rollout: RolloutId,
        lease_revision: u64,
        prolong: Option<Duration>,
    ) -> Result<NodeStatus, Error> {
        self.ask(|reply| Command::Release(rollout, lease_revision, prolong, reply)).await
    }

    async fn ask(&self, command: impl FnOnce(Reply) -> Command) -> Result<NodeStatus, Error> {
        let gone = || Error::new(Code::Conflict, "this worker is about to exit");
        let (reply, answer) = oneshot::channel();
        self.inbox.send(command(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// What was begun by an act and ends with an input. One at a time: a newer one takes its place.
enum Done {
    Activated(Result<(), Error>),
    /// A hook of the start failed; nothing was loaded.
    NotStarted(Error),
    Unloaded,
    Canary(Result<(), String>),
    Upgraded(UpgradeOutcome),
}

type Work = Pin<Box<dyn Future<Output = Done> + Send>>;

/// What the owner touches.
pub(crate) struct Parts {
    pub(crate) clock: Clock,
    pub(crate) gate: Gate,
    pub(crate) models: Models,
    pub(crate) publisher: Publisher,
    pub(crate) sessions: Sessions,
    pub(crate) streams: Streams,
    pub(crate) turns: Turns,
    pub(crate) metrics: Metrics,
    pub(crate) manager: Manager,
    pub(crate) options: Arc<Options>,
    pub(crate) state_dir: Option<StateDir>,
    pub(crate) kv: StoredKv,
    pub(crate) port: DataPort,
}

/// How a life ended.
pub(crate) struct Ended {
    /// Whether streams were cut.
    pub(crate) cut: bool,
    /// The data port's server, still to be stopped.
    pub(crate) data: Option<Server>,
    /// Still armed.
    pub(crate) deadman: Option<Deadman>,
    /// When the hooks of the process's end must be over.
    pub(crate) hooks_by: Moment,
}

/// The owner.
pub(crate) struct Life {
    machine: NodeLife,
    parts: Parts,
    data: Option<Server>,
    work: Option<Work>,
    /// The generation of the last publication, which gateways acknowledge.
    announced: Generation,
    exit: Option<ExitKind>,
}

impl Life {
    pub(crate) fn new(machine: NodeLife, parts: Parts) -> Self {
        parts.gate.close();
        let mut life = Life { machine, parts, data: None, work: None, announced: Generation(0), exit: None };
        life.publish();
        life
    }

    /// Lives until the machine says that the process ends.
    ///
    /// # Errors
    /// [`NodeError`] when the worker can't start serving.
    pub(crate) async fn run(
        mut self,
        signals: &mut mpsc::Receiver<Signal>,
        mut commands: mpsc::Receiver<Command>,
    ) -> Result<Ended, NodeError> {
        let load = self.machine.loads_defaults().then(|| self.load());
        let (turns, kv) = (self.parts.turns.clone(), self.parts.kv.clone());
        self.work = Some(Box::pin(async move {
            let done = match (turns.of_node(HookEvent::Startup).await, load) {
                (Err(error), _) => return Done::NotStarted(error),
                (Ok(()), Some(load)) => load.await,
                (Ok(()), None) => Done::Activated(Ok(())),
            };
            // So that the first request ever served finds the KV of the life before, too.
            kv.opened().await;
            done
        }));
        let mut in_flight = self.parts.gate.watch();
        let mut acks = self.parts.sessions.watch();
        let mut tick = tokio::time::interval(self.parts.manager.look_every().map_or(TICK, |every| TICK.min(every)));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            in_flight.mark_unchanged();
            acks.mark_unchanged();
            self.rest().await;
            if let Some(kind) = self.exit {
                let (now, unload_max) = (self.now(), self.parts.options.drain.unload_max());
                let guarded = self.parts.manager.into_deadman();
                // The hooks of the process's end have what is left of the time that the exit was given.
                let hooks_by = guarded.as_ref().map_or(now + unload_max, |(by, _)| *by);
                let deadman = guarded.map(|(_, deadman)| deadman);
                return Ok(Ended { cut: kind == ExitKind::StreamsCut, data: self.data, deadman, hooks_by });
            }
            let wake = self.machine.wake_at().map(|at| self.parts.clock.instant(at));
            tokio::select! {
                _ = in_flight.changed() => {}
                _ = acks.changed() => {}
                () = sleep_until(wake) => {}
                _ = tick.tick() => self.look_after(),
                Some(signal) = signals.recv() => self.signal(signal).await,
                Some(command) = commands.recv() => self.command(command).await,
                done = next(&mut self.work) => {
                    self.work = None;
                    self.done(done).await?;
                }
            }
        }
    }

    fn now(&self) -> Moment {
        self.parts.clock.now()
    }

    fn facts(&self) -> NodeFacts {
        // Asked at each begin and end of a request: streams are counted only while any is offered.
        let offers = matches!(self.machine.state(), NodeState::Draining(DrainPhase::Handoff));
        NodeFacts {
            in_flight: self.parts.gate.in_flight(),
            unaware_gateways: self.parts.sessions.unaware(self.announced),
            offers_open: if offers { self.parts.streams.offered() } else { 0 },
        }
    }

    /// Lets the machine go on, with fresh facts at each step, until it waits for something.
    async fn rest(&mut self) {
        loop {
            let acts = self.machine.advance(self.now(), &self.facts());
            if acts.is_empty() || self.exit.is_some() {
                break;
            }
            self.perform_anyway(acts).await;
        }
        if self.exit.is_none() {
            self.parts.manager.tell(&self.machine);
        }
    }

    async fn signal(&mut self, signal: Signal) {
        let further = self.machine.is_leaving();
        let acts = self.machine.terminate(self.now());
        self.parts.manager.guard(&self.machine);
        self.parts.manager.stopping();
        if further {
            tracing::warn!(?signal, "a further signal while leaving");
        }
        self.perform_anyway(acts).await;
        self.look_after();
    }

    async fn command(&mut self, command: Command) {
        let (now, before) = (self.now(), self.machine.clone());
        let (acts, reply) = match command {
            Command::Order(order, reply) => {
                let known = self.know_upgrade(&order);
                let acts = known.and_then(|()| self.machine.order(now, &order));
                tracing::info!(?order, refused = acts.is_err(), "order");
                (acts, reply)
            }
            Command::Release(rollout, lease_revision, prolong, reply) => {
                let acts = self.machine.release_hold(now, &rollout, lease_revision, prolong);
                tracing::info!(%rollout, lease_revision, ?prolong, refused = acts.is_err(), "word on a hold");
                (acts, reply)
            }
        };
        let result = match acts {
            Ok(acts) => self.perform(acts).await,
            Err(error) => Err(error),
        };
        if let Err(error) = &result {
            tracing::warn!(%error, "refused; nothing has changed");
            self.machine = before;
        }
        // Whoever asked may be gone; the order stands.
        let _ = reply.send(result.map(|()| self.parts.publisher.snapshot()));
    }

    fn know_upgrade(&self, order: &IntentOrder) -> Result<(), Error> {
        let Some(name) = order.upgrade.as_ref() else { return Ok(()) };
        let known = &self.parts.options.upgrade;
        if known.contains_key(name) {
            return Ok(());
        }
        let names: Vec<&str> = known.keys().map(String::as_str).collect();
        let message = match names.is_empty() {
            true => format!("this worker has no [upgrade.{name}], nor any other"),
            false => format!("this worker has no [upgrade.{name}]; it has {}", names.join(", ")),
        };
        Err(Error::invalid("upgrade", message))
    }

    async fn done(&mut self, done: Done) -> Result<(), NodeError> {
        let now = self.now();
        let acts = match done {
            Done::Activated(result) => {
                match result {
                    Err(error) if !self.parts.manager.was_ready() => return Err(NodeError::Required(error)),
                    Err(error) => tracing::error!(%error, "a required model failed; going on without it"),
                    Ok(()) => {}
                }
                if self.machine.state() == NodeState::Activating && self.data.is_none() {
                    self.data = Some(self.parts.port.open(&self.parts.publisher).await?);
                }
                self.machine.activated(now)
            }
            Done::NotStarted(error) => return Err(NodeError::Startup(error)),
            Done::Unloaded => self.machine.unloaded(now),
            Done::Canary(answer) => {
                match &answer {
                    Ok(()) => tracing::info!("the canary's answer is right; opening"),
                    Err(reason) => tracing::error!(reason, "the canary failed; still held"),
                }
                self.machine.canary_answered(now, answer)
            }
            Done::Upgraded(outcome) => {
                let UpgradeOutcome { name, ok, detail, .. } = &outcome;
                tracing::info!(name, ok, detail, "upgrade over");
                self.machine.upgraded(outcome)
            }
        };
        self.perform_anyway(acts).await;
        Ok(())
    }

    /// Performs acts that nobody can be refused for: what can't be written down is logged.
    async fn perform_anyway(&mut self, acts: Vec<Act>) {
        let mut acts = acts;
        if let Some(Act::Persist(record)) = acts.first() {
            if let Err(error) = persist(self.parts.state_dir.as_ref(), record).await {
                tracing::error!(%error, "the record on disk is older than the truth");
            }
            acts.remove(0);
        }
        if let Err(error) = self.perform(acts).await {
            tracing::error!(%error, "acts were left out");
        }
    }

    /// Performs acts in their order.
    ///
    /// # Errors
    /// `Internal` when the record, which comes first, could not be written: nothing was done then.
    async fn perform(&mut self, acts: Vec<Act>) -> Result<(), Error> {
        for act in acts {
            match act {
                Act::Persist(record) => persist(self.parts.state_dir.as_ref(), &record).await?,
                Act::Admit(door) => self.parts.gate.set(door),
                Act::HandBack => {
                    self.parts.models.engines().iter().for_each(|(_, engine)| engine.hand_back());
                    self.data.iter().for_each(Server::begin_close);
                }
                Act::Reopen => self.data.iter().for_each(Server::reopen),
                Act::Publish => self.publish(),
                Act::Offer { open_at_most } => self.offer(open_at_most),
                Act::Withdraw => self.parts.streams.withdraw(),
                Act::Cut => self.cut(),
                Act::Unload => self.work = Some(self.unload()),
                Act::Load => self.work = Some(self.load()),
                Act::RunCanary(canary) => {
                    let asked = canary::ask(self.parts.models.clone(), self.parts.clock, canary);
                    self.work = Some(Box::pin(async { Done::Canary(asked.await) }));
                }
                Act::Upgrade(name) => self.work = Some(self.upgrade(name)),
                Act::Exit(kind) => self.exit = Some(kind),
            }
        }
        Ok(())
    }

    fn publish(&mut self) {
        // Before anybody can know of the new state: nothing is loaded into a node that is cordoned.
        self.parts.models.set_open(self.machine.takes_loads());
        let (now, machine) = (self.now(), &self.machine);
        self.announced = self.parts.publisher.node(|status| machine.show(now, status));
    }

    fn offer(&mut self, most: usize) {
        let now = self.now();
        let made = self.parts.streams.offer(now, most, None);
        if made > 0 {
            tracing::info!(made, "running requests offered to other workers");
            self.parts.metrics.handoffs_offered.inc_by(made as u64);
        }
    }

    fn cut(&self) {
        let running = self.parts.gate.in_flight();
        tracing::warn!(running, "the drain's deadline has come: cutting what still runs");
        for (_, engine) in self.parts.models.engines() {
            engine.fail_all(Code::StreamCut, "the worker is leaving and its time to finish this answer is over");
        }
    }

    fn load(&self) -> Work {
        let Parts { options, models, publisher, .. } = &self.parts;
        let (options, models, publisher) = (options.clone(), models.clone(), publisher.clone());
        Box::pin(async move { Done::Activated(activate(&options.at_start(), &models, &publisher).await) })
    }

    /// Unloads every model, all at once, each within the bound; one that fails never keeps the rest.
    fn unload(&self) -> Work {
        let (models, bound) = (self.parts.models.clone(), self.parts.options.drain.unload_max());
        Box::pin(async move {
            let unload = |id: words::ModelId| {
                let models = &models;
                async move {
                    match tokio::time::timeout(bound, models.unload(&id, None)).await {
                        Ok(Ok(_)) => tracing::info!(model = %id, "unloaded"),
                        Ok(Err(error)) => tracing::warn!(model = %id, %error, "unload failed; going on"),
                        Err(_) => tracing::warn!(model = %id, ?bound, "unload took too long; going on"),
                    }
                }
            };
            futures_util::future::join_all(models.ids().into_iter().map(unload)).await;
            Done::Unloaded
        })
    }

    fn upgrade(&self, name: String) -> Work {
        let (clock, upgrade) = (self.parts.clock, self.parts.options.upgrade.get(&name).cloned());
        let upgrade = upgrade.unwrap_or_default();
        self.parts.manager.begins(upgrade.timeout());
        Box::pin(async move {
            tracing::info!(name, argv = ?upgrade.argv, "upgrading");
            let order = Order { argv: upgrade.argv.clone(), ..Order::default() };
            let ended = command::run(&order, upgrade.timeout(), |line| tracing::info!(name, line, "upgrade")).await;
            let (ok, detail) = match ended {
                Ok(()) => (true, "it succeeded".to_string()),
                Err(failure) => (false, failure.to_string()),
            };
            Done::Upgraded(UpgradeOutcome { name, ok, detail, at: clock.unix_seconds() })
        })
    }

    /// What is due from time to time: leases that are over, progress for those who watch, a sign of life.
    fn look_after(&mut self) {
        let now = self.now();
        for gateway in self.parts.sessions.expired(now) {
            let orphaned = self.parts.streams.orphan(&gateway);
            tracing::warn!(%gateway, orphaned, "the gateway's lease is over; what it asked for is cancelled");
            self.parts.metrics.orphaned_requests.inc_by(orphaned as u64);
        }
        let machine = &self.machine;
        self.parts.publisher.progress(|status| machine.show(now, status));
        let Parts { manager, publisher, gate, metrics, .. } = &mut self.parts;
        manager.look(&publisher.snapshot(), gate.in_flight(), metrics.work_done());
    }
}

/// Puts the record on disk, where there is a state directory.
async fn persist(dir: Option<&StateDir>, record: &Record) -> Result<(), Error> {
    let Some(dir) = dir else { return Ok(()) };
    dir.write_record(record).await.map_err(|error| {
        let path = dir.path().display();
        Error::new(Code::Internal, format!("the order could not be written to {path}: {error}; nothing has changed"))
    })
}

async fn sleep_until(wake: Option<tokio::time::Instant>) {
    match wake {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn next(work: &mut Option<Work>) -> Done {
    match work {
        Some(work) => work.await,
        None => std::future::pending().await,
    }
}
