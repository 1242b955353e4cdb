//! `kill -9` of a random worker every few seconds, under long streams.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rand::{Rng, SeedableRng};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::load::Load;
use super::{cpu_seconds, quantile_ms};
use crate::supervisor::{RestartRules, Supervised};
use crate::{Fleet, free_port};

/// The rules by which workers come back.
pub(super) const UNIT: &str = include_str!("../../../deploy/systemd/neuron.service");
/// The fake engine's pace, in milliseconds a token.
pub(super) const PACE_MS: u64 = 20;

/// How long, how often, how many.
#[derive(Clone, Copy, Debug)]
pub struct KillOptions {
    /// How long workers are killed.
    pub span: Duration,
    /// Time between two kills.
    pub every: Duration,
    /// Workers.
    pub neurons: usize,
    /// Streams at once.
    pub streams: usize,
    /// Tokens of each.
    pub tokens: u32,
    /// Continued streams without which the run has shown nothing.
    pub continued_min: u64,
    /// Seeds the choice of victims.
    pub seed: u64,
}

/// Starts supervised workers, each with a state directory and `slots` places.
pub(super) async fn workers(fleet: &Fleet, count: usize, slots: usize, more: &str) -> Result<Vec<Supervised>> {
    let rules = RestartRules::read(UNIT)?;
    let mut workers = Vec::new();
    for i in 0..count {
        let (name, port) = (format!("n{i}"), free_port()?);
        let state = fleet.folder().join(format!("state-{name}"));
        let config = format!(
            "[[default_models]]\nid = \"m\"\nharness = \"fake\"\n[harness.fake]\nstep_ms = {PACE_MS}\n\
             [scheduler]\nmax_running = {slots}\n{more}[node]\nid = \"{name}\"\nstate_dir = {state:?}\n"
        );
        let starter = fleet.starter();
        let named = name.clone();
        workers.push(Supervised::start(&name, rules.clone(), move || starter.neuron(&named, port, &config))?);
    }
    Ok(workers)
}

/// Runs; returns the report.
///
/// # Errors
/// When the fleet can't be started or stopped; failures of requests are in the report.
pub async fn kill(fleet: &Fleet, options: KillOptions) -> Result<Value> {
    let cpu_before = cpu_seconds()?;
    let begun = Instant::now();
    let slots = options.streams.div_ceil(options.neurons.max(2) - 1) + 2;
    let workers = workers(fleet, options.neurons, slots, "").await?;
    let controls: Vec<&str> = workers.iter().map(|worker| worker.control.as_str()).collect();
    let gateway = fleet.gateway(&controls, "[log]\nfilter = \"warn\"\n").await?;
    let load = Load::start(std::slice::from_ref(&gateway.api), options.streams, options.tokens)?;
    let mut rng = rand::rngs::SmallRng::seed_from_u64(options.seed);
    let mut kills = 0u64;
    // The first streams must run before the first kill.
    tokio::time::sleep(options.every.max(Duration::from_secs(6))).await;
    let until = Instant::now() + options.span;
    while Instant::now() < until {
        let victim = &workers[rng.random_range(0..workers.len())];
        kills += u64::from(victim.signal(Signal::KILL)?);
        tokio::time::sleep(options.every).await;
    }
    let mut tally = load.finish().await;
    let metric = |name: &'static str| fleet.metric(&gateway.admin, name, &[]);
    let continued = metric("cortex_continuations_total").await? as u64;
    let retried = metric("cortex_retries_total").await? as u64;
    for worker in workers {
        worker.stop(Duration::from_secs(30))?;
    }
    let mut gateway = gateway;
    gateway.process.terminate()?;
    gateway.process.wait(Duration::from_secs(30))?;
    let seconds = begun.elapsed().as_secs_f64();
    let cores = std::thread::available_parallelism()?.get() as f64;
    let cpu_share = (cpu_seconds()? - cpu_before) / seconds / cores;
    tally.longest.sort_unstable();
    // A client can't see which of its gaps was a continuation: these are the longest ones, as many as there were.
    let gaps = &tally.longest[tally.longest.len().saturating_sub(continued as usize)..];
    ensure!(tally.requests > 0, "no request ended");
    Ok(json!({
        "soak": "kill", "requests": tally.requests, "continued": continued, "failed": tally.failed,
        "truncated": tally.truncated, "quarantined": tally.quarantined, "kills": kills, "retried": retried,
        "gap_p50_ms": quantile_ms(gaps, 0.5), "gap_p99_ms": quantile_ms(gaps, 0.99), "seconds": seconds,
        "cpu_share": cpu_share, "reasons": tally.reasons,
        "passed": tally.failed == 0 && continued >= options.continued_min && cpu_share < 0.5,
    }))
}
