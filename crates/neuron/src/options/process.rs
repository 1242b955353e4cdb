//! What an operator says of an external engine: how it is started, watched, asked and stopped.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use lifecycle::{RestartPolicy, expand};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use service::command::stop_signal;
use service::config::UnusableOption;
use wire::Endpoint;

use super::{PROCESS_HARNESS, seconds};

/// Macros of an external engine's texts, besides those of `[hooks.macros]`; the last one where there is a file.
const MACROS: [&str; 4] = ["PORT", "MODEL", "STATE_DIR", "FILE"];
/// An engine that served for this long is a good one again.
const PROVEN: Duration = Duration::from_secs(300);
/// Longest of all times here, in seconds.
const TIME_MAX_S: f64 = 86_400.0;

/// An external engine: an OpenAI-compatible server that this worker starts, watches, asks and stops. For
/// `harness = "process"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ProcessOptions {
    /// The program and its arguments; no shell reads them. They may name `${PORT}`, `${MODEL}`, `${STATE_DIR}`, where the
    /// model has a `path` the `${FILE}` that it leads to, and the macros of `[hooks.macros]`; `env` and `directory` may too.
    pub argv: Vec<String>,
    /// Variables besides this worker's own.
    pub env: BTreeMap<String, String>,
    /// The working directory; this worker's own when absent.
    pub directory: Option<PathBuf>,
    /// The port of 127.0.0.1 that it listens on. 0: a free one, new at each start.
    pub port: u16,
    /// A path that answers 200 once it can work, and from then on.
    pub health_path: String,
    /// Longest time from its start until it is healthy, in seconds.
    pub health_deadline_s: f64,
    /// How often it is looked at from then on, in seconds.
    pub health_interval_s: f64,
    /// So many looks in a row without health, and it is killed and started again. 0: only its end counts.
    pub health_failures_max: u32,
    /// What asks it to stop: 'TERM', 'INT', 'QUIT', 'HUP', 'USR1', 'USR2' or 'KILL'.
    pub stop_signal: String,
    /// How long it may take to stop before it is killed with everything that it has started, in seconds. It counts in
    /// `drain.unload_max_s`.
    pub stop_grace_s: f64,
    /// Most restarts within the window after it was lost; then the model has failed. 0: none.
    pub restart_limit: u32,
    /// That window, in seconds. Five minutes of service make an engine a good one again.
    pub restart_window_s: f64,
    /// The pause before the first restart, in seconds; each further one doubles it.
    pub restart_pause_s: f64,
    /// Longest such pause, in seconds.
    pub restart_pause_max_s: f64,
    /// What it calls the model. Requests are passed on with the client's name when absent.
    pub model: Option<String>,
    /// What it answers: 'chat', 'completions', 'embeddings', 'tokenize', 'detokenize'.
    pub endpoints: Vec<EndpointName>,
    /// Most requests at once.
    pub max_running: usize,
    /// Most requests behind those; each waits `scheduler.max_wait_ms` at most.
    pub max_waiting: usize,
}

/// An endpoint's name in configurations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum EndpointName {
    Chat,
    Completions,
    Embeddings,
    Tokenize,
    Detokenize,
}

impl From<EndpointName> for Endpoint {
    fn from(name: EndpointName) -> Self {
        match name {
            EndpointName::Chat => Endpoint::Chat,
            EndpointName::Completions => Endpoint::Completions,
            EndpointName::Embeddings => Endpoint::Embeddings,
            EndpointName::Tokenize => Endpoint::Tokenize,
            EndpointName::Detokenize => Endpoint::Detokenize,
        }
    }
}

impl Default for ProcessOptions {
    fn default() -> Self {
        ProcessOptions {
            argv: Vec::new(),
            env: BTreeMap::new(),
            directory: None,
            port: 0,
            health_path: "/health".into(),
            health_deadline_s: 600.0,
            health_interval_s: 5.0,
            health_failures_max: 3,
            stop_signal: "TERM".into(),
            stop_grace_s: 10.0,
            restart_limit: 5,
            restart_window_s: 600.0,
            restart_pause_s: 1.0,
            restart_pause_max_s: 60.0,
            model: None,
            endpoints: vec![EndpointName::Chat, EndpointName::Completions],
            max_running: 8,
            max_waiting: 256,
        }
    }
}

/// Checks what an entry says of its external engine, or does not say; `macros` are those of hooks.
///
/// # Errors
/// [`UnusableOption`] with the key below the entry.
pub(super) fn check_entry(
    harness: Option<&str>,
    process: Option<&ProcessOptions>,
    has_file: bool,
    macros: &BTreeMap<String, String>,
) -> Result<(), UnusableOption> {
    let wrong = |problem: &str| Err(UnusableOption { key: "process".into(), problem: problem.into() });
    match (harness == Some(PROCESS_HARNESS), process) {
        (false, None) => Ok(()),
        (true, None) => wrong("must say what is started"),
        (false, Some(_)) => wrong("is for harness = 'process' alone"),
        (true, Some(process)) => process.check(has_file, macros).map_err(|UnusableOption { key, problem }| {
            let key = format!("process.{key}");
            UnusableOption { key, problem }
        }),
    }
}

impl ProcessOptions {
    /// Returns the longest time from its start until it is healthy.
    pub(crate) fn health_deadline(&self) -> Duration {
        seconds(self.health_deadline_s)
    }

