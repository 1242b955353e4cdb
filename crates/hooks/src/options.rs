//! What operators write of hooks, and what of it can't be.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use lifecycle::{HookEvent, OnFailure, expand, is_macro_name};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Most hooks of one node.
pub(crate) const HOOKS_MAX: usize = 256;
/// Longest time a hook may take, in seconds.
const TIMEOUT_MAX_S: f64 = 3_600.0;
/// Macros that each event knows.
const OF_NODE: &[&str] = &["EVENT", "NODE", "STATE_DIR", "PID"];
/// Those that a model's events know besides.
const OF_MODEL: &[&str] = &["MODEL", "HARNESS", "PORT"];

/// Hooks: what runs at the turns of this worker's and its models' life.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HooksOptions {
    /// A folder with executables that are named after their event: `before_stop`, `20-after_healthy-slots.sh`. They run
    /// after the hooks of this file, in the order of their names; names that begin with '_' or '.' are skipped. What
    /// stands after `# description:` in the first ten lines describes one, and a file of the same name with '.toml'
    /// after it may set `description`, `models`, `timeout_s`, `on_failure` and `env`. Absent: none.
    pub folder: Option<PathBuf>,
    /// Texts that commands, URLs, headers and bodies may name as `${NAME}`. Besides these there are EVENT, NODE,
    /// STATE_DIR, PID, and for the events of a model MODEL, HARNESS and PORT. An unknown name is an error at start.
    pub macros: BTreeMap<String, String>,
    /// The hooks, run in this order; those of `shutdown` in the reverse one.
    pub run: Vec<HookOptions>,
}

/// One hook: a command or an HTTP call.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HookOptions {
    /// When: 'startup', 'before_load', 'after_healthy' (the model is ready only afterwards), 'ready',
    /// 'stop_generation', 'before_stop' (it is unloaded only afterwards), 'after_unload' or 'shutdown'.
    pub on: Option<HookEvent>,
    /// Its name in logs and listings. The program's or the host's name when absent.
    pub name: Option<String>,
    /// What it is for.
    pub description: Option<String>,
    /// The models it is for: ids, or beginnings of ids with '*' after them. All when empty.
    pub models: Vec<String>,
    /// The program and its arguments; no shell reads them. It gets the environment of this worker, `NEURON_EVENT`,
    /// `NEURON_NODE`, `NEURON_MODEL` and the like, and the same as JSON on its standard input.
    pub command: Vec<String>,
    /// Variables besides those.
    pub env: BTreeMap<String, String>,
    /// The command's working directory; this worker's own when absent.
    pub directory: Option<PathBuf>,
    /// The HTTP call.
    pub http: Option<HttpHookOptions>,
    /// Longest time it may take, in seconds, up to 3600; a command past it is killed with everything that it has
    /// started. 30 when absent.
    pub timeout_s: Option<f64>,
    /// 'fail' (what waits for the hook fails too; only for startup, before_load and after_healthy), 'warn' or
    /// 'ignore'. When absent 'fail' for startup and before_load, else 'warn'.
    pub on_failure: Option<OnFailure>,
}

/// An HTTP call; every status of 200 to 299 is a success.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HttpHookOptions {
    /// Where, http:// or https://.
    pub url: String,
    /// POST when absent.
    pub method: Option<String>,
    /// Headers besides the content type.
    pub headers: BTreeMap<String, String>,
    /// The body; when absent the JSON that commands get on their standard input.
    pub body: Option<String>,
}

/// A hook that can't be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {problem}")]
pub struct HookConfigError {
    /// The key's path, or the file.
    pub place: String,
    /// What is wrong, and what would be right.
    pub problem: String,
}

pub(crate) fn wrong<T>(place: &str, problem: impl Into<String>) -> Result<T, HookConfigError> {
    Err(HookConfigError { place: place.into(), problem: problem.into() })
}

/// What a hook does.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    /// A program.
    Command { argv: Vec<String>, env: BTreeMap<String, String>, directory: Option<PathBuf> },
    /// A call.
    Http { call: HttpHookOptions, method: ::http::Method },
    /// A function of the program around.
    Function(crate::Function),
}

impl Act {
    /// Returns a command's argv and working directory.
    pub(crate) fn command(&self) -> Option<(&[String], Option<&PathBuf>)> {
        match self {
            Act::Command { argv, directory, .. } => Some((argv, directory.as_ref())),
            Act::Http { .. } | Act::Function(_) => None,
        }
    }
}

/// A hook that passed its checks.
#[derive(Clone, Debug)]
pub(crate) struct Hook {
    pub(crate) name: String,
    pub(crate) description: String,
    pub(crate) event: HookEvent,
    pub(crate) models: Vec<String>,
    pub(crate) act: Act,
    pub(crate) timeout: Duration,
    pub(crate) policy: OnFailure,
    pub(crate) source: crate::Source,
}

impl Hook {
    /// Whether it is for this model; those of the node's events are for none and all.
    pub(crate) fn is_for(&self, model: Option<&str>) -> bool {
        let matches = |pattern: &String, id: &str| match pattern.strip_suffix('*') {
            Some(beginning) => id.starts_with(beginning),
            None => pattern == id,
        };
        self.models.is_empty() || model.is_some_and(|id| self.models.iter().any(|pattern| matches(pattern, id)))
    }
}

