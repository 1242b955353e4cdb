//! `neuron check`, and the pages that packages bring, by the real programs.
#![allow(clippy::unwrap_used)]

use std::net::TcpListener;
use std::process::Command;

use serde_json::Value;
use service::exit;

const NEURON: &str = env!("CARGO_BIN_EXE_test-neuron");
const CORTEX: &str = env!("CARGO_BIN_EXE_test-cortex");

fn check(arguments: &[&str]) -> (i32, String) {
    let output = Command::new(NEURON).arg("check").args(arguments).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn what_would_stop_the_start_is_named_with_its_advice_and_fails_the_check() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let data = format!("data.bind={}", taken.local_addr().unwrap());
    let rest = ["--set", "control.bind=127.0.0.1:0", "--json"];
    let (code, text) = check(&[&["--set", data.as_str()], &rest[..]].concat());
    assert_eq!(code, i32::from(exit::CONFIG), "{text}");
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["ok"], false);
    let faults = report["findings"].as_array().unwrap().iter().filter(|finding| finding["level"] == "fault");
    let faults: Vec<_> = faults.map(|fault| (&fault["what"], fault["advice"].is_string())).collect();
    assert_eq!(faults, [(&Value::from("data port"), true)], "{text}");

    drop(taken);
    let (code, text) = check(&[&["--set", "data.bind=127.0.0.1:0"], &rest[..2]].concat());
    assert!(code == 0 && text.ends_with("nothing stops the start\n"), "{text}");
}

#[test]
fn models_that_cannot_fit_the_budget_fail_the_check_with_the_figures() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("neuron.toml");
    let config = |budget: usize| {
        let ports = "[data]\nbind = \"127.0.0.1:0\"\n[control]\nbind = \"127.0.0.1:0\"\n";
        let model = "[[models]]\nid = \"m\"\nharness = \"fake\"\nmemory_mib = 300\n";
        std::fs::write(&file, format!("{ports}[memory]\nbudget_mib = {budget}\n{model}")).unwrap();
        check(&["--config", file.to_str().unwrap()])
    };
    let (code, text) = config(200);
    assert!(code == i32::from(exit::CONFIG), "{text}");
    assert!(text.contains("models may take 200 MiB; 'm' needs 300 MiB"), "{text}");
    let (code, text) = config(400);
    assert!(code == 0 && text.contains("models may take 400 MiB"), "{text}");
}

#[test]
fn each_command_of_both_programs_has_its_manual_page_and_the_shells_know_them() {
    for (program, path, page) in [("neuron", NEURON, "neuron-check.1"), ("cortex", CORTEX, "cortex-rollout-restart.1")]
    {
        let folder = tempfile::tempdir().unwrap();
        assert!(Command::new(path).arg("pages").arg(folder.path()).status().unwrap().success());
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        let manual = read(&format!("man1/{program}.1"));
        assert!(manual.contains("Exit codes") && manual.contains(".TH"), "{manual}");
        assert!(read(&format!("man1/{page}")).contains(".SH NAME"));
        assert!(!folder.path().join(format!("man1/{program}-pages.1")).exists(), "what is hidden has no page");
        assert!(read(&format!("bash/{program}.bash")).contains("serve"));
        assert!(read(&format!("zsh/_{program}")).starts_with("#compdef"));
        assert!(read(&format!("fish/{program}.fish")).contains("serve"));
    }
}
