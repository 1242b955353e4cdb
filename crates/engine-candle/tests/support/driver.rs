//! A scheduler and an engine run together, with the bits of every token's logits noted.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use engine_candle::CandleEngine;
use inference::engine::{Engine, RowOutput, Wanted};
use inference::sampling::Sampling;
use inference::{ChoiceStart, EventKind, Limits, Load, Priority, RequestKey, Scheduler, Submission, TokenBytes, Usage};
use words::Moment;

use super::model::Numbers;

/// A token by (request, choice, index), with a checksum of the bits of all its logits.
pub type Tokens = BTreeMap<(u64, u32, u32), (u32, u64)>;

/// What a run showed.
#[derive(Default)]
pub struct Run {
    pub tokens: Tokens,
    pub usage: BTreeMap<u64, Usage>,
    pub load: Load,
    pub copies: usize,
    pub chunks: usize,
}

/// A request of a workload.
#[derive(Clone)]
pub struct Request {
    pub prompt: Vec<u32>,
    /// Accepted ids of each choice.
    pub choices: Vec<Vec<u32>>,
    pub sampling: Sampling,
    pub max_tokens: usize,
    pub priority: Priority,
}

pub fn limits(max_running: usize, prefill_tokens: usize, prefix_cache: bool) -> Limits {
    let max_wait = Duration::from_secs(1 << 30);
    Limits { max_running, max_waiting: 1000, max_wait, prefill_tokens, max_choices: 8, prefix_cache }
}

pub fn scheduler(engine: &CandleEngine, limits: Limits) -> Scheduler {
    let capabilities = engine.capabilities();
    let table = TokenBytes::new((0..capabilities.vocab_size).map(|_| b"x".to_vec()));
    Scheduler::new(capabilities, limits, Arc::new(table))
}

pub fn submission(key: u64, request: &Request) -> Submission {
    let choices = request.choices.iter().map(|accepted| ChoiceStart { accepted: accepted.clone() }).collect();
    let (sampling, priority) = (request.sampling, request.priority);
    let plain = Submission::new(RequestKey(key), request.prompt.as_slice(), request.max_tokens);
    Submission { choices, sampling, priority, ..plain }
}

/// FNV-1a over the numbers' bits.
fn checksum(logits: &[f32]) -> u64 {
    let fold = |hash: u64, logit: &f32| (hash ^ u64::from(logit.to_bits())).wrapping_mul(0x0100_0000_01b3);
    logits.iter().fold(0xcbf2_9ce4_8422_2325, fold)
}

/// Runs all requests; each arrives after a few steps more, as `arrivals` draws it.
pub fn drive(
    engine: &mut CandleEngine,
    scheduler: &mut Scheduler,
    requests: &[(u64, Request)],
    arrivals: &mut Numbers,
    most_gap: usize,
) -> Run {
    let (mut run, mut events, mut next, mut gap) = (Run::default(), Vec::new(), 0, 0);
    for _ in 0..100_000 {
        while next < requests.len() && gap == 0 {
            let (key, request) = &requests[next];
            scheduler.submit(Moment::ZERO, submission(*key, request)).unwrap();
            next += 1;
            gap = ((arrivals.draw() + 1.0) / 2.0 * (most_gap + 1) as f32) as usize;
        }
        gap = gap.saturating_sub(1);
        let Some(batch) = scheduler.plan(Moment::ZERO, &mut events) else {
            if next == requests.len() {
                run.load = scheduler.load();
                assert_eq!(run.usage.len(), requests.len(), "every request ended");
                return run;
            }
            continue;
        };
        events.clear();
        run.copies += batch.copies.len();
        run.chunks += batch.rows.iter().filter(|row| row.wanted == Wanted::Nothing).count();
        let outputs = engine.step(&batch).unwrap();
        let sums: Vec<u64> = outputs
            .rows
            .iter()
            .filter_map(|output| match output {
                RowOutput::Logits(logits) => Some(checksum(logits)),
                _ => None,
            })
            .collect();
        scheduler.complete(&batch, outputs, &mut events);
        let mut sums = sums.into_iter();
        for event in events.drain(..) {
            match event.kind {
                EventKind::Token { choice, index, id, .. } => {
                    let sum = sums.next().expect("a row for each token");
                    let again = run.tokens.insert((event.request.0, choice, index), (id, sum));
                    assert!(again.is_none(), "a token came twice");
                }
                EventKind::Done(usage) => _ = run.usage.insert(event.request.0, usage),
                EventKind::Failed(code, words) => panic!("{:?}: {code:?} {words}", event.request),
                kind => assert!(matches!(kind, EventKind::Started { .. } | EventKind::Resumed { .. })),
            }
        }
    }
    panic!("the scheduler does not come to rest");
}
