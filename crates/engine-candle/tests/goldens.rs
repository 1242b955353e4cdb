//! Tokens that others computed: trained models under this engine, whatever the chunks, blocks and neighbours.
#![allow(clippy::unwrap_used)]

mod support;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use engine_candle::{Arithmetic, CandleEngine, DeviceChoice, KernelOptions, KvType, LoadError, Options};
use inference::engine::{Batch, BlockCopy, BlockId, Engine, EngineError, Row, RowOutput, SequenceId, Wanted};
use inference::sampling::{Sampling, argmax};
use model_files::gguf::{Header, Limits};

const BLOCK: usize = 32;

fn options(arithmetic: Arithmetic) -> Options {
    Options {
        device: DeviceChoice::Cpu,
        arithmetic,
        kv_bytes: 64 << 20,
        block_tokens: BLOCK,
        max_batch: 4,
        max_step_tokens: 1024,
        context_length: None,
    }
}

/// candle, then the kernels with keys and values in f16 and f32, at every level of this machine.
fn arithmetics() -> Vec<Arithmetic> {
    let [f16, f32] = [KvType::F16, KvType::F32].map(support::arithmetics);
    f16.into_iter().chain(f32.into_iter().skip(1)).collect()
}

fn load_with(path: &Path, arithmetic: Arithmetic) -> CandleEngine {
    let header = Header::read(path, &Limits::default()).unwrap();
    CandleEngine::load(path, &header, &options(arithmetic), &mut |_| ControlFlow::Continue(())).unwrap()
}

/// The default arithmetic.
fn load(path: &Path) -> CandleEngine {
    load_with(path, Arithmetic::Auto(KernelOptions::default()))
}

fn shared(name: &str) -> Option<PathBuf> {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data")).join(name);
    if path.exists() {
        return Some(path);
    }
    assert!(std::env::var("CORTEX_TEST_DATA").as_deref() != Ok("required"), "{name} is missing");
    eprintln!("SKIPPED: {name} is not beside this checkout");
    None
}

fn row(sequence: u64, tokens: &[u32], start: usize, blocks: &[u32]) -> Row {
    let needed = (start + tokens.len()).div_ceil(BLOCK);
    Row {
        sequence: SequenceId(sequence),
        tokens: tokens.to_vec(),
        start,
        blocks: blocks[..needed].iter().map(|b| BlockId(*b)).collect(),
        wanted: Wanted::Token,
        sampling: Sampling::GREEDY,
    }
}

fn step(engine: &mut CandleEngine, rows: Vec<Row>) -> Vec<u32> {
    let outputs = engine.step(&Batch { copies: Vec::new(), rows }).unwrap();
    let best = |output: &RowOutput| match output {
        RowOutput::Logits(logits) => argmax(logits),
        other => panic!("no logits: {other:?}"),
    };
    outputs.rows.iter().map(best).collect()
}

/// Decodes greedily from `prompt`, in chunks, on these blocks.
fn greedy(engine: &mut CandleEngine, prompt: &[u32], count: usize, chunk: usize, blocks: &[u32]) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    let mut done = 0;
    while tokens.len() < count {
        let end = tokens.len().min(done + chunk);
        let next = step(engine, vec![row(0, &tokens[done..end], done, blocks)])[0];
        done = end;
        if done == tokens.len() {
            tokens.push(next);
        }
    }
    tokens
}

struct Golden {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
}

fn stories() -> Option<(PathBuf, Vec<Golden>)> {
    let folder = shared("models/stories260K")?;
    let text = std::fs::read(folder.join("golden_greedy.json")).unwrap();
    let list: Vec<serde_json::Value> = serde_json::from_slice(&text).unwrap();
    let ids = |value: &serde_json::Value| serde_json::from_value::<Vec<u32>>(value.clone()).unwrap();
    let golden = |entry: &serde_json::Value| Golden {
        prompt: if entry["prompt_ids"].is_null() { vec![1] } else { ids(&entry["prompt_ids"]) },
        tokens: ids(&entry["token_ids"]),
    };
    Some((folder, list.iter().map(golden).collect()))
}

#[test]
fn stories260k_says_its_golden_tokens_from_f32_and_f16_in_any_chunks_and_blocks() {
    let Some((folder, goldens)) = stories() else { return };
    let straight: Vec<u32> = (0..32).collect();
    let scattered: Vec<u32> = (0..32).map(|i| (i * 7 + 3) % 32).collect();
    for name in ["stories260K-f32.gguf", "stories260K-f16.gguf"] {
        for arithmetic in arithmetics() {
            let mut engine = load_with(&folder.join(name), arithmetic);
            for golden in &goldens {
                for (chunk, blocks) in [(1024, &straight), (1, &scattered), (5, &scattered)] {
                    let got = greedy(&mut engine, &golden.prompt, golden.tokens.len(), chunk, blocks);
                    assert_eq!(got, golden.tokens, "{name} by {arithmetic:?}, chunks of {chunk}");
                }
            }
        }
    }
}

