//! The tables of every field of each kind of request, and what is done with it.
//!
//! Unknown fields are ignored and counted; a known field of the wrong type is refused with its name in `param`.

use serde_json::{Map, Value};
use words::{Code, Error};

/// The JSON type a field must have; `null` always means "absent".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Kind {
    Bool,
    Integer,
    Number,
    Text,
    TextOrList,
    TextOrObject,
    List,
    Object,
}

impl Kind {
    fn admits(self, value: &Value) -> bool {
        match self {
            Kind::Bool => value.is_boolean(),
            Kind::Integer => value.is_i64() || value.is_u64(),
            Kind::Number => value.is_number(),
            Kind::Text => value.is_string(),
            Kind::TextOrList => value.is_string() || value.is_array(),
            Kind::TextOrObject => value.is_string() || value.is_object(),
            Kind::List => value.is_array(),
            Kind::Object => value.is_object(),
        }
    }

    fn words(self) -> &'static str {
        match self {
            Kind::Bool => "a boolean",
            Kind::Integer => "an integer",
            Kind::Number => "a number",
            Kind::Text => "a string",
            Kind::TextOrList => "a string or an array",
            Kind::TextOrObject => "a string or an object",
            Kind::List => "an array",
            Kind::Object => "an object",
        }
    }
}

/// What is done with a field.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Treatment {
    /// It does what OpenAI (or, for extensions, vLLM) says it does.
    Honoured,
    /// It would change the output and is not supported: refused unless null or one of these JSON values.
    Refused(&'static [&'static str]),
    /// Accepted without effect on the output.
    Bookkeeping,
}

/// One row.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// The key.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// What is done with it.
    pub treatment: Treatment,
}

const fn honoured(name: &'static str, kind: Kind) -> Field {
    Field { name, kind, treatment: Treatment::Honoured }
}

const fn refused(name: &'static str, kind: Kind, defaults: &'static [&'static str]) -> Field {
    Field { name, kind, treatment: Treatment::Refused(defaults) }
}

const fn bookkeeping(name: &'static str, kind: Kind) -> Field {
    Field { name, kind, treatment: Treatment::Bookkeeping }
}

/// The fields of one kind of request: groups of rows, some of which other kinds have too. No field is in two groups.
pub type Table = &'static [&'static [Field]];

/// What every request to a model has.
const ASK: &[Field] = &[
    honoured("model", Kind::Text),
    bookkeeping("user", Kind::Text),
    honoured("service_tier", Kind::Text),
    // An extension, with vLLM's name and meaning.
    honoured("cache_salt", Kind::Text),
];

/// What every request has that generates tokens.
const GENERATION: &[Field] = &[
    honoured("stream", Kind::Bool),
    honoured("stream_options", Kind::Object),
    honoured("temperature", Kind::Number),
    honoured("top_p", Kind::Number),
    honoured("seed", Kind::Integer),
    honoured("stop", Kind::TextOrList),
    honoured("max_tokens", Kind::Integer),
    honoured("n", Kind::Integer),
    honoured("frequency_penalty", Kind::Number),
    honoured("presence_penalty", Kind::Number),
    honoured("logit_bias", Kind::Object),
    // Extensions, with vLLM's names and meanings.
    honoured("top_k", Kind::Integer),
    honoured("min_p", Kind::Number),
    honoured("repetition_penalty", Kind::Number),
    honoured("min_tokens", Kind::Integer),
    honoured("ignore_eos", Kind::Bool),
    honoured("stop_token_ids", Kind::List),
];

/// What every request has whose answer may have to be something.
const FORMAT: &[Field] = &[
    // text, json_object, json_schema; as an extension regex, with its pattern. Of text completions it is an extension.
    honoured("response_format", Kind::Object),
    // Extensions of vLLM's: one of json, json_object, regex, choice, grammar.
    honoured("structured_outputs", Kind::Object),
    // The same, as vLLM had it before.
    honoured("guided_json", Kind::TextOrObject),
    honoured("guided_regex", Kind::Text),
    honoured("guided_choice", Kind::List),
    honoured("guided_grammar", Kind::Text),
];

