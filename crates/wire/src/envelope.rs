//! OpenAI's error envelope, as a body and as an event of a stream that has begun.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use words::{Code, Error, Loading, ModelState, Retry};

use crate::private::ERROR_HEADER;
use crate::sse::data_event;

/// `{"error": {...}}`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ErrorEnvelope {
    /// The error.
    pub error: ErrorObject,
}

/// OpenAI's error object. Every key of OpenAI's is present, `null` where nothing is known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// How far the load is that the request waited for; not OpenAI's, and only there with `model_loading`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loading: Option<LoadingObject>,
}

/// How far a load is, as clients read it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoadingObject {
    /// Where the model is: `absent` while it waits for memory, `fetching`, `loading`, `warming`, `recovering`.
    pub state: ModelState,
    /// Share of the load that is done, from 0 to 1.
    pub progress: f64,
    /// Seconds that it still takes, where that can be estimated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_s: Option<f64>,
}

impl From<Loading> for LoadingObject {
    fn from(loading: Loading) -> Self {
        LoadingObject {
            state: loading.state,
            progress: f64::from(loading.progress_permille.min(1000)) / 1000.0,
            eta_s: loading.eta_ms.map(|ms| ms as f64 / 1000.0),
        }
    }
}

impl From<LoadingObject> for Loading {
    fn from(object: LoadingObject) -> Self {
        Loading {
            state: object.state,
            progress_permille: (object.progress.clamp(0.0, 1.0) * 1000.0).round() as u32,
            eta_ms: object.eta_s.map(|seconds| (seconds.max(0.0) * 1000.0).round() as u64),
        }
    }
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
                loading: error.loading().map(LoadingObject::from),
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
        // OpenAI's clients try these again by themselves, unless they are told that it can't help.
        if error.retry() == Retry::Never && matches!(row.http, 408 | 409 | 500..) {
            headers.push(("x-should-retry", "false".to_string()));
        }
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

/// Checks what a request's headers say of its body: `Content-Type` and `Content-Encoding`. Nothing said means plain JSON.
///
/// # Errors
/// `UnsupportedMediaType` for anything else.
pub fn check_media_type(content_type: Option<&str>, encoding: Option<&str>) -> Result<(), Error> {
    let refuse = |message| Err(Error::new(Code::UnsupportedMediaType, message));
    let essence = content_type.map(|said| said.split(';').next().unwrap_or_default().trim());
    if let Some(essence) = essence.filter(|essence| !essence.eq_ignore_ascii_case("application/json")) {
        return refuse(format!("the content type must be application/json, it is '{essence}'"));
    }
    let encoding = encoding.map(str::trim).filter(|said| !said.is_empty() && !said.eq_ignore_ascii_case("identity"));
    match encoding {
        Some(encoding) => refuse(format!("the body must not be encoded, it is said to be '{encoding}'")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json};

    fn value(error: &Error) -> Value {
        serde_json::from_slice(&ErrorResponse::from(error).body).unwrap()
    }

    #[test]
    fn only_plain_json_is_taken() {
        let refused = |kind, encoding| check_media_type(kind, encoding).map_err(|error| error.code());
        for kind in [None, Some("application/json"), Some("Application/JSON ; charset=utf-8")] {
            for encoding in [None, Some(""), Some("identity")] {
                assert_eq!(refused(kind, encoding), Ok(()), "{kind:?} {encoding:?}");
            }
            assert_eq!(refused(kind, Some("gzip")), Err(Code::UnsupportedMediaType));
        }
        assert_eq!(refused(Some("text/plain"), None), Err(Code::UnsupportedMediaType));
        assert_eq!(refused(Some(""), None), Err(Code::UnsupportedMediaType));
    }

    #[test]
    fn a_load_is_told_beside_openais_keys_and_read_back() {
        let loading = Loading { state: ModelState::Loading, progress_permille: 420, eta_ms: Some(3_250) };
        let error = Error::new(Code::ModelLoading, "soon").while_loading(loading);
        let body = value(&error);
        let wanted = json!({"state": "loading", "progress": 0.42, "eta_s": 3.25});
        assert_eq!((&body["error"]["loading"], &body["error"]["code"]), (&wanted, &json!("model_loading")));
        let response = ErrorResponse::from(&error);
        assert_eq!(response.status, 503);
        assert!(response.headers.contains(&("retry-after", "4".to_string())), "{:?}", response.headers);
        let read: ErrorEnvelope = serde_json::from_value(body).unwrap();
        assert_eq!(read.error.loading.map(Loading::from), Some(loading));
        let event = String::from_utf8(error_event(&error).to_vec()).unwrap();
        assert!(event.starts_with("data: ") && event.contains("\"eta_s\":3.25"), "{event}");
    }

    #[test]
    fn clients_are_told_what_not_to_try_again() {
        let told = |error: Error| {
            let response = ErrorResponse::from(&error);
            response.headers.iter().any(|(name, value)| (*name, value.as_str()) == ("x-should-retry", "false"))
        };
        for code in [Code::PoisonRequest, Code::Internal, Code::DeadlinePassed, Code::Conflict, Code::RequestTimeout] {
            assert!(told(Error::new(code, "x")), "{code:?}");
        }
        for code in [Code::Draining, Code::EngineFailed, Code::RateLimited, Code::UpstreamTimeout, Code::InvalidRequest]
        {
            assert!(!told(Error::new(code, "x")), "{code:?}");
        }
        assert!(!told(Error::new(Code::Internal, "x").retry_after(std::time::Duration::from_secs(1))));
    }

    #[test]
    fn an_estimate_is_told_only_where_there_is_one_and_a_load_only_of_a_load() {
        let loading = Loading { state: ModelState::Absent, progress_permille: 0, eta_ms: None };
        let body = value(&Error::new(Code::ModelLoading, "soon").while_loading(loading));
        assert_eq!(body["error"]["loading"], json!({"state": "absent", "progress": 0.0}));
        let plain = value(&Error::new(Code::Draining, "bye"));
        assert_eq!(plain["error"].as_object().unwrap().len(), 4, "{plain}");
    }
}
