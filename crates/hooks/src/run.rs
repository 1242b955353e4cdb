//! One hook's run: its texts expanded, its time bounded, its output in a ring of lines.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use lifecycle::{ExpandError, HookEvent, expand};
use serde_json::{Value, json};
use service::clock::Clock;
use service::command::{CommandFailure, Order};
use service::ring::LogRing;

use crate::options::{Act, Hook};
use crate::{Function, http};

/// What a hook is told of the turn at which it runs.
#[derive(Clone, Debug)]
pub struct Turn {
    /// Which turn.
    pub event: HookEvent,
    /// This node's name.
    pub node: String,
    /// Where it keeps what survives it; empty without such a folder.
    pub state_dir: String,
    /// The process that serves: this one, or an external engine's.
    pub pid: u32,
    /// The model, for the events of one.
    pub model: Option<String>,
    /// What runs the model.
    pub harness: Option<String>,
    /// The port at which the model answers, once there is one.
    pub port: Option<u16>,
    /// Whatever else this event tells: the request that was stopped, for instance.
    pub detail: Value,
}

impl Turn {
    /// Returns what commands read on their standard input, and calls send.
    pub(crate) fn json(&self) -> Value {
        json!({
            "event": self.event.name(),
            "node": self.node,
            "pid": self.pid,
            "model": self.model,
            "harness": self.harness,
            "port": self.port,
            "detail": self.detail,
        })
    }

    fn environment(&self) -> Vec<(String, String)> {
        let text = |name: &str, value: &Option<String>| value.clone().map(|value| (name.to_string(), value));
        let fixed = [
            ("NEURON_EVENT".to_string(), self.event.name().to_string()),
            ("NEURON_NODE".to_string(), self.node.clone()),
            ("NEURON_STATE_DIR".to_string(), self.state_dir.clone()),
            ("NEURON_PID".to_string(), self.pid.to_string()),
        ];
        let port = self.port.map(|port| port.to_string());
        let maybe =
            [text("NEURON_MODEL", &self.model), text("NEURON_HARNESS", &self.harness), text("NEURON_PORT", &port)];
        fixed.into_iter().chain(maybe.into_iter().flatten()).collect()
    }

    fn expand(&self, text: &str, macros: &BTreeMap<String, String>) -> Result<String, ExpandError> {
        let builtin = |name: &str| match name {
            "EVENT" => Some(self.event.name().to_string()),
            "NODE" => Some(self.node.clone()),
            "STATE_DIR" => Some(self.state_dir.clone()),
            "PID" => Some(self.pid.to_string()),
            "MODEL" => self.model.clone(),
            "HARNESS" => self.harness.clone(),
            // Before a model answers anywhere its port is empty rather than an error in the middle of a load.
            "PORT" => self.model.as_ref().map(|_| self.port.map(|port| port.to_string()).unwrap_or_default()),
            _ => None,
        };
        expand(text, |name| builtin(name).or_else(|| macros.get(name).cloned()))
    }
}

/// Why a hook failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HookFailure {
    /// Its command.
    #[error("{0}")]
    Command(CommandFailure),
    /// Its call.
    #[error("{0}")]
    Call(String),
    /// What its function returned.
    #[error("{0}")]
    Function(String),
    /// Its function panicked.
    #[error("it panicked")]
    Panicked,
    /// It took longer than this.
    #[error("it took longer than {} s", .0.as_secs_f64())]
    TimedOut(Duration),
    /// An earlier run of it is past its time and still not over; only functions can't be killed.
    #[error("an earlier run of it has not ended yet")]
    StillRunning,
    /// A text of it names what there is not.
    #[error("{0}")]
    Text(ExpandError),
}

impl HookFailure {
    /// Returns the word for it in metrics.
    pub fn label(&self) -> &'static str {
        match self {
            HookFailure::TimedOut(_) | HookFailure::Command(CommandFailure::TimedOut(..)) => "timeout",
            _ => "failed",
        }
    }
}

/// Where a run's lines go.
pub(crate) struct Output<'a> {
    pub(crate) ring: &'a LogRing,
    pub(crate) clock: Clock,
}

/// Runs a hook to its end, or to the end of its time.
///
/// # Errors
/// [`HookFailure`].
pub(crate) async fn run(
    hook: &Hook,
    turn: &Turn,
    macros: &BTreeMap<String, String>,
    output: Output<'_>,
) -> Result<(), HookFailure> {
    let source: Arc<str> = Arc::from(hook.name.as_str());
    let line = |text: &str| output.ring.push(output.clock.unix_ms(), &source, text);
    let expand = |text: &String| turn.expand(text, macros).map_err(HookFailure::Text);
    match &hook.act {
        Act::Command { argv, env, directory } => {
            let mut environment = turn.environment();
            for (name, value) in env {
                environment.push((name.clone(), expand(value)?));
            }
            let order = Order {
                argv: argv.iter().map(expand).collect::<Result<_, _>>()?,
                environment,
                directory: directory.clone(),
                input: turn.json().to_string().into_bytes(),
                ..Order::default()
            };
            service::command::run(&order, hook.timeout, line).await.map_err(HookFailure::Command)
        }
        Act::Http { call, method } => {
            let url = expand(&call.url)?;
            let mut headers = Vec::with_capacity(call.headers.len());
            for (name, value) in &call.headers {
                headers.push((name.clone(), expand(value)?));
            }
            let body = match &call.body {
                Some(body) => expand(body)?.into_bytes(),
                None => turn.json().to_string().into_bytes(),
            };
            let call = http::call(method, &url, &headers, body, hook.timeout, line);
            match tokio::time::timeout(hook.timeout, call).await {
                Ok(ended) => ended.map_err(HookFailure::Call),
                Err(_) => Err(HookFailure::TimedOut(hook.timeout)),
            }
        }
        Act::Function(function) => of_function(function, turn, hook.timeout).await,
    }
}

async fn of_function(function: &Function, turn: &Turn, timeout: Duration) -> Result<(), HookFailure> {
    let turn = turn.clone();
    let task = match function.clone() {
        Function::Blocking(call, busy) => {
            let permit = busy.try_acquire_owned().map_err(|_| HookFailure::StillRunning)?;
            tokio::task::spawn_blocking(move || {
                let _permit = permit;
                call(&turn)
            })
        }
        Function::Async(call) => tokio::spawn(async move { call(turn).await }),
    };
    let abort = task.abort_handle();
    match tokio::time::timeout(timeout, task).await {
        Ok(Ok(ended)) => ended.map_err(HookFailure::Function),
        Ok(Err(_)) => Err(HookFailure::Panicked),
        Err(_) => {
            abort.abort();
            Err(HookFailure::TimedOut(timeout))
        }
    }
}
