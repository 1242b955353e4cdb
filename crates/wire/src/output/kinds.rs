//! Of which types the arguments of a tool are, by its definition, and what a bare text is as one of them.

use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use super::is_space;
use crate::tools::Tool;

/// Deepest that types are looked for behind `$ref`, `anyOf` and their like.
const LOOK_DEPTH_MAX: usize = 8;

/// The JSON types that a value may be of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kinds(u8);

const TEXT: u8 = 1;
const NUMBER: u8 = 2;
const BOOLEAN: u8 = 4;
const NULL: u8 = 8;
const LIST: u8 = 16;
const OBJECT: u8 = 32;
const ANY: u8 = 63;

impl Kinds {
    /// Reads the types that the schema of all arguments gives to the one called `key`; any where it says nothing.
    pub(super) fn of(parameters: Option<&Value>, key: &str) -> Self {
        let schema = parameters.and_then(|root| Some((root, root.get("properties")?.get(key)?)));
        Kinds(schema.and_then(|(root, schema)| types(root, schema, LOOK_DEPTH_MAX)).unwrap_or(ANY))
    }

    /// Whether a text that begins so, white space apart, can be nothing but a text.
    pub(super) fn only_text(self, first: Option<char>) -> bool {
        self.0 & begun(first) & !TEXT == 0
    }

    /// Writes a text as JSON: as what it is, where that is one of the types, and else as a string.
    pub(super) fn json(self, text: &str) -> String {
        let bare = text.trim_matches(is_space);
        let json = match bare {
            "True" => "true",
            "False" => "false",
            "None" => "null",
            _ => bare,
        };
        let kind = begun(json.chars().next());
        match self.0 & kind != 0 && serde_json::from_str::<IgnoredAny>(json).is_ok() {
            true => json.to_string(),
            false => format!("\"{}\"", escaped(text)),
        }
    }
}

/// Returns what besides a text may begin so; anything where it has not begun. Python's words count as JSON's.
fn begun(first: Option<char>) -> u8 {
    match first {
        None => ANY,
        Some('{') => OBJECT,
        Some('[') => LIST,
        Some('-' | '0'..='9') => NUMBER,
        Some('t' | 'f' | 'T' | 'F') => BOOLEAN,
        Some('n' | 'N') => NULL,
        Some(_) => 0,
    }
}

/// Returns the declared arguments of a tool that may be texts, where values stand as they are.
pub fn texts_of(tool: &Tool) -> Vec<String> {
    let properties = tool.parameters.as_ref().and_then(|schema| schema.get("properties")?.as_object());
    let keys = properties.into_iter().flat_map(Map::keys);
    keys.filter(|key| Kinds::of(tool.parameters.as_ref(), key).0 & TEXT != 0).cloned().collect()
}

/// Writes a text as it stands between the quotes of a JSON string.
pub(super) fn escaped(text: &str) -> String {
    let quoted = Value::from(text).to_string();
    quoted[1..quoted.len() - 1].to_string()
}

fn types(root: &Value, schema: &Value, depth: usize) -> Option<u8> {
    let schema = schema.as_object()?;
    let deeper = |schema: &Value| depth.checked_sub(1).and_then(|depth| types(root, schema, depth));
    match schema.get("type") {
        Some(Value::String(name)) => return named(name),
        Some(Value::Array(names)) if !names.is_empty() => {
            return any_of(names.iter().map(|name| named(name.as_str()?)));
        }
        _ => {}
    }
    if let Some(path) = schema.get("$ref").and_then(Value::as_str) {
        return deeper(root.pointer(path.strip_prefix('#')?)?);
    }
    if let Some(value) = schema.get("const") {
        return Some(of_value(value));
    }
    if let Some(Value::Array(values)) = schema.get("enum") {
        return any_of(values.iter().map(|value| Some(of_value(value))));
    }
    let several = |schema: &Map<String, Value>, key: &str| schema.get(key).and_then(Value::as_array).cloned();
    if let Some(branches) = several(schema, "anyOf").or_else(|| several(schema, "oneOf")) {
        return any_of(branches.iter().map(deeper));
    }
    several(schema, "allOf")?.iter().find_map(deeper)
}

