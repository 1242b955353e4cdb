//! Logs of models, read and followed through a gateway, while hooks write them.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use fleet_tests::scene::fake;
use fleet_tests::{Client, Fleet, programs};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};

fn fleet() -> Fleet {
    Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_models_log_is_followed_live_over_its_loads() {
    let fleet = fleet();
    let hook = "[[hooks.run]]\non = 'before_load'\nname = 'mount'\ncommand = ['sh', '-c', 'echo mounting for $NEURON_MODEL; \
                echo second line >&2']\n[[hooks.run]]\non = 'startup'\ncommand = ['echo', 'good morning']\n";
    let a = fleet.neuron("a", &fake(hook)).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let at = ["--admin", &gateway.admin];
    let logs = async |arguments: &[&str]| fleet.cortex(&[&["logs"], arguments, &at].concat()).await.unwrap();
    let (code, text) = logs(&["m"]).await;
    assert!(code == Some(0) && text.contains("a mount: mounting for m\n") && text.contains("a mount: second line\n"));
    assert!(text.contains("a neuron: warming -> ready\n"), "{text}");
    let (_, last) = logs(&["m", "-n", "1"]).await;
    assert_eq!(last.lines().count(), 1, "{last}");
    let (_, timed) = logs(&["m", "-n", "1", "--times"]).await;
    assert!(timed.starts_with("20") && timed.trim_end().ends_with(last.trim_end()), "{timed}");
    let (code, text) = logs(&["--node", "a"]).await;
    assert!(code == Some(0) && text.contains("good morning"), "{text}");
    let (code, text) = logs(&["nobody/here", "--node", "a"]).await;
    assert!(code == Some(1) && text.contains("has no log on this worker; it has m"), "{text}");
    let (code, text) = logs(&["nobody/here"]).await;
    assert!(code == Some(1) && text.contains("has the model 'nobody/here'"), "{text}");

    let mut following = fleet.starting_cortex(&[&["logs", "m", "-f", "-n", "0"][..], &at].concat()).unwrap();
    let mut lines = BufReader::new(following.stdout.take().unwrap()).lines();
    let status = fleet.status(&gateway, "a").await.unwrap();
    let worker = Client::new(&format!("http://{}", status["status"]["data_address"].as_str().unwrap())).unwrap();
    // Its first line can only come once it listens.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (status, _) = worker.at("/models/unload").json(&json!({"model_id": "m"})).await.unwrap();
    assert_eq!(status, 200);
    let (status, _) = worker.at("/models/load").json(&json!({"model_id": "m"})).await.unwrap();
    assert_eq!(status, 200);
    let mut seen = Vec::new();
    while !seen.iter().any(|line: &String| line.contains("warming -> ready")) {
        let line = tokio::time::timeout(Duration::from_secs(10), lines.next_line()).await.unwrap().unwrap().unwrap();
        seen.push(line);
    }
    assert!(seen[0].contains("a neuron: ready -> draining"), "{seen:?}");
    assert!(seen.iter().any(|line| line == "a mount: mounting for m"), "{seen:?}");
}
