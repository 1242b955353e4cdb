//! `POST /v1/completions`: the request, and its answer on its way out as `text_completion` objects.

use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;
use serde_json::Value;
use words::{Code, Error};

use crate::completion::{CANCELLED, Identity, Usage, UsageObject};
use crate::fields;
use crate::format::Wish;
use crate::generation::{CHOICES_MAX, Checked, Generation};
use crate::logprobs::{self, TextLogprobs, TokenLogprob};
use crate::sse::data_event;

/// Tokens that an answer may have when the request does not say: OpenAI's number.
pub const MAX_TOKENS_DEFAULT: u32 = 16;

/// One text to go on from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// To be tokenised.
    Text(String),
    /// Tokens already, at least one.
    Tokens(Vec<u32>),
}

/// A checked request.
#[derive(Clone, Debug, PartialEq)]
pub struct CompletionRequest {
    /// At least one; with the choices of each at most [`CHOICES_MAX`] answers.
    pub prompts: Vec<Prompt>,
    /// Whether answers begin with their prompts.
    pub echo: bool,
    /// What every answer must be, from its first token on.
    pub format: Option<Wish>,
    /// All the rest.
    pub generation: Generation,
}

impl CompletionRequest {
    /// Reads a request.
    ///
    /// # Errors
    /// `InvalidRequest` with the field in `param`, or `UnsupportedParameter`.
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        let mut checked = Checked::read(body, fields::COMPLETION)?;
        let mut generation = checked.generation()?;
        generation.max_tokens.get_or_insert(MAX_TOKENS_DEFAULT);
        generation.logprobs = logprobs::top(&checked.map, "logprobs")?;
        let best_of = checked.map.get("best_of").and_then(Value::as_u64);
        if best_of.is_some_and(|best| best != u64::from(generation.choices)) {
            let message = "'best_of' is not supported unless it equals 'n'";
            return Err(Error::new(Code::UnsupportedParameter, message).at("best_of"));
        }
        let prompts = prompts(checked.map.remove("prompt"), "prompt", CHOICES_MAX as usize)?;
        if prompts.len() as u64 * u64::from(generation.choices) > u64::from(CHOICES_MAX) {
            let message =
                format!("'prompt' has {} prompts; with 'n' answers each, {CHOICES_MAX} are the most", prompts.len());
            return Err(Error::invalid("prompt", message));
        }
        let echo = checked.map.get("echo").and_then(Value::as_bool).unwrap_or(false);
        let format = Wish::read(&mut checked.map)?;
        Ok(CompletionRequest { prompts, echo, format, generation })
    }
}

/// Reads a text, a list of texts, tokens, or a list of those: at most `most` prompts.
pub(crate) fn prompts(value: Option<Value>, name: &str, most: usize) -> Result<Vec<Prompt>, Error> {
    let wrong = |at: String| {
        let message =
            format!("'{at}' must be a string, an array of strings, an array of token ids, or an array of those");
        Error::invalid(at, message)
    };
    let items = match value {
        Some(Value::String(text)) => return Ok(vec![Prompt::Text(text)]),
        Some(Value::Array(items)) if !items.is_empty() => items,
        _ => return Err(wrong(name.into())),
    };
    if items[0].is_number() {
        return Ok(vec![Prompt::Tokens(tokens(&items).ok_or_else(|| wrong(name.into()))?)]);
    }
    if items.len() > most {
        return Err(Error::invalid(name, format!("'{name}' may have {most} texts at most, it has {}", items.len())));
    }
    let prompt = |(i, item): (usize, Value)| match item {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(ids) if !ids.is_empty() => {
            tokens(&ids).map(Prompt::Tokens).ok_or_else(|| wrong(format!("{name}[{i}]")))
        }
        _ => Err(wrong(format!("{name}[{i}]"))),
    };
    items.into_iter().enumerate().map(prompt).collect()
}

pub(crate) fn tokens(items: &[Value]) -> Option<Vec<u32>> {
    items.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
}

#[derive(Serialize)]
struct Answer<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageObject>>,
}

#[derive(Serialize)]
struct Choice<'a> {
    text: &'a str,
    index: u32,
    logprobs: Option<TextLogprobs<'a>>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<&'static str>,
}

fn json(identity: &Identity, choices: Vec<Choice<'_>>, usage: Option<Option<UsageObject>>) -> String {
    let answer = Answer {
        id: &identity.id,
        object: "text_completion",
        created: identity.created,
        model: &identity.model,
        choices,
        usage,
    };
    serde_json::to_string(&answer).unwrap_or_default()
}

/// What answers begin with when they echo: each prompt's text, and how many choices it has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Echo {
    /// The prompts' texts; empty without an echo.
    pub prompts: Arc<[String]>,
    /// Choices of each prompt.
    pub choices: u32,
}

