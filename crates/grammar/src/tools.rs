//! Calls of tools as grammars, in the form that a model writes them in.

use serde_json::Value;
use words::{Code, Error};

use crate::compile::{check_bytes, json_rule};
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
}

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
    let mut alternatives = Vec::new();
    for (i, tool) in tools.iter().enumerate() {
        schema::check(&tool.parameters, tool.strict, limits)?;
        let (before, after) = (quoted(&tool.before), quoted(&tool.after));
        let schema = json_rule(&tool.parameters, tool.strict);
        rules.push_str(&format!("call_{i}: {before} arguments_{i} {after}\narguments_{i}: %json {schema}\n"));
        alternatives.push(format!("call_{i}"));
    }
    check_bytes(rules.len(), limits)?;
    let more = between.map_or(String::new(), |between| format!(" ({} call)*", quoted(between)));
    Ok(format!("answer: call{more}\ncall: {}\n{rules}", alternatives.join(" | ")))
}
