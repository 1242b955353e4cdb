//! From a source to a compiled grammar, and the matcher that follows one answer through it.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use inference::constraint::{Grammar, Mask, Matcher, Violation};
use llguidance::api::{StopReason, TopLevelGrammar};
use llguidance::{TokenParser, regex_to_lark};
use serde_json::{Value, json};
use words::{Code, Error};

use crate::prepare::prepare;
use crate::tools::quoted;
use crate::vocabulary::Vocabulary;
use crate::{Limits, Source, schema, tools};

/// White space between the tokens of a JSON answer: a space, or a line's end and its indentation. Bounded, so that a
/// model can't go on with it for ever.
const WHITE_SPACE: &str = r"\x20|\x0A[\x20\x09]{0,40}";
/// Longest part of a compiler's message that a client is told, in bytes.
const REASON_BYTES_MAX: usize = 300;

/// A grammar, compiled for one vocabulary.
pub struct Compiled {
    start: TokenParser,
}

impl fmt::Debug for Compiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiled").finish_non_exhaustive()
    }
}

fn refused(what: impl Into<String>) -> Error {
    Error::new(Code::InvalidRequest, what)
}

/// Returns the rule of a JSON schema, with the compiler's settings in it.
pub(crate) fn json_rule(schema: &Value, strict: bool) -> Value {
    let mut rule = match schema {
        Value::Object(_) => prepare(schema),
        Value::Bool(true) => json!({}),
        _ => json!({"not": {}}),
    };
    rule["x-guidance"] = json!({"whitespace_pattern": WHITE_SPACE, "lenient": !strict, "coerce_one_of": !strict});
    rule
}

impl Vocabulary {
    /// Compiles a source. Takes up to some hundred milliseconds of pure computing and is bounded by this vocabulary's
    /// [`crate::Limits`].
    ///
    /// # Errors
    /// `InvalidRequest` in words that say what is wrong with the source; `UnsupportedParameter` for keywords of a
    /// strict schema that can't be enforced.
    pub fn compile(&self, source: &Source) -> Result<Compiled, Error> {
        let what = source.what();
        let grammar = TopLevelGrammar::from_lark(lark(source, &self.limits)?);
        let parser = guarded(|| self.factory.create_parser(grammar).map_err(|error| error.to_string()));
        let mut start = parser.map_err(|reason| refused(format!("{what} can't be used: {}", short(&reason))))?;
        let opened = guarded(|| {
            start.start_without_prompt();
            start.check_stop().map_err(|error| error.to_string())
        });
        match opened {
            Ok(false) => Ok(Compiled { start }),
            Ok(true) => Err(refused(format!("{what} can't be used: it lets no text come at all"))),
            Err(reason) => Err(refused(format!("{what} can't be used: {}", short(&reason)))),
        }
    }
}

pub(crate) fn check_bytes(bytes: usize, limits: &Limits) -> Result<(), Error> {
    if bytes > limits.bytes {
        let message = format!("the format has {bytes} bytes; {} are the most that a request may have", limits.bytes);
        return Err(refused(message));
    }
    Ok(())
}

impl Source {
    fn what(&self) -> &'static str {
        match self {
            Source::JsonObject | Source::JsonSchema { .. } => "the schema",
            Source::Regex(_) => "the regular expression",
            Source::Choice(_) => "the choice",
            Source::Lark(_) => "the grammar",
            Source::Tools { .. } => "a tool's schema",
            Source::Reasoned { then, .. } => then.what(),
        }
    }
}

/// Returns a source as a whole grammar in Lark's form, once it was counted.
fn lark(source: &Source, limits: &Limits) -> Result<String, Error> {
    match source {
        Source::Lark(text) => {
            check_bytes(text.len(), limits)?;
            schema::check_repetitions(text, limits)?;
            Ok(text.clone())
        }
        Source::Reasoned { open, close, then } => {
            let thought =
                open.as_deref().map_or("thought space".into(), |open| format!("({} thought space)?", quoted(open)));
            let close = regex_to_lark(&escaped(close), "");
            let rules = answer(then, limits)?;
            Ok(format!("start: {thought} answer\nthought[lazy]: /(?s:.*){close}/\nspace: /[ \\n]{{0,4}}/\n{rules}"))
        }
        _ => Ok(format!("start: answer\n{}", answer(source, limits)?)),
    }
}

