//! What a gateway reads of a request: enough to route it, and to finish it where a worker could not.

use std::borrow::Cow;
use std::fmt;

use memchr::memchr;
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use words::{Error, ModelId};

use crate::endpoint::Endpoint;
use crate::generation::{CHOICES_MAX, choices, malformed};
use crate::private::RESUME_FIELD;
use crate::skim;

/// What a gateway needs to know of a request to route it, and to finish it where a worker could not. Everything else is checked by the worker.
#[derive(Debug, Default, PartialEq, Deserialize)]
pub struct Peek<'a> {
    /// The model's name.
    #[serde(borrow, default)]
    pub model: Option<Cow<'a, str>>,
    /// Whether the answer is a stream.
    #[serde(default)]
    pub stream: Option<bool>,
    /// How many answers; checked by [`Peek::choices`].
    #[serde(default)]
    pub n: Option<Value>,
    /// The texts of a text completion, as far as their number goes; checked by the worker.
    #[serde(default)]
    pub prompt: Prompts,
    /// Whether the stream ends with its usage; checked by the worker.
    #[serde(default)]
    pub stream_options: Option<Value>,
    /// A private field that clients may not send.
    #[serde(default, rename = "cortex_resume")]
    pub resume: Option<IgnoredAny>,
}

/// How many texts a value holds: a list of texts or of token lists has as many, anything else is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prompts(pub usize);

impl Default for Prompts {
    fn default() -> Self {
        Prompts(1)
    }
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Count;
        impl<'de> Visitor<'de> for Count {
            type Value = Prompts;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("texts or tokens")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Prompts, A::Error> {
                let one = matches!(items.next_element::<Value>()?, None | Some(Value::Number(_)));
                let mut count = 1;
                while items.next_element::<IgnoredAny>()?.is_some() {
                    count += 1;
                }
                Ok(if one { Prompts(1) } else { Prompts(count) })
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Prompts, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Prompts(1))
            }
            fn visit_str<E>(self, _: &str) -> Result<Prompts, E> {
                Ok(Prompts(1))
            }
            fn visit_bool<E>(self, _: bool) -> Result<Prompts, E> {
                Ok(Prompts(1))
            }
            fn visit_f64<E>(self, _: f64) -> Result<Prompts, E> {
                Ok(Prompts(1))
            }
            fn visit_u64<E>(self, _: u64) -> Result<Prompts, E> {
                Ok(Prompts(1))
            }
            fn visit_i64<E>(self, _: i64) -> Result<Prompts, E> {
                Ok(Prompts(1))
            }
            fn visit_unit<E>(self) -> Result<Prompts, E> {
                Ok(Prompts(1))
            }
        }
        deserializer.deserialize_any(Count)
    }
}

impl<'a> Peek<'a> {
    /// Reads the few fields without building the rest.
    ///
    /// # Errors
    /// `InvalidRequest` when the body is no JSON object or one of the fields has the wrong type.
    pub fn parse(body: &'a [u8]) -> Result<Self, Error> {
        Self::skim(body).map_or_else(|| Self::whole(body), Ok)
    }

    /// Reads what [`Peek::whole`] would, or nothing: a long body is mostly texts, and to find their ends is the work.
    pub(crate) fn skim(body: &'a [u8]) -> Option<Self> {
        let (mut peek, mut seen) = (Peek::default(), 0u8);
        skim::fields(body, |name, value| {
            let bit = match name {
                b"model" => {
                    peek.model = match one::<Option<&str>>(value) {
                        Some(plain) => plain.map(Cow::Borrowed),
                        None => one(value)?,
                    };
                    1
                }
                b"stream" => {
                    peek.stream = one(value)?;
                    2
                }
                b"n" => {
                    peek.n = one(value)?;
                    4
                }
                b"prompt" => {
                    peek.prompt = prompts(value)?;
                    8
                }
                b"stream_options" => {
                    peek.stream_options = one(value)?;
                    16
                }
                b"cortex_resume" => {
                    peek.resume = one(value)?;
                    32
                }
                _ => return Some(()),
            };
            let twice = seen & bit != 0;
            seen |= bit;
            (!twice).then_some(())
        })?;
        Some(peek)
    }

    /// The meaning of [`Peek::parse`].
    pub(crate) fn whole(body: &'a [u8]) -> Result<Self, Error> {
        serde_json::from_slice(body).map_err(|error| misfit(body, &error))
    }

    /// Returns how many answers are wanted.
    ///
    /// # Errors
    /// `InvalidRequest` when it is no number of answers, or there are too many prompts.
    pub fn choices(&self, endpoint: Endpoint) -> Result<u32, Error> {
        match endpoint {
            Endpoint::Chat => choices(self.n.as_ref()),
            Endpoint::Completions => {
                let all = u64::from(choices(self.n.as_ref())?).saturating_mul(self.prompt.0 as u64);
                let message = || format!("'prompt' and 'n' ask for {all} answers; {CHOICES_MAX} are the most");
                u32::try_from(all)
                    .ok()
                    .filter(|all| *all <= CHOICES_MAX)
                    .ok_or_else(|| Error::invalid("prompt", message()))
            }
            Endpoint::Embeddings | Endpoint::Tokenize | Endpoint::Detokenize => Ok(1),
        }
    }

    /// Returns whether the stream ends with its usage.
    pub fn include_usage(&self) -> bool {
        let options = self.stream_options.as_ref().and_then(|options| options.get("include_usage"));
        options.and_then(Value::as_bool).unwrap_or(false)
    }

