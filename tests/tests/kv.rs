//! KV that outlives its model and its process: real workers, whose engine answers wrongly from wrong KV.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use fleet_tests::scene::{durable, fake, metric, ready};
use fleet_tests::{Client, Fleet, chat_body, fake_answer, free_port, programs};
use serde_json::{Value, json};

fn fleet() -> Fleet {
    Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap()
}

/// Asks, checks the answer, and returns how many tokens of the prompt came from the cache.
async fn cached(api: &str, prompt: &str) -> u64 {
    let mut body = chat_body("m", prompt, 8);
    body["stream_options"] = json!({"include_usage": true});
    let answer = Client::new(api).unwrap().stream(&body, |_| {}).await.unwrap();
    assert!(answer.whole() && answer.text == fake_answer(prompt, 8), "{answer:?}");
    answer.usage.unwrap()["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

async fn post(url: String, body: Value) {
    let answer = reqwest::Client::new().post(url).json(&body).send().await.unwrap();
    let status = answer.status();
    assert!(status.is_success(), "{status}: {}", answer.text().await.unwrap());
}

fn files(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let inside = |path: &std::path::Path| -> Vec<std::path::PathBuf> {
        std::fs::read_dir(path).map(|all| all.map(|entry| entry.unwrap().path()).collect()).unwrap_or_default()
    };
    inside(folder).iter().flat_map(|path| inside(path)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefix_is_found_again_after_a_swap_a_restart_and_a_kill() {
    let fleet = fleet();
    let folder = tempfile::tempdir().unwrap();
    let config = fake(&format!("[kv_store]\nfolder = {:?}\n", folder.path()));
    let port = free_port().unwrap();
    let prompt = "a prefix of a thousand tokens. ".repeat(33);
    let mut worker = ready(&fleet, "a", port, &config).await.unwrap();
    let api = worker.process.data_url().await.unwrap();
    assert_eq!(cached(&api, &prompt).await, 0);
    let warm = cached(&api, &prompt).await;
    assert!(warm > 900, "{warm}");
    let other = prompt.replace("thousand", "million ");
    assert!(cached(&api, &other).await < 32, "another prompt has another prefix");

    post(format!("{api}/models/unload"), json!({"model_id": "m"})).await;
    post(format!("{api}/models/load"), json!({"model_id": "m", "harness": "fake"})).await;
    assert_eq!(cached(&api, &prompt).await, warm, "after a swap");
    assert!(metric(&fleet, &worker, "neuron_kv_blocks_restored_total").await.unwrap() > 0.0);
    assert!(files(folder.path()).is_empty(), "a swap needs no disk");

    worker.process.terminate().unwrap();
    assert_eq!(worker.process.wait(Duration::from_secs(10)).unwrap().code(), Some(0));
    assert!(files(folder.path()).len() > 30, "{}", worker.process.log());
    let mut worker = ready(&fleet, "a", port, &config).await.unwrap();
    let api = worker.process.data_url().await.unwrap();
    assert_eq!(cached(&api, &prompt).await, warm, "after a restart");
    worker.process.kill().unwrap();

    // Killed in the middle of a write: what it left has no name of a block.
    let engine = files(folder.path())[0].parent().unwrap().to_path_buf();
    std::fs::write(engine.join(".part-00"), "half").unwrap();
    let mut worker = ready(&fleet, "a", port, &config).await.unwrap();
    let api = worker.process.data_url().await.unwrap();
    assert_eq!(cached(&api, &prompt).await, warm, "after a kill");
    assert!(!engine.join(".part-00").exists());
    worker.process.kill().unwrap();

    for file in files(folder.path()) {
        let mut bytes = std::fs::read(&file).unwrap();
        let last = bytes.len() - 40;
        bytes[last] ^= 1;
        std::fs::write(&file, bytes).unwrap();
    }
    let worker = ready(&fleet, "a", port, &config).await.unwrap();
    let api = worker.process.data_url().await.unwrap();
    assert_eq!(cached(&api, &prompt).await, 0, "nothing damaged is believed");
    assert_eq!(cached(&api, &prompt).await, warm);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_that_cannot_be_used_costs_a_warning_and_nothing_else() {
    let fleet = fleet();
    let folder = tempfile::tempdir().unwrap();
    let config = fake(&format!("[kv_store]\nfolder = {:?}\n", folder.path()));
    let _first = ready(&fleet, "a", free_port().unwrap(), &config).await.unwrap();
    let second = ready(&fleet, "b", free_port().unwrap(), &config).await.unwrap();
    let log = second.process.log();
    assert_eq!(log.matches("KV is kept in memory alone").count(), 1, "{log}");
    assert!(log.contains("another process uses this folder"), "{log}");
    let api = second.process.data_url().await.unwrap();
    let prompt = "hello ".repeat(50);
    assert_eq!(cached(&api, &prompt).await, 0);
    assert!(cached(&api, &prompt).await > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_that_is_slow_to_read_delays_the_data_port_and_never_the_control_port() {
    let fleet = fleet();
    let folder = tempfile::tempdir().unwrap();
    // Opening a pipe waits for whoever writes: a disk that does not answer.
    let (engine, pipe) = ("a".repeat(64), format!("{}.kv", "b".repeat(64)));
    std::fs::create_dir(folder.path().join(&engine)).unwrap();
    let pipe = folder.path().join(engine).join(pipe);
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let config = fake(&format!("[kv_store]\nfolder = {:?}\n", folder.path()));
    let worker = durable(&fleet, "a", free_port().unwrap(), &config).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let ready = reqwest::get(format!("http://{}/readyz", worker.control)).await.unwrap();
    assert_eq!(ready.status(), 503, "{}", worker.process.log());
    assert!(!worker.process.log().contains("data port open"));
    drop(std::fs::OpenOptions::new().write(true).open(&pipe).unwrap());
    fleet.until_ok(&format!("http://{}/readyz", worker.control), &worker.process).await.unwrap();
    assert!(worker.process.log().contains("stored KV was damaged"), "{}", worker.process.log());
}
