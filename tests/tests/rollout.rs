//! Rolling restarts of real processes: workers under their unit's rules, gateways that share a store.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::Path;
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fleet_tests::supervisor::{RestartRules, Supervised};
use fleet_tests::{Answer, Client, Fleet, Gateway, chat_body, fake_answer, free_port, programs};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

const CORTEX: &str = env!("CARGO_BIN_EXE_test-cortex");
const UNIT: &str = include_str!("../../deploy/systemd/neuron.service");
/// Longest time for anything that a rollout does here.
const PATIENCE: Duration = Duration::from_secs(90);

/// Workers under supervision, and whether each may be started again.
struct Workers {
    fleet: Fleet,
    each: Vec<(Supervised, Arc<AtomicBool>)>,
    ports: Vec<u16>,
}

fn config(fleet: &Fleet, name: &str, more: &str) -> String {
    let state = fleet.folder().join(format!("state-{name}"));
    format!(
        "[harness.fake]\nstep_ms = 20\n[scheduler]\nmax_running = 32\n{more}\
         [node]\nid = \"{name}\"\nstate_dir = {state:?}\n"
    )
}

impl Workers {
    /// Starts one worker for each pair of a name and more configuration.
    fn start(each: &[(&str, &str)]) -> Self {
        Self::start_with(each, |_| {})
    }

    /// Prepares the fleet's folder first.
    fn start_with(each: &[(&str, &str)], prepare: impl FnOnce(&Path)) -> Self {
        let fleet = Fleet::new(programs(CORTEX, env!("CARGO_BIN_EXE_test-neuron"))).unwrap();
        prepare(fleet.folder());
        let mut workers = Workers { fleet, each: Vec::new(), ports: Vec::new() };
        for (name, more) in each {
            workers.ports.push(free_port().unwrap());
            let worker = workers.supervise(name, *workers.ports.last().unwrap(), more);
            workers.each.push(worker);
        }
        workers
    }

    fn three() -> Self {
        Self::start(&[("a", M), ("b", M), ("c", M)])
    }

    fn supervise(&self, name: &str, port: u16, more: &str) -> (Supervised, Arc<AtomicBool>) {
        let (may, starter) = (Arc::new(AtomicBool::new(true)), self.fleet.starter());
        let (name, config, allowed) = (name.to_string(), config(&self.fleet, name, more), may.clone());
        // As the unit says, but for the pause, which only costs time here.
        let rules = RestartRules { pause: Duration::from_millis(200), ..RestartRules::read(UNIT).unwrap() };
        let named = name.clone();
        let start = move || {
            anyhow::ensure!(allowed.load(Ordering::Relaxed), "it is not to come back");
            starter.neuron(&named, port, &config)
        };
        (Supervised::start(&name, rules, start).unwrap(), may)
    }

    fn controls(&self) -> Vec<&str> {
        self.each.iter().map(|(worker, _)| worker.control.as_str()).collect()
    }

    fn starts(&self) -> Vec<usize> {
        self.each.iter().map(|(worker, _)| worker.starts()).collect()
    }

    /// Starts a gateway on the shared store.
    async fn gateway(&self) -> Gateway {
        let store = self.fleet.folder().join("rollout.sqlite");
        let gateway = self.fleet.gateway(&self.controls(), &format!("[rollout]\nstore = {store:?}\n")).await.unwrap();
        self.until_routable(&gateway).await;
        gateway
    }

    async fn until_routable(&self, gateway: &Gateway) {
        let workers = self.each.len() as f64;
        self.fleet.until_metric(&gateway.admin, "cortex_node_routable", &[], workers).await.unwrap();
    }

