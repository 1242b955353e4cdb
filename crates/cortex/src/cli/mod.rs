//! The command line of `cortex`.

pub(crate) mod admin;
mod chat;
mod lifecycle;
mod logs;
mod models;
mod node;
mod pull;
mod requests;
mod status;
mod table;
mod targets;

use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};
use service::exit;
use service::lanes::Lanes;
use service::notify::Notifier;
use service::pages::{self, PagesArgs};
use service::program::{AFTER_HELP, ConfigArgs, Document, complain, document, metrics, options, run};
use service::signals::Signals;
use service::telemetry::LogOptions;
use service::token;
use service::traces::{TraceError, TraceSettings};
use tokio::net::TcpListener;

use chat::ChatArgs;
use node::{NodeArgs, OrderArgs, UpgradeArgs};
use status::StatusArgs;
use targets::TargetsArgs;

use crate::gateway::{self, GatewayError, Surroundings};
use crate::metrics::Families;
use crate::options::Options;

/// One OpenAI-compatible endpoint over a fleet of GPU hosts that people own.
#[derive(Debug, Parser)]
#[command(name = "cortex", version, about, after_long_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the API until SIGTERM, then drain and exit.
    Serve(ConfigArgs),
    /// Show the fleet as a running gateway sees it.
    Status(StatusArgs),
    /// Restart the fleet node by node, without taking a model away.
    Rollout(crate::rollout::RolloutArgs),
    /// Ask a model a question and print the answer as it comes.
    Chat(ChatArgs),
    /// Empty a worker: it takes no new work, ends or hands over what runs, unloads, and stays so over restarts.
    Drain(OrderArgs),
    /// Lift a drain: the worker loads its models again and serves.
    Undrain(NodeArgs),
    /// Send a worker no new work; what runs goes on, its models stay, and so does the cordon over restarts.
    Cordon(NodeArgs),
    /// Lift a cordon.
    Uncordon(NodeArgs),
    /// Drain a worker and let it leave; whoever supervises it starts it again.
    Restart(OrderArgs),
    /// Restart a worker, with one of its own [upgrade.NAME] commands once it is empty.
    Upgrade(UpgradeArgs),
    /// Show the models that clients can use, and their states.
    Models(models::ListArgs),
    /// Show what is loaded where: memory, requests, idleness.
    Ps(models::ListArgs),
    /// Load a model, where there is room for it or on a worker of choice, and wait until it is ready.
    Load(models::LoadArgs),
    /// Unload a model, everywhere or on one worker, once its requests have ended.
    Unload(models::UnloadArgs),
    /// Show the requests that run.
    Requests(requests::RequestsArgs),
    /// End a running request, or all of a model: its client gets what was generated, and is told why it ends.
    Cancel(requests::CancelArgs),
    /// Print the log of a model, or of a worker: what hooks and engines wrote.
    Logs(logs::LogsArgs),
    /// Show what a worker runs at its start, at each request and at its end, what its models went through, and how its
    /// parts are.
    Lifecycle(lifecycle::LifecycleArgs),
    /// Have a worker fetch a model's files from their hub, without loading it.
    Pull(pull::PullArgs),
    /// Print the workers as targets for Prometheus' file-based discovery.
    Targets(TargetsArgs),
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

/// The program.
pub fn main() -> ExitCode {
    let code = match Cli::parse().command {
        Command::Serve(args) => options("cortex", &args, Options::check).map(|mut options: Options| {
            let configured = options.fleet.token_file.take();
            options.fleet.token_file = token::file(configured, std::env::var_os("CREDENTIALS_DIRECTORY"));
            let log = options.log.clone();
            run("cortex", &log, serve(options), code_of)
        }),
        Command::Status(args) => Ok(client_run(status::status(args))),
        Command::Rollout(args) => Ok(client_run(crate::rollout::run(args))),
        Command::Chat(args) => Ok(client_run(chat::chat(args))),
        Command::Drain(args) => Ok(client_run(node::order(node::Action::Drain, args))),
        Command::Undrain(args) => Ok(client_run(node::lift(node::Action::Undrain, args))),
        Command::Cordon(args) => Ok(client_run(node::lift(node::Action::Cordon, args))),
        Command::Uncordon(args) => Ok(client_run(node::lift(node::Action::Uncordon, args))),
        Command::Restart(args) => Ok(client_run(node::order(node::Action::Restart, args))),
        Command::Upgrade(args) => Ok(client_run(node::upgrade(args))),
        Command::Models(args) => Ok(client_run(models::models(args))),
        Command::Ps(args) => Ok(client_run(models::ps(args))),
        Command::Load(args) => Ok(client_run(models::load(args))),
        Command::Unload(args) => Ok(client_run(models::unload(args))),
        Command::Requests(args) => Ok(client_run(requests::list(args))),
        Command::Cancel(args) => Ok(client_run(requests::cancel(args))),
        Command::Logs(args) => Ok(client_run(logs::logs(args))),
        Command::Lifecycle(args) => Ok(client_run(lifecycle::show(args))),
        Command::Pull(args) => Ok(client_run(pull::pull(args))),
        Command::Targets(args) => Ok(client_run(targets::print(args))),
        Command::Metrics => metrics("cortex", Families::register).map(|table| {
            service::terminal::write(format_args!("{table}"));
            exit::CLEAN
        }),
        Command::Config { what } => {
            service::terminal::write(format_args!("{}", document::<Options>("cortex", what)));
            Ok(exit::CLEAN)
        }
        Command::Pages(args) => pages::write(Cli::command(), &args).map(|()| exit::CLEAN).map_err(|error| {
            complain("cortex", &error);
            exit::FAILURE
        }),
    };
    ExitCode::from(code.unwrap_or_else(|code| code))
}

/// Runs a command that asks a gateway something, with nothing but its own words on the terminal.
fn client_run(command: impl Future<Output = anyhow::Result<u8>>) -> u8 {
    let quiet = LogOptions { filter: "warn".into(), ..LogOptions::default() };
    run("cortex", &quiet, command, |_| exit::FAILURE)
}

/// A configuration that can't work must not be restarted into.
fn code_of(error: &GatewayError) -> u8 {
    match error {
        GatewayError::Token(_) | GatewayError::Name(_) | GatewayError::Traces(_) => exit::CONFIG,
        _ => exit::FAILURE,
    }
}

async fn serve(options: Options) -> Result<u8, GatewayError> {
    gateway::guard_admin(&options)?;
    if options.neurons.is_empty() {
        complain("cortex", &"no [[neurons]] are configured; every request will be refused");
    }
    let bind = |what: &'static str, address: std::net::SocketAddr| async move {
        let bound = |source| GatewayError::Bind { what, address: address.to_string(), source };
        TcpListener::bind(address).await.map_err(bound)
    };
    let signals = |source| GatewayError::Bind { what: "the signal handler", address: String::new(), source };
    let threads = match options.api.threads {
        0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        threads => threads,
    };
    let around = Surroundings {
        lanes: Lanes::start("api", threads).map_err(GatewayError::Threads)?,
        admin: bind("the admin port", options.admin.bind).await?,
        api: bind("the API port", options.api.bind).await?,
        signals: Signals::listen().map_err(signals)?.forward(),
        notifier: Notifier::from_variables(|name| std::env::var_os(name), std::process::id()),
        traces: TraceSettings::from_variables(|name| std::env::var(name).ok()).map_err(TraceError::from)?,
    };
    gateway::run(options, around).await
}

fn client() -> anyhow::Result<reqwest::Client> {
    Ok(reqwest::Client::builder().connect_timeout(Duration::from_secs(5)).build()?)
}