impl Echo {
    /// Returns what a choice begins with.
    pub fn of(&self, choice: u32) -> &str {
        let prompt = choice.checked_div(self.choices).unwrap_or(0) as usize;
        self.prompts.get(prompt).map_or("", String::as_str)
    }
}

/// Encodes the events of one streamed answer.
#[derive(Clone, Debug)]
pub struct TextEncoder {
    identity: Identity,
    include_usage: bool,
    echo: Echo,
}

impl TextEncoder {
    /// Makes the encoder; with `include_usage` every event carries `usage`, null until the last.
    pub fn new(identity: Identity, include_usage: bool, echo: Echo) -> Self {
        TextEncoder { identity, include_usage, echo }
    }

    fn chunk(&self, text: &str, index: u32, scored: Option<&[TokenLogprob]>, finish: Option<&'static str>) -> Bytes {
        let logprobs = scored.map(TextLogprobs);
        self.event(Choice { text, index, logprobs, finish_reason: finish, stop_reason: None })
    }

    fn event(&self, choice: Choice<'_>) -> Bytes {
        data_event(&json(&self.identity, vec![choice], self.include_usage.then_some(None)))
    }

    /// The echo, first of each choice; `None` where the prompt is not to be repeated.
    pub fn begin(&self, choice: u32, scored: Option<&[TokenLogprob]>) -> Option<Bytes> {
        let wanted = !self.echo.prompts.is_empty();
        wanted.then(|| self.chunk(self.echo.of(choice), choice, scored, None))
    }

    /// A piece of text, with the tokens it is of when those are told.
    pub fn content(&self, choice: u32, text: &str, scored: Option<&[TokenLogprob]>) -> Bytes {
        self.chunk(text, choice, scored, None)
    }

    /// The finish event, last of each choice.
    pub fn finish(&self, choice: u32, reason: &'static str) -> Bytes {
        self.chunk("", choice, None, Some(reason))
    }

    /// The finish event of a choice that was cancelled.
    pub fn cancelled(&self, index: u32) -> Bytes {
        let (finish_reason, stop_reason) = (Some(CANCELLED.0), Some(CANCELLED.1));
        self.event(Choice { text: "", index, logprobs: None, finish_reason, stop_reason })
    }

    /// The usage event, after every finish; `None` when the client did not ask for it.
    pub fn usage(&self, usage: Usage) -> Option<Bytes> {
        self.include_usage.then(|| data_event(&json(&self.identity, Vec::new(), Some(Some(usage.into())))))
    }
}

/// Folds the same events into one JSON.
#[derive(Debug)]
pub struct TextFolder {
    identity: Identity,
    choices: Vec<Folded>,
}

#[derive(Clone, Debug, Default)]
struct Folded {
    text: String,
    scored: Option<Vec<TokenLogprob>>,
    finish: Option<&'static str>,
    stop_reason: Option<&'static str>,
}

impl TextFolder {
    /// Makes the fold of `choices` choices, each of which begins with its echo; `scored` says that tokens are told.
    pub fn new(identity: Identity, choices: usize, scored: bool, echo: &Echo) -> Self {
        let begin = |choice: usize| Folded {
            text: echo.of(choice as u32).to_string(),
            scored: scored.then(Vec::new),
            finish: None,
            stop_reason: None,
        };
        TextFolder { identity, choices: (0..choices).map(begin).collect() }
    }

    /// Adds text to a choice.
    pub fn content(&mut self, choice: u32, text: &str) {
        if let Some(folded) = self.choices.get_mut(choice as usize) {
            folded.text.push_str(text);
        }
    }

    /// Adds tokens to a choice.
    pub fn score(&mut self, choice: u32, scored: &[TokenLogprob]) {
        if let Some(all) = self.choices.get_mut(choice as usize).and_then(|folded| folded.scored.as_mut()) {
            all.extend_from_slice(scored);
        }
    }

    /// Ends a choice.
    pub fn finish(&mut self, choice: u32, reason: &'static str) {
        if let Some(folded) = self.choices.get_mut(choice as usize) {
            folded.finish = Some(reason);
        }
    }

    /// Ends a choice that was cancelled.
    pub fn cancelled(&mut self, choice: u32) {
        if let Some(folded) = self.choices.get_mut(choice as usize) {
            (folded.finish, folded.stop_reason) = (Some(CANCELLED.0), Some(CANCELLED.1));
        }
    }

    /// Returns the whole answer.
    pub fn done(&self, usage: Usage) -> String {
        let choices = (0..).zip(&self.choices).map(|(index, folded)| Choice {
            text: &folded.text,
            index,
            logprobs: folded.scored.as_deref().map(TextLogprobs),
            finish_reason: folded.finish,
            stop_reason: folded.stop_reason,
        });
        json(&self.identity, choices.collect(), Some(Some(usage.into())))
    }
}

#[cfg(test)]
#[path = "text_tests.rs"]
mod tests;
