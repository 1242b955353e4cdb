//! Logs: lower-case messages with their values as fields, to stderr.

mod lines;
mod plain;

use std::io::{IsTerminal, Stderr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::util::SubscriberInitExt;

use lines::Lines;
use plain::Plain;

/// What is logged, and how.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LogOptions {
    /// Which events: a level, or directives such as 'info,cortex=debug'.
    pub filter: String,
    /// How a line looks.
    pub format: LogFormat,
}

impl Default for LogOptions {
    fn default() -> Self {
        LogOptions { filter: "info".into(), format: LogFormat::Auto }
    }
}

/// How a line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// Text with colours on a terminal, text without elsewhere.
    #[default]
    Auto,
    /// Text.
    Text,
    /// One JSON object a line.
    Json,
}

/// Why logging can't start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is not one.
    #[error("log.filter: {0}")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    /// A word of the filter is no level.
    #[error(
        "log.filter: '{0}' is no level; use off, error, warn, info, debug, trace or directives such as cortex=debug"
    )]
    Level(String),
    /// Somebody was first.
    #[error("logging was started twice")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
    /// The system has no thread for it.
    #[error("logging: {0}")]
    Thread(#[from] std::io::Error),
}

/// A log that was started; what it has gathered is written at its end.
pub struct Log(Lines<Stderr>);

impl Log {
    /// Writes what was gathered.
    pub fn flush(&self) {
        self.0.flush();
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Writes a point in time, in milliseconds of Unix time, as lines of the log do.
pub fn time_text(unix_ms: u64) -> String {
    let mut text = String::new();
    plain::push_time(&mut text, unix_ms / 1000, (unix_ms % 1000) as u32 * 1000);
    text
}

/// Finds a directive that is a single word and no level. It would be read as the name of a module, and with it alone
/// nothing would be logged.
fn no_level(filter: &str) -> Option<&str> {
    let alone = |word: &&str| !word.is_empty() && !word.contains(['=', '[', ':']);
    filter.split(',').map(str::trim).filter(alone).find(|word| word.parse::<LevelFilter>().is_err())
}

/// Starts logging for this process; call once, from `main`, and keep what it returns to the end.
///
/// # Errors
/// [`TelemetryError`] for a bad filter, or when called twice.
pub fn init(options: &LogOptions) -> Result<Log, TelemetryError> {
    if let Some(word) = no_level(&options.filter) {
        return Err(TelemetryError::Level(word.into()));
    }
    let filter = EnvFilter::builder().parse(&options.filter)?;
    let lines = Lines::start(std::io::stderr())?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(lines.clone());
    let colours = options.format == LogFormat::Auto && std::io::stderr().is_terminal();
    match options.format {
        LogFormat::Json => builder.json().flatten_event(true).finish().try_init()?,
        LogFormat::Auto if colours => builder.with_ansi(true).finish().try_init()?,
        LogFormat::Auto | LogFormat::Text => builder.with_ansi(false).event_format(Plain).finish().try_init()?,
    }
    let (before, gathered) = (std::panic::take_hook(), lines.clone());
    std::panic::set_hook(Box::new(move |about| {
        // What led to it stands above it.
        gathered.flush();
        before(about);
    }));
    Ok(Log(lines))
}

#[cfg(test)]
mod tests {
    use super::{no_level, time_text};

    #[test]
    fn a_point_in_time_is_told_as_in_the_log() {
        assert_eq!(time_text(1_700_000_000_123), "2023-11-14T22:13:20.123000Z");
    }

    #[test]
    fn a_mistyped_level_is_found_and_directives_are_left_alone() {
        for filter in ["info", "INFO", "off", "", "info,service=debug", "warn, neuron::life=trace", "3", "[span]=info"]
        {
            assert_eq!(no_level(filter), None, "{filter}");
        }
        assert_eq!(no_level("inf"), Some("inf"));
        assert_eq!(no_level("info,verbose"), Some("verbose"));
    }
}
