//! `POST /v1/chat/completions`: from bytes to a request that holds only what is honoured.

use serde_json::{Map, Value};
use words::{Code, Error};

use crate::fields;
use crate::generation::{Checked, Generation, flag};
use crate::logprobs;

/// Most messages.
pub const MESSAGES_MAX: usize = 4096;

/// A checked request.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatRequest {
    /// Messages with plain-text contents, as the chat template takes them.
    pub messages: Vec<Value>,
    /// All the rest.
    pub generation: Generation,
}

impl ChatRequest {
    /// Reads a request.
    ///
    /// # Errors
    /// `InvalidRequest` with the field in `param`, or `UnsupportedParameter`.
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        let mut checked = Checked::read(body, fields::CHAT)?;
        let mut generation = checked.generation()?;
        generation.logprobs = logprobs(&checked.map)?;
        Ok(ChatRequest { messages: messages(checked.map.remove("messages"))?, generation })
    }
}

/// Reads how many of the likeliest tokens are told beside each; `None` when tokens are not told.
fn logprobs(map: &Map<String, Value>) -> Result<Option<u32>, Error> {
    let (wanted, top) = (flag(map, "logprobs"), logprobs::top(map, "top_logprobs")?);
    match (wanted, top) {
        (false, Some(1..)) => Err(Error::invalid("top_logprobs", "'top_logprobs' needs 'logprobs' to be true")),
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0))),
    }
}

pub(crate) fn messages(value: Option<Value>) -> Result<Vec<Value>, Error> {
    let Some(Value::Array(items)) = value else {
        return Err(Error::invalid("messages", "'messages' must be an array of messages"));
    };
    if items.is_empty() || items.len() > MESSAGES_MAX {
        let message = format!("'messages' must have 1 to {MESSAGES_MAX} messages, it has {}", items.len());
        return Err(Error::invalid("messages", message));
    }
    items.into_iter().enumerate().map(|(i, item)| message(i, item)).collect()
}

fn message(i: usize, item: Value) -> Result<Value, Error> {
    let at = |field: &str| format!("messages[{i}]{field}");
    let Value::Object(mut map) = item else {
        return Err(Error::invalid(at(""), format!("'{}' must be an object", at(""))));
    };
    let role = match map.get("role").and_then(Value::as_str) {
        Some("system" | "developer") => "system",
        Some("user") => "user",
        Some("assistant") => "assistant",
        Some("tool" | "function") => {
            let message = "messages of tools are not supported; send their text as a user message";
            return Err(Error::new(Code::UnsupportedParameter, message).at(at(".role")));
        }
        _ => {
            let message = format!("'{}' must be system, developer, user or assistant", at(".role"));
            return Err(Error::invalid(at(".role"), message));
        }
    };
    for field in ["tool_calls", "function_call", "audio"] {
        let empty = |value: &Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
        if map.get(field).is_some_and(|value| !empty(value)) {
            let message = format!("'{}' is not supported", at(&format!(".{field}")));
            return Err(Error::new(Code::UnsupportedParameter, message).at(at(&format!(".{field}"))));
        }
    }
    let content = content(&at(".content"), map.remove("content"), role)?;
    let mut out = Map::new();
    out.insert("role".into(), role.into());
    out.insert("content".into(), content.into());
    if let Some(name) = map.remove("name").filter(|name| !name.is_null()) {
        if !name.is_string() {
            return Err(Error::invalid(at(".name"), format!("'{}' must be a string", at(".name"))));
        }
        out.insert("name".into(), name);
    }
    Ok(Value::Object(out))
}

/// Joins text parts with a line feed, as vLLM does for templates that take plain text.
fn content(at: &str, value: Option<Value>, role: &str) -> Result<String, Error> {
    match value {
        Some(Value::String(text)) => Ok(text),
        // An assistant turn without text is legal.
        None | Some(Value::Null) if role == "assistant" => Ok(String::new()),
        Some(Value::Array(parts)) if !parts.is_empty() => {
            let mut texts = Vec::with_capacity(parts.len());
            for (k, part) in parts.iter().enumerate() {
                match (part["type"].as_str(), part["text"].as_str()) {
                    (Some("text"), Some(text)) => texts.push(text),
                    (Some("text"), None) | (None, _) => {
                        let message = format!("'{at}[{k}]' must be an object with 'type' and 'text'");
                        return Err(Error::invalid(format!("{at}[{k}]"), message));
                    }
                    (Some(kind), _) => {
                        let message = format!("'{at}[{k}]' has type '{kind}'; this server takes text only");
                        return Err(Error::new(Code::UnsupportedParameter, message).at(format!("{at}[{k}]")));
                    }
                }
            }
            Ok(texts.join("\n"))
        }
        _ => Err(Error::invalid(at, format!("'{at}' must be a string or a non-empty array of text parts"))),
    }
}

#[cfg(test)]
#[path = "chat_tests.rs"]
mod tests;
