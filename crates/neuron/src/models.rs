//! The models of this node: one machine each, one load at a time each, every transition through the publisher.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use inference::{Limits, Scheduler};
use kv_store::KvStore;
use lifecycle::{DrainBudget, HookEvent, ModelInput, next_model_state};
use serde_json::Value;
use tokio::sync::watch;
use words::{Capabilities, Code, Error, ModelId, ModelLoad, ModelState, ModelStatus};

use crate::constraint::Constraints;
use crate::crumbs::Crumbs;
use crate::emptying;
use crate::engine_thread::{self, EngineHandle, Own};
use crate::fetch::Downloads;
use crate::harness::{Harnesses, LoadFailure, LoadSpec, LoadedModel, Progress, Sizes};
use crate::keeper::Keeper;
use crate::metrics::Metrics;
use crate::options::SchedulerOptions;
use crate::publisher::Publisher;
use crate::ready::ReadyModel;
use crate::streams::Streams;
use crate::turns::Turns;
use service::clock::Clock;

/// Tokens of the warm-up.
const WARM_TOKENS: usize = 2;

/// What a load ended with; joiners get the same.
type Outcome = Option<Result<(), (Code, String)>>;

struct Entry {
    status: ModelStatus,
    ready: Option<Arc<ReadyModel>>,
    thread: Option<std::thread::JoinHandle<()>>,
    outcome: watch::Receiver<Outcome>,
    cancelled: Arc<AtomicBool>,
}

/// What the models of a node need of it.
pub(crate) struct Parts {
    pub(crate) harnesses: Harnesses,
    pub(crate) scheduler: SchedulerOptions,
    pub(crate) clock: Clock,
    pub(crate) metrics: Metrics,
    pub(crate) publisher: Publisher,
    pub(crate) streams: Streams,
    pub(crate) downloads: Downloads,
    pub(crate) turns: Turns,
    /// What engines leave for their next load, and the longest time that leaving it takes.
    pub(crate) kv: (KvStore, Duration),
    /// Where engines leave breadcrumbs.
    pub(crate) state_dir: Option<PathBuf>,
}

struct Inner {
    parts: Parts,
    /// Held only for table look-ups and transitions, never over a wait.
    entries: Mutex<BTreeMap<ModelId, Entry>>,
    closed: AtomicBool,
}

/// The table of models; cheap to clone.
#[derive(Clone)]
pub(crate) struct Models {
    inner: Arc<Inner>,
}

struct LoadProgress {
    models: Models,
    id: ModelId,
    cancelled: Arc<AtomicBool>,
}

impl Progress for LoadProgress {
    fn report(&self, permille: u32) -> ControlFlow<()> {
        self.models.edit(&self.id, |entry| entry.status.progress_permille = permille.min(1000));
        if self.cancelled.load(Ordering::Acquire) {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }
}

impl Models {
    pub(crate) fn new(parts: Parts) -> Self {
        let (entries, closed) = (Mutex::default(), AtomicBool::new(false));
        Models { inner: Arc::new(Inner { parts, entries, closed }) }
    }

    fn entries(&self) -> std::sync::MutexGuard<'_, BTreeMap<ModelId, Entry>> {
        // A panic while the table was held left it whole: every change is one assignment.
        self.inner.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn edit(&self, id: &ModelId, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.entries().get_mut(id) {
            change(entry);
            self.inner.parts.publisher.model(entry.status.clone());
        }
    }

    /// Moves a model's machine; a refused transition is a fault of ours, logged and without effect.
    fn transition(&self, id: &ModelId, input: ModelInput) {
        self.edit(id, |entry| match next_model_state(entry.status.state, input) {
            Ok(next) => {
                let from = std::mem::replace(&mut entry.status.state, next);
                tracing::info!(model = %id, ?from, to = ?next, "model state");
                let why = entry.status.failure.as_deref().filter(|_| next == ModelState::Failed);
                self.inner.parts.turns.note_state(id, from, next, why);
            }
            Err(error) => tracing::error!(model = %id, %error, "model transition refused"),
        });
    }

