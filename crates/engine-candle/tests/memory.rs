//! What a model is said to take before its load, what it counts after it, and what the system sees of it.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::path::{Path, PathBuf};

use engine_candle::{Arithmetic, KernelOptions, KvType, Options, memory_needed};
use inference::engine::{BlockId, Engine};
use model_files::gguf::{Header, Limits};
use support::{load, options};

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * 4096
}

fn models() -> [PathBuf; 3] {
    let repository = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    [
        repository.join("examples/demo-model/demo-f16.gguf"),
        repository.join("examples/demo-model/demo-q8_0.gguf"),
        repository.join("tests/goldens/demo-q4_k_m.gguf"),
    ]
}

// One test, so that nothing else of this process takes memory meanwhile.
#[test]
fn what_is_told_before_a_load_is_what_it_takes() {
    let kernels = KernelOptions { threads: 1, kv: KvType::F16, level: None };
    for arithmetic in [Arithmetic::Auto(kernels), Arithmetic::Candle] {
        for path in models() {
            let options = Options { arithmetic, kv_bytes: 96 << 20, max_batch: 512, ..options(32) };
            let header = Header::read(&path, &Limits::default()).unwrap();
            let told = memory_needed(&header, &options).unwrap();
            let before = resident();
            let mut engine = load(&path, &options).unwrap();
            let counted = engine.memory_bytes();
            assert!(told.abs_diff(counted) < counted / 50, "{}: told {told}, counted {counted}", path.display());
            // The system gives memory when it is written: all of the keys and values.
            let block = vec![1; engine.block_bytes()];
            let blocks = engine.capabilities().blocks as u32;
            (0..blocks).for_each(|number| engine.import_block(BlockId(number), &block).unwrap());
            let grown = resident() - before;
            assert!(counted > 90 << 20, "{counted}");
            assert!(grown.abs_diff(counted) < counted / 5, "{}: counted {counted}, grown {grown}", path.display());
        }
    }
}