/// Every field of OpenAI's chat completion request, and the extensions.
pub const CHAT: Table = &[
    ASK,
    GENERATION,
    FORMAT,
    &[
        honoured("messages", Kind::List),
        honoured("max_completion_tokens", Kind::Integer),
        honoured("logprobs", Kind::Bool),
        honoured("top_logprobs", Kind::Integer),
        // Of type function; for models whose template takes tools, and whose calls can be told from text.
        honoured("tools", Kind::List),
        honoured("tool_choice", Kind::TextOrObject),
        // False: a choice ends with its first call.
        honoured("parallel_tool_calls", Kind::Bool),
        // The older form of both, of one call at most; answers say it in that form too.
        honoured("functions", Kind::List),
        honoured("function_call", Kind::TextOrObject),
        refused("modalities", Kind::List, &[r#"["text"]"#]),
        refused("audio", Kind::Object, &[]),
        refused("prediction", Kind::Object, &[]),
        // A variable of the chat template; none and minimal turn thinking off where the template knows how.
        honoured("reasoning_effort", Kind::Text),
        refused("verbosity", Kind::Text, &[r#""medium""#]),
        refused("web_search_options", Kind::Object, &[]),
        refused("moderation", Kind::Object, &[]),
        bookkeeping("metadata", Kind::Object),
        bookkeeping("store", Kind::Bool),
        bookkeeping("safety_identifier", Kind::Text),
        bookkeeping("prompt_cache_key", Kind::Text),
        bookkeeping("prompt_cache_retention", Kind::Text),
        bookkeeping("prompt_cache_options", Kind::Object),
        // Further variables of the chat template, but for those that the server sets.
        honoured("chat_template_kwargs", Kind::Object),
    ],
];

/// Every field of OpenAI's text completion request, and the extensions.
pub const COMPLETION: Table = &[
    ASK,
    GENERATION,
    FORMAT,
    &[
        honoured("prompt", Kind::TextOrList),
        honoured("best_of", Kind::Integer),
        honoured("echo", Kind::Bool),
        honoured("logprobs", Kind::Integer),
        refused("suffix", Kind::Text, &[]),
    ],
];

/// Every field of OpenAI's embedding request, and the extensions.
pub const EMBEDDING: Table = &[
    ASK,
    &[
        honoured("input", Kind::TextOrList),
        honoured("encoding_format", Kind::Text),
        honoured("dimensions", Kind::Integer),
    ],
];

/// Every field of vLLM's request for the tokens of a text or of messages.
pub const TOKENIZE: Table = &[&[
    honoured("model", Kind::Text),
    honoured("prompt", Kind::Text),
    honoured("messages", Kind::List),
    honoured("add_special_tokens", Kind::Bool),
    refused("add_generation_prompt", Kind::Bool, &["true"]),
    honoured("return_token_strs", Kind::Bool),
    refused("continue_final_message", Kind::Bool, &["false"]),
    refused("chat_template", Kind::Text, &[]),
    refused("chat_template_kwargs", Kind::Object, &["{}"]),
    refused("mm_processor_kwargs", Kind::Object, &["{}"]),
    refused("tools", Kind::List, &["[]"]),
]];

/// Every field of vLLM's request for the text of tokens.
pub const DETOKENIZE: Table = &[&[honoured("model", Kind::Text), honoured("tokens", Kind::List)]];

/// Lists the rows of a table.
pub(crate) fn rows(table: Table) -> impl Iterator<Item = &'static Field> {
    table.iter().copied().flatten()
}

/// Checks every field of `request` against the table; returns how many were unknown.
///
/// # Errors
/// `InvalidRequest` for a wrong type, `UnsupportedParameter` for a value that would have to be ignored.
pub fn check(table: Table, request: &Map<String, Value>) -> Result<usize, Error> {
    let mut unknown = 0;
    for (name, value) in request {
        let Some(field) = rows(table).find(|field| field.name == name) else {
            unknown += 1;
            continue;
        };
        if value.is_null() {
            continue;
        }
        if !field.kind.admits(value) {
            return Err(Error::invalid(name, format!("'{name}' must be {}", field.kind.words())));
        }
        if let Treatment::Refused(defaults) = field.treatment
            && !defaults.iter().any(|default| is_default(default, value))
        {
            let message = format!("'{name}' is not supported with this value; leave it out or set it to null");
            return Err(Error::new(Code::UnsupportedParameter, message).at(name));
        }
    }
    Ok(unknown)
}

fn is_default(default: &str, value: &Value) -> bool {
    let Ok(default) = serde_json::from_str::<Value>(default) else { return false };
    match (default.as_f64(), value.as_f64()) {
        (Some(default), Some(value)) => default == value,
        _ => default == *value,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn code(request: Value) -> Result<usize, (Code, String)> {
        check(CHAT, request.as_object().unwrap()).map_err(|e| (e.code(), e.param().unwrap_or("").to_string()))
    }

    #[test]
    fn a_value_that_would_be_ignored_is_refused_by_name() {
        assert_eq!(code(json!({"modalities": ["audio"]})), Err((Code::UnsupportedParameter, "modalities".into())));
    }

    #[test]
    fn no_field_of_a_request_has_two_rows() {
        for table in [CHAT, COMPLETION, EMBEDDING, TOKENIZE, DETOKENIZE] {
            let mut names: Vec<&str> = rows(table).map(|field| field.name).collect();
            let all = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), all);
        }
    }

    #[test]
    fn null_and_defaults_pass_and_unknown_fields_are_counted() {
        let request = json!({"n": 1, "presence_penalty": 0.0, "tools": null, "response_format": {"type": "text"},
            "user": "u", "of_tomorrow": 1, "also": {}});
        assert_eq!(code(request), Ok(2));
    }

    #[test]
    fn a_wrong_type_is_refused_by_name_in_bookkeeping_too() {
        assert_eq!(code(json!({"user": 7})), Err((Code::InvalidRequest, "user".into())));
        assert_eq!(code(json!({"seed": 1.5})), Err((Code::InvalidRequest, "seed".into())));
    }

    #[test]
    fn no_field_of_the_published_api_is_forgotten() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/openai/openapi.json");
        let Ok(text) = std::fs::read_to_string(path) else {
            assert!(std::env::var("CORTEX_TEST_DATA").as_deref() != Ok("required"), "the OpenAI document is missing");
            eprintln!("SKIPPED: the OpenAI document is not beside this checkout");
            return;
        };
        let document: Value = serde_json::from_str(&text).unwrap();
        let schemas = &document["components"]["schemas"];
        for (request, table, least) in [
            ("CreateChatCompletionRequest", CHAT, 30),
            ("CreateCompletionRequest", COMPLETION, 15),
            ("CreateEmbeddingRequest", EMBEDDING, 4),
        ] {
            let mut names = std::collections::BTreeSet::new();
            let mut open = vec![schemas[request].clone()];
            while let Some(schema) = open.pop() {
                if let Some(properties) = schema["properties"].as_object() {
                    names.extend(properties.keys().cloned());
                }
                for part in schema["allOf"].as_array().into_iter().flatten() {
                    let named = part["$ref"].as_str().and_then(|path| path.rsplit('/').next());
                    open.push(named.map_or_else(|| part.clone(), |name| schemas[name].clone()));
                }
            }
            assert!(names.len() > least, "the document was not understood: {names:?}");
            let missing: Vec<_> = names.iter().filter(|name| !rows(table).any(|field| field.name == *name)).collect();
            assert!(missing.is_empty(), "fields of {request} without a row: {missing:?}");
        }
    }
}
