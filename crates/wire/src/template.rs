//! What a request gives to the chat template besides messages and tools: `chat_template_kwargs`, `reasoning_effort`.

use serde_json::{Map, Value};
use words::Error;

use crate::tools::depth;

/// Most variables of `chat_template_kwargs`.
pub const VARIABLES_MAX: usize = 64;
/// Most bytes of all variables, written as JSON.
pub const VARIABLES_BYTES_MAX: usize = 16 << 10;
/// Deepest nesting of a variable.
pub const VARIABLE_DEPTH_MAX: usize = 8;

/// What this server gives to templates itself.
const RESERVED: [&str; 8] = [
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "bos_token",
    "eos_token",
    "strftime_now",
    "raise_exception",
];

/// The efforts that clients may ask for, and whether the model then thinks at all.
const EFFORTS: [(&str, bool); 6] =
    [("none", false), ("minimal", false), ("low", true), ("medium", true), ("high", true), ("xhigh", true)];

/// Reads the variables. An effort is a variable of its name, for the templates that take one; one that means no
/// thinking also turns it off in templates that know `enable_thinking` or `thinking`. What the client names itself wins.
///
/// # Errors
/// `InvalidRequest` with the field in `param`.
pub(crate) fn variables(map: &mut Map<String, Value>) -> Result<Map<String, Value>, Error> {
    const FIELD: &str = "chat_template_kwargs";
    let mut variables = match map.remove(FIELD) {
        Some(Value::Object(variables)) => variables,
        _ => Map::new(),
    };
    if variables.len() > VARIABLES_MAX {
        return Err(Error::invalid(FIELD, format!("'{FIELD}' may have {VARIABLES_MAX} keys at most")));
    }
    let bytes = variables.iter().map(|(name, value)| name.len() + value.to_string().len()).sum::<usize>();
    if bytes > VARIABLES_BYTES_MAX {
        let message = format!("'{FIELD}' may have {VARIABLES_BYTES_MAX} bytes, it has {bytes}");
        return Err(Error::invalid(FIELD, message));
    }
    for (name, value) in &variables {
        let at = format!("{FIELD}.{name}");
        if RESERVED.contains(&name.as_str()) {
            return Err(Error::invalid(at, format!("'{name}' is set by the server; it can't be given in '{FIELD}'")));
        }
        if depth(value) > VARIABLE_DEPTH_MAX {
            return Err(Error::invalid(
                at,
                format!("'{FIELD}.{name}' may be nested {VARIABLE_DEPTH_MAX} deep at most"),
            ));
        }
    }
    if let Some(effort) = map.get("reasoning_effort").and_then(Value::as_str) {
        let Some((_, thinks)) = EFFORTS.iter().find(|(name, _)| *name == effort) else {
            let message = "'reasoning_effort' must be none, minimal, low, medium, high or xhigh";
            return Err(Error::invalid("reasoning_effort", message));
        };
        variables.entry("reasoning_effort").or_insert(effort.into());
        for name in ["enable_thinking", "thinking"].into_iter().filter(|_| !thinks) {
            variables.entry(name).or_insert(false.into());
        }
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    fn read(value: Value) -> Result<Value, String> {
        let mut map = value.as_object().unwrap().clone();
        variables(&mut map).map(Value::Object).map_err(|error| error.param().unwrap_or_default().to_string())
    }

    #[test]
    fn variables_are_given_as_they_are() {
        assert_eq!(read(json!({})), Ok(json!({})));
        let some = json!({"enable_thinking": false, "of_mine": {"a": [1]}});
        assert_eq!(read(json!({ "chat_template_kwargs": some })), Ok(some));
    }

    #[test]
    fn an_effort_of_none_turns_thinking_off_unless_the_client_says_otherwise() {
        let off = json!({"reasoning_effort": "none", "enable_thinking": false, "thinking": false});
        assert_eq!(read(json!({"reasoning_effort": "none"})), Ok(off));
        assert_eq!(read(json!({"reasoning_effort": "high"})), Ok(json!({"reasoning_effort": "high"})));
        let own = json!({"reasoning_effort": "minimal", "chat_template_kwargs": {"enable_thinking": true}});
        assert_eq!(read(own).unwrap()["enable_thinking"], true);
    }

    #[test]
    fn bad_variables_name_their_field() {
        let mut deep = json!(1);
        for _ in 0..VARIABLE_DEPTH_MAX {
            deep = json!([deep]);
        }
        let many: Map<String, Value> = (0..=VARIABLES_MAX).map(|i| (i.to_string(), json!(1))).collect();
        for (variables, param) in [
            (json!({"messages": []}), "chat_template_kwargs.messages"),
            (json!({"tools": []}), "chat_template_kwargs.tools"),
            (json!({"add_generation_prompt": false}), "chat_template_kwargs.add_generation_prompt"),
            (json!({"a": deep}), "chat_template_kwargs.a"),
            (json!({"a": "x".repeat(VARIABLES_BYTES_MAX)}), "chat_template_kwargs"),
            (Value::Object(many), "chat_template_kwargs"),
        ] {
            assert_eq!(read(json!({ "chat_template_kwargs": variables })), Err(param.to_string()));
        }
        assert_eq!(read(json!({"reasoning_effort": "some"})), Err("reasoning_effort".to_string()));
    }
}
