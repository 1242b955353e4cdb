//! Workers that are killed or frozen under running streams, as real processes: clients see nothing of it.
#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fleet_tests::supervisor::{RestartRules, Supervised};
use fleet_tests::{Answer, Client, Cut, Fleet, Gateway, Knife, Neuron, Wire, chat_body, fake_answer, programs};
use rustix::process::Signal;

const SOON: Duration = Duration::from_secs(20);

fn fleet() -> Fleet {
    Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap()
}

fn fake(step_ms: u32) -> String {
    format!("[[default_models]]\nid = \"m\"\nharness = \"fake\"\n[harness.fake]\nstep_ms = {step_ms}\n")
}

async fn three(fleet: &Fleet, step_ms: u32) -> (Vec<Neuron>, Gateway) {
    let mut neurons = Vec::new();
    for name in ["a", "b", "c"] {
        neurons.push(fleet.neuron(name, &fake(step_ms)).await.unwrap());
    }
    let controls: Vec<&str> = neurons.iter().map(|neuron| neuron.control.as_str()).collect();
    let gateway = fleet.gateway(&controls, "").await.unwrap();
    (neurons, gateway)
}

/// Returns the worker that runs the most requests.
async fn busiest(fleet: &Fleet, neurons: &[Neuron]) -> usize {
    let mut most = (0.0, 0);
    for (i, neuron) in neurons.iter().enumerate() {
        let base = format!("http://{}", neuron.control);
        // A worker that was killed has no metrics any more.
        let running = fleet.metric(&base, "neuron_num_requests_running", &[]).await.unwrap_or(0.0);
        if running > most.0 {
            most = (running, i);
        }
    }
    assert!(most.0 > 0.0, "nobody runs anything");
    most.1
}

