//! A real engine of others behind a worker: llama-cpp-python's server with a small trained model.
//!
//! Runs where `CORTEX_LLAMA_PYTHON` names a Python that has `llama-cpp-python[server]`, and the model is beside the
//! checkout; says `SKIPPED` loudly elsewhere.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use fleet_tests::{Client, Fleet, programs};
use serde_json::{Value, json};

/// The interpreter and the model's file.
fn engine() -> Option<(String, PathBuf)> {
    let Ok(python) = std::env::var("CORTEX_LLAMA_PYTHON") else {
        eprintln!("SKIPPED: CORTEX_LLAMA_PYTHON names no Python with llama-cpp-python[server]");
        return None;
    };
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data/models/stories260K/stories260K-f32.gguf");
    match std::fs::canonicalize(file) {
        Ok(file) => Some((python, file)),
        Err(error) => {
            assert!(std::env::var("CORTEX_TEST_DATA").as_deref() != Ok("required"), "{file}: {error}");
            eprintln!("SKIPPED: the trained model is not beside this checkout");
            None
        }
    }
}

/// An answer without what differs between any two of them.
fn plain(mut json: Value) -> Value {
    json.as_object_mut().unwrap().retain(|key, _| key != "id" && key != "created");
    json
}

/// The events of a stream, without what differs between any two streams.
fn events(raw: &str) -> Vec<Value> {
    let data = raw.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
    data.map(|data| plain(serde_json::from_str(data).unwrap())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_engine_answers_through_the_fleet_as_it_does_alone() {
    let Some((python, file)) = engine() else { return };
    let fleet = Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap();
    let note = fleet.folder().join("port");
    let config = format!(
        "[[default_models]]\nid = \"stories\"\nharness = \"process\"\n[default_models.process]\n\
         argv = [{python:?}, \"-m\", \"llama_cpp.server\", \"--model\", {file:?}, \"--host\", \"127.0.0.1\", \"--port\",\
         \"${{PORT}}\", \"--n_ctx\", \"512\", \"--interrupt_requests\", \"false\"]\n\
         health_path = \"/v1/models\"\nmax_running = 1\nrestart_pause_s = 0.1\n\
         [[hooks.run]]\non = \"after_healthy\"\ncommand = [\"sh\", \"-c\", \"echo $NEURON_PID $NEURON_PORT > {}\"]\n",
        note.display()
    );
    let mut neuron = fleet.starting_neuron("a", &config).unwrap();
    let begun = Instant::now();
    while fleet.until_ok(&format!("http://{}/readyz", neuron.control), &neuron.process).await.is_err() {
        assert!(begun.elapsed() < Duration::from_secs(120), "{}", neuron.process.log());
    }
    let gateway = fleet.gateway(&[&neuron.control], "").await.unwrap();
    let noted = || {
        let words = std::fs::read_to_string(&note).unwrap();
        let numbers: Vec<i32> = words.split_whitespace().map(|word| word.parse().unwrap()).collect();
        (numbers[0], numbers[1])
    };
    let (pid, port) = noted();
    let alone = Client::new(&format!("http://127.0.0.1:{port}")).unwrap();
    let through = Client::new(&gateway.api).unwrap();
    let chat = json!([{"role": "user", "content": "Once upon a time"}]);
    for (path, mut body) in [
        ("/v1/chat/completions", json!({"model": "stories", "messages": chat, "max_tokens": 40})),
        ("/v1/completions", json!({"model": "stories", "prompt": "Lily and Ben went", "max_tokens": 40})),
    ] {
        body["temperature"] = json!(0);
        let (status, ours) = through.at(path).json(&body).await.unwrap();
        let (_, its) = alone.at(path).json(&body).await.unwrap();
        assert_eq!((status, plain(ours)), (200, plain(its)));
        body["stream"] = json!(true);
        let ours = through.at(path).stream(&body, |_| {}).await.unwrap();
        let its = alone.at(path).stream(&body, |_| {}).await.unwrap();
        assert!(ours.whole() && ours.raw.ends_with("data: [DONE]\n\n"), "{ours:?}");
        assert!(events(&ours.raw).len() > 20 && events(&ours.raw) == events(&its.raw), "{}", ours.raw);
    }
    let long = json!({"model": "stories", "prompt": "word ".repeat(600), "max_tokens": 1});
    let (status, refused) = through.at("/v1/completions").json(&long).await.unwrap();
    assert_eq!((status, &refused["error"]["code"]), (400, &json!("context_length_exceeded")), "{refused}");

    let own = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(own, rustix::process::Signal::KILL).unwrap();
    let asked = json!({"model": "stories", "prompt": "One day", "max_tokens": 8, "temperature": 0});
    let (status, answer) = through.at("/v1/completions").json(&asked).await.unwrap();
    assert_eq!(status, 200, "{answer}");
    assert_ne!(noted().0, pid, "another process has answered");
    neuron.process.terminate().unwrap();
    assert_eq!(neuron.process.wait(Duration::from_secs(30)).unwrap().code(), Some(0));
}
