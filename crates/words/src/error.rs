//! The one error table: what a failure means to a client, to a peer and to a retry.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use crate::ModelState;

/// Whether trying again can help, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// The request itself is at fault; nobody would answer it otherwise.
    Never,
    /// Another worker may answer it now.
    Elsewhere,
    /// Anyone may answer it after this long.
    After(Duration),
}

/// gRPC status codes this project uses, by their number in the gRPC protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum GrpcCode {
    Cancelled = 1,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    Unauthenticated = 16,
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// HTTP status.
    pub http: u16,
    /// gRPC status.
    pub grpc: GrpcCode,
    /// OpenAI's `error.type`.
    pub kind: &'static str,
    /// OpenAI's `error.code`, also what travels between the programs.
    pub code: &'static str,
    /// What a retry can do.
    pub retry: Retry,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident => ($http:literal, $grpc:ident, $kind:literal, $code:literal, $retry:expr);)*) => {
        /// What went wrong, as far as anybody outside needs to tell.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Code { $($(#[$doc])* $name,)* }

        impl Code {
            /// Every code, in the table's order.
            pub const ALL: &'static [Code] = &[$(Code::$name,)*];

            /// Returns this code's row of the table.
            pub const fn row(self) -> Row {
                match self {
                    $(Code::$name => Row {
                        http: $http, grpc: GrpcCode::$grpc, kind: $kind, code: $code, retry: $retry,
                    },)*
                }
            }
        }
    };
}

const SOON: Retry = Retry::After(Duration::from_secs(1));
const LATER: Retry = Retry::After(Duration::from_secs(5));

codes! {
    /// The request is malformed or a field has the wrong type or range.
    InvalidRequest => (400, InvalidArgument, "invalid_request_error", "invalid_request", Retry::Never);
    /// A field that would change the output is not supported with that value.
    UnsupportedParameter => (400, InvalidArgument, "invalid_request_error", "unsupported_parameter", Retry::Never);
    /// Prompt and completion do not fit the model's context.
    ContextLengthExceeded => (400, InvalidArgument, "invalid_request_error", "context_length_exceeded", Retry::Never);
    /// The chat template refused the messages.
    TemplateRejected => (400, InvalidArgument, "invalid_request_error", "template_rejected", Retry::Never);
    /// A load names a harness that this neuron does not have.
    UnknownHarness => (400, InvalidArgument, "invalid_request_error", "unknown_harness", Retry::Never);
    /// A model's files cannot be served: missing, damaged, or of an unknown kind.
    InvalidModelFile => (400, FailedPrecondition, "invalid_request_error", "invalid_model_file", Retry::Never);
    /// The token is missing or wrong.
    Unauthorized => (401, Unauthenticated, "authentication_error", "invalid_api_key", Retry::Never);
    /// No such model in the whole fleet.
    ModelNotFound => (404, NotFound, "invalid_request_error", "model_not_found", Retry::Never);
    /// This worker does not have the model; another one may.
    ModelNotHere => (404, NotFound, "invalid_request_error", "model_not_here", Retry::Elsewhere);
    /// No such path.
    RouteNotFound => (404, Unimplemented, "invalid_request_error", "not_found", Retry::Never);
    /// The path exists, the method does not.
    MethodNotAllowed => (405, Unimplemented, "invalid_request_error", "method_not_allowed", Retry::Never);
    /// The request's bytes came too slowly.
    RequestTimeout => (408, DeadlineExceeded, "invalid_request_error", "request_timeout", Retry::Never);
    /// A newer intent, load or unload stands in the way.
    Conflict => (409, Aborted, "invalid_request_error", "conflict", Retry::Never);
    /// A resume does not fit what this worker would have generated.
    ResumeMismatch => (409, FailedPrecondition, "invalid_request_error", "resume_mismatch", Retry::Elsewhere);
    /// The body is over the limit.
    BodyTooLarge => (413, ResourceExhausted, "invalid_request_error", "body_too_large", Retry::Never);
    /// The media type is not JSON.
    UnsupportedMediaType => (415, InvalidArgument, "invalid_request_error", "unsupported_media_type", Retry::Never);
    /// The caller's own limit.
    RateLimited => (429, ResourceExhausted, "rate_limit_error", "rate_limit_exceeded", SOON);
    /// The client went away; nobody reads this answer.
    ClientClosed => (499, Cancelled, "client_error", "client_closed_request", Retry::Never);
    /// Somebody who may cancelled the request before it had a token. Not 409, which clients try again by themselves.
    Cancelled => (499, Cancelled, "cancelled", "request_cancelled", Retry::Never);
    /// A fault of ours.
    Internal => (500, Internal, "server_error", "internal_error", Retry::Never);
    /// The engine failed under the request; its worker recovers or is replaced.
    EngineFailed => (500, Internal, "server_error", "engine_failed", Retry::Elsewhere);
    /// A hook of the operator's failed, and what waited for it with it.
    HookFailed => (500, FailedPrecondition, "server_error", "hook_failed", Retry::Elsewhere);
    /// Workers failed on this very request again and again; it is not tried any more.
    PoisonRequest => (500, Internal, "server_error", "request_crashes_workers", Retry::Never);
    /// A worker broke the connection or spoke nonsense.
    UpstreamFailed => (502, Unavailable, "server_error", "upstream_failed", Retry::Elsewhere);
    /// Queues are full.
    Overloaded => (503, Unavailable, "server_error", "overloaded", Retry::Elsewhere);
    /// The model does not fit into this worker's memory, or found no room in time.
    InsufficientMemory => (503, ResourceExhausted, "server_error", "insufficient_memory", Retry::Elsewhere);
    /// The model is on its way.
    ModelLoading => (503, Unavailable, "server_error", "model_loading", LATER);
    /// The worker or gateway takes no new work.
    Draining => (503, Unavailable, "server_error", "draining", Retry::Elsewhere);
    /// No worker that has the model can take the request now.
    NoReplica => (503, Unavailable, "server_error", "no_replica_available", SOON);
    /// A stream was cut at the end of a drain's budget.
    StreamCut => (503, Aborted, "server_error", "stream_interrupted", SOON);
    /// A worker took too long to begin or to go on.
    UpstreamTimeout => (504, DeadlineExceeded, "server_error", "upstream_timeout", Retry::Elsewhere);
    /// The request's own deadline has passed; nobody waits for its answer any more.
    DeadlinePassed => (504, DeadlineExceeded, "server_error", "deadline_passed", Retry::Never);
}

