//! Generated files: what the programs say of their own configuration, and the gRPC code.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::{build_programs, cargo, root, run};

const PROGRAMS: [&str; 2] = ["cortex", "neuron"];
const DOCUMENTS: [(&str, &str); 3] =
    [("example", "example.toml"), ("schema", "schema.json"), ("reference", "reference.md")];

const METRICS_HEAD: &str = "# Metrics\n\nGenerated from the programs' own registries; don't edit.\n";

/// Returns what a program prints.
fn said(programs: &Path, program: &str, arguments: &[&str]) -> Result<Vec<u8>> {
    let output = Command::new(programs.join(program)).args(arguments).output()?;
    ensure!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

/// Writes the files, or fails where one is stale.
pub(crate) fn run_all(check: bool) -> Result<()> {
    let programs = build_programs()?;
    let said = |program: &str, arguments: &[&str]| said(&programs, program, arguments);
    let mut files = Vec::new();
    let mut metrics = METRICS_HEAD.as_bytes().to_vec();
    for program in PROGRAMS {
        for (document, suffix) in DOCUMENTS {
            files.push((format!("{program}.{suffix}"), said(program, &["config", document])?));
        }
        metrics.extend_from_slice(format!("\n## {program}\n\n").as_bytes());
        metrics.extend(said(program, &["metrics"])?);
    }
    files.push(("METRICS.md".to_string(), metrics));
    let mut stale = Vec::new();
    for (name, text) in files {
        let path = root().join("deploy").join(&name);
        if std::fs::read(&path).unwrap_or_default() == text {
            continue;
        }
        if check {
            stale.push(format!("deploy/{name}"));
        } else {
            std::fs::write(&path, &text).with_context(|| path.display().to_string())?;
        }
    }
    if !stale.is_empty() {
        bail!("stale: {}; run cargo xtask gen", stale.join(", "));
    }
    Ok(())
}

/// Runs the chore; the gRPC code is written by a test of this crate.
pub(crate) fn run_chore(check: bool) -> Result<()> {
    run_all(check)?;
    let mut test = cargo();
    test.args(["test", "--quiet", "-p", "xtask", "--test", "proto"]);
    if !check {
        test.env("UPDATE", "1");
    }
    run(&mut test)
}
