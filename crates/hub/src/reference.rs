//! How a model is named: a path, or `org/repo[:QUANT][@REVISION]`.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::HubError;
use crate::names::{FileName, repo_part};

/// A model on a hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// `org/repo`.
    repo: String,
    /// Which of its files: a quant such as `Q8_0`, or a file's name.
    quant: Option<String>,
    /// A branch, tag or commit.
    revision: FileName,
}

/// The revision of a reference that names none.
const MAIN: &str = "main";
/// Marks a text as a reference, whatever else it looks like.
const SCHEME: &str = "hf://";
/// Most bytes of a quant or a file's name in a reference.
const QUANT_BYTES_MAX: usize = 128;

impl Reference {
    /// Reads `[hf://]org/repo[:QUANT][@REVISION]`.
    ///
    /// # Errors
    /// [`HubError::Reference`] for everything else.
    pub fn parse(text: &str) -> Result<Self, HubError> {
        let wrong = |problem: &str| HubError::Reference { text: text.into(), problem: problem.into() };
        let rest = text.strip_prefix(SCHEME).unwrap_or(text);
        let (rest, revision) = rest.split_once('@').unwrap_or((rest, MAIN));
        let (repo, quant) = match rest.split_once(':') {
            Some((repo, quant)) => (repo, Some(quant)),
            None => (rest, None),
        };
        let (org, name) = repo.split_once('/').ok_or_else(|| wrong("it lacks the slash of 'org/repo'"))?;
        if !repo_part(org) || !repo_part(name) {
            return Err(wrong("'org/repo' is two names of letters, digits, '-', '_' and '.'"));
        }
        let revision = FileName::new(revision).map_err(|_| wrong("its revision is no name"))?;
        let reference = Reference { repo: repo.into(), quant: None, revision };
        match quant {
            Some(quant) => reference.with_quant(Some(quant)),
            None => Ok(reference),
        }
    }

    /// Adds what another field says of the quant.
    ///
    /// # Errors
    /// [`HubError::Reference`] when it is no name, or the reference names another one already.
    pub fn with_quant(mut self, quant: Option<&str>) -> Result<Self, HubError> {
        let Some(quant) = quant else { return Ok(self) };
        let wrong = |problem: String| HubError::Reference { text: self.to_string(), problem };
        if let Some(own) = &self.quant
            && !own.eq_ignore_ascii_case(quant)
        {
            return Err(wrong(format!("it names a quant, and '{quant}' is another one")));
        }
        if quant.len() > QUANT_BYTES_MAX || FileName::new(quant).is_err() {
            return Err(wrong("its quant is no name".into()));
        }
        self.quant = Some(quant.into());
        Ok(self)
    }

    /// Asks for another revision than the one it names.
    ///
    /// # Errors
    /// [`HubError::Reference`] when it is no name.
    pub fn with_revision(mut self, revision: &str) -> Result<Self, HubError> {
        let wrong = |_| HubError::Reference { text: self.to_string(), problem: "its revision is no name".into() };
        self.revision = FileName::new(revision).map_err(wrong)?;
        Ok(self)
    }

    /// Returns `org/repo`.
    pub fn repo(&self) -> &str {
        &self.repo
    }

    /// Returns what it says of the file.
    pub fn quant(&self) -> Option<&str> {
        self.quant.as_deref()
    }

    /// Returns the branch, tag or commit.
    pub fn revision(&self) -> &str {
        self.revision.as_str()
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repo)?;
        if let Some(quant) = &self.quant {
            write!(f, ":{quant}")?;
        }
        if self.revision.as_str() != MAIN {
            write!(f, "@{}", self.revision.as_str())?;
        }
        Ok(())
    }
}

/// Where a model's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// On this host.
    Path(PathBuf),
    /// On a hub.
    Hub(Reference),
}

impl Source {
    /// Tells a path from a reference. `hf://` is always a reference. What begins with `/`, `.` or `~`, ends in `.gguf`, or
    /// is there is a path; of the rest, what reads as `org/repo` is a reference.
    ///
    /// # Errors
    /// [`HubError::Reference`] when `hf://` is followed by something else than a reference.
    pub fn parse(text: &str, is_there: impl FnOnce(&Path) -> bool) -> Result<Self, HubError> {
        if text.starts_with(SCHEME) {
            return Reference::parse(text).map(Source::Hub);
        }
        let path = || Source::Path(text.into());
        if text.starts_with(['/', '.', '~']) || text.to_lowercase().ends_with(".gguf") || is_there(Path::new(text)) {
            return Ok(path());
        }
        Ok(Reference::parse(text).map_or_else(|_| path(), Source::Hub))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_reference_has_a_repo_and_may_have_a_quant_and_a_revision() {
        for (text, quant, revision) in [
            ("org/repo", None, "main"),
            ("hf://org/repo", None, "main"),
            ("org/repo:Q4_K_M", Some("Q4_K_M"), "main"),
            ("org/repo@refs/pr/3", None, "refs/pr/3"),
            ("org/repo:sub/file.gguf@v1.0", Some("sub/file.gguf"), "v1.0"),
        ] {
            let reference = Reference::parse(text).unwrap();
            assert_eq!((reference.repo(), reference.quant(), reference.revision()), ("org/repo", quant, revision));
            assert_eq!(Reference::parse(&reference.to_string()).unwrap(), reference);
        }
    }

    #[test]
    fn nothing_else_is_a_reference() {
        for text in [
            "",
            "repo",
            "/repo",
            "org/",
            "org/repo/more",
            "../repo",
            "org/..",
            "org/repo:",
            "org/repo@",
            "org/re po",
            "org/repo@../../etc",
            "org/repo:../x",
            "org/repo:a\\b",
            "org/repo@a@b",
            "org/repo\0",
            "org/.hidden",
            "org/a--b",
            "org/a..b",
        ] {
            assert!(Reference::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn paths_stay_paths() {
        let parse = |text: &str, there: bool| Source::parse(text, |_| there).unwrap();
        for path in ["/a/b", "./a/b", "../a", "~/b", "a/b.gguf", "a/b.GGUF", "model", "a/b/c"] {
            assert_eq!(parse(path, false), Source::Path(path.into()));
        }
        assert_eq!(parse("org/repo", true), Source::Path("org/repo".into()));
        assert!(matches!(parse("org/repo:Q8_0", false), Source::Hub(_)));
        assert!(matches!(parse("hf://org/repo", true), Source::Hub(_)));
        assert!(Source::parse("hf://org", |_| true).is_err());
    }

    #[test]
    fn two_quants_are_one_or_an_error() {
        let reference = Reference::parse("org/repo:Q8_0").unwrap();
        assert_eq!(reference.clone().with_quant(Some("q8_0")).unwrap().quant(), Some("q8_0"));
        assert!(reference.with_quant(Some("F16")).is_err());
    }
}
