//! Models of the catalogue over real processes: where the gateway has them loaded, and what clients see meanwhile.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fleet_tests::supervisor::{RestartRules, Supervised};
use fleet_tests::{Client, Fleet, Gateway, chat_body, fake_answer, free_port, programs};
use serde_json::{Value, json};

const UNIT: &str = include_str!("../../deploy/systemd/neuron.service");

fn fleet() -> Fleet {
    Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap()
}

/// A worker with memory for `budget` MiB, and models of 100 MiB each that nobody has loaded yet.
fn catalogue(budget: usize, load_ms: u64, models: &[&str]) -> String {
    let mut text = format!("[memory]\nbudget_mib = {budget}\n[harness.fake]\nload_ms = {load_ms}\n");
    for id in models {
        text += &format!(
            "[[models]]\nid = \"{id}\"\naliases = [\"{id}-alias\"]\nprovider = \"somebody\"\nharness = \"fake\"\n\
             memory_mib = 100\n"
        );
    }
    text
}

fn whole(model: &str, prompt: &str, tokens: u32) -> Value {
    let mut body = chat_body(model, prompt, tokens);
    body["stream"] = json!(false);
    body
}

/// Where a model serves.
async fn ready_at(gateway: &Gateway, model: &str) -> Vec<String> {
    let fleet: Value = reqwest::get(format!("{}/api/models", gateway.admin)).await.unwrap().json().await.unwrap();
    let models = fleet["models"].as_array().cloned().unwrap_or_default();
    let replicas = models.iter().filter(|found| found["id"] == model).flat_map(|found| found["replicas"].as_array());
    let ready = replicas.flatten().filter(|replica| replica["state"] == "ready");
    ready.map(|replica| replica["node"].as_str().unwrap().to_string()).collect()
}

