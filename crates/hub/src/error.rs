//! Why a model's files did not come.

use std::error::Error as StdError;
use std::path::PathBuf;
use std::time::Duration;

use words::Code;

/// Why a model's files did not come.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// A text is no reference.
    #[error("'{text}' is no 'org/repo[:QUANT][@REVISION]': {problem}")]
    Reference {
        /// The text.
        text: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A name that could lead out of the cache.
    #[error("the hub names a file '{}', which is no name of a file in a repo", name.escape_debug())]
    Name {
        /// Its beginning.
        name: String,
    },
    /// No file fits, or several do.
    #[error("{}", choice_words(reference, choices))]
    Choice {
        /// What was asked.
        reference: String,
        /// What there is, or what fits.
        choices: Vec<String>,
    },
    /// There is no folder for files.
    #[error("there is no folder for downloads: set [harness.candle] hf_cache, HF_HUB_CACHE or HF_HOME")]
    NoCache,
    /// The settings name no hub.
    #[error("the hub's URL '{endpoint}' is unusable: {problem}")]
    Endpoint {
        /// The URL.
        endpoint: String,
        /// Why.
        problem: String,
    },
    /// Nothing may be asked, and it is not here.
    #[error(
        "{what} is not in {folder}, and this program is offline (HF_HUB_OFFLINE); fetch it where there is a network"
    )]
    Offline {
        /// What was asked.
        what: String,
        /// The cache.
        folder: PathBuf,
    },
    /// The hub wants to know who asks, or does not let them.
    #[error(
        "the hub refuses {what} ({status}): set HF_TOKEN to a token that may read it; a gated model's licence is accepted at {page}"
    )]
    Refused {
        /// What was asked.
        what: String,
        /// 401 or 403.
        status: u16,
        /// The repo's page.
        page: String,
    },
    /// The hub does not have it.
    #[error("the hub at {endpoint} has no {what}")]
    NotFound {
        /// What was asked.
        what: String,
        /// Which hub.
        endpoint: String,
    },
    /// The hub could not be reached, or the connection broke, again and again.
    #[error("{what}: the hub could not be reached: {problem}")]
    Unreachable {
        /// What was asked.
        what: String,
        /// The last fault, with all that caused it.
        problem: String,
    },
    /// The hub's certificate is not to be trusted.
    #[error("{what}: the hub's certificate is not trusted: {source}")]
    Untrusted {
        /// What was asked.
        what: String,
        /// Why.
        source: rustls::Error,
    },
    /// The hub answered, again and again, that it can't now.
    #[error("{what}: the hub answers {status}")]
    Status {
        /// What was asked.
        what: String,
        /// The last status.
        status: u16,
        /// How long it wants to be left alone.
        retry_after: Option<Duration>,
    },
    /// The answer is not what a hub says.
    #[error("{what}: the answer is not that of a hub: {problem}")]
    Strange {
        /// What was asked.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The file is not as long as the hub said.
    #[error("{what} was announced with {announced} bytes, and the hub sends {sent}")]
    Size {
        /// Which file.
        what: String,
        /// Bytes it should have.
        announced: u64,
        /// Bytes it would have had, as far as they were read.
        sent: u64,
    },
    /// The content is not what its name says.
    #[error("{what} arrived damaged, twice: its checksum is {found}, not {wanted}")]
    Checksum {
        /// Which file.
        what: String,
        /// The hash of what came.
        found: String,
        /// The hash it should have.
        wanted: String,
    },
    /// The disk is too small.
    #[error("{folder} has {free} bytes free, and {what} needs {needed} more and {reserve} in reserve")]
    Room {
        /// What was asked.
        what: String,
        /// Where.
        folder: PathBuf,
        /// Bytes that are still to come.
        needed: u64,
        /// Bytes that are free.
        free: u64,
        /// Bytes that must stay so.
        reserve: u64,
    },
    /// The disk was full before the file was whole.
    #[error("the disk is full; {path} keeps what came so far")]
    DiskFull {
        /// The incomplete file.
        path: PathBuf,
    },
    /// Another process fetches the same file and gets nowhere.
    #[error("{path} has been locked for {seconds} s by a download that gets nowhere")]
    Locked {
        /// The lock's file.
        path: PathBuf,
        /// How long.
        seconds: u64,
    },
    /// The cache can't be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

fn choice_words(reference: &str, choices: &[String]) -> String {
    if choices.is_empty() {
        return format!("'{reference}' has no GGUF file that could be meant");
    }
    format!("'{reference}' does not say which file; there are: {}", choices.join(", "))
}

/// Returns an error and all that caused it, in words.
fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    for source in std::iter::successors(error.source(), |error| (*error).source()) {
        let source = source.to_string();
        // Some say their source's words as their own.
        if !text.ends_with(&source) {
            text = format!("{text}: {source}");
        }
    }
    text
}

