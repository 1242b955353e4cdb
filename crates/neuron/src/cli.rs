//! The command line of `neuron`.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use service::clock::Clock;
use service::exit;
use service::metrics::Registry;
use service::notify::Notifier;
use service::pages::{self, PagesArgs};
use service::program::{AFTER_HELP, ConfigArgs, Document, complain, document, metrics, options, run};
use service::progress::Bar;
use service::signals::Signals;
use service::telemetry::LogOptions;
use service::token;
use service::traces::{TraceError, TraceSettings};
use tokio::net::TcpListener;

use crate::asking;
use crate::check;
use crate::fetch::{self, Downloads};
use crate::metrics::{Families, Metrics};
use crate::node::{self, NodeError, Surroundings};
use crate::options::Options;
use crate::pull;
use crate::rehearse::{self, HooksCommand};

/// Runs models in process and serves them to a fleet.
#[derive(Debug, Parser)]
#[command(name = "neuron", version, about, after_long_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve models until SIGTERM, then drain and exit.
    Serve(ConfigArgs),
    /// Fetch a model's files from its hub, without serving; print where they are.
    Pull(PullArgs),
    /// Look at the machine and at what the configuration names, without serving: say what was found, and what to do about
    /// each fault. Fails when something would stop the start.
    Check(CheckArgs),
    /// Look at the hooks, and try them.
    Hooks {
        /// What to do.
        #[command(subcommand)]
        what: HooksCommand,
    },
    /// Show what a running worker runs at its start, at each request and at its end, what its models went through, and how
    /// its parts are.
    Lifecycle(asking::LifecycleArgs),
    /// Print the log of a model, or of the worker itself: what hooks and engines wrote.
    Logs(asking::LogsArgs),
    /// Print all metrics that this program has, as a table.
    Metrics,
    /// Print what there is to know about the configuration.
    Config {
        /// What to print.
        #[arg(value_enum)]
        what: Document,
    },
    /// Write the manual pages and the completions of the shells.
    #[command(hide = true)]
    Pages(PagesArgs),
}

#[derive(Debug, Args)]
struct CheckArgs {
    /// Print the findings as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgs,
}

#[derive(Debug, Args)]
struct PullArgs {
    /// org/repo[:QUANT], or the id of a configured model.
    model: String,
    /// A branch, tag or commit.
    #[arg(long)]
    revision: Option<String>,
    /// The folder of the cache, in place of the configured one.
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigArgs,
}

/// The program.
pub fn main() -> ExitCode {
    let code = match Cli::parse().command {
        Command::Serve(args) => loaded(&args).map(|options| {
            let log = options.log.clone();
            run("neuron", &log, serve(options), code_of)
        }),
        Command::Pull(args) => options("neuron", &args.config, Options::check).map(|options| {
            // A bar and lines of a log are not for one terminal.
            let filter = if std::io::stderr().is_terminal() { "warn".into() } else { options.log.filter.clone() };
            let log = LogOptions { filter, format: options.log.format };
            run("neuron", &log, pull(args, options), |_| exit::FAILURE)
        }),
        Command::Check(args) => loaded(&args.config).map(|options| {
            let cache = fetch::settings(environment(), &options.harness.candle).cache;
            check::run(&options, cache.as_deref(), args.json)
        }),
        Command::Hooks { what: HooksCommand::List(args) } => loaded(&args).and_then(|options| {
            rehearse::list(&options, &name_of(&options)).map_err(|error| {
                complain("neuron", &error);
                exit::CONFIG
            })
        }),
        Command::Hooks { what: HooksCommand::Test(args) } => loaded(&args.config).map(|options| {
            let log = LogOptions { filter: "warn".into(), format: options.log.format };
            let name = name_of(&options);
            run("neuron", &log, rehearse::test(args, options, name), |_| exit::CONFIG)
        }),
        Command::Lifecycle(args) => Ok(asks(asking::lifecycle(args))),
        Command::Logs(args) => Ok(asks(asking::logs(args))),
        Command::Metrics => metrics("neuron", Families::register).map(|table| {
            service::terminal::write(format_args!("{table}"));
            exit::CLEAN
        }),
        Command::Config { what } => {
            service::terminal::write(format_args!("{}", document::<Options>("neuron", what)));
            Ok(exit::CLEAN)
        }
        Command::Pages(args) => pages::write(Cli::command(), &args).map(|()| exit::CLEAN).map_err(|error| {
            complain("neuron", &error);
            exit::FAILURE
        }),
    };
    ExitCode::from(code.unwrap_or_else(|code| code))
}

