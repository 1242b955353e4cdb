//! Generated files: what the programs say of their own configuration, and the gRPC code.

use anyhow::{Context, Result, bail, ensure};

use crate::{cargo, root, run};

const PROGRAMS: [&str; 2] = ["cortex", "neuron"];
const DOCUMENTS: [(&str, &str); 3] =
    [("example", "example.toml"), ("schema", "schema.json"), ("reference", "reference.md")];

/// Writes the files, or fails where one is stale.
pub(crate) fn run_all(check: bool) -> Result<()> {
    let mut stale = Vec::new();
    for program in PROGRAMS {
        for (document, suffix) in DOCUMENTS {
            let output = cargo().args(["run", "--quiet", "-p", program, "--", "config", document]).output()?;
            ensure!(
                output.status.success(),
                "{program} config {document}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            let path = root().join("deploy").join(format!("{program}.{suffix}"));
            let before = std::fs::read(&path).unwrap_or_default();
            if before == output.stdout {
                continue;
            }
            if check {
                stale.push(format!("deploy/{program}.{suffix}"));
            } else {
                std::fs::write(&path, &output.stdout).with_context(|| path.display().to_string())?;
            }
        }
    }
    if !stale.is_empty() {
        bail!("stale: {}; run cargo xtask gen", stale.join(", "));
    }
    Ok(())
}

/// Runs the chore; the gRPC code is written by its crate's own test.
pub(crate) fn run_chore(check: bool) -> Result<()> {
    run_all(check)?;
    let mut test = cargo();
    test.args(["test", "--quiet", "-p", "control", "--test", "generated"]);
    if !check {
        test.env("UPDATE", "1");
    }
    run(&mut test)
}
