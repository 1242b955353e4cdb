//! What a gateway reads of a request: enough to route it, and to finish it where a worker could not.

use serde::Deserialize;
use serde_json::{Map, Value};
use words::{Error, ModelId};

use crate::generation::{choices, malformed};
use crate::private::RESUME_FIELD;

/// What a gateway needs to know of a request to route it, and to finish it where a worker could not. Everything else is checked by the worker.
#[derive(Debug, Deserialize)]
pub struct Peek<'a> {
    /// The model's name.
    #[serde(borrow, default)]
    pub model: Option<std::borrow::Cow<'a, str>>,
    /// Whether the answer is a stream.
    #[serde(default)]
    pub stream: Option<bool>,
    /// How many answers; checked by [`Peek::choices`].
    #[serde(default)]
    pub n: Option<Value>,
    /// Whether the stream ends with its usage; checked by the worker.
    #[serde(default)]
    pub stream_options: Option<Value>,
    /// A private field that clients may not send.
    #[serde(default, rename = "cortex_resume")]
    pub resume: Option<serde::de::IgnoredAny>,
}

impl<'a> Peek<'a> {
    /// Reads the few fields without building the rest.
    ///
    /// # Errors
    /// `InvalidRequest` when the body is no JSON object or one of the fields has the wrong type.
    pub fn parse(body: &'a [u8]) -> Result<Self, Error> {
        serde_json::from_slice(body).map_err(|error| malformed(&error))
    }

    /// Returns how many answers are wanted.
    ///
    /// # Errors
    /// `InvalidRequest` when it is no number of answers.
    pub fn choices(&self) -> Result<u32, Error> {
        choices(self.n.as_ref())
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

/// Removes the private field from a client's body.
///
/// # Errors
/// `InvalidRequest` when the body is no JSON object.
pub fn without_private_fields(body: &[u8]) -> Result<Vec<u8>, Error> {
    let mut map: Map<String, Value> = serde_json::from_slice(body).map_err(|error| malformed(&error))?;
    map.remove(RESUME_FIELD);
    serde_json::to_vec(&map).map_err(Error::internal)
}
