//! Messages of a chat: from OpenAI's shapes to the ones that chat templates take.

use serde_json::{Map, Value, json};
use words::{Code, Error};

use crate::tools::is_name;

/// Most messages.
pub const MESSAGES_MAX: usize = 4096;
/// Most calls in one message.
pub const MESSAGE_CALLS_MAX: usize = 128;
/// Longest id of a call, in bytes.
pub const CALL_ID_BYTES_MAX: usize = 256;

/// Reads the messages. Contents become plain text, and the arguments of calls the text of a JSON value.
///
/// # Errors
/// `InvalidRequest` or `UnsupportedParameter`, with the field in `param`.
pub(crate) fn messages(value: Option<Value>) -> Result<Vec<Value>, Error> {
    let Some(Value::Array(items)) = value else {
        return Err(Error::invalid("messages", "'messages' must be an array of messages"));
    };
    if items.is_empty() || items.len() > MESSAGES_MAX {
        let message = format!("'messages' must have 1 to {MESSAGES_MAX} messages, it has {}", items.len());
        return Err(Error::invalid("messages", message));
    }
    // The id of the last call that came as a `function_call`, which has none of its own.
    let mut called = None;
    items.into_iter().enumerate().map(|(i, item)| message(i, item, &mut called)).collect()
}

/// Names the call of a message that came without an id: nine digits, as the strictest templates want them.
fn made_id(i: usize) -> String {
    format!("{i:09}")
}

/// One message on its way in.
struct Reader {
    place: String,
    map: Map<String, Value>,
}

impl Reader {
    fn at(&self, field: &str) -> String {
        format!("{}{field}", self.place)
    }

    fn wrong(&self, field: &str, what: &str) -> Error {
        Error::invalid(self.at(field), format!("'{}' must be {what}", self.at(field)))
    }

    fn unsupported(&self, field: &str, message: &str) -> Error {
        Error::new(Code::UnsupportedParameter, message).at(self.at(field))
    }

    fn take(&mut self, key: &str) -> Option<Value> {
        self.map.remove(key).filter(|value| !value.is_null())
    }

    fn text(&mut self, key: &str) -> Result<Option<String>, Error> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(&format!(".{key}"), "a string")),
        }
    }
}

fn message(i: usize, item: Value, called: &mut Option<String>) -> Result<Value, Error> {
    let place = format!("messages[{i}]");
    let Value::Object(map) = item else {
        return Err(Error::invalid(&place, format!("'{place}' must be an object")));
    };
    let mut reader = Reader { place, map };
    let role = match reader.map.get("role").and_then(Value::as_str) {
        Some("system" | "developer") => "system",
        Some("user") => "user",
        Some("assistant") => "assistant",
        Some("tool") => "tool",
        // The older form of the same.
        Some("function") => {
            let id = called.take().unwrap_or_else(|| made_id(i));
            reader.map.insert("tool_call_id".into(), id.into());
            "tool"
        }
        _ => return Err(reader.wrong(".role", "system, developer, user, assistant or tool")),
    };
    if reader.take("audio").is_some() {
        let message = format!("'{}' is not supported", reader.at(".audio"));
        return Err(reader.unsupported(".audio", &message));
    }
    let mut calls = calls(&mut reader)?;
    if let Some(function) = reader.take("function_call") {
        if !calls.is_empty() || role != "assistant" {
            return Err(reader.wrong(".function_call", "absent; an assistant makes one call, or 'tool_calls'"));
        }
        let id = made_id(i);
        calls.push(json!({"id": id, "type": "function", "function": said(&reader.at(".function_call"), function)?}));
        *called = Some(id);
    }
    if !calls.is_empty() && role != "assistant" {
        return Err(reader.wrong(".tool_calls", "absent; only an assistant calls tools"));
    }
    let content = reader.map.remove("content");
    let content = content_text(&reader.at(".content"), content, role)?;
    let mut out = Map::new();
    out.insert("role".into(), role.into());
    out.insert("content".into(), content.into());
    if let Some(name) = reader.text("name")? {
        out.insert("name".into(), name.into());
    }
    if role == "assistant" {
        if let Some(reasoning) = reader.text("reasoning_content")? {
            out.insert("reasoning_content".into(), reasoning.into());
        }
        if !calls.is_empty() {
            out.insert("tool_calls".into(), calls.into());
        }
    }
    if role == "tool" {
        let id = reader.text("tool_call_id")?.filter(|id| (1..=CALL_ID_BYTES_MAX).contains(&id.len()));
        let what = format!("the id of a call, of 1 to {CALL_ID_BYTES_MAX} bytes");
        out.insert("tool_call_id".into(), id.ok_or_else(|| reader.wrong(".tool_call_id", &what))?.into());
    }
    Ok(Value::Object(out))
}

