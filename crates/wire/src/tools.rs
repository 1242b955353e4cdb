//! `tools`, `tool_choice` and `parallel_tool_calls`: what a model may call, and whether it must. `functions` and
//! `function_call`, as OpenAI had them before, are the same of at most one call.

use serde_json::{Map, Value, json};
use words::{Code, Error};

/// Most tools of one request, as OpenAI has it.
pub const TOOLS_MAX: usize = 128;
/// Longest name of a tool, in bytes, as OpenAI has it.
pub const TOOL_NAME_BYTES_MAX: usize = 64;
/// Most bytes of all definitions together, written as JSON: they become part of the prompt.
pub const TOOLS_BYTES_MAX: usize = 512 << 10;
/// Deepest nesting of a tool's `parameters`.
pub const PARAMETERS_DEPTH_MAX: usize = 64;

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// 1 to [`TOOL_NAME_BYTES_MAX`] letters, digits, `_`, `-`, `.`; no two tools of a request share it.
    pub name: String,
    /// What it is for.
    pub description: Option<String>,
    /// A JSON schema of its arguments, an object; absent when it takes none. Not checked to be a schema.
    pub parameters: Option<Value>,
    /// Whether arguments must fit the schema.
    pub strict: bool,
}

/// Whether the model calls tools.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// It must not; also without tools.
    #[default]
    None,
    /// It decides.
    Auto,
    /// It must call one or more.
    Required,
    /// It must call this one, which is one of the request's.
    Named(String),
}

/// All that a request says of tools.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tools {
    /// At most [`TOOLS_MAX`].
    pub list: Vec<Tool>,
    /// Whether they are called.
    pub choice: ToolChoice,
    /// Whether one answer may hold more than one call.
    pub parallel: bool,
    /// The definitions as the client wrote them, in the order of `list`: what chat templates print.
    pub definitions: Vec<Value>,
    /// Whether they came as `functions`, and a call is said as a `function_call`.
    pub functions: bool,
}

impl Tools {
    /// Reads the fields.
    ///
    /// # Errors
    /// `InvalidRequest` or `UnsupportedParameter`, with the field in `param`.
    pub(crate) fn read(map: &mut Map<String, Value>) -> Result<Self, Error> {
        let mut given = |field: &str| match map.remove(field) {
            Some(Value::Array(definitions)) => definitions,
            _ => Vec::new(),
        };
        let (tools, functions) = (given("tools"), given("functions"));
        if !functions.is_empty() && !tools.is_empty() {
            let message = "'functions' is the older form of 'tools'; leave one of them out";
            return Err(Error::invalid("functions", message));
        }
        let older = !functions.is_empty();
        let (field, definitions) = if older { ("functions", functions) } else { ("tools", tools) };
        if definitions.len() > TOOLS_MAX {
            let message = format!("'{field}' may have {TOOLS_MAX} entries at most, it has {}", definitions.len());
            return Err(Error::invalid(field, message));
        }
        let read = |(i, definition): (usize, &Value)| match older {
            true => function(&format!("functions[{i}]"), Some(definition)),
            false => tool(&format!("tools[{i}]"), definition),
        };
        let list = definitions.iter().enumerate().map(read).collect::<Result<Vec<_>, _>>()?;
        let bytes: usize = definitions.iter().map(|definition| definition.to_string().len()).sum();
        if bytes > TOOLS_BYTES_MAX {
            let message = format!("the definitions of '{field}' may have {TOOLS_BYTES_MAX} bytes, they have {bytes}");
            return Err(Error::invalid(field, message));
        }
        for (i, tool) in list.iter().enumerate() {
            if list[..i].iter().any(|other| other.name == tool.name) {
                let message = format!("the {} '{}' is there twice", &field[..field.len() - 1], tool.name);
                let at = if older { format!("functions[{i}].name") } else { format!("tools[{i}].function.name") };
                return Err(Error::invalid(at, message));
            }
        }
        let newer = choice(map.get("tool_choice"), if older { &[] } else { &list })?;
        let elder = function_choice(map.get("function_call"), if older { &list } else { &[] })?;
        if !older {
            let parallel = map.get("parallel_tool_calls").and_then(Value::as_bool).unwrap_or(true);
            return Ok(Tools { list, choice: newer, parallel, definitions, functions: false });
        }
        let definitions = definitions.into_iter().map(|function| json!({"type": "function", "function": function}));
        Ok(Tools { list, choice: elder, parallel: false, definitions: definitions.collect(), functions: true })
    }

    /// Whether calls may come: what the model says is then searched for them.
    pub fn active(&self) -> bool {
        self.choice != ToolChoice::None
    }
}

fn tool(place: &str, definition: &Value) -> Result<Tool, Error> {
    let at = format!("{place}.type");
    match definition["type"].as_str() {
        Some("function") => function(&format!("{place}.function"), definition.get("function")),
        Some(kind) => {
            let message = format!("'{at}' is '{kind}'; this server takes tools of type 'function' only");
            Err(Error::new(Code::UnsupportedParameter, message).at(at))
        }
        None => {
            let message = format!("'{at}' must be 'function'");
            Err(Error::invalid(at, message))
        }
    }
}

