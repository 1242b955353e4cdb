//! The shared token of the control plane.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use http::{HeaderMap, header};
use words::{Code, Error};

/// Most bytes of a token file.
const TOKEN_BYTES_MAX: u64 = 4096;

/// A secret; its `Debug` shows nothing of it.
#[derive(Clone)]
pub struct Token(String);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

/// Why there is no usable token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file can't be read.
    #[error("the token file {path} can't be read: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file's content is no token.
    #[error("the token file {path} must hold 16 to 4096 visible ASCII characters")]
    Content {
        /// Which file.
        path: PathBuf,
    },
    /// Without a token only this machine may come in.
    #[error(
        "{listener} binds {bind}, which is not a loopback address, without a token: set a token file or bind 127.0.0.1"
    )]
    Unguarded {
        /// Which listener.
        listener: &'static str,
        /// Its address.
        bind: SocketAddr,
    },
}

/// The name of the token among systemd's credentials.
pub const CREDENTIAL: &str = "cortex.token";

/// Returns the token's file: the one that is configured, or else the one among the service manager's credentials, whose
/// folder is the value of `$CREDENTIALS_DIRECTORY`.
pub fn file(configured: Option<PathBuf>, credentials: Option<OsString>) -> Option<PathBuf> {
    configured.or_else(|| Some(PathBuf::from(credentials?).join(CREDENTIAL)).filter(|path| path.exists()))
}

impl Token {
    /// Reads a token file; white space around the token is not part of it.
    ///
    /// # Errors
    /// [`TokenError`] when the file can't be read or holds no token.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let read = |source| TokenError::Read { path: path.into(), source };
        let content = || TokenError::Content { path: path.into() };
        if std::fs::metadata(path).map_err(read)?.len() > TOKEN_BYTES_MAX {
            return Err(content());
        }
        let text = std::fs::read_to_string(path).map_err(read)?;
        let token = text.trim();
        if token.len() < 16 || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(content());
        }
        Ok(Token(token.to_string()))
    }

    /// Compares in a time that depends on the lengths alone.
    pub fn matches(&self, shown: &str) -> bool {
        let pairs = self.0.bytes().zip(shown.bytes());
        let different = pairs.fold(0u8, |different, (a, b)| different | (a ^ b));
        self.0.len() == shown.len() && different == 0
    }

    /// Returns the value for an `authorization` header.
    pub fn bearer(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

/// Checks an order's token, where there is one. Where there is none whoever reaches the port may order, but for web
/// pages: any page that somebody on this machine looks at could reach it too.
///
/// # Errors
/// `Unauthorized`.
pub fn authorise(token: Option<&Token>, headers: &HeaderMap) -> Result<(), Error> {
    let shown = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let shown = shown.and_then(|value| value.strip_prefix("Bearer "));
    let message = match (token, shown) {
        (None, _) if headers.contains_key(header::ORIGIN) => {
            "a web page gives orders with a token alone: configure one"
        }
        (None, _) => return Ok(()),
        (Some(token), Some(shown)) if token.matches(shown) => return Ok(()),
        (Some(_), _) => "orders need the shared token: Authorization: Bearer <token>",
    };
    Err(Error::new(Code::Unauthorized, message))
}

/// Refuses to bind outside loopback without a token.
///
/// # Errors
/// [`TokenError::Unguarded`].
pub fn guard(listener: &'static str, bind: SocketAddr, token: Option<&Token>) -> Result<(), TokenError> {
    if bind.ip().is_loopback() || token.is_some() {
        return Ok(());
    }
    Err(TokenError::Unguarded { listener, bind })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_token_is_read_trimmed_and_compared_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        std::fs::write(&path, "  0123456789abcdef\n").unwrap();
        let token = Token::read(&path).unwrap();
        assert!(token.matches("0123456789abcdef"));
        assert!(!token.matches("0123456789abcdee") && !token.matches("0123456789abcdef0") && !token.matches(""));
        assert_eq!(format!("{token:?}"), "Token(..)");
        std::fs::write(&path, "short").unwrap();
        assert!(matches!(Token::read(&path), Err(TokenError::Content { .. })));
    }

    #[test]
    fn a_credential_is_the_token_where_none_is_configured() {
        let folder = tempfile::tempdir().unwrap();
        let credentials = || Some(folder.path().as_os_str().to_os_string());
        assert_eq!(file(None, credentials()), None, "there is none of that name");
        std::fs::write(folder.path().join(CREDENTIAL), "0123456789abcdef").unwrap();
        assert_eq!(file(None, credentials()), Some(folder.path().join(CREDENTIAL)));
        assert_eq!(file(Some("/own".into()), credentials()), Some("/own".into()));
        assert_eq!(file(None, None), None);
    }

    #[test]
    fn orders_need_the_token_where_there_is_one_and_pages_give_none_without() {
        let headers = |lines: &[(header::HeaderName, &str)]| -> HeaderMap {
            lines.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
        };
        let allowed = |token: Option<&Token>, lines: &[(header::HeaderName, &str)]| {
            authorise(token, &headers(lines)).map_err(|error| error.code())
        };
        let (token, origin) = (Token("0123456789abcdef".into()), (header::ORIGIN, "https://page.example"));
        let right = (header::AUTHORIZATION, "Bearer 0123456789abcdef");
        assert_eq!(allowed(None, &[]), Ok(()));
        assert_eq!(allowed(None, std::slice::from_ref(&origin)), Err(Code::Unauthorized));
        assert_eq!(allowed(Some(&token), &[]), Err(Code::Unauthorized));
        assert_eq!(allowed(Some(&token), &[(header::AUTHORIZATION, "Bearer x")]), Err(Code::Unauthorized));
        assert_eq!(allowed(Some(&token), &[right, origin]), Ok(()));
    }

    #[test]
    fn nothing_is_bound_outside_loopback_without_a_token() {
        let open = "0.0.0.0:1".parse().unwrap();
        assert!(guard("the control port", open, None).is_err());
        assert!(guard("the control port", open, Some(&Token("x".into()))).is_ok());
        assert!(guard("the control port", "127.0.0.1:1".parse().unwrap(), None).is_ok());
    }
}