impl Code {
    /// Finds the code that travels as `text`; unknown codes are `None`, to be read as "never retry".
    pub fn from_text(text: &str) -> Option<Code> {
        Code::ALL.iter().copied().find(|code| code.row().code == text)
    }
}

/// How far the load is that a request waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loading {
    /// Where the model is.
    pub state: ModelState,
    /// Share of the load that is done, in thousandths.
    pub progress_permille: u32,
    /// Time that it still takes, in milliseconds, where that can be estimated.
    pub eta_ms: Option<u64>,
}

/// Longest time after which a client is told to come back for a load.
const LOADING_RETRY_MAX: Duration = Duration::from_secs(300);

/// A failure on its way to whoever asked.
///
/// `message` is public. `source` is internal: logged once where the error is consumed, never serialised.
#[derive(Debug)]
pub struct Error {
    code: Code,
    message: String,
    param: Option<String>,
    retry_after: Option<Duration>,
    loading: Option<Loading>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// Makes an error with its public message.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Error { code, message: message.into(), param: None, retry_after: None, loading: None, source: None }
    }

    /// Makes a fault of ours: the public message says nothing, the source says it all.
    pub fn internal(source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Error::new(Code::Internal, "an internal error occurred; the request id leads to it in the log").because(source)
    }

    /// Makes the error of a malformed field, named as the client wrote it.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Error::new(Code::InvalidRequest, message).at(param)
    }

    /// Names the field at fault.
    #[must_use]
    pub fn at(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Attaches the internal cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Says when a retry may help, in place of the table's figure.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// Says how far the load is that the request waited for; where its end can be estimated, a retry may help then.
    #[must_use]
    pub fn while_loading(mut self, loading: Loading) -> Self {
        self.loading = Some(loading);
        if let Some(eta) = loading.eta_ms {
            self.retry_after = Some(Duration::from_millis(eta).min(LOADING_RETRY_MAX));
        }
        self
    }

    /// Returns the code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// Returns the public message.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Returns the field at fault.
    pub fn param(&self) -> Option<&str> {
        self.param.as_deref()
    }

    /// Returns how far the load is that the request waited for.
    pub fn loading(&self) -> Option<Loading> {
        self.loading
    }

    /// Returns what a retry can do.
    pub fn retry(&self) -> Retry {
        self.retry_after.map_or(self.code.row().retry, Retry::After)
    }

    /// Returns the seconds for a `Retry-After` header: all 429 and 503 answers carry one.
    pub fn retry_after_seconds(&self) -> Option<u64> {
        let wait = match (self.retry(), self.code.row().http) {
            (Retry::After(wait), _) => wait,
            (Retry::Elsewhere, 503) => Duration::from_secs(1),
            _ => return None,
        };
        Some(wait.as_secs_f64().ceil().max(1.0) as u64)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.code.row().code)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_ref().map(|source| source.as_ref() as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_code_has_its_own_text_and_finds_its_way_back() {
        for code in Code::ALL {
            assert_eq!(Code::from_text(code.row().code), Some(*code));
        }
        assert_eq!(Code::from_text("of_tomorrow"), None);
    }

    #[test]
    fn a_load_with_an_end_in_sight_says_when_to_come_back() {
        let error = |eta_ms| {
            let loading = Loading { state: ModelState::Loading, progress_permille: 400, eta_ms };
            Error::new(Code::ModelLoading, "x").while_loading(loading)
        };
        assert_eq!(error(Some(2_100)).retry_after_seconds(), Some(3));
        assert_eq!(error(Some(u64::MAX)).retry_after_seconds(), Some(300));
        assert_eq!(error(None).retry_after_seconds(), Error::new(Code::ModelLoading, "x").retry_after_seconds());
        assert_eq!(error(None).loading().map(|loading| loading.progress_permille), Some(400));
    }

    #[test]
    fn capacity_answers_say_when_to_come_back_and_client_faults_never_do() {
        for code in Code::ALL {
            let after = Error::new(*code, "x").retry_after_seconds();
            match code.row().http {
                429 | 503 => assert!(after.is_some(), "{code:?} lacks Retry-After"),
                400..=499 => assert_eq!(after, None, "{code:?} invites a retry"),
                _ => {}
            }
        }
    }
}
