//! The models of this node: each with one owner, one load at a time, and a door; one owner of their memory.
//!
//! [`owner`] drives one model's `lifecycle::ModelLife` and is the only one that changes its state; [`load`] is what it does,
//! step by step. [`door`] counts who is in. [`memory`] says who fits. This file is what others see: they read snapshots, and
//! send words to owners.

mod demand;
mod door;
mod load;
mod loss;
mod memory;
mod owner;
mod replies;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kv_store::KvStore;
use lifecycle::DrainBudget;
use service::clock::Clock;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use words::{Code, Error, Loading, ModelId, ModelLoad, ModelState, ModelStatus, Moment};

use crate::engine_thread::EngineHandle;
use crate::fetch::Downloads;
use crate::harness::{Harnesses, LoadFailure, LoadSpec};
use crate::metrics::Metrics;
use crate::options::{ModelEntry, Options};
use crate::publisher::{Publisher, Refresh};
use crate::streams::Streams;
use crate::turns::Turns;
use door::Door;
pub(crate) use door::InUse;
use memory::Memory;
use owner::{Message, Order, Owner};

/// Most models that one life knows by name: each keeps an owner.
const NAMES_MAX: usize = 4096;
/// From this share of a load on its rate tells when it will be over, in thousandths.
const RATE_FROM: u64 = 50;

/// What the models of a node need of it.
pub(crate) struct Parts {
    pub(crate) harnesses: Harnesses,
    pub(crate) options: Arc<Options>,
    /// Memory for all of them, in bytes; 0: unknown.
    pub(crate) budget: u64,
    pub(crate) clock: Clock,
    pub(crate) metrics: Metrics,
    pub(crate) publisher: Publisher,
    pub(crate) streams: Streams,
    pub(crate) downloads: Downloads,
    pub(crate) turns: Turns,
    /// What engines leave for their next load.
    pub(crate) kv: KvStore,
}

/// What is known of one model; written by its owner alone.
#[derive(Clone, Debug)]
struct View {
    status: ModelStatus,
    /// When its last load was begun.
    wanted: Option<Moment>,
    /// Since when its load, which had its memory then, runs.
    begun: Option<Moment>,
    /// How long its last load took from there on, in this life.
    took: Option<Duration>,
    /// Memory that its load waits for, in bytes.
    need: u64,
    failed_at: Option<Moment>,
}

/// The way to one model.
#[derive(Clone)]
struct Handle {
    inbox: mpsc::Sender<Message>,
    view: watch::Receiver<View>,
    door: Door,
}

struct Inner {
    parts: Parts,
    memory: Memory,
    /// What is configured of each model, and whether it stands in the catalogue.
    entries: BTreeMap<ModelId, (ModelEntry, bool)>,
    aliases: BTreeMap<ModelId, ModelId>,
    /// An external engine serves one of them.
    has_external: bool,
    /// Held for one look-up.
    handles: Mutex<BTreeMap<ModelId, Handle>>,
    /// Whether models may be loaded on demand.
    open: watch::Sender<bool>,
    emptied: Arc<Notify>,
}

/// The table of models; cheap to clone.
#[derive(Clone)]
pub(crate) struct Models {
    inner: Arc<Inner>,
}

/// What is told while a node loads nothing.
fn closed() -> Error {
    Error::new(Code::Draining, "this worker is cordoned, drained or leaving, and loads nothing")
}

impl Inner {
    fn handles(&self) -> MutexGuard<'_, BTreeMap<ModelId, Handle>> {
        // A panic while the table was held left it whole: every change is one insertion.
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_open(&self) -> bool {
        *self.open.borrow()
    }

    fn entry(&self, id: &ModelId) -> Option<(&ModelEntry, bool)> {
        self.entries.get(id).map(|(entry, listed)| (entry, *listed))
    }

    fn on_demand(&self, id: &ModelId) -> bool {
        self.entry(id).is_some_and(|(_, listed)| listed)
    }

    fn absent(&self, id: &ModelId) -> ModelStatus {
        let entry = self.entry(id);
        absent(id.clone(), entry)
    }

    /// Finds a model's owner, and starts it where there is none.
    fn handle(self: &Arc<Self>, id: &ModelId) -> Result<Handle, Error> {
        let mut handles = self.handles();
        if let Some(handle) = handles.get(id) {
            return Ok(handle.clone());
        }
        if handles.len() >= NAMES_MAX {
            let message = format!("this worker has loaded models by {NAMES_MAX} names; restart it to load others");
            return Err(Error::new(Code::Conflict, message));
        }
        let (inbox, messages) = mpsc::channel(owner::INBOX);
        let status = self.absent(id);
        let first = View { status, wanted: None, begun: None, took: None, need: 0, failed_at: None };
        let (sender, view) = watch::channel(first);
        let door = Door::new(self.parts.clock, self.emptied.clone());
        let owner = Owner::new(self.clone(), id.clone(), door.clone(), inbox.downgrade(), sender);
        tokio::spawn(owner.run(messages));
        let handle = Handle { inbox, view, door };
        handles.insert(id.clone(), handle.clone());
        Ok(handle)
    }
}

