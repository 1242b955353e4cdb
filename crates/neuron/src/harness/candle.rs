//! `harness = "candle"`: models in this process, from GGUF files.

use std::borrow::Cow;
use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::sync::Arc;

use engine_candle::{
    Arithmetic, CandleEngine, DeviceChoice, KernelOptions, LoadError, LoadProgress, Options, THREADS_MAX,
};
use inference::{Pooling, TokenBytes};
use model_files::model::{ModelFiles, ModelFilesError, resolve};
use model_files::template::TemplateError;
use wire::output::Style;
use words::{Code, Error, Fingerprint};

use super::{
    ChatInput, ChatText, Harness, LoadFailure, LoadSpec, Loaded, LoadedModel, Progress, Prompt, Sizes, Spelled,
    told_apart,
};
use crate::options::{CandleOptions, KvType};
use crate::sampling::Defaults;

const BLOCK_TOKENS: usize = 32;

pub(crate) struct CandleHarness {
    options: CandleOptions,
}

impl CandleHarness {
    pub(crate) fn new(options: CandleOptions) -> Self {
        CandleHarness { options }
    }

    fn kernels(&self) -> KernelOptions {
        let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads = if self.options.threads > 0 { self.options.threads } else { cores().min(THREADS_MAX) };
        let kv = match self.options.kv_type {
            KvType::F16 => engine_candle::KvType::F16,
            KvType::F32 => engine_candle::KvType::F32,
        };
        KernelOptions { threads, kv, level: None }
    }

    fn options(&self, spec: &LoadSpec, sizes: Sizes) -> Result<Options, Error> {
        let most = match self.options.max_context_length {
            0 => usize::MAX,
            most => most,
        };
        let context = spec.context(most);
        Ok(Options {
            device: device(spec)?,
            arithmetic: Arithmetic::Auto(self.kernels()),
            kv_bytes: self.options.kv_cache_mib << 20,
            block_tokens: BLOCK_TOKENS,
            max_batch: sizes.max_running,
            max_step_tokens: sizes.max_running + sizes.prefill_tokens,
            context_length: (context < usize::MAX).then_some(context),
        })
    }
}

fn device(spec: &LoadSpec) -> Result<DeviceChoice, Error> {
    DeviceChoice::parse(spec.device.as_deref().unwrap_or("auto"))
        .map_err(|error| Error::invalid("device", error.to_string()))
}

fn path(spec: &LoadSpec) -> Result<&std::path::Path, Error> {
    spec.path.as_deref().ok_or_else(|| {
        let message = format!(
            "the model '{}' has no path: name a GGUF file, a folder with one, or org/repo of a hub",
            spec.model_id
        );
        Error::invalid("path", message)
    })
}

fn bad_file(error: impl std::fmt::Display) -> Error {
    Error::new(Code::InvalidModelFile, error.to_string())
}

/// Faults of a file system behind a network: a later try may succeed.
fn transient(kind: ErrorKind) -> bool {
    use ErrorKind as K;
    matches!(
        kind,
        K::TimedOut | K::HostUnreachable | K::NetworkUnreachable | K::NetworkDown | K::StaleNetworkFileHandle
    )
}

fn files_failure(error: &ModelFilesError) -> LoadFailure {
    let kind = match error {
        ModelFilesError::Io { source, .. } => Some(source.kind()),
        ModelFilesError::Gguf { source: model_files::gguf::GgufError::Io { source, .. }, .. } => Some(source.kind()),
        _ => None,
    };
    LoadFailure { error: bad_file(error), transient: kind.is_some_and(transient) }
}

impl Harness for CandleHarness {
    fn name(&self) -> &'static str {
        "candle"
    }

    fn check(&self, spec: &LoadSpec) -> Result<(), Error> {
        device(spec)?;
        if spec.reference.is_some() {
            // What a hub has is known only once it was asked.
            return Ok(());
        }
        let path = path(spec)?;
        match resolve(path, spec.quant.as_deref()) {
            // A network's fault is left to the load, which says that a later try may succeed.
            Err(ModelFilesError::Io { source, .. }) if transient(source.kind()) => Ok(()),
            Err(error) => Err(bad_file(error)),
            Ok(_) => Ok(()),
        }
    }

    fn estimate(&self, spec: &LoadSpec, sizes: Sizes) -> Result<u64, LoadFailure> {
        if spec.memory > 0 {
            return Ok(spec.memory);
        }
        let files = ModelFiles::open(path(spec)?, spec.quant.as_deref()).map_err(|error| files_failure(&error))?;
        engine_candle::memory_needed(&files.header, &self.options(spec, sizes)?).map_err(load_failure)
    }

    fn load(&self, spec: &LoadSpec, sizes: Sizes, progress: &dyn Progress) -> Result<Loaded, LoadFailure> {
        let files = ModelFiles::open(path(spec)?, spec.quant.as_deref()).map_err(|error| files_failure(&error))?;
        let options = self.options(spec, sizes)?;
        let mut report = |state: LoadProgress| -> ControlFlow<()> {
            progress.report((state.bytes_done * 1000 / state.bytes.max(1)) as u32)
        };
        let engine = CandleEngine::load(&files.path, &files.header, &options, &mut report).map_err(load_failure)?;
        let context_length = inference::engine::Engine::capabilities(&engine).context_length;
        let print = files.continue_fingerprint(context_length, control::STREAM_FORMAT);
        let print = Fingerprint(print.map_err(|error| files_failure(&error))?);
        let style = files.template.as_ref().map(|template| Style::of_template(template.source())).unwrap_or_default();
        let style = style.with(spec.overrides);
        let print = told_apart(print, spec.overrides);
        let exact = format!("{print} {}", engine.exactness());
        let defaults = Defaults {
            temperature: files.defaults.temperature,
            top_p: files.defaults.top_p,
            top_k: files.defaults.top_k,
            min_p: files.defaults.min_p,
            repetition: files.defaults.repetition,
            ..Defaults::default()
        };
        let memory = engine.memory_bytes();
        for level in engine.refused_levels() {
            tracing::error!(%level, "this machine's instructions give other bits than the portable code; they are not used");
        }
        let device = engine.device().to_string();
        tracing::info!(
            model = %spec.model_id,
            path = %files.path.display(),
            architecture = files.architecture,
            device,
            context_length,
            arithmetic = engine.arithmetic(),
            weight_mib = engine.weight_bytes() >> 20,
            cuda = cfg!(feature = "cuda"),
            tool_calls = ?style.tools,
            reasoning = ?style.reasoning.map(|tags| tags.open),
            "weights loaded"
        );
        Ok(Loaded::Local(Box::new(LoadedModel {
            engine: Box::new(engine),
            token_bytes: Arc::new(token_bytes(&files, &style)),
            end_tokens: files.end_tokens.clone(),
            defaults,
            pooling: pooling(&files),
            continue_fingerprint: print,
            exact_fingerprint: Fingerprint(*blake3::hash(exact.as_bytes()).as_bytes()),
            device,
            memory,
            text: Arc::new(FilesText { files, style }),
        })))
    }
}

