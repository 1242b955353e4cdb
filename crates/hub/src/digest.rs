//! The hashes by which a hub names contents.

use std::fmt::Write;

use sha1::Sha1;
use sha2::{Digest, Sha256};

/// A blob's name: the hash of its content, in hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Etag {
    text: String,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Of a large file: SHA-256 of the bytes.
    Sha256,
    /// Of a small one: git's name of it, SHA-1 of a head with its length, and the bytes.
    Git,
}

impl Etag {
    /// Reads a header's value. What is no hash can't be verified, and is none.
    pub(crate) fn new(header: &str) -> Option<Self> {
        let text = header.trim().trim_start_matches("W/").trim_matches('"').to_ascii_lowercase();
        let kind = match text.len() {
            64 => Kind::Sha256,
            40 => Kind::Git,
            _ => return None,
        };
        text.bytes().all(|byte| byte.is_ascii_hexdigit()).then_some(Etag { text, kind })
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }

    /// Begins to hash a content of `size` bytes.
    pub(crate) fn hasher(&self, size: u64) -> Hasher {
        match self.kind {
            Kind::Sha256 => Hasher::Sha256(Sha256::new()),
            Kind::Git => Hasher::Git(Sha1::new_with_prefix(format!("blob {size}\0"))),
        }
    }
}

/// A hash in the making.
pub(crate) enum Hasher {
    Sha256(Sha256),
    Git(Sha1),
}

impl Hasher {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Sha256(hash) => hash.update(bytes),
            Hasher::Git(hash) => hash.update(bytes),
        }
    }

    /// Returns the hexadecimal digits.
    pub(crate) fn finish(self) -> String {
        match self {
            Hasher::Sha256(hash) => hex(&hash.finalize()),
            Hasher::Git(hash) => hex(&hash.finalize()),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn both_hashes_are_those_of_git_and_of_sha256sum() {
        // `printf 'hello\n' | git hash-object --stdin`, and `| sha256sum`.
        let git = "ce013625030ba8dba906f756967f9e9ca394464a";
        let sha = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        for (header, wanted) in [(format!("\"{git}\""), git), (format!("W/\"{}\"", sha.to_uppercase()), sha)] {
            let etag = Etag::new(&header).unwrap();
            let mut hasher = etag.hasher(6);
            hasher.update(b"hel");
            hasher.update(b"lo\n");
            assert_eq!((etag.as_str(), hasher.finish().as_str()), (wanted, wanted));
        }
    }

    #[test]
    fn what_is_no_hash_is_no_name_of_a_blob() {
        for text in ["", "abc", "../../../../../../../../../../etc/passwd", &"g".repeat(64), &"a".repeat(41)] {
            assert_eq!(Etag::new(text), None, "{text}");
        }
    }
}
