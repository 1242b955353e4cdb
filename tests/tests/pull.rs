//! Models by reference: real workers, and a hub that the test starts.
#![allow(clippy::unwrap_used)]

#[path = "../../crates/hub/tests/support/mod.rs"]
mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fleet_tests::{Fleet, Gateway, Neuron, free_port, programs};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::{Ask, COMMIT, TestHub, Trick};

const SIZE: usize = 3 << 20;

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A hub with one model that only the fake engine could take.
async fn hub() -> TestHub {
    let hub = TestHub::start().await;
    for (name, byte) in [("m-Q8_0.gguf", 1), ("m-F16.gguf", 2), ("m-Q2_K-00001-of-00002.gguf", 3)] {
        let bytes = vec![byte; SIZE];
        let etag = sha256(&bytes);
        hub.add(name, bytes, &etag, true);
    }
    hub.add("m-Q2_K-00002-of-00002.gguf", vec![4; 10], &sha256(&[4; 10]), true);
    hub
}

/// A folder of caches and of workers' programs with an environment.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Bench { folder: tempfile::tempdir().unwrap() }
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    fn blobs(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.cache().join("models--org--repo/blobs")).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn snapshot(&self, name: &str) -> PathBuf {
        self.cache().join("models--org--repo/snapshots").join(COMMIT).join(name)
    }

    /// Returns a worker's program that sees these variables.
    fn neuron(&self, variables: &[(&str, &str)]) -> PathBuf {
        let path = self.folder.path().join(format!("neuron-{:016x}", rand::random::<u64>()));
        let exports: String = variables.iter().map(|(name, value)| format!("export {name}='{value}'\n")).collect();
        let clean = "unset HF_HOME HF_HUB_CACHE HF_TOKEN HF_TOKEN_PATH HF_ENDPOINT HF_HUB_OFFLINE\n";
        let real = env!("CARGO_BIN_EXE_test-neuron");
        std::fs::write(&path, format!("#!/bin/sh\n{clean}{exports}exec '{real}' \"$@\"\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn fleet(&self, variables: &[(&str, &str)]) -> Fleet {
        let neuron = self.neuron(variables);
        Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), neuron.to_str().unwrap())).unwrap()
    }

    /// The end of a worker's configuration.
    fn config(&self, model: &str) -> String {
        format!("{model}[harness.candle]\nhf_cache = {:?}\n", self.cache())
    }
}

