//! Texts of the network that may become parts of paths: each its own type, checked when it is made.

use std::path::{Path, PathBuf};

use crate::HubError;

/// A file's name inside a repo: relative, with `/` between its parts, and never leading out of its folder.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileName(String);

/// Most bytes of a name.
const NAME_BYTES_MAX: usize = 1024;
/// Most bytes of one part, as file systems have it.
const PART_BYTES_MAX: usize = 255;
/// Most parts.
const PARTS_MAX: usize = 16;

fn part(text: &str) -> bool {
    let printable = text.chars().all(|c| !c.is_control() && !"\\:@".contains(c));
    !text.is_empty() && text.len() <= PART_BYTES_MAX && text != "." && text != ".." && printable
}

impl FileName {
    /// Checks `text`.
    ///
    /// # Errors
    /// [`HubError::Name`] when it is empty, absolute, too long, or has a part that is empty, `.`, `..`, or has a backslash, a
    /// colon, an `@` or a control character.
    pub fn new(text: &str) -> Result<Self, HubError> {
        let fits = text.len() <= NAME_BYTES_MAX && text.split('/').count() <= PARTS_MAX;
        if fits && text.split('/').all(part) {
            return Ok(FileName(text.into()));
        }
        Err(HubError::Name { name: text.chars().take(80).collect() })
    }

    /// Returns its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the name of a file beside this one.
    pub(crate) fn beside(&self, name: &str) -> Option<FileName> {
        let folder = self.0.rsplit_once('/').map(|(folder, _)| format!("{folder}/")).unwrap_or_default();
        FileName::new(&format!("{folder}{name}")).ok()
    }

    /// Returns where it is under `folder`.
    pub(crate) fn under(&self, folder: &Path) -> PathBuf {
        self.0.split('/').fold(folder.to_path_buf(), |path, part| path.join(part))
    }

    /// Returns its form in a URL's path.
    pub(crate) fn in_url(&self) -> String {
        use std::fmt::Write;
        let mut out = String::new();
        for byte in self.0.bytes() {
            if byte.is_ascii_alphanumeric() || b"-_.~/".contains(&byte) {
                out.push(byte as char);
            } else {
                let _ = write!(out, "%{byte:02X}");
            }
        }
        out
    }
}

/// Returns whether a text can be an organisation's or a repo's name.
pub(crate) fn repo_part(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let ends = |c: char| c.is_ascii_alphanumeric() || c == '_';
    (1..=96).contains(&text.len())
        && text.chars().all(allowed)
        && text.starts_with(ends)
        && text.ends_with(ends)
        && !text.contains("--")
        && !text.contains("..")
}

/// A commit's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Commit(String);

impl Commit {
    /// Reads 40 hexadecimal digits.
    pub(crate) fn new(text: &str) -> Option<Self> {
        let digits = text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        digits.then(|| Commit(text.to_ascii_lowercase()))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let long = "x".repeat(256);
        let deep = "a/".repeat(20) + "b";
        for name in [
            "",
            "/etc/passwd",
            "..",
            "../x",
            "a/../../x",
            "a//b",
            "a/",
            ".",
            "./a",
            "a\\b",
            "..\\x",
            "a\0b",
            "a\nb",
            "C:x",
            &long,
            &deep,
        ] {
            assert!(FileName::new(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn names_of_real_files_are_taken_and_stay_inside() {
        for name in ["m.gguf", "Q8_0/m-00001-of-00002.gguf", "a b.gguf", ".gitattributes", "ä.gguf", "..a"] {
            let path = FileName::new(name).unwrap().under(Path::new("/cache"));
            assert!(path.starts_with("/cache") && !path.components().any(|part| part.as_os_str() == ".."), "{path:?}");
        }
        assert_eq!(FileName::new("a b/ä.gguf").unwrap().in_url(), "a%20b/%C3%A4.gguf");
        assert_eq!(FileName::new("q/m.gguf").unwrap().beside("x.json").unwrap().as_str(), "q/x.json");
    }
}