/// Puts types together, where all are known.
fn any_of(mut types: impl Iterator<Item = Option<u8>>) -> Option<u8> {
    types.try_fold(0, |all, one| Some(all | one?))
}

fn named(name: &str) -> Option<u8> {
    Some(match name {
        "string" => TEXT,
        "number" | "integer" => NUMBER,
        "boolean" => BOOLEAN,
        "null" => NULL,
        "array" => LIST,
        "object" => OBJECT,
        _ => return None,
    })
}

fn of_value(value: &Value) -> u8 {
    match value {
        Value::Null => NULL,
        Value::Bool(_) => BOOLEAN,
        Value::Number(_) => NUMBER,
        Value::String(_) => TEXT,
        Value::Array(_) => LIST,
        Value::Object(_) => OBJECT,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_text_is_what_its_definition_says_and_else_a_string() {
        let schema = json!({"type": "object", "properties": {
            "text": {"type": "string"}, "n": {"type": "integer"}, "x": {"type": "number"}, "yes": {"type": "boolean"},
            "list": {"type": "array"}, "maybe": {"type": ["string", "null"]}, "any": {}, "odd": {"type": "date"},
            "ref": {"$ref": "#/$defs/d"}, "loop": {"$ref": "#/properties/loop"}, "enum": {"enum": ["1", "2"]},
            "const": {"const": 7}, "either": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/d"}]},
            "one": {"allOf": [{"description": "d"}, {"type": "boolean"}]},
        }, "$defs": {"d": {"type": "object"}}});
        for (key, text, wanted) in [
            ("text", "3", "\"3\""),
            ("text", " a\"\n", "\" a\\\"\\n\""),
            ("n", " -3\n", "-3"),
            ("n", "three", "\"three\""),
            ("n", "03", "\"03\""),
            ("n", "true", "\"true\""),
            ("n", "", "\"\""),
            ("x", "1.50e3", "1.50e3"),
            ("yes", "true", "true"),
            ("yes", "False", "false"),
            ("yes", "falsehood", "\"falsehood\""),
            ("list", "[1,  {\"a\": 2}]", "[1,  {\"a\": 2}]"),
            ("list", "[1, 'a']", "\"[1, 'a']\""),
            ("maybe", "null", "null"),
            ("maybe", "None", "null"),
            ("maybe", "nil", "\"nil\""),
            ("any", "3", "3"),
            ("any", "{\"a\": 1}", "{\"a\": 1}"),
            ("any", "\"3\"", "\"\\\"3\\\"\""),
            ("unheard-of", "[]", "[]"),
            ("odd", "1", "1"),
            ("ref", "{}", "{}"),
            ("ref", "3", "\"3\""),
            ("loop", "3", "3"),
            ("enum", "1", "\"1\""),
            ("const", "7", "7"),
            ("either", "3", "3"),
            ("either", "{}", "{}"),
            ("either", "true", "\"true\""),
            ("one", "True", "true"),
        ] {
            assert_eq!(Kinds::of(Some(&schema), key).json(text), wanted, "{key} {text:?}");
        }
        assert_eq!(Kinds::of(None, "a").json("3"), "3");
    }

    #[test]
    fn what_can_only_be_a_text_is_known_by_its_beginning() {
        let schema = json!({"properties": {"text": {"type": "string"}, "n": {"type": ["integer", "string"]}}});
        let of = |key: &str| Kinds::of(Some(&schema), key);
        assert!(of("text").only_text(None) && of("text").only_text(Some('{')));
        assert!(!of("n").only_text(None) && !of("n").only_text(Some('7')) && of("n").only_text(Some('{')));
        assert!(!of("any").only_text(Some('N')) && of("any").only_text(Some('H')));
    }
}
