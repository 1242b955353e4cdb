//! The hooks of one node: which there are, how each ended last, and the run of an event.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lifecycle::{HookEvent, HookVerdict, OnFailure, hook_verdict};
use serde::Serialize;
use service::clock::Clock;
use service::metrics::prometheus::{HistogramVec, IntCounterVec};
use service::metrics::{MetricsError, REQUEST_SECONDS, Registry};
use service::ring::LogRing;
use tokio::sync::Semaphore;

use crate::HookConfigError;
use crate::options::{Act, HOOKS_MAX, Hook, HooksOptions, configured, limits, wrong};
use crate::run::{HookFailure, Output, Turn, run};

type Ended = Result<(), String>;
type Running = Pin<Box<dyn Future<Output = Ended> + Send>>;

/// A function of a program that embeds a worker.
#[derive(Clone)]
pub enum Function {
    /// Runs on a thread of its own kind; one that is past its time can't be killed, and is not begun again before it
    /// has ended.
    Blocking(Arc<dyn Fn(&Turn) -> Ended + Send + Sync>, Arc<Semaphore>),
    /// Runs as a task; dropped when it is past its time.
    Async(Arc<dyn Fn(Turn) -> Running + Send + Sync>),
}

impl std::fmt::Debug for Function {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Function::Blocking(..) => "Function::Blocking",
            Function::Async(_) => "Function::Async",
        })
    }
}

/// A hook that is a function.
#[derive(Clone, Debug)]
pub struct FunctionHook {
    name: String,
    description: String,
    event: HookEvent,
    timeout_s: Option<f64>,
    on_failure: Option<OnFailure>,
    function: Function,
}

impl FunctionHook {
    /// Makes a hook of a function that may block. What it returns as an error is logged.
    pub fn blocking(
        name: &str,
        event: HookEvent,
        call: impl Fn(&Turn) -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        Self::new(name, event, Function::Blocking(Arc::new(call), Arc::new(Semaphore::new(1))))
    }

    /// Makes a hook of an asynchronous function.
    pub fn asynchronous<F>(name: &str, event: HookEvent, call: impl Fn(Turn) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        Self::new(name, event, Function::Async(Arc::new(move |turn| Box::pin(call(turn)))))
    }

    fn new(name: &str, event: HookEvent, function: Function) -> Self {
        let (name, description) = (name.to_string(), String::new());
        FunctionHook { name, description, event, timeout_s: None, on_failure: None, function }
    }

    /// Says what it is for.
    #[must_use]
    pub fn described(mut self, description: &str) -> Self {
        self.description = description.to_string();
        self
    }

    /// Bounds its time; 30 s otherwise.
    #[must_use]
    pub fn within(mut self, timeout: Duration) -> Self {
        self.timeout_s = Some(timeout.as_secs_f64());
        self
    }

    /// Says what its failure means, where the event's own way is not wanted.
    #[must_use]
    pub fn on_failure(mut self, policy: OnFailure) -> Self {
        self.on_failure = Some(policy);
        self
    }
}

/// Where a hook comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The configuration; the key's path.
    Config(String),
    /// A file of the hooks folder.
    Folder(PathBuf),
    /// The program around.
    Program,
}

/// How a hook's last run ended.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LastRun {
    /// The model it was for.
    pub model: Option<String>,
    /// Its failure; `None` for a success.
    pub failure: Option<String>,
    /// How long it took.
    pub seconds: f64,
    /// When it ended, in Unix seconds.
    pub at: u64,
}

/// One hook, for those who look.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HookReport {
    /// The event's name.
    pub event: &'static str,
    /// Its own.
    pub name: String,
    /// What it is for.
    pub description: String,
    /// Where it comes from.
    pub source: String,
    /// The models it is for; empty for all.
    pub models: Vec<String>,
    /// The program of a command, as it is written: macros are expanded when it runs.
    pub program: Option<String>,
    /// The command's working directory, where it has its own.
    pub directory: Option<PathBuf>,
    /// Its bound.
    pub timeout_s: f64,
    /// What its failure means.
    pub on_failure: OnFailure,
    /// How often it ran.
    pub runs: u64,
    /// How often it failed.
    pub failures: u64,
    /// Its last run.
    pub last: Option<LastRun>,
}

