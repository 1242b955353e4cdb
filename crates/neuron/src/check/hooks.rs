//! Whether the hooks of the configuration can run: what they are, their programs, and the time that an exit leaves them.

use std::time::Duration;

use hooks::HookReport;
use lifecycle::{OnFailure, expand};

use super::{Finding, places};
use crate::options::Options;
use crate::rehearse;
use crate::turns::Turns;

/// What is said where a hook would fail.
const ADVICE: &str = "install it, or correct the hook; 'neuron hooks test' runs it now";

pub(super) fn look(options: &Options) -> Vec<Finding> {
    let node = options.node.id.clone().unwrap_or_default();
    let turns = match rehearse::turns(options, &node) {
        Ok(turns) => turns,
        Err(error) => {
            let place = error.param().unwrap_or("hooks").to_string();
            return vec![Finding::fault("hooks", error.message(), format!("correct {place}"))];
        }
    };
    let mut findings: Vec<Finding> = turns.reports().iter().map(|report| program(options, &node, report)).collect();
    findings.extend(time(options, &turns));
    findings
}

/// Looks for a hook's program.
fn program(options: &Options, node: &str, hook: &HookReport) -> Finding {
    let what = format!("hook {} of {}", hook.name, hook.event);
    let Some(program) = &hook.program else { return Finding::ok(&what, "no command") };
    let state_dir = options.node.state_dir.as_deref().map(|path| path.display().to_string());
    let known = |name: &str| match name {
        "EVENT" => Some(hook.event.to_string()),
        "NODE" => Some(node.to_string()),
        "STATE_DIR" => Some(state_dir.clone().unwrap_or_default()),
        name => options.hooks.macros.get(name).cloned(),
    };
    // A model's name, its port or a process's id are known when it runs.
    let Ok(program) = expand(program, known) else { return Finding::ok(&what, program.clone()) };
    let directory = hook.directory.as_deref();
    let there = match directory.filter(|directory| !directory.is_dir()) {
        Some(directory) => Err(format!("there is no folder '{}' to run it in", directory.display())),
        None => places::runnable(&program, directory),
    };
    match there {
        Ok(()) => Finding::ok(&what, program),
        Err(problem) if hook.on_failure == OnFailure::Fail => Finding::fault(&what, problem, ADVICE),
        Err(problem) => Finding::warning(&what, problem, ADVICE),
    }
}

/// Compares the time that the hooks of an exit may take with what it leaves them.
fn time(options: &Options, turns: &Turns) -> Option<Finding> {
    let unload_max = options.drain.unload_max();
    let hooks = turns.longest_end(options) + turns.longest_shutdown();
    if hooks == Duration::ZERO {
        return None;
    }
    let (hooks_s, unload_s) = (hooks.as_secs_f64(), unload_max.as_secs_f64());
    let found = format!("those of an exit take at most {hooks_s} s; drain.unload_max_s is {unload_s}");
    let advice = "raise drain.unload_max_s, and TimeoutStopSec of the unit with it, or lower timeout_s of the hooks";
    Some(match hooks > unload_max {
        true => Finding::warning("time of hooks", format!("{found}: what is left of them is cut"), advice),
        false => Finding::ok("time of hooks", found),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::check::Level;
    use crate::options::ModelEntry;
    use hooks::HookOptions;
    use lifecycle::HookEvent;

    fn hook(on: HookEvent, command: &[&str]) -> HookOptions {
        let command = command.iter().map(|word| word.to_string()).collect();
        HookOptions { on: Some(on), command, ..HookOptions::default() }
    }

    fn with(hooks: Vec<HookOptions>) -> Options {
        let mut options = Options::default();
        options.hooks.run = hooks;
        options
    }

    #[test]
    fn a_hook_whose_program_is_missing_or_may_not_run_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("plain.txt"), "").unwrap();
        let mut options = with(vec![
            hook(HookEvent::Startup, &["sh", "-c", "true"]),
            hook(HookEvent::Startup, &["${TOOLS}/gone"]),
            hook(HookEvent::Ready, &["${TOOLS}/plain.txt"]),
            hook(HookEvent::Ready, &["${MODEL}-tool"]),
            HookOptions { directory: Some("/nowhere".into()), ..hook(HookEvent::Ready, &["sh"]) },
            HookOptions { directory: Some(folder.path().into()), ..hook(HookEvent::Ready, &["./plain.txt"]) },
        ]);
        options.hooks.macros.insert("TOOLS".into(), folder.path().display().to_string());
        let findings = look(&options);
        let levels: Vec<Level> = findings.iter().map(|finding| finding.level).collect();
        let warning = Level::Warning;
        assert_eq!(levels, [Level::Ok, Level::Fault, warning, Level::Ok, warning, warning], "{findings:?}");
        assert!(findings[1].found.contains("/gone'") && findings[2].found.contains("executable"), "{findings:?}");
        assert!(findings[4].found.contains("/nowhere") && findings[5].found.contains("executable"), "{findings:?}");
    }

    #[test]
    fn what_could_never_run_is_a_fault_with_its_key() {
        let options = with(vec![hook(HookEvent::Startup, &["sh", "${MODLE}"])]);
        let findings = look(&options);
        assert!(findings.len() == 1 && findings[0].level == Level::Fault, "{findings:?}");
        assert!(findings[0].advice.as_ref().unwrap().contains("hooks.run[0]"), "{findings:?}");
        let mut options = Options::default();
        options.hooks.folder = Some("/nowhere".into());
        assert_eq!(look(&options)[0].level, Level::Fault);
    }

    #[test]
    fn hooks_of_an_exit_that_outlast_its_time_are_a_warning() {
        let slow = |on, timeout_s| HookOptions { timeout_s: Some(timeout_s), ..hook(on, &["sh"]) };
        let mut options = with(vec![slow(HookEvent::BeforeStop, 10.0), slow(HookEvent::Shutdown, 15.0)]);
        options.default_models = vec![ModelEntry { id: "m".into(), ..ModelEntry::default() }];
        options.drain.unload_max_s = 25.0;
        assert_eq!(look(&options).last().unwrap().level, Level::Ok);
        options.drain.unload_max_s = 24.0;
        let last = look(&options).pop().unwrap();
        assert!(last.level == Level::Warning && last.found.contains("25 s"), "{last:?}");
        assert!(look(&Options::default()).is_empty());
    }
}
