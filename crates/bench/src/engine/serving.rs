//! Cells of a whole scheduler with its engine: mixed load, and the second turn of a chat.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use engine_candle::{Arithmetic, CandleEngine, KernelOptions, KvType};
use inference::engine::Engine;
use inference::{EventKind, Limits, RequestKey, Scheduler, Submission, TokenBytes};
use words::Moment;

use super::run::{load, token};
use crate::report::Report;

/// Streams that decode while prompts arrive.
const STREAMS: u64 = 16;
/// Tokens of an arriving prompt, and how many arrive.
const LONG: usize = 2000;
const ARRIVALS: u64 = 2;
/// Tokens of a chat's first answer, and of its second question.
const ANSWER: usize = 32;
const QUESTION: usize = 24;
const CONTEXT: usize = 2400;

fn kernels(threads: usize) -> Arithmetic {
    Arithmetic::Auto(KernelOptions { threads, kv: KvType::F16, level: None })
}

/// A scheduler with its engine, and when each request's tokens came.
struct Rig {
    engine: CandleEngine,
    scheduler: Scheduler,
    begun: Instant,
    tokens: BTreeMap<u64, Vec<(f64, u32)>>,
    done: BTreeMap<u64, usize>,
}

impl Rig {
    fn new(engine: CandleEngine, prefill_tokens: usize, prefix_cache: bool) -> Self {
        let capabilities = engine.capabilities();
        let max_wait = Duration::from_secs(3600);
        let max_running = STREAMS as usize + ARRIVALS as usize;
        let limits = Limits { max_running, max_waiting: 64, max_wait, prefill_tokens, max_choices: 1, prefix_cache };
        let table = Arc::new(TokenBytes::new((0..capabilities.vocab_size).map(|_| b"x".to_vec())));
        let scheduler = Scheduler::new(capabilities, limits, table);
        Rig { engine, scheduler, begun: Instant::now(), tokens: BTreeMap::new(), done: BTreeMap::new() }
    }

    fn now(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    fn submit(&mut self, key: u64, prompt: Vec<u32>, max_tokens: usize) -> Result<()> {
        let submission = Submission::new(RequestKey(key), prompt, max_tokens);
        Ok(self.scheduler.submit(Moment::ZERO, submission)?)
    }

    /// Runs one step; `false` when there is nothing to run.
    fn step(&mut self) -> Result<bool> {
        let mut events = Vec::new();
        let Some(batch) = self.scheduler.plan(Moment::ZERO, &mut events) else { return Ok(false) };
        let outputs = self.engine.step(&batch)?;
        self.scheduler.complete(&batch, outputs, &mut events);
        let now = self.now();
        for event in events {
            match event.kind {
                EventKind::Token { id, .. } => self.tokens.entry(event.request.0).or_default().push((now, id)),
                EventKind::Done(usage) => _ = self.done.insert(event.request.0, usage.cached_tokens),
                EventKind::Failed(_, words) => bail!("request {}: {words}", event.request.0),
                kind => assert!(matches!(kind, EventKind::Started { .. } | EventKind::Resumed { .. })),
            }
        }
        Ok(true)
    }

    fn until_done(&mut self, key: u64) -> Result<()> {
        while !self.done.contains_key(&key) && self.step()? {}
        Ok(())
    }
}

fn prompt(length: usize, salt: usize) -> Vec<u32> {
    (0..length).map(|i| token(i + salt * 100_003)).collect()
}

/// What one run under mixed load showed.
struct Mixed {
    p50: f64,
    p99: f64,
    first_token: f64,
    tokens_a_second: f64,
}

fn run_mixed(path: &Path, threads: usize, prefill_tokens: usize) -> Result<Mixed> {
    let rows = (STREAMS + ARRIVALS) as usize;
    let engine = load(path, kernels(threads), CONTEXT, rows, rows + prefill_tokens)?;
    let mut rig = Rig::new(engine, prefill_tokens, false);
    for key in 0..STREAMS {
        rig.submit(key, prompt(24, key as usize + 1), 400)?;
    }
    while (0..STREAMS).any(|key| rig.tokens.get(&key).is_none_or(|tokens| tokens.len() < 4)) && rig.step()? {}
    // From here on: prompts arrive one after another while all sixteen decode.
    let begin = rig.now();
    let mut first_tokens = 0.0;
    for arrival in STREAMS..STREAMS + ARRIVALS {
        let arrived = rig.now();
        rig.submit(arrival, prompt(LONG, 50 + arrival as usize), 8)?;
        rig.until_done(arrival)?;
        first_tokens += rig.tokens[&arrival][0].0 - arrived;
        for _ in 0..8 {
            rig.step()?;
        }
    }
    let seconds = rig.now() - begin;
    let mut gaps: Vec<f64> = Vec::new();
    for key in 0..STREAMS {
        let times: Vec<f64> = rig.tokens[&key].iter().map(|(time, _)| *time).filter(|time| *time >= begin).collect();
        gaps.extend(times.windows(2).map(|pair| pair[1] - pair[0]));
    }
    gaps.sort_by(f64::total_cmp);
    let at = |share: f64| gaps.get(((gaps.len() - 1) as f64 * share) as usize).copied().unwrap_or(f64::NAN);
    let decoded = gaps.len() as f64;
    let tokens_a_second = (decoded + (ARRIVALS as usize * LONG) as f64) / seconds;
    Ok(Mixed { p50: at(0.5), p99: at(0.99), first_token: first_tokens / ARRIVALS as f64, tokens_a_second })
}

/// Sixteen streams decode while prompts of 2,000 tokens arrive: with chunks against without.
pub(super) fn mixed_load(report: &Report, path: &Path, quant: &str, threads: usize) -> Result<()> {
    let whole = run_mixed(path, threads, LONG)?;
    for chunk in [64, 256] {
        let chunked = run_mixed(path, threads, chunk)?;
        let name = |what: &str| format!("{quant} mixed, chunks of {chunk}, {what}");
        report.less(&name("inter-token p99"), chunked.p99, whole.p99, "s");
        report.less(&name("inter-token p50"), chunked.p50, whole.p50, "s");
        report.less(&name("first token"), chunked.first_token, whole.first_token, "s");
        // Seconds a thousand tokens, prompts and answers together.
        report.less(&name("time"), 1e3 / chunked.tokens_a_second, 1e3 / whole.tokens_a_second, "s/1000 tokens");
    }
    Ok(())
}

/// The second turn of a chat of 2,000 tokens against its first: time to the first token.
pub(super) fn second_turn(report: &Report, path: &Path, quant: &str, threads: usize) -> Result<()> {
    let engine = load(path, kernels(threads), CONTEXT, 2, 512)?;
    let mut rig = Rig::new(engine, 512, true);
    let mut chat = prompt(LONG, 7);
    let begun = rig.now();
    rig.submit(0, chat.clone(), ANSWER)?;
    rig.until_done(0)?;
    let first = rig.tokens[&0][0].0 - begun;
    chat.extend(rig.tokens[&0].iter().map(|(_, id)| *id));
    chat.extend(prompt(QUESTION, 9));
    let begun = rig.now();
    rig.submit(1, chat, 1)?;
    rig.until_done(1)?;
    let second = rig.tokens[&1][0].0 - begun;
    report.less(&format!("{quant} first token of the second turn"), second, first, "s, of the first turn");
    report.text(&format!("  {} of its {} tokens came from the cache", rig.done[&1], LONG + ANSWER + QUESTION));
    Ok(())
}
