//! What the command lines of both programs share.

use std::future::Future;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::{Sources, load};
use crate::metrics::{MetricsError, Registry};
use crate::telemetry::LogOptions;
use crate::{document, exit, telemetry, terminal};

/// What stands at the end of a program's long help and of its manual page.
pub const AFTER_HELP: &str = "Exit codes: 0 after a clean end, 1 for a failure that another start may mend, 70 when an \
exit was stuck and was ended, 75 when streams were cut at the end of a drain, 78 when the configuration can't be used.\n\n\
Variables: each setting can be given as PROGRAM__TABLE__KEY, with the program's name in capitals; they come before the \
file, and --set comes before them.";

/// Where the configuration is.
#[derive(Clone, Debug, Default, Args)]
pub struct ConfigArgs {
    /// The configuration file.
    #[arg(long, short)]
    pub config: Option<PathBuf>,
    /// Set one key over file and environment, such as --set log.filter=debug.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value)]
    pub set: Vec<(String, String)>,
}

/// What can be printed of a configuration.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Document {
    /// A commented example.
    Example,
    /// The JSON schema.
    Schema,
    /// The reference, in Markdown.
    Reference,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE")?;
    Ok((key.to_string(), value.to_string()))
}

/// Says to a person at a terminal what is wrong.
pub fn complain(program: &str, error: &dyn std::fmt::Display) {
    terminal::warn(format_args!("{program}: {error}"));
}

/// Returns the first cause of an error in words: what stands over it says only whose it was.
pub fn first_cause(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source()).last().unwrap_or(error).to_string()
}

/// Loads and checks a program's options; says what is wrong and gives the exit code otherwise.
///
/// # Errors
/// The exit code for a configuration that can't be used.
pub fn options<T, E>(program: &str, args: &ConfigArgs, check: fn(&T) -> Result<(), E>) -> Result<T, u8>
where
    T: DeserializeOwned + Serialize + Default,
    E: std::fmt::Display,
{
    let sources = Sources {
        program: program.into(),
        file: args.config.clone(),
        environment: std::env::vars().collect(),
        overrides: args.set.clone(),
    };
    let refuse = |error: &dyn std::fmt::Display| {
        complain(program, error);
        exit::CONFIG
    };
    let options: T = load(&sources).map_err(|error| refuse(&error))?;
    check(&options).map_err(|error| refuse(&error))?;
    Ok(options)
}

/// Returns a document of a configuration's type.
pub fn document<T: JsonSchema + Serialize + Default>(program: &str, what: Document) -> String {
    match what {
        Document::Example => document::example_toml::<T>(program),
        Document::Schema => format!("{:#}\n", document::schema::<T>()),
        Document::Reference => document::reference_markdown::<T>(program),
    }
}

/// Returns the table of what `register` registers, or says why there is none and gives the exit code.
///
/// # Errors
/// The exit code for metrics that can't be registered.
pub fn metrics<T>(program: &str, register: impl FnOnce(&Registry) -> Result<T, MetricsError>) -> Result<String, u8> {
    let registry = Registry::new();
    register(&registry).map_err(|error| {
        complain(program, &error);
        exit::FAILURE
    })?;
    Ok(registry.reference())
}

/// Starts logs and a runtime, runs the program to its end, and returns its exit code.
pub fn run<E: std::fmt::Display>(
    program: &str,
    log: &LogOptions,
    main: impl Future<Output = Result<u8, E>>,
    code_of: impl Fn(&E) -> u8,
) -> u8 {
    let log = match telemetry::init(log) {
        Ok(log) => log,
        Err(error) => {
            complain(program, &error);
            return exit::CONFIG;
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(program, &error);
            return exit::FAILURE;
        }
    };
    let code = match runtime.block_on(main) {
        Ok(code) => code,
        Err(error) => {
            log.flush();
            complain(program, &error);
            code_of(&error)
        }
    };
    // Whatever a blocking task still does, nobody waits for it.
    runtime.shutdown_background();
    code
}