fn calls(reader: &mut Reader) -> Result<Vec<Value>, Error> {
    let items = match reader.take("tool_calls") {
        None => return Ok(Vec::new()),
        Some(Value::Array(items)) if items.len() <= MESSAGE_CALLS_MAX => items,
        Some(_) => return Err(reader.wrong(".tool_calls", &format!("an array of {MESSAGE_CALLS_MAX} calls at most"))),
    };
    items.into_iter().enumerate().map(|(k, item)| call(&reader.at(&format!(".tool_calls[{k}]")), item)).collect()
}

fn call(place: &str, item: Value) -> Result<Value, Error> {
    let Value::Object(map) = item else {
        return Err(Error::invalid(place, format!("'{place}' must be an object")));
    };
    let mut reader = Reader { place: place.to_string(), map };
    if reader.map.get("type").is_some_and(|kind| kind != "function") {
        let message = format!("'{}' must be 'function'; other calls are not supported", reader.at(".type"));
        return Err(reader.unsupported(".type", &message));
    }
    let id = reader.text("id")?.filter(|id| (1..=CALL_ID_BYTES_MAX).contains(&id.len()));
    let id = id.ok_or_else(|| reader.wrong(".id", &format!("a string of 1 to {CALL_ID_BYTES_MAX} bytes")))?;
    let function = said(&reader.at(".function"), reader.take("function").unwrap_or_default())?;
    Ok(json!({"id": id, "type": "function", "function": function}))
}

/// Reads a call's name and arguments.
fn said(place: &str, item: Value) -> Result<Value, Error> {
    let Value::Object(map) = item else {
        return Err(Error::invalid(place, format!("'{place}' must be an object")));
    };
    let mut function = Reader { place: place.to_string(), map };
    let name = function.text("name")?.filter(|name| is_name(name));
    let name = name.ok_or_else(|| function.wrong(".name", "a tool's name"))?;
    let arguments = match function.take("arguments") {
        None => "{}".to_string(),
        Some(Value::String(text)) if text.trim().is_empty() => "{}".to_string(),
        Some(Value::String(text)) => text,
        Some(object @ Value::Object(_)) => object.to_string(),
        Some(_) => return Err(function.wrong(".arguments", "a string with a JSON object")),
    };
    Ok(json!({ "name": name, "arguments": arguments }))
}

