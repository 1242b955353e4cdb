//! Full rolling restarts, one after another, under a steady load: what clients see against a quiet phase before.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

use super::kill::workers;
use super::load::{Load, Tally};
use super::{cpu_seconds, quantile_ms};
use crate::{Fleet, Gateway, fake_answer};

/// How much, how often.
#[derive(Clone, Copy, Debug)]
pub struct RolloutOptions {
    /// Workers.
    pub neurons: usize,
    /// Places of each.
    pub slots: usize,
    /// Streams at once, over both gateways.
    pub streams: usize,
    /// Tokens of each.
    pub tokens: u32,
    /// Rolling restarts of the whole fleet.
    pub rollouts: usize,
    /// Workers that may be out at once.
    pub max_unavailable: u32,
    /// The quiet phase before.
    pub quiet: Duration,
    /// Longest time for one rolling restart.
    pub rollout_max: Duration,
}

/// The canary of every restart, and what the oracle says to it.
const CANARY: &str = "are you well?";
const CANARY_TOKENS: u32 = 8;

async fn begin(gateway: &Gateway, handoff: &str, max_unavailable: u32) -> Result<()> {
    let canary = format!("{CANARY}={}", fake_answer(CANARY, CANARY_TOKENS));
    let ask = json!({ "max_unavailable": max_unavailable.to_string(), "handoff": handoff, "canary": canary });
    let response = reqwest::Client::new().post(format!("{}/api/rollout", gateway.admin)).json(&ask).send().await?;
    ensure!(response.status().is_success(), "the rollout was refused: {}", response.text().await?);
    Ok(())
}

/// Waits for the rollout's end; a pause is a failure of the run, with its reason.
async fn until_done(gateway: &Gateway, patience: Duration) -> Result<()> {
    let until = Instant::now() + patience;
    while Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(250)).await;
        let shown: Value = reqwest::get(format!("{}/api/rollout", gateway.admin)).await?.json().await?;
        match shown["rollout"]["phase"]["phase"].as_str().or(shown["rollout"]["phase"].as_str()) {
            Some("done") => return Ok(()),
            Some("running") => {}
            _ => bail!("the rollout does not run: {shown}"),
        }
    }
    bail!("the rollout is not over after {patience:?}")
}

fn latencies(tally: &mut Tally) -> Value {
    tally.first.sort_unstable();
    tally.between.sort_unstable();
    json!({
        "requests": tally.requests,
        "first_token_p50_ms": quantile_ms(&tally.first, 0.5), "first_token_p99_ms": quantile_ms(&tally.first, 0.99),
        "inter_token_p50_ms": quantile_ms(&tally.between, 0.5), "inter_token_p99_ms": quantile_ms(&tally.between, 0.99),
    })
}

/// Runs; returns the report.
///
/// # Errors
/// When the fleet can't be started or stopped, or a rollout does not end; failures of requests are in the report.
pub async fn rollout(fleet: &Fleet, options: RolloutOptions) -> Result<Value> {
    let (cpu_before, begun) = (cpu_seconds()?, Instant::now());
    let workers = workers(fleet, options.neurons, options.slots, "").await?;
    let controls: Vec<&str> = workers.iter().map(|worker| worker.control.as_str()).collect();
    let store = fleet.folder().join("rollouts.sqlite");
    let config = format!("[log]\nfilter = \"warn\"\n[rollout]\nstore = {store:?}\n");
    let mut gateways = vec![fleet.gateway(&controls, &config).await?, fleet.gateway(&controls, &config).await?];
    let apis: Vec<String> = gateways.iter().map(|gateway| gateway.api.clone()).collect();
    let load = Load::start(&apis, options.streams, options.tokens)?;
    tokio::time::sleep(Duration::from_secs(12)).await;
    let warm = load.take();
    tokio::time::sleep(options.quiet).await;
    let mut quiet = load.take();
    let mut spans = Vec::new();
    for i in 0..options.rollouts {
        let started = Instant::now();
        // The first lets streams run out, the others hand them over at once.
        let handoff = if i == 0 { "soft" } else { "now" };
        begin(&gateways[i % 2], handoff, options.max_unavailable).await?;
        until_done(&gateways[i % 2], options.rollout_max).await?;
        spans.push(started.elapsed().as_secs_f64());
    }
    let mut busy = load.finish().await;
    let mut continued = 0.0;
    for gateway in &gateways {
        continued += fleet.metric(&gateway.admin, "cortex_continuations_total", &[]).await?;
    }
    let starts: usize = workers.iter().map(|worker| worker.starts()).sum();
    for worker in workers {
        worker.stop(Duration::from_secs(30))?;
    }
    for gateway in &mut gateways {
        gateway.process.terminate()?;
        gateway.process.wait(Duration::from_secs(30))?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let cpu_share = (cpu_seconds()? - cpu_before) / seconds / std::thread::available_parallelism()?.get() as f64;
    let all = [&warm, &quiet, &busy];
    let sum = |count: fn(&Tally) -> u64| all.iter().map(|tally| count(tally)).sum::<u64>();
    let failed = sum(|tally| tally.failed);
    let reasons: Vec<&String> = all.iter().flat_map(|tally| &tally.reasons).collect();
    let restarts = starts - options.neurons;
    Ok(json!({
        "soak": "rollout", "requests": sum(|tally| tally.requests), "continued": continued as u64, "failed": failed,
        "truncated": sum(|tally| tally.truncated), "quarantined": sum(|tally| tally.quarantined),
        "restarts": restarts, "rollout_seconds": spans, "seconds": seconds, "cpu_share": cpu_share, "reasons": reasons,
        "passed": failed == 0 && restarts == options.neurons * options.rollouts && cpu_share < 0.5,
        "quiet": latencies(&mut quiet), "busy": latencies(&mut busy),
    }))
}
