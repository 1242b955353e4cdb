//! Orders of operators and rollouts to real workers: cordons, restarts, upgrades, holds, and what refuses them.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use fleet_tests::scene::{asked, durable, fake, ready, stream, until_running};
use fleet_tests::{Client, Fleet, Gateway, chat_body, fake_answer, free_port, programs};
use serde_json::{Value, json};

fn fleet() -> Fleet {
    Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap()
}

async fn post(gateway: &Gateway, path: &str, body: Value) -> (u16, Value) {
    let request = reqwest::Client::new().post(format!("{}/api/nodes/{path}", gateway.admin)).json(&body);
    let response = request.send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cordon_outlives_worker_and_gateway_and_running_work_goes_on_under_it() {
    let fleet = fleet();
    let config = fake("[harness.fake]\nstep_ms = 10\n");
    let port = free_port().unwrap();
    let mut a = ready(&fleet, "a", port, &config).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "[proxy]\nroute_wait_ms = 300\n").await.unwrap();
    let running = stream(&Client::new(&gateway.api).unwrap(), "go on", 200);
    until_running(&fleet, &a, 1.0).await.unwrap();
    let (code, text) = fleet.cortex(&["cordon", "a", "--admin", &gateway.admin]).await.unwrap();
    assert_eq!(code, Some(0), "{text}");
    let refused = asked(&gateway, "new").await.unwrap();
    assert_eq!(refused.error.unwrap()["code"], "no_replica_available");
    let seen = fleet.status(&gateway, "a").await.unwrap();
    assert_eq!((&seen["status"]["state"]["state"], &seen["status"]["intent"]), (&json!("ready"), &json!("cordon")));
    let data = format!("http://{}", seen["status"]["data_address"].as_str().unwrap());
    let probe = reqwest::get(format!("http://{}/readyz", a.control)).await.unwrap();
    assert_eq!(
        (probe.status().as_u16(), probe.text().await.unwrap().as_str()),
        (503, "ready, intent cordon, default models 1/1\n")
    );
    let direct = Client::new(&data).unwrap().stream(&chat_body("m", "direct", 4), |_| {}).await.unwrap();
    assert_eq!(direct.error.unwrap()["code"], "draining", "the worker's own refusal");
    let load = reqwest::Client::new().post(format!("{data}/models/load"));
    let load = load.json(&json!({"model_id": "second", "harness": "fake"})).send().await.unwrap();
    assert_eq!(load.status().as_u16(), 503, "nothing is loaded into a cordoned worker");
    let answer = running.await.unwrap().unwrap();
    assert!(answer.whole() && answer.text == fake_answer("go on", 200), "{answer:?}");
    let (_, text) = fleet.cortex(&["status", "--admin", &gateway.admin]).await.unwrap();
    assert!(text.contains("cordon"), "{text}");

    a.process.terminate().unwrap();
    assert_eq!(a.process.wait(Duration::from_secs(10)).unwrap().code(), Some(0));
    drop(gateway);
    let a = durable(&fleet, "a", port, &config).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "[proxy]\nroute_wait_ms = 300\n").await.unwrap();
    let ready = |node: &Value| node["status"]["state"]["state"] == "ready";
    let seen = fleet.until_status(&gateway, "a", ready).await.unwrap();
    assert_eq!((&seen["status"]["intent"], &seen["routable"]), (&json!("cordon"), &json!(false)));
    assert_eq!(seen["status"]["models"][0]["state"], "ready", "its models are there");
    assert_eq!(asked(&gateway, "new").await.unwrap().status, 503);
    let (code, text) = fleet.cortex(&["uncordon", "a", "--admin", &gateway.admin]).await.unwrap();
    assert_eq!(code, Some(0), "{text}");
    assert!(asked(&gateway, "new").await.unwrap().whole());
    let (code, text) = fleet.cortex(&["drain", "nobody", "--admin", &gateway.admin]).await.unwrap();
    assert!(code == Some(1) && text.contains("this gateway knows a (127.0.0.1:"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_ends_the_process_and_a_stale_order_changes_nothing() {
    use control::proto::{self, control_client::ControlClient};
    let fleet = fleet();
    let port = free_port().unwrap();
    let config = fake("");
    let mut a = ready(&fleet, "a", port, &config).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let (waiting, life) = {
        let arguments = ["restart", "a", "--admin", &gateway.admin].map(String::from);
        let fleet = &fleet;
        let command = async move {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            fleet.cortex(&arguments).await.unwrap()
        };
        let life = async {
            assert_eq!(a.process.wait(Duration::from_secs(10)).unwrap().code(), Some(0), "a clean end");
            ready(fleet, "a", port, &config).await.unwrap()
        };
        tokio::join!(command, life)
    };
    assert_eq!(waiting.0, Some(0), "{}", waiting.1);
    assert!(asked(&gateway, "served by the next life").await.unwrap().whole());
    let before = fleet.status(&gateway, "a").await.unwrap()["status"].clone();
    assert_eq!((&before["intent"], &before["epoch"]), (&json!("none"), &json!(1)));
    let mut client = ControlClient::connect(format!("http://{}", life.control)).await.unwrap();
    let incarnation = |random: u64| {
        let counter = before["incarnation"]["counter"].as_u64().unwrap();
        Some(proto::Incarnation { counter, random })
    };
    let right = before["incarnation"]["random"].as_u64().unwrap();
    let order = proto::SetIntentRequest {
        seen_epoch: 1,
        intent: proto::Intent::Restart.into(),
        incarnation: incarnation(right),
        ..Default::default()
    };
    for stale in [
        proto::SetIntentRequest { seen_epoch: 0, ..order.clone() },
        proto::SetIntentRequest { seen_epoch: 2, ..order.clone() },
        proto::SetIntentRequest { incarnation: incarnation(right ^ 1), ..order.clone() },
        proto::SetIntentRequest { incarnation: None, ..order },
    ] {
        let refused = client.set_intent(stale.clone()).await.unwrap_err();
        assert_eq!(refused.code() as i32, 10, "{stale:?}: {refused}");
    }
    let after = fleet.status(&gateway, "a").await.unwrap()["status"].clone();
    assert_eq!(
        (&after["epoch"], &after["intent"], &after["state"]),
        (&before["epoch"], &before["intent"], &before["state"])
    );
    assert!(asked(&gateway, "still served").await.unwrap().whole());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_that_can_not_be_written_down_is_refused_and_changes_nothing() {
    let fleet = fleet();
    let port = free_port().unwrap();
    let mut a = ready(&fleet, "a", port, &fake("")).await.unwrap();
    let b = fleet.neuron("b", &fake("")).await.unwrap();
    let gateway = fleet.gateway(&[&a.control, &b.control], "").await.unwrap();
    // A name that can't be written to, also by those whom permissions don't stop.
    let blocked = fleet.state_dir("a").join("intent.json.new");
    std::fs::create_dir(&blocked).unwrap();
    for action in ["drain", "cordon", "restart"] {
        let (status, answer) = post(&gateway, &format!("a/{action}"), json!({})).await;
        let message = answer["error"]["message"].as_str().unwrap().to_string();
        assert!(status == 500 && message.contains("could not be written"), "{status} {message}");
        let seen = fleet.status(&gateway, "a").await.unwrap()["status"].clone();
        assert_eq!(
            (&seen["epoch"], &seen["intent"], &seen["state"]["state"]),
            (&json!(0), &json!("none"), &json!("ready"))
        );
    }
    assert!(asked(&gateway, "as before").await.unwrap().whole());
    let (status, answer) = post(&gateway, "b/cordon", json!({})).await;
    assert!(status == 400 && answer["error"]["message"].as_str().unwrap().contains("node.state_dir"), "{answer}");
    assert_eq!(post(&gateway, "b/explode", json!({})).await.0, 404);
    assert_eq!(post(&gateway, "b/drain", json!({"deadline_s": -1})).await.0, 400);
    assert_eq!(post(&gateway, "b/drain", json!({"dead_line": 1})).await.0, 400);
    std::fs::remove_dir(&blocked).unwrap();
    assert_eq!(post(&gateway, "a/cordon", json!({})).await.0, 200);
    // What is damaged is nobody's guess.
    a.process.kill().unwrap();
    std::fs::write(fleet.state_dir("a").join("intent.json"), "{\"epoch\": 1,").unwrap();
    let mut a = fleet.durable_neuron("a", port, &fake("")).unwrap();
    assert_eq!(a.process.wait(Duration::from_secs(20)).unwrap().code(), Some(78));
    assert!(a.process.log().contains("intent.json is damaged"), "{}", a.process.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_runs_on_the_way_and_its_failure_is_shown_by_the_life_that_follows() {
    let fleet = fleet();
    let port = free_port().unwrap();
    let (mark, alive) = (fleet.folder().join("mark"), fleet.folder().join("alive"));
    let config = fake(&format!(
        "[upgrade.good]\nargv = [\"touch\", {mark:?}]\n\
         [upgrade.slow]\nargv = [\"sh\", \"-c\", \"(sleep 2; touch {}) & wait\"]\ntimeout_s = 0.5\n",
        alive.display()
    ));
    let mut a = ready(&fleet, "a", port, &config).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let (code, text) = fleet.cortex(&["upgrade", "best", "a", "--admin", &gateway.admin]).await.unwrap();
    assert!(code == Some(1) && text.contains("it has good, slow"), "{text}");
    for (name, right) in [("good", true), ("slow", false)] {
        let arguments = ["upgrade", name, "a", "--admin", &gateway.admin];
        let command = fleet.cortex(&arguments);
        let next = async {
            while a.process.alive().unwrap() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            assert_eq!(a.process.wait(Duration::from_secs(1)).unwrap().code(), Some(0), "a failure stops no restart");
            a = ready(&fleet, "a", port, &config).await.unwrap();
        };
        let (said, ()) = tokio::join!(command, next);
        let (code, text) = said.unwrap();
        assert_eq!(code == Some(0), right, "{text}");
        let ended = |node: &Value| node["status"]["upgrade"]["name"] == name;
        let seen = fleet.until_status(&gateway, "a", ended).await.unwrap();
        assert_eq!(seen["status"]["upgrade"]["ok"], right);
        assert!(right || text.contains("took longer than 0.5 s"), "{text}");
    }
    assert!(mark.exists());
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(!alive.exists(), "the timeout ends the whole process group");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_life_after_a_rollouts_restart_serves_the_canary_alone_until_opened() {
    use control::proto::{self, control_client::ControlClient};
    let fleet = fleet();
    let port = free_port().unwrap();
    let config = fake("");
    let right = fake_answer("two and two", 8);
    let mut a = ready(&fleet, "a", port, &config).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "[proxy]\nroute_wait_ms = 200\n").await.unwrap();
    // Opened by its coordinator; by itself with a right answer; not with a wrong one.
    for (round, (ttl, answer)) in
        [(60_000, right.as_str()), (500, right.as_str()), (500, "five")].into_iter().enumerate()
    {
        let seen = fleet.until_status(&gateway, "a", |node| node["routable"] == true).await.unwrap()["status"].clone();
        let mut client = ControlClient::connect(format!("http://{}", a.control)).await.unwrap();
        let life = &seen["incarnation"];
        let order = proto::SetIntentRequest {
            seen_epoch: seen["epoch"].as_u64().unwrap(),
            intent: proto::Intent::Restart.into(),
            incarnation: Some(proto::Incarnation {
                counter: life["counter"].as_u64().unwrap(),
                random: life["random"].as_u64().unwrap(),
            }),
            rollout: Some(proto::RolloutClaim {
                rollout_id: "r-1".into(),
                lease_revision: 5 + round as u64,
                hold_ttl_ms: ttl,
                canary: Some(proto::Canary {
                    model_id: "m".into(),
                    prompt: "two and two".into(),
                    answer: answer.into(),
                }),
            }),
            ..Default::default()
        };
        client.set_intent(order).await.unwrap();
        assert_eq!(a.process.wait(Duration::from_secs(10)).unwrap().code(), Some(0));
        a = durable(&fleet, "a", port, &config).await.unwrap();
        let back = |node: &Value| node["status"]["incarnation"] != *life && !node["status"]["data_address"].is_null();
        if ttl == 60_000 {
            let held = |node: &Value| back(node) && node["status"]["state"]["state"] == "held";
            let seen = fleet.until_status(&gateway, "a", held).await.unwrap();
            assert_eq!((&seen["routable"], &seen["status"]["hold"]["rollout"]), (&json!(false), &json!("r-1")));
            assert_eq!(asked(&gateway, "hello").await.unwrap().status, 503);
            let data = format!("http://{}/v1/chat/completions", seen["status"]["data_address"].as_str().unwrap());
            let ask = |rollout: &'static str| {
                let request = reqwest::Client::new().post(&data).json(&chat_body("m", "hello", 4));
                request.header("x-cortex-canary", rollout).send()
            };
            assert_eq!(ask("r-2").await.unwrap().status().as_u16(), 503);
            assert_eq!(ask("r-1").await.unwrap().status().as_u16(), 200);
            let mut client = ControlClient::connect(format!("http://{}", a.control)).await.unwrap();
            let release = |lease_revision| proto::ReleaseHoldRequest {
                rollout_id: "r-1".into(),
                lease_revision,
                prolong_ms: None,
            };
            assert_eq!(client.release_hold(release(4)).await.unwrap_err().code() as i32, 10, "an old lease");
            client.release_hold(release(5)).await.unwrap();
        }
        if answer == "five" {
            let failed = |node: &Value| {
                let waits = node["status"]["drain"]["waiting_for"].as_str().unwrap_or_default();
                back(node) && waits.contains("answered")
            };
            let seen = fleet.until_status(&gateway, "a", failed).await.unwrap();
            assert_eq!(seen["status"]["state"]["state"], "held", "a wrong answer opens nothing");
            assert_eq!(asked(&gateway, "hello").await.unwrap().status, 503);
        } else {
            let open = |node: &Value| back(node) && node["routable"] == true;
            fleet.until_status(&gateway, "a", open).await.unwrap();
            assert!(asked(&gateway, "hello").await.unwrap().whole());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_needs_the_fleets_token_where_there_is_one() {
    let fleet = fleet();
    let token = fleet.folder().join("token");
    std::fs::write(&token, "0123456789abcdef0123456789abcdef\n").unwrap();
    let control = format!("127.0.0.1:{}", free_port().unwrap());
    let config = format!("{}[control]\ntoken_file = {token:?}\nbind = \"{control}\"\n", fake(""));
    let a = fleet.neuron_with_control(&control, &config).unwrap();
    fleet.until_ok(&format!("http://{control}/readyz"), &a.process).await.unwrap();
    let gateway = fleet.gateway(&[&control], &format!("[fleet]\ntoken_file = {token:?}\n")).await.unwrap();
    let (status, answer) = post(&gateway, "a/uncordon", json!({})).await;
    assert_eq!((status, &answer["error"]["code"]), (401, &json!("invalid_api_key")));
    let bare = ["uncordon", "a", "--admin", &gateway.admin];
    let (code, text) = fleet.cortex(&bare).await.unwrap();
    assert!(code == Some(1) && text.contains("need the shared token"), "{text}");
    assert_eq!(fleet.status(&gateway, "a").await.unwrap()["status"]["epoch"], 0, "nothing was ordered");
    let shown = [&bare[..], &["--token-file", token.to_str().unwrap()]].concat();
    let (code, text) = fleet.cortex(&shown).await.unwrap();
    assert!(code == Some(0) && text.contains("epoch 1"), "{text}");
    let mut client = control::proto::control_client::ControlClient::connect(format!("http://{control}")).await.unwrap();
    let refused = client.set_intent(control::proto::SetIntentRequest::default()).await.unwrap_err();
    assert_eq!(refused.code() as i32, 16, "the worker wants it too: {refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_cannot_be_heard_is_told_of_with_the_reason() {
    let fleet = fleet();
    for (name, token) in [("ours", "0123456789abcdef"), ("theirs", "fedcba9876543210")] {
        std::fs::write(fleet.folder().join(name), token).unwrap();
    }
    let file = |name: &str| fleet.folder().join(name);
    let (guarded, closed) =
        (format!("127.0.0.1:{}", free_port().unwrap()), format!("127.0.0.1:{}", free_port().unwrap()));
    let control = format!("[control]\nbind = \"{guarded}\"\ntoken_file = {:?}\n", file("theirs"));
    let worker = fleet.neuron_with_control(&guarded, &control).unwrap();
    fleet.until_ok(&format!("http://{guarded}/readyz"), &worker.process).await.unwrap();
    let config = format!("[fleet]\ntoken_file = {:?}\nready_after_ms = 300\n", file("ours"));
    let gateway = fleet.gateway(&[&guarded, &closed], &config).await.unwrap();
    let refused = "can't be heard: the control port needs the shared token";
    let mut text = String::new();
    for _ in 0..100 {
        text = fleet.cortex(&["status", "--admin", &gateway.admin]).await.unwrap().1;
        if text.contains(refused) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(text.contains(refused) && text.contains("can't be heard: Connection refused"), "{text}");
    let ours = file("ours");
    let order = ["cordon", &closed, "--admin", &gateway.admin, "--token-file", ours.to_str().unwrap()];
    let (code, text) = fleet.cortex(&order).await.unwrap();
    assert!(code == Some(1) && text.contains("was never heard from: Connection refused"), "{text}");
    let log = gateway.process.log();
    let said = log.lines().filter(|line| line.contains("the worker can't be heard")).count();
    assert_eq!(said, 2, "one line a reason, however often they are dialled: {log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_says_where_it_found_no_gateway_and_ends_quietly_when_nobody_reads_it() {
    let fleet = fleet();
    let (code, text) = fleet.cortex(&["status", "--admin", "http://127.0.0.1:1"]).await.unwrap();
    assert!(code == Some(1) && text.contains("http://127.0.0.1:1: Connection refused"), "{text}");
    let (code, text) = fleet.cortex(&["ps", "--admin", "127.0.0.1:31314"]).await.unwrap();
    assert!(code == Some(1) && text.contains("must begin with http://"), "{text}");
    let mut child = fleet.starting_cortex(&["config", "reference"]).unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().await.unwrap().code(), Some(1), "a panic has another code");
}

#[tokio::test]
async fn a_worker_on_every_address_is_found_by_gateways_and_says_where_it_was_asked() {
    let fleet = fleet();
    let (data, control) = (free_port().unwrap(), free_port().unwrap());
    let config = format!("{}[node]\nid = \"a\"\n", fake(""));
    let bind = format!("bind = \"0.0.0.0:{data}\"");
    let a = fleet.starter().neuron_with_data("a", control, &bind, &config).unwrap();
    fleet.until_ok(&format!("http://{}/readyz", a.control), &a.process).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let status: Value = reqwest::get(format!("{}/api/status", gateway.admin)).await.unwrap().json().await.unwrap();
    assert_eq!(status["nodes"][0]["status"]["data_address"], format!("127.0.0.1:{data}"));
    let http = reqwest::Client::new();
    let streamed = http.post(format!("{}/v1/chat/completions", gateway.api)).json(&chat_body("m", "x", 2));
    let streamed = streamed.send().await.unwrap();
    assert_eq!((streamed.status().as_u16(), &streamed.headers()["x-accel-buffering"]), (200, &"no".parse().unwrap()));
    let endpoint = reqwest::get(format!("http://localhost:{data}/models/m/endpoint")).await.unwrap();
    let endpoint: Value = endpoint.json().await.unwrap();
    assert_eq!(endpoint["url"], format!("http://localhost:{data}/v1"));
}

#[tokio::test]
async fn two_workers_of_one_name_are_told_of_with_the_remedy() {
    let fleet = fleet();
    let one = fleet.neuron("a", &fake("")).await.unwrap();
    let other = fleet.neuron("a", &fake("")).await.unwrap();
    let gateway = fleet.gateway(&[&one.control, &other.control], "[proxy]\nroute_wait_ms = 100\n").await.unwrap();
    let (_, text) = fleet.cortex(&["status", "--admin", &gateway.admin]).await.unwrap();
    assert_eq!(text.matches("another worker has the same name").count(), 2, "{text}");
    assert_eq!(asked(&gateway, "x").await.unwrap().status, 503);
    let (code, text) = fleet.cortex(&["cordon", "a", "--admin", &gateway.admin]).await.unwrap();
    assert!(code == Some(1) && text.contains("say the control address"), "{text}");
}
