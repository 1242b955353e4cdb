//! Names of things, each its own type so that none is taken for another.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is not an id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} {problem}")]
pub struct IdError {
    what: &'static str,
    problem: &'static str,
}

fn check(what: &'static str, text: &str, limit: usize, allowed: fn(char) -> bool) -> Result<(), IdError> {
    let problem = if text.is_empty() {
        "is empty"
    } else if text.len() > limit {
        "is too long"
    } else if !text.chars().all(allowed) {
        "has a character that is not allowed there"
    } else {
        return Ok(());
    };
    Err(IdError { what, problem })
}

/// Makes a name of a prefix and 128 random bits, as 32 hexadecimal digits behind a dash.
pub fn random_name(prefix: &str, bits: u128) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut name = String::with_capacity(prefix.len() + 33);
    name.push_str(prefix);
    name.push('-');
    for byte in bits.to_be_bytes() {
        name.push(char::from(DIGITS[usize::from(byte >> 4)]));
        name.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    name
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $limit:literal, $allowed:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks `text` and makes the id.
            ///
            /// # Errors
            /// When the text is empty, over the limit, or has a character that is not allowed.
            pub fn new(text: impl Into<String>) -> Result<Self, IdError> {
                let text = text.into();
                check($what, &text, $limit, $allowed)?;
                Ok(Self(text))
            }

            /// Returns the id's text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    };
}

fn host_like(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

text_id!(
    /// A worker's name in the fleet: up to 64 letters, digits, `-`, `_`, `.`.
    NodeId, "the node id", 64, host_like
);
text_id!(
    /// A gateway's name, made at its start: up to 64 letters, digits, `-`, `_`, `.`.
    GatewayId, "the gateway id", 64, host_like
);
text_id!(
    /// A model's name as clients say it, slashes included: up to 256 printable characters without spaces.
    ModelId, "the model id", 256, |c| !c.is_control() && !c.is_whitespace()
);
text_id!(
    /// A request's name in logs, headers and traces: up to 128 visible ASCII characters.
    RequestId, "the request id", 128, |c| c.is_ascii_graphic()
);

text_id!(
    /// A rollout's name, made when it is begun: up to 64 letters, digits, `-`, `_`, `.`.
    RolloutId, "the rollout id", 64, host_like
);

/// One life of one process: how many starts its state directory has seen, and a random id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Incarnation {
    /// Starts so far, from the state directory; 0 where there is none.
    pub counter: u64,
    /// Drawn at start; two live ones under one [`NodeId`] mean that two machines use one name.
    pub random: u64,
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:016x}", self.counter, self.random)
    }
}

/// Rises with each state change of one incarnation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    /// Returns the generation after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Generation(self.0 + 1)
    }
}

/// Issued by a neuron to order operators' intents; an intent that names an older one is refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// A BLAKE3 hash that says what may continue (or reuse the KV of) what.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Fingerprint(pub [u8; 32]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let wrong = IdError { what: "the fingerprint", problem: "is not 64 hexadecimal digits" };
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Some(byte - b'0'),
            b'a'..=b'f' => Some(byte - b'a' + 10),
            b'A'..=b'F' => Some(byte - b'A' + 10),
            _ => None,
        };
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        if pairs.len() != 32 || !rest.is_empty() {
            return Err(wrong);
        }
        let mut bytes = [0; 32];
        for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
            let (Some(high), Some(low)) = (digit(*high), digit(*low)) else { return Err(wrong) };
            *byte = high << 4 | low;
        }
        Ok(Fingerprint(bytes))
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_id_is_refused_when_empty_long_or_odd() {
        assert!(NodeId::new("gpu-01.rack_2").is_ok());
        assert_eq!(NodeId::new("").unwrap_err().to_string(), "the node id is empty");
        assert!(NodeId::new("a/b").is_err());
        assert!(ModelId::new("Qwen/Qwen3-0.6B").is_ok());
        assert!(ModelId::new("a b").is_err());
        assert!(RequestId::new("x".repeat(129)).is_err());
    }

    #[test]
    fn a_random_name_has_all_its_digits() {
        assert_eq!(random_name("req", 0xab), format!("req-{:032x}", 0xab));
        assert_eq!(random_name("a", u128::MAX), format!("a-{:032x}", u128::MAX));
    }

    #[test]
    fn a_fingerprint_survives_its_text() {
        let print = Fingerprint([0xab; 32]);
        assert_eq!(print.to_string().parse::<Fingerprint>().unwrap(), print);
        assert!("zz".repeat(32).parse::<Fingerprint>().is_err());
        assert!("é".repeat(32).parse::<Fingerprint>().is_err());
    }
}