async fn until_ready_at(gateway: &Gateway, model: &str, wanted: &[&str]) {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let ready = ready_at(gateway, model).await;
        if ready == wanted {
            return;
        }
        assert!(Instant::now() < until, "{model} is at {ready:?} and not at {wanted:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn an_absent_model_is_listed_and_answers_by_its_id_and_its_alias() {
    let fleet = fleet();
    let a = fleet.neuron("a", &catalogue(300, 300, &["org/m", "n"])).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let (status, list) = client.get("/v1/models").await.unwrap();
    assert_eq!((status, list["data"].as_array().unwrap().len()), (200, 2), "{list}");
    let listed = list["data"].as_array().unwrap().iter().find(|model| model["id"] == "org/m").unwrap();
    assert_eq!((&listed["state"], &listed["owned_by"]), (&json!("absent"), &json!("somebody")));
    let answer = client.stream_owned(chat_body("org/m", "hello", 12)).await.unwrap();
    assert!(answer.whole() && answer.text == fake_answer("hello", 12), "{answer:?}");
    let (status, by_alias) = client.json(&whole("n-alias", "hello", 12)).await.unwrap();
    assert_eq!((status, &by_alias["model"]), (200, &json!("n")), "{by_alias}");
    assert_eq!(by_alias["choices"][0]["message"]["content"], fake_answer("hello", 12).as_str());
    let (status, model) = client.get("/v1/models/org/m-alias").await.unwrap();
    assert_eq!((status, &model["id"], &model["state"]), (200, &json!("org/m"), &json!("ready")));
    assert_eq!(client.get("/v1/models/none").await.unwrap().0, 404);
    let loads = fleet.metric(&gateway.admin, "cortex_model_loads_total", &["room=\"free\""]).await.unwrap();
    assert_eq!(loads, 2.0);
}

#[tokio::test]
async fn operators_list_load_and_unload_models() {
    let fleet = fleet();
    let a = fleet.neuron("a", &catalogue(100, 100, &["m", "n"])).await.unwrap();
    let b = fleet.neuron("b", &catalogue(100, 100, &["m", "n"])).await.unwrap();
    let gateway = fleet.gateway(&[&a.control, &b.control], "").await.unwrap();
    let cortex = async |arguments: &[&str]| {
        let all: Vec<&str> = arguments.iter().copied().chain(["--admin", &gateway.admin]).collect();
        let (code, text) = fleet.cortex(&all).await.unwrap();
        (code.unwrap(), text)
    };
    let (code, text) = cortex(&["load", "m-alias", "--on", "b"]).await;
    assert!(code == 0 && text.contains("b: ready"), "{code}: {text}");
    until_ready_at(&gateway, "m", &["b"]).await;
    let (code, text) = cortex(&["load", "n", "--no-evict"]).await;
    assert!(code == 0 && text.contains("a: ready"), "free memory comes first: {text}");
    let (_, text) = cortex(&["ps"]).await;
    assert!(
        text.contains("100 MiB") && text.lines().any(|line| line.starts_with("m ") && line.contains(" b ")),
        "{text}"
    );
    until_ready_at(&gateway, "n", &["a"]).await;
    let (code, text) = cortex(&["load", "n", "--on", "b", "--no-evict"]).await;
    assert!(code != 0 && text.contains("100 MiB"), "the numbers are told: {text}");
    let (code, text) = cortex(&["unload", "m"]).await;
    assert!(code == 0 && text.contains("b: unloaded"), "{text}");
    until_ready_at(&gateway, "m", &[]).await;
    let (code, text) = cortex(&["models"]).await;
    assert!(code == 0 && text.contains("absent") && text.contains("m-alias"), "{text}");
    let (code, text) = cortex(&["models", "--json"]).await;
    assert_eq!((code, serde_json::from_str::<Value>(&text).unwrap()["models"][0]["id"].as_str()), (0, Some("m")));
    let (code, text) = cortex(&["load", "none"]).await;
    assert!(code != 0 && text.contains("no worker's catalogue has the model 'none'"), "{text}");
}

#[tokio::test]
async fn a_client_whose_wait_is_over_is_told_how_far_the_load_is() {
    let fleet = fleet();
    let a = fleet.neuron("a", &catalogue(100, 2_500, &["m"])).await.unwrap();
    let short = fleet.gateway(&[&a.control], "[proxy]\nload_wait_ms = 700\n").await.unwrap();
    let response =
        reqwest::Client::new().post(format!("{}/v1/chat/completions", short.api)).json(&whole("m", "hello", 4));
    let response = response.send().await.unwrap();
    let after = response.headers().get("retry-after").and_then(|value| value.to_str().ok()).map(str::to_string);
    assert_eq!(response.status(), 503);
    assert!(after.is_some_and(|after| after.parse::<u64>().unwrap() >= 1));
    let error = response.json::<Value>().await.unwrap()["error"].clone();
    assert_eq!(error["code"], "model_loading", "{error}");
    assert!(["fetching", "loading"].contains(&error["loading"]["state"].as_str().unwrap()), "{error}");
    assert!((0.0..=1.0).contains(&error["loading"]["progress"].as_f64().unwrap()), "{error}");
    // The load goes on without it, and the next one waits for the same.
    let patient = fleet.gateway(&[&a.control], "").await.unwrap();
    let client = Client::new(&patient.api).unwrap();
    let answer = client.stream_owned(chat_body("m", "hello", 12)).await.unwrap();
    assert!(answer.whole() && answer.text == fake_answer("hello", 12), "{answer:?}");
}

#[tokio::test]
async fn a_stream_that_was_committed_ends_with_the_same_error() {
    let fleet = fleet();
    let a = fleet.neuron("a", &catalogue(100, 4_000, &["m"])).await.unwrap();
    let api = "commit_after_ms = 200\nkeep_alive_ms = 100\n[proxy]\nload_wait_ms = 1000\n";
    let gateway = fleet.gateway_with_api(&[&a.control], api).await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let answer = client.stream_owned(chat_body("m", "hello", 4)).await.unwrap();
    let error = answer.error.as_ref().expect("no error");
    assert_eq!((answer.status, answer.done, answer.pieces), (200, false, 0), "{answer:?}");
    assert_eq!(error["code"], "model_loading");
    assert!(error["loading"]["state"].is_string(), "{error}");
    assert!(answer.raw.matches(": keep-alive").count() >= 3, "{}", answer.raw);
}

#[tokio::test]
async fn two_gateways_and_thirty_requests_start_one_load() {
    let fleet = fleet();
    let models = ["m", "n"];
    let a = fleet.neuron("a", &catalogue(200, 500, &models)).await.unwrap();
    let b = fleet.neuron("b", &catalogue(200, 500, &models)).await.unwrap();
    let gateways = [
        fleet.gateway(&[&a.control, &b.control], "").await.unwrap(),
        fleet.gateway(&[&b.control, &a.control], "").await.unwrap(),
    ];
    let clients = gateways.each_ref().map(|gateway| Client::new(&gateway.api).unwrap());
    let requests: Vec<_> = (0..30)
        .map(|i| {
            let body = chat_body("m", &format!("hello {i}"), 8);
            tokio::spawn(clients[i % 2].stream_owned(body))
        })
        .collect();
    for (i, request) in requests.into_iter().enumerate() {
        let answer = request.await.unwrap().unwrap();
        assert!(answer.whole() && answer.text == fake_answer(&format!("hello {i}"), 8), "{answer:?}");
    }
    let mut loads = 0.0;
    for worker in [&a, &b] {
        let base = format!("http://{}", worker.control);
        loads += fleet.metric(&base, "neuron_model_loads_total", &[]).await.unwrap();
    }
    assert_eq!(loads, 1.0);
    assert_eq!(ready_at(&gateways[0], "m").await.len(), 1);
}

#[tokio::test]
async fn free_memory_is_taken_before_anything_is_evicted() {
    let fleet = fleet();
    let models = ["m", "x", "y", "z"];
    let a = fleet.neuron("a", &catalogue(200, 50, &models)).await.unwrap();
    let b = fleet.neuron("b", &catalogue(100, 50, &models)).await.unwrap();
    let gateway = fleet.gateway(&[&a.control, &b.control], "").await.unwrap();
    let http = reqwest::Client::new();
    for model in ["x", "y"] {
        let order = json!({"model": model, "node": "a"});
        let answer = http.post(format!("{}/api/models/load", gateway.admin)).json(&order).send().await.unwrap();
        let lines = answer.text().await.unwrap();
        assert!(lines.trim_end().lines().last().unwrap().contains("\"done\":true"), "{lines}");
        until_ready_at(&gateway, model, &["a"]).await;
    }
    // Idleness is told in whole seconds.
    tokio::time::sleep(Duration::from_millis(2_200)).await;
    let client = Client::new(&gateway.api).unwrap();
    let ask = async |model: &str| {
        let answer = client.stream(&chat_body(model, "hello", 8), |_| {}).await.unwrap();
        assert!(answer.whole() && answer.text == fake_answer("hello", 8), "{answer:?}");
    };
    ask("m").await;
    for (model, place) in [("m", "b"), ("x", "a"), ("y", "a")] {
        until_ready_at(&gateway, model, &[place]).await;
    }
    // From now on something has to go: what was used longest ago, wherever it is.
    ask("x").await;
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    ask("z").await;
    for (model, places) in [("z", &["a"][..]), ("y", &[]), ("x", &["a"]), ("m", &["b"])] {
        until_ready_at(&gateway, model, places).await;
    }
}

#[tokio::test]
async fn requests_that_wait_for_a_load_outlive_its_worker() {
    let fleet = fleet();
    let mut workers = Vec::new();
    for name in ["a", "b"] {
        workers.push(fleet.neuron(name, &catalogue(100, 1_500, &["m"])).await.unwrap());
    }
    let gateway = fleet.gateway(&[&workers[0].control, &workers[1].control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let requests: Vec<_> = (0..6)
        .map(|i| {
            let body = chat_body("m", &format!("hello {i}"), 8);
            tokio::spawn(client.stream_owned(body))
        })
        .collect();
    let until = Instant::now() + Duration::from_secs(10);
    let chosen = loop {
        assert!(Instant::now() < until, "nobody loads it");
        tokio::time::sleep(Duration::from_millis(20)).await;
        let status: Value = reqwest::get(format!("{}/api/status", gateway.admin)).await.unwrap().json().await.unwrap();
        let loads = |i: &usize| status["nodes"][i]["status"]["models"][0]["state"] == "loading";
        if let Some(chosen) = (0..2).find(loads) {
            break chosen;
        }
    };
    workers[chosen].process.kill().unwrap();
    for (i, request) in requests.into_iter().enumerate() {
        let answer = request.await.unwrap().unwrap();
        assert!(answer.whole() && answer.text == fake_answer(&format!("hello {i}"), 8), "{answer:?}");
    }
    assert_eq!(ready_at(&gateway, "m").await, [["b", "a"][chosen]]);
}

#[tokio::test]
async fn a_stream_goes_on_where_its_model_is_loaded_for_it() {
    let fleet = fleet();
    let slow = |name: &str| catalogue(100, 500, &[name]).replace("[harness.fake]", "[harness.fake]\nstep_ms = 20");
    let mut workers = Vec::new();
    for name in ["a", "b"] {
        workers.push(fleet.neuron(name, &slow("m")).await.unwrap());
    }
    let gateway = fleet.gateway(&[&workers[0].control, &workers[1].control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let (begun, first) = tokio::sync::oneshot::channel();
    let stream = tokio::spawn(async move {
        let mut begun = Some(begun);
        let told = |answer: &fleet_tests::Answer| {
            if answer.pieces == 5
                && let Some(begun) = begun.take()
            {
                let _ = begun.send(());
            }
        };
        client.stream(&chat_body("m", "hello", 60), told).await
    });
    first.await.unwrap();
    let at = ready_at(&gateway, "m").await;
    assert_eq!(at.len(), 1);
    let chosen = usize::from(at[0] == "b");
    workers[chosen].process.kill().unwrap();
    let answer = stream.await.unwrap().unwrap();
    assert!(answer.whole() && answer.text == fake_answer("hello", 60), "{answer:?}");
    // The dead one may be asked once more before its connection's end is known.
    assert!(fleet.metric(&gateway.admin, "cortex_continuations_total", &[]).await.unwrap() >= 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_asks_no_leave_for_a_model_that_another_worker_would_load() {
    let fleet = fleet();
    let supervise = |name: &'static str| {
        let (starter, port, state) = (fleet.starter(), free_port().unwrap(), fleet.folder().join(name));
        let config = catalogue(150, 200, &["m", "n"]) + &format!("[node]\nid = \"{name}\"\nstate_dir = {state:?}\n");
        let rules = RestartRules { pause: Duration::from_millis(200), ..RestartRules::read(UNIT).unwrap() };
        Supervised::start(name, rules, move || starter.neuron(name, port, &config)).unwrap()
    };
    let workers = [supervise("a"), supervise("b")];
    let store = format!("[rollout]\nstore = {:?}\n", fleet.folder().join("rollout.sqlite"));
    let gateway = fleet.gateway(&[&workers[0].control, &workers[1].control], &store).await.unwrap();
    fleet.until_metric(&gateway.admin, "cortex_node_routable", &[], 2.0).await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let asking = tokio::spawn({
        let (client, over) = (client.clone(), over.clone());
        async move {
            let mut asked = 0;
            while !over.load(Ordering::Relaxed) {
                asked += 1;
                let prompt = format!("still there? {asked}");
                let answer = client.stream(&chat_body("m", &prompt, 8), |_| {}).await.unwrap();
                assert!(answer.whole() && answer.text == fake_answer(&prompt, 8), "{answer:?}");
            }
            asked
        }
    });
    let until = Instant::now() + Duration::from_secs(20);
    while ready_at(&gateway, "m").await.len() != 1 {
        assert!(Instant::now() < until, "nobody has loaded it");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // What had it is asked for it before it is opened, and loads it for that.
    let canary = format!("m:right={}", fake_answer("right", 4));
    let rollout = ["rollout", "restart", "--health", "1", "--canary", &canary, "--admin", &gateway.admin];
    let (code, text) = fleet.cortex(&rollout).await.unwrap();
    assert_eq!(code, Some(0), "{text}");
    let (code, text) = fleet.cortex(&["rollout", "watch", "--admin", &gateway.admin]).await.unwrap();
    assert_eq!(code, Some(0), "{text}");
    over.store(true, Ordering::Relaxed);
    assert!(asking.await.unwrap() > 10, "and nobody was refused");
    assert_eq!(workers.each_ref().map(Supervised::starts), [2, 2]);
}