    /// Loads a model and waits until it is ready; joins a load that runs. `Ok` when it already serves.
    ///
    /// # Errors
    /// The harness's own, `UnknownHarness`, `Conflict` while it unloads, `Draining` on the way out.
    pub(crate) async fn load(&self, spec: LoadSpec) -> Result<(), LoadFailure> {
        if self.inner.closed.load(Ordering::Acquire) {
            let message = "this worker is cordoned, drained or leaving, and loads nothing";
            return Err(Error::new(Code::Draining, message).into());
        }
        self.load_default(spec).await
    }

    /// Loads a model of the node's own configuration, which its activation alone decides on.
    ///
    /// # Errors
    /// As [`Models::load`], but for `Draining`.
    pub(crate) async fn load_default(&self, spec: LoadSpec) -> Result<(), LoadFailure> {
        let mut outcome = self.begin_load(&spec)?;
        loop {
            if let Some(result) = outcome.borrow_and_update().clone() {
                return result.map_err(|(code, message)| LoadFailure {
                    error: Error::new(code, message),
                    transient: code == Code::UpstreamFailed,
                });
            }
            if outcome.changed().await.is_err() {
                return Err(Error::internal("a load ended without an outcome").into());
            }
        }
    }

    /// Starts the load, or finds the one that runs: the table's lock makes two at once impossible (LC1).
    fn begin_load(&self, spec: &LoadSpec) -> Result<watch::Receiver<Outcome>, Error> {
        let harness = self.inner.parts.harnesses.find(&spec.harness)?;
        harness.check(spec)?;
        let mut entries = self.entries();
        if let Some(entry) = entries.get(&spec.model_id) {
            match entry.status.state {
                ModelState::Failed | ModelState::Absent => {}
                ModelState::Draining | ModelState::Unloading => {
                    let message = format!("the model '{}' is being unloaded; load it again afterwards", spec.model_id);
                    return Err(Error::new(Code::Conflict, message));
                }
                _ => return Ok(entry.outcome.clone()),
            }
        }
        let (sender, outcome) = watch::channel(None);
        let cancelled = Arc::new(AtomicBool::new(false));
        let status = ModelStatus {
            state: ModelState::Fetching,
            harness: spec.harness.clone(),
            created: self.inner.parts.clock.unix_seconds(),
            capabilities: Capabilities { chat: true, continuation: true },
            ..ModelStatus::absent(spec.model_id.clone())
        };
        self.inner.parts.publisher.model(status.clone());
        let entry = Entry { status, ready: None, thread: None, outcome: outcome.clone(), cancelled: cancelled.clone() };
        entries.insert(spec.model_id.clone(), entry);
        drop(entries);
        let (models, spec) = (self.clone(), spec.clone());
        tokio::spawn(async move {
            let mut prepared = false;
            let result = models.run_load(&spec, cancelled, &mut prepared).await;
            let outcome = match result {
                Ok(()) => Ok(()),
                Err(failure) => Err(models.load_failed(&spec.model_id, &failure)),
            };
            let ready = outcome.is_ok();
            sender.send_replace(Some(outcome));
            // Nothing waits for these. What was set up before a load is taken down when it has failed.
            let event = if ready { HookEvent::Ready } else { HookEvent::AfterUnload };
            if ready || prepared {
                let _ = models.inner.parts.turns.of_model(event, &spec.model_id, &spec.harness, Value::Null).await;
            }
        });
        Ok(outcome)
    }

