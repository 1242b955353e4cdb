//! `response_format` and its extensions: what an answer must be.
//!
//! Schemas and patterns are read here and judged where they are compiled.

use serde_json::{Map, Value};
use words::{Code, Error};

/// Longest name of a schema, in bytes, as OpenAI has it.
pub const SCHEMA_NAME_BYTES_MAX: usize = 64;

/// What an answer must be.
#[derive(Clone, Debug, PartialEq)]
pub enum Format {
    /// A JSON object.
    JsonObject,
    /// JSON that a schema describes.
    JsonSchema {
        /// The schema, an object; not checked to be one that can be enforced.
        schema: Value,
        /// Whether what can't be enforced refuses it.
        strict: bool,
    },
    /// Text that a regular expression matches.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// Text of a grammar, in Lark's form.
    Grammar(String),
}

/// A format, and the field that it came in.
#[derive(Clone, Debug, PartialEq)]
pub struct Wish {
    /// What the answer must be.
    pub format: Format,
    /// The field, for errors.
    pub param: &'static str,
}

impl Wish {
    /// Reads `response_format`, `structured_outputs` and vLLM's older `guided_*` fields; none, or text, is `None`.
    ///
    /// # Errors
    /// `InvalidRequest` with the field in `param`, also where more than one of them says something;
    /// `UnsupportedParameter` for kinds that nobody knows.
    pub(crate) fn read(map: &mut Map<String, Value>) -> Result<Option<Self>, Error> {
        let mut wishes = Vec::new();
        if let Some(value) = taken(map, "response_format") {
            wishes.extend(response_format(value)?);
        }
        if let Some(value) = taken(map, "structured_outputs") {
            let Value::Object(mut outputs) = value else {
                return Err(Error::invalid("structured_outputs", "'structured_outputs' must be an object"));
            };
            for (field, param, kind) in EXTENSIONS {
                wishes.extend(extension(taken(&mut outputs, field), param, kind)?);
            }
            if let Some(field) = outputs.keys().find(|field| !outputs[field.as_str()].is_null()) {
                let message = format!("'structured_outputs.{field}' is not supported");
                let error = Error::new(Code::UnsupportedParameter, message);
                return Err(error.at(format!("structured_outputs.{field}")));
            }
        }
        for (param, kind) in GUIDED {
            wishes.extend(extension(taken(map, param), param, kind)?);
        }
        if let [_, second, ..] = wishes.as_slice() {
            let message = format!("'{}' says what the answer must be, and so does another field", second.param);
            return Err(Error::invalid(second.param, message));
        }
        Ok(wishes.pop())
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Json,
    JsonObject,
    Regex,
    Choice,
    Grammar,
}

/// vLLM's fields of `structured_outputs`.
const EXTENSIONS: [(&str, &str, Kind); 5] = [
    ("json", "structured_outputs.json", Kind::Json),
    ("json_object", "structured_outputs.json_object", Kind::JsonObject),
    ("regex", "structured_outputs.regex", Kind::Regex),
    ("choice", "structured_outputs.choice", Kind::Choice),
    ("grammar", "structured_outputs.grammar", Kind::Grammar),
];
/// Those it had before.
const GUIDED: [(&str, Kind); 4] = [
    ("guided_json", Kind::Json),
    ("guided_regex", Kind::Regex),
    ("guided_choice", Kind::Choice),
    ("guided_grammar", Kind::Grammar),
];

fn taken(map: &mut Map<String, Value>, field: &str) -> Option<Value> {
    map.shift_remove(field).filter(|value| !value.is_null())
}

fn text(value: Value, param: &str) -> Result<String, Error> {
    match value {
        Value::String(text) => Ok(text),
        _ => Err(Error::invalid(param, format!("'{param}' must be a string"))),
    }
}

fn extension(value: Option<Value>, param: &'static str, kind: Kind) -> Result<Option<Wish>, Error> {
    let Some(value) = value else { return Ok(None) };
    let format = match (kind, value) {
        // Servers that know these fields refuse what they can't enforce.
        (Kind::Json, schema @ Value::Object(_)) => Format::JsonSchema { schema, strict: true },
        (Kind::Json, Value::String(text)) => match serde_json::from_str(&text) {
            Ok(schema @ Value::Object(_)) => Format::JsonSchema { schema, strict: true },
            _ => return Err(Error::invalid(param, format!("'{param}' must be a JSON schema"))),
        },
        (Kind::Json, _) => return Err(Error::invalid(param, format!("'{param}' must be a JSON schema"))),
        (Kind::JsonObject, Value::Bool(true)) => Format::JsonObject,
        (Kind::JsonObject, Value::Bool(false)) => return Ok(None),
        (Kind::JsonObject, _) => return Err(Error::invalid(param, format!("'{param}' must be a boolean"))),
        (Kind::Regex, value) => Format::Regex(text(value, param)?),
        (Kind::Grammar, value) => Format::Grammar(text(value, param)?),
        (Kind::Choice, Value::Array(texts)) => {
            Format::Choice(texts.into_iter().map(|value| text(value, param)).collect::<Result<_, _>>()?)
        }
        (Kind::Choice, _) => return Err(Error::invalid(param, format!("'{param}' must be an array of strings"))),
    };
    Ok(Some(Wish { format, param }))
}

fn response_format(mut value: Value) -> Result<Option<Wish>, Error> {
    let kind = match &value["type"] {
        Value::String(kind) => kind.clone(),
        _ => return Err(Error::invalid("response_format.type", "'response_format.type' must be a string")),
    };
    let (format, param) = match kind.as_str() {
        "text" => return Ok(None),
        "json_object" => (Format::JsonObject, "response_format"),
        "json_schema" => return json_schema(value["json_schema"].take()).map(Some),
        "regex" => {
            let param = "response_format.pattern";
            (Format::Regex(text(value["pattern"].take(), param)?), param)
        }
        _ => {
            let message =
                format!("'response_format.type' must be text, json_object, json_schema or regex, not '{kind}'");
            return Err(Error::new(Code::UnsupportedParameter, message).at("response_format.type"));
        }
    };
    Ok(Some(Wish { format, param }))
}

fn json_schema(value: Value) -> Result<Wish, Error> {
    let param = "response_format.json_schema.schema";
    let Value::Object(mut given) = value else {
        let at = "response_format.json_schema";
        return Err(Error::invalid(at, format!("'{at}' must be an object with 'name' and 'schema'")));
    };
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    let named = |name: &str| (1..=SCHEMA_NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(fits);
    if !given.get("name").and_then(Value::as_str).is_some_and(named) {
        let at = "response_format.json_schema.name";
        let message = format!("'{at}' must have 1 to {SCHEMA_NAME_BYTES_MAX} letters, digits, '_' or '-'");
        return Err(Error::invalid(at, message));
    }
    let strict = match given.get("strict") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(strict)) => *strict,
        Some(_) => {
            let at = "response_format.json_schema.strict";
            return Err(Error::invalid(at, format!("'{at}' must be a boolean")));
        }
    };
    let format = match given.shift_remove("schema") {
        Some(schema @ Value::Object(_)) => Format::JsonSchema { schema, strict },
        // OpenAI has it optional; any JSON then fits.
        None | Some(Value::Null) => Format::JsonSchema { schema: Value::Object(Map::new()), strict },
        Some(_) => return Err(Error::invalid(param, format!("'{param}' must be a JSON schema, an object"))),
    };
    Ok(Wish { format, param })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    fn read(value: Value) -> Result<Option<Wish>, String> {
        let mut map = value.as_object().unwrap().clone();
        Wish::read(&mut map).map_err(|error| error.param().unwrap_or_default().to_string())
    }

