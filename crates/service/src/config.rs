//! Configuration: defaults < file < environment (`PROGRAM__A__B`) < flags. Nothing is silently ignored.

use std::io::Read;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

use figment::error::{Error as FigmentError, Kind, OneOf};
use figment::providers::{Format, Serialized, Toml};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};
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
    /// The file is no TOML.
    #[error("{path}: {source}")]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// Where in it, and why.
        source: Box<<Toml as Format>::Error>,
    },
    /// A key is unknown, or its value does not fit.
    #[error("{place}: {key}: {problem}")]
    Content {
        /// The file, the variable or the flag.
        place: String,
        /// The key's path.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
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

/// Longest span of any setting, in milliseconds.
pub const DAY_MS: u64 = 86_400_000;

/// Checks settings, each with its key, value, least and most.
///
/// # Errors
/// [`UnusableOption`] for the first that is not within.
pub fn check_bounds(settings: &[(&str, u64, u64, u64)]) -> Result<(), UnusableOption> {
    match settings.iter().find(|(_, value, low, high)| !(low..=high).contains(&value)) {
        None => Ok(()),
        Some((key, value, low, high)) => {
            let problem = format!("must be from {low} to {high}, it is {value}");
            Err(UnusableOption { key: key.to_string(), problem })
        }
    }
}

/// Checks the address of another program: `host:port`, with an IPv6 address in brackets.
///
/// # Errors
/// What is wrong with it.
pub fn check_address(address: &str) -> Result<(), String> {
    let parts = address.rsplit_once(':').filter(|(host, _)| {
        let inner = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let named = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !host.is_empty() && inner.map_or(host.chars().all(named), |inner| inner.parse::<Ipv6Addr>().is_ok())
    });
    match parts.and_then(|(_, port)| port.parse::<u16>().ok()) {
        Some(1..) => Ok(()),
        _ => Err(format!("must be host:port, or [IPv6 address]:port, it is '{address}'")),
    }
}

/// Most bytes of a configuration file.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// One place that settings come from, with the name that errors call it by.
struct Layer {
    place: String,
    values: Dict,
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.place.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, FigmentError> {
        Ok(Map::from([(Profile::Default, self.values.clone())]))
    }
}

/// A variable or a flag.
struct Given<'a> {
    place: String,
    key: String,
    text: &'a str,
    /// Whether it is taken as it is written: a name may look like a number.
    plain: bool,
}

impl Given<'_> {
    fn layer(&self) -> Layer {
        let Ok(parsed) = self.text.parse::<Value>();
        let value = if self.plain { Value::from(self.text) } else { parsed };
        let nested = self.key.rsplit('.').fold(value, |value, name| Dict::from([(name.to_string(), value)]).into());
        Layer { place: self.place.clone(), values: nested.into_dict().unwrap_or_default() }
    }
}

/// Loads a configuration.
///
/// # Errors
/// [`ConfigError`], with the file, variable or flag and the key's path in its text.
pub fn load<T: DeserializeOwned + Serialize + Default>(sources: &Sources) -> Result<T, ConfigError> {
    let mut base = Figment::from(Serialized::defaults(T::default()));
    if let Some(path) = &sources.file {
        base = base.merge(file(path)?);
    }
    let prefix = format!("{}__", sources.program.to_uppercase());
    let from_environment = sources.environment.iter().filter_map(|(name, text)| {
        let key = name.strip_prefix(&prefix)?.to_lowercase().replace("__", ".");
        Some(Given { place: format!("the variable {name}"), key, text, plain: false })
    });
    let flags = sources.overrides.iter().map(|(key, text)| Given {
        place: format!("--set {key}"),
        key: key.clone(),
        text,
        plain: false,
    });
    let mut given: Vec<_> = from_environment.chain(flags).collect();
    if let Some(odd) = given.iter().find(|given| given.key.split('.').any(str::is_empty)) {
        let (place, key) = (odd.place.clone(), odd.key.clone());
        return Err(ConfigError::Content { place, key, problem: "this is no key's path".into() });
    }
    let mut first: Option<FigmentError> = None;
    loop {
        let layers = given.iter().map(Given::layer);
        let error = match layers.fold(base.clone(), Figment::merge).extract() {
            Ok(loaded) => return Ok(loaded),
            Err(error) => error,
        };
        let place = error.metadata.as_ref().map_or("the configuration", |metadata| metadata.name.as_ref());
        let wrong_type = matches!(error.kind, Kind::InvalidType(..));
        // Each one is taken as it is written once at most, so this ends.
        match given.iter_mut().find(|given| wrong_type && !given.plain && given.place == place) {
            Some(given) => {
                given.plain = true;
                first = Some(error);
            }
            None => {
                // What it was before it was taken as it is written tells more.
                let error = first.filter(|first| first.path == error.path).unwrap_or(error);
                let place = error.metadata.as_ref().map_or("the configuration", |metadata| metadata.name.as_ref());
                let (place, key) = (place.to_string(), path_text(&error.path));
                return Err(ConfigError::Content { place, key, problem: problem(&error.kind) });
            }
        }
    }
}

