//! What the engine promises its caller: refusals in words, copies, cancelled loads, bounded memory.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::ops::ControlFlow;
use std::path::Path;

use engine_candle::{CandleEngine, LoadError, Options};
use inference::engine::{Batch, BlockCopy, BlockId, Engine, EngineError, Row, RowOutput, Wanted};
use model_files::gguf::{Builder, Header, Limits, TensorType, Value};
use support::model::{Model, Shape};
use support::{largest_difference, load, logits, options, row, step};

fn small() -> Model {
    Model::random(Shape { layers: 2, context: 64, ..Shape::QWEN3 }, TensorType::F32, 3)
}

fn with_file<T>(model: &Model, run: impl FnOnce(&Path) -> T) -> T {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    model.write(&path);
    run(&path)
}

fn engine() -> CandleEngine {
    with_file(&small(), |path| {
        // Two layers of two heads of 16, keys and values, f32: 512 bytes a token; 12 blocks of 8 tokens.
        load(path, &Options { kv_bytes: 12 * 8 * 512, max_batch: 3, max_step_tokens: 20, ..options(8) }).unwrap()
    })
}

fn refused(rows: Vec<Row>, copies: Vec<BlockCopy>, words: &str) {
    match engine().step(&Batch { copies, rows }) {
        Err(EngineError::BadBatch(said)) => assert!(said.contains(words), "{said}"),
        other => panic!("{words}: {other:?}"),
    }
}

#[test]
fn every_breach_of_the_contract_is_a_bad_batch() {
    let ok = |sequence: u64| row(sequence, &[1, 2], 0, &[sequence as u32]);
    refused((0..4).map(ok).collect(), vec![], "too many");
    refused(vec![row(1, &[1; 21], 0, &[0, 1, 2])], vec![], "too many");
    refused(vec![row(1, &[], 0, &[0])], vec![], "has 0 tokens");
    refused(vec![row(1, &[1, 97], 0, &[0])], vec![], "outside the vocabulary");
    refused(vec![row(1, &[1], 64, &[0, 1, 2, 3, 4, 5, 6, 7, 8])], vec![], "tokens from position");
    refused(vec![row(1, &[1], usize::MAX, &[0])], vec![], "tokens from position");
    refused(vec![row(1, &[1], 8, &[0])], vec![], "too few blocks");
    refused(vec![row(1, &[1], 0, &[])], vec![], "too few blocks");
    refused(vec![row(1, &[1], 0, &[12])], vec![], "does not exist");
    refused(vec![row(1, &[1], 0, &[5]), row(2, &[1], 0, &[5])], vec![], "used twice");
    refused(vec![row(1, &[1; 12], 0, &[5, 5])], vec![], "used twice");
    refused(vec![row(1, &[1], 0, &[5]), row(2, &[1], 8, &[5, 6])], vec![], "used twice");
    refused(vec![row(7, &[1], 0, &[1]), row(7, &[1], 0, &[2])], vec![], "another row");
    refused(vec![ok(1)], vec![BlockCopy { from: BlockId(0), to: BlockId(12) }], "a copy");
    refused(vec![ok(1)], vec![BlockCopy { from: BlockId(12), to: BlockId(0) }], "a copy");
}

#[test]
fn a_refused_batch_changes_nothing() {
    let mut engine = engine();
    let before = step(&mut engine, vec![row(1, &[4, 5, 6], 0, &[0])]);
    let copies = vec![BlockCopy { from: BlockId(1), to: BlockId(0) }];
    assert!(engine.step(&Batch { copies, rows: vec![row(1, &[97], 3, &[0])] }).is_err());
    step(&mut engine, vec![row(1, &[7], 3, &[0])]);
    let mut fresh = self::engine();
    assert_eq!(step(&mut fresh, vec![row(1, &[4, 5, 6], 0, &[0])]), before);
    step(&mut fresh, vec![row(1, &[7], 3, &[0])]);
    assert_eq!(step(&mut engine, vec![row(1, &[8], 4, &[0])]), step(&mut fresh, vec![row(1, &[8], 4, &[0])]));
}

