//! Hooks in real workers: their order over a life, what their failures stop, and how long they can hold an exit.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use fleet_tests::scene::{fake, ready};
use fleet_tests::{Fleet, free_port, programs};

fn fleet() -> Fleet {
    Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap()
}

/// A hook in a configuration, whose script is `sh -c`.
fn hook(event: &str, script: &str, more: &str) -> String {
    format!("[[hooks.run]]\non = \"{event}\"\ncommand = [\"sh\", \"-c\", '''{script}''']\n{more}\n")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hooks_run_at_every_turn_of_a_life_in_order() {
    let fleet = fleet();
    let folder = tempfile::tempdir().unwrap();
    let diary = folder.path().join("diary");
    let write = |what: &str| format!("echo {what} $NEURON_MODEL >> {}", diary.display());
    let mut config = fake("");
    for event in ["startup", "before_load", "after_healthy", "ready", "before_stop", "after_unload", "shutdown"] {
        config += &hook(event, &write(event), "");
    }
    config += &hook("shutdown", &write("the-last-is-the-first"), "");
    let mut worker = fleet.neuron("a", &config).await.unwrap();
    worker.process.terminate().unwrap();
    assert_eq!(worker.process.wait(Duration::from_secs(10)).unwrap().code(), Some(0));
    let diary = std::fs::read_to_string(&diary).unwrap();
    let lines: Vec<&str> = diary.lines().map(str::trim).collect();
    let wanted = [
        "startup",
        "before_load m",
        "after_healthy m",
        "ready m",
        "before_stop m",
        "after_unload m",
        "the-last-is-the-first",
        "shutdown",
    ];
    assert_eq!(lines, wanted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_hook_of_the_start_stops_it_and_what_was_set_up_is_torn_down() {
    let fleet = fleet();
    let folder = tempfile::tempdir().unwrap();
    let marker = folder.path().join("down");
    let config = fake("")
        + &hook("startup", "echo no GPU today; exit 4", "")
        + &hook("shutdown", &format!("touch {marker:?}"), "");
    let mut worker = fleet.starting_neuron("a", &config).unwrap();
    let ended = worker.process.wait(Duration::from_secs(10)).unwrap();
    assert_eq!(ended.code(), Some(1), "{}", worker.process.log());
    let log = worker.process.log();
    assert!(log.contains("'sh' of startup failed: sh ended with exit status: 4"), "{log}");
    assert!(!log.contains("data port open") && marker.exists(), "{log}");

    let config = fake("") + &hook("startup", "true", "timeout_s = 0\n");
    let mut worker = fleet.starting_neuron("b", &config).unwrap();
    assert_eq!(worker.process.wait(Duration::from_secs(10)).unwrap().code(), Some(78));
    assert!(worker.process.log().contains("hooks.run[0].timeout_s"), "{}", worker.process.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_is_ready_after_its_hooks_and_fails_with_those_that_must_succeed() {
    let fleet = fleet();
    let folder = tempfile::tempdir().unwrap();
    let go = folder.path().join("go");
    let wait = format!("until [ -e {go:?} ]; do sleep 0.05; done");
    let refuses = hook("after_healthy", "exit 1", "models = ['never']\non_failure = 'fail'\n");
    let config = fake("") + "[[default_models]]\nid = 'never'\nharness = 'fake'\n" + &refuses;
    let config = config + &hook("after_healthy", &wait, "models = ['m']\n");
    let worker = fleet.starting_neuron("a", &config).unwrap();
    let gateway = fleet.gateway(&[&worker.control], "").await.unwrap();
    let state = |node: &serde_json::Value, id: &str| {
        let models = node["status"]["models"].as_array().cloned().unwrap_or_default();
        models.into_iter().find(|model| model["id"] == id).map(|model| model["state"].clone())
    };
    let warming = |node: &serde_json::Value| state(node, "m") == Some("warming".into());
    fleet.until_status(&gateway, "a", warming).await.unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(warming(&fleet.status(&gateway, "a").await.unwrap()), "it is not ready before its hook has ended");
    std::fs::write(&go, "").unwrap();
    let seen = fleet.until_status(&gateway, "a", |node| state(node, "never") == Some("failed".into())).await.unwrap();
    assert_eq!(state(&seen, "m"), Some("ready".into()));
    assert!(seen.to_string().contains("'sh' of after_healthy failed"), "{seen}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hook_that_hangs_holds_an_exit_no_longer_than_its_time() {
    let fleet = fleet();
    let config = fake("") + &hook("before_stop", "trap '' TERM; sleep 60", "timeout_s = 0.5\n");
    let config =
        config + &hook("shutdown", "trap '' TERM; sleep 60", "timeout_s = 60\n") + "[drain]\nunload_max_s = 1.5\n";
    let mut worker = fleet.neuron("a", &config).await.unwrap();
    let begun = Instant::now();
    worker.process.terminate().unwrap();
    assert_eq!(worker.process.wait(Duration::from_secs(20)).unwrap().code(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    let log = worker.process.log();
    assert!(log.contains("took longer than 0.5 s and was killed"), "{log}");
    assert!(log.contains("the hooks of the shutdown took too long"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_that_outlasts_the_unload_leaves_the_hooks_of_the_shutdown_their_time() {
    let fleet = fleet();
    let marker = fleet.folder().join("down");
    let config = fake("[upgrade.long]\nargv = [\"sleep\", \"1\"]\n") + "[drain]\nunload_max_s = 0.5\n";
    let config = config + &hook("shutdown", &format!("sleep 0.3; touch {marker:?}"), "");
    let mut worker = ready(&fleet, "a", free_port().unwrap(), &config).await.unwrap();
    let gateway = fleet.gateway(&[&worker.control], "").await.unwrap();
    let answer = reqwest::Client::new().post(format!("{}/api/nodes/a/restart", gateway.admin));
    let answer = answer.json(&serde_json::json!({"upgrade": "long"})).send().await.unwrap();
    assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
    assert_eq!(worker.process.wait(Duration::from_secs(20)).unwrap().code(), Some(0));
    assert!(marker.exists(), "{}", worker.process.log());
}

#[test]
fn the_shipped_example_has_a_hook_of_every_event_and_each_is_well_formed() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/neuron.hooks.toml");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_test-neuron"));
    let output = command.args(["hooks", "list", "--config", example]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let events: Vec<&str> = text.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let all = ["startup", "before_load", "after_healthy", "ready", "stop_generation", "before_stop", "after_unload"];
    assert_eq!(events, [&all[..], &["shutdown"]].concat(), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hooks_can_be_listed_and_tried_without_a_worker() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("n.toml");
    let config =
        hook("ready", "echo said of ${MODEL}; exit 1", "name = \"pager\"\ndescription = \"tells the pager\"\n");
    std::fs::write(&file, config).unwrap();
    let neuron = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_test-neuron"));
        let output = command.arg("hooks").args(arguments).arg("--config").arg(&file).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.code(), text)
    };
    let (code, text) = neuron(&["list"]);
    assert!(code == Some(0) && text.contains("pager (warn, 30 s, config hooks.run[0]): tells the pager"), "{text}");
    let (code, text) = neuron(&["test", "ready", "org/m"]);
    assert!(code == Some(1) && text.contains("pager: said of org/m"), "{text}");
    assert!(text.contains("ready 'pager': sh ended with exit status: 1"), "{text}");
    let (code, text) = neuron(&["test", "shutdown"]);
    assert!(code == Some(0) && text.contains("no hook runs at shutdown"), "{text}");
    let (code, text) = neuron(&["test", "lunch"]);
    assert!(code == Some(78) && text.contains("there is no event 'lunch'"), "{text}");
}
