//! One build of the libraries: the programs alone must want the features that the whole workspace wants, or every
//! command builds them anew.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

use crate::cargo;

/// Features of each package that the arguments select, by name and version.
type Features = BTreeMap<String, Vec<String>>;

fn features(arguments: &[&str]) -> Result<Features> {
    let tree = ["tree", "--locked", "--prefix", "none", "--format", "{p} | {f}"];
    let output = cargo().args(tree).args(arguments).output()?;
    ensure!(output.status.success(), "cargo tree: {}", String::from_utf8_lossy(&output.stderr));
    Ok(parse(&String::from_utf8_lossy(&output.stdout)))
}

/// Reads what cargo prints. A package of this workspace has its path behind its version, and is left out: their own
/// features are what their builds differ in. A library that is built for the host alone comes twice; both count.
fn parse(tree: &str) -> Features {
    let mut all = Features::new();
    for line in tree.lines() {
        let line = line.trim_end_matches(" (*)");
        let Some((package, features)) = line.split_once(" | ") else { continue };
        if package.ends_with(')') && !package.ends_with("(proc-macro)") {
            continue;
        }
        let builds = all.entry(package.to_string()).or_default();
        if !builds.iter().any(|known| known == features) {
            builds.push(features.to_string());
        }
    }
    all
}

fn compare(programs: &Features, workspace: &Features) -> Vec<String> {
    let lacking = programs.iter().filter_map(|(package, builds)| {
        let known = workspace.get(package)?;
        let other = builds.iter().find(|build| !known.contains(build))?;
        Some(format!(
            "'{package}' is built with the features '{other}' for the programs and '{}' for tests: add what is lacking to \
             crates/neuron/Cargo.toml, or every fresh clone builds it twice, with all that stands on it",
            known.join("' or '")
        ))
    });
    lacking.collect()
}

/// Names every library that the programs and the tests would build apart.
pub(super) fn check() -> Result<Vec<String>> {
    let programs = features(&["-p", "cortex", "-p", "neuron", "-e", "normal,build"])?;
    let workspace = features(&["--workspace", "-e", "normal,build,dev"])?;
    Ok(compare(&programs, &workspace))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_with_other_features_for_the_programs_is_a_breach() {
        let programs = parse("neuron v0.1.0 (/x/neuron) | fake\ntokio v1.5.0 | net,rt\nbytes v1.0.0 | std\n");
        let workspace =
            parse("neuron v0.1.0 (/x/neuron) | \ntokio v1.5.0 | net,rt,test-util\nbytes v1.0.0 | std (*)\n");
        let breaches = compare(&programs, &workspace);
        assert_eq!(breaches.len(), 1, "{breaches:?}");
        assert!(breaches[0].contains("tokio v1.5.0"), "{breaches:?}");
        assert_eq!(compare(&workspace, &workspace), Vec::<String>::new());
    }

    #[test]
    fn a_library_may_be_built_apart_for_the_host() {
        let programs = parse("syn v2.0.0 | full\nderive v1.0.0 (proc-macro) | \n");
        let workspace = parse("syn v2.0.0 | derive\nsyn v2.0.0 | full\nderive v1.0.0 (proc-macro) | \n");
        assert_eq!(compare(&programs, &workspace), Vec::<String>::new());
    }
}
