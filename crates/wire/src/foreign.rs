//! What OpenAI-compatible servers of others say: read leniently, believed only as far as it is counted.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::Value;
use words::{Code, Error, Retry};

use crate::completion::Usage;

/// Most bytes of a foreign message that are passed on.
const MESSAGE_BYTES_MAX: usize = 2_000;
/// What others call a prompt that is too long, as an error's code or type.
const TOO_LONG: [&str; 2] = ["context_length_exceeded", "exceed_context_size_error"];

/// What an event of a stream, or a whole answer, tells.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Told {
    /// It is the end of the stream.
    pub done: bool,
    /// It has text of the answer, or a part of a call.
    pub text: bool,
    /// The tokens of request and answer.
    pub usage: Option<Usage>,
    /// How a choice ended: `stop`, `length`, `tool_calls` or `content_filter`.
    pub finish: Option<&'static str>,
    /// It is a failure in the middle of a stream, in these words.
    pub failure: Option<String>,
}

#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(default, borrow)]
    choices: Option<Vec<Choice<'a>>>,
    #[serde(default)]
    usage: Option<Tokens>,
    #[serde(default)]
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(default, borrow)]
    delta: Option<Said<'a>>,
    #[serde(default, borrow)]
    message: Option<Said<'a>>,
    #[serde(default, borrow)]
    text: Option<Cow<'a, str>>,
    #[serde(default, borrow)]
    finish_reason: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Said<'a> {
    #[serde(default, borrow)]
    content: Option<Cow<'a, str>>,
    #[serde(default, borrow)]
    reasoning_content: Option<Cow<'a, str>>,
    #[serde(default)]
    tool_calls: Option<Vec<serde::de::IgnoredAny>>,
}