/// Runs a command that asks a worker something, with nothing but its own words on the terminal.
fn asks(command: impl Future<Output = Result<u8, words::Error>>) -> u8 {
    let quiet = LogOptions { filter: "warn".into(), ..LogOptions::default() };
    run("neuron", &quiet, command, |_| exit::FAILURE)
}

/// Returns the node's name.
fn name_of(options: &Options) -> String {
    options.node.id.clone().unwrap_or_else(host_name)
}

/// Loads the options of a worker; its token may be one of the service manager's credentials.
fn loaded(args: &ConfigArgs) -> Result<Options, u8> {
    let mut options = options("neuron", args, Options::check)?;
    let configured = options.control.token_file.take();
    options.control.token_file = token::file(configured, std::env::var_os("CREDENTIALS_DIRECTORY"));
    Ok(options)
}

/// A configuration that can't work must not be restarted into.
fn code_of(error: &NodeError) -> u8 {
    match error {
        NodeError::State { source, .. } if source.kind() == std::io::ErrorKind::InvalidData => exit::CONFIG,
        NodeError::Token(_)
        | NodeError::Name(_)
        | NodeError::Record(_)
        | NodeError::Traces(_)
        | NodeError::Hooks(_) => exit::CONFIG,
        _ => exit::FAILURE,
    }
}

async fn serve(options: Options) -> Result<u8, NodeError> {
    let bind = options.control.bind;
    let bound = |source| NodeError::Bind { what: "the control port", address: bind.to_string(), source };
    // Before anything is bound: `run` checks again, for those who embed it.
    node::guard_control(&options)?;
    let control = TcpListener::bind(bind).await.map_err(bound)?;
    let around = Surroundings {
        control,
        signals: Signals::listen().map_err(bound)?.forward(),
        notifier: Notifier::from_variables(|name| std::env::var_os(name), std::process::id()),
        hub: environment(),
        traces: TraceSettings::from_variables(|name| std::env::var(name).ok()).map_err(TraceError::from)?,
        host_name: host_name(),
        hooks: Vec::new(),
        on_data_address: None,
    };
    // Boxed: it is large, and moved through several hands.
    Box::pin(node::run(options, around)).await
}

/// What the environment says of hubs.
fn environment() -> hub::Settings {
    hub::Settings::from_variables(|name| std::env::var(name).ok())
}

async fn pull(args: PullArgs, options: Options) -> Result<u8, words::Error> {
    let mut reference = pull::reference(&options, &args.model)?;
    if let Some(revision) = &args.revision {
        reference = reference.with_revision(revision)?;
    }
    let settings = fetch::settings(environment(), &options.harness.candle);
    let settings = hub::Settings { cache: args.cache.or(settings.cache), ..settings };
    let metrics = Metrics::new(&Registry::new()).map_err(words::Error::internal)?;
    let downloads = Downloads::new(settings, Clock::start(), metrics);
    let bar = Bar::on_terminal(reference.to_string());
    let watch = |pulled: hub::Pulled| bar.show(pulled.done, pulled.total);
    let path = downloads.fetch(reference.repo(), &reference, true, watch).await;
    drop(bar);
    service::say!("{}", path.map_err(|failure| failure.error)?.display());
    Ok(exit::CLEAN)
}

/// The host's name as far as it can be a node id.
fn host_name() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let allowed = |c: &char| c.is_ascii_alphanumeric() || "-_.".contains(*c);
    let name: String = text.trim().chars().filter(allowed).take(64).collect();
    if name.is_empty() { "neuron".into() } else { name }
}
