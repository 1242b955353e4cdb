//! One model's constraints: formats compiled off the runtime, within a second, and kept while they are in use.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use grammar::{Arguments, Cache, Limits, Source, ToolCall, Vocabulary};
use inference::TokenBytes;
use inference::constraint::Grammar;
use tokio::sync::{OnceCell, Semaphore};
use wire::format::Format;
use wire::output::{Opening, Style, texts_of};
use wire::tools::{ToolChoice, Tools};
use words::{Code, Error};

/// Longest that a client waits for its format to be compiled; the work itself is bounded by [`Limits`].
const COMPILE_MAX: Duration = Duration::from_secs(1);
/// Formats of one model that are compiled at once: each may take some megabytes meanwhile.
const COMPILES_MAX: usize = 2;
/// Longest that a request waits for others' formats to be compiled.
const WAIT_MAX: Duration = Duration::from_secs(5);
/// Compiled formats that are kept: those of a service's usual requests, some hundred kB each.
const KEPT: usize = 64;

/// What compiles a model's formats. Its tree of tokens is made when the first format comes.
pub(crate) struct Constraints {
    token_bytes: Arc<TokenBytes>,
    vocabulary: OnceCell<Arc<Vocabulary>>,
    /// Held for one look.
    cache: Mutex<Cache>,
    compiling: Arc<Semaphore>,
}

impl Constraints {
    pub(crate) fn new(token_bytes: Arc<TokenBytes>) -> Self {
        let (vocabulary, compiling) = (OnceCell::new(), Arc::new(Semaphore::new(COMPILES_MAX)));
        Constraints { token_bytes, vocabulary, cache: Mutex::new(Cache::new(KEPT)), compiling }
    }

    /// Compiles a source, or finds it compiled; `param` is the field that it came in.
    ///
    /// # Errors
    /// Those of [`Vocabulary::compile`], `InvalidRequest` when it takes more than a second, `Overloaded` when too many
    /// others are in the way.
    pub(crate) async fn compile(&self, source: Source, param: &str) -> Result<Arc<dyn Grammar>, Error> {
        let key = source.key();
        if let Some(known) = self.cache.lock().unwrap_or_else(PoisonError::into_inner).find(key) {
            return Ok(known);
        }
        let busy = || Error::new(Code::Overloaded, "too many formats are being compiled; try again shortly");
        let permit = tokio::time::timeout(WAIT_MAX, self.compiling.clone().acquire_owned()).await;
        let permit = permit.map_err(|_| busy())?.map_err(Error::internal)?;
        let vocabulary = self.vocabulary().await?.clone();
        let work = tokio::task::spawn_blocking(move || {
            let compiled = vocabulary.compile(&source);
            drop(permit);
            compiled
        });
        let late = || {
            let message = "the format takes more than a second to compile; make its schema or pattern simpler";
            Error::invalid(param, message)
        };
        let compiled = tokio::time::timeout(COMPILE_MAX, work).await.map_err(|_| late())?.map_err(Error::internal)?;
        let compiled = Arc::new(compiled.map_err(|error| error.at(param))?);
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).keep(key, compiled.clone());
        Ok(compiled)
    }

    async fn vocabulary(&self) -> Result<&Arc<Vocabulary>, Error> {
        let make = async || {
            let token_bytes = self.token_bytes.clone();
            let work = tokio::task::spawn_blocking(move || Vocabulary::new(&token_bytes, Limits::default()));
            Ok(Arc::new(work.await.map_err(Error::internal)??))
        };
        self.vocabulary.get_or_try_init(make).await
    }
}

/// Returns what a format compiles from. A model that reasons may do so first, as far as its prompt lets it.
pub(crate) fn source(format: &Format, style: &Style, opening: Opening) -> Source {
    let source = match format.clone() {
        Format::JsonObject => Source::JsonObject,
        Format::JsonSchema { schema, strict } => Source::JsonSchema { schema, strict },
        Format::Regex(pattern) => Source::Regex(pattern),
        Format::Choice(texts) => Source::Choice(texts),
        // Its author says where it begins.
        Format::Grammar(text) => return Source::Lark(text),
    };
    reasoned(source, style, opening)
}

fn reasoned(source: Source, style: &Style, opening: Opening) -> Source {
    let Some(tags) = style.reasoning else { return source };
    let open = match opening {
        Opening::Over => return source,
        Opening::Free => Some(tags.open.to_string()),
        Opening::Inside => None,
    };
    Source::Reasoned { open, close: tags.close.into(), then: Box::new(source) }
}

/// Returns what forces the calls that a request wants; `None` when the model decides.
pub(crate) fn calls(tools: &Tools, style: &Style, opening: Opening) -> Option<Source> {
    let form = style.tools?;
    let wanted = |name: &str| match &tools.choice {
        ToolChoice::Named(named) => named == name,
        _ => true,
    };
    if !matches!(tools.choice, ToolChoice::Required | ToolChoice::Named(_)) {
        return None;
    }
    let list = tools.list.iter().filter(|tool| wanted(&tool.name));
    let call = |tool: &wire::tools::Tool| {
        let (before, after) = form.around(&tool.name);
        let empty = || serde_json::json!({"type": "object", "properties": {}, "additionalProperties": false});
        let parameters = tool.parameters.clone().unwrap_or_else(empty);
        let tagged = |around| Arguments::Tagged { around, texts: texts_of(tool) };
        let arguments = form.argument().map_or(Arguments::Json, tagged);
        ToolCall { before, parameters, strict: tool.strict, after: after.into(), arguments }
    };
    // A named tool is called once.
    let several = tools.parallel && tools.choice == ToolChoice::Required && form.repeats();
    let calls = Source::Tools { tools: list.map(call).collect(), between: several.then(|| "\n".to_string()) };
    Some(reasoned(calls, style, opening))
}
