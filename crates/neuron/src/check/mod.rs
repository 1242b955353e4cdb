//! `neuron check`: what this machine has, what the configuration names, and what to do about each fault.
//!
//! It looks and changes nothing: what it says holds for the user that it runs as.

mod budget;
mod gpu;
mod hooks;
mod places;

use std::path::Path;

use serde::Serialize;
use service::clock::Clock;
use service::exit;

use crate::activation::spec_of;
use crate::harness::Harnesses;
use crate::options::Options;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// As it should be.
    Ok,
    /// The worker starts, and something is less than it could be.
    Warning,
    /// The worker would not start, or not serve a model that it should.
    Fault,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Finding {
    /// What was looked at.
    what: String,
    level: Level,
    /// What was found.
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Finding {
    fn ok(what: &str, found: impl Into<String>) -> Self {
        Finding { what: what.into(), level: Level::Ok, found: found.into(), advice: None }
    }

    fn warning(what: &str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Finding { what: what.into(), level: Level::Warning, found: found.into(), advice: Some(advice.into()) }
    }

    fn fault(what: &str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Finding { level: Level::Fault, ..Finding::warning(what, found, advice) }
    }
}

/// All findings, as they are printed.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    ok: bool,
    /// Longest time from a signal to the exit, in seconds.
    exit_budget_s: f64,
    findings: Vec<Finding>,
}

/// What this build computes on.
fn build() -> Finding {
    let features = [
        ("candle", cfg!(feature = "candle")),
        ("cuda", cfg!(feature = "cuda")),
        ("cudnn", cfg!(feature = "cudnn")),
        ("flash-attn", cfg!(feature = "flash-attn")),
    ];
    let features: Vec<&str> = features.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
    let engine = if features.is_empty() { "none".into() } else { features.join(" ") };
    let compute = gpu::BUILT_FOR.filter(|_| cfg!(feature = "cuda"));
    let compute = compute.map(|compute| format!(", for compute capability {compute}")).unwrap_or_default();
    Finding::ok("build", format!("{}; engine: {engine}{compute}", env!("CARGO_PKG_VERSION")))
}

/// Returns what models may take together, in bytes: what is configured, else what is free now of the GPUs where models
/// go there, else of the host; 0 where that is unknown. Blocks, on a sick GPU for seconds.
pub(crate) fn memory_budget(options: &Options) -> u64 {
    if let Some(mib) = options.memory.budget_mib {
        return (mib as u64) << 20;
    }
    gpu::free(options).or_else(places::free).unwrap_or(0)
}

fn models(options: &Options, harnesses: &Harnesses) -> Vec<Finding> {
    if options.entries().next().is_none() {
        let advice = "name some in [[models]] or [[default_models]], or load them by POST /models/load";
        return vec![Finding::warning("models", "none are configured", advice)];
    }
    let check = |entry: &crate::options::ModelEntry| {
        let what = format!("model {}", entry.id);
        let checked = spec_of(entry).and_then(|spec| {
            harnesses.find(&spec.harness)?.check(&spec)?;
            Ok(spec)
        });
        match checked {
            Ok(spec) => match (&spec.path, &spec.reference) {
                (Some(path), _) => Finding::ok(&what, path.display().to_string()),
                (None, Some(reference)) => Finding::ok(&what, format!("{reference}, from its hub")),
                (None, None) => Finding::ok(&what, spec.harness),
            },
            Err(error) => {
                let key = error.param().unwrap_or("path").to_string();
                Finding::fault(&what, error.message(), format!("correct {key} of this model's entry"))
            }
        }
    };
    options.entries().map(check).collect()
}

fn findings(options: &Options, cache: Option<&Path>) -> Vec<Finding> {
    let system = Path::new("/");
    let mut findings = vec![build(), places::cores()];
    findings.extend(gpu::look(system, options));
    findings.push(places::memory(system));
    findings.extend(places::ports(options));
    findings.extend(places::reach(options));
    findings.push(places::token(options));
    findings.push(places::state(options));
    findings.push(places::cache(cache, options));
    findings.extend(places::upgrades(options));
    findings.extend(hooks::look(options));
    let harnesses = Harnesses::new(options, Clock::start());
    findings.extend(models(options, &harnesses));
    findings.extend(budget::look(options, &harnesses));
    findings
}

/// Looks at everything and prints what was found; the exit code is that of an unusable configuration when something
/// would stop the start.
pub(crate) fn run(options: &Options, cache: Option<&Path>, json: bool) -> u8 {
    let begun = Clock::start();
    let findings = findings(options, cache);
    let ok = findings.iter().all(|finding| finding.level != Level::Fault);
    let exit_budget_s = options.drain.exit_budget().as_secs_f64();
    let report = Report { version: env!("CARGO_PKG_VERSION"), ok, exit_budget_s, findings };
    match json {
        true => service::say!("{:#}", serde_json::json!(report)),
        false => service::terminal::write(format_args!("{}", text(&report))),
    }
    tracing::debug!(elapsed = ?begun.now(), "checked");
    if ok { exit::CLEAN } else { exit::CONFIG }
}

fn text(report: &Report) -> String {
    let mut out = String::new();
    let width = report.findings.iter().map(|finding| finding.what.len()).max().unwrap_or_default();
    for finding in &report.findings {
        let level = match finding.level {
            Level::Ok => "ok     ",
            Level::Warning => "warning",
            Level::Fault => "FAULT  ",
        };
        out.push_str(&format!("{level} {:width$} {}\n", finding.what, finding.found));
        if let Some(advice) = &finding.advice {
            out.push_str(&format!("        {:width$} -> {advice}\n", ""));
        }
    }
    let budget = report.exit_budget_s;
    out.push_str(&format!("an exit takes at most {budget} s; TimeoutStopSec of the unit must be larger\n"));
    out.push_str(if report.ok { "nothing stops the start\n" } else { "something would stop the start\n" });
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::options::ModelEntry;

    #[test]
    fn a_model_that_is_not_there_is_a_fault_with_its_advice() {
        let entry = |harness: &str| ModelEntry {
            id: "m".into(),
            harness: Some(harness.into()),
            path: Some("/nowhere/m.gguf".into()),
            ..ModelEntry::default()
        };
        let of = |harness: &str| {
            let options = Options { default_models: vec![entry(harness)], ..Options::default() };
            models(&options, &Harnesses::new(&options, Clock::start())).remove(0)
        };
        let unknown = of("none-such");
        assert!(unknown.level == Level::Fault && unknown.advice.unwrap().contains("harness"));
        #[cfg(feature = "fake")]
        assert_eq!(of("fake").level, Level::Ok);
        #[cfg(not(feature = "fake"))]
        assert_eq!(of("fake").level, Level::Fault);
        let none = Options::default();
        assert_eq!(models(&none, &Harnesses::new(&none, Clock::start()))[0].level, Level::Warning);
    }

    #[test]
    fn each_fault_is_printed_with_what_to_do() {
        let findings = vec![Finding::ok("a", "fine"), Finding::fault("port", "in use", "end it")];
        let text = text(&Report { version: "1", ok: false, exit_budget_s: 3.0, findings });
        assert!(text.contains("FAULT   port in use\n") && text.contains("-> end it\n"), "{text}");
        assert!(text.ends_with("something would stop the start\n"));
    }
}