    fn load_failed(&self, id: &ModelId, failure: &LoadFailure) -> (Code, String) {
        let source = std::error::Error::source(&failure.error).map(|source| source.to_string()).unwrap_or_default();
        tracing::error!(model = %id, error = %failure.error, source, transient = failure.transient, "load failed");
        self.edit(id, |entry| entry.status.failure = Some(failure.error.message().to_string()));
        let unloading = self.entries().get(id).is_some_and(|entry| entry.status.state == ModelState::Unloading);
        if unloading {
            self.remove(id);
        } else {
            self.transition(id, ModelInput::Fail);
        }
        (failure.error.code(), failure.error.message().to_string())
    }

    fn remove(&self, id: &ModelId) {
        self.transition(id, ModelInput::Unloaded);
        self.entries().remove(id);
    }

    /// Loads, step by step; `prepared` says whether hooks before the load began.
    async fn run_load(
        &self,
        spec: &LoadSpec,
        cancelled: Arc<AtomicBool>,
        prepared: &mut bool,
    ) -> Result<(), LoadFailure> {
        let begun = self.inner.parts.clock.now();
        let id = spec.model_id.clone();
        let progress = LoadProgress { models: self.clone(), id: id.clone(), cancelled: cancelled.clone() };
        let mut owned = spec.clone();
        if let Some(reference) = &spec.reference {
            let show = |permille: u32| {
                let _ = progress.report(permille);
            };
            let fetch = self.inner.parts.downloads.for_load(id.as_str(), reference, &cancelled, show);
            owned.path = Some(fetch.await?);
        }
        self.transition(&id, ModelInput::Fetched);
        let turns = &self.inner.parts.turns;
        *prepared = true;
        turns.of_model(HookEvent::BeforeLoad, &id, &spec.harness, Value::Null).await?;
        let harness = self.inner.parts.harnesses.find(&spec.harness)?;
        let options = self.inner.parts.scheduler;
        let sizes = Sizes { max_running: options.max_running, prefill_tokens: options.prefill_tokens };
        let loaded = tokio::task::spawn_blocking(move || harness.load(&owned, sizes, &progress)).await;
        let loaded = loaded.map_err(|error| LoadFailure::from(Error::internal(error)))??;
        let device = loaded.device.clone();
        if cancelled.load(Ordering::Acquire) {
            return Err(Error::new(Code::Conflict, "the load was cancelled").into());
        }
        self.transition(&id, ModelInput::Loaded);
        let (ready, thread) = self.start(&id, loaded)?;
        let healthy = async {
            self.warm(&ready).await?;
            turns.of_model(HookEvent::AfterHealthy, &id, &spec.harness, Value::Null).await
        };
        if let Err(error) = healthy.await {
            ready.engine.stop();
            return Err(error.into());
        }
        let seconds = self.inner.parts.clock.now().since(begun).as_secs_f64();
        self.inner.parts.metrics.loaded(id.as_str(), seconds);
        tracing::info!(model = %id, harness = spec.harness, device, seconds, "model ready");
        let cancelled_late = {
            let mut entries = self.entries();
            match entries.get_mut(&id) {
                Some(entry) if entry.status.state == ModelState::Warming => {
                    entry.status.context_length = ready.context_length as u32;
                    entry.status.continue_fingerprint = ready.continue_fingerprint;
                    entry.status.exact_fingerprint = ready.exact_fingerprint;
                    entry.status.progress_permille = 1000;
                    entry.ready = Some(ready.clone());
                    entry.thread = Some(thread);
                    false
                }
                _ => true,
            }
        };
        if cancelled_late {
            ready.engine.stop();
            return Err(Error::new(Code::Conflict, "the load was cancelled").into());
        }
        self.transition(&id, ModelInput::Warmed);
        Ok(())
    }