#[test]
fn outputs_come_only_where_they_are_wanted() {
    let mut engine = engine();
    let quiet = Row { wanted: Wanted::Nothing, ..row(2, &[3, 4], 0, &[1]) };
    let outputs = step(&mut engine, vec![row(1, &[1], 0, &[0]), quiet.clone(), row(3, &[1], 0, &[2])]);
    assert_eq!(outputs[1], RowOutput::Nothing);
    assert_eq!(logits(&outputs[0]).len(), 97);
    assert!(largest_difference(logits(&outputs[0]), logits(&outputs[2])) < 1e-5);
    assert_eq!(step(&mut engine, vec![quiet]), [RowOutput::Nothing]);
    assert_eq!(step(&mut engine, vec![]), []);
}

#[test]
fn a_copied_block_serves_as_the_original() {
    let mut engine = engine();
    let prefix: Vec<u32> = (1..=11).collect();
    step(&mut engine, vec![row(1, &prefix, 0, &[3, 9])]);
    let expected = step(&mut engine, vec![row(1, &[50], 11, &[3, 9])]);
    // The full block is shared, the half-full one copied, in one step with the row that uses it; then a chain.
    let copy = |from, to| BlockCopy { from: BlockId(from), to: BlockId(to) };
    let rows = vec![row(2, &[50], 11, &[3, 4]), row(1, &[60], 12, &[3, 9])];
    let shared = engine.step(&Batch { copies: vec![copy(9, 4)], rows }).unwrap().rows;
    assert!(largest_difference(logits(&shared[0]), logits(&expected[0])) < 1e-5);
    let rows = vec![row(3, &[50], 11, &[7, 6])];
    let copies = vec![copy(3, 5), copy(5, 7), copy(4, 4), copy(4, 6)];
    let chained = engine.step(&Batch { copies, rows }).unwrap().rows;
    assert!(largest_difference(logits(&chained[0]), logits(&expected[0])) < 1e-5);
}

#[test]
fn equal_batches_give_equal_bytes() {
    let rows = || vec![row(1, &[1, 2, 3, 4], 0, &[0]), row(2, &[9, 8], 0, &[5])];
    assert_eq!(step(&mut engine(), rows()), step(&mut engine(), rows()));
}

