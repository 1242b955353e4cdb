//! Calls of tools as grammars, in the form that a model writes them in.

use llguidance::regex_to_lark;
use serde_json::Value;
use words::{Code, Error};

use crate::compile::{check_bytes, escaped, json_rule};
use crate::{Limits, schema};

/// A tool that an answer may call.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCall {
    /// What stands before the arguments, the tool's name in it.
    pub before: String,
    /// The schema of the arguments, an object.
    pub parameters: Value,
    /// Whether keywords that can't be enforced refuse the schema.
    pub strict: bool,
    /// What stands after the arguments.
    pub after: String,
    /// How the arguments are written.
    pub arguments: Arguments,
}

/// How a call's arguments are written.
#[derive(Clone, Debug, PartialEq)]
pub enum Arguments {
    /// As one JSON object.
    Json,
    /// Each by itself, in the order of the schema's properties, those that are not required or not at all; where the
    /// schema has no properties, any by any name.
    Tagged {
        /// What stands before an argument's name, between it and the value, after a value on its line, and after that,
        /// before a line's end.
        around: [&'static str; 4],
        /// Those that may be texts, which stand as they are; the others are JSON.
        texts: Vec<String>,
    },
}

/// Keywords of a text's schema that nothing has to enforce, or that are kept.
const TEXT_KEYWORDS: [&str; 7] = ["type", "enum", "const", "title", "description", "default", "examples"];

/// Writes text as Lark does, whose strings are JSON's.
pub(crate) fn quoted(text: &str) -> String {
    Value::String(text.into()).to_string()
}

/// Returns the rules of `answer`: one call, or more, parted by `between`.
///
/// # Errors
/// Those of the tools' schemas, and `InvalidRequest` without tools.
pub(crate) fn rules(tools: &[ToolCall], between: Option<&str>, limits: &Limits) -> Result<String, Error> {
    if tools.is_empty() {
        return Err(Error::new(Code::InvalidRequest, "a tool must be called, but there are none"));
    }
    let mut rules = String::new();
    let (mut text, mut alternatives) = (String::new(), Vec::new());
    for (i, tool) in tools.iter().enumerate() {
        schema::check(&tool.parameters, tool.strict, limits)?;
        let (before, after) = (quoted(&tool.before), quoted(&tool.after));
        match &tool.arguments {
            Arguments::Json => {
                let schema = json_rule(&tool.parameters, tool.strict);
                rules.push_str(&format!("call_{i}: {before} arguments_{i} {after}\narguments_{i}: %json {schema}\n"));
            }
            Arguments::Tagged { around, texts } => {
                let (each, more) = tagged(i, tool, around, texts)?;
                rules.push_str(&format!("call_{i}: {before} {each} {after}\n{more}"));
                text = text_rule(around[3]);
            }
        }
        alternatives.push(format!("call_{i}"));
    }
    check_bytes(rules.len(), limits)?;
    let more = between.map_or(String::new(), |between| format!(" ({} call)*", quoted(between)));
    Ok(format!("answer: call{more}\ncall: {}\n{rules}{text}", alternatives.join(" | ")))
}

/// Returns what stands for the arguments of the `i`th tool, and the rules for that.
///
/// # Errors
/// `UnsupportedParameter` where a strict schema asks for more than can be enforced, `InvalidRequest` for names that the
/// form can't write.
fn tagged(i: usize, tool: &ToolCall, around: &[&str; 4], texts: &[String]) -> Result<(String, String), Error> {
    let [before, between, line, end] = around;
    let properties = tool.parameters["properties"].as_object().filter(|properties| !properties.is_empty());
    let Some(properties) = properties else {
        if tool.parameters["additionalProperties"] == Value::Bool(false) {
            return Ok((String::new(), String::new()));
        }
        let key = format!("{} /[A-Za-z0-9_.-]{{1,64}}/ {}", quoted(before), quoted(between));
        return Ok((format!("any_{i}*"), format!("any_{i}: {key} text \"\\n\"\n")));
    };
    let required =
        |key: &str| tool.parameters["required"].as_array().is_some_and(|all| all.iter().any(|one| one == key));
    let (mut each, mut rules) = (String::new(), String::new());
    for (j, (key, schema)) in properties.iter().enumerate() {
        if key.is_empty() || key.contains(|c: char| c.is_control() || "<>".contains(c)) {
            let message = format!("the model's form of calls has no place for an argument called {}", quoted(key));
            return Err(Error::new(Code::InvalidRequest, message));
        }
        let over = quoted(&format!("{line}{end}\n"));
        let value = match values(schema) {
            Some(values) => {
                let values: Vec<String> = values.iter().map(|value| quoted(&bare(value))).collect();
                format!("({}) {over}", values.join(" | "))
            }
            None if texts.contains(key) => {
                check_text(schema, key, tool.strict)?;
                "text \"\\n\"".to_string()
            }
            None => {
                let rule = json_rule(&with_definitions(schema, &tool.parameters), tool.strict);
                rules.push_str(&format!("value_{i}_{j}: %json {rule}\n"));
                format!("value_{i}_{j} {over}")
            }
        };
        rules.push_str(&format!("argument_{i}_{j}: {} {value}\n", quoted(&format!("{before}{key}{between}"))));
        each.push_str(&format!("argument_{i}_{j}{} ", if required(key) { "" } else { "?" }));
    }
    Ok((each, rules))
}

/// Returns the rule of a text: it is over at the first tag that could end it, as a parser of the call has it.
fn text_rule(end: &str) -> String {
    format!("text[lazy]: /(?s:.*){}/\n", regex_to_lark(&escaped(end), ""))
}

/// Returns the values that a schema lists.
fn values(schema: &Value) -> Option<&[Value]> {
    match (schema.get("const"), schema.get("enum")) {
        (Some(value), _) => Some(std::slice::from_ref(value)),
        (None, Some(Value::Array(values))) if !values.is_empty() => Some(values),
        _ => None,
    }
}

/// Writes a value as it stands between tags.
fn bare(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}

/// Returns an argument's schema with the definitions that it may point to.
fn with_definitions(schema: &Value, root: &Value) -> Value {
    let mut schema = schema.clone();
    for key in ["$defs", "definitions"] {
        if let (Some(fields), Some(definitions)) = (schema.as_object_mut(), root.get(key)) {
            fields.entry(key).or_insert_with(|| definitions.clone());
        }
    }
    schema
}

/// Refuses what a strict schema asks of a text that stands as it is.
fn check_text(schema: &Value, key: &str, strict: bool) -> Result<(), Error> {
    let unknown = schema
        .as_object()
        .into_iter()
        .flat_map(|fields| fields.keys())
        .find(|word| !TEXT_KEYWORDS.contains(&word.as_str()));
    match unknown {
        Some(word) if strict => {
            let message = format!(
                "'{word}' of the argument '{key}' can't be enforced in this model's form of calls; leave \
                                   it out, or 'strict'"
            );
            Err(Error::new(Code::UnsupportedParameter, message))
        }
        _ => Ok(()),
    }
}
