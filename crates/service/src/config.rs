//! Configuration: defaults < file < environment (`PROGRAM__A__B`) < flags. Nothing is silently ignored.

use std::path::PathBuf;

use figment::Figment;
use figment::providers::{Format, Serialized, Toml};
use figment::value::Value;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Where a configuration comes from; `main` reads the environment and passes it in.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// The program's name: the environment's prefix, in lower case.
    pub program: String,
    /// The file, when one was named.
    pub file: Option<PathBuf>,
    /// The environment.
    pub environment: Vec<(String, String)>,
    /// What flags set: keys such as `data.bind`, with their values.
    pub overrides: Vec<(String, String)>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("the configuration file {path} can't be read: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A key is unknown, or its value does not fit; the text names file and key.
    #[error("{0}")]
    Content(Box<figment::Error>),
}

/// Why a configuration that parses can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct UnusableOption {
    /// The key's path.
    pub key: String,
    /// What is wrong with its value.
    pub problem: String,
}

/// Most bytes of a configuration file.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Loads a configuration.
///
/// # Errors
/// [`ConfigError`], with the file and the key's path in its text.
pub fn load<T: DeserializeOwned + Serialize + Default>(sources: &Sources) -> Result<T, ConfigError> {
    let mut figment = Figment::from(Serialized::defaults(T::default()));
    if let Some(path) = &sources.file {
        let read = |source| ConfigError::Read { path: path.clone(), source };
        let length = std::fs::metadata(path).map_err(read)?.len();
        if length > FILE_BYTES_MAX {
            return Err(read(std::io::Error::other(format!("it has {length} bytes, more than {FILE_BYTES_MAX}"))));
        }
        // Opened once here, so that an unreadable file is an error and never an empty one.
        std::fs::read_to_string(path).map_err(read)?;
        figment = figment.merge(Toml::file_exact(path));
    }
    let prefix = format!("{}__", sources.program.to_uppercase());
    let from_environment = sources.environment.iter().filter_map(|(name, value)| {
        let key = name.strip_prefix(&prefix)?.to_lowercase().replace("__", ".");
        Some((key, value))
    });
    let flags = sources.overrides.iter().map(|(key, value)| (key.clone(), value));
    for (key, text) in from_environment.chain(flags) {
        let Ok(value) = text.parse::<Value>();
        figment = figment.merge(Serialized::default(&key, value));
    }
    figment.extract().map_err(|error| ConfigError::Content(Box::new(error)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Sample {
        api: Api,
        names: Vec<String>,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Api {
        port: u16,
        host: String,
    }

    impl Default for Api {
        fn default() -> Self {
            Api { port: 1, host: "a".into() }
        }
    }

    fn sources(text: &str, environment: &[(&str, &str)]) -> (tempfile::TempDir, Sources) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sample.toml");
        std::fs::write(&path, text).unwrap();
        let environment = environment.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        (folder, Sources { program: "sample".into(), file: Some(path), environment, overrides: Vec::new() })
    }

    #[test]
    fn flags_win_over_environment_over_file_over_defaults() {
        let (_folder, mut sources) =
            sources("[api]\nport = 2\nhost = \"b\"", &[("SAMPLE__API__PORT", "3"), ("X", "y")]);
        let loaded: Sample = load(&sources).unwrap();
        assert_eq!(loaded.api, Api { port: 3, host: "b".into() });
        sources.overrides.push(("api.port".into(), "4".into()));
        assert_eq!(load::<Sample>(&sources).unwrap().api.port, 4);
    }

    #[test]
    fn an_unknown_key_is_fatal_and_named_with_its_file() {
        let (_folder, sources) = sources("[api]\nprot = 2", &[]);
        let text = load::<Sample>(&sources).unwrap_err().to_string();
        assert!(text.contains("prot") && text.contains("api") && text.contains("sample.toml"), "{text}");
    }

    #[test]
    fn a_wrong_value_in_the_environment_is_fatal() {
        let (_folder, sources) = sources("", &[("SAMPLE__API__PORT", "many")]);
        let text = load::<Sample>(&sources).unwrap_err().to_string();
        assert!(text.contains("port"), "{text}");
        let (_folder, sources) = self::sources("", &[("SAMPLE__APY__PORT", "1")]);
        assert!(load::<Sample>(&sources).is_err());
    }

    #[test]
    fn a_named_file_that_is_absent_is_fatal() {
        let sources = Sources { file: Some("/nowhere/sample.toml".into()), ..Sources::default() };
        let text = load::<Sample>(&sources).unwrap_err().to_string();
        assert!(text.contains("/nowhere/sample.toml"), "{text}");
    }
}
