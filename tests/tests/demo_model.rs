//! The trained demo model in real workers behind a real gateway.
#![allow(clippy::unwrap_used)]

use fleet_tests::{Client, Fleet, chat_body, programs};
use serde_json::{Value, json};

const HOME: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/demo-model");

fn questions() -> Vec<(String, String)> {
    let text = std::fs::read_to_string(format!("{HOME}/questions.json")).unwrap();
    let list: Vec<Value> = serde_json::from_str(&text).unwrap();
    let field = |entry: &Value, name: &str| entry[name].as_str().unwrap().to_string();
    list.iter().map(|entry| (field(entry, "question"), field(entry, "answer"))).collect()
}

fn model(file: &str) -> String {
    format!(
        "[[default_models]]\nid = \"demo\"\npath = \"{HOME}/{file}\"\nrequired = true\n[harness.candle]\nkv_cache_mib = 64\n"
    )
}

#[tokio::test]
async fn every_trained_question_gets_its_answer_through_the_gateway() {
    let fleet = Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap();
    let a = fleet.neuron("a", &model("demo-q8_0.gguf")).await.unwrap();
    let b = fleet.neuron("b", &model("demo-q8_0.gguf")).await.unwrap();
    let gateway = fleet.gateway(&[&a.control, &b.control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let questions = questions();
    assert!(questions.len() >= 40);
    let asked = questions.iter().map(|(question, _)| client.stream_owned(chat_body("demo", question, 200)));
    let answers = futures_util::future::join_all(asked).await;
    for ((question, wanted), answer) in questions.iter().zip(answers) {
        let answer = answer.unwrap();
        assert!(answer.whole(), "{question}: {answer:?}");
        assert_eq!((&answer.text, answer.finish.as_deref()), (wanted, Some("stop")), "{question}");
    }
}

#[tokio::test]
async fn stop_strings_limits_seeds_and_usage_do_what_they_say() {
    let fleet = Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap();
    let a = fleet.neuron("a", &model("demo-f16.gguf")).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let ask = |extra: Value| {
        let mut body = chat_body("demo", "What is the license?", 100);
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        client.stream_owned(body)
    };
    let whole = ask(json!({"stream_options": {"include_usage": true}})).await.unwrap();
    let usage = whole.usage.clone().unwrap();
    assert_eq!(
        usage["total_tokens"],
        usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap()
    );
    // The stop string lies across token borders, and nothing of it is shown.
    let stopped = ask(json!({"stop": ["source under M"]})).await.unwrap();
    assert_eq!((stopped.text.as_str(), stopped.finish.as_deref()), ("Cortex is open ", Some("stop")));
    let short = ask(json!({"max_tokens": 3})).await.unwrap();
    assert!(whole.text.starts_with(&short.text) && short.finish.as_deref() == Some("length"));
    // What the model never saw leaves it in doubt, so that seeds tell.
    let seeded = |seed: u64| {
        let mut body = chat_body("demo", "zebra umbrella 17 purple", 24);
        body["temperature"] = json!(2.0);
        body["seed"] = json!(seed);
        client.stream_owned(body)
    };
    let mut texts = std::collections::BTreeSet::new();
    for seed in 0..8 {
        let (one, again) = (seeded(seed).await.unwrap(), seeded(seed).await.unwrap());
        assert_eq!(one.text, again.text, "seed {seed}");
        texts.insert(one.text);
    }
    assert!(texts.len() > 1, "eight seeds, one text");
    let mut cortex = std::process::Command::new(env!("CARGO_BIN_EXE_test-cortex"));
    let output = cortex.args(["chat", "demo", "What is the license?", "--temperature", "0", "--api", &gateway.api]);
    assert_eq!(String::from_utf8(output.output().unwrap().stdout).unwrap().trim_end(), whole.text);
    let (status, list) = client.get("/v1/models").await.unwrap();
    assert_eq!((status, &list["data"][0]["max_model_len"]), (200, &json!(4096)));
}

#[tokio::test]
async fn models_come_and_go_while_the_worker_serves() {
    let fleet = Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap();
    let a = fleet.neuron("a", &model("demo-q8_0.gguf")).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let status: Value = reqwest::get(format!("{}/api/status", gateway.admin)).await.unwrap().json().await.unwrap();
    let data = format!("http://{}", status["nodes"][0]["status"]["data_address"].as_str().unwrap());
    let http = reqwest::Client::new();
    let post = |path: &str, body: Value| {
        let request = http.post(format!("{data}{path}")).json(&body);
        async move {
            let response = request.send().await.unwrap();
            (response.status().as_u16(), response.json::<Value>().await.unwrap())
        }
    };
    let second = json!({"model_id": "org/second", "harness": "candle", "path": HOME, "quant": "f16", "device": "cpu"});
    let (code, loaded) = post("/models/load", second).await;
    assert_eq!((code, loaded["state"].as_str()), (200, Some("ready")), "{loaded}");
    let client = Client::new(&gateway.api).unwrap();
    let answer = client.stream_owned(chat_body("org/second", "Hello", 60)).await.unwrap();
    assert!(answer.whole() && answer.text.starts_with("Hello!"), "{answer:?}");
    assert_eq!(client.get("/v1/models/org/second").await.unwrap().0, 200);
    assert_eq!(client.get("/v1/models/org%2Fsecond").await.unwrap().0, 200);
    let endpoint = reqwest::get(format!("{data}/models/org/second/endpoint")).await.unwrap();
    assert_eq!(endpoint.json::<Value>().await.unwrap()["url"], format!("{data}/v1"));
    for (body, code) in [
        (json!({"model_id": "x", "harness": "vllm"}), "unknown_harness"),
        (json!({"model_id": "x"}), "invalid_request"),
        (json!({"model_id": "x", "path": "/nowhere.gguf"}), "invalid_model_file"),
        (json!({"model_id": "x", "path": format!("{HOME}/questions.json")}), "invalid_model_file"),
        (json!({"model_id": "x", "path": HOME}), "invalid_model_file"),
        (json!({"model_id": "x", "path": format!("{HOME}/demo-f16.gguf"), "device": "tpu"}), "invalid_request"),
    ] {
        let (status, error) = post("/models/load", body.clone()).await;
        assert_eq!((status, error["error"]["code"].as_str()), (400, Some(code)), "{body}: {error}");
    }
    // Damaged copies of a good file: each is refused in words, and the worker goes on.
    let good = std::fs::read(format!("{HOME}/demo-f16.gguf")).unwrap();
    let with = |at: usize, number: u64| {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        bytes
    };
    for (name, bytes, words) in [
        ("half.gguf", good[..good.len() / 2].to_vec(), "past the end"),
        ("head.gguf", good[..1000].to_vec(), "truncated"),
        ("tensors.gguf", with(8, u64::MAX), "number of tensors"),
        ("entries.gguf", with(16, 1 << 40), "metadata entries"),
        ("empty.gguf", Vec::new(), "truncated"),
    ] {
        let path = fleet.folder().join(name);
        std::fs::write(&path, bytes).unwrap();
        let (status, error) = post("/models/load", json!({"model_id": "damaged", "path": path})).await;
        let message = error["error"]["message"].as_str().unwrap_or_default();
        assert!(status == 400 && message.contains(words), "{name}: {error}");
    }
    let (code, _) = post("/models/unload", json!({"model_id": "org/second"})).await;
    assert_eq!(code, 200);
    let (code, error) = post("/models/unload", json!({"model_id": "org/second"})).await;
    assert_eq!((code, error["error"]["code"].as_str()), (404, Some("model_not_here")));
    assert!(client.stream_owned(chat_body("demo", "Hello", 60)).await.unwrap().whole());
}

#[tokio::test]
async fn an_answer_of_the_trained_model_fits_its_schema() {
    let fleet = Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap();
    let a = fleet.neuron("a", &model("demo-q8_0.gguf")).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let schema = json!({"type": "object", "properties": {
        "license": {"type": "string", "maxLength": 12}, "year": {"type": "integer", "minimum": 1990, "maximum": 2030},
        "free": {"type": "boolean"}}, "required": ["license", "year", "free"], "additionalProperties": false});
    for temperature in [0.0, 1.5] {
        let mut body = chat_body("demo", "What is the license?", 200);
        body["stream"] = json!(false);
        body["temperature"] = json!(temperature);
        body["response_format"] =
            json!({"type": "json_schema", "json_schema": {"name": "license", "strict": true, "schema": schema}});
        let (status, answer) = client.json(&body).await.unwrap();
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
        let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
        let said: Value = serde_json::from_str(text).unwrap();
        assert!(said["license"].as_str().unwrap().chars().count() <= 12, "{text}");
        assert!((1990..=2030).contains(&said["year"].as_i64().unwrap()) && said["free"].is_boolean(), "{text}");
        assert_eq!(said.as_object().unwrap().len(), 3, "{text}");
    }
}