/// What Prometheus sees of hooks.
#[derive(Clone, Debug)]
pub struct HookMetrics {
    runs: IntCounterVec,
    seconds: HistogramVec,
}

impl HookMetrics {
    /// Registers them under `prefix`.
    ///
    /// # Errors
    /// When the names are taken.
    pub fn register(registry: &Registry, prefix: &str) -> Result<Self, MetricsError> {
        let runs = "Runs of hooks; outcome: ok, failed or timeout.";
        let seconds = "Time that runs of hooks took, in seconds.";
        Ok(HookMetrics {
            runs: registry.counter_vec(&format!("{prefix}_hook_runs_total"), runs, &["event", "outcome"])?,
            seconds: registry.histogram_vec(&format!("{prefix}_hook_seconds"), seconds, &["event"], REQUEST_SECONDS)?,
        })
    }
}

/// A hook that ended what waited for it.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the hook '{hook}' of {} failed: {failure}", event.name())]
pub struct Stopped {
    /// The event.
    pub event: HookEvent,
    /// The hook.
    pub hook: String,
    /// Why.
    pub failure: HookFailure,
}

#[derive(Debug, Default)]
struct Tally {
    runs: u64,
    failures: u64,
    last: Option<LastRun>,
}

#[derive(Debug)]
struct Inner {
    hooks: Vec<Hook>,
    macros: std::collections::BTreeMap<String, String>,
    clock: Clock,
    metrics: HookMetrics,
    /// One a hook; held for one look or one note.
    tallies: Mutex<Vec<Tally>>,
}

/// The hooks of a node; cheap to clone.
#[derive(Clone, Debug)]
pub struct Hooks {
    inner: Arc<Inner>,
}

impl Hooks {
    /// Reads the configuration and the folder, and takes the program's own hooks, which come first.
    ///
    /// # Errors
    /// [`HookConfigError`] for whatever could never run as it is written.
    pub fn new(
        options: &HooksOptions,
        functions: Vec<FunctionHook>,
        clock: Clock,
        metrics: HookMetrics,
    ) -> Result<Self, HookConfigError> {
        let hooks = all(options, functions)?;
        let tallies = Mutex::new(hooks.iter().map(|_| Tally::default()).collect());
        let inner = Inner { hooks, macros: options.macros.clone(), clock, metrics, tallies };
        Ok(Hooks { inner: Arc::new(inner) })
    }

    fn tallies(&self) -> std::sync::MutexGuard<'_, Vec<Tally>> {
        self.inner.tallies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the longest time that the hooks of an event can take for one model, or for the node.
    pub fn longest(&self, event: HookEvent, model: Option<&str>) -> Duration {
        let hooks = self.inner.hooks.iter().filter(|hook| hook.event == event && hook.is_for(model));
        hooks.map(|hook| hook.timeout).sum()
    }

