//! What a hub is told of its surroundings.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// The hub of those who name none.
const ENDPOINT: &str = "https://huggingface.co";

/// Where the hub is, where its files are kept, and who asks.
#[derive(Clone, Default)]
pub struct Settings {
    /// The hub's URL; huggingface.co when absent.
    pub endpoint: Option<String>,
    /// The folder of the cache, whose `models--*` are.
    pub cache: Option<PathBuf>,
    /// The token of the hub's user.
    pub token: Option<String>,
    /// A file with it, read when there is no `token`.
    pub token_file: Option<PathBuf>,
    /// Nothing is asked of the network.
    pub offline: bool,
    /// What bounds a download.
    pub limits: Limits,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Settings { endpoint, cache, token, token_file, offline, limits } = self;
        let token = token.as_ref().map(|_| "..");
        let mut shown = f.debug_struct("Settings");
        shown.field("endpoint", endpoint).field("cache", cache).field("token", &token).field("token_file", token_file);
        shown.field("offline", offline).field("limits", limits).finish()
    }
}

impl Settings {
    /// Reads the variables that `huggingface_hub` reads: `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_ENDPOINT`,
    /// `HF_HUB_OFFLINE`, and for the default folder `XDG_CACHE_HOME` and `HOME`. An empty one counts as absent.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        let given = |name: &str| variable(name).filter(|value| !value.is_empty());
        let path = |name: &str| given(name).map(PathBuf::from);
        let caches = path("XDG_CACHE_HOME").or_else(|| Some(path("HOME")?.join(".cache")));
        let home = path("HF_HOME").or_else(|| Some(caches?.join("huggingface")));
        let truth = |value: String| matches!(value.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE");
        Settings {
            endpoint: given("HF_ENDPOINT"),
            cache: path("HF_HUB_CACHE").or_else(|| Some(home.as_ref()?.join("hub"))),
            token: given("HF_TOKEN").map(|token| token.trim().to_string()),
            token_file: path("HF_TOKEN_PATH").or_else(|| Some(home.as_ref()?.join("token"))),
            offline: given("HF_HUB_OFFLINE").is_some_and(truth),
            limits: Limits::default(),
        }
    }

    pub(crate) fn endpoint(&self) -> &str {
        self.endpoint.as_deref().unwrap_or(ENDPOINT).trim_end_matches('/')
    }
}

/// What bounds a download. Never its whole time: a large file is not a fault.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Longest time to connect.
    pub connect: Duration,
    /// Longest time until an answer's head, and between two pieces of its body.
    pub stall: Duration,
    /// Tries in a row that bring nothing, before a download is given up.
    pub tries: u32,
    /// The pause after the first of them; it doubles up to [`Limits::pause_max`].
    pub pause: Duration,
    /// Longest such pause, also when the hub asks for a longer one.
    pub pause_max: Duration,
    /// Longest wait for another process that fetches the same file and gets nowhere.
    pub lock: Duration,
    /// Bytes of the disk that stay free.
    pub disk_reserve: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connect: Duration::from_secs(10),
            stall: Duration::from_secs(30),
            tries: 6,
            pause: Duration::from_millis(500),
            pause_max: Duration::from_secs(16),
            // As long as it takes to hash what was there before of a very large file.
            lock: Duration::from_secs(600),
            disk_reserve: 256 << 20,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn of(pairs: &[(&str, &str)]) -> Settings {
        Settings::from_variables(|name| Some(pairs.iter().find(|(key, _)| *key == name)?.1.to_string()))
    }

    #[test]
    fn the_folder_is_found_as_huggingface_hub_finds_it() {
        for (pairs, folder) in [
            (&[("HOME", "/h")][..], Some("/h/.cache/huggingface/hub")),
            (&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")], Some("/x/huggingface/hub")),
            (&[("HOME", "/h"), ("HF_HOME", "/hf")], Some("/hf/hub")),
            (&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")], Some("/c")),
            (&[("HF_HOME", "")], None),
        ] {
            assert_eq!(of(pairs).cache, folder.map(PathBuf::from), "{pairs:?}");
        }
        assert_eq!(of(&[("HF_HOME", "/hf")]).token_file, Some("/hf/token".into()));
    }

    #[test]
    fn offline_is_said_by_a_truth_and_the_token_is_never_shown() {
        for (value, offline) in [("1", true), ("true", true), ("0", false), ("", false), ("no", false)] {
            assert_eq!(of(&[("HF_HUB_OFFLINE", value)]).offline, offline, "{value}");
        }
        let settings = of(&[("HF_TOKEN", " hf_secret\n"), ("HF_ENDPOINT", "http://hub/")]);
        assert_eq!((settings.token.as_deref(), settings.endpoint()), (Some("hf_secret"), "http://hub"));
        assert!(!format!("{settings:?}").contains("secret"));
    }
}