#[test]
fn rows_of_a_ragged_batch_say_what_each_says_alone() {
    let Some((folder, goldens)) = stories() else { return };
    let mut engine = load(&folder.join("stories260K-f32.gguf"));
    let blocks: [Vec<u32>; 2] = [(0..32).step_by(2).collect(), (1..32).step_by(2).collect()];
    let mut tokens: Vec<Vec<u32>> = goldens.iter().map(|golden| golden.prompt.clone()).collect();
    let mut done = [0, 0];
    while tokens.iter().zip(&goldens).any(|(tokens, golden)| tokens.len() < golden.tokens.len()) {
        let open: Vec<usize> = (0..2).filter(|i| tokens[*i].len() < goldens[*i].tokens.len()).collect();
        let rows = open.iter().map(|i| row(*i as u64, &tokens[*i][done[*i]..], done[*i], &blocks[*i])).collect();
        for (i, next) in open.iter().zip(step(&mut engine, rows)) {
            done[*i] = tokens[*i].len();
            tokens[*i].push(next);
        }
    }
    for (tokens, golden) in tokens.iter().zip(&goldens) {
        assert_eq!(*tokens, golden.tokens);
    }
}

#[test]
fn a_copied_block_continues_like_its_original() {
    let Some((folder, goldens)) = stories() else { return };
    let mut engine = load(&folder.join("stories260K-f32.gguf"));
    let all = &goldens[0].tokens;
    step(&mut engine, vec![row(0, &all[..BLOCK], 0, &[0])]);
    let copies = vec![BlockCopy { from: BlockId(0), to: BlockId(9) }];
    let rows = vec![row(1, &all[BLOCK..BLOCK + 1], BLOCK, &[9, 4])];
    let outputs = engine.step(&Batch { copies, rows }).unwrap();
    let RowOutput::Logits(logits) = &outputs.rows[0] else { panic!("no logits") };
    assert_eq!(argmax(logits), all[BLOCK + 1]);
}

#[test]
fn a_batch_that_breaks_the_contract_is_refused() {
    let Some((folder, _)) = stories() else { return };
    let mut engine = load(&folder.join("stories260K-f32.gguf"));
    let blocks = engine.capabilities().blocks as u32;
    let good = || row(0, &[1, 2], 0, &[0]);
    let bad = [
        vec![Row { tokens: vec![], ..good() }],
        vec![Row { tokens: vec![512], ..good() }],
        vec![Row { start: BLOCK - 1, ..good() }],
        vec![Row { start: 511, ..good() }],
        vec![Row { blocks: vec![BlockId(blocks)], ..good() }],
        vec![good(), Row { sequence: SequenceId(1), ..good() }],
        (0..5).map(|i| row(i, &[1], 0, &[i as u32])).collect(),
    ];
    for rows in bad {
        let result = engine.step(&Batch { copies: Vec::new(), rows: rows.clone() });
        assert!(matches!(result, Err(EngineError::BadBatch(_))), "{rows:?}");
    }
    assert_eq!(step(&mut engine, vec![good()]).len(), 1);
}

#[test]
fn a_cancelled_load_stops_at_the_next_tensor_and_a_foreign_model_is_named() {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/demo-model/demo-f16.gguf"));
    let header = Header::read(path, &Limits::default()).unwrap();
    let defaults = options(Arithmetic::Auto(KernelOptions::default()));
    let mut told = 0;
    let result = CandleEngine::load(path, &header, &defaults, &mut |_| {
        told += 1;
        if told == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(result, Err(LoadError::Cancelled)) && told == 3);
    let mut foreign = header.clone();
    foreign.metadata.insert("general.architecture".into(), model_files::gguf::Value::String("mamba".into()));
    let error = CandleEngine::load(path, &foreign, &defaults, &mut |_| ControlFlow::Continue(())).err().unwrap();
    assert!(error.to_string().contains("'mamba'"), "{error}");
    let mut short = header;
    short.tensors.retain(|tensor| tensor.name != "blk.1.ffn_up.weight");
    let error = CandleEngine::load(path, &short, &defaults, &mut |_| ControlFlow::Continue(())).err().unwrap();
    assert!(error.to_string().contains("blk.1.ffn_up.weight"), "{error}");
}

#[test]
fn the_demo_model_says_what_llama_cpp_says_in_every_type_of_weights() {
    let repository = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    for (model, golden) in [
        ("examples/demo-model/demo-f16.gguf", "demo-f16.json"),
        ("examples/demo-model/demo-q8_0.gguf", "demo-q8_0.json"),
        ("tests/goldens/demo-q4_k_m.gguf", "demo-q4_k_m.json"),
    ] {
        let golden = repository.join("tests/goldens").join(golden);
        let list: Vec<serde_json::Value> = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
        let blocks: Vec<u32> = (0..64).rev().collect();
        assert!(list.len() >= 6);
        for arithmetic in arithmetics() {
            let mut engine = load_with(&repository.join(model), arithmetic);
            for entry in &list {
                let ids = |key: &str| serde_json::from_value::<Vec<u32>>(entry[key].clone()).unwrap();
                let (prompt, wanted) = (ids("prompt_ids"), ids("token_ids"));
                let got = greedy(&mut engine, &prompt, prompt.len() + wanted.len(), 1024, &blocks);
                assert_eq!(got[prompt.len()..], wanted, "{model} by {arithmetic:?}: {}", entry["question"]);
            }
        }
    }
}