fn function(place: &str, definition: Option<&Value>) -> Result<Tool, Error> {
    let at = |field: &str| format!("{place}{field}");
    let wrong = |field: &str, what: &str| Err(Error::invalid(at(field), format!("'{}' must be {what}", at(field))));
    let Some(function) = definition.and_then(Value::as_object) else { return wrong("", "an object") };
    let name = match function.get("name").and_then(Value::as_str) {
        Some(name) if is_name(name) => name.to_string(),
        _ => {
            let what = format!("1 to {TOOL_NAME_BYTES_MAX} letters, digits, '_', '-' or '.'");
            return wrong(".name", &what);
        }
    };
    let description = match function.get("description") {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) => Some(text.clone()),
        Some(_) => return wrong(".description", "a string"),
    };
    let parameters = match function.get("parameters") {
        None | Some(Value::Null) => None,
        Some(schema @ Value::Object(_)) if depth(schema) <= PARAMETERS_DEPTH_MAX => Some(schema.clone()),
        Some(Value::Object(_)) => {
            return wrong(".parameters", &format!("nested {PARAMETERS_DEPTH_MAX} deep at most"));
        }
        Some(_) => return wrong(".parameters", "a JSON schema, an object"),
    };
    let strict = match function.get("strict") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(strict)) => *strict,
        Some(_) => return wrong(".strict", "a boolean"),
    };
    Ok(Tool { name, description, parameters, strict })
}

/// Whether a text may name a tool.
pub(crate) fn is_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    (1..=TOOL_NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(fits)
}

