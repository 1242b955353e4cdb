//! The turns of this node's and its models' life, at which hooks run, and the log of each model.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hooks::{HookConfigError, HookMetrics, HookReport, Hooks, Turn};
use lifecycle::HookEvent;
use serde_json::Value;
use service::clock::Clock;
use service::ring::LogRing;
use words::{Code, Error, ModelId, ModelState};

use crate::options::{ModelEntry, Options, ProcessOptions};

/// Bytes of log that are kept of one model, and of the node.
const LOG_BYTES: usize = 256 << 10;
/// Models whose log is kept; that of one which is not here goes before another's.
const LOGS_MAX: usize = 256;

#[derive(Debug)]
struct Inner {
    hooks: Hooks,
    clock: Clock,
    node: String,
    state_dir: String,
    /// The data port: what is configured, until it is bound.
    port: AtomicU16,
    node_log: LogRing,
    /// Held for one look-up.
    logs: Mutex<BTreeMap<ModelId, LogRing>>,
    /// Process ids and ports of external engines. Held for one look-up.
    engines: Mutex<BTreeMap<ModelId, (u32, u16)>>,
    own: Arc<str>,
}

/// Runs hooks and keeps logs; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Turns {
    inner: Arc<Inner>,
}

impl Turns {
    /// Reads what the options say of hooks.
    ///
    /// # Errors
    /// [`HookConfigError`] for hooks that could never run.
    pub(crate) fn new(
        options: &Options,
        node: &str,
        functions: Vec<hooks::FunctionHook>,
        clock: Clock,
        metrics: HookMetrics,
    ) -> Result<Self, HookConfigError> {
        let hooks = Hooks::new(&options.hooks, functions, clock, metrics)?;
        let state_dir = options.node.state_dir.as_deref().map(Path::display).map(|path| path.to_string());
        let inner = Inner {
            hooks,
            clock,
            node: node.to_string(),
            state_dir: state_dir.unwrap_or_default(),
            port: AtomicU16::new(options.data.bind.port()),
            node_log: LogRing::new(LOG_BYTES),
            logs: Mutex::default(),
            engines: Mutex::default(),
            own: Arc::from("neuron"),
        };
        Ok(Turns { inner: Arc::new(inner) })
    }

    /// Tells hooks from now on where the data port is.
    pub(crate) fn bound(&self, port: u16) {
        self.inner.port.store(port, Ordering::Relaxed);
    }

    fn engines(&self) -> MutexGuard<'_, BTreeMap<ModelId, (u32, u16)>> {
        self.inner.engines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells hooks from now on which process serves a model, and at which port; `None`: none of its own.
    pub(crate) fn served_by(&self, id: &ModelId, engine: Option<(u32, u16)>) {
        let mut engines = self.engines();
        match engine {
            Some(engine) => _ = engines.insert(id.clone(), engine),
            None => _ = engines.remove(id),
        }
    }

    fn turn(&self, event: HookEvent, model: Option<(&ModelId, &str)>, detail: Value) -> Turn {
        let engine = model.and_then(|(id, _)| self.engines().get(id).copied());
        let (pid, port) = engine.unwrap_or((std::process::id(), self.inner.port.load(Ordering::Relaxed)));
        Turn {
            event,
            node: self.inner.node.clone(),
            state_dir: self.inner.state_dir.clone(),
            pid,
            model: model.map(|(id, _)| id.to_string()),
            harness: model.map(|(_, harness)| harness.to_string()),
            port: Some(port).filter(|port| *port > 0),
            detail,
        }
    }

    /// Runs the hooks of one of the node's own events.
    ///
    /// # Errors
    /// `HookFailed` when one of them stops what waits.
    pub(crate) async fn of_node(&self, event: HookEvent) -> Result<(), Error> {
        let ended = self.inner.hooks.run(&self.turn(event, None, Value::Null), &self.inner.node_log).await;
        ended.map_err(|stopped| Error::new(Code::HookFailed, stopped.to_string()))
    }

    /// Runs the hooks of one of a model's events.
    ///
    /// # Errors
    /// As [`Turns::of_node`].
    pub(crate) async fn of_model(
        &self,
        event: HookEvent,
        id: &ModelId,
        harness: &str,
        detail: Value,
    ) -> Result<(), Error> {
        let ended = self.inner.hooks.run(&self.turn(event, Some((id, harness)), detail), &self.log(id)).await;
        ended.map_err(|stopped| Error::new(Code::HookFailed, stopped.to_string()))
    }

    /// Returns the longest time that the end of a configured model can take: that of its hooks, and of the
    /// stop of an engine of another program.
    pub(crate) fn longest_end(&self, options: &Options) -> Duration {
        let end = |entry: &ModelEntry| {
            let longest = |event| self.inner.hooks.longest(event, Some(&entry.id));
            let grace = entry.process.as_ref().map_or(Duration::ZERO, ProcessOptions::stop_grace);
            longest(HookEvent::BeforeStop) + grace + longest(HookEvent::AfterUnload)
        };
        options.entries().map(end).max().unwrap_or_default()
    }

    /// Returns the longest time that the hooks of the process's end can take.
    pub(crate) fn longest_shutdown(&self) -> Duration {
        self.inner.hooks.longest(HookEvent::Shutdown, None)
    }

    fn logs(&self) -> MutexGuard<'_, BTreeMap<ModelId, LogRing>> {
        self.inner.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a model's log, which outlives its loads.
    pub(crate) fn log(&self, id: &ModelId) -> LogRing {
        let mut logs = self.logs();
        if logs.len() >= LOGS_MAX && !logs.contains_key(id) {
            logs.pop_first();
        }
        logs.entry(id.clone()).or_insert_with(|| LogRing::new(LOG_BYTES)).clone()
    }

    /// Returns a model's log if it has one yet.
    pub(crate) fn known_log(&self, id: &ModelId) -> Option<LogRing> {
        self.logs().get(id).cloned()
    }

    /// Returns the log of the node's own hooks.
    pub(crate) fn node_log(&self) -> LogRing {
        self.inner.node_log.clone()
    }

    /// Writes a change of a model's state into its log.
    pub(crate) fn note_state(&self, id: &ModelId, from: ModelState, to: ModelState, why: Option<&str>) {
        let why = why.map(|why| format!(": {why}")).unwrap_or_default();
        let text = format!("{} -> {}{why}", from.name(), to.name());
        self.log(id).push(self.inner.clock.unix_ms(), &self.inner.own, &text);
    }

    /// Lists the hooks.
    pub(crate) fn reports(&self) -> Vec<HookReport> {
        self.inner.hooks.reports()
    }
}