/// Joins text parts with a line feed, as vLLM does for templates that take plain text.
fn content_text(at: &str, value: Option<Value>, role: &str) -> Result<String, Error> {
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
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn read(items: Value) -> Result<Value, String> {
        messages(Some(items)).map(Value::Array).map_err(|error| error.param().unwrap_or_default().to_string())
    }

    fn called(call: Value) -> Value {
        json!([{"role": "assistant", "content": null, "tool_calls": [call]}])
    }

    #[test]
    fn text_parts_are_joined_and_developer_speaks_as_system() {
        let parts = json!([
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ann"},
            {"role": "assistant", "tool_calls": [], "function_call": null, "refusal": null},
        ]);
        let wanted = json!([
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "a\nb", "name": "ann"},
            {"role": "assistant", "content": ""},
        ]);
        assert_eq!(read(parts), Ok(wanted));
    }

    #[test]
    fn a_turn_with_tools_is_what_templates_take() {
        let turn = json!([
            {"role": "assistant", "content": null, "reasoning_content": "hm", "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{\"b\": 1}"}},
                {"id": "b", "function": {"arguments": {"b": 1}, "name": "f"}, "index": 1},
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": ""}},
            ]},
            {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "x"}]},
            {"role": "tool", "tool_call_id": "b", "content": "y", "name": "f"},
        ]);
        let call = |id: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}});
        let wanted = json!([
            {"role": "assistant", "content": "", "reasoning_content": "hm",
                "tool_calls": [call("a", "{\"b\": 1}"), call("b", "{\"b\":1}"), call("c", "{}")]},
            {"role": "tool", "content": "x", "tool_call_id": "a"},
            {"role": "tool", "content": "y", "name": "f", "tool_call_id": "b"},
        ]);
        assert_eq!(read(turn), Ok(wanted));
    }

    #[test]
    fn a_turn_with_a_function_is_one_with_a_tool() {
        let turn = json!([
            {"role": "user", "content": "w?"},
            {"role": "assistant", "content": null, "function_call": {"name": "f", "arguments": "{\"b\": 1}"}},
            {"role": "function", "name": "f", "content": "x"},
            {"role": "function", "name": "f", "content": "y"},
        ]);
        let call = json!({"id": "000000001", "type": "function", "function": {"name": "f", "arguments": "{\"b\": 1}"}});
        let wanted = json!([
            {"role": "user", "content": "w?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "x", "name": "f", "tool_call_id": "000000001"},
            {"role": "tool", "content": "y", "name": "f", "tool_call_id": "000000003"},
        ]);
        assert_eq!(read(turn), Ok(wanted));
    }

    #[test]
    fn bad_messages_name_their_field() {
        let function = json!({"name": "f", "arguments": "{}"});
        for (items, param) in [
            (json!([{"role": "robot", "content": ""}]), "messages[0].role"),
            (json!([{"role": "function", "name": "f"}]), "messages[0].content"),
            (json!([{"role": "tool", "content": ""}]), "messages[0].tool_call_id"),
            (json!([{"role": "tool", "tool_call_id": "x".repeat(257), "content": ""}]), "messages[0].tool_call_id"),
            (json!([{"role": "tool", "tool_call_id": "a"}]), "messages[0].content"),
            (json!([{"role": "user", "content": "", "name": 1}]), "messages[0].name"),
            (
                json!([{"role": "user", "content": "", "tool_calls": [{"id": "a", "function": function}]}]),
                "messages[0].tool_calls",
            ),
            (json!([{"role": "assistant", "tool_calls": {}}]), "messages[0].tool_calls"),
            (json!([{"role": "assistant", "function_call": {}}]), "messages[0].function_call.name"),
            (json!([{"role": "assistant", "function_call": 1}]), "messages[0].function_call"),
            (json!([{"role": "user", "content": "", "function_call": function}]), "messages[0].function_call"),
            (
                json!([{"role": "assistant", "function_call": function, "tool_calls": [{"id": "a", "function": function}]}]),
                "messages[0].function_call",
            ),
            (json!([{"role": "assistant", "reasoning_content": []}]), "messages[0].reasoning_content"),
            (called(json!(1)), "messages[0].tool_calls[0]"),
            (called(json!({"function": function})), "messages[0].tool_calls[0].id"),
            (called(json!({"id": "a", "type": "custom"})), "messages[0].tool_calls[0].type"),
            (called(json!({"id": "a"})), "messages[0].tool_calls[0].function"),
            (called(json!({"id": "a", "function": {"name": "a b"}})), "messages[0].tool_calls[0].function.name"),
            (
                called(json!({"id": "a", "function": {"name": "f", "arguments": 1}})),
                "messages[0].tool_calls[0].function.arguments",
            ),
        ] {
            assert_eq!(read(items.clone()), Err(param.to_string()), "{items}");
        }
    }
}