/// Returns what caused an error; an input-output error hides the one inside it from `source`.
fn cause<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a (dyn StdError + 'static)> {
    match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
        Some(inner) => Some(inner),
        None => error.source(),
    }
}

/// Finds the fault of a TLS handshake that was no fault of the network.
fn untrusted(error: &(dyn StdError + 'static)) -> Option<rustls::Error> {
    std::iter::successors(Some(error), |error| cause(*error)).find_map(|error| {
        let found = error.downcast_ref::<rustls::Error>();
        found.filter(|error| matches!(error, rustls::Error::InvalidCertificate(_))).cloned()
    })
}

impl HubError {
    /// Tells what a connection's fault means.
    pub(crate) fn of_connection(what: &str, error: &(dyn StdError + 'static)) -> Self {
        match untrusted(error) {
            Some(source) => HubError::Untrusted { what: what.into(), source },
            None => HubError::Unreachable { what: what.into(), problem: chain(error) },
        }
    }

    /// Tells that nothing came in time.
    pub(crate) fn silent(what: &str, bound: Duration) -> Self {
        let problem = format!("nothing came for {} s", bound.as_secs_f64());
        HubError::Unreachable { what: what.into(), problem }
    }

    /// Returns whether only the network was at fault, so that the same may succeed later.
    pub fn is_transient(&self) -> bool {
        matches!(self, HubError::Unreachable { .. } | HubError::Status { .. } | HubError::Locked { .. })
    }

    /// Returns how long the hub wants to be left alone.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            HubError::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

impl From<HubError> for words::Error {
    fn from(error: HubError) -> Self {
        let code = match &error {
            HubError::Reference { .. } => return words::Error::invalid("path", error.to_string()),
            error if error.is_transient() => Code::UpstreamFailed,
            HubError::Room { .. }
            | HubError::DiskFull { .. }
            | HubError::Io { .. }
            | HubError::NoCache
            | HubError::Endpoint { .. } => Code::Internal,
            _ => Code::InvalidModelFile,
        };
        words::Error::new(code, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("connecting")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn a_fault_of_the_network_is_told_with_its_causes_and_a_bad_certificate_is_none() {
        let reset = Outer(std::io::Error::new(std::io::ErrorKind::ConnectionReset, "reset by peer"));
        let error = HubError::of_connection("org/repo", &reset);
        assert!(error.is_transient() && error.to_string().ends_with("connecting: reset by peer"), "{error}");
        let bad = rustls::Error::InvalidCertificate(rustls::CertificateError::Expired);
        let error = HubError::of_connection("org/repo", &Outer(std::io::Error::other(std::io::Error::other(bad))));
        assert!(matches!(error, HubError::Untrusted { .. }) && !error.is_transient(), "{error}");
        let other = rustls::Error::General("cut in the handshake".into());
        assert!(HubError::of_connection("org/repo", &Outer(std::io::Error::other(other))).is_transient());
    }
}
