//! The command line of `cortex`.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use bytes::Bytes;
use clap::{Args, Parser, Subcommand};
use futures_util::StreamExt;
use service::exit;
use service::notify::Notifier;
use service::program::{ConfigArgs, Document, complain, document, options, run};
use service::signals::Signals;
use service::telemetry::LogOptions;
use tokio::net::TcpListener;
use wire::EventSplitter;

use crate::gateway::{self, GatewayError, Surroundings};
use crate::options::Options;

/// One OpenAI-compatible endpoint over a fleet of GPU hosts that people own.
#[derive(Debug, Parser)]
#[command(name = "cortex", version, about)]
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
    /// Print what there is to know about the configuration.
    Config {
        /// What to print.
        #[arg(value_enum)]
        what: Document,
    },
}

#[derive(Debug, Args)]
struct StatusArgs {
    /// The gateway's admin URL.
    #[arg(long, env = "CORTEX_ADMIN_URL", default_value = "http://127.0.0.1:31314")]
    admin: String,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct ChatArgs {
    /// The model.
    model: String,
    /// What to say; standard input when absent.
    message: Vec<String>,
    /// The gateway's API URL.
    #[arg(long, env = "CORTEX_API_URL", default_value = "http://127.0.0.1:31313")]
    api: String,
    /// 0 always takes the likeliest token.
    #[arg(long)]
    temperature: Option<f32>,
}

/// The program.
#[allow(clippy::print_stdout)]
pub fn main() -> ExitCode {
    let code = match Cli::parse().command {
        Command::Serve(args) => options("cortex", &args, Options::check).map(|options| {
            let log = options.log.clone();
            run("cortex", &log, serve(options), code_of)
        }),
        Command::Status(args) => Ok(run("cortex", &quiet(), status(args), |_| exit::FAILURE)),
        Command::Rollout(args) => Ok(run("cortex", &quiet(), crate::rollout::run(args), |_| exit::FAILURE)),
        Command::Chat(args) => Ok(run("cortex", &quiet(), chat(args), |_| exit::FAILURE)),
        Command::Config { what } => {
            print!("{}", document::<Options>("cortex", what));
            Ok(exit::CLEAN)
        }
    };
    ExitCode::from(code.unwrap_or_else(|code| code))
}

fn quiet() -> LogOptions {
    LogOptions { filter: "warn".into(), ..LogOptions::default() }
}

/// A configuration that can't work must not be restarted into.
fn code_of(error: &GatewayError) -> u8 {
    match error {
        GatewayError::Token(_) | GatewayError::Name(_) => exit::CONFIG,
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
    let around = Surroundings {
        admin: bind("the admin port", options.admin.bind).await?,
        api: bind("the API port", options.api.bind).await?,
        signals: Signals::listen().map_err(signals)?.forward(),
        notifier: Notifier::new(std::env::var_os("NOTIFY_SOCKET").as_deref()),
    };
    gateway::run(options, around).await
}

fn client() -> anyhow::Result<reqwest::Client> {
    Ok(reqwest::Client::builder().connect_timeout(Duration::from_secs(5)).build()?)
}

#[allow(clippy::print_stdout)]
async fn status(args: StatusArgs) -> anyhow::Result<u8> {
    let url = format!("{}/api/status", args.admin.trim_end_matches('/'));
    let response = client()?.get(&url).timeout(Duration::from_secs(10)).send().await?.error_for_status()?;
    let status: serde_json::Value = serde_json::from_slice(&response.bytes().await?)?;
    if args.json {
        println!("{status:#}");
        return Ok(exit::CLEAN);
    }
    println!("gateway {}  ready {}", status["gateway"].as_str().unwrap_or("?"), status["ready"]);
    println!("{:<24} {:<16} {:<12} {:<8} {:>8} MODELS", "CONTROL", "NODE", "STATE", "ROUTABLE", "RUNNING");
    for node in status["nodes"].as_array().into_iter().flatten() {
        let inner = &node["status"];
        let models = inner["models"].as_array().into_iter().flatten();
        let models =
            models.map(|m| format!("{} ({})", m["id"].as_str().unwrap_or("?"), m["state"].as_str().unwrap_or("?")));
        println!(
            "{:<24} {:<16} {:<12} {:<8} {:>8} {}",
            node["control"].as_str().unwrap_or("?"),
            inner["node"].as_str().unwrap_or("never heard"),
            inner["state"]["state"].as_str().unwrap_or("-"),
            node["routable"],
            inner["in_flight"].as_u64().unwrap_or(0),
            models.collect::<Vec<_>>().join(", "),
        );
    }
    Ok(exit::CLEAN)
}

/// Most bytes of one event that the command line reads.
const EVENT_BYTES_MAX: usize = 1 << 20;

#[allow(clippy::print_stdout)]
async fn chat(args: ChatArgs) -> anyhow::Result<u8> {
    let message = match args.message.join(" ") {
        text if text.is_empty() => std::io::read_to_string(std::io::stdin())?,
        text => text,
    };
    let mut body = serde_json::json!({
        "model": args.model,
        "stream": true,
        "messages": [{ "role": "user", "content": message.trim() }],
    });
    if let Some(temperature) = args.temperature {
        body["temperature"] = temperature.into();
    }
    let url = format!("{}/v1/chat/completions", args.api.trim_end_matches('/'));
    let response = client()?.post(&url).json(&body).send().await?;
    if !response.status().is_success() {
        let status = response.status();
        let text = response.text().await.unwrap_or_default();
        let error: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        anyhow::bail!("{status}: {}", error["error"]["message"].as_str().unwrap_or(&text));
    }
    let mut splitter = EventSplitter::new(EVENT_BYTES_MAX);
    let mut chunks = response.bytes_stream();
    let mut done = false;
    while let Some(chunk) = chunks.next().await {
        let mut event = splitter.push(chunk?);
        loop {
            let next = match event.take() {
                Some(event) => Some(event),
                None => splitter.next_event()?,
            };
            let Some(next) = next else { break };
            done |= show(&next)?;
        }
    }
    println!();
    anyhow::ensure!(done, "the stream ended before the answer was complete");
    Ok(exit::CLEAN)
}

/// Prints an event's text; true for the last event.
#[allow(clippy::print_stdout)]
fn show(event: &Bytes) -> anyhow::Result<bool> {
    let Some(data) = event.strip_prefix(b"data: ") else { return Ok(false) };
    if data.starts_with(b"[DONE]") {
        return Ok(true);
    }
    let chunk: serde_json::Value = serde_json::from_slice(data)?;
    if let Some(message) = chunk["error"]["message"].as_str() {
        anyhow::bail!("{message}");
    }
    if let Some(text) = chunk["choices"][0]["delta"]["content"].as_str() {
        print!("{text}");
        std::io::stdout().flush()?;
    }
    Ok(false)
}