/// Returns the rules of `answer`.
fn answer(source: &Source, limits: &Limits) -> Result<String, Error> {
    match source {
        Source::JsonObject => Ok(format!("answer: %json {}\n", json_rule(&json!({"type": "object"}), true))),
        Source::JsonSchema { schema, strict } => {
            schema::check(schema, *strict, limits)?;
            Ok(format!("answer: %json {}\n", json_rule(schema, *strict)))
        }
        Source::Regex(pattern) => {
            schema::check_pattern(pattern, limits)?;
            Ok(format!("answer: /{}/\n", regex_to_lark(pattern, "")))
        }
        Source::Choice(texts) => {
            check_bytes(texts.iter().map(String::len).sum(), limits)?;
            if texts.is_empty() || texts.len() > limits.enum_values || texts.iter().any(String::is_empty) {
                let message = format!("a choice is one of 1 to {} texts, none of them empty", limits.enum_values);
                return Err(refused(message));
            }
            let texts: Vec<String> = texts.iter().map(|text| quoted(text)).collect();
            Ok(format!("answer: {}\n", texts.join(" | ")))
        }
        Source::Tools { tools, between } => tools::rules(tools, between.as_deref(), limits),
        Source::Lark(_) | Source::Reasoned { .. } => Err(refused("a whole grammar has no place for reasoning")),
    }
}

/// Returns a regular expression that matches the text alone.
pub(crate) fn escaped(text: &str) -> String {
    text.chars().flat_map(|c| r"\.+*?()|[]{}^$".contains(c).then_some('\\').into_iter().chain([c])).collect()
}

/// Runs a part of the compiler; a panic in it is a refusal like others.
fn guarded<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    let told = |payload: Box<dyn Any + Send>| {
        let text = payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied());
        format!("the compiler failed on it ({})", text.unwrap_or("without a word"))
    };
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| Err(told(payload)))
}

/// Returns a message's beginning, on one line.
fn short(reason: &str) -> String {
    let line = reason.split_whitespace().collect::<Vec<_>>().join(" ");
    let line = line.split("<backtrace>").next().unwrap_or_default().trim_end_matches("<non-verbose/>").trim();
    let mut end = line.len().min(REASON_BYTES_MAX);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    line[..end].to_string()
}

impl Grammar for Compiled {
    fn open(&self) -> Result<Box<dyn Matcher>, Violation> {
        // Each choice has a lexer of its own: what one learns neither grows nor breaks another one's.
        let parser = guarded(|| Ok(self.start.deep_clone())).map_err(Violation::Broken)?;
        Ok(Box::new(Following { parser }))
    }
}

struct Following {
    parser: TokenParser,
}

impl Following {
    /// Runs one step; says what stopped the parser if something did.
    fn step<T, E: fmt::Display>(
        &mut self,
        work: impl FnOnce(&mut TokenParser) -> Result<T, E>,
    ) -> Result<T, Violation> {
        let parser = &mut self.parser;
        let result = guarded(|| work(parser).map_err(|error| error.to_string()));
        result.map_err(|reason| match self.parser.stop_reason() {
            StopReason::LexerTooComplex | StopReason::ParserTooComplex => Violation::TooComplex,
            StopReason::NoExtension | StopReason::NoExtensionBias => Violation::DeadEnd,
            _ => Violation::Broken(short(&reason)),
        })
    }
}

impl Matcher for Following {
    fn mask(&mut self) -> Result<Mask, Violation> {
        if self.parser.stopped() {
            return Ok(Mask::default());
        }
        match self.step(TokenParser::compute_mask) {
            Ok(set) => Ok(Mask::new(set.as_slice().to_vec())),
            Err(Violation::DeadEnd) => Ok(Mask::default()),
            Err(violation) => Err(violation),
        }
    }

    fn accept(&mut self, id: u32) -> Result<(), Violation> {
        if self.step(|parser| parser.validate_token(id))? {
            self.step(|parser| {
                parser.consume_token(id)?;
                parser.check_stop()
            })?;
            return Ok(());
        }
        Err(Violation::Foreign(id))
    }

    fn may_end(&mut self) -> Result<bool, Violation> {
        self.step(|parser| Ok::<_, fmt::Error>(parser.is_accepting()))
    }

    fn is_over(&self) -> bool {
        matches!(self.parser.stop_reason(), StopReason::NoExtension | StopReason::EndOfSentence)
    }
}
