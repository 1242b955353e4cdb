//! The same bits, by law: what a sequence gives does not depend on what else runs, on chunks, on the prefix cache, on
//! preemptions, on a resume, on threads, nor on the instructions.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::path::{Path, PathBuf};

use engine_candle::{Arithmetic, CandleEngine, KernelOptions, KvType, Level, Options};
use inference::Priority;
use inference::engine::Engine;
use inference::sampling::Sampling;
use support::driver::{Request, Run, Tokens, drive, limits, scheduler};
use support::model::Numbers;
use support::{load, options};

const REQUESTS: u64 = 50;

fn models() -> [(&'static str, PathBuf); 3] {
    let repository = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    [
        ("F16", repository.join("examples/demo-model/demo-f16.gguf")),
        ("Q8_0", repository.join("examples/demo-model/demo-q8_0.gguf")),
        ("Q4_K_M", repository.join("tests/goldens/demo-q4_k_m.gguf")),
    ]
}

fn engine(path: &Path, level: Level, threads: usize, blocks: usize) -> CandleEngine {
    let arithmetic = Arithmetic::Auto(KernelOptions { threads, kv: KvType::F16, level: Some(level) });
    let options = Options { arithmetic, context_length: Some(256), max_batch: 12, ..options(32) };
    // One block's bytes, from an engine with room for one request.
    let bytes = load(path, &Options { max_batch: 1, ..options }).unwrap().block_bytes();
    load(path, &Options { kv_bytes: blocks * bytes, ..options }).unwrap()
}

fn below(numbers: &mut Numbers, n: usize) -> usize {
    (((numbers.draw() + 1.0) / 2.0 * n as f32) as usize).min(n - 1)
}

/// Fifty requests: some share a long beginning, some have two choices, a third are greedy.
fn workload(vocabulary: usize) -> Vec<(u64, Request)> {
    let mut numbers = Numbers(77);
    let common: Vec<u32> = (0..100).map(|_| below(&mut numbers, vocabulary) as u32).collect();
    let request = |i: u64| {
        let shared = if below(&mut numbers, 10) < 4 { 32 + below(&mut numbers, 68) } else { 0 };
        let own = 1 + below(&mut numbers, 90);
        let mut prompt = common[..shared].to_vec();
        prompt.extend((0..own).map(|_| below(&mut numbers, vocabulary) as u32));
        if i % 10 == 3 {
            // Whole blocks, so that a full hit happens.
            prompt = common[..96].to_vec();
        }
        let temperature = if i.is_multiple_of(3) { 0.0 } else { 0.9 };
        let priority = [Priority::High, Priority::Normal, Priority::Low][below(&mut numbers, 3)];
        let choices = vec![Vec::new(); if i.is_multiple_of(7) { 2 } else { 1 }];
        let sampling = Sampling { temperature, seed: i, ..Sampling::GREEDY };
        (i, Request { prompt, choices, sampling, max_tokens: 4 + below(&mut numbers, 28), priority })
    };
    (0..REQUESTS).map(request).collect()
}

/// Each request alone, its prompt whole, one thread, no cache.
fn alone(path: &Path, requests: &[(u64, Request)]) -> Tokens {
    let mut engine = engine(path, Level::best(), 1, 64);
    let mut all = Tokens::new();
    for request in requests {
        let mut scheduler = scheduler(&engine, limits(2, 1024, false));
        all.extend(drive(&mut engine, &mut scheduler, std::slice::from_ref(request), &mut Numbers(1), 0).tokens);
    }
    all
}

fn vocabulary(path: &Path) -> usize {
    engine(path, Level::best(), 1, 8).capabilities().vocab_size
}

fn same(run: &Run, wanted: &Tokens, case: &str) {
    for (key, token) in &run.tokens {
        assert_eq!(wanted.get(key), Some(token), "{case}: (request, choice, index) = {key:?}");
    }
}

fn levels() -> impl Iterator<Item = Level> {
    Level::ALL.into_iter().filter(|level| level.is_available())
}

#[test]
fn fifty_requests_give_the_same_bits_in_any_company() {
    for (name, path) in models() {
        let mut requests = workload(vocabulary(&path));
        let wanted = alone(&path, &requests);
        let (mut preemptions, mut hits, mut copies, mut chunks) = (0, 0, 0, 0);
        let mut numbers = Numbers(5);
        for level in levels() {
            for threads in [1, 2] {
                // Few blocks, so that urgent requests push others out.
                let mut engine = engine(&path, level, threads, 34);
                let prefill = 1 + below(&mut numbers, 70);
                let mut scheduler = scheduler(&engine, limits(3 + below(&mut numbers, 9), prefill, true));
                for i in (1..requests.len()).rev() {
                    requests.swap(i, below(&mut numbers, i + 1));
                }
                let run = drive(&mut engine, &mut scheduler, &requests, &mut numbers, 6);
                same(&run, &wanted, &format!("{name} at {level} on {threads} threads, {prefill} prompt tokens a step"));
                assert_eq!(run.tokens.len(), wanted.len());
                preemptions += run.load.preemptions;
                hits += run.load.prefix_hit_tokens;
                copies += run.copies;
                chunks += run.chunks;
            }
        }
        let all = [preemptions as usize, hits as usize, copies, chunks];
        assert!(all.iter().all(|count| *count > 0), "{name}: preemptions, hits, copies, chunks: {all:?}");
    }
}

#[test]
fn a_resume_at_any_position_goes_on_with_the_same_bits() {
    for (name, path) in models() {
        let requests = workload(vocabulary(&path));
        // A greedy one and a sampled one, both of one choice.
        for i in [3usize, 5] {
            let (key, request) = &requests[i];
            let wanted = alone(&path, &requests[i..=i]);
            let said: Vec<u32> = wanted.values().map(|(id, _)| *id).collect();
            let resume = |at: usize| (at as u64, Request { choices: vec![said[..at].to_vec()], ..request.clone() });
            let resumes: Vec<_> = (0..said.len()).map(resume).collect();
            for (level, threads, cache) in levels().flat_map(|level| [(level, 1, true), (level, 2, false)]) {
                let mut engine = engine(&path, level, threads, 90);
                let mut scheduler = scheduler(&engine, limits(12, 50, cache));
                let run = drive(&mut engine, &mut scheduler, &resumes, &mut Numbers(9), 2);
                for ((at, _, index), token) in &run.tokens {
                    let case = format!("{name} at {level}, request {key} resumed at {at}, index {index}");
                    assert_eq!(Some(token), wanted.get(&(*key, 0, *index)), "{case}");
                }
                let tokens: usize = (0..said.len()).map(|at| said.len() - at).sum();
                assert_eq!(run.tokens.len(), tokens);
            }
        }
    }
}

#[test]
fn blocks_that_leave_one_engine_serve_in_another_with_the_same_bits() {
    let [(_, path), ..] = models();
    let requests = workload(vocabulary(&path));
    let (key, request) = requests.iter().find(|(_, request)| request.prompt.len() > 100).unwrap();
    let one = [(*key, request.clone())];
    let mut first = engine(&path, Level::best(), 2, 64);
    let mut of_first = scheduler(&first, limits(4, 64, true));
    let wanted = drive(&mut first, &mut of_first, &one, &mut Numbers(1), 0);
    assert_eq!(wanted.usage[key].cached_tokens, 0);

    let mut second = engine(&path, Level::Portable, 1, 64);
    let mut of_second = scheduler(&second, limits(4, 64, true));
    for known in of_first.export_prefixes() {
        let bytes = first.export_block(known.block).unwrap();
        assert_eq!(bytes.len(), second.block_bytes());
        let (block, hash) = of_second.import_prefix(known.parent, known.salt, known.tokens).unwrap();
        assert_eq!(hash, known.hash);
        second.import_block(block, &bytes).unwrap();
    }
    let run = drive(&mut second, &mut of_second, &one, &mut Numbers(1), 0);
    assert_eq!(run.tokens, wanted.tokens);
    let whole = (request.prompt.len() - 1) / 32 * 32;
    assert_eq!(run.usage[key].cached_tokens, whole, "all but the last token's block came from the first engine");
}
