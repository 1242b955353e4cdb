//! `harness = "fake"`: the paced oracle engine, for tests of everything around an engine.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use inference::engine::{Batch, BlockId, Capabilities, Engine, EngineError, Outputs, RowOutput};
use inference::{FAKE_END_TOKEN, FakeEngine, Pooling, fake_token_bytes};
use wire::output::Style;
use words::{Code, Error, Fingerprint};

use super::script::Scripts;
use super::{
    ChatInput, ChatText, Harness, LoadFailure, LoadSpec, Loaded, LoadedModel, Progress, Prompt, Sizes, Spelled,
    told_apart,
};
use crate::options::FakeOptions;
use crate::sampling::Defaults;

const BLOCK_TOKENS: usize = 32;
/// The logit of what a script says next; all others have 0.
const SURE: f32 = 50.0;

pub(crate) struct FakeHarness {
    options: FakeOptions,
    failures_left: AtomicU32,
}

impl FakeHarness {
    pub(crate) fn new(options: FakeOptions) -> Self {
        FakeHarness { options, failures_left: AtomicU32::new(options.failing_loads) }
    }
}

impl Harness for FakeHarness {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn check(&self, _spec: &LoadSpec) -> Result<(), Error> {
        Ok(())
    }

    fn estimate(&self, spec: &LoadSpec, _sizes: Sizes) -> Result<u64, LoadFailure> {
        let own = (self.options.memory_mib as u64) << 20;
        Ok(if spec.memory > 0 { spec.memory } else { own })
    }

    fn load(&self, spec: &LoadSpec, sizes: Sizes, progress: &dyn Progress) -> Result<Loaded, LoadFailure> {
        let begun = Instant::now();
        let whole = Duration::from_millis(self.options.load_ms);
        while begun.elapsed() < whole {
            let permille = begun.elapsed().as_millis() * 1000 / whole.as_millis().max(1);
            if progress.report(permille as u32).is_break() {
                return Err(Error::new(Code::Conflict, "the load was cancelled").into());
            }
            std::thread::sleep(Duration::from_millis(10).min(whole));
        }
        let take = |left: u32| left.checked_sub(1);
        if self.failures_left.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).is_ok() {
            let error = Error::new(Code::UpstreamFailed, "the fake engine was told to fail this load");
            return Err(LoadFailure { error, transient: true });
        }
        let context_length = spec.context(self.options.context_length);
        let engine = FakeEngine::new(Capabilities {
            max_batch: sizes.max_running,
            max_step_tokens: sizes.max_running + sizes.prefill_tokens,
            block_tokens: BLOCK_TOKENS,
            blocks: context_length.div_ceil(BLOCK_TOKENS) * sizes.max_running,
            context_length,
            vocab_size: 0,
            width: 0,
        });
        // All fake engines of one context length continue each other's streams, whatever their model is called.
        let print = Fingerprint(*blake3::hash(format!("fake {context_length}").as_bytes()).as_bytes());
        tracing::info!(model = %spec.model_id, step_ms = self.options.step_ms, "fake engine ready");
        let print = told_apart(print, spec.overrides);
        let style = Style { takes_tools: true, ..Style::default() }.with(spec.overrides);
        Ok(Loaded::Local(Box::new(LoadedModel {
            engine: Box::new(Paced { engine, scripts: Scripts::new(BLOCK_TOKENS), options: self.options }),
            text: Arc::new(FakeText(style)),
            token_bytes: Arc::new(fake_token_bytes()),
            end_tokens: vec![FAKE_END_TOKEN],
            defaults: Defaults::default(),
            pooling: Ok(Pooling::Mean),
            continue_fingerprint: print,
            exact_fingerprint: print,
            device: "none".into(),
            memory: self.estimate(spec, sizes)?,
        })))
    }
}

/// What a panic leaves that nobody can catch for good: whoever takes it panics too, and his thread ends.
struct PanicsAgain;

impl Drop for PanicsAgain {
    fn drop(&mut self) {
        panic!("the fake engine was told to lose its thread on this prompt");
    }
}

/// The fake engine at a configured pace; where a prompt has a script, it says that.
struct Paced {
    engine: FakeEngine,
    scripts: Scripts,
    options: FakeOptions,
}

impl Engine for Paced {
    fn capabilities(&self) -> Capabilities {
        self.engine.capabilities()
    }

    fn step(&mut self, batch: &Batch) -> Result<Outputs, EngineError> {
        let begins_with = |byte: u8| {
            let token = u32::from(byte);
            byte > 0 && batch.rows.iter().any(|row| row.start == 0 && row.tokens.contains(&token))
        };
        if begins_with(self.options.crash_byte) {
            tracing::error!("the fake engine was told to crash on this prompt");
            std::process::abort();
        }
        if begins_with(self.options.lost_byte) {
            std::panic::panic_any(PanicsAgain);
        }
        let begins = batch.rows.iter().any(|row| row.start == 0);
        let pause = self.options.step_ms + if begins { self.options.prefill_ms } else { 0 };
        if pause > 0 {
            std::thread::sleep(Duration::from_millis(pause));
        }
        let scripts = self.scripts.step(batch);
        let mut outputs = self.engine.step(batch)?;
        for (output, said) in outputs.rows.iter_mut().zip(scripts) {
            match (output, said.as_slice()) {
                (RowOutput::Token(token), [Some(said)]) => *token = *said,
                (RowOutput::Logits(logits), said) => {
                    let vocabulary = self.engine.capabilities().vocab_size;
                    for (logits, said) in logits.chunks_exact_mut(vocabulary).zip(said) {
                        let Some(said) = said else { continue };
                        let says = |id: usize| if id == *said as usize { SURE } else { 0.0 };
                        logits.iter_mut().enumerate().for_each(|(id, logit)| *logit = says(id));
                    }
                }
                _ => {}
            }
        }
        Ok(outputs)
    }

    fn block_bytes(&self) -> usize {
        self.engine.block_bytes()
    }

    fn export_block(&mut self, block: BlockId) -> Result<Vec<u8>, EngineError> {
        self.engine.export_block(block)
    }

    fn import_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<(), EngineError> {
        self.engine.import_block(block, bytes)
    }
}

/// Prompts as bytes: what is given besides messages, then `role: content` a line.
struct FakeText(Style);

impl ChatText for FakeText {
    fn encode(&self, text: &str, _special: bool) -> Result<Vec<u32>, Error> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn spell(&self, id: u32) -> Spelled<'_> {
        match u8::try_from(id) {
            Ok(byte) => Spelled { bytes: Cow::Owned(vec![byte]), shown: true },
            Err(_) if id == FAKE_END_TOKEN => Spelled { bytes: Cow::Borrowed(b"<end>"), shown: false },
            Err(_) => Spelled { bytes: Cow::Borrowed(b""), shown: false },
        }
    }

    fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| self.spell(*id).bytes.into_owned()).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn embedding_end(&self) -> Option<u32> {
        None
    }

    fn prompt(&self, input: &ChatInput<'_>, _now: u64) -> Result<Prompt, Error> {
        let mut text = String::new();
        for (name, value) in input.variables {
            text.push_str(&format!("{name}={value}\n"));
        }
        for tool in input.tools {
            text.push_str(&format!("{tool}\n"));
        }
        for message in input.messages {
            for field in ["role", "content"] {
                text.push_str(message[field].as_str().unwrap_or_default());
                text.push(if field == "role" { ':' } else { '\n' });
            }
        }
        Ok(Prompt { ids: text.bytes().map(u32::from).collect(), opening: self.0.opening(&text) })
    }

    fn style(&self) -> Style {
        self.0
    }
}