    /// Returns how often it is looked at.
    pub(crate) fn health_interval(&self) -> Duration {
        seconds(self.health_interval_s)
    }

    /// Returns how long it may take to stop.
    pub(crate) fn stop_grace(&self) -> Duration {
        seconds(self.stop_grace_s)
    }

    /// Returns when it is started again after it was lost.
    pub(crate) fn restarts(&self) -> RestartPolicy {
        RestartPolicy {
            limit: self.restart_limit,
            window: seconds(self.restart_window_s),
            first: seconds(self.restart_pause_s),
            longest: seconds(self.restart_pause_max_s),
            proven: PROVEN,
        }
    }

    /// Returns all texts in which macros count, each with its key.
    fn texts(&self) -> impl Iterator<Item = (String, &str)> {
        let argv = self.argv.iter().enumerate().map(|(i, text)| (format!("argv[{i}]"), text.as_str()));
        let env = self.env.iter().map(|(name, text)| (format!("env.{name}"), text.as_str()));
        let directory = self.directory.as_deref().and_then(std::path::Path::to_str);
        argv.chain(env).chain(directory.map(|text| ("directory".to_string(), text)))
    }

    /// Checks what types can't; `macros` are those of hooks.
    ///
    /// # Errors
    /// [`UnusableOption`] with the key alone.
    fn check(&self, has_file: bool, macros: &BTreeMap<String, String>) -> Result<(), UnusableOption> {
        let wrong = |key: &str, problem: String| Err(UnusableOption { key: key.into(), problem });
        if self.argv.first().is_none_or(String::is_empty) {
            return wrong("argv", "must name a program".into());
        }
        let own = &MACROS[..if has_file { 4 } else { 3 }];
        for (key, text) in self.texts() {
            let known = |name: &str| (own.contains(&name) || macros.contains_key(name)).then(String::new);
            if let Err(error) = expand(text, known) {
                let names: Vec<&str> = own.iter().copied().chain(macros.keys().map(String::as_str)).collect();
                return wrong(&key, format!("{error}; there are {}", names.join(", ")));
            }
        }
        if !self.health_path.starts_with('/') || self.health_path.contains(char::is_whitespace) {
            return wrong("health_path", "must be a path that begins with '/'".into());
        }
        if stop_signal(&self.stop_signal).is_none() {
            return wrong("stop_signal", "must be TERM, INT, QUIT, HUP, USR1, USR2 or KILL".into());
        }
        if self.endpoints.is_empty() {
            return wrong("endpoints", "must name one at least".into());
        }
        for (key, value) in [
            ("health_deadline_s", self.health_deadline_s),
            ("health_interval_s", self.health_interval_s),
            ("stop_grace_s", self.stop_grace_s),
            ("restart_window_s", self.restart_window_s),
            ("restart_pause_s", self.restart_pause_s),
            ("restart_pause_max_s", self.restart_pause_max_s),
        ] {
            if !(value > 0.0 && value <= TIME_MAX_S) {
                return wrong(key, format!("must be above 0 and at most {TIME_MAX_S}, it is {value}"));
            }
        }
        for (key, value, low, high) in
            [("max_running", self.max_running, 1, 4096), ("max_waiting", self.max_waiting, 0, 1 << 20)]
        {
            if !(low..=high).contains(&value) {
                return wrong(key, format!("must be from {low} to {high}, it is {value}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn options(argv: &[&str]) -> ProcessOptions {
        ProcessOptions { argv: argv.iter().map(ToString::to_string).collect(), ..ProcessOptions::default() }
    }

    #[test]
    fn what_could_never_run_is_refused_with_its_key() {
        let macros = BTreeMap::from([("WEIGHTS".to_string(), "/m".to_string())]);
        let fine = options(&["server", "--port", "${PORT}", "-m", "${WEIGHTS}/${MODEL}.gguf"]);
        assert!(fine.check(false, &macros).is_ok());
        let file = options(&["server", "${FILE}"]);
        assert!(file.check(true, &macros).is_ok() && file.check(false, &macros).is_err());
        let key = |options: ProcessOptions| options.check(false, &macros).unwrap_err().key;
        assert_eq!(key(options(&[])), "argv");
        let unknown = options(&["server", "${PRT}"]).check(false, &macros).unwrap_err();
        assert!(unknown.key == "argv[1]" && unknown.problem.contains("PORT, MODEL, STATE_DIR, WEIGHTS"), "{unknown:?}");
        assert_eq!(key(ProcessOptions { health_path: "health".into(), ..fine.clone() }), "health_path");
        assert_eq!(key(ProcessOptions { stop_signal: "SIGSTOP".into(), ..fine.clone() }), "stop_signal");
        assert_eq!(key(ProcessOptions { stop_grace_s: 0.0, ..fine.clone() }), "stop_grace_s");
        assert_eq!(key(ProcessOptions { endpoints: Vec::new(), ..fine.clone() }), "endpoints");
        assert_eq!(key(ProcessOptions { max_running: 0, ..fine.clone() }), "max_running");
        let env = BTreeMap::from([("A".to_string(), "${B".to_string())]);
        assert_eq!(key(ProcessOptions { env, ..fine }), "env.A");
    }
}
