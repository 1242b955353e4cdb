//! What a real engine leaves and another takes back, over memory and over disk: the same bits as of a cold run.
#![allow(clippy::unwrap_used)]

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use engine_candle::{Arithmetic, CandleEngine, DeviceChoice, KernelOptions, KvType, Options};
use inference::engine::{Engine, RowOutput};
use inference::{EventKind, Limits, RequestKey, Scheduler, Submission, TokenBytes, Usage};
use kv_store::{DiskOptions, KvStore};
use model_files::gguf::{Header, Limits as FileLimits};
use service::clock::Clock;
use service::metrics::Registry;
use words::{Fingerprint, Moment};

use super::Keeper;
use crate::metrics::Metrics;

const BLOCK_TOKENS: usize = 32;
const ANSWER: usize = 8;

/// An engine on the demo model, its scheduler, and what keeps its KV in `store`.
struct Life {
    engine: CandleEngine,
    scheduler: Scheduler,
    keeper: Keeper,
}

/// Each token of an answer, with the bits of all logits it was chosen from.
type Bits = Vec<(u32, Vec<u32>)>;

impl Life {
    fn begin(store: &KvStore, threads: usize) -> Life {
        let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/demo-model/demo-f16.gguf"));
        let header = Header::read(path, &FileLimits::default()).unwrap();
        let options = Options {
            device: DeviceChoice::Cpu,
            arithmetic: Arithmetic::Auto(KernelOptions { threads, kv: KvType::F16, level: None }),
            kv_bytes: 32 << 20,
            block_tokens: BLOCK_TOKENS,
            max_batch: 2,
            max_step_tokens: 128,
            context_length: Some(512),
        };
        let engine = CandleEngine::load(path, &header, &options, &mut |_| ControlFlow::Continue(())).unwrap();
        let capabilities = engine.capabilities();
        let limits = Limits {
            max_running: 2,
            max_waiting: 4,
            max_wait: Duration::from_secs(3600),
            prefill_tokens: 64,
            max_choices: 1,
            prefix_cache: true,
        };
        let table = TokenBytes::new((0..capabilities.vocab_size).map(|_| b"x".to_vec()));
        let keeper = Keeper {
            store: store.clone(),
            of: Fingerprint([1; 32]),
            block_tokens: BLOCK_TOKENS,
            leave_max: Duration::from_secs(60),
            clock: Clock::start(),
            metrics: Metrics::new(&Registry::new()).unwrap().model("m"),
        };
        Life { engine, scheduler: Scheduler::new(capabilities, limits, Arc::new(table)), keeper }
    }

    /// Asks as a worker does: what the disk has comes to memory, from there to the engine, and the rest is computed.
    fn ask(&mut self, prompt: &[u32]) -> (Bits, Usage) {
        let submission = Submission::new(RequestKey(1), prompt, ANSWER);
        self.keeper.prefetch(prompt, &submission.salt);
        self.keeper.restore(&submission, &mut self.scheduler, &mut self.engine);
        self.scheduler.submit(Moment::ZERO, submission).unwrap();
        let (mut bits, mut events) = (Bits::new(), Vec::new());
        while let Some(batch) = self.scheduler.plan(Moment::ZERO, &mut events) {
            let outputs = self.engine.step(&batch).unwrap();
            let logits = outputs.rows.iter().find_map(|row| match row {
                RowOutput::Logits(logits) => Some(logits.iter().map(|logit| logit.to_bits()).collect::<Vec<u32>>()),
                _ => None,
            });
            self.scheduler.complete(&batch, outputs, &mut events);
            for event in events.drain(..) {
                match event.kind {
                    EventKind::Token { id, .. } => bits.push((id, logits.clone().unwrap())),
                    EventKind::Done(usage) => return (bits, usage),
                    _ => {}
                }
            }
        }
        panic!("the answer does not end");
    }

    fn end(mut self) {
        self.keeper.leave(&self.scheduler, &mut self.engine);
    }
}

#[test]
fn the_logits_after_restored_blocks_are_bitwise_those_of_a_cold_run() {
    let folder = tempfile::tempdir().unwrap();
    let disk = DiskOptions { folder: folder.path().into(), bytes_max: 1 << 30, age_max: Duration::from_secs(86_400) };
    let now = Clock::start().unix_seconds();
    let prompt: Vec<u32> = (0..300).map(|i| (i * 7 + i / 9) % 250).collect();
    let whole = (prompt.len() - 1) / BLOCK_TOKENS * BLOCK_TOKENS;

    let store = KvStore::new(1 << 30);
    store.open_disk(disk.clone(), now).unwrap();
    let mut first = Life::begin(&store, 1);
    let (cold, usage) = first.ask(&prompt);
    assert!(usage.cached_tokens == 0 && cold.len() == ANSWER && cold[0].1.len() > 250, "{usage:?}");
    first.end();
    assert!(store.in_memory() && !store.on_disk());

    let mut swapped = Life::begin(&store, 2);
    let (bits, usage) = swapped.ask(&prompt);
    assert_eq!(usage.cached_tokens, whole, "after a swap");
    assert!(bits == cold, "the bits after a swap");
    swapped.end();
    assert!(store.spill(now, || true).written >= whole / BLOCK_TOKENS);
    drop(store);

    let store = KvStore::new(1 << 30);
    store.open_disk(disk, now).unwrap();
    let mut restarted = Life::begin(&store, 1);
    let (bits, usage) = restarted.ask(&prompt);
    assert_eq!(usage.cached_tokens, whole, "after a restart");
    assert!(bits == cold, "the bits after a restart");
}
