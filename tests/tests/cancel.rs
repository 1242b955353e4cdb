//! Requests that are cancelled in real fleets: the client gets what was generated and a proper end, the place is free at
//! once, and whoever asked to be told is told.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use fleet_tests::scene::{fake, metric, until_running};
use fleet_tests::{Answer, Client, Fleet, Gateway, Neuron, chat_body, fake_answer, programs};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

/// One that nobody stops says so many tokens: at 10 ms each far longer than any test.
const TOKENS: u32 = 3000;
const PACED: &str = "[harness.fake]\nstep_ms = 10\n";

fn fleet() -> Fleet {
    Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap()
}

/// Begins a stream of that id.
fn begin(client: &Client, id: &str, body: Value) -> JoinHandle<anyhow::Result<Answer>> {
    tokio::spawn(client.named(id).stream_owned(body))
}

async fn cancel(fleet: &Fleet, gateway: &Gateway, arguments: &[&str]) -> String {
    let (code, text) = fleet.cortex(&[&["cancel", "--admin", &gateway.admin], arguments].concat()).await.unwrap();
    assert_eq!(code, Some(0), "{text}");
    text
}

/// Waits until the gateway runs so many requests of that many tokens at least; returns them.
async fn until_said(gateway: &Gateway, count: usize, tokens: u64) -> Vec<Value> {
    let client = Client::new(&gateway.admin).unwrap();
    let begun = Instant::now();
    loop {
        let (_, running) = client.get("/api/requests").await.unwrap();
        let requests = running["requests"].as_array().unwrap().clone();
        if requests.len() == count && requests.iter().all(|request| request["tokens"].as_u64().unwrap() >= tokens) {
            return requests;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{running:#}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn is_cancelled(choice: &Value) -> bool {
    choice["finish_reason"] == "length" && choice["stop_reason"] == "cancelled"
}

/// Checks a stream: some of the oracle's tokens, one end a choice that says why, usage, `[DONE]`.
fn check(answer: &Answer, prompt: &str, choices: usize) {
    assert!(answer.whole(), "{}", answer.raw);
    let events = answer.raw.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
    let events: Vec<Value> = events.filter_map(|data| serde_json::from_str(data).ok()).collect();
    for index in 0..choices {
        let of_choice = events.iter().map(|event| &event["choices"][0]).filter(|choice| choice["index"] == index);
        let mut text = String::new();
        let (mut roles, mut ends) = (0, 0);
        for choice in of_choice {
            assert_eq!(ends, 0, "nothing comes after a choice's end");
            roles += usize::from(choice["delta"]["role"] == "assistant");
            ends += usize::from(is_cancelled(choice));
            text += choice["delta"]["content"].as_str().unwrap_or_default();
        }
        assert_eq!((roles, ends), (1, 1), "{}", answer.raw);
        assert!(!text.is_empty() && fake_answer(prompt, TOKENS).starts_with(&text), "{text}");
    }
    assert!(answer.raw.ends_with("data: [DONE]\n\n"));
}

async fn is_free(fleet: &Fleet, worker: &Neuron) {
    let begun = Instant::now();
    while metric(fleet, worker, "neuron_num_requests_running").await.unwrap() > 0.0 {
        assert!(begun.elapsed() < Duration::from_secs(1), "its place is still taken");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_stream_ends_with_what_it_has_and_the_hook_is_told() {
    let fleet = fleet();
    let diary = fleet.folder().join("diary");
    let hook = format!(
        "[[hooks.run]]\non = 'stop_generation'\ncommand = ['sh', '-c', 'cat >> {}; sleep 1']\n",
        diary.display()
    );
    let a = fleet.neuron("a", &fake(&(PACED.to_string() + &hook))).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let body = |n: u32| {
        let mut body = chat_body("m", "tell me", TOKENS);
        body["stream_options"] = json!({"include_usage": true});
        body["n"] = n.into();
        body
    };
    let (one, two) = (begin(&client, "one", body(1)), begin(&client, "two", body(2)));
    let running = until_said(&gateway, 2, 4).await;
    let two_runs = running.iter().find(|request| request["request_id"] == "two").unwrap();
    assert_eq!((&two_runs["node"], &two_runs["attempt"], &two_runs["model"]), (&json!("a"), &json!(1), &json!("m")));
    let (code, text) = fleet.cortex(&["requests", "--admin", &gateway.admin]).await.unwrap();
    assert!(code == Some(0) && text.contains("one ") && text.contains("two "), "{text}");
    let begun = Instant::now();
    let text = cancel(&fleet, &gateway, &["one"]).await;
    assert!(text.contains("one of m (a): cancelled") && text.contains("1 cancelled"), "{text}");
    let answer = one.await.unwrap().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2), "the hook of a second holds nobody");
    check(&answer, "tell me", 1);
    let said = answer.usage.as_ref().unwrap()["completion_tokens"].as_u64().unwrap();
    assert!(said > 3 && said < u64::from(TOKENS), "{said}");
    // The completion's id names a request too.
    cancel(&fleet, &gateway, &[two_runs["completion_id"].as_str().unwrap()]).await;
    check(&two.await.unwrap().unwrap(), "tell me", 2);
    is_free(&fleet, &a).await;
    let labels = ["model=\"m\"", "reason=\"id\""];
    let base = format!("http://{}", a.control);
    fleet.until_metric(&base, "neuron_requests_cancelled_total", &labels, 2.0).await.unwrap();
    let ended = ["outcome=\"request_cancelled\""];
    fleet.until_metric(&gateway.admin, "cortex_requests_total", &ended, 2.0).await.unwrap();
    fleet.until_metric(&base, "neuron_hook_runs_total", &["stop_generation", "ok"], 2.0).await.unwrap();
    let diary = std::fs::read_to_string(&diary).unwrap();
    let first: Value = serde_json::Deserializer::from_str(&diary).into_iter().next().unwrap().unwrap();
    assert_eq!((&first["event"], &first["model"]), (&json!("stop_generation"), &json!("m")));
    assert_eq!((&first["detail"]["request_id"], &first["detail"]["tokens"]), (&json!("one"), &json!(said)));
    let (code, text) = fleet.cortex(&["cancel", "one", "--admin", &gateway.admin]).await.unwrap();
    assert!(code == Some(1) && text.contains("no request 'one' runs"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_answer_is_folded_of_what_there_is() {
    let fleet = fleet();
    let a = fleet.neuron("a", &fake(PACED)).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let seen = fleet.status(&gateway, "a").await.unwrap();
    let worker = format!("http://{}", seen["status"]["data_address"].as_str().unwrap());
    let body = json!({"model": "m", "max_tokens": TOKENS, "temperature": 0, "n": 2,
        "messages": [{"role": "user", "content": "whole"}]});
    let text_body = json!({"model": "m", "max_tokens": TOKENS, "temperature": 0, "prompt": vec!["user:whole\n"; 3]});
    for direct in [false, true] {
        let client = Client::new(if direct { &worker } else { &gateway.api }).unwrap();
        let chat = tokio::spawn(client.named("chat").json_owned(body.clone()));
        let text = tokio::spawn(client.at("/v1/completions").named("text").json_owned(text_body.clone()));
        until_running(&fleet, &a, 4.0).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        for id in ["chat", "text"] {
            if direct {
                let (status, answer) = client.at("/requests/x/cancel").json(&json!({})).await.unwrap();
                assert_eq!((status, &answer["error"]["param"]), (404, &json!("id")), "{answer}");
                let path: &'static str = if id == "chat" { "/requests/chat/cancel" } else { "/requests/text/cancel" };
                let (status, answer) = client.at(path).json(&json!({})).await.unwrap();
                assert_eq!((status, answer), (200, json!({"id": id, "cancelled": 1})));
            } else {
                cancel(&fleet, &gateway, &[id]).await;
            }
        }
        for (answer, choices) in [(chat.await.unwrap().unwrap(), 2), (text.await.unwrap().unwrap(), 3)] {
            let (status, answer) = answer;
            assert_eq!(status, 200, "{answer}");
            assert_eq!(answer["choices"].as_array().unwrap().len(), choices);
            for choice in answer["choices"].as_array().unwrap() {
                assert!(is_cancelled(choice), "{choice}");
                let said = choice["message"]["content"].as_str().or(choice["text"].as_str()).unwrap();
                assert!(!said.is_empty() && fake_answer("whole", TOKENS).starts_with(said), "{said}");
            }
            assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() > 0);
        }
        is_free(&fleet, &a).await;
        let stream = begin(&client, "stream", chat_body("m", "direct", TOKENS));
        until_running(&fleet, &a, 1.0).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        if direct {
            assert_eq!(client.at("/requests/stream/cancel").json(&json!({})).await.unwrap().0, 200);
        } else {
            cancel(&fleet, &gateway, &["stream"]).await;
        }
        check(&stream.await.unwrap().unwrap(), "direct", 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_no_token_yet_gets_an_error_that_nobody_tries_again() {
    let fleet = fleet();
    let config = fake(&(PACED.to_string() + "[scheduler]\nmax_running = 1\n"));
    let a = fleet.neuron("a", &config).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let first = begin(&client, "first", chat_body("m", "first", TOKENS));
    until_said(&gateway, 1, 3).await;
    let embed = client.at("/v1/embeddings").named("embed").json_owned(json!({"model": "m", "input": ["a", "b"]}));
    let (queued, embed) = (begin(&client, "queued", chat_body("m", "queued", TOKENS)), tokio::spawn(embed));
    let base = format!("http://{}", a.control);
    fleet.until_metric(&base, "neuron_num_requests_waiting", &[], 3.0).await.unwrap();
    let attempts = fleet.metric(&gateway.admin, "cortex_attempts_total", &[]).await.unwrap();
    cancel(&fleet, &gateway, &["queued"]).await;
    cancel(&fleet, &gateway, &["embed"]).await;
    let answer = queued.await.unwrap().unwrap();
    assert_eq!((answer.status, &answer.error.unwrap()["code"]), (499, &json!("request_cancelled")));
    let (status, answer) = embed.await.unwrap().unwrap();
    assert_eq!((status, &answer["error"]["code"]), (499, &json!("request_cancelled")), "{answer}");
    assert_eq!(metric(&fleet, &a, "neuron_num_requests_waiting").await.unwrap(), 0.0);
    assert_eq!(until_said(&gateway, 1, 3).await[0]["request_id"], "first", "it runs on");
    assert_eq!(fleet.metric(&gateway.admin, "cortex_retries_total", &[]).await.unwrap(), 0.0);
    assert!(fleet.metric(&gateway.admin, "cortex_attempts_total", &[]).await.unwrap() <= attempts + 2.0);
    cancel(&fleet, &gateway, &["first"]).await;
    check(&first.await.unwrap().unwrap(), "first", 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_requests_of_a_model_end_and_no_other_ones() {
    let fleet = fleet();
    let config = fake("[[default_models]]\nid = 'org/other'\nharness = 'fake'\n") + PACED;
    let (a, b) = (fleet.neuron("a", &config).await.unwrap(), fleet.neuron("b", &config).await.unwrap());
    let gateways = [
        fleet.gateway(&[&a.control, &b.control], "").await.unwrap(),
        fleet.gateway(&[&a.control, &b.control], "").await.unwrap(),
    ];
    let mut streams = Vec::new();
    for i in 0..12 {
        let (model, gateway) = (["m", "org/other"][i % 2], &gateways[i / 2 % 2]);
        let client = Client::new(&gateway.api).unwrap();
        streams.push((model, begin(&client, &format!("r{i}"), chat_body(model, "many", TOKENS))));
    }
    for gateway in &gateways {
        until_said(gateway, 6, 3).await;
    }
    let text = cancel(&fleet, &gateways[0], &["--model", "org/other"]).await;
    assert!(text.contains("6 cancelled"), "{text}");
    for (model, stream) in streams {
        if model == "m" {
            assert!(!stream.is_finished());
            stream.abort();
        } else {
            check(&stream.await.unwrap().unwrap(), "many", 1);
        }
    }
    let (code, text) = fleet.cortex(&["cancel", "--model", "nobody", "--admin", &gateways[0].admin]).await.unwrap();
    assert!(code == Some(1) && text.contains("no worker has the model 'nobody'"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_between_two_workers_is_cancelled_where_it_waits() {
    let fleet = fleet();
    let mut a = fleet.neuron("a", &fake(PACED)).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let body = json!({"model": "m", "max_tokens": TOKENS, "messages": [{"role": "user", "content": "whole"}]});
    let (stream, whole) = (
        begin(&client, "stream", chat_body("m", "cut off", TOKENS)),
        tokio::spawn(client.named("whole").json_owned(body)),
    );
    until_said(&gateway, 2, 1).await;
    a.process.kill().unwrap();
    let begun = Instant::now();
    let waiting = |request: &Value| request["node"].is_null();
    while !until_said(&gateway, 2, 1).await.iter().all(waiting) {
        assert!(begun.elapsed() < Duration::from_secs(15));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let unbegun = begin(&client, "unbegun", chat_body("m", "never begun", TOKENS));
    until_said(&gateway, 3, 0).await;
    let begun = Instant::now();
    for id in ["stream", "whole", "unbegun"] {
        let text = cancel(&fleet, &gateway, &[id]).await;
        assert!(text.contains("(no worker yet): cancelled"), "{text}");
    }
    check(&stream.await.unwrap().unwrap(), "cut off", 1);
    let (status, answer) = whole.await.unwrap().unwrap();
    assert_eq!((status, &answer["error"]["code"]), (499, &json!("request_cancelled")), "{answer}");
    assert_eq!(unbegun.await.unwrap().unwrap().status, 499);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_hangs_can_not_keep_what_was_cancelled() {
    let fleet = fleet();
    let a = fleet.neuron("a", &fake(PACED)).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let stream = begin(&client, "stream", chat_body("m", "stuck", TOKENS));
    until_said(&gateway, 1, 3).await;
    a.process.signal(rustix::process::Signal::STOP).unwrap();
    let begun = Instant::now();
    let text = cancel(&fleet, &gateway, &["stream"]).await;
    assert!(text.contains("1 cancelled"), "{text}");
    check(&stream.await.unwrap().unwrap(), "stuck", 1);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_waits_for_its_model_does_not_wait_on() {
    let fleet = fleet();
    let diary = fleet.folder().join("diary");
    let config = format!(
        "[harness.fake]\nload_ms = 20000\n[[models]]\nid = 'late'\naliases = ['slow']\nharness = 'fake'\nmemory_mib = 1\n\
         [[hooks.run]]\non = 'stop_generation'\ncommand = ['sh', '-c', 'cat >> {}']\n",
        diary.display()
    );
    let a = fleet.neuron("a", &config).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let seen = fleet.status(&gateway, "a").await.unwrap();
    let direct = Client::new(&format!("http://{}", seen["status"]["data_address"].as_str().unwrap())).unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let ask = |client: &Client, id: &str| begin(client, id, chat_body("slow", "when?", 8));
    let (through, straight, third) = (ask(&client, "through"), ask(&direct, "straight"), ask(&direct, "third"));
    fleet.until_status(&gateway, "a", |node| node["status"]["models"][0]["state"] == "loading").await.unwrap();
    until_said(&gateway, 1, 0).await;
    let begun = Instant::now();
    for id in ["through", "straight"] {
        cancel(&fleet, &gateway, &[id]).await;
    }
    // By the model's own id, though it was asked for by another name.
    cancel(&fleet, &gateway, &["--model", "late"]).await;
    for answer in [through, straight, third] {
        let answer = answer.await.unwrap().unwrap();
        let code = answer.error.map(|error| error["code"].clone());
        assert_eq!((answer.status, code), (499, Some(json!("request_cancelled"))));
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let base = format!("http://{}", a.control);
    fleet.until_metric(&base, "neuron_hook_runs_total", &["stop_generation", "ok"], 3.0).await.unwrap();
    for (reason, count) in [("reason=\"id\"", 2.0), ("reason=\"model\"", 1.0)] {
        let told = fleet.metric(&base, "neuron_requests_cancelled_total", &["model=\"late\"", reason]).await.unwrap();
        assert_eq!(told, count, "{reason}");
    }
    let diary = std::fs::read_to_string(&diary).unwrap();
    let told: Vec<Value> = serde_json::Deserializer::from_str(&diary).into_iter().map(Result::unwrap).collect();
    let ids: std::collections::BTreeSet<&str> =
        told.iter().filter_map(|told| told["detail"]["request_id"].as_str()).collect();
    assert_eq!(ids, ["straight", "third", "through"].into());
    assert!(told.iter().all(|told| told["detail"]["tokens"] == 0 && told["model"] == "late"), "{diary}");
}