async fn post(url: String, body: Value) -> (u16, Value) {
    let response = reqwest::Client::new().post(url).json(&body).send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

async fn data(fleet: &Fleet, gateway: &Gateway) -> String {
    let status = fleet.until_status(gateway, "a", |node| node["status"]["data_address"] != "").await.unwrap();
    format!("http://{}", status["status"]["data_address"].as_str().unwrap())
}

async fn bytes(fleet: &Fleet, neuron: &Neuron) -> f64 {
    let base = format!("http://{}", neuron.control);
    fleet.metric(&base, "neuron_download_bytes_total", &[]).await.unwrap()
}

fn run(program: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = std::process::Command::new(program).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout).trim().to_string(), text(output.stderr))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_fetches_its_model_once_and_serves_it_offline_ever_after() {
    let (hub, bench) = (hub().await, Bench::new());
    let model = "[[default_models]]\nid = \"m\"\nharness = \"fake\"\npath = \"org/repo:q8_0\"\nrequired = true\n";
    let mut tricks = vec![Trick::Cut(1 << 20), Trick::Status(500, "")].into_iter();
    hub.plan(move |ask: &Ask| if ask.is_download() { tricks.next() } else { None });
    let fleet = bench.fleet(&[("HF_ENDPOINT", &hub.url), ("HF_TOKEN", "hf_secret")]);
    let mut a = fleet.neuron("a", &bench.config(model)).await.unwrap();
    assert_eq!(bytes(&fleet, &a).await, SIZE as f64, "no byte came twice");
    assert_eq!(std::fs::read(bench.snapshot("m-Q8_0.gguf")).unwrap(), vec![1; SIZE]);
    assert!(a.process.log().contains("fetching") && a.process.log().contains("files are here"), "{}", a.process.log());
    assert!(!a.process.log().contains("hf_secret"));
    assert!(hub.asks().iter().all(|ask| ask.token.as_deref() == (!ask.elsewhere).then_some("Bearer hf_secret")));
    a.process.kill().unwrap();
    let asked = hub.asks().len();
    for variables in
        [&[("HF_ENDPOINT", hub.url.as_str()), ("HF_HUB_OFFLINE", "1")][..], &[("HF_ENDPOINT", "http://127.0.0.1:1")]]
    {
        let mut b = bench.fleet(variables).neuron("a", &bench.config(model)).await.unwrap();
        assert_eq!(bytes(&fleet, &b).await, 0.0);
        b.process.kill().unwrap();
    }
    assert_eq!(hub.asks().len(), asked);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_that_is_unloaded_while_it_is_fetched_stops_and_goes_on_later() {
    let (hub, bench) = (hub().await, Bench::new());
    hub.tricks([Trick::Stall(1 << 20)]);
    let fleet = bench.fleet(&[("HF_ENDPOINT", &hub.url)]);
    let a = fleet.neuron("a", &bench.config("")).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let data = data(&fleet, &gateway).await;
    let body = json!({"model_id": "m", "harness": "fake", "path": "org/repo", "quant": "Q8_0"});
    let load = tokio::spawn(post(format!("{data}/models/load"), body.clone()));
    let fetched = |node: &Value| {
        let model = &node["status"]["models"][0];
        model["state"] == "fetching" && model["progress_permille"].as_u64() == Some(333)
    };
    fleet.until_status(&gateway, "a", fetched).await.unwrap();
    let (code, answer) = post(format!("{data}/models/unload"), json!({"model_id": "m"})).await;
    assert_eq!(code, 200, "{answer}");
    let (code, answer) = tokio::time::timeout(Duration::from_secs(10), load).await.unwrap().unwrap();
    assert_eq!((code, &answer["error"]["code"]), (409, &json!("conflict")), "{answer}");
    assert!(bench.blobs().iter().all(|name| name.ends_with(".incomplete")) && bench.blobs().len() == 1);
    let (code, answer) = post(format!("{data}/models/load"), body).await;
    assert_eq!((code, &answer["state"]), (200, &json!("ready")), "{answer}");
    assert_eq!(bytes(&fleet, &a).await, SIZE as f64, "it went on where it was");
    for (path, code, words) in [
        ("org/repo:Q9", "invalid_model_file", "m-F16.gguf"),
        ("org/repo:Q2_K", "invalid_model_file", "split into 2 files"),
        ("hf://repo", "invalid_request", "no 'org/repo"),
    ] {
        let (status, answer) =
            post(format!("{data}/models/load"), json!({"model_id": "x", "harness": "fake", "path": path})).await;
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert!(status == 400 && answer["error"]["code"] == code && message.contains(words), "{path}: {answer}");
    }
    hub.plan(|_| Some(Trick::Status(401, "")));
    let body = json!({"model_id": "y", "harness": "fake", "path": "org/repo:F16"});
    let (status, answer) = post(format!("{data}/models/load"), body).await;
    let message = answer["error"]["message"].as_str().unwrap_or_default();
    assert!(status == 400 && message.contains("HF_TOKEN") && message.contains("/org/repo"), "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators_pull_before_they_load() {
    let (hub, bench) = (hub().await, Bench::new());
    let fleet = bench.fleet(&[("HF_ENDPOINT", &hub.url)]);
    let entry = "[[default_models]]\nid = \"local\"\nharness = \"fake\"\npath = \"/nowhere.gguf\"\n";
    let a = fleet.neuron_on("a", free_port().unwrap(), &bench.config(entry)).unwrap();
    fleet.until_ok(&format!("http://{}/readyz", a.control), &a.process).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    data(&fleet, &gateway).await;
    let pull = |model: &'static str, node: &'static str| {
        let (fleet, admin) = (&fleet, &gateway.admin);
        async move { fleet.cortex(&["pull", model, "--node", node, "--admin", admin]).await.unwrap() }
    };
    let (code, text) = pull("org/repo:F16", "a").await;
    let path = bench.snapshot("m-F16.gguf");
    assert!(code == Some(0) && text.contains(path.to_str().unwrap()), "{text}");
    assert_eq!(std::fs::metadata(&path).unwrap().len(), SIZE as u64);
    for (model, node, words) in [
        ("org/repo:Q9", "a", "m-Q8_0.gguf"),
        ("local", "a", "/nowhere.gguf"),
        ("x", "a", "org/repo"),
        ("org/repo", "b", "no worker 'b'"),
    ] {
        let (code, text) = pull(model, node).await;
        assert!(code == Some(1) && text.contains(words), "{model}: {text}");
    }
    // The worker's own command line: another quant, in parts, to the same cache.
    let neuron = bench.neuron(&[("HF_ENDPOINT", &hub.url), ("HF_HUB_CACHE", bench.cache().to_str().unwrap())]);
    let (code, out, err) = run(&neuron, &["pull", "org/repo:Q2_K"]);
    assert_eq!(
        (code, out.as_str()),
        (Some(0), bench.snapshot("m-Q2_K-00001-of-00002.gguf").to_str().unwrap()),
        "{err}"
    );
    assert!(err.contains("percent=100") && bench.snapshot("m-Q2_K-00002-of-00002.gguf").exists(), "{err}");
    let asked = hub.asks().len();
    let (code, out, err) = run(&neuron, &["pull", "org/repo:F16", "--revision", COMMIT]);
    assert_eq!((code, out.as_str(), hub.asks().len()), (Some(0), path.to_str().unwrap(), asked), "{err}");
    let elsewhere = bench.folder.path().join("elsewhere");
    hub.plan(|_| Some(Trick::Status(404, "")));
    let (code, out, err) = run(&neuron, &["pull", "org/repo", "--cache", elsewhere.to_str().unwrap()]);
    assert!(code == Some(1) && out.is_empty() && err.contains("has no org/repo at main"), "{err}");
    assert!(!elsewhere.join("models--org--repo/blobs").exists());
}

#[cfg(feature = "candle")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_model_comes_by_the_name_it_has_on_the_hub() {
    use fleet_tests::{Client, chat_body};
    let (hub, bench) = (TestHub::start().await, Bench::new());
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/demo-model/demo-q8_0.gguf");
    let bytes = std::fs::read(file).unwrap();
    let etag = sha256(&bytes);
    hub.add("demo-q8_0.gguf", bytes, &etag, true);
    let model = "[[default_models]]\nid = \"org/repo\"\nquant = \"Q8_0\"\nrequired = true\n";
    let config = format!("{}kv_cache_mib = 64\n", bench.config(model));
    for variables in [&[("HF_ENDPOINT", hub.url.as_str())][..], &[("HF_HUB_OFFLINE", "1")]] {
        let fleet = bench.fleet(variables);
        let a = fleet.neuron("a", &config).await.unwrap();
        let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
        let answer = Client::new(&gateway.api).unwrap().stream_owned(chat_body("org/repo", "Hello", 60)).await.unwrap();
        assert!(answer.whole() && answer.text.starts_with("Hello!"), "{answer:?}");
    }
    assert_eq!(hub.count(Ask::is_download), 1);
}