/// Reads the file, once: what comes through a pipe is there only once, and an unreadable file is never an empty one.
fn file(path: &Path) -> Result<Layer, ConfigError> {
    let read = |source| ConfigError::Read { path: path.into(), source };
    let mut text = String::new();
    std::fs::File::open(path).map_err(read)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(read)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(read(std::io::Error::other(format!("it has more than {FILE_BYTES_MAX} bytes"))));
    }
    let values = Toml::from_str(&text);
    let values = values.map_err(|error| ConfigError::Syntax { path: path.into(), source: Box::new(error) })?;
    Ok(Layer { place: path.display().to_string(), values })
}

/// `hooks.run[0].on`
fn path_text(path: &[String]) -> String {
    let mut text = String::new();
    for name in path {
        match name.parse::<usize>() {
            Ok(number) => text.push_str(&format!("[{number}]")),
            Err(_) if text.is_empty() => text.push_str(name),
            Err(_) => text.push_str(&format!(".{name}")),
        }
    }
    text
}

fn problem(kind: &Kind) -> String {
    // What a type is called in Rust is no word for operators.
    let expected = |name: &str| match name {
        "usize" | "u64" | "u32" | "u16" | "u8" => "a whole number from 0 on".to_string(),
        "isize" | "i64" | "i32" => "a whole number".to_string(),
        "f64" | "f32" => "a number".to_string(),
        "a sequence" => "a list".to_string(),
        _ if name.starts_with("struct ") || name.ends_with("map") => "a table".to_string(),
        other => other.to_string(),
    };
    match kind {
        Kind::UnknownField(_, []) => "there is no such key".into(),
        Kind::UnknownField(_, known) => format!("there is no such key here, but {}", OneOf(known)),
        Kind::UnknownVariant(given, known) => format!("must be {}, it is '{given}'", OneOf(known)),
        Kind::InvalidType(given, name) | Kind::InvalidValue(given, name) => {
            format!("must be {}, it is {given}", expected(name))
        }
        other => other.to_string(),
    }
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
    fn an_error_names_the_file_the_variable_or_the_flag_and_what_is_wanted() {
        let check = |text: &str, environment: &[(&str, &str)], flags: &[(&str, &str)], wanted: &str| {
            let (_folder, mut sources) = sources(text, environment);
            sources.overrides = flags.iter().map(|(key, text)| (key.to_string(), text.to_string())).collect();
            let text = load::<Sample>(&sources).unwrap_err().to_string();
            assert!(text.ends_with(wanted), "{text}");
        };
        check(
            "[api]\nport = \"x\"",
            &[],
            &[],
            "sample.toml: api.port: must be a whole number from 0 on, it is string \"x\"",
        );
        check("[apy]", &[], &[], "sample.toml: apy: there is no such key here, but `api` or `names`");
        check(
            "",
            &[("SAMPLE__API__PORT", "-1")],
            &[],
            "the variable SAMPLE__API__PORT: api.port: must be a whole number from 0 on, it is signed int `-1`",
        );
        check("", &[], &[("api", "1")], "--set api: api: must be a table, it is unsigned int `1`");
        check("", &[], &[("names", "a")], "--set names: names: must be a list, it is string \"a\"");
        check("", &[("SAMPLE__", "1")], &[], "the variable SAMPLE__: : this is no key's path");
        check("names = [1]", &[], &[], "sample.toml: names[0]: must be a string, it is signed int `1`");
        let (_folder, sources) = sources("[api", &[]);
        assert!(load::<Sample>(&sources).unwrap_err().to_string().contains("sample.toml: TOML parse error at line 1"));
    }

    #[test]
    fn an_address_is_a_host_and_a_port_and_nothing_else() {
        for address in ["a:1", "127.0.0.1:13231", "gpu-1.lan:65535", "[::1]:1", "[fe80::1]:2", "a_b:3"] {
            assert_eq!(check_address(address), Ok(()), "{address}");
        }
        for address in ["", "a", "a:", ":1", "a:0", "a:65536", "http://a:1", "a b:1", "::1:1", "[x]:1", "[]:1", "a/b:1"]
        {
            assert!(check_address(address).unwrap_err().contains("host:port"), "{address}");
        }
    }

    #[test]
    fn a_name_that_looks_like_a_number_is_a_name_where_one_is_wanted() {
        let (_folder, mut sources) = sources("", &[("SAMPLE__API__HOST", "007"), ("SAMPLE__API__PORT", "7")]);
        assert_eq!(load::<Sample>(&sources).unwrap().api, Api { port: 7, host: "007".into() });
        sources.overrides.push(("api.host".into(), "1e5".into()));
        assert_eq!(load::<Sample>(&sources).unwrap().api.host, "1e5");
    }

    #[test]
    fn what_comes_through_a_pipe_is_read_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        let writer = std::thread::spawn({
            let path = path.clone();
            move || std::fs::write(path, "[api]\nport = 5").unwrap()
        });
        let sources = Sources { file: Some(path), ..Sources::default() };
        assert_eq!(load::<Sample>(&sources).unwrap().api.port, 5);
        writer.join().unwrap();
    }

    #[test]
    fn a_named_file_that_is_absent_is_fatal() {
        let sources = Sources { file: Some("/nowhere/sample.toml".into()), ..Sources::default() };
        let text = load::<Sample>(&sources).unwrap_err().to_string();
        assert!(text.contains("/nowhere/sample.toml"), "{text}");
    }
}