    /// Returns the model's id.
    ///
    /// # Errors
    /// `InvalidRequest` when it is absent or no id.
    pub fn model_id(&self) -> Result<ModelId, Error> {
        let missing = || Error::invalid("model", "'model' is missing; GET /v1/models lists the names");
        let text = self.model.as_deref().ok_or_else(missing)?;
        ModelId::new(text).map_err(|error| Error::invalid("model", error.to_string()))
    }
}

/// Says which field has the wrong type, where it is that.
fn misfit(body: &[u8], error: &serde_json::Error) -> Error {
    let map: Map<String, Value> = match serde_json::from_slice(body) {
        Ok(map) => map,
        Err(error) => return malformed(body, &error),
    };
    let wrong =
        |name: &str, fits: fn(&Value) -> bool| map.get(name).is_some_and(|value| !value.is_null() && !fits(value));
    match () {
        () if wrong("model", Value::is_string) => Error::invalid("model", "'model' must be a string"),
        () if wrong("stream", Value::is_boolean) => Error::invalid("stream", "'stream' must be a boolean"),
        () => malformed(body, error),
    }
}

fn one<'a, T: Deserialize<'a>>(value: &'a [u8]) -> Option<T> {
    serde_json::from_slice(value).ok()
}

/// A text is one prompt, whatever it says.
fn prompts(value: &[u8]) -> Option<Prompts> {
    let plain = value.starts_with(b"\"") && memchr(b'\\', value).is_none() && std::str::from_utf8(value).is_ok();
    if plain { Some(Prompts(1)) } else { one(value) }
}

/// Removes the private field from a client's body.
///
/// # Errors
/// `InvalidRequest` when the body is no JSON object.
pub fn without_private_fields(body: &[u8]) -> Result<Vec<u8>, Error> {
    let mut map: Map<String, Value> = serde_json::from_slice(body).map_err(|error| malformed(body, &error))?;
    map.remove(RESUME_FIELD);
    serde_json::to_vec(&map).map_err(Error::internal)
}

/// Puts the model's own id in the place of another name of it; every other byte stays.
///
/// # Errors
/// `InvalidRequest` when the body is no JSON object.
pub fn with_model(body: &[u8], id: &ModelId) -> Result<Vec<u8>, Error> {
    #[derive(Deserialize)]
    struct Named<'a> {
        /// A name without escapes, which is a piece of the body, between two quotes.
        model: &'a str,
    }
    let name = Value::from(id.as_str());
    if let Ok(Named { model }) = serde_json::from_slice(body)
        && let Some(quote) = (model.as_ptr() as usize).checked_sub(body.as_ptr() as usize + 1)
        && let Some((before, rest)) = body.split_at_checked(quote)
        && let Some(after) = rest.get(model.len() + 2..)
    {
        return Ok([before, name.to_string().as_bytes(), after].concat());
    }
    let mut map: Map<String, Value> = serde_json::from_slice(body).map_err(|error| malformed(body, &error))?;
    map.insert("model".into(), name);
    serde_json::to_vec(&map).map_err(Error::internal)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn a_field_of_the_wrong_type_is_named_and_what_is_no_object_is_refused_in_words() {
        let refused = |body: &str| {
            let error = Peek::parse(body.as_bytes()).unwrap_err();
            (error.param().map(str::to_string), error.message().to_string())
        };
        assert_eq!(refused(r#"{"model": 5}"#), (Some("model".into()), "'model' must be a string".into()));
        assert_eq!(refused(r#"{"stream": "yes", "model": "m"}"#).0, Some("stream".into()));
        for body in ["null", "5", "[5]", r#"{"model": "a", "model": "b"}"#] {
            let (param, message) = refused(body);
            assert!(param.is_none() && !message.contains("Peek") && message.contains("line 1"), "{body}: {message}");
        }
    }

    #[test]
    fn an_alias_is_replaced_and_nothing_else() {
        let id = ModelId::new("org/a\"b").unwrap();
        for (body, wanted) in [
            (r#"{"b": 1.50, "model" : "x", "a":["model"]}"#, r#"{"b": 1.50, "model" : "org/a\"b", "a":["model"]}"#),
            (r#"{"model":"é","stream":true}"#, r#"{"model":"org/a\"b","stream":true}"#),
            (r#"{"b":1,"model":"\u0078","a":2}"#, r#"{"b":1,"model":"org/a\"b","a":2}"#),
        ] {
            assert_eq!(String::from_utf8(with_model(body.as_bytes(), &id).unwrap()).unwrap(), wanted);
        }
        assert!(with_model(b"[]", &id).is_err());
    }

    #[test]
    fn every_prompt_of_a_list_has_its_answers() {
        let count = |prompt: Value| {
            let body = json!({"model": "m", "prompt": prompt, "n": 2}).to_string();
            Peek::parse(body.as_bytes()).unwrap().choices(Endpoint::Completions).map_err(|_| ())
        };
        for one in
            [json!("a"), json!([1, 2, 3]), json!([]), json!(null), json!(7), json!({"a": [1]}), json!(true), json!(1.5)]
        {
            assert_eq!(count(one.clone()), Ok(2), "{one}");
        }
        assert_eq!(count(json!(["a", "b", "c"])), Ok(6));
        assert_eq!(count(json!([[1, 2], [3]])), Ok(4));
        assert_eq!(count(json!(vec!["a"; 65])), Err(()));
        let chat = Peek::parse(br#"{"prompt": ["a", "b"], "n": 3}"#).unwrap();
        assert_eq!(chat.choices(Endpoint::Chat).unwrap(), 3);
    }
}
