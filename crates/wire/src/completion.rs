//! A chat completion on its way out: one encoder for the stream's events, and a fold of them into one JSON.

use bytes::Bytes;
use serde::Serialize;

use crate::logprobs::{ChatLogprobs, TokenLogprob};
use crate::output::{self, call_id};
use crate::private::Line;
use crate::sse::data_event;

/// What every event of one answer repeats.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// `chatcmpl-...`
    pub id: String,
    /// Unix seconds.
    pub created: u64,
    /// The model as the client named it.
    pub model: String,
}

/// How a cancelled choice says so: OpenAI's finish reasons have no word for it, so they say what clients know to handle,
/// and vLLM's `stop_reason` beside them why.
pub(crate) const CANCELLED: (&str, &str) = ("length", "cancelled");

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChunkChoice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageObject>>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<Option<&'a str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[CallDelta<'a>; 1]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    function_call: Option<Function<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refusal: Option<Option<()>>,
}

#[derive(Serialize)]
struct CallDelta<'a> {
    index: u32,
    #[serde(flatten)]
    call: Call<'a>,
}

/// A tool call; its first delta has everything but the arguments, later ones nothing else.
#[derive(Serialize)]
struct Call<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: Function<'a>,
}

#[derive(Serialize)]
struct Function<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

impl<'a> Call<'a> {
    fn new(identity: &Identity, choice: u32, index: u32, name: &'a str, arguments: &'a str) -> Self {
        let id = call_id(&identity.id, choice, index);
        Call { id: Some(id), kind: Some("function"), function: Function { name: Some(name), arguments } }
    }
}