    #[test]
    fn text_or_nothing_is_no_wish() {
        for value in [
            json!({}),
            json!({"response_format": null}),
            json!({"response_format": {"type": "text"}}),
            json!({"guided_json": null, "structured_outputs": {"json": null, "json_object": false}}),
        ] {
            assert_eq!(read(value), Ok(None));
        }
    }

    #[test]
    fn every_field_says_its_format() {
        let schema = || json!({"type": "object"});
        let schemas = |strict| Format::JsonSchema { schema: schema(), strict };
        let named = |strict: Value| json!({"type": "json_schema", "json_schema": {"name": "a-b_1", "schema": schema(), "strict": strict}});
        for (value, format) in [
            (json!({"response_format": {"type": "json_object"}}), Format::JsonObject),
            (json!({"response_format": named(json!(true))}), schemas(true)),
            (json!({"response_format": named(json!(null))}), schemas(false)),
            (json!({"response_format": {"type": "regex", "pattern": "a+"}}), Format::Regex("a+".into())),
            (json!({"structured_outputs": {"json": schema()}}), schemas(true)),
            (json!({"structured_outputs": {"grammar": "start: x"}}), Format::Grammar("start: x".into())),
            (json!({"structured_outputs": {"json_object": true}}), Format::JsonObject),
            (json!({"guided_json": "{\"type\": \"object\"}"}), schemas(true)),
            (json!({"guided_regex": "b"}), Format::Regex("b".into())),
            (json!({"guided_choice": ["x", "y"]}), Format::Choice(vec!["x".into(), "y".into()])),
        ] {
            assert_eq!(read(value.clone()).unwrap().unwrap().format, format, "{value}");
        }
    }

    #[test]
    fn a_wrong_wish_is_refused_by_its_field() {
        let schema =
            |json_schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": json_schema}});
        for (value, param) in [
            (json!({"response_format": {}}), "response_format.type"),
            (json!({"response_format": {"type": "xml"}}), "response_format.type"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
            (schema(json!({"schema": {}})), "response_format.json_schema.name"),
            (schema(json!({"name": "a b", "schema": {}})), "response_format.json_schema.name"),
            (schema(json!({"name": "a", "schema": 7})), "response_format.json_schema.schema"),
            (schema(json!({"name": "a", "schema": {}, "strict": 1})), "response_format.json_schema.strict"),
            (json!({"response_format": {"type": "regex"}}), "response_format.pattern"),
            (json!({"structured_outputs": {"json": 7}}), "structured_outputs.json"),
            (json!({"structured_outputs": {"structural_tag": "{}"}}), "structured_outputs.structural_tag"),
            (json!({"guided_choice": ["a", 7]}), "guided_choice"),
            (json!({"guided_regex": "a", "guided_choice": ["a"]}), "guided_choice"),
            (json!({"response_format": {"type": "json_object"}, "guided_json": {}}), "guided_json"),
        ] {
            assert_eq!(read(value.clone()), Err(param.into()), "{value}");
        }
    }
}
