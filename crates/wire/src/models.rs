//! `GET /v1/models` (OpenAI) and `GET /models` (a neuron's own list).

use serde::{Deserialize, Serialize};
use words::{ModelId, ModelState, ModelStatus};

/// OpenAI's model object, with what a client can use of the rest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// Its name.
    pub id: String,
    /// Always `model`.
    pub object: String,
    /// Unix seconds.
    pub created: u64,
    /// Who made it, where a catalogue says so; else who serves it.
    pub owned_by: String,
    /// Most tokens of prompt and answer together, by vLLM's name; absent while unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<u32>,
    /// Other names that requests may use.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<ModelId>,
    /// Such as `qwen3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
    /// What it is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// What it is good at, in its operator's words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub capabilities: Vec<String>,
    /// Where it is: `ready`, or on its way, or `absent` until a request brings it.
    pub state: ModelState,
}

impl From<&ModelStatus> for Model {
    fn from(status: &ModelStatus) -> Self {
        Model {
            id: status.id.to_string(),
            object: "model".into(),
            created: status.created,
            owned_by: status.card.provider.clone().unwrap_or_else(|| "cortex".into()),
            max_model_len: (status.context_length > 0).then_some(status.context_length),
            aliases: status.card.aliases.clone(),
            family: status.card.family.clone(),
            description: status.card.description.clone(),
            capabilities: status.card.capabilities.clone(),
            state: status.state,
        }
    }
}

/// OpenAI's list object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelList {
    /// Always `list`.
    pub object: String,
    /// The models, in order of name.
    pub data: Vec<Model>,
}

impl ModelList {
    /// Makes the list, ordered by name.
    pub fn new(mut data: Vec<Model>) -> Self {
        data.sort_by(|a, b| a.id.cmp(&b.id));
        ModelList { object: "list".into(), data }
    }
}

/// `POST /models/load`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadRequest {
    /// The name clients will use.
    pub model_id: String,
    /// The harness; `candle` when absent.
    #[serde(default)]
    pub harness: Option<String>,
    /// Which file of a folder of several, such as `Q8_0`.
    #[serde(default)]
    pub quant: Option<String>,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    #[serde(default)]
    pub device: Option<String>,
    /// A GGUF file, a folder with one, or `org/repo[:QUANT][@REVISION]` of a hub; the configured entry of that name when
    /// absent, or the name itself when it has the form `org/repo`.
    #[serde(default)]
    pub path: Option<String>,
    /// Whether models without work and without a pin may be unloaded where memory is short; so it is when absent.
    #[serde(default)]
    pub make_room: Option<bool>,
}

/// `POST /models/unload`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnloadRequest {
    /// Which model.
    pub model_id: String,
}

/// `GET /models/{id}/endpoint`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Which model.
    pub model_id: String,
    /// Where its OpenAI API is.
    pub url: String,
    /// Its state.
    pub state: ModelState,
}
