//! OpenAI's error envelope, as a body and as an event of a stream that has begun.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use words::{Code, Error};

use crate::private::ERROR_HEADER;
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

/// The HTTP side of the error table: everything a response needs, without a web framework's types.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorResponse {
    /// The status.
    pub status: u16,
    /// Headers, the private code among them; a gateway removes that one.
    pub headers: Vec<(&'static str, String)>,
    /// The envelope.
    pub body: Bytes,
}

impl From<&Error> for ErrorResponse {
    fn from(error: &Error) -> Self {
        let row = error.code().row();
        let mut headers = vec![("content-type", "application/json".to_string()), (ERROR_HEADER, row.code.to_string())];
        headers.extend(error.retry_after_seconds().map(|seconds| ("retry-after", seconds.to_string())));
        if error.code() == Code::Draining {
            headers.push(("connection", "close".to_string()));
        }
        ErrorResponse { status: row.http, headers, body: json(error).into() }
    }
}

fn json(error: &Error) -> String {
    serde_json::to_string(&ErrorEnvelope::from(error)).unwrap_or_default()
}

/// Returns the envelope as an event; clients read it as a failure, and no `[DONE]` may follow.
pub fn error_event(error: &Error) -> Bytes {
    data_event(&json(error))
}

/// Checks a request's content type.
///
/// # Errors
/// `UnsupportedMediaType` for anything but JSON.
pub fn check_media_type(content_type: &str) -> Result<(), Error> {
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let message = format!("the content type must be application/json, it is '{essence}'");
    Err(Error::new(Code::UnsupportedMediaType, message))
}
