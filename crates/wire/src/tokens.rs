//! `POST /tokenize` and `POST /detokenize`, in vLLM's shapes.

use serde::Serialize;
use serde_json::Value;
use words::{Error, ModelId};

use crate::fields;
use crate::generation::{Checked, flag, model};
use crate::messages::messages;

/// What is to be tokenised.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// A text.
    Prompt(String),
    /// Messages, through the model's chat template.
    Messages(Vec<Value>),
}

/// A checked request for tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizeRequest {
    /// Which model.
    pub model: ModelId,
    /// What of.
    pub source: Source,
    /// Whether the begin token comes first where the model wants one; true unless said, but for messages.
    pub add_special_tokens: bool,
    /// Whether tokens are spelled out too.
    pub return_token_strs: bool,
    /// How many fields nobody knows.
    pub unknown_fields: usize,
}

impl TokenizeRequest {
    /// Reads a request.
    ///
    /// # Errors
    /// `InvalidRequest` with the field in `param`.
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        let mut checked = Checked::read(body, fields::TOKENIZE)?;
        let map = &mut checked.map;
        let source = match (map.remove("prompt"), map.remove("messages")) {
            (Some(Value::String(text)), None | Some(Value::Null)) => Source::Prompt(text),
            (None | Some(Value::Null), Some(list @ Value::Array(_))) => Source::Messages(messages(Some(list))?),
            _ => return Err(Error::invalid("prompt", "either 'prompt', a string, or 'messages' is needed")),
        };
        let or = |name: &str, default: bool| map.get(name).and_then(Value::as_bool).unwrap_or(default);
        Ok(TokenizeRequest {
            model: model(map.get("model"))?,
            add_special_tokens: or("add_special_tokens", matches!(source, Source::Prompt(_))),
            return_token_strs: flag(map, "return_token_strs"),
            source,
            unknown_fields: checked.unknown_fields,
        })
    }
}

/// The answer to it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Tokenized {
    /// How many.
    pub count: usize,
    /// Most tokens of prompt and answer together.
    pub max_model_len: usize,
    /// The ids.
    pub tokens: Vec<u32>,
    /// The tokens as the vocabulary spells them, where they were wanted.
    pub token_strs: Option<Vec<String>>,
}

/// A checked request for text.
#[derive(Clone, Debug, PartialEq)]
pub struct DetokenizeRequest {
    /// Which model.
    pub model: ModelId,
    /// The ids.
    pub tokens: Vec<u32>,
    /// How many fields nobody knows.
    pub unknown_fields: usize,
}

impl DetokenizeRequest {
    /// Reads a request.
    ///
    /// # Errors
    /// `InvalidRequest` with the field in `param`.
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        let checked = Checked::read(body, fields::DETOKENIZE)?;
        let list = checked.map.get("tokens").and_then(Value::as_array);
        let wrong = || Error::invalid("tokens", "'tokens' must be an array of token ids");
        let tokens = list.and_then(|list| crate::text::tokens(list)).ok_or_else(wrong)?;
        Ok(DetokenizeRequest {
            model: model(checked.map.get("model"))?,
            tokens,
            unknown_fields: checked.unknown_fields,
        })
    }
}

/// The answer to it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Detokenized {
    /// The text.
    pub prompt: String,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn a_text_or_messages_are_needed_and_their_defaults_differ() {
        let read = |value: Value| TokenizeRequest::parse(value.to_string().as_bytes());
        let text = read(json!({"model": "m", "prompt": "x"})).unwrap();
        assert!(text.add_special_tokens && !text.return_token_strs);
        let chat = read(json!({"model": "m", "messages": [{"role": "user", "content": "x"}]})).unwrap();
        assert!(!chat.add_special_tokens);
        for wrong in [
            json!({"model": "m"}),
            json!({"model": "m", "prompt": 1}),
            json!({"model": "m", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}),
        ] {
            assert_eq!(read(wrong).unwrap_err().param(), Some("prompt"));
        }
    }

    #[test]
    fn tokens_are_ids() {
        let read =
            |tokens: Value| DetokenizeRequest::parse(json!({"model": "m", "tokens": tokens}).to_string().as_bytes());
        assert_eq!(read(json!([1, 2])).unwrap().tokens, [1, 2]);
        for wrong in [json!(null), json!("x"), json!([-1]), json!([1.5]), json!(["a"])] {
            assert_eq!(read(wrong).unwrap_err().param(), Some("tokens"));
        }
    }
}