    /// Runs the hooks of an event, one after another; their output goes to `ring`.
    ///
    /// # Errors
    /// [`Stopped`] when one failed whose failure ends what waits for it; those after it don't run then.
    pub async fn run(&self, turn: &Turn, ring: &LogRing) -> Result<(), Stopped> {
        let Inner { hooks, macros, clock, metrics, .. } = &*self.inner;
        let numbers =
            (0..hooks.len()).filter(|i| hooks[*i].event == turn.event && hooks[*i].is_for(turn.model.as_deref()));
        for number in turn.event.run_order(numbers.collect()) {
            let hook = &hooks[number];
            let begun = clock.now();
            let ended = run(hook, turn, macros, Output { ring, clock: *clock }).await;
            let seconds = clock.now().since(begun).as_secs_f64();
            let (event, model, name) = (turn.event.name(), &turn.model, &hook.name);
            metrics.seconds.with_label_values(&[event]).observe(seconds);
            let outcome = ended.as_ref().err().map_or("ok", HookFailure::label);
            metrics.runs.with_label_values(&[event, outcome]).inc();
            self.note(number, turn, ended.as_ref().err(), seconds);
            let failure = match ended {
                Ok(()) => {
                    tracing::info!(event, model, hook = name, seconds, "hook ran");
                    continue;
                }
                Err(failure) => failure,
            };
            match hook_verdict(turn.event, hook.policy, true) {
                HookVerdict::GoOn => tracing::debug!(event, model, hook = name, %failure, seconds, "hook failed"),
                HookVerdict::Warn => {
                    tracing::warn!(event, model, hook = name, %failure, seconds, "hook failed; going on")
                }
                HookVerdict::Stop => {
                    tracing::error!(event, model, hook = name, %failure, seconds, "hook failed");
                    return Err(Stopped { event: turn.event, hook: name.clone(), failure });
                }
            }
        }
        Ok(())
    }

    fn note(&self, number: usize, turn: &Turn, failure: Option<&HookFailure>, seconds: f64) {
        let at = self.inner.clock.unix_seconds();
        let last = LastRun { model: turn.model.clone(), failure: failure.map(ToString::to_string), seconds, at };
        if let Some(tally) = self.tallies().get_mut(number) {
            tally.runs += 1;
            tally.failures += u64::from(failure.is_some());
            tally.last = Some(last);
        }
    }

    /// Lists the hooks, those of each event in the order in which they run.
    pub fn reports(&self) -> Vec<HookReport> {
        let tallies = self.tallies();
        let hooks = &self.inner.hooks;
        let report = |i: usize| HookReport {
            event: hooks[i].event.name(),
            name: hooks[i].name.clone(),
            description: hooks[i].description.clone(),
            source: match &hooks[i].source {
                Source::Config(place) => format!("config {place}"),
                Source::Folder(path) => path.display().to_string(),
                Source::Program => "program".to_string(),
            },
            models: hooks[i].models.clone(),
            program: hooks[i].act.command().and_then(|(argv, _)| argv.first().cloned()),
            directory: hooks[i].act.command().and_then(|(_, directory)| directory.cloned()),
            timeout_s: hooks[i].timeout.as_secs_f64(),
            on_failure: hooks[i].policy,
            runs: tallies[i].runs,
            failures: tallies[i].failures,
            last: tallies[i].last.clone(),
        };
        let of = |event: HookEvent| event.run_order((0..hooks.len()).filter(|i| hooks[*i].event == event).collect());
        HookEvent::ALL.into_iter().flat_map(of).map(report).collect()
    }
}

fn all(options: &HooksOptions, functions: Vec<FunctionHook>) -> Result<Vec<Hook>, HookConfigError> {
    options.check_macros()?;
    let mut hooks = Vec::new();
    for given in functions {
        let place = format!("the hook '{}'", given.name);
        let (timeout, policy) = limits(&place, given.event, given.timeout_s, given.on_failure, &[])?;
        let (act, source) = (Act::Function(given.function), Source::Program);
        let (name, description, event) = (given.name, given.description, given.event);
        hooks.push(Hook { name, description, event, models: Vec::new(), act, timeout, policy, source });
    }
    for (i, given) in options.run.iter().enumerate() {
        hooks.push(configured(i, given, &options.macros)?);
    }
    if let Some(folder) = &options.folder {
        hooks.extend(crate::folder::read(folder, &options.macros)?);
    }
    if hooks.len() > HOOKS_MAX {
        return wrong("hooks", format!("there are {} hooks, and {HOOKS_MAX} at most are allowed", hooks.len()));
    }
    Ok(hooks)
}

#[cfg(test)]
#[path = "set_tests.rs"]
mod tests;