    /// Waits until every worker says that so many gateways are attached.
    async fn until_attached(&self, gateway: &Gateway, gateways: usize) {
        let begun = Instant::now();
        loop {
            let status = get(&format!("{}/api/status", gateway.admin)).await;
            let nodes = status["nodes"].as_array().unwrap();
            let attached = |node: &Value| node["status"]["gateways"].as_array().map_or(0, Vec::len) == gateways;
            if nodes.iter().all(attached) {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{status:#}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// The configuration of a worker with the fake model `m`.
const M: &str = "[[default_models]]\nid = \"m\"\nharness = \"fake\"\n";

async fn get(url: &str) -> Value {
    reqwest::get(url).await.unwrap().json().await.unwrap()
}

async fn shown(gateway: &Gateway) -> Value {
    get(&format!("{}/api/rollout", gateway.admin)).await
}

/// Posts; returns status and body.
async fn post(gateway: &Gateway, path: &str, body: &Value) -> (u16, Value) {
    let url = format!("{}/api/rollout{path}", gateway.admin);
    let response = reqwest::Client::new().post(url).json(body).send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

async fn begin(gateway: &Gateway, more: Value) {
    let mut ask = json!({ "health_s": 1.0, "handoff": "now" });
    for (key, value) in more.as_object().unwrap() {
        ask[key] = value.clone();
    }
    let (status, body) = post(gateway, "", &ask).await;
    assert_eq!(status, 200, "{body:#}");
}

/// Waits until the rollout is in `phase`; returns what is shown then.
async fn until_phase(gateway: &Gateway, phase: &str) -> Value {
    until(gateway, phase, |shown| shown["rollout"]["phase"] == phase).await
}

async fn until(gateway: &Gateway, what: &str, done: impl Fn(&Value) -> bool) -> Value {
    let begun = Instant::now();
    loop {
        let shown = shown(gateway).await;
        if done(&shown) {
            return shown;
        }
        assert!(begun.elapsed() < PATIENCE, "not {what}: {shown:#}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Waits until a node says that it is in `state`; returns the whole status.
async fn until_state(gateway: &Gateway, node: usize, state: &str) -> Value {
    let begun = Instant::now();
    loop {
        let status = get(&format!("{}/api/status", gateway.admin)).await;
        if status["nodes"][node]["status"]["state"]["state"] == state {
            return status;
        }
        assert!(begun.elapsed() < PATIENCE, "not {state}: {status:#}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn states(shown: &Value) -> Vec<(&str, &str)> {
    let nodes = shown["rollout"]["nodes"].as_array().unwrap();
    nodes.iter().map(|node| (node["node"].as_str().unwrap(), node["state"].as_str().unwrap())).collect()
}

/// Clients that stream one answer after another, and check each against the oracle.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Vec<String>>>,
}

impl Load {
    fn start(api: &str, clients: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let one = |i: usize| {
            let (client, stop) = (Client::new(api).unwrap(), stop.clone());
            tokio::spawn(async move {
                let (mut failures, mut number) = (Vec::new(), 0);
                while !stop.load(Ordering::Relaxed) {
                    number += 1;
                    let message = format!("load {i} {number}");
                    let answer: Answer = match client.stream(&chat_body("m", &message, 100), |_| {}).await {
                        Ok(answer) => answer,
                        Err(error) => {
                            failures.push(format!("{error:#}"));
                            continue;
                        }
                    };
                    if !answer.whole() || answer.text != fake_answer(&message, 100) {
                        failures.push(format!("{answer:?}"));
                    }
                }
                assert!(number > 1, "it asked for nothing");
                failures
            })
        };
        Load { clients: (0..clients).map(one).collect(), stop }
    }

    async fn failures(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        let mut failures = Vec::new();
        for client in self.clients {
            failures.extend(client.await.unwrap());
        }
        failures
    }
}

/// Runs `cortex rollout ...` against a gateway.
async fn cortex(gateway: &Gateway, words: &[&str]) -> Output {
    let mut command = tokio::process::Command::new(CORTEX);
    command.arg("rollout").args(words).args(["--admin", &gateway.admin]).kill_on_drop(true);
    tokio::time::timeout(PATIENCE, command.output()).await.unwrap().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn canary(right: bool) -> String {
    let answer = if right { fake_answer("are you well?", 8) } else { "surely not this".into() };
    format!("are you well?={answer}")
}

#[tokio::test]
async fn a_rolling_restart_under_streams_costs_nobody_an_error() {
    let workers = Workers::three();
    let (one, two) = (workers.gateway().await, workers.gateway().await);
    workers.until_attached(&one, 2).await;
    let loads = [Load::start(&one.api, 6), Load::start(&two.api, 6)];
    tokio::time::sleep(Duration::from_secs(1)).await;
    let begun = Instant::now();
    let words = ["restart", "--handoff", "now", "--health", "1", "--order", "b,a,c", "--canary", &canary(true)];
    let restart = cortex(&one, &words).await;
    assert!(restart.status.success() && text(&restart).contains("1. restart b"), "{}", text(&restart));
    // The other gateway shows the same rollout.
    let watch = cortex(&two, &["watch"]).await;
    eprintln!("{}\nthe rollout took {:?}", text(&watch), begun.elapsed());
    assert!(watch.status.success(), "{}", text(&watch));
    for load in loads {
        assert_eq!(load.failures().await, Vec::<String>::new());
    }
    assert_eq!(workers.starts(), [2, 2, 2]);
    let status = get(&format!("{}/api/status", one.admin)).await;
    for node in status["nodes"].as_array().unwrap() {
        assert_eq!((&node["status"]["state"]["state"], &node["status"]["hold"]), (&json!("ready"), &Value::Null));
    }
    let done = workers.fleet.metric(&two.admin, "cortex_rollout_state", &["state=\"done\""]).await.unwrap();
    let nodes = workers.fleet.metric(&two.admin, "cortex_rollout_nodes", &["state=\"done\""]).await.unwrap();
    assert_eq!((done, nodes), (1.0, 3.0));
}

#[tokio::test]
async fn a_rollout_whose_coordinator_is_killed_is_finished_by_another_gateway() {
    let workers = Workers::three();
    let mut gateways = vec![workers.gateway().await, workers.gateway().await];
    workers.until_attached(&gateways[0], 2).await;
    begin(&gateways[0], json!({ "canary": canary(true) })).await;
    let shown = until(&gateways[0], "under way", |shown| {
        shown["coordinator"].is_string() && states(shown).iter().any(|(_, state)| *state == "ordered")
    })
    .await;
    let coordinator = shown["coordinator"].clone();
    let first = get(&format!("{}/api/status", gateways[0].admin)).await["gateway"] == coordinator;
    let mut killed = gateways.remove(usize::from(!first));
    let other = gateways.remove(0);
    let load = Load::start(&other.api, 4);
    killed.process.kill().unwrap();
    let begun = Instant::now();
    let shown = until_phase(&other, "done").await;
    eprintln!("done {:?} after the kill", begun.elapsed());
    assert_ne!(shown["coordinator"], coordinator);
    assert_eq!(shown["rollout"]["lease_revision"], 2);
    assert_eq!(load.failures().await, Vec::<String>::new());
    assert_eq!(workers.starts(), [2, 2, 2], "nobody was restarted twice");
}

#[tokio::test]
async fn a_worker_that_does_not_come_back_pauses_the_rollout_by_name_until_it_is_back() {
    let mut workers = Workers::three();
    let gateway = workers.gateway().await;
    workers.each[1].1.store(false, Ordering::Relaxed);
    begin(&gateway, json!({ "back_within_s": 4.0 })).await;
    let shown = until_phase(&gateway, "paused").await;
    let why = shown["why"].as_str().unwrap();
    assert!(why.starts_with("b: ") && why.contains("did not come back"), "{why}");
    assert_eq!(states(&shown)[2], ("c", "pending"), "the others are left alone");
    assert_eq!(workers.fleet.metric(&gateway.admin, "cortex_rollout_paused", &[]).await.unwrap(), 1.0);
    let watch = cortex(&gateway, &["watch"]).await;
    assert!(!watch.status.success() && text(&watch).contains("b: the node did not come back"), "{}", text(&watch));
    // Somebody repairs it.
    let port = workers.ports[1];
    workers.each[1] = workers.supervise("b", port, M);
    until(&gateway, "back", |shown| shown["notes"]["b"].is_string()).await;
    // The hold outlives whatever happened between the order and now.
    until_state(&gateway, 1, "held").await;
    assert!(cortex(&gateway, &["resume"]).await.status.success());
    until_phase(&gateway, "done").await;
    assert_eq!(workers.starts(), [2, 1, 2]);
}

#[tokio::test]
async fn a_wrong_canary_pauses_and_the_worker_serves_nobody_until_an_abort_opens_it() {
    let workers = Workers::three();
    let gateway = workers.gateway().await;
    begin(&gateway, json!({ "canary": canary(false) })).await;
    let shown = until_phase(&gateway, "paused").await;
    let why = shown["why"].as_str().unwrap();
    assert!(why.starts_with("a: the canary's answer was wrong: '"), "{why}");
    let status = get(&format!("{}/api/status", gateway.admin)).await;
    assert_eq!(
        (&status["nodes"][0]["status"]["state"]["state"], &status["nodes"][0]["routable"]),
        (&json!("held"), &json!(false))
    );
    // The worker itself refuses what is no canary.
    let direct = format!("http://{}", status["nodes"][0]["status"]["data_address"].as_str().unwrap());
    let (refused, body) = Client::new(&direct).unwrap().json(&chat_body("m", "hello", 4)).await.unwrap();
    assert_eq!(refused, 503, "{body:#}");
    let (served, _) = Client::new(&gateway.api)
        .unwrap()
        .json(&json!({
            "model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4
        }))
        .await
        .unwrap();
    assert_eq!(served, 200);
    let (status, body) = post(&gateway, "", &json!({})).await;
    assert_eq!(status, 409, "one rollout at a time: {body:#}");
    assert!(cortex(&gateway, &["abort"]).await.status.success());
    let shown = until_phase(&gateway, "aborted").await;
    assert_eq!(states(&shown)[1..], [("b", "skipped"), ("c", "skipped")]);
    workers.until_routable(&gateway).await;
    assert_eq!(workers.starts(), [2, 1, 1]);
}

#[tokio::test]
async fn a_model_that_would_go_dark_is_named_and_a_rehearsal_does_nothing() {
    let only = format!("{M}[[default_models]]\nid = \"only\"\nharness = \"fake\"\n");
    let workers = Workers::start(&[("a", &only), ("b", M)]);
    let gateway = workers.gateway().await;
    let refused = cortex(&gateway, &["restart"]).await;
    assert!(!refused.status.success() && text(&refused).contains("'only' would go dark"), "{}", text(&refused));
    let plan = cortex(&gateway, &["restart", "--dry-run", "--allow-dark", "only"]).await;
    assert!(plan.status.success(), "{}", text(&plan));
    assert!(text(&plan).contains("1. restart a (elsewhere: m x1, only x0)\n  2. restart b"), "{}", text(&plan));
    assert_eq!(shown(&gateway).await["rollout"], Value::Null);
    let asked = cortex(&gateway, &["restart", "--dry-run", "--allow-dark", "only", "--canary", "x=y"]).await;
    assert!(text(&asked).contains("one of: "), "the canary needs its model's name: {}", text(&asked));
    let floor = cortex(&gateway, &["restart", "--dry-run", "--allow-dark", "only", "--min-available", "m=2"]).await;
    assert!(text(&floor).contains("'m' would have 1 replicas of 2"), "{}", text(&floor));
    assert_eq!(workers.starts(), [1, 1]);
}

#[tokio::test]
async fn a_paused_rollout_gives_no_orders_and_goes_on_when_resumed() {
    let workers = Workers::three();
    let gateway = workers.gateway().await;
    begin(&gateway, json!({})).await;
    until(&gateway, "under way", |shown| states(shown)[0].1 != "pending").await;
    assert!(cortex(&gateway, &["pause"]).await.status.success());
    tokio::time::sleep(Duration::from_secs(4)).await;
    let shown = shown(&gateway).await;
    assert_eq!(shown["why"], "an operator paused it");
    assert_eq!(states(&shown)[1..], [("b", "pending"), ("c", "pending")]);
    assert_eq!(workers.starts()[1..], [1, 1]);
    let (status, body) = post(&gateway, "/pause", &Value::Null).await;
    assert_eq!(status, 409, "{body:#}");
    assert!(cortex(&gateway, &["resume"]).await.status.success());
    until_phase(&gateway, "done").await;
    assert_eq!(workers.starts(), [2, 2, 2]);
}

#[tokio::test]
async fn a_failed_upgrade_pauses_and_the_old_program_is_back() {
    let failing = format!("{M}[upgrade.new]\nargv = [\"false\"]\n");
    let workers = Workers::start(&[("a", &failing), ("b", &failing)]);
    let gateway = workers.gateway().await;
    let (status, body) = post(&gateway, "", &json!({ "upgrade": "unknown", "health_s": 1.0 })).await;
    assert_eq!(status, 200, "{body:#}");
    let shown = until_phase(&gateway, "paused").await;
    assert!(shown["why"].as_str().unwrap().starts_with("a: the order was refused"), "{shown:#}");
    assert_eq!(post(&gateway, "/abort", &Value::Null).await.0, 200);
    until_phase(&gateway, "aborted").await;
    begin(&gateway, json!({ "upgrade": "new" })).await;
    let shown = until_phase(&gateway, "paused").await;
    assert!(shown["why"].as_str().unwrap().starts_with("a: the upgrade failed"), "{shown:#}");
    assert_eq!(post(&gateway, "/abort", &Value::Null).await.0, 200);
    until_phase(&gateway, "aborted").await;
    workers.until_routable(&gateway).await;
    assert_eq!(workers.starts(), [2, 1]);
}

#[tokio::test]
async fn a_store_that_cannot_be_used_refuses_rollouts_and_requests_go_on() {
    let workers = Workers::start(&[("a", M), ("b", M)]);
    let ask = json!({ "model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4 });
    let bare = workers.fleet.gateway(&workers.controls(), "").await.unwrap();
    workers.until_routable(&bare).await;
    let refused = cortex(&bare, &["restart"]).await;
    assert!(!refused.status.success() && text(&refused).contains("[rollout] store ="), "{}", text(&refused));
    // A place where nothing can be written, not even by root.
    let config = "[rollout]\nstore = \"/proc/none/rollout.sqlite\"\n";
    let barred = workers.fleet.gateway(&workers.controls(), config).await.unwrap();
    workers.until_routable(&barred).await;
    let refused = cortex(&barred, &["restart"]).await;
    let words = text(&refused);
    assert!(!refused.status.success() && words.contains("/proc/none/rollout.sqlite can't be used"), "{words}");
    assert_eq!(workers.fleet.metric(&barred.admin, "cortex_rollout_store_failed", &[]).await.unwrap(), 1.0);
    assert_eq!(Client::new(&barred.api).unwrap().json(&ask).await.unwrap().0, 200);
    assert_eq!(workers.starts(), [1, 1]);
}

#[tokio::test]
async fn a_store_that_is_damaged_midway_stops_the_rollout_and_not_the_gateway() {
    let workers = Workers::three();
    let gateway = workers.gateway().await;
    begin(&gateway, json!({ "health_s": 3.0 })).await;
    until(&gateway, "under way", |shown| states(shown)[0].1 == "ordered").await;
    for end in ["", "-wal", "-shm"] {
        let path = workers.fleet.folder().join(format!("rollout.sqlite{end}"));
        std::fs::write(path, "no database ".repeat(4096)).unwrap();
    }
    workers.fleet.until_metric(&gateway.admin, "cortex_rollout_store_failed", &[], 1.0).await.unwrap();
    tokio::time::sleep(Duration::from_secs(6)).await;
    let status = cortex(&gateway, &["status"]).await;
    assert!(!status.status.success() && text(&status).contains("can't be used"), "{}", text(&status));
    assert_eq!(workers.starts()[1..], [1, 1], "nothing more is ordered");
    let ask = json!({ "model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4 });
    assert_eq!(Client::new(&gateway.api).unwrap().json(&ask).await.unwrap().0, 200);
}

#[tokio::test]
async fn a_coordinator_that_was_stopped_for_long_wakes_up_without_a_say() {
    let workers = Workers::three();
    let mut gateways = vec![workers.gateway().await, workers.gateway().await];
    workers.until_attached(&gateways[0], 2).await;
    // Its permit for b would come just when it is stopped, at the latest.
    begin(&gateways[0], json!({ "health_s": 2.0 })).await;
    let shown = until(&gateways[0], "under way", |shown| states(shown)[0].1 == "opened").await;
    let first = get(&format!("{}/api/status", gateways[0].admin)).await["gateway"] == shown["coordinator"];
    let stopped = gateways.remove(usize::from(!first));
    let other = gateways.remove(0);
    stopped.process.signal(Signal::STOP).unwrap();
    let taken_over = until(&other, "taken over", |now| now["rollout"]["lease_revision"] == 2).await;
    assert_ne!(taken_over["coordinator"], shown["coordinator"]);
    // It wakes up in the middle of the other's work.
    until(&other, "at c", |shown| states(shown)[2].1 != "pending" || shown["rollout"]["phase"] != "running").await;
    stopped.process.signal(Signal::CONT).unwrap();
    let done = until_phase(&other, "done").await;
    assert_eq!(done["rollout"]["lease_revision"], 2, "it did not take the lease back");
    assert_eq!(workers.starts(), [2, 2, 2]);
}

#[tokio::test]
async fn a_cordoned_worker_is_restarted_and_comes_back_cordoned() {
    let workers = Workers::start_with(&[("a", M), ("b", M), ("c", M)], |state| {
        let c = state.join("state-c");
        std::fs::create_dir_all(&c).unwrap();
        std::fs::write(c.join("intent.json"), "{\"epoch\": 1, \"intent\": \"cordon\"}").unwrap();
    });
    let store = workers.fleet.folder().join("rollout.sqlite");
    let config = format!("[rollout]\nstore = {store:?}\n");
    let gateway = workers.fleet.gateway(&workers.controls(), &config).await.unwrap();
    workers.fleet.until_metric(&gateway.admin, "cortex_node_routable", &[], 2.0).await.unwrap();
    until_state(&gateway, 2, "ready").await;
    let refused = cortex(&gateway, &["restart"]).await;
    assert!(text(&refused).contains("at most 1 nodes may be out of service, and these are: c"), "{}", text(&refused));
    begin(&gateway, json!({ "max_unavailable": "2", "canary": canary(true) })).await;
    until_phase(&gateway, "done").await;
    assert_eq!(workers.starts(), [2, 2, 2]);
    let status = until_state(&gateway, 2, "ready").await;
    let c = &status["nodes"][2];
    assert_eq!((&c["status"]["intent"], &c["status"]["hold"]), (&json!("cordon"), &Value::Null));
    assert_eq!(c["routable"], false);
}

#[tokio::test]
async fn a_worker_opens_itself_when_its_coordinator_is_gone_and_a_new_gateway_goes_on() {
    let workers = Workers::three();
    let mut gateway = workers.gateway().await;
    begin(&gateway, json!({ "canary": canary(true), "hold_ttl_s": 1.0 })).await;
    until(&gateway, "under way", |shown| states(shown)[0].1 == "ordered").await;
    gateway.process.kill().unwrap();
    // A gateway without the store sees that the worker has opened itself, by its own canary.
    let watcher = workers.fleet.gateway(&workers.controls(), "").await.unwrap();
    until_state(&watcher, 0, "ready").await;
    workers.until_routable(&watcher).await;
    assert_eq!(workers.starts(), [2, 1, 1]);
    drop(watcher);
    let gateway = workers.gateway().await;
    until_phase(&gateway, "done").await;
    assert_eq!(workers.starts(), [2, 2, 2]);
}
