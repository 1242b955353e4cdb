//! The coordinator of a rolling restart is killed in each step; another gateway goes on, and no worker is restarted twice.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use fleet_tests::supervisor::{RestartRules, Supervised};
use fleet_tests::{Client, Fleet, Gateway, chat_body, fake_answer, free_port, programs};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Longest time for anything that a rollout does here.
const PATIENCE: Duration = Duration::from_secs(90);

/// What a worker goes through, in this order.
const STEPS: [&str; 6] = ["permitted", "ordered", "back", "answered", "opened", "done"];

fn worker(fleet: &Fleet, name: &str) -> Supervised {
    let state = fleet.folder().join(format!("state-{name}"));
    let config = format!(
        "[[default_models]]\nid = \"m\"\nharness = \"fake\"\n[harness.fake]\nstep_ms = 10\nload_ms = 300\n\
         [node]\nid = \"{name}\"\nstate_dir = {state:?}\n"
    );
    let (starter, port, named) = (fleet.starter(), free_port().unwrap(), name.to_string());
    let unit = RestartRules::read(include_str!("../../deploy/systemd/neuron.service")).unwrap();
    // As the unit says, but for the pause, which only costs time here.
    let rules = RestartRules { pause: Duration::from_millis(200), ..unit };
    Supervised::start(name, rules, move || starter.neuron(&named, port, &config)).unwrap()
}

async fn shown(gateway: &Gateway) -> Value {
    reqwest::get(format!("{}/api/rollout", gateway.admin)).await.unwrap().json().await.unwrap()
}

/// Waits until `done`, looking as often as a step may be short.
async fn until(gateway: &Gateway, what: &str, done: impl Fn(&Value) -> bool) -> Value {
    let begun = Instant::now();
    loop {
        let shown = shown(gateway).await;
        if done(&shown) {
            return shown;
        }
        assert!(begun.elapsed() < PATIENCE, "not {what}: {shown:#}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn killed_in(state: &str) {
    let fleet = Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap();
    let workers = ["a", "b"].map(|name| worker(&fleet, name));
    let controls: Vec<&str> = workers.iter().map(|worker| worker.control.as_str()).collect();
    let store = fleet.folder().join("rollout.sqlite");
    let mut gateways = Vec::new();
    for id in ["one", "two"] {
        let config = format!("[rollout]\nstore = {store:?}\n[fleet]\ngateway_id = \"{id}\"\n");
        let gateway = fleet.gateway(&controls, &config).await.unwrap();
        fleet.until_metric(&gateway.admin, "cortex_node_routable", &[], 2.0).await.unwrap();
        gateways.push(gateway);
    }
    let canary = format!("well?={}", fake_answer("well?", 6));
    let ask = json!({ "health_s": 1.0, "handoff": "now", "canary": canary });
    let begin = reqwest::Client::new().post(format!("{}/api/rollout", gateways[0].admin)).json(&ask);
    let answer = begin.send().await.unwrap();
    assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
    let coordinated = until(&gateways[0], "coordinated", |shown| shown["coordinator"].is_string()).await;
    let victim = usize::from(coordinated["coordinator"] == "two");
    let survivor = 1 - victim;
    let stream = Client::new(&gateways[survivor].api).unwrap();
    let stream = tokio::spawn(stream.stream_owned(chat_body("m", "on and on", 400)));
    // A step may be over before it is seen: then it is killed in the one after.
    let rank = |state: &str| STEPS.iter().position(|step| *step == state);
    let furthest = |shown: &Value| {
        let nodes = shown["rollout"]["nodes"].as_array().unwrap();
        nodes.iter().filter_map(|node| rank(node["state"].as_str()?)).max()
    };
    let seen = until(&gateways[survivor], state, |shown| furthest(shown) >= rank(state)).await;
    gateways[victim].process.kill().unwrap();
    let seen = furthest(&seen).map(|step| STEPS[step]);
    let begun = Instant::now();
    until(&gateways[survivor], "done", |shown| shown["rollout"]["phase"] == "done").await;
    eprintln!("killed in {seen:?}, '{state}' was wanted; done {:?} later", begun.elapsed());
    let starts: Vec<usize> = workers.iter().map(Supervised::starts).collect();
    assert_eq!(starts, [2, 2], "each worker was restarted once");
    let answer = stream.await.unwrap().unwrap();
    assert!(answer.whole() && answer.text == fake_answer("on and on", 400), "{answer:?}");
    for worker in &workers {
        worker.signal(Signal::TERM).unwrap();
    }
}

macro_rules! killed {
    ($($name:ident: $state:literal;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                killed_in($state).await;
            }
        )*
    };
}

killed! {
    killed_with_a_permit_given: "permitted";
    killed_with_an_order_sent: "ordered";
    killed_with_a_worker_back_and_held: "back";
    killed_with_the_canary_answered: "answered";
    killed_with_a_worker_opened: "opened";
    killed_between_two_workers: "done";
}
