//! What is done for a model, each by itself: the steps of its load and of its end. Their order is `lifecycle::ModelLife`'s.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use inference::{Limits, Scheduler};
use lifecycle::{Claim, DrainBudget, HookEvent};
use serde_json::Value;
use service::ring::LogRing;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use words::{Code, Error, ModelId};

use super::Inner;
use super::memory::Ways;
use crate::constraint::Constraints;
use crate::crumbs::Crumbs;
use crate::emptying;
use crate::engine_thread::{self, Own};
use crate::harness::{LoadFailure, LoadSpec, Loaded, LoadedModel, Progress, Sizes};
use crate::keeper::Keeper;
use crate::process::{Serving, Supervised, Watched};
use crate::ready::{Kind, Local, ReadyModel};

/// What a piece of work ends with.
pub(super) enum Product {
    /// Nothing but its end.
    Over,
    /// Where the model's files are.
    Files(PathBuf),
    /// What is set aside for it, in bytes.
    Reserved(u64),
    /// It is in memory.
    Loaded(Loaded),
    /// How many of its requests were cut.
    Cut(usize),
}

/// A piece of work on its way.
pub(super) type Work = Pin<Box<dyn Future<Output = Result<Product, LoadFailure>> + Send>>;

/// What is told of a load on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct News {
    /// Share of the step that is done, in thousandths.
    pub(super) permille: u32,
    /// Memory that it waits for, in bytes.
    pub(super) need: u64,
}

/// A model's engine, from its load to its end.
pub(super) struct Running {
    pub(super) ready: Arc<ReadyModel>,
    pub(super) memory: u64,
    thread: Option<std::thread::JoinHandle<()>>,
    /// What is known of its external engine, where it has one.
    pub(super) watched: Option<watch::Receiver<Watched>>,
    /// Ends when the engine does, whether anybody wanted that or not.
    pub(super) lost: oneshot::Receiver<()>,
}

/// The way of one load: what it goes by, who hears of it, and whether it is still wanted.
#[derive(Clone)]
pub(super) struct Way {
    pub(super) inner: Arc<Inner>,
    pub(super) spec: LoadSpec,
    pub(super) news: watch::Sender<News>,
    pub(super) cancelled: watch::Receiver<bool>,
}

impl Progress for Way {
    fn report(&self, permille: u32) -> ControlFlow<()> {
        self.news.send_if_modified(|news| std::mem::replace(&mut news.permille, permille.min(1000)) != permille);
        if *self.cancelled.borrow() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn log(&self) -> LogRing {
        self.inner.parts.turns.log(&self.spec.model_id)
    }
}

/// What a load that nobody wants any more ends with.
pub(super) fn cancelled() -> Error {
    Error::new(Code::Conflict, "the load was cancelled")
}

impl Way {
    fn sizes(&self) -> Sizes {
        Sizes::of(&self.inner.parts.options)
    }

    /// Brings the files of a hub here.
    pub(super) async fn fetch(self) -> Result<Product, LoadFailure> {
        let Some(reference) = &self.spec.reference else { return Ok(Product::Over) };
        let show = |permille: u32| {
            let _ = self.report(permille);
        };
        let downloads = &self.inner.parts.downloads;
        let path = downloads.for_load(self.spec.model_id.as_str(), reference, &self.cancelled, show).await?;
        Ok(Product::Files(path))
    }

    /// Finds out what it needs, where that is not known of an equal load, and waits until it is set aside.
    pub(super) async fn reserve(
        mut self,
        known: Option<u64>,
        claim: Claim,
        ways: Ways,
    ) -> Result<Product, LoadFailure> {
        let need = match known {
            Some(need) => need,
            None => {
                let harness = self.inner.parts.harnesses.find(&self.spec.harness)?;
                let (spec, sizes) = (self.spec.clone(), self.sizes());
                let estimate = tokio::task::spawn_blocking(move || harness.estimate(&spec, sizes)).await;
                estimate.map_err(|error| LoadFailure::from(Error::internal(error)))??
            }
        };
        self.news.send_modify(|news| news.need = need);
        let memory = self.inner.memory.clone();
        let unwanted = async {
            // The sender lives as long as its owner.
            let _ = self.cancelled.wait_for(|cancelled| *cancelled).await;
        };
        tokio::select! {
            reserved = memory.reserve(Claim { need, ..claim }, ways) => reserved?,
            () = unwanted => {
                // It may have been granted just now.
                memory.free(&self.spec.model_id).await;
                return Err(cancelled().into());
            }
        }
        Ok(Product::Reserved(need))
    }