/// Returns how a choice ended, in the words of clients that ask for functions, or for tools.
fn reason(functions: bool, reason: &'static str) -> &'static str {
    if functions && reason == "tool_calls" { "function_call" } else { reason }
}

/// Tokens that an answer took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt: u32,
    /// Tokens generated.
    pub completion: u32,
    /// Tokens of the prompt that were not computed again.
    pub cached: u32,
    /// Tokens of those generated that were reasoning.
    pub reasoning: u32,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct UsageObject {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptDetails,
    completion_tokens_details: CompletionDetails,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct PromptDetails {
    cached_tokens: u32,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct CompletionDetails {
    reasoning_tokens: u32,
}

impl From<Usage> for UsageObject {
    fn from(Usage { prompt, completion, cached, reasoning }: Usage) -> Self {
        UsageObject {
            prompt_tokens: prompt,
            completion_tokens: completion,
            total_tokens: prompt.saturating_add(completion),
            prompt_tokens_details: PromptDetails { cached_tokens: cached },
            completion_tokens_details: CompletionDetails { reasoning_tokens: reasoning },
        }
    }
}

/// Encodes the events of one streamed answer. Private lines go before the event whose step they tell of.
#[derive(Clone, Debug)]
pub struct ChatEncoder {
    identity: Identity,
    include_usage: bool,
    functions: bool,
}

impl ChatEncoder {
    /// Makes the encoder; with `include_usage` every event carries `usage`, null until the last.
    pub fn new(identity: Identity, include_usage: bool) -> Self {
        ChatEncoder { identity, include_usage, functions: false }
    }

    /// Says whether the client asks for functions: it reads its one call as a `function_call`, which has no id.
    #[must_use]
    pub fn functions(self, functions: bool) -> Self {
        ChatEncoder { functions, ..self }
    }

    fn chunk(&self, choices: &[ChunkChoice<'_>], usage: Option<UsageObject>) -> Bytes {
        let chunk = Chunk {
            id: &self.identity.id,
            object: "chat.completion.chunk",
            created: self.identity.created,
            model: &self.identity.model,
            choices,
            usage: self.include_usage.then_some(usage),
        };
        data_event(&serde_json::to_string(&chunk).unwrap_or_default())
    }

    fn choice(&self, index: u32, delta: Delta<'_>, finish_reason: Option<&'static str>) -> Bytes {
        self.chunk(&[ChunkChoice { index, delta, logprobs: None, finish_reason, stop_reason: None }], None)
    }

    /// The role event, first of each choice. The content is null so far when it may stay so: not `plain`.
    pub fn role(&self, choice: u32, plain: bool) -> Bytes {
        let content = Some(plain.then_some(""));
        self.choice(choice, Delta { role: Some("assistant"), content, refusal: Some(None), ..Delta::default() }, None)
    }

    /// A content event, with the tokens it is of when those are told.
    pub fn content(&self, choice: u32, text: &str, scored: Option<&[TokenLogprob]>) -> Bytes {
        self.scored(choice, Delta { content: Some(Some(text)), ..Delta::default() }, scored)
    }

    /// The event of a part of the message, with the tokens it is of when those are told.
    pub fn part(&self, choice: u32, part: &output::Delta, scored: Option<&[TokenLogprob]>) -> Bytes {
        let delta = match part {
            output::Delta::Content(text) => return self.content(choice, text, scored),
            output::Delta::Reasoning(text) => Delta { reasoning_content: Some(text), ..Delta::default() },
            output::Delta::Call { name, .. } if self.functions => {
                Delta { function_call: Some(Function { name: Some(name), arguments: "" }), ..Delta::default() }
            }
            output::Delta::Arguments { text, .. } if self.functions => {
                Delta { function_call: Some(Function { name: None, arguments: text }), ..Delta::default() }
            }
            output::Delta::Call { index, name } => {
                let call = Call::new(&self.identity, choice, *index, name, "");
                Delta { tool_calls: Some([CallDelta { index: *index, call }]), ..Delta::default() }
            }
            output::Delta::Arguments { index, text } => {
                let call = Call { id: None, kind: None, function: Function { name: None, arguments: text } };
                Delta { tool_calls: Some([CallDelta { index: *index, call }]), ..Delta::default() }
            }
        };
        self.scored(choice, delta, scored)
    }

    fn scored(&self, index: u32, delta: Delta<'_>, scored: Option<&[TokenLogprob]>) -> Bytes {
        let logprobs = scored.map(ChatLogprobs);
        self.chunk(&[ChunkChoice { index, delta, logprobs, finish_reason: None, stop_reason: None }], None)
    }

    /// The finish event, last of each choice.
    pub fn finish(&self, choice: u32, reason: &'static str) -> Bytes {
        self.choice(choice, Delta::default(), Some(self::reason(self.functions, reason)))
    }

    /// The finish event of a choice that was cancelled.
    pub fn cancelled(&self, index: u32) -> Bytes {
        let (finish_reason, stop_reason) = (Some(CANCELLED.0), Some(CANCELLED.1));
        self.chunk(&[ChunkChoice { index, delta: Delta::default(), logprobs: None, finish_reason, stop_reason }], None)
    }

    /// The usage event, after every finish; `None` when the client did not ask for it.
    pub fn usage(&self, usage: Usage) -> Option<Bytes> {
        self.include_usage.then(|| self.chunk(&[], Some(usage.into())))
    }
}

/// Joins private lines and public events into the bytes of one write. All but the last event say that more belongs to
/// them, and the lines stand on the last, so that a reader which loses the rest has none of it.
pub fn with_private(lines: &[Line], events: &[Bytes]) -> Bytes {
    if lines.is_empty() && events.len() == 1 {
        return events[0].clone();
    }
    let mut out = Vec::with_capacity(64 + events.iter().map(Bytes::len).sum::<usize>());
    let (last, first) = events.split_last().map_or((None, events), |(last, first)| (Some(last), first));
    for event in first {
        if !lines.is_empty() {
            Line::More.write(&mut out);
        }
        out.extend_from_slice(event);
    }
    lines.iter().for_each(|line| line.write(&mut out));
    match last {
        Some(last) => out.extend_from_slice(last),
        None => out.push(b'\n'),
    }
    out.into()
}

/// Folds the same events into the one JSON of an answer that is not streamed.
#[derive(Debug)]
pub struct Folder {
    identity: Identity,
    plain: bool,
    functions: bool,
    choices: Vec<Folded>,
}

/// A choice so far.
#[derive(Clone, Debug, Default)]
struct Folded {
    content: String,
    reasoning: String,
    /// Names and arguments.
    calls: Vec<(String, String)>,
    scored: Option<Vec<TokenLogprob>>,
    finish: Option<&'static str>,
    stop_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<CompletionChoice<'a>>,
    usage: UsageObject,
}

#[derive(Serialize)]
struct CompletionChoice<'a> {
    index: u32,
    message: Message<'a>,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<&'static str>,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Call<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    function_call: Option<Function<'a>>,
    refusal: Option<()>,
}

impl Folder {
    /// Makes the fold of `choices` choices. Empty contents are null when they may be so: not `plain`. `scored` says that
    /// tokens are told.
    pub fn new(identity: Identity, choices: usize, plain: bool, scored: bool) -> Self {
        let begin = Folded { scored: scored.then(Vec::new), ..Folded::default() };
        Folder { identity, plain, functions: false, choices: vec![begin; choices] }
    }

    /// Says whether the client asks for functions, as [`ChatEncoder::functions`].
    #[must_use]
    pub fn functions(self, functions: bool) -> Self {
        Folder { functions, ..self }
    }

    /// Adds tokens to a choice.
    pub fn score(&mut self, choice: u32, scored: &[TokenLogprob]) {
        if let Some(all) = self.choices.get_mut(choice as usize).and_then(|folded| folded.scored.as_mut()) {
            all.extend_from_slice(scored);
        }
    }

    /// Adds a part of the message to a choice.
    pub fn part(&mut self, choice: u32, part: &output::Delta) {
        let Some(folded) = self.choices.get_mut(choice as usize) else { return };
        match part {
            output::Delta::Content(text) => folded.content.push_str(text),
            output::Delta::Reasoning(text) => folded.reasoning.push_str(text),
            output::Delta::Call { name, .. } => folded.calls.push((name.clone(), String::new())),
            output::Delta::Arguments { index, text } => {
                if let Some((_, arguments)) = folded.calls.get_mut(*index as usize) {
                    arguments.push_str(text);
                }
            }
        }
    }

    /// Ends a choice.
    pub fn finish(&mut self, choice: u32, reason: &'static str) {
        let reason = self::reason(self.functions, reason);
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

    fn message<'a>(&'a self, choice: u32, folded: &'a Folded) -> Message<'a> {
        let some = |text: &'a str| Some(text).filter(|text| !text.is_empty());
        let calls = (0..).zip(&folded.calls).filter(|_| !self.functions);
        let function = folded.calls.first().filter(|_| self.functions);
        Message {
            role: "assistant",
            content: if self.plain { Some(&folded.content) } else { some(&folded.content) },
            reasoning_content: some(&folded.reasoning),
            tool_calls: calls
                .map(|(index, (name, arguments))| Call::new(&self.identity, choice, index, name, arguments))
                .collect(),
            function_call: function.map(|(name, arguments)| Function { name: Some(name), arguments }),
            refusal: None,
        }
    }

    /// Returns the whole answer.
    pub fn done(&self, usage: Usage) -> String {
        let choices = (0..).zip(&self.choices).map(|(index, folded)| CompletionChoice {
            index,
            message: self.message(index, folded),
            logprobs: folded.scored.as_deref().map(ChatLogprobs),
            finish_reason: folded.finish,
            stop_reason: folded.stop_reason,
        });
        let completion = Completion {
            id: &self.identity.id,
            object: "chat.completion",
            created: self.identity.created,
            model: &self.identity.model,
            choices: choices.collect(),
            usage: usage.into(),
        };
        serde_json::to_string(&completion).unwrap_or_default()
    }
}

#[cfg(test)]
#[path = "completion_tests.rs"]
mod tests;