#[test]
fn a_cancelled_load_stops_at_that_tensor() {
    with_file(&small(), |path| {
        let header = Header::read(path, &Limits::default()).unwrap();
        for stop in [1, 7, header.tensors.len()] {
            let mut calls = 0;
            let result = CandleEngine::load(path, &header, &options(8), &mut |_| {
                calls += 1;
                if calls == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            assert!(matches!(result, Err(LoadError::Cancelled)) && calls == stop);
        }
        let mut last = None;
        let mut note = |progress| {
            last = Some(progress);
            ControlFlow::Continue(())
        };
        CandleEngine::load(path, &header, &options(8), &mut note).unwrap();
        assert!(last.is_some_and(|last| last.bytes_done == last.bytes));
    });
}

fn refused_load(keep: impl Fn(&str) -> bool, extra: impl FnOnce(&mut Builder<'_>), words: &str) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    small().write_with(&path, keep, extra);
    let said = load(&path, &options(8)).err().unwrap().to_string();
    assert!(said.contains(words), "{said}");
}

fn zeros(builder: &mut Builder<'_>, name: &str, shape: &[u64]) {
    let bytes = 4 * shape.iter().product::<u64>();
    builder.tensor(name, shape, TensorType::F32, Box::new(move |out| out.write_all(&vec![0; bytes as usize])));
}

#[test]
fn a_file_that_does_not_fit_its_architecture_is_refused_by_name() {
    let without = |gone: &'static str| move |name: &str| name != gone;
    for name in ["token_embd.weight", "output_norm.weight", "blk.1.ffn_up.weight", "blk.0.attn_k_norm.weight"] {
        refused_load(without(name), |_| (), &format!("'{name}' is absent"));
    }
    let shape = |b: &mut Builder<'_>| zeros(b, "blk.1.ffn_up.weight", &[80, 48]);
    refused_load(without("blk.1.ffn_up.weight"), shape, "'blk.1.ffn_up.weight' has the shape");
    let flat = |b: &mut Builder<'_>| zeros(b, "token_embd.weight", &[48]);
    refused_load(without("token_embd.weight"), flat, "'token_embd.weight' has the shape");
    // A tensor that nothing reads would change the answers in silence.
    for (name, length) in [("blk.0.attn_output.bias", 48), ("blk.1.ffn_up.bias", 80), ("output.bias", 97)] {
        refused_load(|_| true, |b| zeros(b, name, &[length]), &format!("'{name}' is not part"));
    }
}

#[test]
fn metadata_that_makes_no_sense_is_refused_by_key() {
    let refused = |key: &'static str, value: Value, words: &str| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        small().write(&path);
        let mut header = Header::read(&path, &Limits::default()).unwrap();
        header.metadata.insert(key.into(), value);
        let result = CandleEngine::load(&path, &header, &options(8), &mut |_| ControlFlow::Continue(()));
        let said = result.err().unwrap().to_string();
        assert!(said.contains(words), "{key}: {said}");
    };
    let big = || Value::U32(1 << 20);
    refused("general.architecture", Value::String("bert".into()), "supported are");
    refused("qwen3.block_count", Value::U32(0), "from 1 to");
    refused("qwen3.block_count", Value::U32(1), "'blk.1.");
    refused("qwen3.block_count", Value::U32(3), "'blk.2.");
    refused("qwen3.block_count", Value::U64(1 << 40), "from 1 to");
    refused("qwen3.block_count", big(), "KV block needs");
    refused("qwen3.attention.head_count", Value::U32(0), "from 1 to");
    refused("qwen3.attention.head_count", Value::Integers(vec![6, 6]), "one whole number");
    refused("qwen3.attention.head_count_kv", Value::Integers(vec![2, 2]), "one whole number");
    refused("qwen3.attention.head_count_kv", Value::U32(4), "does not fit");
    refused("qwen3.attention.key_length", Value::U32(15), "no even width");
    refused("qwen3.attention.value_length", Value::U32(8), "differs from the key length");
    refused("qwen3.rope.dimension_count", Value::U32(8), "differs from the head's width");
    refused("qwen3.rope.scaling.type", Value::String("yarn".into()), "supported are none and linear");
    refused("qwen3.rope.scaling.factor", Value::F32(f32::NAN), "impossible");
    refused("qwen3.rope.freq_base", Value::F32(f32::NAN), "impossible");
    refused("qwen3.rope.freq_base", Value::F32(f32::INFINITY), "impossible");
    refused("qwen3.attention.layer_norm_rms_epsilon", Value::F32(-1.0), "impossible");
    refused("qwen3.expert_count", Value::U32(8), "mixture of experts");
}

#[test]
fn counts_whose_product_overflows_are_refused() {
    with_file(&small(), |path| {
        let mut header = Header::read(path, &Limits::default()).unwrap();
        for key in ["block_count", "attention.head_count", "attention.head_count_kv", "attention.key_length"] {
            header.metadata.insert(format!("qwen3.{key}"), Value::U32(1 << 20));
        }
        header.metadata.insert("qwen3.attention.value_length".into(), Value::U32(1 << 20));
        let result = CandleEngine::load(path, &header, &options(32), &mut |_| ControlFlow::Continue(()));
        assert!(matches!(result, Err(LoadError::Memory { .. })));
    });
}

#[test]
fn settings_outside_their_limits_are_refused_by_name() {
    let refused = |change: &dyn Fn(&mut Options), words: &str| {
        let mut options = options(8);
        change(&mut options);
        let said = with_file(&small(), |path| load(path, &options)).err().unwrap().to_string();
        assert!(said.contains(words), "{said}");
    };
    refused(&|o| o.block_tokens = 0, "block_tokens must be");
    refused(&|o| o.max_batch = 0, "max_batch must be");
    refused(&|o| o.max_step_tokens = 1 << 30, "max_step_tokens must be");
    refused(&|o| o.context_length = Some(0), "context_length must be");
    refused(&|o| o.kv_bytes = 100, "KV block needs");
}

#[test]
fn capabilities_follow_options_and_memory() {
    with_file(&small(), |path| {
        let tight = load(path, &Options { kv_bytes: 3 * 8 * 512 + 1, ..options(8) }).unwrap().capabilities();
        assert_eq!((tight.blocks, tight.context_length, tight.vocab_size), (3, 24, 97));
        let roomy = load(path, &Options { context_length: Some(40), ..options(8) }).unwrap().capabilities();
        assert_eq!((roomy.blocks, roomy.context_length), (5 * 8, 40));
    });
}

#[test]
fn a_file_cut_after_its_header_was_read_is_an_error() {
    with_file(&small(), |path| {
        let header = Header::read(path, &Limits::default()).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(header.data_offset + 100).unwrap();
        let result = CandleEngine::load(path, &header, &options(8), &mut |_| ControlFlow::Continue(()));
        assert!(matches!(result, Err(LoadError::Io { .. })));
    });
}
