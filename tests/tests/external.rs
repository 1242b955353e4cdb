//! External engines: real processes that a worker starts, asks, watches, restarts and stops. A worker with the fake
//! harness is such an engine itself; scripts stand for those that misbehave.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::{Duration, Instant};

use fleet_tests::{Answer, Client, Fleet, Gateway, Neuron, chat_body, fake_answer, programs};
use serde_json::{Value, json};

fn fleet() -> Fleet {
    Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap()
}

/// The command of an engine that answers as the oracle does, a token each `step_ms`.
fn engine(fleet: &Fleet, step_ms: u32) -> String {
    let file = fleet.folder().join(format!("engine-{step_ms}.toml"));
    let config = format!(
        "[[default_models]]\nid = \"m\"\nharness = \"fake\"\n[harness.fake]\nstep_ms = {step_ms}\n\
         [control]\nbind = \"127.0.0.1:0\"\n"
    );
    std::fs::write(&file, config).unwrap();
    format!("{} serve --config {}", env!("CARGO_BIN_EXE_test-neuron"), file.display())
}

/// A worker's entry whose engine is `sh -c script`; it finds its port where a worker looks for it. Hooks note the
/// engine's process id and port.
fn entry(fleet: &Fleet, script: &str, more: &str) -> String {
    let note = fleet.folder().join("engine.pid");
    format!(
        "[[default_models]]\nid = \"m\"\nharness = \"process\"\n[default_models.process]\n\
         argv = [\"sh\", \"-c\", '''{script}''']\nenv = {{ NEURON__DATA__BIND = \"127.0.0.1:${{PORT}}\" }}\n\
         restart_pause_s = 0.1\nhealth_interval_s = 0.5\n{more}\n\
         [[hooks.run]]\non = \"after_healthy\"\ncommand = [\"sh\", \"-c\", \"echo $NEURON_PID ${{PID}} ${{PORT}} > {}\"]\n",
        note.display()
    )
}

/// The engine's process id and its port, as the hook was told.
fn noted(fleet: &Fleet) -> (i32, u16) {
    let note = std::fs::read_to_string(fleet.folder().join("engine.pid")).unwrap();
    let words: Vec<&str> = note.split_whitespace().collect();
    assert_eq!(words[0], words[1]);
    (words[0].parse().unwrap(), words[2].parse().unwrap())
}

fn alive(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// The processes of a group, the worker's zombies included; those of init are no concern of its.
fn group(leader: i32) -> Vec<String> {
    let stats = std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok());
    let of = |stat: &String| {
        let rest = &stat[stat.rfind(')').unwrap() + 1..];
        rest.split_whitespace().nth(2) == Some(&leader.to_string()) && !rest.starts_with(" Z 1 ")
    };
    stats.filter(of).collect()
}