    /// Reads the weights.
    pub(super) async fn load(self) -> Result<Product, LoadFailure> {
        let harness = self.inner.parts.harnesses.find(&self.spec.harness)?;
        let (sizes, unwanted) = (self.sizes(), self.cancelled.clone());
        let work = tokio::task::spawn_blocking(move || {
            let loaded = harness.load(&self.spec, sizes, &self)?;
            // What nobody wants is freed here, off the runtime.
            if *unwanted.borrow() { Err(cancelled().into()) } else { Ok(loaded) }
        });
        let loaded: Result<Loaded, LoadFailure> = work.await.map_err(Error::internal)?;
        Ok(Product::Loaded(loaded?))
    }
}

/// Starts the engine of a loaded model.
///
/// # Errors
/// When the system gives no thread.
pub(super) fn start(inner: &Inner, spec: &LoadSpec, loaded: Loaded) -> Result<Running, Error> {
    match loaded {
        Loaded::Local(loaded) => start_local(inner, spec, *loaded),
        Loaded::Process(engine) => start_process(inner, spec, *engine),
    }
}

fn start_process(inner: &Inner, spec: &LoadSpec, engine: Supervised) -> Result<Running, Error> {
    let (id, parts) = (&spec.model_id, &inner.parts);
    let max_wait = Duration::from_millis(parts.options.scheduler.max_wait_ms);
    // What it holds elsewhere than in memory of this host only its operator knows.
    let memory = engine.memory_bytes().max(spec.memory);
    let Serving { upstream, thread, ended } = engine.serve(Handle::current(), max_wait)?;
    parts.turns.served_by(id, Some((upstream.pid, upstream.port)));
    let watched = Some(upstream.watched.clone());
    let ready = ReadyModel::of_process(id.clone(), upstream, spec.context_length, parts.metrics.model(id.as_str()));
    Ok(Running { ready: Arc::new(ready), memory, thread: Some(thread), watched, lost: ended })
}

fn start_local(inner: &Inner, spec: &LoadSpec, loaded: LoadedModel) -> Result<Running, Error> {
    let (id, parts) = (&spec.model_id, &inner.parts);
    let options = parts.options.scheduler;
    let limits = Limits {
        max_running: options.max_running,
        max_waiting: options.max_waiting,
        max_wait: Duration::from_millis(options.max_wait_ms),
        prefill_tokens: options.prefill_tokens,
        max_choices: options.max_choices,
        prefix_cache: options.prefix_cache,
    };
    let capabilities = loaded.engine.capabilities();
    let metrics = parts.metrics.model(id.as_str());
    let crumbs = Crumbs::begin(parts.options.node.state_dir.as_deref(), id);
    let scheduler = Scheduler::new(capabilities, limits, loaded.token_bytes.clone());
    let keeper = options.prefix_cache.then(|| Keeper {
        store: parts.kv.clone(),
        of: loaded.exact_fingerprint,
        block_tokens: capabilities.block_tokens,
        leave_max: parts.options.kv_store.keep_max(),
        clock: parts.clock,
        metrics: metrics.clone(),
    });
    let own = Own { scheduler, engine: loaded.engine, keeper: keeper.clone(), crumbs, metrics: metrics.clone() };
    let engine_thread::Started { handle, thread, ended } = engine_thread::spawn(id.as_str(), parts.clock, own)?;
    let ready = ReadyModel {
        id: id.clone(),
        engine: handle,
        kind: Kind::Local(Box::new(Local {
            text: loaded.text,
            constraints: Constraints::new(loaded.token_bytes.clone()),
            token_bytes: loaded.token_bytes,
            end_tokens: loaded.end_tokens,
            defaults: spec.sampling.over(loaded.defaults),
            vocabulary: capabilities.vocab_size,
            width: capabilities.width,
            pooling: loaded.pooling,
            keeper,
        })),
        context_length: capabilities.context_length,
        continue_fingerprint: loaded.continue_fingerprint,
        exact_fingerprint: loaded.exact_fingerprint,
        metrics,
        pace: Mutex::default(),
        next_request: AtomicU64::new(0),
    };
    tracing::info!(model = %id, device = loaded.device, memory_mib = loaded.memory >> 20, "model in memory");
    Ok(Running { ready: Arc::new(ready), memory: loaded.memory, thread: Some(thread), watched: None, lost: ended })
}

/// Asks the warm-up's question, so that the first real request finds warm memory and a proven engine.
pub(super) async fn warm(inner: Arc<Inner>, ready: Arc<ReadyModel>, spec: LoadSpec) -> Result<Product, LoadFailure> {
    let (question, tokens) = &spec.warmup;
    if ready.ask(question, *tokens, inner.parts.clock, |_| ControlFlow::Continue(())).await? {
        return Ok(Product::Over);
    }
    Err(Error::internal("the engine ended during its warm-up").into())
}

/// Runs hooks of a model.
pub(super) async fn hooks(
    inner: Arc<Inner>,
    event: HookEvent,
    id: ModelId,
    harness: String,
) -> Result<Product, LoadFailure> {
    inner.parts.turns.of_model(event, &id, &harness, Value::Null).await?;
    Ok(Product::Over)
}

/// Lets what runs end, within the budget or at once.
pub(super) async fn empty(
    inner: Arc<Inner>,
    ready: Arc<ReadyModel>,
    budget: Option<DrainBudget>,
    hurry: watch::Receiver<bool>,
) -> Result<Product, LoadFailure> {
    let parts = &inner.parts;
    Ok(Product::Cut(emptying::empty(&ready, budget, hurry, parts.clock, &parts.streams, &parts.metrics).await))
}

/// Ends the engine; its memory goes with its thread.
pub(super) async fn stop(running: Option<Running>) -> Result<Product, LoadFailure> {
    if let Some(Running { ready, thread, .. }) = running {
        ready.engine.stop();
        drop(ready);
        if let Some(thread) = thread {
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
    }
    Ok(Product::Over)
}
