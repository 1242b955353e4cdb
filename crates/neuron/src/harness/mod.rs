//! What runs a model. A harness turns a load into an engine and the text around it.

#[cfg(feature = "candle")]
mod candle;
#[cfg(feature = "fake")]
mod fake;
mod process;
#[cfg(feature = "fake")]
mod script;

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;

use inference::engine::Engine;
use inference::{Pooling, TokenBytes};
use serde_json::{Map, Value};
use service::clock::Clock;
use service::ring::LogRing;
use wire::output::{Opening, Overrides, Style};
use words::{Capabilities, Code, Error, Fingerprint};

use crate::options::{EndpointName, Options, ProcessOptions, SamplingOptions};
use crate::process::Supervised;
use crate::sampling::Defaults;

/// What a load names.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LoadSpec {
    pub(crate) model_id: words::ModelId,
    pub(crate) harness: String,
    /// Where its files are; for those of a hub only once they are fetched.
    pub(crate) path: Option<PathBuf>,
    /// Where its files come from, when that is a hub.
    pub(crate) reference: Option<hub::Reference>,
    pub(crate) quant: Option<String>,
    pub(crate) device: Option<String>,
    /// What its operator says of its calls and its reasoning.
    pub(crate) overrides: Overrides,
    /// How its external engine is started.
    pub(crate) process: Option<Arc<ProcessOptions>>,
    /// Longest context served, in tokens; 0: what its harness and the model itself allow.
    pub(crate) context_length: usize,
    /// What its operator says of its memory, in bytes; 0: nothing.
    pub(crate) memory: u64,
    /// What its operator says of its sampling.
    pub(crate) sampling: SamplingOptions,
    /// What it is asked before it serves, and how many tokens of the answer are waited for.
    pub(crate) warmup: (String, usize),
}

impl LoadSpec {
    /// Returns what a gateway needs to know of the model.
    pub(crate) fn capabilities(&self) -> Capabilities {
        match &self.process {
            None => Capabilities { chat: true, continuation: true },
            // What it says is no tokens of ours: nobody else can go on from there.
            Some(process) => {
                Capabilities { chat: process.endpoints.contains(&EndpointName::Chat), continuation: false }
            }
        }
    }

    /// Bounds a context by what its operator says.
    pub(crate) fn context(&self, most: usize) -> usize {
        if self.context_length == 0 { most } else { self.context_length.min(most) }
    }
}

/// What a harness needs from the scheduler's settings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) max_running: usize,
    pub(crate) prefill_tokens: usize,
}

impl Sizes {
    pub(crate) fn of(options: &Options) -> Self {
        let scheduler = &options.scheduler;
        Sizes { max_running: scheduler.max_running, prefill_tokens: scheduler.prefill_tokens }
    }
}

/// How a load reports its progress, and hears that nobody wants it any more.
pub(crate) trait Progress: Sync {
    /// Share that is done, in thousandths. `Break` means: stop at once.
    fn report(&self, permille: u32) -> std::ops::ControlFlow<()>;

    /// Returns the model's log, for what an engine writes.
    fn log(&self) -> LogRing;
}

/// Why a load failed.
#[derive(Debug)]
pub(crate) struct LoadFailure {
    pub(crate) error: Error,
    /// Only the network, or a file system behind one, was at fault: a later try may succeed.
    pub(crate) transient: bool,
}

impl From<Error> for LoadFailure {
    fn from(error: Error) -> Self {
        LoadFailure { error, transient: false }
    }
}

/// What a chat template is given.
pub(crate) struct ChatInput<'a> {
    pub(crate) messages: &'a [Value],
    /// Definitions of tools; none is "no tools".
    pub(crate) tools: &'a [Value],
    pub(crate) variables: &'a Map<String, Value>,
}

/// A prompt, ready to run.
pub(crate) struct Prompt {
    pub(crate) ids: Vec<u32>,
    /// How the answer begins.
    pub(crate) opening: Opening,
}