fn absent(id: ModelId, entry: Option<(&ModelEntry, bool)>) -> ModelStatus {
    let unlisted = ModelEntry::default();
    let (entry, listed) = entry.unwrap_or((&unlisted, false));
    let context_length = u32::try_from(entry.context_length).unwrap_or(u32::MAX);
    ModelStatus { card: entry.card(listed), context_length, ..ModelStatus::absent(id) }
}

/// Returns the status of every configured model, as long as none is loaded.
pub(crate) fn configured(options: &Options) -> Vec<ModelStatus> {
    let status = |entry: &ModelEntry| {
        let listed = options.is_catalogued(&entry.id);
        ModelId::new(entry.id.clone()).ok().map(|id| absent(id, Some((entry, listed))))
    };
    options.entries().filter_map(status).collect()
}

/// Estimates how much longer a load takes, in milliseconds: by how long its last one took, else by how far it has come.
fn eta_ms(took: Option<Duration>, elapsed: Duration, permille: u32) -> Option<u64> {
    let elapsed = elapsed.as_millis() as u64;
    let left = took.map(|took| took.as_millis() as u64).and_then(|took| took.checked_sub(elapsed));
    let done = u64::from(permille.min(1000));
    left.or_else(|| (done >= RATE_FROM).then(|| elapsed.saturating_mul(1000 - done) / done))
}

impl View {
    fn eta_ms(&self, now: Moment) -> Option<u64> {
        eta_ms(self.took, now.since(self.begun?), self.status.progress_permille)
    }

    /// Says how far its load is, to a request that waits for it.
    fn loading(&self, now: Moment) -> Loading {
        let (state, progress_permille) = (self.status.state, self.status.progress_permille);
        Loading { state, progress_permille, eta_ms: self.eta_ms(now) }
    }
}

impl Models {
    /// Starts the owners of the configured models, and that of the memory.
    pub(crate) fn new(parts: Parts) -> Self {
        let emptied = Arc::new(Notify::new());
        let (turn, clock) = (parts.options.memory.turn(), parts.clock);
        let (publisher, metrics) = (parts.publisher.clone(), parts.metrics.clone());
        let memory = memory::start(parts.budget, turn, clock, publisher, metrics, emptied.clone());
        let id = |name: &str| ModelId::new(name).ok();
        let options = &parts.options;
        let entry = |entry: &ModelEntry| Some((id(&entry.id)?, (entry.clone(), options.is_catalogued(&entry.id))));
        let entries: BTreeMap<_, _> = options.entries().filter_map(entry).collect();
        let alias = |entry: &ModelEntry| -> Vec<(ModelId, ModelId)> {
            entry.aliases.iter().filter_map(|alias| Some((id(alias)?, id(&entry.id)?))).collect()
        };
        let aliases = options.entries().flat_map(alias).collect();
        let (handles, open) = (Mutex::default(), watch::Sender::new(true));
        let has_external = parts.options.entries().any(ModelEntry::is_external);
        let inner = Arc::new(Inner { parts, memory, entries, aliases, has_external, handles, open, emptied });
        for id in inner.entries.keys() {
            // There is room: the configuration has a bound of its own.
            let _ = inner.handle(id);
        }
        Models { inner }
    }

    fn handle(&self, id: &ModelId) -> Option<Handle> {
        self.inner.handles().get(id).cloned()
    }

    fn each(&self) -> Vec<(ModelId, Handle)> {
        self.inner.handles().iter().map(|(id, handle)| (id.clone(), handle.clone())).collect()
    }

    /// Returns a model's own name, by its name or another that it has.
    pub(crate) fn resolve(&self, name: &ModelId) -> ModelId {
        self.inner.aliases.get(name).unwrap_or(name).clone()
    }

    /// Loads a model and waits until it is ready; joins a load that runs. `Ok` when it already serves. With `make_room`
    /// models without work and without a pin may go for it.
    ///
    /// # Errors
    /// The harness's own, `UnknownHarness`, `InsufficientMemory` with the numbers, `Conflict` while it is emptied or when
    /// somebody unloads it meanwhile, `Draining` on the way out.
    pub(crate) async fn load(&self, spec: LoadSpec, make_room: bool) -> Result<(), LoadFailure> {
        self.order(Order { spec, make_room, even_closed: false }).await
    }

    /// Loads a model of the node's own configuration, which its activation alone decides on.
    ///
    /// # Errors
    /// As [`Models::load`], but for `Draining`.
    pub(crate) async fn load_default(&self, spec: LoadSpec) -> Result<(), LoadFailure> {
        self.order(Order { spec, make_room: false, even_closed: true }).await
    }

