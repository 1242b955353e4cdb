//! How likely tokens were, as clients of both dialects read it.

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Map, Value};
use words::Error;

/// Most of the likeliest tokens that are told beside each one.
pub const TOP_LOGPROBS_MAX: u32 = 20;

/// A token and its log-probability.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// Its bytes; a part of a character is no text.
    pub bytes: Vec<u8>,
    /// Natural logarithm; `None` for a prompt's first token, which follows nothing.
    pub logprob: Option<f32>,
    /// The likeliest tokens at its place, falling.
    pub top: Vec<(Vec<u8>, f32)>,
    /// Where its text begins in the choice's text, in characters.
    pub offset: u32,
}

impl TokenLogprob {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

/// `logprobs` of a chat completion, of a whole answer or of one chunk.
pub(crate) struct ChatLogprobs<'a>(pub(crate) &'a [TokenLogprob]);

impl Serialize for ChatLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let token = |bytes: &[u8], logprob: f32| {
            let text = String::from_utf8_lossy(bytes);
            serde_json::json!({ "token": text, "logprob": logprob, "bytes": bytes })
        };
        let entry = |scored: &TokenLogprob| {
            let mut entry = token(&scored.bytes, scored.logprob.unwrap_or(0.0));
            let top: Vec<Value> = scored.top.iter().map(|(bytes, logprob)| token(bytes, *logprob)).collect();
            entry["top_logprobs"] = top.into();
            entry
        };
        let mut map = serializer.serialize_map(Some(2))?;
        map.serialize_entry("content", &self.0.iter().map(entry).collect::<Vec<_>>())?;
        map.serialize_entry("refusal", &None::<()>)?;
        map.end()
    }
}

/// `logprobs` of a text completion, of a whole answer or of one chunk.
pub(crate) struct TextLogprobs<'a>(pub(crate) &'a [TokenLogprob]);

/// The likeliest tokens and the token itself, by text; where two have one text the likelier counts.
fn by_text(scored: &TokenLogprob) -> Option<Map<String, Value>> {
    let own = scored.logprob?;
    let mut map = Map::new();
    for (bytes, logprob) in &scored.top {
        map.entry(String::from_utf8_lossy(bytes)).or_insert_with(|| (*logprob).into());
    }
    map.entry(scored.text()).or_insert_with(|| own.into());
    Some(map)
}

impl Serialize for TextLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(4))?;
        let all = self.0;
        map.serialize_entry("text_offset", &all.iter().map(|scored| scored.offset).collect::<Vec<_>>())?;
        map.serialize_entry(
            "token_logprobs",
            &all.iter().map(|scored| scored.logprob.map(f64::from)).collect::<Vec<_>>(),
        )?;
        map.serialize_entry("tokens", &all.iter().map(TokenLogprob::text).collect::<Vec<_>>())?;
        map.serialize_entry("top_logprobs", &all.iter().map(by_text).collect::<Vec<_>>())?;
        map.end()
    }
}

/// Reads how many of the likeliest tokens are told; `Ok(None)` for an absent field.
///
/// # Errors
/// `InvalidRequest` for more than [`TOP_LOGPROBS_MAX`], or less than none.
pub(crate) fn top(map: &Map<String, Value>, name: &str) -> Result<Option<u32>, Error> {
    let Some(value) = map.get(name).filter(|value| !value.is_null()) else { return Ok(None) };
    let count = value.as_u64().filter(|count| *count <= u64::from(TOP_LOGPROBS_MAX));
    let wrong = || Error::invalid(name, format!("'{name}' must be from 0 to {TOP_LOGPROBS_MAX}, it is {value}"));
    count.map(|count| Some(count as u32)).ok_or_else(wrong)
}