    fn start(
        &self,
        id: &ModelId,
        loaded: LoadedModel,
    ) -> Result<(Arc<ReadyModel>, std::thread::JoinHandle<()>), Error> {
        let options = self.inner.parts.scheduler;
        let limits = Limits {
            max_running: options.max_running,
            max_waiting: options.max_waiting,
            max_wait: Duration::from_millis(options.max_wait_ms),
            prefill_tokens: options.prefill_tokens,
            max_choices: options.max_choices,
            prefix_cache: options.prefix_cache,
        };
        let capabilities = loaded.engine.capabilities();
        let metrics = self.inner.parts.metrics.model(id.as_str());
        let crumbs = Crumbs::begin(self.inner.parts.state_dir.as_deref(), id);
        let scheduler = Scheduler::new(capabilities, limits, loaded.token_bytes.clone());
        let (store, leave_max) = self.inner.parts.kv.clone();
        let keeper = options.prefix_cache.then(|| Keeper {
            store,
            of: loaded.exact_fingerprint,
            block_tokens: capabilities.block_tokens,
            leave_max,
            clock: self.inner.parts.clock,
            metrics: metrics.clone(),
        });
        let own = Own { scheduler, engine: loaded.engine, keeper: keeper.clone(), crumbs, metrics: metrics.clone() };
        let (engine, thread) = engine_thread::spawn(id.as_str(), self.inner.parts.clock, own)?;
        let ready = ReadyModel {
            id: id.clone(),
            engine,
            text: loaded.text,
            constraints: Constraints::new(loaded.token_bytes.clone()),
            token_bytes: loaded.token_bytes,
            end_tokens: loaded.end_tokens,
            defaults: loaded.defaults,
            context_length: capabilities.context_length,
            vocabulary: capabilities.vocab_size,
            width: capabilities.width,
            pooling: loaded.pooling,
            continue_fingerprint: loaded.continue_fingerprint,
            exact_fingerprint: loaded.exact_fingerprint,
            metrics,
            keeper,
            pace: Mutex::default(),
            next_request: AtomicU64::new(0),
        };
        Ok((Arc::new(ready), thread))
    }

    /// Runs one short request, so that the first real one finds warm memory and a proven engine.
    async fn warm(&self, ready: &ReadyModel) -> Result<(), Error> {
        if ready.ask("hello", WARM_TOKENS, self.inner.parts.clock, |_| ControlFlow::Continue(())).await? {
            return Ok(());
        }
        Err(Error::internal("the engine ended during its warm-up"))
    }

    /// Finds a model that serves.
    ///
    /// # Errors
    /// `ModelNotHere` when it is absent, `ModelLoading` while it comes, `Draining` while it goes.
    pub(crate) fn ready(&self, id: &ModelId) -> Result<Arc<ReadyModel>, Error> {
        let entries = self.entries();
        let Some(entry) = entries.get(id) else {
            let message = format!("the model '{id}' is not on this worker; GET /v1/models lists those that are");
            return Err(Error::new(Code::ModelNotHere, message).at("model"));
        };
        match (&entry.ready, entry.status.state) {
            (Some(ready), ModelState::Ready) => Ok(ready.clone()),
            (_, ModelState::Draining | ModelState::Unloading) => {
                Err(Error::new(Code::Draining, format!("the model '{id}' is being unloaded")))
            }
            (_, ModelState::Failed) => {
                Err(Error::new(Code::ModelNotHere, format!("the model '{id}' failed to load on this worker"))
                    .at("model"))
            }
            _ => Err(Error::new(Code::ModelLoading, format!("the model '{id}' is loading"))),
        }
    }

