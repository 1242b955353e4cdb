//! The hooks folder: executables whose names say when they run.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use lifecycle::{HookEvent, OnFailure};
use serde::Deserialize;

use crate::Source;
use crate::options::{Act, HOOKS_MAX, Hook, HookConfigError, check_text, limits, wrong};

/// Bytes in which a description is looked for, and most of a file with settings.
const HEAD_BYTES: u64 = 16 << 10;
/// Lines in which it is.
const HEAD_LINES: usize = 10;
/// Entries of the folder that are looked at.
const ENTRIES_MAX: usize = 4 * HOOKS_MAX;

/// What a file beside a hook may say of it.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Beside {
    description: Option<String>,
    models: Vec<String>,
    timeout_s: Option<f64>,
    on_failure: Option<OnFailure>,
    env: BTreeMap<String, String>,
}

/// Finds the event in a file's name: digits and '-' may stand before it, and '-', '_' or '.' with anything after it.
fn event_of(name: &str) -> Option<HookEvent> {
    let digits = name.bytes().take_while(u8::is_ascii_digit).count();
    let bare = if digits > 0 { name[digits..].strip_prefix(['-', '_'])? } else { name };
    HookEvent::ALL.into_iter().find(|event| {
        let rest = bare.strip_prefix(event.name());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '_', '.']))
    })
}

fn head(path: &Path) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(HEAD_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn description(head: &str) -> Option<String> {
    let lines = head.lines().take(HEAD_LINES);
    let marked = lines
        .filter_map(|line| line.trim_start().trim_start_matches(['#', '/']).trim_start().strip_prefix("description:"));
    marked.map(|text| text.trim().to_string()).find(|text| !text.is_empty())
}

/// Reads the folder. A name that says no event is an error: a hook with a slip in its name would never run.
///
/// # Errors
/// [`HookConfigError`] with the file.
pub(crate) fn read(folder: &Path, macros: &BTreeMap<String, String>) -> Result<Vec<Hook>, HookConfigError> {
    let place = folder.display().to_string();
    let unreadable = |error: std::io::Error| HookConfigError { place: place.clone(), problem: error.to_string() };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        if names.len() == ENTRIES_MAX {
            return wrong(&place, format!("has more than {ENTRIES_MAX} entries"));
        }
        names.push(entry.map_err(unreadable)?.file_name());
    }
    names.sort();
    let mut hooks = Vec::new();
    for name in &names {
        let path = folder.join(name);
        let place = path.display().to_string();
        let Some(name) = name.to_str() else { return wrong(&place, "its name is not UTF-8") };
        // What editors and package managers leave behind is no hook either.
        let left_behind = name.ends_with('~') || name.ends_with(".rpmnew") || name.ends_with(".rpmsave");
        if name.starts_with(['_', '.']) || left_behind || path.is_dir() {
            continue;
        }
        if let Some(hook) = name.strip_suffix(".toml") {
            if names.iter().any(|other| other.to_str() == Some(hook)) {
                continue;
            }
            return wrong(&place, format!("there is no hook '{hook}' beside it"));
        }
        let Some(event) = event_of(name) else {
            let events: Vec<&str> = HookEvent::ALL.iter().map(|event| event.name()).collect();
            let events = events.join(", ");
            return wrong(&place, format!("its name says no event: one of {events}; begin it with '_' to keep it out"));
        };
        let beside = folder.join(format!("{name}.toml"));
        let settings = match std::fs::metadata(&beside) {
            Ok(_) => {
                let text = head(&beside).map_err(unreadable)?;
                toml::from_str::<Beside>(&text).map_err(|error| HookConfigError {
                    place: beside.display().to_string(),
                    problem: error.to_string(),
                })?
            }
            Err(_) => Beside::default(),
        };
        let (timeout, policy) = limits(&place, event, settings.timeout_s, settings.on_failure, &settings.models)?;
        settings.env.values().try_for_each(|value| check_text(&place, value, event, macros))?;
        let found = settings.description.or_else(|| description(&head(&path).ok()?));
        hooks.push(Hook {
            name: name.to_string(),
            description: found.unwrap_or_default(),
            event,
            models: settings.models,
            act: Act::Command { argv: vec![place], env: settings.env, directory: None },
            timeout,
            policy,
            source: Source::Folder(path),
        });
    }
    Ok(hooks)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_name_says_its_event() {
        let event = |name| event_of(name).map(HookEvent::name);
        assert_eq!(event("startup"), Some("startup"));
        assert_eq!(event("10-before_stop.sh"), Some("before_stop"));
        assert_eq!(event("02_after_healthy-slots.py"), Some("after_healthy"));
        assert_eq!(event("ready_tell"), Some("ready"));
        for none in ["readyness", "before-stop", "10", "x-startup", "10startup"] {
            assert_eq!(event(none), None, "{none}");
        }
    }

    #[test]
    fn the_folder_gives_its_hooks_in_the_order_of_their_names_with_what_is_said_of_them() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("20-ready.sh", "#!/bin/sh\n# description: tells the pager\n");
        write("10-ready.py", "#!/usr/bin/env python3\n");
        write("10-ready.py.toml", "description = 'first'\nmodels = ['org/*']\ntimeout_s = 2\non_failure = 'ignore'");
        write("_ready.sh", "");
        write(".hidden", "");
        write("ready.sh~", "");
        let hooks = read(folder.path(), &BTreeMap::new()).unwrap();
        let said: Vec<_> = hooks.iter().map(|hook| (hook.name.as_str(), hook.description.as_str())).collect();
        assert_eq!(said, [("10-ready.py", "first"), ("20-ready.sh", "tells the pager")]);
        assert_eq!((hooks[0].policy, hooks[0].timeout.as_secs()), (OnFailure::Ignore, 2));
        assert!(hooks[0].is_for(Some("org/m")) && !hooks[0].is_for(Some("m")));

        write("redy.sh", "");
        assert!(read(folder.path(), &BTreeMap::new()).unwrap_err().problem.contains("says no event"));
        std::fs::remove_file(folder.path().join("redy.sh")).unwrap();
        write("shutdown.toml", "");
        assert!(read(folder.path(), &BTreeMap::new()).unwrap_err().problem.contains("no hook 'shutdown'"));
        std::fs::remove_file(folder.path().join("shutdown.toml")).unwrap();
        write("20-ready.sh.toml", "on_failure = 'fail'");
        assert!(read(folder.path(), &BTreeMap::new()).unwrap_err().place.ends_with("on_failure"));
    }
}
