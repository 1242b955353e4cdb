//! What every request that generates says besides its text: sampling, limits, stops, and how the answer goes out.

use serde_json::{Map, Value};
use words::{Code, Error, ModelId};

use crate::fields::{self, Table};
use crate::private::{RESUME_FIELD, Resume};
use crate::shaping::Shaping;

/// Most stop strings.
pub const STOP_STRINGS_MAX: usize = 16;
/// Most bytes in one stop string.
pub const STOP_BYTES_MAX: usize = 1024;
/// Most answers to one request; a worker may allow fewer.
pub const CHOICES_MAX: u32 = 128;
/// Longest cache salt, in bytes.
const SALT_BYTES_MAX: usize = 256;

/// `service_tier`, as far as it says anything to a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tier {
    /// `priority`: before the others.
    Priority,
    /// `auto`, `default`, `scale`, or nothing.
    #[default]
    Default,
    /// `flex`: when nothing else wants to run.
    Flex,
}

/// The checked fields. Numbers are finite and in range; `None` means that the model's defaults decide.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// Which model.
    pub model: ModelId,
    /// Whether the answer is a stream.
    pub stream: bool,
    /// Whether a stream ends with the usage.
    pub include_usage: bool,
    /// 0 to 2.
    pub temperature: Option<f32>,
    /// Above 0 to 1.
    pub top_p: Option<f32>,
    /// 0 keeps everything.
    pub top_k: Option<u32>,
    /// 0 to 1.
    pub min_p: Option<f32>,
    /// Seeds the draws; negative numbers are taken by their bits.
    pub seed: Option<u64>,
    /// None is empty.
    pub stop: Vec<String>,
    /// At least 1.
    pub max_tokens: Option<u32>,
    /// How many of the likeliest tokens are told beside each of the answer; `None` when none is told.
    pub logprobs: Option<u32>,
    /// Answers to give to each prompt, at least 1.
    pub choices: u32,
    /// Penalties, added logits, and when an answer may end.
    pub shaping: Shaping,
    /// Who comes first when there is too little room.
    pub tier: Tier,
    /// Only requests of an equal salt share computed prompts.
    pub cache_salt: Option<String>,
    /// What an earlier attempt had, from a gateway.
    pub resume: Option<Resume>,
    /// How many fields nobody knows.
    pub unknown_fields: usize,
}

/// A body as an object, its fields checked against their table.
pub(crate) struct Checked {
    pub(crate) map: Map<String, Value>,
    resume: Option<Resume>,
    pub(crate) unknown_fields: usize,
}

impl Checked {
    /// Reads a body.
    ///
    /// # Errors
    /// `InvalidRequest` with the field in `param`, or `UnsupportedParameter`.
    pub(crate) fn read(body: &[u8], table: Table) -> Result<Self, Error> {
        let value: Value = serde_json::from_slice(body).map_err(|error| malformed(body, &error))?;
        let Value::Object(mut map) = value else {
            return Err(Error::new(Code::InvalidRequest, "the request body must be a JSON object"));
        };
        let resume = map.remove(RESUME_FIELD).map(Resume::from_value).transpose()?;
        let unknown_fields = fields::check(table, &map)?;
        Ok(Checked { map, resume, unknown_fields })
    }

    /// Reads what a request has that generates nothing: its sampling is of no effect.
    ///
    /// # Errors
    /// `InvalidRequest` with the field in `param`.
    pub(crate) fn without_sampling(&mut self) -> Result<Generation, Error> {
        let keep = ["model", "service_tier", "cache_salt"];
        let map = self.map.iter().filter(|(name, _)| keep.contains(&name.as_str()));
        let map = map.map(|(name, value)| (name.clone(), value.clone())).collect();
        Checked { map, resume: None, unknown_fields: self.unknown_fields }.generation()
    }

    /// Reads what every request that generates has.
    ///
    /// # Errors
    /// `InvalidRequest` with the field in `param`.
    pub(crate) fn generation(&mut self) -> Result<Generation, Error> {
        let map = &self.map;
        Ok(Generation {
            model: model(map.get("model"))?,
            stream: flag(map, "stream"),
            include_usage: include_usage(map)?,
            temperature: number(map, "temperature", 0.0, 2.0)?,
            top_p: top_p(map)?,
            top_k: top_k(map)?,
            min_p: number(map, "min_p", 0.0, 1.0)?,
            seed: seed(map),
            stop: stop(map.get("stop"))?,
            max_tokens: max_tokens(map)?,
            logprobs: None,
            choices: choices(map.get("n"))?,
            shaping: Shaping::read(map)?,
            tier: tier(map)?,
            cache_salt: cache_salt(map)?,
            resume: self.resume.take(),
            unknown_fields: self.unknown_fields,
        })
    }
}

/// How deep a request's arrays and objects may lie in one another; serde_json's own bound.
pub const DEPTH_MAX: usize = 127;