    /// Unloads a model: refuses new requests, hands queued ones back, and drains running ones within `budget` by the
    /// same machine as a node, hand-over included; without a budget they are cut at once. Frees its memory, and returns
    /// how many were cut.
    ///
    /// # Errors
    /// `ModelNotHere` when there is nothing to unload, `Conflict` when an unload already runs.
    pub(crate) async fn unload(&self, id: &ModelId, budget: Option<DrainBudget>) -> Result<usize, Error> {
        let harness = self.status(id).map(|status| status.harness).unwrap_or_default();
        let (ready, thread) = self.begin_unload(id)?;
        let Some(ready) = ready else { return Ok(0) };
        let Parts { clock, streams, metrics, turns, .. } = &self.inner.parts;
        let cut = emptying::empty(&ready, budget, *clock, streams, metrics).await;
        // Their failure stops no way out.
        let _ = turns.of_model(HookEvent::BeforeStop, id, &harness, Value::Null).await;
        self.transition(id, ModelInput::Emptied);
        ready.engine.stop();
        drop(ready);
        if let Some(thread) = thread {
            // The engine's memory goes with its thread.
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
        self.remove(id);
        let _ = turns.of_model(HookEvent::AfterUnload, id, &harness, Value::Null).await;
        Ok(cut)
    }

    #[allow(clippy::type_complexity)]
    fn begin_unload(
        &self,
        id: &ModelId,
    ) -> Result<(Option<Arc<ReadyModel>>, Option<std::thread::JoinHandle<()>>), Error> {
        let state = self.entries().get(id).map(|entry| entry.status.state);
        match state {
            None => {
                Err(Error::new(Code::ModelNotHere, format!("the model '{id}' is not on this worker")).at("model_id"))
            }
            Some(ModelState::Draining | ModelState::Unloading) => {
                Err(Error::new(Code::Conflict, format!("the model '{id}' is being unloaded already")))
            }
            Some(ModelState::Failed) => {
                self.transition(id, ModelInput::Unload);
                self.entries().remove(id);
                Ok((None, None))
            }
            Some(_) => {
                self.transition(id, ModelInput::Unload);
                let mut entries = self.entries();
                let Some(entry) = entries.get_mut(id) else { return Ok((None, None)) };
                // A load that runs stops at its next step and takes the entry away itself.
                entry.cancelled.store(true, Ordering::Release);
                Ok((entry.ready.take(), entry.thread.take()))
            }
        }
    }

    /// Says whether models may be loaded on demand from now on.
    pub(crate) fn set_open(&self, open: bool) {
        self.inner.closed.store(!open, Ordering::Release);
    }

    /// Returns the ids of all models that are here, in any state.
    pub(crate) fn ids(&self) -> Vec<ModelId> {
        self.entries().keys().cloned().collect()
    }

    /// Returns the status of all models.
    pub(crate) fn statuses(&self) -> Vec<ModelStatus> {
        self.entries().values().map(|entry| entry.status.clone()).collect()
    }

    /// Returns one model's status.
    pub(crate) fn status(&self, id: &ModelId) -> Option<ModelStatus> {
        self.entries().get(id).map(|entry| entry.status.clone())
    }

    /// Returns the engines of all models that serve.
    pub(crate) fn engines(&self) -> Vec<(ModelId, EngineHandle)> {
        let ready = |entry: &Entry| entry.ready.as_ref().map(|ready| (ready.id.clone(), ready.engine.clone()));
        self.entries().values().filter_map(ready).collect()
    }

    /// Returns how busy each model is, in the form that gateways read.
    ///
    /// With each comes the 99th percentile of the time between two tokens, in milliseconds.
    pub(crate) fn loads(&self) -> Vec<(ModelId, ModelLoad, u32)> {
        let options = self.inner.parts.scheduler;
        let report = |ready: Arc<ReadyModel>| {
            let (id, load) = (ready.id.clone(), ready.engine.load());
            let p99 = ready.inter_token_p99_ms();
            self.inner.parts.metrics.show_load(id.as_str(), &load);
            let report = ModelLoad {
                running: load.running as u32,
                waiting: load.waiting as u32,
                max_running: options.max_running as u32,
                max_waiting: options.max_waiting as u32,
                kv_blocks: load.blocks as u32,
                kv_blocks_used: load.blocks_used as u32,
            };
            (id, report, p99)
        };
        let ready: Vec<_> = self.entries().values().filter_map(|entry| entry.ready.clone()).collect();
        ready.into_iter().map(report).collect()
    }
}