/// Text around an engine: chat template and tokenizer.
pub(crate) trait ChatText: Send + Sync {
    /// Renders a chat and tokenises it; `now` is what the template sees as the time, in Unix seconds.
    fn prompt(&self, input: &ChatInput<'_>, now: u64) -> Result<Prompt, Error>;

    /// How the model reasons and calls tools.
    fn style(&self) -> Style;

    /// Tokenises a text as it is; with `special` the begin token comes first where the model wants one.
    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, Error>;

    /// Returns a token by itself; nothing for an id outside the vocabulary.
    fn spell(&self, id: u32) -> Spelled<'_>;

    /// Returns the text of tokens; control tokens are spelled out.
    fn decode(&self, ids: &[u32]) -> String;

    /// Returns the token that ends a text to embed, where the model wants one.
    fn embedding_end(&self) -> Option<u32>;
}

/// A token by itself.
pub(crate) struct Spelled<'a> {
    /// What it adds to a text, or the name of a control token.
    pub(crate) bytes: Cow<'a, [u8]>,
    /// Whether it is part of the text.
    pub(crate) shown: bool,
}

/// A model in memory.
pub(crate) struct LoadedModel {
    pub(crate) engine: Box<dyn Engine>,
    pub(crate) text: Arc<dyn ChatText>,
    /// What tokens add to the output; those of its style's marks too, though they may be control tokens.
    pub(crate) token_bytes: Arc<TokenBytes>,
    pub(crate) end_tokens: Vec<u32>,
    pub(crate) defaults: Defaults,
    /// How embeddings are pooled; in words what can't be done.
    pub(crate) pooling: Result<Pooling, String>,
    pub(crate) continue_fingerprint: Fingerprint,
    pub(crate) exact_fingerprint: Fingerprint,
    /// Where it runs, for the log.
    pub(crate) device: String,
    /// What its weights and its KV take, as counted by what holds them, in bytes.
    pub(crate) memory: u64,
}

/// What a load has made.
pub(crate) enum Loaded {
    /// An engine of this process.
    Local(Box<LoadedModel>),
    /// An external engine.
    Process(Box<Supervised>),
}

/// Tells models apart whose operators say different things of them: the streams of equal ids differ then. A template,
/// which says the same otherwise, is in the print already.
fn told_apart(print: Fingerprint, overrides: Overrides) -> Fingerprint {
    match overrides {
        overrides if overrides == Overrides::default() => print,
        overrides => Fingerprint(*blake3::hash(format!("{print} {overrides:?}").as_bytes()).as_bytes()),
    }
}

/// A kind of engine.
pub(crate) trait Harness: Send + Sync {
    /// Its name in configs and loads.
    fn name(&self) -> &'static str;

    /// Checks a load without doing it: what can be told apart at once is refused at once.
    fn check(&self, spec: &LoadSpec) -> Result<(), Error>;

    /// Says what a load will take, in bytes, as far as its files tell. Blocks; called off the runtime.
    fn estimate(&self, spec: &LoadSpec, sizes: Sizes) -> Result<u64, LoadFailure>;

    /// Loads. Blocks; called off the runtime.
    fn load(&self, spec: &LoadSpec, sizes: Sizes, progress: &dyn Progress) -> Result<Loaded, LoadFailure>;
}

/// The harnesses of this build.
#[derive(Clone)]
pub(crate) struct Harnesses {
    all: Arc<[Arc<dyn Harness>]>,
}

/// The harness of a load that names none.
pub(crate) const DEFAULT_HARNESS: &str = "candle";

impl Harnesses {
    pub(crate) fn new(options: &Options, clock: Clock) -> Self {
        let all: Vec<Arc<dyn Harness>> = vec![
            #[cfg(feature = "candle")]
            Arc::new(candle::CandleHarness::new(options.harness.candle.clone())),
            Arc::new(process::ProcessHarness::new(options, clock)),
            #[cfg(feature = "fake")]
            Arc::new(fake::FakeHarness::new(options.harness.fake)),
        ];
        Harnesses { all: all.into() }
    }

    /// Finds a harness by name.
    ///
    /// # Errors
    /// `UnknownHarness`, naming those there are.
    pub(crate) fn find(&self, name: &str) -> Result<Arc<dyn Harness>, Error> {
        self.all.iter().find(|harness| harness.name() == name).cloned().ok_or_else(|| {
            let known: Vec<_> = self.all.iter().map(|harness| harness.name()).collect();
            let message = format!("there is no harness '{name}' here; this worker has: {}", known.join(", "));
            Error::new(Code::UnknownHarness, message).at("harness")
        })
    }
}
