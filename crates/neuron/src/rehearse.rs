//! `neuron hooks`: which hooks there are, and the run of one event's hooks for nobody.

use clap::{Args, Subcommand};
use hooks::{HookMetrics, HookReport};
use lifecycle::HookEvent;
use serde_json::Value;
use service::clock::Clock;
use service::exit;
use service::metrics::Registry;
use service::program::ConfigArgs;
use words::{Error, ModelId};

use crate::harness::DEFAULT_HARNESS;
use crate::options::Options;
use crate::turns::Turns;

/// Lines of output that are printed at most.
const LINES_MAX: usize = 1000;

/// What is done with hooks.
#[derive(Debug, Subcommand)]
pub(crate) enum HooksCommand {
    /// Print the hooks of the configuration and its folder, in the order of a life.
    List(ConfigArgs),
    /// Run the hooks of one event now, and nothing else; print what they write and how they end.
    Test(TestArgs),
}

/// Which hooks run.
#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    /// startup, before_load, after_healthy, ready, stop_generation, before_stop, after_unload or shutdown.
    event: String,
    /// The model, for the events of one.
    model: Option<String>,
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
}

/// Reads the hooks as a worker would.
///
/// # Errors
/// When one can't be run as it is written.
pub(crate) fn turns(options: &Options, node: &str) -> Result<Turns, Error> {
    let metrics = HookMetrics::register(&Registry::new(), "neuron").map_err(Error::internal)?;
    let turns = Turns::new(options, node, Vec::new(), Clock::start(), metrics);
    turns.map_err(|error| Error::invalid(error.place.clone(), error.to_string()))
}

fn line(report: &HookReport) -> String {
    let models = if report.models.is_empty() { String::new() } else { format!(" for {}", report.models.join(", ")) };
    let said = if report.description.is_empty() { String::new() } else { format!(": {}", report.description) };
    let policy = format!("{:?}", report.on_failure).to_lowercase();
    let (event, name, source) = (report.event, &report.name, &report.source);
    format!("{event:<16} {name}{models} ({policy}, {} s, {source}){said}", report.timeout_s)
}

/// Prints the hooks.
///
/// # Errors
/// When one can't be run as it is written.
pub(crate) fn list(options: &Options, node: &str) -> Result<u8, Error> {
    turns(options, node)?.reports().iter().for_each(|report| service::say!("{}", line(report)));
    Ok(exit::CLEAN)
}

/// Runs the hooks of an event. Fails when any of them did.
///
/// # Errors
/// When a hook can't be run as it is written, or there is no such event.
pub(crate) async fn test(args: TestArgs, options: Options, node: String) -> Result<u8, Error> {
    let event = HookEvent::parse(&args.event).ok_or_else(|| {
        let events: Vec<&str> = HookEvent::ALL.iter().map(|event| event.name()).collect();
        Error::invalid("event", format!("there is no event '{}'; there are {}", args.event, events.join(", ")))
    })?;
    let turns = turns(&options, &node)?;
    let model = match (event.of_model(), args.model) {
        (true, Some(model)) => Some(ModelId::new(model).map_err(|error| Error::invalid("model", error.to_string()))?),
        (true, None) => return Err(Error::invalid("model", format!("'{}' is about a model: name one", event.name()))),
        (false, _) => None,
    };
    let (ended, log) = match &model {
        Some(id) => {
            let entry = options.entry(id.as_str());
            let harness = entry.and_then(|entry| entry.harness.as_deref()).unwrap_or(DEFAULT_HARNESS);
            (turns.of_model(event, id, harness, Value::Null).await, turns.log(id))
        }
        None => (turns.of_node(event).await, turns.node_log()),
    };
    log.tail(LINES_MAX).iter().for_each(|line| service::say!("{}: {}", line.source, line.text));
    let ran: Vec<HookReport> = turns.reports().into_iter().filter(|report| report.runs > 0).collect();
    for report in &ran {
        let last = report.last.as_ref();
        let how = last.and_then(|last| last.failure.clone()).unwrap_or_else(|| "ok".into());
        service::say!("{} '{}': {how} after {:.3} s", report.event, report.name, last.map_or(0.0, |last| last.seconds));
    }
    if ran.is_empty() {
        service::say!("no hook runs at {}", event.name());
    }
    let failed = ended.is_err() || ran.iter().any(|report| report.failures > 0);
    Ok(if failed { exit::FAILURE } else { exit::CLEAN })
}