    async fn order(&self, order: Order) -> Result<(), LoadFailure> {
        if !order.even_closed && !self.inner.is_open() {
            return Err(closed().into());
        }
        let harness = self.inner.parts.harnesses.find(&order.spec.harness)?;
        harness.check(&order.spec)?;
        let handle = self.inner.handle(&order.spec.model_id)?;
        let (reply, answer) = oneshot::channel();
        let gone = || Error::internal("a model's owner is gone");
        handle.inbox.send(Message::Load(Box::new(order), reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Unloads a model: refuses new requests, hands queued ones back, and drains running ones within `budget` by the
    /// same machine as a node, hand-over included; without a budget they are cut at once. A load that runs is stopped.
    /// Joins an unload that runs, and hurries it without a budget. Frees its memory, and returns how many were cut.
    ///
    /// # Errors
    /// `ModelNotHere` when there is nothing to unload.
    pub(crate) async fn unload(&self, name: &ModelId, budget: Option<DrainBudget>) -> Result<usize, Error> {
        let id = &self.resolve(name);
        let not_here = || Error::new(Code::ModelNotHere, format!("the model '{id}' is not on this worker"));
        let handle = self.handle(id).ok_or_else(|| not_here().at("model_id"))?;
        let (reply, answer) = oneshot::channel();
        let gone = || Error::internal("a model's owner is gone");
        handle.inbox.send(Message::Leave(budget, reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Says whether models may be loaded on demand from now on.
    pub(crate) fn set_open(&self, open: bool) {
        self.inner.open.send_if_modified(|known| std::mem::replace(known, open) != open);
    }

    /// Returns the ids of all models that are here, in any state.
    pub(crate) fn ids(&self) -> Vec<ModelId> {
        let here = |status: &ModelStatus| status.state != ModelState::Absent;
        self.statuses().into_iter().filter(here).map(|status| status.id).collect()
    }

    /// Returns the status of all models: of those that are here, and of those that are configured.
    pub(crate) fn statuses(&self) -> Vec<ModelStatus> {
        self.each().iter().filter_map(|(id, handle)| self.status_of(id, handle)).collect()
    }

    /// Returns one model's status.
    pub(crate) fn status(&self, id: &ModelId) -> Option<ModelStatus> {
        self.status_of(id, &self.handle(id)?)
    }

    fn status_of(&self, id: &ModelId, handle: &Handle) -> Option<ModelStatus> {
        let now = self.inner.parts.clock.now();
        let view = handle.view.borrow();
        let known = view.status.state != ModelState::Absent || self.inner.entries.contains_key(id);
        let (idle_s, eta_ms) = (idle_s(&handle.door, now), view.eta_ms(now));
        known.then(|| ModelStatus { idle_s, eta_ms, ..view.status.clone() })
    }

    /// Returns the engines of all models that serve.
    pub(crate) fn engines(&self) -> Vec<(ModelId, EngineHandle)> {
        let ready = |(id, handle): (ModelId, Handle)| Some((id, handle.door.ready()?.engine.clone()));
        self.each().into_iter().filter_map(ready).collect()
    }

    /// Returns what changes all the time of each model that serves or comes, in the form that gateways read.
    pub(crate) fn loads(&self) -> Vec<Refresh> {
        let (options, now) = (self.inner.parts.options.scheduler, self.inner.parts.clock.now());
        let report = |(id, handle): (ModelId, Handle)| {
            let eta_ms = handle.view.borrow().eta_ms(now);
            let (load, p99_ms, idle_s) = (ModelLoad::default(), 0, idle_s(&handle.door, now));
            let Some(ready) = handle.door.ready() else {
                // Of those that neither serve nor come nothing changes.
                return eta_ms.map(|_| Refresh { id, load, p99_ms, idle_s, eta_ms });
            };
            let load = ready.engine.load();
            self.inner.parts.metrics.show_load(id.as_str(), &load);
            let (max_running, max_waiting) = ready.places().unwrap_or((options.max_running, options.max_waiting));
            let load = ModelLoad {
                running: load.running as u32,
                waiting: load.waiting as u32,
                max_running: max_running as u32,
                max_waiting: max_waiting as u32,
                kv_blocks: load.blocks as u32,
                kv_blocks_used: load.blocks_used as u32,
            };
            Some(Refresh { id, load, p99_ms: ready.inter_token_p99_ms(), idle_s, eta_ms })
        };
        self.each().into_iter().filter_map(report).collect()
    }
}

fn idle_s(door: &Door, now: Moment) -> u32 {
    let facts = door.facts();
    let idle = if facts.open && !facts.in_use() { now.since(facts.idle_since) } else { Duration::ZERO };
    u32::try_from(idle.as_secs()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_is_estimated_by_the_last_one_or_by_its_own_rate_or_not_at_all() {
        let ms = Duration::from_millis;
        assert_eq!(eta_ms(Some(ms(900)), ms(200), 0), Some(700));
        assert_eq!(eta_ms(Some(ms(900)), ms(1000), 500), Some(1000), "slower than last time: by its rate");
        assert_eq!(eta_ms(None, ms(100), 250), Some(300));
        assert_eq!(eta_ms(None, ms(100), 20), None);
        assert_eq!(eta_ms(None, ms(100), 5000), Some(0));
    }
}
