//! `POST /v1/embeddings`: the request, and the list of vectors that answers it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::Value;
use words::Error;

use crate::completion::Usage;
use crate::fields;
use crate::generation::{Checked, Generation};
use crate::text::{Prompt, prompts};

/// Most texts in one request: OpenAI's number.
pub const INPUTS_MAX: usize = 2048;

/// How vectors are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EncodingFormat {
    /// A list of numbers.
    #[default]
    Float,
    /// The numbers' bytes, f32 little-endian, in base64.
    Base64,
}

/// A checked request.
#[derive(Clone, Debug, PartialEq)]
pub struct EmbeddingRequest {
    /// The texts, at least one and at most [`INPUTS_MAX`]; none is empty.
    pub inputs: Vec<Prompt>,
    /// How vectors are written.
    pub format: EncodingFormat,
    /// How many of the first numbers are kept, at least one; the model's own number when absent.
    pub dimensions: Option<u32>,
    /// Model, tier and the like; nothing is generated.
    pub generation: Generation,
}

impl EmbeddingRequest {
    /// Reads a request.
    ///
    /// # Errors
    /// `InvalidRequest` with the field in `param`, or `UnsupportedParameter`.
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        let mut checked = Checked::read(body, fields::EMBEDDING)?;
        let generation = checked.without_sampling()?;
        let format = match checked.map.get("encoding_format").and_then(Value::as_str) {
            None | Some("float") => EncodingFormat::Float,
            Some("base64") => EncodingFormat::Base64,
            Some(_) => return Err(Error::invalid("encoding_format", "'encoding_format' must be float or base64")),
        };
        let dimensions = match checked.map.get("dimensions").filter(|value| !value.is_null()) {
            None => None,
            Some(value) => {
                let number = value.as_u64().and_then(|number| u32::try_from(number).ok()).filter(|number| *number > 0);
                let wrong = || Error::invalid("dimensions", format!("'dimensions' must be 1 or more, it is {value}"));
                Some(number.ok_or_else(wrong)?)
            }
        };
        let inputs = prompts(checked.map.remove("input"), "input", INPUTS_MAX)?;
        if let Some(i) = inputs.iter().position(|input| *input == Prompt::Text(String::new())) {
            return Err(Error::invalid(format!("input[{i}]"), "a text to embed must not be empty"));
        }
        Ok(EmbeddingRequest { inputs, format, dimensions, generation })
    }
}

/// Folds the vectors into the one JSON of the answer.
#[derive(Debug)]
pub struct EmbeddingFolder {
    model: String,
    format: EncodingFormat,
    dimensions: Option<u32>,
    vectors: Vec<Option<Vector>>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
enum Vector {
    Numbers(Vec<f32>),
    Text(String),
}

#[derive(Serialize)]
struct Entry<'a> {
    object: &'static str,
    index: usize,
    embedding: &'a Option<Vector>,
}

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Entry<'a>>,
    model: &'a str,
    usage: EmbeddingUsage,
}

#[derive(Serialize)]
struct EmbeddingUsage {
    prompt_tokens: u32,
    total_tokens: u32,
}

impl EmbeddingFolder {
    /// Makes the fold of `inputs` vectors, of which `dimensions` numbers are kept.
    pub fn new(model: String, format: EncodingFormat, dimensions: Option<u32>, inputs: usize) -> Self {
        EmbeddingFolder { model, format, dimensions, vectors: vec![None; inputs] }
    }

    /// Takes a text's vector: cut to the wanted number of dimensions, then brought to length 1.
    pub fn embedded(&mut self, index: u32, vector: &[f32]) {
        let kept = self.dimensions.map_or(vector.len(), |dimensions| vector.len().min(dimensions as usize));
        let unit = normalised(&vector[..kept]);
        let written = match self.format {
            EncodingFormat::Float => Vector::Numbers(unit),
            EncodingFormat::Base64 => {
                Vector::Text(STANDARD.encode(unit.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>()))
            }
        };
        if let Some(place) = self.vectors.get_mut(index as usize) {
            *place = Some(written);
        }
    }

    /// Returns the whole answer.
    pub fn done(&self, usage: Usage) -> String {
        let entry = |(index, embedding)| Entry { object: "embedding", index, embedding };
        let data = self.vectors.iter().enumerate().map(entry).collect();
        let usage = EmbeddingUsage { prompt_tokens: usage.prompt, total_tokens: usage.prompt };
        serde_json::to_string(&List { object: "list", data, model: &self.model, usage }).unwrap_or_default()
    }
}

/// Brings a vector to length 1; one of zeros stays.
fn normalised(vector: &[f32]) -> Vec<f32> {
    let length = vector.iter().map(|number| f64::from(*number).powi(2)).sum::<f64>().sqrt();
    let scale = if length > 0.0 && length.is_finite() { 1.0 / length } else { 0.0 };
    vector.iter().map(|number| (f64::from(*number) * scale) as f32).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn request(extra: Value) -> Result<EmbeddingRequest, String> {
        let mut body = json!({"model": "m", "input": "hi"});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let read = EmbeddingRequest::parse(body.to_string().as_bytes());
        read.map_err(|error| error.param().unwrap_or_default().to_string())
    }

    #[test]
    fn bad_values_name_their_field() {
        for (extra, param) in [
            (json!({"input": null}), "input"),
            (json!({"input": ""}), "input[0]"),
            (json!({"input": ["a", ""]}), "input[1]"),
            (json!({"input": []}), "input"),
            (json!({"input": vec!["a"; 2049]}), "input"),
            (json!({"input": [[]]}), "input[0]"),
            (json!({"encoding_format": "hex"}), "encoding_format"),
            (json!({"dimensions": 0}), "dimensions"),
            (json!({"model": 3}), "model"),
        ] {
            assert_eq!(request(extra.clone()).unwrap_err(), param, "{extra}");
        }
        assert_eq!(request(json!({"input": vec!["a"; 2048]})).unwrap().inputs.len(), 2048);
    }

    #[test]
    fn vectors_are_cut_then_brought_to_length_one_in_both_formats() {
        let fold = |format| {
            let mut folder = EmbeddingFolder::new("m".into(), format, Some(2), 2);
            folder.embedded(1, &[3.0, 4.0, 12.0]);
            folder.embedded(0, &[0.0, 0.0, 1.0]);
            let json: Value = serde_json::from_str(&folder.done(Usage { prompt: 5, ..Usage::default() })).unwrap();
            json
        };
        let floats = fold(EncodingFormat::Float);
        let wanted: Vec<f32> = vec![0.6, 0.8];
        assert_eq!(floats["data"][1]["embedding"], json!([0.6, 0.8]));
        assert_eq!(floats["data"][0]["embedding"], json!([0.0, 0.0]));
        assert_eq!(floats["usage"], json!({"prompt_tokens": 5, "total_tokens": 5}));
        let text = fold(EncodingFormat::Base64)["data"][1]["embedding"].as_str().unwrap().to_string();
        let bytes: Vec<u8> = wanted.iter().flat_map(|number| number.to_le_bytes()).collect();
        assert_eq!(STANDARD.decode(text).unwrap(), bytes);
    }
}