impl Said<'_> {
    fn is_text(&self) -> bool {
        let texts = [&self.content, &self.reasoning_content].into_iter().flatten();
        texts.into_iter().any(|text| !text.is_empty())
            || self.tool_calls.as_ref().is_some_and(|calls| !calls.is_empty())
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Tokens {
    prompt_tokens: u32,
    completion_tokens: u32,
    prompt_tokens_details: Option<Details>,
    completion_tokens_details: Option<Details>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Details {
    cached_tokens: Option<u32>,
    reasoning_tokens: Option<u32>,
}

impl From<Tokens> for Usage {
    fn from(tokens: Tokens) -> Self {
        let cached = tokens.prompt_tokens_details.and_then(|details| details.cached_tokens);
        let reasoning = tokens.completion_tokens_details.and_then(|details| details.reasoning_tokens);
        Usage {
            prompt: tokens.prompt_tokens,
            completion: tokens.completion_tokens,
            cached: cached.unwrap_or(0),
            reasoning: reasoning.unwrap_or(0),
        }
    }
}

fn known_finish(reason: &str) -> Option<&'static str> {
    ["stop", "length", "tool_calls", "content_filter"].into_iter().find(|known| *known == reason)
}

/// Reads one whole event of a stream. What is not understood tells nothing.
pub fn event(event: &[u8]) -> Told {
    let Ok(text) = std::str::from_utf8(event) else { return Told::default() };
    let mut data = text.lines().filter_map(|line| line.strip_prefix("data:")).map(str::trim_start);
    let Some(first) = data.next() else { return Told::default() };
    if first.trim_end() == "[DONE]" {
        return Told { done: true, ..Told::default() };
    }
    match data.next() {
        None => answer(first.as_bytes()),
        Some(second) => {
            let joined = data.fold(format!("{first}\n{second}"), |joined, line| joined + "\n" + line);
            answer(joined.as_bytes())
        }
    }
}

/// Reads a whole answer, or the JSON of an event.
pub fn answer(json: &[u8]) -> Told {
    let Ok(chunk) = serde_json::from_slice::<Chunk<'_>>(json) else { return Told::default() };
    let mut told = Told { usage: chunk.usage.map(Usage::from), ..Told::default() };
    for choice in chunk.choices.iter().flatten() {
        told.text |= [&choice.delta, &choice.message].into_iter().flatten().any(Said::is_text);
        told.text |= choice.text.as_ref().is_some_and(|text| !text.is_empty());
        told.finish = choice.finish_reason.as_deref().and_then(known_finish).or(told.finish);
    }
    told.failure = chunk.error.filter(|error| !error.is_null()).map(|error| message(&error));
    told
}

fn message(error: &Value) -> String {
    let text = error["message"].as_str().or(error.as_str()).unwrap_or("it gave no reason");
    cut(text)
}

fn cut(text: &str) -> String {
    text.char_indices().take_while(|(at, _)| *at < MESSAGE_BYTES_MAX).map(|(_, character)| character).collect()
}

/// Turns a server's refusal into the table's terms: what its client did wrong stays the client's, everything else is the
/// server's failure. Its words are passed on; what it is is told by status, code and type alone.
pub fn refusal(status: u16, body: &[u8]) -> Error {
    let value: Value = serde_json::from_slice(body).unwrap_or_default();
    // Some send the object itself, others a text, and frameworks lists of what is wrong with the body.
    let error = if value["error"].is_null() { &value } else { &value["error"] };
    let detail = &value["detail"][0];
    let text = error["message"].as_str().or(error.as_str()).or(detail["msg"].as_str()).or(value["detail"].as_str());
    let at = error["param"].as_str().map(str::to_string).or_else(|| place(&detail["loc"]));
    let names = [error["code"].as_str(), error["type"].as_str()];
    let own = names.iter().flatten().find_map(|name| Code::from_text(name));
    let own =
        own.filter(|code| code.row().retry == Retry::Never && code.row().http < 500 && *code != Code::ClientClosed);
    let too_long = names.iter().flatten().any(|name| TOO_LONG.contains(name));
    let code = match status {
        400..=499 if too_long => Code::ContextLengthExceeded,
        // These are about this worker as a client, not about ours.
        401 | 403 | 404 | 405 | 407 => Code::UpstreamFailed,
        429 | 503 => Code::Overloaded,
        400..=499 => own.unwrap_or(match status {
            413 => Code::BodyTooLarge,
            415 => Code::UnsupportedMediaType,
            _ => Code::InvalidRequest,
        }),
        _ => Code::UpstreamFailed,
    };
    let said = text.map(cut);
    let message = match (code, said) {
        (Code::UpstreamFailed | Code::Overloaded, Some(said)) => {
            format!("the model's engine answered {status}: {said}")
        }
        (_, Some(said)) => said,
        (_, None) => format!("the model's engine answered {status} without a reason"),
    };
    let error = Error::new(code, message);
    match at.filter(|at| at.len() <= 256) {
        Some(at) if code.row().http < 500 => error.at(at),
        _ => error,
    }
}

/// Reads where a framework found the fault: `["body", "messages", 0]`.
fn place(loc: &Value) -> Option<String> {
    let parts = loc.as_array()?.iter().filter(|part| part.as_str() != Some("body"));
    let words = parts.map(|part| part.as_str().map_or_else(|| part.to_string(), str::to_string));
    Some(words.collect::<Vec<_>>().join(".")).filter(|place| !place.is_empty())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn events_tell_of_text_ends_and_failures() {
        let chat = br#"data: {"choices":[{"index":0,"delta":{"content":"hi \u00e9"},"finish_reason":null}]}"#;
        assert_eq!(event(&[chat, &b"\n\n"[..]].concat()), Told { text: true, ..Told::default() });
        let role = event(b"data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\r\n\r\n");
        assert_eq!(role, Told::default());
        let end = event(
            b"data: {\"choices\":[{\"text\":\"\",\"finish_reason\":\"length\"}],\n\
                          data: \"usage\":{\"prompt_tokens\":3,\"completion_tokens\":5}}\n\n",
        );
        let usage = Some(Usage { prompt: 3, completion: 5, ..Usage::default() });
        assert_eq!(end, Told { finish: Some("length"), usage, ..Told::default() });
        assert!(event(b"data: [DONE]\n\n").done && event(b"data:[DONE]\n\n").done);
        assert_eq!(event(b"data: {\"error\":{\"message\":\"gone\"}}\n\n").failure.as_deref(), Some("gone"));
        let call =
            br#"{"choices":[{"message":{"tool_calls":[{"id":"x"}]},"finish_reason":"tool_calls"}],"usage":null}"#;
        assert!(answer(call).text && answer(call).finish == Some("tool_calls"));
        assert_eq!(event(b": a comment\n\n"), Told::default());
    }

    #[test]
    fn a_refusal_is_its_clients_or_its_servers() {
        let of = |status: u16, body: Value| refusal(status, body.to_string().as_bytes());
        let error = |message: &str, code: &str| serde_json::json!({"error": {"message": message, "code": code}});
        let bad = of(400, serde_json::json!({"error": {"message": "no", "param": "messages", "code": 400}}));
        assert_eq!((bad.code(), bad.message(), bad.param()), (Code::InvalidRequest, "no", Some("messages")));
        assert_eq!(of(400, error("x", "context_length_exceeded")).code(), Code::ContextLengthExceeded);
        let long = serde_json::json!({"error": {"message": "x", "type": "exceed_context_size_error"}});
        assert_eq!(of(400, long).code(), Code::ContextLengthExceeded);
        assert_eq!(of(400, error("x", "unsupported_parameter")).code(), Code::UnsupportedParameter);
        assert_eq!(of(404, error("x", "model_not_found")).code(), Code::UpstreamFailed);
        assert_eq!(of(400, error("x", "draining")).code(), Code::InvalidRequest, "its drain is not ours");
        assert_eq!(
            (of(429, error("x", "x")).code(), of(503, Value::Null).code()),
            (Code::Overloaded, Code::Overloaded)
        );
        assert_eq!(of(500, error("boom", "x")).message(), "the model's engine answered 500: boom");
        let fastapi = serde_json::json!({"detail": [{"loc": ["body", "messages", 0], "msg": "field required"}]});
        let invalid = of(422, fastapi);
        assert_eq!((invalid.message(), invalid.param()), ("field required", Some("messages.0")));
        assert_eq!(refusal(502, b"<html>").code(), Code::UpstreamFailed);
    }

    proptest! {
        #[test]
        fn nothing_that_a_server_says_is_too_much(bytes in proptest::collection::vec(any::<u8>(), 0..200), status: u16) {
            let mut framed = b"data: ".to_vec();
            framed.extend_from_slice(&bytes);
            let (_, _, error) = (event(&framed), answer(&bytes), refusal(status, &bytes));
            prop_assert!(error.message().len() <= MESSAGE_BYTES_MAX + 60);
        }
    }
}