impl HooksOptions {
    /// Checks names and values of the macros.
    pub(crate) fn check_macros(&self) -> Result<(), HookConfigError> {
        for (name, value) in &self.macros {
            let place = format!("hooks.macros.{name}");
            if !is_macro_name(name) || OF_NODE.contains(&name.as_str()) || OF_MODEL.contains(&name.as_str()) {
                let known: Vec<&str> = OF_NODE.iter().chain(OF_MODEL).copied().collect();
                let known = known.join(", ");
                return wrong(&place, format!("a macro's name has letters, digits and '_', and is none of {known}"));
            }
            if value.len() > 4096 {
                return wrong(&place, "may have 4096 bytes at most");
            }
        }
        Ok(())
    }
}

/// Checks the values that the config and the folder share.
pub(crate) fn limits(
    place: &str,
    event: HookEvent,
    timeout_s: Option<f64>,
    on_failure: Option<OnFailure>,
    models: &[String],
) -> Result<(Duration, OnFailure), HookConfigError> {
    let seconds = timeout_s.unwrap_or(30.0);
    if !(seconds > 0.0 && seconds <= TIMEOUT_MAX_S) {
        return wrong(&format!("{place}.timeout_s"), format!("must be above 0 and at most {TIMEOUT_MAX_S}"));
    }
    let policy = on_failure.unwrap_or(event.default_policy());
    if policy == OnFailure::Fail && !event.can_stop() {
        let name = event.name();
        let problem = format!("nothing can be stopped any more at '{name}'; say 'warn' or 'ignore'");
        return wrong(&format!("{place}.on_failure"), problem);
    }
    if !models.is_empty() && !event.of_model() {
        return wrong(&format!("{place}.models"), format!("'{}' is not about a model", event.name()));
    }
    Ok((Duration::from_secs_f64(seconds), policy))
}

/// Checks that a text names only macros that its event knows.
pub(crate) fn check_text(
    place: &str,
    text: &str,
    event: HookEvent,
    macros: &BTreeMap<String, String>,
) -> Result<(), HookConfigError> {
    let builtin = |name: &str| OF_NODE.contains(&name) || (event.of_model() && OF_MODEL.contains(&name));
    let known = |name: &str| (builtin(name) || macros.contains_key(name)).then(String::new);
    match expand(text, known) {
        Ok(_) => Ok(()),
        Err(error) => {
            let all = OF_NODE.iter().chain(OF_MODEL).filter(|name| builtin(name)).map(|name| name.to_string());
            let all: Vec<String> = all.chain(macros.keys().cloned()).collect();
            wrong(place, format!("{error}; '{}' knows {}", event.name(), all.join(", ")))
        }
    }
}

/// Makes a hook of the configuration.
///
/// # Errors
/// [`HookConfigError`] with the key's path.
pub(crate) fn configured(
    index: usize,
    options: &HookOptions,
    macros: &BTreeMap<String, String>,
) -> Result<Hook, HookConfigError> {
    let place = format!("hooks.run[{index}]");
    let Some(event) = options.on else {
        let names: Vec<&str> = HookEvent::ALL.iter().map(|event| event.name()).collect();
        return wrong(&format!("{place}.on"), format!("must be one of {}", names.join(", ")));
    };
    let (timeout, policy) = limits(&place, event, options.timeout_s, options.on_failure, &options.models)?;
    let check = |key: &str, text: &str| check_text(&format!("{place}.{key}"), text, event, macros);
    let (act, own_name) = match (options.command.first(), &options.http) {
        (Some(program), None) => {
            options.command.iter().try_for_each(|argument| check("command", argument))?;
            options.env.values().try_for_each(|value| check("env", value))?;
            let (argv, env, directory) = (options.command.clone(), options.env.clone(), options.directory.clone());
            let name = program.rsplit('/').next().unwrap_or(program).to_string();
            (Act::Command { argv, env, directory }, name)
        }
        (None, Some(call)) => {
            [&call.url]
                .into_iter()
                .chain(call.headers.values())
                .chain(&call.body)
                .try_for_each(|t| check("http", t))?;
            if !call.url.starts_with("http://") && !call.url.starts_with("https://") {
                return wrong(&format!("{place}.http.url"), "must begin with http:// or https://");
            }
            let method = call.method.as_deref().unwrap_or("POST").parse::<::http::Method>();
            let Ok(method) = method else { return wrong(&format!("{place}.http.method"), "is no method") };
            for name in call.headers.keys() {
                if name.parse::<::http::HeaderName>().is_err() {
                    return wrong(&format!("{place}.http.headers.{name}"), "is no name of a header");
                }
            }
            let host = call.url.split('/').nth(2).unwrap_or_default().to_string();
            (Act::Http { call: call.clone(), method }, host)
        }
        _ => return wrong(&place, "needs either 'command' or 'http'"),
    };
    Ok(Hook {
        name: options.name.clone().unwrap_or(own_name),
        description: options.description.clone().unwrap_or_default(),
        event,
        models: options.models.clone(),
        act,
        timeout,
        policy,
        source: crate::Source::Config(place),
    })
}