fn check(prompt: &str, tokens: u32, answer: &Answer) {
    assert!(answer.whole(), "{answer:?}");
    assert_eq!(answer.text, fake_answer(prompt, tokens), "{prompt}");
    assert_eq!(answer.raw.matches("\"role\":\"assistant\"").count(), 1);
    assert_eq!(answer.raw.matches("[DONE]").count(), 1);
    assert!(!answer.raw.contains(":cx"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_in_the_middle_of_streams_is_not_seen_by_their_clients() {
    let fleet = fleet();
    let (mut neurons, gateway) = three(&fleet, 10).await;
    let client = Client::new(&gateway.api).unwrap();
    let asked: Vec<_> =
        (0..9).map(|i| tokio::spawn(client.stream_owned(chat_body("m", &format!("kill {i}"), 200)))).collect();
    let begun = Instant::now();
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let victim = busiest(&fleet, &neurons).await;
        neurons[victim].process.kill().unwrap();
    }
    for (i, answer) in futures_util::future::join_all(asked).await.into_iter().enumerate() {
        check(&format!("kill {i}"), 200, &answer.unwrap().unwrap());
    }
    let continued = fleet.metric(&gateway.admin, "cortex_continuations_total", &[]).await.unwrap();
    let gap = fleet.metric(&gateway.admin, "cortex_continuation_gap_seconds_sum", &[]).await.unwrap();
    eprintln!("{continued} continuations in {:?}; mean gap {:.1} ms", begun.elapsed(), gap / continued * 1000.0);
    assert!(continued >= 3.0, "{continued} streams went on elsewhere");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_worker_is_left_after_three_seconds_and_its_streams_go_on() {
    let fleet = fleet();
    let (neurons, gateway) = three(&fleet, 10).await;
    let client = Client::new(&gateway.api).unwrap();
    let asked: Vec<_> =
        (0..6).map(|i| tokio::spawn(client.stream_owned(chat_body("m", &format!("freeze {i}"), 150)))).collect();
    tokio::time::sleep(Duration::from_millis(400)).await;
    let frozen = busiest(&fleet, &neurons).await;
    neurons[frozen].process.signal(Signal::STOP).unwrap();
    let begun = Instant::now();
    for (i, answer) in futures_util::future::join_all(asked).await.into_iter().enumerate() {
        check(&format!("freeze {i}"), 150, &answer.unwrap().unwrap());
    }
    eprintln!("all streams whole {:?} after the freeze", begun.elapsed());
    let continued = fleet.metric(&gateway.admin, "cortex_continuations_total", &["upstream_timeout"]).await.unwrap();
    assert!(continued >= 1.0, "nothing ran on the frozen worker");
    neurons[frozen].process.signal(Signal::CONT).unwrap();
    // Thawed, it serves again, and what it still had of the old streams reaches nobody.
    let body = chat_body("m", "after the thaw", 20);
    check("after the thaw", 20, &client.stream(&body, |_| {}).await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_names_what_it_ran_and_the_next_life_says_so() {
    let fleet = fleet();
    let state = fleet.folder().join("state");
    let config = format!("{}\n[node]\nid = \"a\"\nstate_dir = {state:?}\n", fake(20));
    let port = fleet_tests::free_port().unwrap();
    let mut first = fleet.neuron_with_node(port, &config).unwrap();
    fleet.until_ok(&format!("http://{}/readyz", first.control), &first.process).await.unwrap();
    let gateway = fleet.gateway(&[&first.control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let asked = tokio::spawn(client.stream_owned(chat_body("m", "crumbs", 60)));
    tokio::time::sleep(Duration::from_millis(400)).await;
    first.process.kill().unwrap();
    let second = fleet.neuron_with_node(port, &config).unwrap();
    check("crumbs", 60, &asked.await.unwrap().unwrap());
    let status: serde_json::Value =
        reqwest::get(format!("{}/api/status", gateway.admin)).await.unwrap().json().await.unwrap();
    let status = &status["nodes"][0]["status"];
    assert_eq!(status["crumbs"].as_array().unwrap().len(), 1, "{status}");
    assert_eq!(status["incarnation"]["counter"], 2);
    assert!(second.process.log().contains("the life before this one crashed"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_before_the_first_token_waits_for_the_only_workers_return() {
    let fleet = fleet();
    let slow = format!("{}prefill_ms = 1500\n", fake(0));
    let state = fleet.folder().join("state");
    let config = format!("{slow}\n[node]\nid = \"a\"\nstate_dir = {state:?}\n");
    let port = fleet_tests::free_port().unwrap();
    let mut first = fleet.neuron_with_node(port, &config).unwrap();
    fleet.until_ok(&format!("http://{}/readyz", first.control), &first.process).await.unwrap();
    let gateway = fleet.gateway(&[&first.control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let asked = tokio::spawn(client.stream_owned(chat_body("m", "patient", 8)));
    tokio::time::sleep(Duration::from_millis(500)).await;
    first.process.kill().unwrap();
    // Long enough that the gateway knows of nobody.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let second = fleet.neuron_with_node(port, &config).unwrap();
    check("patient", 8, &asked.await.unwrap().unwrap());
    assert!(second.process.log().contains("the life before this one crashed"));
}

/// `CORTEX_CUT_PROMPTS_REAL` sets how many prompts are cut at all positions (3 by default).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_between_real_processes_cut_at_any_token_is_the_uncut_stream() {
    let fleet = fleet();
    let knife = Arc::new(Mutex::new(Knife::default()));
    let (mut neurons, mut wires) = (Vec::new(), Vec::new());
    for name in ["a", "b"] {
        let (port, data) =
            (fleet_tests::free_port().unwrap(), format!("127.0.0.1:{}", fleet_tests::free_port().unwrap()));
        let wire = Wire::to(data.clone(), knife.clone()).await.unwrap();
        let table = format!("bind = \"{data}\"\nadvertise = \"{}\"", wire.address);
        let config = format!("{}[node]\nid = \"{name}\"\n", fake(0));
        let neuron = fleet.starter().neuron_with_data(name, port, &table, &config).unwrap();
        fleet.until_ok(&format!("http://{}/readyz", neuron.control), &neuron.process).await.unwrap();
        neurons.push(neuron);
        wires.push(wire);
    }
    let gateway = fleet.gateway(&[&neurons[0].control, &neurons[1].control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let prompts = std::env::var("CORTEX_CUT_PROMPTS_REAL").ok().and_then(|count| count.parse().ok()).unwrap_or(3);
    let mut made = 0;
    for i in 0..prompts {
        let mut salt = 0;
        let mut body = || {
            salt += 1;
            let mut body = chat_body("m", &format!("real {i}"), 20);
            body["stream_options"] = serde_json::json!({"include_usage": true});
            body["cache_salt"] = serde_json::json!(format!("{i} {salt}"));
            body
        };
        let arm = |cut: Option<Cut>| knife.lock().unwrap().arm(cut);
        arm(None);
        let whole = client.stream(&body(), |_| {}).await.unwrap();
        check(&format!("real {i}"), 20, &whole);
        for mark in 0..22 {
            arm(Some(Cut { mark, bytes: [0, 9, 60, 25][mark % 4], hangs: false }));
            let answer = client.stream(&body(), |_| {}).await.unwrap();
            assert_eq!(answer.bytes(), whole.bytes(), "cut at {mark}");
            made += knife.lock().unwrap().made();
        }
    }
    eprintln!("{made} cuts of {prompts} prompts");
    assert_eq!(made, prompts * 22);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_slept_blames_nobody() {
    let fleet = fleet();
    let (_neurons, gateway) = three(&fleet, 10).await;
    let client = Client::new(&gateway.api).unwrap();
    let asked: Vec<_> =
        (0..6).map(|i| tokio::spawn(client.stream_owned(chat_body("m", &format!("sleep {i}"), 600)))).collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    gateway.process.signal(Signal::STOP).unwrap();
    tokio::time::sleep(Duration::from_millis(4_000)).await;
    gateway.process.signal(Signal::CONT).unwrap();
    for (i, answer) in futures_util::future::join_all(asked).await.into_iter().enumerate() {
        check(&format!("sleep {i}"), 600, &answer.unwrap().unwrap());
    }
    let continued = fleet.metric(&gateway.admin, "cortex_continuations_total", &[]).await.unwrap();
    assert_eq!(continued, 0.0, "the workers were there all the time");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_crashes_workers_ends_with_words_is_refused_and_harms_no_other() {
    let fleet = fleet();
    let lives = |name: &'static str| {
        let state = fleet.folder().join(format!("state-{name}"));
        let crash = format!("{}crash_byte = 7\n[node]\nid = \"{name}\"\nstate_dir = {state:?}\n", fake(10));
        let (starter, port) = (fleet.starter(), fleet_tests::free_port().unwrap());
        let rules = RestartRules { pause: Duration::from_millis(50), prevent: vec![78], burst: 9, interval: SOON };
        Supervised::start(name, rules, move || starter.neuron(name, port, &crash)).unwrap()
    };
    let supervised = ["a", "b", "c"].map(lives);
    let controls: Vec<&str> = supervised.iter().map(|one| one.control.as_str()).collect();
    let gateway = fleet.gateway(&controls, "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    fleet.until_metric(&gateway.admin, "cortex_node_routable", &[], 3.0).await.unwrap();
    let others: Vec<_> =
        (0..6).map(|i| tokio::spawn(client.stream_owned(chat_body("m", &format!("other {i}"), 200)))).collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let poison = chat_body("m", "ring the \u{7} bell", 20);
    let answer = client.stream(&poison, |_| {}).await.unwrap();
    assert_eq!(answer.error.as_ref().unwrap()["code"], "request_crashes_workers", "{answer:?}");
    let lives: usize = supervised.iter().map(Supervised::starts).sum();
    assert!(lives <= 5, "two workers died of it, no more");
    for (i, answer) in futures_util::future::join_all(others).await.into_iter().enumerate() {
        check(&format!("other {i}"), 200, &answer.unwrap().unwrap());
    }
    // At once while it is suspected, and for long once the next lives have named it.
    let begun = Instant::now();
    while begun.elapsed() < SOON {
        let again = client.stream(&poison, |_| {}).await.unwrap();
        let message = again.error.as_ref().unwrap()["message"].as_str().unwrap().to_string();
        let seconds = message.split("refused for ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok());
        if seconds.expect("it is refused") > 60 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    panic!("the next lives named the request, and it was not refused");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_thread_that_is_lost_costs_its_model_one_load_and_at_the_second_time_the_model() {
    let fleet = fleet();
    let lost = "\u{6}";
    let config = fake(10) + "lost_byte = 6\n[[default_models]]\nid = \"other\"\nharness = \"fake\"\n";
    let neuron = fleet.neuron("a", &config).await.unwrap();
    let gateway = fleet.gateway(&[&neuron.control], "").await.unwrap();
    let (client, base) = (Client::new(&gateway.api).unwrap(), format!("http://{}", neuron.control));
    let seen = fleet.status(&gateway, "a").await.unwrap();
    let direct = Client::new(&format!("http://{}", seen["status"]["data_address"].as_str().unwrap())).unwrap();
    let ask = |model: &str, prompt: &str| tokio::spawn(client.stream_owned(chat_body(model, prompt, 150)));
    let (beside, elsewhere) = (ask("m", "beside it"), ask("other", "of another model"));
    fleet.until_metric(&base, "neuron_generation_tokens_total", &["model=\"m\""], 5.0).await.unwrap();
    let code = async || {
        let answer = direct.stream(&chat_body("m", lost, 4), |_| {}).await.unwrap();
        assert!(!answer.done && answer.text.is_empty(), "{answer:?}");
        answer.error.unwrap()["code"].clone()
    };
    assert_eq!(code().await, "engine_failed");
    check("beside it", 150, &beside.await.unwrap().unwrap());
    check("of another model", 150, &elsewhere.await.unwrap().unwrap());
    assert_eq!(fleet.metric(&base, "neuron_engine_restarts_total", &["model=\"m\""]).await.unwrap(), 1.0);
    assert_eq!(fleet.metric(&base, "neuron_model_loads_total", &["model=\"other\""]).await.unwrap(), 1.0);

    assert_eq!(code().await, "engine_failed");
    let model = |node: &serde_json::Value, id: &str| {
        let models = node["status"]["models"].as_array().unwrap();
        models.iter().find(|model| model["id"] == id).unwrap().clone()
    };
    let seen = fleet.until_status(&gateway, "a", |node| model(node, "m")["state"] == "failed").await.unwrap();
    let failure = model(&seen, "m")["failure"].clone();
    let wanted = "the engine has ended by itself; lost 2 times within 60 s, and given up";
    assert_eq!(failure, wanted, "and the one who watches is told why");
    assert_eq!(code().await, "model_not_here");
    check("still there", 5, &client.stream(&chat_body("other", "still there", 5), |_| {}).await.unwrap());
    let (status, body) = direct.at("/models/load").json(&serde_json::json!({"model_id": "m"})).await.unwrap();
    assert_eq!(status, 200, "an order brings it back: {body}");
    check("back", 5, &client.stream(&chat_body("m", "back", 5), |_| {}).await.unwrap());
}
