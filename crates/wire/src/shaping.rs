//! The fields of a request that shape logits: OpenAI's, and vLLM's extensions with their meanings.

use serde_json::{Map, Value};
use words::Error;

use crate::generation::{flag, number};

/// Most tokens with a bias of their own.
pub const BIAS_MAX: usize = 4096;
/// Most token ids that end an answer, of one request.
pub const STOP_TOKENS_MAX: usize = 256;

/// What a request says of its logits.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shaping {
    /// -2 to 2.
    pub presence: Option<f32>,
    /// -2 to 2.
    pub frequency: Option<f32>,
    /// Above 0 to 2; 1 changes nothing.
    pub repetition: Option<f32>,
    /// Token ids and what is added to their logits, -100 to 100, in ascending order of ids.
    pub bias: Vec<(u32, f32)>,
    /// Tokens before which no answer ends by itself.
    pub min_tokens: u32,
    /// Whether the model's own end tokens are tokens like any other.
    pub ignore_eos: bool,
    /// Further tokens that end an answer.
    pub stop_tokens: Vec<u32>,
}

impl Shaping {
    /// Reads the fields.
    ///
    /// # Errors
    /// `InvalidRequest` with the field in `param`.
    pub(crate) fn read(map: &Map<String, Value>) -> Result<Self, Error> {
        let repetition = number(map, "repetition_penalty", 0.0, 2.0)?;
        if repetition == Some(0.0) {
            return Err(Error::invalid(
                "repetition_penalty",
                "'repetition_penalty' must be above 0; 1 changes nothing",
            ));
        }
        Ok(Shaping {
            presence: number(map, "presence_penalty", -2.0, 2.0)?,
            frequency: number(map, "frequency_penalty", -2.0, 2.0)?,
            repetition,
            bias: bias(map.get("logit_bias"))?,
            min_tokens: min_tokens(map.get("min_tokens"))?,
            ignore_eos: flag(map, "ignore_eos"),
            stop_tokens: stop_tokens(map.get("stop_token_ids"))?,
        })
    }
}

fn bias(value: Option<&Value>) -> Result<Vec<(u32, f32)>, Error> {
    let wrong = |message: String| Error::invalid("logit_bias", message);
    let Some(Value::Object(map)) = value else { return Ok(Vec::new()) };
    if map.len() > BIAS_MAX {
        return Err(wrong(format!("'logit_bias' may have {BIAS_MAX} tokens at most")));
    }
    let entry = |(id, bias): (&String, &Value)| {
        let id = id.parse::<u32>().map_err(|_| wrong(format!("'logit_bias' maps token ids; '{id}' is none")))?;
        let number = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        let number =
            number.ok_or_else(|| wrong(format!("'logit_bias' of {id} must be from -100 to 100, it is {bias}")))?;
        Ok::<_, Error>((id, number as f32))
    };
    let mut all = map.iter().map(entry).collect::<Result<Vec<_>, _>>()?;
    all.sort_unstable_by_key(|(id, _)| *id);
    all.dedup_by_key(|(id, _)| *id);
    Ok(all)
}

fn min_tokens(value: Option<&Value>) -> Result<u32, Error> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(0) };
    let wrong = || Error::invalid("min_tokens", format!("'min_tokens' must be 0 or more, it is {value}"));
    value.as_u64().and_then(|number| u32::try_from(number).ok()).ok_or_else(wrong)
}

fn stop_tokens(value: Option<&Value>) -> Result<Vec<u32>, Error> {
    let Some(Value::Array(ids)) = value else { return Ok(Vec::new()) };
    let wrong = |message: String| Error::invalid("stop_token_ids", message);
    if ids.len() > STOP_TOKENS_MAX {
        return Err(wrong(format!("'stop_token_ids' may have {STOP_TOKENS_MAX} ids at most")));
    }
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = ids.iter().map(id).collect::<Option<Vec<_>>>();
    ids.ok_or_else(|| wrong("'stop_token_ids' must be a list of token ids".into()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    fn read(value: Value) -> Result<Shaping, String> {
        Shaping::read(value.as_object().unwrap()).map_err(|error| error.param().unwrap_or_default().to_string())
    }

    #[test]
    fn what_is_absent_or_null_shapes_nothing() {
        assert_eq!(read(json!({})), Ok(Shaping::default()));
        assert_eq!(
            read(json!({"logit_bias": null, "min_tokens": null, "stop_token_ids": null})),
            Ok(Shaping::default())
        );
    }

    #[test]
    fn values_are_read_in_order_and_wrong_ones_are_refused_by_name() {
        let shaping = read(json!({"logit_bias": {"10": -100, "9": 1.5}, "presence_penalty": -2, "min_tokens": 3,
            "ignore_eos": true, "stop_token_ids": [4, 5], "repetition_penalty": 1.25}));
        let shaping = shaping.unwrap();
        assert_eq!((shaping.bias, shaping.presence), (vec![(9, 1.5), (10, -100.0)], Some(-2.0)));
        assert_eq!((shaping.min_tokens, shaping.stop_tokens, shaping.repetition), (3, vec![4, 5], Some(1.25)));
        for (name, value) in [
            ("logit_bias", json!({"x": 1})),
            ("logit_bias", json!({"5": 101})),
            ("presence_penalty", json!(2.5)),
            ("frequency_penalty", json!(-3)),
            ("repetition_penalty", json!(0)),
            ("min_tokens", json!(-1)),
            ("stop_token_ids", json!(["a"])),
        ] {
            assert_eq!(read(json!({name: value})), Err(name.to_string()));
        }
    }
}
