//! Hidden states and log-probabilities that llama.cpp computed of the same weights: at every level, in any chunks.
#![allow(clippy::unwrap_used)]

mod support;

use std::ops::ControlFlow;
use std::path::Path;

use engine_candle::{Arithmetic, CandleEngine, DeviceChoice, KvType, Options};
use inference::engine::{Row, RowOutput, Wanted};
use inference::sampling::score;
use model_files::gguf::{Header, Limits};
use model_files::tokenizer::Tokenizer;
use support::{row, step};

struct Golden {
    text: String,
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    mean: Vec<f32>,
    last: Vec<f32>,
}

fn goldens() -> Vec<Golden> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens/stories260k-outputs.json");
    let list: Vec<serde_json::Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let numbers = |value: &serde_json::Value| serde_json::from_value::<Vec<f32>>(value.clone()).unwrap();
    let golden = |entry: &serde_json::Value| Golden {
        text: entry["text"].as_str().unwrap().into(),
        ids: serde_json::from_value(entry["ids"].clone()).unwrap(),
        logprobs: numbers(&entry["logprobs"]),
        mean: numbers(&entry["mean"]),
        last: numbers(&entry["last"]),
    };
    list.iter().map(golden).collect()
}

fn load(path: &Path, arithmetic: Arithmetic) -> CandleEngine {
    let options = Options {
        device: DeviceChoice::Cpu,
        arithmetic,
        kv_bytes: 64 << 20,
        block_tokens: 32,
        max_batch: 4,
        max_step_tokens: 1024,
        context_length: None,
    };
    let header = Header::read(path, &Limits::default()).unwrap();
    CandleEngine::load(path, &header, &options, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// What the rows of a text give, chunk after chunk.
fn outputs(engine: &mut CandleEngine, ids: &[u32], chunk: usize, wanted: fn(usize) -> Wanted) -> Vec<f32> {
    let blocks: Vec<u32> = (0..ids.len().div_ceil(32) as u32).collect();
    let mut all = Vec::new();
    for (i, tokens) in ids.chunks(chunk).enumerate() {
        let row = Row { wanted: wanted(tokens.len()), ..row(0, tokens, i * chunk, &blocks) };
        match step(engine, vec![row]).remove(0) {
            RowOutput::Logits(numbers) | RowOutput::Hidden(numbers) => all.extend(numbers),
            other => panic!("{other:?}"),
        }
    }
    all
}

fn unit(vector: &[f64]) -> Vec<f64> {
    let length = vector.iter().map(|number| number * number).sum::<f64>().sqrt();
    vector.iter().map(|number| number / length).collect()
}

fn farthest(ours: &[f64], theirs: &[f32]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).fold(0.0, |most, (ours, theirs)| most.max((ours - f64::from(*theirs)).abs()))
}

#[test]
fn hidden_states_and_log_probabilities_are_those_of_another_program_in_any_chunks() {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/models/stories260K"));
    let path = path.join("stories260K-f32.gguf");
    if !path.exists() {
        assert!(std::env::var("CORTEX_TEST_DATA").as_deref() != Ok("required"), "{} is missing", path.display());
        eprintln!("SKIPPED: stories260K is not beside this checkout");
        return;
    }
    let goldens = goldens();
    let tokenizer = Tokenizer::from_gguf(&Header::read(&path, &Limits::default()).unwrap()).unwrap();
    // Keys and values rounded to half precision move the numbers further than the order of sums does.
    for (kv, [hidden_most, logprobs_most]) in [(KvType::F32, [1e-5, 5e-5]), (KvType::F16, [1e-3, 1e-2])] {
        let (mut of_hidden, mut of_logprobs) = (0.0f64, 0.0f64);
        for arithmetic in support::arithmetics(kv) {
            let mut engine = load(&path, arithmetic);
            for golden in &goldens {
                assert_eq!(tokenizer.encode(&golden.text, true).unwrap(), golden.ids);
                let hidden = outputs(&mut engine, &golden.ids, 1024, Wanted::Hidden);
                let states: Vec<&[f32]> = hidden.chunks_exact(64).collect();
                let mut sums = vec![0.0f64; 64];
                for state in &states {
                    sums.iter_mut().zip(*state).for_each(|(sum, number)| *sum += f64::from(*number));
                }
                let last: Vec<f64> = states[states.len() - 1].iter().map(|number| f64::from(*number)).collect();
                of_hidden =
                    of_hidden.max(farthest(&unit(&sums), &golden.mean)).max(farthest(&unit(&last), &golden.last));
                let logits = outputs(&mut engine, &golden.ids, 1024, Wanted::Logits);
                let told = golden.ids[1..].iter().zip(logits.chunks_exact(512));
                let told: Vec<f64> = told.map(|(id, logits)| f64::from(score(logits, *id, 0).logprob)).collect();
                of_logprobs = of_logprobs.max(farthest(&told, &golden.logprobs));
                if !matches!(arithmetic, Arithmetic::Candle) {
                    assert_eq!(outputs(&mut engine, &golden.ids, 7, Wanted::Hidden), hidden, "the same bits");
                    assert_eq!(outputs(&mut engine, &golden.ids, 7, Wanted::Logits), logits, "the same bits");
                }
            }
        }
        eprintln!("{kv:?}: hidden states differ by {of_hidden:e}, log-probabilities by {of_logprobs:e}");
        assert!(of_hidden < hidden_most && of_logprobs < logprobs_most, "{kv:?}: {of_hidden} {of_logprobs}");
    }
}