/// Returns how deep a value is nested: 1 for what holds nothing.
pub(crate) fn depth(value: &Value) -> usize {
    // The parser of bodies bounds the recursion by its own limit of 128.
    1 + match value {
        Value::Array(items) => items.iter().map(depth).max().unwrap_or(0),
        Value::Object(fields) => fields.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

fn choice(value: Option<&Value>, list: &[Tool]) -> Result<ToolChoice, Error> {
    let wrong = |at: &str, message: String| Err(Error::invalid(at, message));
    let chosen = match value {
        None | Some(Value::Null) if list.is_empty() => ToolChoice::None,
        None | Some(Value::Null) => ToolChoice::Auto,
        Some(Value::String(word)) => match word.as_str() {
            "none" => ToolChoice::None,
            "auto" if list.is_empty() => ToolChoice::None,
            "auto" => ToolChoice::Auto,
            "required" => ToolChoice::Required,
            _ => return wrong("tool_choice", "'tool_choice' must be none, auto, required or an object".into()),
        },
        Some(object) => {
            if let Some(kind) = object["type"].as_str().filter(|kind| *kind != "function") {
                let message = format!("'tool_choice' of type '{kind}' is not supported; name one function");
                return Err(Error::new(Code::UnsupportedParameter, message).at("tool_choice.type"));
            }
            match object["function"]["name"].as_str() {
                Some(name) if list.iter().any(|tool| tool.name == name) => ToolChoice::Named(name.to_string()),
                Some(name) => {
                    let message = format!("'tool_choice' names '{name}', which is none of 'tools'");
                    return wrong("tool_choice.function.name", message);
                }
                None => return wrong("tool_choice.function.name", "'tool_choice' must name a function".into()),
            }
        }
    };
    if chosen == ToolChoice::Required && list.is_empty() {
        return wrong("tool_choice", "'tool_choice' is 'required', but there are no 'tools'".into());
    }
    Ok(chosen)
}

/// Reads `function_call`: as `tool_choice`, but that it can't be required.
fn function_choice(value: Option<&Value>, list: &[Tool]) -> Result<ToolChoice, Error> {
    let wrong = |at: &str, message: String| Err(Error::invalid(at, message));
    match value {
        None | Some(Value::Null) => choice(None, list),
        Some(Value::String(word)) if matches!(word.as_str(), "none" | "auto") => choice(value, list),
        Some(Value::String(_)) => wrong("function_call", "'function_call' must be none, auto or an object".into()),
        Some(object) => match object["name"].as_str() {
            Some(name) if list.iter().any(|tool| tool.name == name) => Ok(ToolChoice::Named(name.to_string())),
            Some(name) => {
                wrong("function_call.name", format!("'function_call' names '{name}', which is none of 'functions'"))
            }
            None => wrong("function_call.name", "'function_call' must name a function".into()),
        },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn read(value: Value) -> Result<Tools, String> {
        let mut map = value.as_object().unwrap().clone();
        Tools::read(&mut map).map_err(|error| error.param().unwrap_or_default().to_string())
    }

    fn named(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name}})
    }

    #[test]
    fn without_tools_none_are_called_and_with_tools_the_model_decides() {
        assert_eq!(read(json!({})).unwrap().choice, ToolChoice::None);
        assert_eq!(read(json!({"tools": [], "tool_choice": "auto"})).unwrap().choice, ToolChoice::None);
        let tools = read(json!({"tools": [named("a"), named("b.c-d_1")]})).unwrap();
        assert_eq!((tools.choice.clone(), tools.parallel, tools.active()), (ToolChoice::Auto, true, true));
        assert_eq!(tools.definitions, [named("a"), named("b.c-d_1")]);
        let choice = json!({"tools": [named("a")], "tool_choice": named("a"), "parallel_tool_calls": false});
        let tools = read(choice).unwrap();
        assert_eq!((tools.choice, tools.parallel), (ToolChoice::Named("a".into()), false));
        let none = read(json!({"tools": [named("a")], "tool_choice": "none"})).unwrap();
        assert!(!none.active());
    }

    #[test]
    fn a_definition_is_kept_as_it_was_written() {
        let parameters = json!({"type": "object", "properties": {"z": {}, "a": {}}});
        let tool = json!({"function": {"parameters": parameters, "strict": true, "name": "f", "description": "d"},
            "type": "function"});
        let tools = read(json!({"tools": [tool]})).unwrap();
        assert_eq!(tools.definitions[0].to_string(), tool.to_string());
        let wanted =
            Tool { name: "f".into(), description: Some("d".into()), parameters: Some(parameters), strict: true };
        assert_eq!(tools.list, [wanted]);
    }

    #[test]
    fn functions_are_tools_of_which_one_is_called() {
        let older = |name: &str| json!({"name": name, "parameters": {"type": "object"}});
        let named = |name: &str| json!({"type": "function", "function": older(name)});
        let tools = read(json!({"functions": [older("a"), older("b")], "parallel_tool_calls": true})).unwrap();
        assert_eq!((tools.choice.clone(), tools.parallel, tools.functions), (ToolChoice::Auto, false, true));
        assert_eq!(tools.definitions, [named("a"), named("b")]);
        assert_eq!(tools.list, read(json!({"tools": [named("a"), named("b")]})).unwrap().list);
        let called = |call: Value| read(json!({"functions": [older("a")], "function_call": call})).unwrap().choice;
        assert_eq!(called(json!("none")), ToolChoice::None);
        assert_eq!(called(json!("auto")), ToolChoice::Auto);
        assert_eq!(called(json!({"name": "a"})), ToolChoice::Named("a".into()));
        let none = read(json!({"functions": [], "function_call": "auto", "tools": [named("a")]})).unwrap();
        assert_eq!((none.choice, none.functions), (ToolChoice::Auto, false));
        for (value, param) in [
            (json!({"functions": [older("a")], "tools": [named("a")]}), "functions"),
            (json!({"functions": [older("a"), older("a")]}), "functions[1].name"),
            (json!({"functions": [7]}), "functions[0]"),
            (json!({"functions": [{}]}), "functions[0].name"),
            (json!({"functions": [older("a")], "function_call": "required"}), "function_call"),
            (json!({"functions": [older("a")], "function_call": {"name": "b"}}), "function_call.name"),
            (json!({"functions": [older("a")], "function_call": {}}), "function_call.name"),
            (json!({"function_call": {"name": "a"}}), "function_call.name"),
            (json!({"functions": [older("a")], "tool_choice": "required"}), "tool_choice"),
        ] {
            assert_eq!(read(value.clone()), Err(param.to_string()), "{value}");
        }
    }

    #[test]
    fn bad_tools_name_their_field() {
        let mut deep = json!({});
        for _ in 0..PARAMETERS_DEPTH_MAX {
            deep = json!({ "a": deep });
        }
        let function = |function: Value| json!({"tools": [{"type": "function", "function": function}]});
        for (value, param) in [
            (json!({"tools": vec![named("a"); TOOLS_MAX + 1]}), "tools"),
            (json!({"tools": [named("a"), named("a")]}), "tools[1].function.name"),
            (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
            (json!({"tools": [7]}), "tools[0].type"),
            (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
            (function(json!({"name": ""})), "tools[0].function.name"),
            (function(json!({"name": "a b"})), "tools[0].function.name"),
            (function(json!({"name": "x".repeat(65)})), "tools[0].function.name"),
            (function(json!({"name": "f", "description": 1})), "tools[0].function.description"),
            (function(json!({"name": "f", "parameters": []})), "tools[0].function.parameters"),
            (function(json!({"name": "f", "parameters": deep})), "tools[0].function.parameters"),
            (function(json!({"name": "f", "strict": "yes"})), "tools[0].function.strict"),
            (function(json!({"name": "f", "description": "x".repeat(TOOLS_BYTES_MAX)})), "tools"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"tools": [named("a")], "tool_choice": "some"}), "tool_choice"),
            (json!({"tools": [named("a")], "tool_choice": named("b")}), "tool_choice.function.name"),
            (json!({"tools": [named("a")], "tool_choice": {}}), "tool_choice.function.name"),
            (json!({"tools": [named("a")], "tool_choice": {"type": "allowed_tools"}}), "tool_choice.type"),
        ] {
            assert_eq!(read(value.clone()), Err(param.to_string()), "{value}");
        }
    }
}
