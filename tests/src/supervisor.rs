//! Restarts programs as their systemd units say, and nothing else: the units' own files are read.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use tokio::task::JoinHandle;

use crate::{Neuron, Running};

/// What a unit says of restarts.
#[derive(Clone, Debug, PartialEq)]
pub struct RestartRules {
    /// Pause before a start.
    pub pause: Duration,
    /// Exit codes that end it for good.
    pub prevent: Vec<i32>,
    /// Most starts in the interval.
    pub burst: usize,
    /// That interval.
    pub interval: Duration,
}

impl RestartRules {
    /// Reads a unit file.
    ///
    /// # Errors
    /// When it does not say `Restart=always`, or a number is none.
    pub fn read(unit: &str) -> Result<Self> {
        let value = |key: &str| unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=').map(str::trim));
        ensure!(value("Restart") == Some("always"), "the unit does not restart always");
        let number = |key: &str| -> Result<u64> {
            value(key).with_context(|| format!("the unit has no {key}"))?.parse().with_context(|| key.to_string())
        };
        let codes = value("RestartPreventExitStatus").unwrap_or_default().split_whitespace();
        Ok(RestartRules {
            pause: Duration::from_secs(number("RestartSec")?),
            prevent: codes.map(|code| code.parse().context("RestartPreventExitStatus")).collect::<Result<_>>()?,
            burst: number("StartLimitBurst")? as usize,
            interval: Duration::from_secs(number("StartLimitIntervalSec")?),
        })
    }
}

#[derive(Debug)]
struct State {
    process: Option<Running>,
    starts: usize,
    /// Why it is not started any more.
    given_up: Option<String>,
}

/// One supervised worker.
#[derive(Debug)]
pub struct Supervised {
    /// Its name.
    pub name: String,
    /// Its control address, the same in all its lives.
    pub control: String,
    state: Arc<Mutex<State>>,
    task: JoinHandle<()>,
}

impl Drop for Supervised {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How often a child is looked at.
const LOOK: Duration = Duration::from_millis(20);

impl Supervised {
    /// Starts a worker and keeps it started; `start` makes each of its lives.
    ///
    /// # Errors
    /// When the first life can't be started.
    pub fn start(
        name: &str,
        rules: RestartRules,
        start: impl Fn() -> Result<Neuron> + Send + 'static,
    ) -> Result<Supervised> {
        let first = start()?;
        let control = first.control.clone();
        let state = Arc::new(Mutex::new(State { process: Some(first.process), starts: 1, given_up: None }));
        let task = tokio::spawn(supervise(state.clone(), rules, start));
        Ok(Supervised { name: name.into(), control, state, task })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a signal to the present life; `false` when there is none.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn signal(&self, signal: Signal) -> Result<bool> {
        let state = self.state();
        match &state.process {
            Some(process) => process.signal(signal).map(|()| true),
            None => Ok(false),
        }
    }

    /// Returns how many lives it had.
    pub fn starts(&self) -> usize {
        self.state().starts
    }

    /// Ends supervision and the present life, politely.
    ///
    /// # Errors
    /// When it had been given up, or does not leave in time.
    pub fn stop(self, patience: Duration) -> Result<()> {
        self.task.abort();
        let mut state = self.state();
        if let Some(reason) = &state.given_up {
            bail!("{}: {reason}", self.name);
        }
        if let Some(mut process) = state.process.take() {
            process.terminate()?;
            process.wait(patience)?;
        }
        Ok(())
    }
}

async fn supervise(state: Arc<Mutex<State>>, rules: RestartRules, start: impl Fn() -> Result<Neuron>) {
    let mut starts: VecDeque<Instant> = VecDeque::from([Instant::now()]);
    loop {
        tokio::time::sleep(LOOK).await;
        let ended = {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            let status = state.process.as_mut().map(Running::ended);
            match status {
                Some(Ok(None)) | None => continue,
                Some(Ok(Some(status))) => {
                    state.process = None;
                    if status.code().is_some_and(|code| rules.prevent.contains(&code)) {
                        state.given_up = Some(format!("ended with {status}, which its unit does not restart"));
                    }
                }
                Some(Err(error)) => state.given_up = Some(error.to_string()),
            }
            state.given_up.is_some()
        };
        if ended {
            return;
        }
        tokio::time::sleep(rules.pause).await;
        let now = Instant::now();
        starts.retain(|at| now.duration_since(*at) < rules.interval);
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        if starts.len() >= rules.burst {
            state.given_up = Some("its unit's start limit is reached".into());
            return;
        }
        starts.push_back(now);
        match start() {
            Ok(neuron) => {
                state.process = Some(neuron.process);
                state.starts += 1;
            }
            Err(error) => {
                state.given_up = Some(format!("could not be started: {error:#}"));
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_rules_are_those_of_the_shipped_unit() {
        let rules = RestartRules::read(include_str!("../../deploy/systemd/neuron.service")).unwrap();
        assert_eq!((rules.prevent.as_slice(), rules.pause.as_secs()), (&[78][..], 2));
        assert!(rules.burst >= 5 && rules.interval.as_secs() >= 60);
        assert!(RestartRules::read("Restart=no\n").is_err());
    }
}
