//! Streams that move from workers that leave, or let a model go, to others: their clients see nothing of it.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use fleet_tests::{Client, Fleet, chat_body, fake_answer, programs};
use serde_json::{Value, json};

fn fleet() -> Fleet {
    Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap()
}

fn fake(more: &str) -> String {
    format!("{more}[[default_models]]\nid = \"m\"\nharness = \"fake\"\n[harness.fake]\nstep_ms = 20\n")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_is_unloaded_under_its_streams_and_they_go_on_elsewhere() {
    let fleet = fleet();
    let config = fake("[drain]\nhandoff_s = 0.0\n");
    let (a, b) = (fleet.neuron("a", &config).await.unwrap(), fleet.neuron("b", &config).await.unwrap());
    let gateway = fleet.gateway(&[&a.control, &b.control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let asked: Vec<_> =
        (0..12).map(|i| tokio::spawn(client.stream_owned(chat_body("m", &format!("move {i}"), 200)))).collect();
    tokio::time::sleep(Duration::from_millis(600)).await;
    let status: Value = reqwest::get(format!("{}/api/status", gateway.admin)).await.unwrap().json().await.unwrap();
    let data = status["nodes"][0]["status"]["data_address"].as_str().unwrap();
    let begun = Instant::now();
    let unload = reqwest::Client::new().post(format!("http://{data}/models/unload")).json(&json!({"model_id": "m"}));
    let answer: Value = unload.send().await.unwrap().json().await.unwrap();
    let took = begun.elapsed();
    assert_eq!(answer["streams_cut"], 0, "{answer}");
    for (i, answer) in futures_util::future::join_all(asked).await.into_iter().enumerate() {
        let answer = answer.unwrap().unwrap();
        assert!(answer.whole(), "{answer:?}");
        assert_eq!(answer.text, fake_answer(&format!("move {i}"), 200));
    }
    let moved = fleet.metric(&gateway.admin, "cortex_continuations_total", &["handed_over"]).await.unwrap();
    eprintln!("{moved} streams handed over; the model was gone after {took:?}");
    assert!(moved >= 4.0 && took < Duration::from_secs(3), "{moved} moved in {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_hands_streams_over_at_the_soft_deadline_and_one_without_a_successor_runs_to_its_end() {
    let fleet = fleet();
    let config = fake("[drain]\nhandoff_s = 0.5\ndeadline_s = 30.0\n");
    let mut a = fleet.neuron("a", &config).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let alone = tokio::spawn(client.stream_owned(chat_body("m", "alone", 150)));
    tokio::time::sleep(Duration::from_millis(300)).await;
    a.process.terminate().unwrap();
    let answer = alone.await.unwrap().unwrap();
    assert!(answer.whole() && answer.text == fake_answer("alone", 150), "{answer:?}");
    assert_eq!(a.process.wait(Duration::from_secs(10)).unwrap().code(), Some(0));
    assert!(a.process.log().contains("offered"), "it was offered, and nobody could take it");

    let (mut a, b) = (fleet.neuron("c", &config).await.unwrap(), fleet.neuron("d", &config).await.unwrap());
    let gateway = fleet.gateway(&[&a.control, &b.control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let asked: Vec<_> =
        (0..12).map(|i| tokio::spawn(client.stream_owned(chat_body("m", &format!("leave {i}"), 200)))).collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let begun = Instant::now();
    a.process.terminate().unwrap();
    let code = a.process.wait(Duration::from_secs(10)).unwrap().code();
    let took = begun.elapsed();
    for (i, answer) in futures_util::future::join_all(asked).await.into_iter().enumerate() {
        let answer = answer.unwrap().unwrap();
        assert!(answer.whole(), "{answer:?}");
        assert_eq!(answer.text, fake_answer(&format!("leave {i}"), 200));
    }
    eprintln!("the worker was gone {took:?} after SIGTERM");
    assert!(code == Some(0) && took < Duration::from_millis(3500), "exit {code:?} after {took:?}");
}
