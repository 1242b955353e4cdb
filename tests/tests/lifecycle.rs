//! The inspector of real workers: three lanes, the past, and health; what it says of the data port is held against it.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use fleet_tests::scene::fake;
use fleet_tests::{Client, Fleet, chat_body, free_port, programs};
use serde_json::{Value, json};

fn fleet() -> Fleet {
    Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap()
}

fn hook(event: &str, name: &str, script: &str) -> String {
    format!("[[hooks.run]]\non = '{event}'\nname = '{name}'\ncommand = ['sh', '-c', '{script}']\n")
}

/// Returns the names of a lane's items, with their events.
fn names(lane: &Value) -> Vec<String> {
    let name = |item: &Value| {
        let event = item["event"].as_str().unwrap_or_default();
        format!("{event} {}", item["name"].as_str().unwrap()).trim().to_string()
    };
    lane.as_array().unwrap().iter().map(name).collect()
}

fn part<'a>(seen: &'a Value, name: &str) -> &'a Value {
    let parts = seen["health"].as_array().unwrap();
    parts.iter().find(|part| part["name"] == name).unwrap_or_else(|| panic!("no {name} in {parts:?}"))
}

fn states(of: &Value) -> Vec<&str> {
    of.as_array().unwrap().iter().map(|change| change["state"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_inspector_shows_the_lanes_in_their_order_the_past_and_the_health() {
    let fleet = fleet();
    let config = hook("shutdown", "first-declared", "true")
        + &hook("ready", "announce", "exit 3")
        + &hook("startup", "mount", "true")
        + &hook("before_stop", "drop-route", "true")
        + &hook("shutdown", "last-declared", "true")
        + "description = 'unmounts'\n"
        + &hook("before_load", "refuse", "exit 4")
        + "models = ['broken']\n[[default_models]]\nid = 'broken'\nharness = 'fake'\n";
    let port = free_port().unwrap();
    let a = fleet.durable_neuron("a", port, &fake(&config)).unwrap();
    fleet.until_ok(&format!("http://{}/readyz", a.control), &a.process).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let base = format!("http://{}", a.control);
    fleet.until_metric(&base, "neuron_hook_runs_total", &["ready", "failed"], 1.0).await.unwrap();

    let (status, seen) = Client::new(&base).unwrap().get("/api/lifecycle").await.unwrap();
    assert_eq!((status, &seen["node"]), (200, &json!("a")));
    assert_eq!(names(&seen["startup"]), ["startup mount", "before_load refuse", "ready announce"]);
    assert_eq!(
        names(&seen["shutdown"]),
        ["before_stop drop-route", "shutdown last-declared", "shutdown first-declared"],
        "in the order in which they will run"
    );
    assert_eq!(seen["shutdown"][1]["description"], "unmounts");
    let announce = &seen["startup"][2];
    assert_eq!(
        (&announce["runs"], &announce["failures"], &announce["last"]["model"]),
        (&json!(1), &json!(1), &json!("m"))
    );
    assert!(announce["last"]["failure"].as_str().unwrap().contains("exit status: 3"), "{announce}");
    assert_eq!((&announce["source"], &announce["timeout_ms"]), (&json!("config hooks.run[1]"), &json!(30_000)));
    assert!(seen["startup"][0]["last"]["failure"].is_null() && seen["shutdown"][0]["last"].is_null());

    let of = |id: &str| seen["models"].as_array().unwrap().iter().find(|model| model["model"] == id).unwrap();
    assert_eq!(states(&of("m")["states"]), ["fetching", "loading", "warming", "ready"]);
    let broken = of("broken")["states"].as_array().unwrap().last().unwrap();
    assert!(broken["state"] == "failed" && broken["why"].as_str().unwrap().contains("exit status: 4"), "{broken}");
    assert_eq!(states(&seen["states"]), ["activating", "ready"]);
    let times: Vec<u64> =
        of("m")["states"].as_array().unwrap().iter().map(|at| at["at_unix_ms"].as_u64().unwrap()).collect();
    assert!(times.is_sorted() && times[0] > 0 && times[3] <= seen["at_unix_ms"].as_u64().unwrap());

    for name in ["control port", "data port", "engine m", "state directory", "gateways"] {
        assert_eq!(part(&seen, name)["health"], "ok", "{}", part(&seen, name));
    }
    assert_eq!(part(&seen, "hooks")["health"], "degraded");
    assert!(
        part(&seen, "hooks")["detail"].as_str().unwrap().contains("announce of ready: sh ended with exit status: 3")
    );
    std::fs::remove_dir_all(fleet.state_dir("a")).unwrap();
    let (_, seen) = Client::new(&base).unwrap().get("/api/lifecycle").await.unwrap();
    assert_eq!(part(&seen, "state directory")["health"], "failed");

    let (code, tree) = fleet.neuron_says(&["lifecycle", "--address", &a.control]).await.unwrap();
    assert_eq!(code, Some(0), "{tree}");
    let at = |text: &str| tree.find(text).unwrap_or_else(|| panic!("no '{text}' in\n{tree}"));
    assert!(at("\nstartup\n") < at("startup mount (config hooks.run[2], 30 s at most)"));
    assert!(
        at("ready announce") < at("last run for m: sh ended with exit status: 3")
            && at("middleware\n") < at("  gate [guard] (program)")
    );
    assert!(
        at("gate [guard]") < at("body [guard] (config data.max_body_bytes, ")
            && at("\nshutdown\n") < at("last-declared")
    );
    assert!(at("shutdown last-declared") < at("shutdown first-declared") && at("\nstates\n") < at("warming"));
    assert!(at("\nhealth\n") < at("failed    state directory"));
    let (code, text) = fleet.neuron_says(&["lifecycle", "--json", "--address", &a.control]).await.unwrap();
    let direct: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, &direct["startup"], &direct["middleware"]), (Some(0), &seen["startup"], &seen["middleware"]));

    let admin = Client::new(&gateway.admin).unwrap();
    let (status, all) = admin.get("/api/lifecycle").await.unwrap();
    assert_eq!((status, &all["nodes"][0]["control"]), (200, &json!(a.control)));
    let (_, one) = admin.get("/api/lifecycle?node=a").await.unwrap();
    for through in [&all, &one] {
        assert_eq!(through["nodes"][0]["lifecycle"]["middleware"], seen["middleware"]);
        assert_eq!(through["nodes"][0]["lifecycle"]["models"], seen["models"]);
    }
    let (code, text) = fleet.cortex(&["lifecycle", "a", "--admin", &gateway.admin]).await.unwrap();
    assert!(code == Some(0) && text.contains("startup mount") && text.contains("failed    state directory"), "{text}");
    let (code, text) = fleet.cortex(&["lifecycle", "b", "--admin", &gateway.admin]).await.unwrap();
    assert!(code == Some(1) && text.contains("there is no worker 'b' here"), "{text}");
    let (code, text) = fleet.neuron_says(&["logs", "m", "-n", "1", "--address", &a.control]).await.unwrap();
    assert_eq!((code, text.lines().count()), (Some(0), 1), "{text}");
}

/// What the attacks need.
struct Target {
    client: Client,
}

impl Target {
    async fn ask(&self, path: &'static str, kind: &str, body: String) -> (u16, String) {
        let (status, answer) = self.client.at(path).raw(body, kind).await.unwrap();
        (status, answer["error"]["code"].as_str().unwrap_or_default().to_string())
    }

    async fn chat(&self, body: Value) -> (u16, String) {
        self.ask("/v1/chat/completions", "application/json", body.to_string()).await
    }
}

fn says(content: &str) -> Value {
    json!([{"role": "user", "content": content}])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_guard_of_the_middleware_lane_guards_and_the_first_one_answers() {
    let fleet = fleet();
    let token = fleet.folder().join("token");
    std::fs::write(&token, "a-secret-of-more-than-thirty-two-characters\n").unwrap();
    let control = format!("127.0.0.1:{}", free_port().unwrap());
    let config = fake(
        "[harness.fake]\nstep_ms = 10\ncontext_length = 2000\n[scheduler]\nmax_running = 1\nmax_waiting = 1\nmax_request_s = 3\n",
    ) + &format!("[control]\nbind = '{control}'\ntoken_file = {token:?}\n");
    let a = fleet.neuron_with_control(&control, &config).unwrap();
    fleet.until_ok(&format!("http://{control}/readyz"), &a.process).await.unwrap();
    let (status, refused) = Client::new(&format!("http://{control}")).unwrap().get("/api/lifecycle").await.unwrap();
    assert_eq!((status, &refused["error"]["code"]), (401, &json!("invalid_api_key")));
    let token = token.to_str().unwrap();
    let (code, text) = fleet.neuron_says(&["lifecycle", "--json", "--address", &control]).await.unwrap();
    assert!(code == Some(1) && text.contains("needs the shared token"), "{text}");
    let ask = ["lifecycle", "--json", "--address", &control, "--token-file", token];
    let (_, text) = fleet.neuron_says(&ask).await.unwrap();
    let seen: Value = serde_json::from_str(&text).unwrap();
    let data = part(&seen, "data port")["detail"].as_str().unwrap().split(',').next().unwrap().to_string();
    let target = Target { client: Client::new(&format!("http://{data}")).unwrap() };
    let base = format!("http://{control}");
    let until = async |name: &str| {
        fleet.until_metric(&base, name, &[], 1.0).await.unwrap();
    };
    let long = "x".repeat(3000);
    let mut guards = 0;
    for item in seen["middleware"].as_array().unwrap() {
        let description = item["description"].as_str().unwrap();
        let code =
            description.rsplit_once('(').map(|(_, codes)| codes.trim_end_matches(')').split(", ").next().unwrap());
        let name = item["name"].as_str().unwrap();
        assert!(code.is_none() || item["guard"] == true, "{item}");
        // Each attack is one on the guards after it as well.
        let (status, answered) = match name {
            "routes" => target.ask("/v1/nothing", "text/plain", "nonsense".into()).await,
            "token" => target.ask("/models/load", "text/plain", "nonsense".into()).await,
            // The last thing that is done to it, below.
            "gate" => continue,
            "media type" => target.ask("/v1/chat/completions", "text/plain", "nonsense".into()).await,
            "body" => target.ask("/v1/chat/completions", "application/json", "nonsense".repeat(1 << 20)).await,
            "fields" => target.chat(json!({"model": "nobody", "messages": 7})).await,
            "model" => target.chat(json!({"model": "nobody", "messages": says(&long)})).await,
            "context" => target.chat(json!({"model": "m", "messages": says(&long)})).await,
            "queue" => {
                let begin = |prompt| tokio::spawn(target.client.stream_owned(chat_body("m", prompt, 1900)));
                let first = begin("first");
                until("neuron_num_requests_running").await;
                let second = begin("second");
                until("neuron_num_requests_waiting").await;
                let answer = target.chat(json!({"model": "m", "messages": says("third")})).await;
                [first, second].iter().for_each(|stream| stream.abort());
                answer
            }
            "deadline" => {
                let answer = target.client.stream(&chat_body("m", "too long", 1900), |_| {}).await.unwrap();
                (504, answer.error.unwrap()["code"].as_str().unwrap().to_string())
            }
            _ => {
                assert!(code.is_none(), "nobody attacks {name}");
                continue;
            }
        };
        assert_eq!(Some(answered.as_str()), code, "{name} answered {status}");
        guards += 1;
    }
    assert_eq!(guards, 9);
    // A stream holds the drain open meanwhile.
    let stream = tokio::spawn(target.client.stream_owned(chat_body("m", "last", 1900)));
    until("neuron_num_requests_running").await;
    a.process.terminate().unwrap();
    let begun = Instant::now();
    loop {
        // A connection that idles is closed as the gate is, maybe under the request that it was just given.
        let refused = target.client.at("/v1/chat/completions").raw("nonsense".to_string(), "text/plain").await;
        if refused.as_ref().is_ok_and(|(status, answer)| *status == 503 && answer["error"]["code"] == "draining") {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(2), "{refused:?}");
    }
    stream.abort();
}