fn load_failure(error: LoadError) -> LoadFailure {
    let is_transient = matches!(&error, LoadError::Io { source, .. } if transient(source.kind()));
    let error = match error {
        LoadError::Cancelled => Error::new(Code::Conflict, "the load was cancelled"),
        LoadError::Device(words) => Error::invalid("device", words),
        LoadError::Options(words) => Error::internal(words),
        LoadError::Candle(source) => {
            Error::new(Code::EngineFailed, "the engine could not take the model").because(source)
        }
        error => bad_file(error),
    };
    LoadFailure { error, transient: is_transient }
}

/// How the model's makers say that its embeddings are pooled, in llama.cpp's numbers; a model that says nothing was made
/// to generate, and its last token has seen all the others.
fn pooling(files: &ModelFiles) -> Result<Pooling, String> {
    match files.header.u64(&format!("{}.pooling_type", files.architecture)) {
        Some(1) => Ok(Pooling::Mean),
        None | Some(0 | 3) => Ok(Pooling::Last),
        Some(2) => Err("its first token".into()),
        Some(4) => Err("rank".into()),
        Some(other) => Err(format!("a way that is unknown here, number {other}")),
    }
}

/// Returns what tokens add to the output. The marks of a style are to be seen by its parser, which takes them away.
fn token_bytes(files: &ModelFiles, style: &Style) -> TokenBytes {
    let marks = style.marks();
    TokenBytes::new((0..).zip(files.tokenizer.pieces()).map(|(id, piece)| {
        let mark = files.tokenizer.token_text(id).filter(|text| piece.control && marks.contains(text));
        mark.map_or(piece.bytes.as_slice(), str::as_bytes)
    }))
}

/// Prompts through the model's own template and tokenizer.
struct FilesText {
    files: ModelFiles,
    style: Style,
}

impl ChatText for FilesText {
    fn prompt(&self, input: &ChatInput<'_>, now: u64) -> Result<Prompt, Error> {
        let rendered = self.files.render(input.messages, input.tools, input.variables, now as i64);
        let text = rendered.map_err(|error| match error {
            TemplateError::Raised(_) | TemplateError::Absent => {
                Error::new(Code::TemplateRejected, error.to_string()).at("messages")
            }
            TemplateError::Source(_) | TemplateError::Render(_) => {
                Error::new(Code::TemplateRejected, "the model's chat template can't render these messages")
                    .because(error)
            }
        })?;
        // Most templates write the begin token themselves; it must not stand there twice.
        let tokenizer = &self.files.tokenizer;
        let begun = tokenizer.bos().and_then(|id| tokenizer.token_text(id)).is_some_and(|bos| text.starts_with(bos));
        let ids = tokenizer
            .encode(&text, !begun)
            .map_err(|error| Error::new(Code::InvalidRequest, error.to_string()).at("messages"))?;
        Ok(Prompt { ids, opening: self.style.opening(&text) })
    }

    fn style(&self) -> Style {
        self.style
    }

    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, Error> {
        let encoded = self.files.tokenizer.encode(text, special);
        encoded.map_err(|error| Error::new(Code::InvalidRequest, error.to_string()))
    }

    fn spell(&self, id: u32) -> Spelled<'_> {
        let tokenizer = &self.files.tokenizer;
        match tokenizer.pieces().get(id as usize) {
            Some(piece) if !piece.control => Spelled { bytes: Cow::Borrowed(&piece.bytes), shown: true },
            _ => {
                Spelled { bytes: Cow::Borrowed(tokenizer.token_text(id).unwrap_or_default().as_bytes()), shown: false }
            }
        }
    }

    fn decode(&self, ids: &[u32]) -> String {
        self.files.tokenizer.decode(ids)
    }

    fn embedding_end(&self) -> Option<u32> {
        let wanted = self.files.header.bool("tokenizer.ggml.add_eos_token") == Some(true);
        self.files.tokenizer.eos().filter(|_| wanted)
    }
}
