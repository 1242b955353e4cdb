//! The gRPC side of the error table. The code travels as metadata, never as text to be searched.

use tonic::metadata::MetadataValue;
use tonic::{Code as TonicCode, Status};
use words::{Code, Error};

const CODE_KEY: &str = "x-cortex-error";

/// Turns an error into a gRPC status.
pub fn status_from_error(error: &Error) -> Status {
    let row = error.code().row();
    let mut status = Status::new(TonicCode::from_i32(row.grpc as i32), error.message());
    status.metadata_mut().insert(CODE_KEY, MetadataValue::from_static(row.code));
    status
}

/// Turns a gRPC status back into an error. One without our code comes from the transport: the peer failed.
pub fn error_from_status(status: &Status) -> Error {
    let code = status.metadata().get(CODE_KEY).and_then(|value| value.to_str().ok()).and_then(Code::from_text);
    match code {
        Some(code) => Error::new(code, status.message()),
        None => Error::new(Code::UpstreamFailed, "the worker's control port did not answer").because(status.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_grpc() {
        for code in Code::ALL {
            let back = error_from_status(&status_from_error(&Error::new(*code, "words")));
            assert_eq!((back.code(), back.message()), (*code, "words"));
        }
        assert_eq!(error_from_status(&Status::internal("hm")).code(), Code::UpstreamFailed);
    }
}
