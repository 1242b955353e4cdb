//! OpenAI's error envelope, as a body and as an event of a stream that has begun.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use words::Error;

use crate::sse::data_event;

/// `{"error": {...}}`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorEnvelope {
    /// The error.
    pub error: ErrorObject,
}

/// OpenAI's error object. Every key is present, `null` where nothing is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorObject {
    /// Words for a person.
    pub message: String,
    /// The kind of error.
    #[serde(rename = "type")]
    pub kind: String,
    /// The field at fault.
    pub param: Option<String>,
    /// What a program may tell it by.
    pub code: Option<String>,
}

impl From<&Error> for ErrorEnvelope {
    fn from(error: &Error) -> Self {
        let row = error.code().row();
        ErrorEnvelope {
            error: ErrorObject {
                message: error.message().to_string(),
                kind: row.kind.to_string(),
                param: error.param().map(str::to_string),
                code: Some(row.code.to_string()),
            },
        }
    }
}

fn json(error: &Error) -> String {
    serde_json::to_string(&ErrorEnvelope::from(error)).unwrap_or_default()
}

/// Returns the envelope as a response body.
pub fn error_body(error: &Error) -> Bytes {
    json(error).into()
}

/// Returns the envelope as an event; clients read it as a failure, and no `[DONE]` may follow.
pub fn error_event(error: &Error) -> Bytes {
    data_event(&json(error))
}