fn until(what: &str, patience: Duration, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < patience, "{what} did not come within {patience:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

async fn one(fleet: &Fleet, config: &str) -> (Neuron, Gateway) {
    let neuron = fleet.neuron("a", config).await.unwrap();
    let gateway = fleet.gateway(&[&neuron.control], "").await.unwrap();
    (neuron, gateway)
}

fn model(node: &Value) -> Value {
    let models = node["status"]["models"].as_array().cloned().unwrap_or_default();
    models.into_iter().find(|model| model["id"] == "m").unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_external_engine_answers_through_the_fleet_as_it_does_alone() {
    let fleet = fleet();
    let (mut neuron, gateway) = one(&fleet, &entry(&fleet, &format!("exec {}", engine(&fleet, 0)), "")).await;
    let (pid, port) = noted(&fleet);
    let alone = Client::new(&format!("http://127.0.0.1:{port}")).unwrap();
    let through = Client::new(&gateway.api).unwrap();
    for prompt in ["hello", "tell me more"] {
        let body = chat_body("m", prompt, 24);
        let [a, b] = [&alone, &through].map(|client| client.stream_owned(body.clone()));
        let (a, b) = (a.await.unwrap(), b.await.unwrap());
        assert!(b.whole() && b.text == fake_answer(prompt, 24), "{b:?}");
        assert_eq!(a.bytes(), b.bytes());
    }
    let strip = |mut json: Value| {
        json.as_object_mut().unwrap().retain(|key, _| key != "id" && key != "created");
        json
    };
    for (path, body) in [
        (
            "/v1/chat/completions",
            json!({"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}),
        ),
        ("/v1/completions", json!({"model": "m", "max_tokens": 9, "temperature": 0, "prompt": "once"})),
    ] {
        let mut body = body;
        body["temperature"] = json!(0);
        let (status, ours) = through.at(path).json(&body).await.unwrap();
        let (_, its) = alone.at(path).json(&body).await.unwrap();
        assert_eq!((status, strip(ours.clone())), (200, strip(its)), "{ours}");
    }
    // What it refuses is refused in its words; what it is not asked for is said by us.
    let (status, refused) = through.json(&json!({"model": "m", "messages": 7})).await.unwrap();
    let (_, its) = alone.json(&json!({"model": "m", "messages": 7})).await.unwrap();
    assert_eq!((status, &refused["error"]["message"]), (400, &its["error"]["message"]), "{refused}");
    let (status, refused) = through.at("/v1/embeddings").json(&json!({"model": "m", "input": "x"})).await.unwrap();
    let said = refused["error"]["message"].as_str().unwrap();
    assert!(status == 400 && said.contains("/v1/chat/completions, /v1/completions"), "{refused}");

    let base = format!("http://{}", neuron.control);
    let counted = fleet.metric(&base, "neuron_generation_tokens_total", &["m"]).await.unwrap();
    assert_eq!(counted, 2.0 * 24.0 + 18.0, "by the engine's own usage, and by events where it tells none");
    let status = model(&fleet.status(&gateway, "a").await.unwrap());
    assert_eq!(status["capabilities"], json!({"chat": true, "continuation": false}));
    assert!(neuron.process.log().contains("request ended"));
    neuron.process.terminate().unwrap();
    assert_eq!(neuron.process.wait(Duration::from_secs(20)).unwrap().code(), Some(0));
    assert_eq!(group(pid), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_ends_its_request_at_the_engine_and_waiting_ones_come_in_turn() {
    let fleet = fleet();
    let more = "max_running = 1\nmax_waiting = 1";
    let (_neuron, gateway) = one(&fleet, &entry(&fleet, &format!("exec {}", engine(&fleet, 30)), more)).await;
    let client = Client::new(&gateway.api).unwrap();
    let running = async |count: f64| {
        let base = format!("http://{}", _neuron.control);
        let begun = Instant::now();
        while fleet.metric(&base, "neuron_num_requests_running", &["m"]).await.unwrap() != count {
            assert!(begun.elapsed() < Duration::from_secs(10));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let long = tokio::spawn(client.stream_owned(chat_body("m", "long", 2000)));
    running(1.0).await;
    let waits = tokio::spawn(client.stream_owned(chat_body("m", "short", 4)));
    fleet
        .until_metric(&format!("http://{}", _neuron.control), "neuron_num_requests_waiting", &["m"], 1.0)
        .await
        .unwrap();
    let full = client.stream(&chat_body("m", "one too many", 4), |_| {}).await.unwrap();
    assert_eq!((full.status, full.error.unwrap()["code"].clone()), (503, json!("overloaded")));
    long.abort();
    let answer = waits.await.unwrap().unwrap();
    assert!(answer.whole() && answer.text == fake_answer("short", 4), "{answer:?}");
    running(0.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_ends_or_never_gets_healthy_fails_its_load_with_its_last_words() {
    let fleet = fleet();
    for (script, more, wanted) in [
        ("echo loading; echo no such weights >&2; exit 3", "", "exit status: 3 before it was healthy; its last lines:"),
        ("exec sleep 1000", "health_deadline_s = 0.5", "did not answer 200 at /health within 0.5 s and was killed"),
        ("kill -9 $$", "", "signal 9 before it was healthy; it said nothing"),
    ] {
        let begun = Instant::now();
        let config = entry(&fleet, script, more);
        let neuron = fleet.neuron("a", &config).await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
        let gateway = fleet.gateway(&[&neuron.control], "").await.unwrap();
        let failed = |node: &Value| model(node)["state"] == "failed";
        let status = model(&fleet.until_status(&gateway, "a", failed).await.unwrap());
        let failure = status["failure"].as_str().unwrap();
        assert!(failure.contains(wanted), "{failure}");
        assert!(!script.contains("weights") || failure.contains("no such weights"), "{failure}");
        let (_, said) = fleet.cortex(&["status", "--admin", &gateway.admin]).await.unwrap();
        assert!(said.contains(wanted), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_does_not_stop_when_asked_is_killed_with_all_that_it_started() {
    let fleet = fleet();
    let script = format!("trap '' TERM; sleep 1000 & {} & wait; while :; do sleep 1; done", engine(&fleet, 0));
    let mut neuron = fleet.neuron("a", &entry(&fleet, &script, "stop_grace_s = 0.7")).await.unwrap();
    let (pid, _) = noted(&fleet);
    assert!(group(pid).len() >= 3);
    let begun = Instant::now();
    neuron.process.terminate().unwrap();
    assert_eq!(neuron.process.wait(Duration::from_secs(20)).unwrap().code(), Some(0));
    assert!(begun.elapsed() > Duration::from_millis(700) && begun.elapsed() < Duration::from_secs(10));
    assert_eq!(group(pid), Vec::<String>::new());
    assert!(neuron.process.log().contains("killed=true") || neuron.process.log().contains("\"killed\":true"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_killed_leaves_no_engine_behind() {
    let fleet = fleet();
    let script = format!("sleep 1000 & exec {}", engine(&fleet, 0));
    let mut neuron = fleet.neuron("a", &entry(&fleet, &script, "")).await.unwrap();
    let (pid, _) = noted(&fleet);
    assert!(group(pid).len() >= 2);
    neuron.process.kill().unwrap();
    until("the engine's end", Duration::from_secs(5), || {
        !alive(pid) || group(pid).iter().all(|stat| stat.contains(") Z "))
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_megabytes_of_output_take_no_memory_and_hold_nothing_up() {
    let fleet = fleet();
    let flood = "head -c 100000000 /dev/zero | tr '\\0' x | fold -w 99";
    let script = format!("{flood}; echo the last of it; exec {}", engine(&fleet, 0));
    let (neuron, gateway) = one(&fleet, &entry(&fleet, &script, "")).await;
    let answer = Client::new(&gateway.api).unwrap().stream(&chat_body("m", "still there?", 8), |_| {}).await.unwrap();
    assert!(answer.whole() && answer.text == fake_answer("still there?", 8), "{answer:?}");
    let peak = neuron.process.peak_memory().unwrap();
    assert!(peak < 100 << 20, "{} MiB", peak >> 20);
}

fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_killed_under_load_comes_back_and_every_request_is_whole_or_told() {
    let fleet = fleet();
    let script = format!("exec {}", engine(&fleet, 25));
    let (neuron, gateway) = one(&fleet, &entry(&fleet, &script, "max_running = 4")).await;
    let (client, (pid, _)) = (Client::new(&gateway.api).unwrap(), noted(&fleet));
    let ask = |i: usize| tokio::spawn(client.stream_owned(chat_body("m", &format!("story {i}"), 40)));
    let streams: Vec<_> = (0..10).map(ask).collect();
    let base = format!("http://{}", neuron.control);
    fleet.until_metric(&base, "neuron_generation_tokens_total", &["m"], 20.0).await.unwrap();
    kill(pid);
    let (mut whole, mut cut) = (0, 0);
    for (i, answer) in all(streams).await.into_iter().enumerate() {
        let wanted = fake_answer(&format!("story {i}"), 40);
        if answer.whole() {
            assert_eq!(answer.text, wanted);
            whole += 1;
            continue;
        }
        let code = answer.error.as_ref().unwrap()["code"].clone();
        assert!(!answer.done && (code == "engine_failed" || code == "upstream_failed"), "{answer:?}");
        assert!(!answer.text.is_empty() && wanted.starts_with(&answer.text), "{answer:?}");
        cut += 1;
    }
    // Four ran and had said something; what waited behind them has lost nothing.
    assert_eq!((whole, cut), (6, 4));
    let log = neuron.process.log();
    assert!(log.contains("from=Ready to=Recovering") && log.contains("from=Recovering to=Loading"), "{log}");
    assert_ne!(noted(&fleet).0, pid);
    assert_eq!(group(pid), Vec::<String>::new());
    assert_eq!(fleet.metric(&base, "neuron_engine_restarts_total", &["m"]).await.unwrap(), 1.0);
    let status = model(&fleet.status(&gateway, "a").await.unwrap());
    assert!(status["state"] == "ready" && status["memory_bytes"].as_u64().unwrap() > 1 << 20, "{status}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_lives_and_does_not_serve_is_killed_and_comes_back() {
    let fleet = fleet();
    // The shell outlives the server that it has started.
    let script = format!("{} & wait; sleep 1000", engine(&fleet, 0));
    let config = entry(&fleet, &script, "health_failures_max = 3");
    let config = config.replace("health_interval_s = 0.5", "health_interval_s = 0.2");
    let (neuron, gateway) = one(&fleet, &config).await;
    let (pid, _) = noted(&fleet);
    let server = group(pid).iter().find_map(|stat| {
        let (number, _) = stat.split_once(" (test-neuron)")?;
        number.parse().ok()
    });
    let begun = Instant::now();
    kill(server.unwrap());
    let base = format!("http://{}", neuron.control);
    fleet.until_metric(&base, "neuron_engine_restarts_total", &["m"], 1.0).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(400), "one bad look is none");
    fleet.until_status(&gateway, "a", |node| model(node)["state"] == "ready").await.unwrap();
    let answer = Client::new(&gateway.api).unwrap().stream(&chat_body("m", "again", 8), |_| {}).await.unwrap();
    assert!(answer.whole() && answer.text == fake_answer("again", 8), "{answer:?}");
    assert_ne!(noted(&fleet).0, pid);
    assert_eq!(group(pid), Vec::<String>::new());
    let log = neuron.process.log();
    assert!(log.contains("was not healthy at /health 3 times in a row and was killed"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_cuts_what_runs_at_an_external_engine_at_its_deadline_and_stops_the_engine() {
    let fleet = fleet();
    let drain = "[drain]\nsettle_max_ms = 500\nhandoff_s = 0.6\ndeadline_s = 1.5\n";
    let config = entry(&fleet, &format!("exec {}", engine(&fleet, 20)), "max_running = 1") + drain;
    let (mut neuron, gateway) = one(&fleet, &config).await;
    let seen = fleet.status(&gateway, "a").await.unwrap();
    let direct = Client::new(&format!("http://{}", seen["status"]["data_address"].as_str().unwrap())).unwrap();
    let (pid, _) = noted(&fleet);
    let running = tokio::spawn(direct.stream_owned(chat_body("m", "a long story", 2000)));
    let base = format!("http://{}", neuron.control);
    fleet.until_metric(&base, "neuron_generation_tokens_total", &["m"], 5.0).await.unwrap();
    let queued = tokio::spawn(direct.stream_owned(chat_body("m", "behind it", 4)));
    fleet.until_metric(&base, "neuron_num_requests_waiting", &["m"], 1.0).await.unwrap();
    let begun = Instant::now();
    neuron.process.terminate().unwrap();
    let queued = queued.await.unwrap().unwrap();
    assert!(begun.elapsed() < Duration::from_millis(1400), "what waits is handed back at once");
    assert_eq!(queued.error.unwrap()["code"], "draining");
    let answer = running.await.unwrap().unwrap();
    let cut = begun.elapsed();
    assert!(cut >= Duration::from_millis(1400) && cut < Duration::from_secs(6), "{cut:?}");
    let error = answer.error.as_ref().unwrap();
    assert!(!answer.done && error["code"] == "stream_interrupted", "{answer:?}");
    assert!(error["message"].as_str().unwrap().contains("time to finish this answer is over"), "{error}");
    assert!(!answer.text.is_empty() && fake_answer("a long story", 2000).starts_with(&answer.text), "{answer:?}");
    assert_eq!(neuron.process.wait(Duration::from_secs(20)).unwrap().code(), Some(75), "the code says so");
    assert_eq!(group(pid), Vec::<String>::new());
    assert!(neuron.process.log().contains("engine process stopped"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_is_lost_too_often_is_given_up_with_the_reason() {
    let fleet = fleet();
    let marker = fleet.folder().join("marker");
    let worn = format!("[ -e {0} ] && {{ echo worn out >&2; exit 7; }}; touch {0}", marker.display());
    let script = format!("{worn}; exec {}", engine(&fleet, 0));
    let (mut neuron, gateway) = one(&fleet, &entry(&fleet, &script, "restart_limit = 2")).await;
    kill(noted(&fleet).0);
    let failed = |node: &Value| model(node)["state"] == "failed";
    let status = model(&fleet.until_status(&gateway, "a", failed).await.unwrap());
    let failure = status["failure"].as_str().unwrap();
    for wanted in ["exit status: 7", "worn out", "lost 3 times within 600 s"] {
        assert!(failure.contains(wanted), "{failure}");
    }
    let (_, said) = fleet.cortex(&["status", "--admin", &gateway.admin]).await.unwrap();
    assert!(said.contains("worn out") && said.contains("m (failed)"), "{said}");
    neuron.process.terminate().unwrap();
    assert_eq!(neuron.process.wait(Duration::from_secs(20)).unwrap().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_of_the_catalogue_comes_when_it_is_asked_for_and_goes_when_nobody_does() {
    let fleet = fleet();
    let config = entry(&fleet, &format!("exec {}", engine(&fleet, 0)), "");
    let config = config.replace("default_models", "models").replace("\"process\"\n", "\"process\"\nttl_s = 1\n");
    let neuron = fleet.neuron("a", &config).await.unwrap();
    let gateway = fleet.gateway(&[&neuron.control], "").await.unwrap();
    let data = fleet.status(&gateway, "a").await.unwrap()["status"]["data_address"].as_str().unwrap().to_string();
    let client = Client::new(&format!("http://{data}")).unwrap();
    let mut lives = Vec::new();
    for prompt in ["wake up", "once more"] {
        let answer = client.stream(&chat_body("m", prompt, 8), |_| {}).await.unwrap();
        assert!(answer.whole() && answer.text == fake_answer(prompt, 8), "{answer:?}");
        lives.push(noted(&fleet).0);
        let absent = |node: &Value| model(node)["state"] == "absent";
        fleet.until_status(&gateway, "a", absent).await.unwrap();
        assert_eq!(group(lives[lives.len() - 1]), Vec::<String>::new());
    }
    assert_ne!(lives[0], lives[1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_request_of_an_external_engine_ends_with_what_it_has() {
    let fleet = fleet();
    let (neuron, gateway) = one(&fleet, &entry(&fleet, &format!("exec {}", engine(&fleet, 20)), "")).await;
    let client = Client::new(&gateway.api).unwrap();
    let stream = tokio::spawn(client.stream_owned(chat_body("m", "a long story", 2000)));
    let base = format!("http://{}", neuron.control);
    fleet.until_metric(&base, "neuron_generation_tokens_total", &["m"], 5.0).await.unwrap();
    let (code, text) = fleet.cortex(&["cancel", "--admin", &gateway.admin, "--model", "m"]).await.unwrap();
    assert_eq!(code, Some(0), "{text}");
    let answer = stream.await.unwrap().unwrap();
    assert!(answer.whole() && answer.finish.as_deref() == Some("length"), "{answer:?}");
    assert!(!answer.text.is_empty() && fake_answer("a long story", 2000).starts_with(&answer.text), "{answer:?}");
    let ids: std::collections::BTreeSet<&str> =
        answer.raw.split("\"id\":\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert_eq!(ids.len(), 1, "{}", answer.raw);
    let begun = Instant::now();
    while fleet.metric(&base, "neuron_num_requests_running", &["m"]).await.unwrap() > 0.0 {
        assert!(begun.elapsed() < Duration::from_secs(2), "its place is still taken");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(fleet.metric(&base, "neuron_requests_cancelled_total", &["m"]).await.unwrap(), 1.0);
}

#[test]
fn the_example_of_llama_server_is_a_configuration() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/llama-server.example.toml");
    let neuron = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_test-neuron"));
        let output = command.args(arguments).args(["--config", example]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.code(), text)
    };
    let (code, hooks) = neuron(&["hooks", "list"]);
    assert!(code == Some(0) && hooks.contains("save slot 0") && hooks.contains("restore slot 0"), "{hooks}");
    let (_, found) = neuron(&["check"]);
    assert!(found.contains("model qwen3-8b") && found.contains("llama-server"), "{found}");
}

/// Waits for all answers, in their order.
async fn all(streams: Vec<tokio::task::JoinHandle<anyhow::Result<Answer>>>) -> Vec<Answer> {
    let mut answers = Vec::new();
    for stream in streams {
        answers.push(stream.await.unwrap().unwrap());
    }
    answers
}