/// Returns how deep arrays and objects lie in one another, as far as the text makes sense.
fn depth(body: &[u8]) -> usize {
    let (mut depth, mut deepest, mut quoted, mut escaped) = (0usize, 0, false, false);
    for byte in body {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = quoted,
            b'"' => quoted = !quoted,
            b'{' | b'[' if !quoted => depth += 1,
            b'}' | b']' if !quoted => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

pub(crate) fn malformed(body: &[u8], error: &serde_json::Error) -> Error {
    if depth(body) > DEPTH_MAX {
        let message = format!("the request body has arrays and objects over {DEPTH_MAX} deep in one another");
        return Error::new(Code::InvalidRequest, message);
    }
    let place = format!("line {} column {}", error.line(), error.column());
    match error.classify() {
        // Data errors name the field and the wanted type; they quote nothing of ours.
        serde_json::error::Category::Data => {
            Error::new(Code::InvalidRequest, format!("the request body does not fit: {error}"))
        }
        serde_json::error::Category::Eof => {
            Error::new(Code::InvalidRequest, format!("the request body ends in the middle of its JSON, at {place}"))
        }
        _ => Error::new(Code::InvalidRequest, format!("the request body is not valid JSON: {error}")),
    }
}

pub(crate) fn model(value: Option<&Value>) -> Result<ModelId, Error> {
    let text = value.and_then(Value::as_str).ok_or_else(|| {
        Error::invalid("model", "'model' is missing; GET /v1/models lists the names this server answers to")
    })?;
    ModelId::new(text).map_err(|error| Error::invalid("model", error.to_string()))
}

pub(crate) fn flag(map: &Map<String, Value>, name: &str) -> bool {
    map.get(name).and_then(Value::as_bool).unwrap_or(false)
}

pub(crate) fn number(map: &Map<String, Value>, name: &str, low: f64, high: f64) -> Result<Option<f32>, Error> {
    match map.get(name).and_then(Value::as_f64) {
        Some(number) if !(low..=high).contains(&number) => {
            Err(Error::invalid(name, format!("'{name}' must be between {low} and {high}, it is {number}")))
        }
        number => Ok(number.map(|number| number as f32)),
    }
}

fn top_p(map: &Map<String, Value>) -> Result<Option<f32>, Error> {
    match number(map, "top_p", 0.0, 1.0)? {
        // OpenAI allows 0; the nucleus then holds the likeliest token alone.
        Some(top_p) if top_p <= 0.0 => Ok(Some(f32::MIN_POSITIVE)),
        top_p => Ok(top_p),
    }
}

fn top_k(map: &Map<String, Value>) -> Result<Option<u32>, Error> {
    match map.get("top_k").and_then(Value::as_i64) {
        // vLLM's -1 means "keep everything", as does 0.
        Some(-1) => Ok(Some(0)),
        Some(k) => u32::try_from(k).map(Some).map_err(|_| Error::invalid("top_k", "'top_k' must be -1, 0 or more")),
        None => Ok(None),
    }
}

fn seed(map: &Map<String, Value>) -> Option<u64> {
    let value = map.get("seed")?;
    value.as_u64().or_else(|| value.as_i64().map(|seed| seed as u64))
}

fn max_tokens(map: &Map<String, Value>) -> Result<Option<u32>, Error> {
    let mut limit = None;
    for name in ["max_completion_tokens", "max_tokens"] {
        let Some(value) = map.get(name).filter(|value| !value.is_null()) else { continue };
        let number = value.as_u64().and_then(|number| u32::try_from(number).ok()).filter(|number| *number > 0);
        let number = number.ok_or_else(|| {
            Error::invalid(name, format!("'{name}' must be an integer from 1 to {}, it is {value}", u32::MAX))
        })?;
        limit = limit.or(Some(number));
    }
    Ok(limit)
}

pub(crate) fn choices(value: Option<&Value>) -> Result<u32, Error> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(1) };
    let number = value.as_u64().filter(|number| (1..=u64::from(CHOICES_MAX)).contains(number));
    let wrong = || Error::invalid("n", format!("'n' must be an integer from 1 to {CHOICES_MAX}, it is {value}"));
    number.map(|number| number as u32).ok_or_else(wrong)
}

fn tier(map: &Map<String, Value>) -> Result<Tier, Error> {
    match map.get("service_tier").and_then(Value::as_str) {
        None | Some("auto" | "default" | "scale") => Ok(Tier::Default),
        Some("priority") => Ok(Tier::Priority),
        Some("flex") => Ok(Tier::Flex),
        Some(_) => {
            let message = "'service_tier' must be auto, default, flex, scale or priority";
            Err(Error::invalid("service_tier", message))
        }
    }
}

fn cache_salt(map: &Map<String, Value>) -> Result<Option<String>, Error> {
    let Some(salt) = map.get("cache_salt").and_then(Value::as_str) else { return Ok(None) };
    if salt.is_empty() || salt.len() > SALT_BYTES_MAX {
        return Err(Error::invalid("cache_salt", format!("'cache_salt' must have 1 to {SALT_BYTES_MAX} bytes")));
    }
    Ok(Some(salt.to_string()))
}

fn include_usage(map: &Map<String, Value>) -> Result<bool, Error> {
    let Some(Value::Object(options)) = map.get("stream_options") else { return Ok(false) };
    if !flag(map, "stream") {
        return Err(Error::invalid("stream_options", "'stream_options' needs 'stream' to be true"));
    }
    match options.get("include_usage") {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(wanted)) => Ok(*wanted),
        Some(_) => {
            Err(Error::invalid("stream_options.include_usage", "'stream_options.include_usage' must be a boolean"))
        }
    }
}

fn stop(value: Option<&Value>) -> Result<Vec<String>, Error> {
    let wrong = |message: String| Err(Error::invalid("stop", message));
    let strings: Vec<String> = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(items)) if items.len() > STOP_STRINGS_MAX => {
            return wrong(format!("'stop' may have {STOP_STRINGS_MAX} strings at most"));
        }
        Some(Value::Array(items)) => {
            let strings = items.iter().map(|item| item.as_str().map(str::to_string)).collect::<Option<Vec<_>>>();
            match strings {
                Some(strings) => strings,
                None => return wrong("'stop' must be a string or an array of strings".into()),
            }
        }
        Some(_) => return wrong("'stop' must be a string or an array of strings".into()),
    };
    if strings.iter().any(|text| text.is_empty() || text.len() > STOP_BYTES_MAX) {
        return wrong(format!("each string of 'stop' must have 1 to {STOP_BYTES_MAX} bytes"));
    }
    Ok(strings)
}
