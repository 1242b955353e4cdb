//! The HTTP side of the error table.

use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use words::Error;

/// An error on its way out as a response.
#[derive(Debug)]
pub(crate) struct HttpError(pub(crate) Error);

impl From<Error> for HttpError {
    fn from(error: Error) -> Self {
        HttpError(error)
    }
}

impl IntoResponse for HttpError {
    fn into_response(self) -> Response {
        log(&self.0);
        let parts = wire::ErrorResponse::from(&self.0);
        let mut response = Response::new(parts.body.into());
        *response.status_mut() = StatusCode::from_u16(parts.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        for (name, value) in parts.headers {
            if let Ok(value) = HeaderValue::from_str(&value) {
                response.headers_mut().insert(name, value);
            }
        }
        response
    }
}

/// Logs what the public message leaves out, once.
pub(crate) fn log(error: &Error) {
    if let Some(source) = std::error::Error::source(error) {
        tracing::error!(code = error.code().row().code, %source, "request failed");
    }
}
