//! Rules on files: size, stubs, unsafe code, machine paths, white space, module docs.

use std::path::Path;

use anyhow::{Context, Result};

use crate::root;

/// A file past this is doing two things.
const LINES_MAX: usize = 500;
/// Written by machines.
const GENERATED: &[&str] = &["crates/control/src/generated/", "Cargo.lock", "deploy/", "tests/goldens/"];
/// Kinds of files that are text of ours.
const TEXT: &[&str] = &["rs", "toml", "md", "proto", "yml", "yaml", "sh", "py", "service", "spec", "txt"];

/// Lists the repository's files as git sees them, new ones included.
fn files() -> Result<Vec<String>> {
    let mut git = std::process::Command::new("git");
    git.current_dir(root()).args(["ls-files", "--cached", "--others", "--exclude-standard"]);
    let output = git.output().context("git")?;
    anyhow::ensure!(output.status.success(), "git ls-files failed");
    let text = String::from_utf8(output.stdout)?;
    Ok(text.lines().filter(|name| root().join(name).is_file()).map(str::to_string).collect())
}

/// Names every breach in every file.
pub(super) fn check() -> Result<Vec<String>> {
    let mut breaches = Vec::new();
    for name in files()? {
        let known = Path::new(&name).extension().and_then(|extension| extension.to_str());
        if known.is_none_or(|extension| !TEXT.contains(&extension)) && name != ".ci/run" {
            continue;
        }
        let text = std::fs::read_to_string(root().join(&name)).with_context(|| name.clone())?;
        breaches.extend(check_file(&name, &text));
    }
    Ok(breaches)
}

/// Words that must not stay; written in parts, so that this file does not break its own rule.
fn stubs() -> [String; 5] {
    let word = |a: &str, b: &str| format!("{a}{b}");
    [word("to", "do!("), word("unimpl", "emented!("), word("FIX", "ME"), word("XX", "X"), word("#[ign", "ore")]
}

/// Paths that belong to one machine.
fn machine_paths() -> [String; 3] {
    ["work", "root", "home"].map(|folder| format!("/{folder}/"))
}

fn check_file(name: &str, text: &str) -> Vec<String> {
    let mut breaches = Vec::new();
    let generated = GENERATED.iter().any(|prefix| name.starts_with(prefix));
    let rust = name.ends_with(".rs") && !generated;
    let lines = text.lines().count();
    if rust && lines > LINES_MAX {
        breaches.push(format!("{name} has {lines} lines, more than {LINES_MAX}: what second thing does it do?"));
    }
    if rust && !text.starts_with("//!") && !text.starts_with("#![") {
        breaches.push(format!("{name} does not start with a line that says what it is"));
    }
    let (stubs, paths) = (stubs(), machine_paths());
    let unsafe_word = format!("{} {{", "unsafe");
    for (number, line) in text.lines().enumerate() {
        let at = format!("{name}:{}", number + 1);
        if line.ends_with([' ', '\t']) && !name.ends_with(".md") && !generated {
            breaches.push(format!("{at} ends with white space"));
        }
        if rust && line.contains('\t') {
            breaches.push(format!("{at} has a tab"));
        }
        if rust && stubs.iter().any(|stub| line.contains(stub.as_str())) {
            breaches.push(format!("{at} has a stub or a note to come back"));
        }
        if rust && line.contains(&unsafe_word) && !name.starts_with("crates/kernels/") {
            breaches.push(format!("{at} is unsafe; only crates/kernels may be"));
        }
        if !generated && paths.iter().any(|path| line.contains(path.as_str())) {
            breaches.push(format!("{at} names a path of one machine"));
        }
    }
    breaches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_bites() {
        let breaches = |text: &str| check_file("crates/x/src/lib.rs", text).len();
        assert_eq!(breaches("//! Fine.\nfn f() {}\n"), 0);
        assert_eq!(breaches("fn f() {}\n"), 1);
        assert_eq!(breaches("//! x \n"), 1);
        assert_eq!(breaches(&format!("//! x\n{}x\n", stubs()[0])), 1);
        assert_eq!(breaches(&format!("//! x\n// {}y\n", machine_paths()[0])), 1);
        assert_eq!(breaches(&format!("//! x\n{}", "// y\n".repeat(LINES_MAX))), 1);
    }

    #[test]
    fn generated_files_may_be_long() {
        assert!(check_file("crates/control/src/generated/a.rs", &"x\n".repeat(900)).is_empty());
    }
}
