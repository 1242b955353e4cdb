//! Fleets of real processes on the fake engine: routing, drains, crashes, clients that leave.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use fleet_tests::{Answer, Client, Fleet, chat_body, programs};
use serde_json::{Value, json};

fn fleet() -> Fleet {
    Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap()
}

/// A worker with the fake model `m`.
fn fake(extra: &str) -> String {
    format!("[[default_models]]\nid = \"m\"\nharness = \"fake\"\n{extra}")
}

#[tokio::test]
async fn both_workers_serve_and_answers_are_the_oracles() {
    let fleet = fleet();
    let (a, b) = (fleet.neuron("a", &fake("")).await.unwrap(), fleet.neuron("b", &fake("")).await.unwrap());
    let gateway = fleet.gateway(&[&a.control, &b.control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let mut texts = std::collections::BTreeSet::new();
    for _ in 0..20 {
        let answer = client.stream(&chat_body("m", "hello", 16), |_| {}).await.unwrap();
        assert!(answer.whole(), "{answer:?}");
        assert!(!answer.raw.contains(":cx"), "private lines never reach a client");
        texts.insert(answer.text);
    }
    assert_eq!(texts.len(), 1, "every worker says the same");
    let mut body = chat_body("m", "hello", 16);
    body["stream"] = json!(false);
    let (status, whole) = client.json(&body).await.unwrap();
    assert_eq!((status, whole["choices"][0]["message"]["content"].as_str()), (200, texts.first().map(String::as_str)));
    assert_eq!(whole["usage"]["completion_tokens"], 16);
    for node in ["a", "b"] {
        let labels = [format!("node=\"{node}\""), "outcome=\"ok\"".to_string()];
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        let served = fleet.metric(&gateway.admin, "cortex_attempts_total", &labels).await.unwrap();
        assert!(served >= 1.0, "{node} served {served}");
    }
    let (status, models) = client.get("/v1/models").await.unwrap();
    assert_eq!((status, models["data"][0]["id"].as_str()), (200, Some("m")));
    assert_eq!(client.get("/v1/models/m").await.unwrap().0, 200);
}

#[tokio::test]
async fn a_worker_killed_before_its_first_token_is_never_seen_by_a_client() {
    let fleet = fleet();
    // `a` takes long to its first token, so the request is surely on it or in `b`'s hands when it dies.
    let slow = fake("[harness.fake]\nprefill_ms = 3000\n");
    let mut a = fleet.neuron("a", &slow).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    drop(gateway);
    let b = fleet.neuron("b", &fake("")).await.unwrap();
    let gateway = fleet.gateway(&[&a.control, &b.control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let base = format!("http://{}", a.control);
    let requests: Vec<_> = (0..8)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.stream(&chat_body("m", "hello", 8), |_| {}).await.unwrap() })
        })
        .collect();
    fleet.until_metric(&base, "neuron_num_requests_running", &[], 1.0).await.unwrap();
    a.process.kill().unwrap();
    for request in requests {
        let answer = request.await.unwrap();
        assert!(answer.whole(), "{answer:?}");
    }
    let retries = fleet.metric(&gateway.admin, "cortex_retries_total", &[]).await.unwrap();
    assert!(retries >= 1.0, "nobody was on the worker when it died");
}

#[tokio::test]
async fn a_drain_ends_what_runs_and_hands_back_what_waits() {
    let fleet = fleet();
    let paced = fake("[harness.fake]\nstep_ms = 20\n[scheduler]\nmax_running = 8\n");
    let mut a = fleet.neuron("a", &paced).await.unwrap();
    let gateway = fleet.gateway(&[&a.control, "127.0.0.1:1"], "").await.unwrap();
    drop(gateway);
    // The second worker joins later, so that all 28 requests are on the first.
    let port = fleet_tests::free_port().unwrap();
    let late = format!("127.0.0.1:{port}");
    let gateway = fleet.gateway(&[&a.control, &late], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let (told, mut begun) = tokio::sync::mpsc::unbounded_channel();
    let start = |count: usize, tokens: u32| -> Vec<tokio::task::JoinHandle<Answer>> {
        let spawn = |_| {
            let (client, told) = (client.clone(), told.clone());
            tokio::spawn(async move {
                let mut first = true;
                let body = chat_body("m", "drain", tokens);
                let tell = |answer: &Answer| {
                    if first && answer.pieces > 0 {
                        first = false;
                        told.send(()).unwrap();
                    }
                };
                client.stream(&body, tell).await.unwrap()
            })
        };
        (0..count).map(spawn).collect()
    };
    let base = format!("http://{}", a.control);
    let running = start(8, 400);
    for _ in 0..8 {
        begun.recv().await.unwrap();
    }
    let waiting = start(20, 5);
    fleet.until_metric(&base, "neuron_num_requests_waiting", &[], 20.0).await.unwrap();
    let b = fleet.neuron_on("b", port, &paced).unwrap();
    fleet.until_ok(&format!("http://{late}/readyz"), &b.process).await.unwrap();
    fleet.until_metric(&gateway.admin, "cortex_node_routable", &[], 2.0).await.unwrap();
    assert!(running.iter().all(|task| !task.is_finished()), "a running request ended too early for this test");
    assert_eq!(fleet.metric(&base, "neuron_num_requests_running", &[]).await.unwrap(), 8.0);
    a.process.terminate().unwrap();
    for task in running.into_iter().chain(waiting) {
        let answer = task.await.unwrap();
        assert!(answer.whole() && answer.finish.as_deref() == Some("length"), "{answer:?}");
    }
    assert_eq!(a.process.wait(Duration::from_secs(10)).unwrap().code(), Some(0));
    let back = fleet.metric(&gateway.admin, "cortex_retries_total", &["reason=\"draining\""]).await.unwrap();
    assert_eq!(back, 20.0, "all twenty were handed back");
}

#[tokio::test]
async fn a_client_that_leaves_while_the_worker_is_silent_is_known_within_50_ms() {
    let fleet = fleet();
    let a = fleet.neuron("a", &fake("[harness.fake]\nprefill_ms = 4000\n")).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "[drain]\nsettle_ms = 0\n").await.unwrap();
    let base = format!("http://{}", a.control);
    let client = Client::new(&gateway.api).unwrap();
    let request = tokio::spawn(async move { client.stream(&chat_body("m", "hello", 8), |_| {}).await });
    fleet.until_metric(&base, "neuron_num_requests_running", &[], 1.0).await.unwrap();
    let before = fleet.metric(&base, "neuron_client_disconnects_total", &[]).await.unwrap();
    request.abort();
    let took = fleet.until_metric(&base, "neuron_client_disconnects_total", &[], before + 1.0).await.unwrap();
    eprintln!("the worker knew after {took:?}, the reading of the metric included");
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[tokio::test]
async fn a_gateway_leaves_within_its_budget_whatever_its_peers_do() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let fleet = fleet();
    let a = fleet.neuron("a", &fake("[harness.fake]\nstep_ms = 20\n")).await.unwrap();
    let options = "[drain]\nsettle_ms = 100\ndeadline_s = 1.5\ncut_max_ms = 500\n";
    let mut gateway = fleet.gateway(&[&a.control], options).await.unwrap();
    let address = gateway.api.strip_prefix("http://").unwrap().to_string();
    let connect = || tokio::net::TcpStream::connect(address.clone());
    let mut idle = Vec::new();
    for _ in 0..200 {
        let mut stream = connect().await.unwrap();
        stream.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut buffer = [0; 512];
        assert!(stream.read(&mut buffer).await.unwrap() > 0);
        idle.push(stream);
    }
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(connect().await.unwrap());
    }
    let body = chat_body("m", "x", 4000).to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut stopped = connect().await.unwrap();
    stopped.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let open: Vec<_> = (0..3)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.stream(&chat_body("m", "x", 4000), |_| {}).await })
        })
        .collect();
    fleet.until_metric(&format!("http://{}", a.control), "neuron_num_requests_running", &[], 4.0).await.unwrap();
    let begun = Instant::now();
    gateway.process.terminate().unwrap();
    let status = gateway.process.wait(Duration::from_secs(10)).unwrap();
    let took = begun.elapsed();
    eprintln!("the gateway was gone after {took:?}");
    assert!(took < Duration::from_secs_f64(1.5 + 0.5 + 1.0 + 2.0), "{took:?}");
    assert_eq!(status.code(), Some(75), "streams were cut, and the exit code says so");
    for stream in open {
        let answer = stream.await.unwrap().unwrap();
        assert_eq!(answer.error.unwrap()["code"], "stream_interrupted");
        assert!(!answer.done, "never [DONE] after a failure");
    }
}

#[tokio::test]
async fn bad_input_gets_a_clear_error_and_the_fleet_goes_on() {
    let fleet = fleet();
    let a = fleet.neuron("a", &fake("")).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let json_type = "application/json";
    let deep = format!("{{\"model\":\"m\",\"messages\":{}{}}}", "[".repeat(500), "]".repeat(500));
    for (body, status, code) in [
        ("{\"model\": \"m\"".to_string(), 400, "invalid_request"),
        ("{\"model\": 7}".to_string(), 400, "invalid_request"),
        (deep, 400, "invalid_request"),
        (format!("{{\"model\":\"m\",\"x\":\"{}\"}}", "y".repeat(10 << 20)), 413, "body_too_large"),
        (chat_body("nobody", "x", 5).to_string(), 404, "model_not_found"),
        (chat_body("m", &"x".repeat(9000), 5).to_string(), 400, "context_length_exceeded"),
        (chat_body("m", "x", 0).to_string(), 400, "invalid_request"),
        (
            chat_body("m", "x", 5).to_string().replace("\"temperature\":0", "\"temperature\":NaN"),
            400,
            "invalid_request",
        ),
        (chat_body("m", "x", 5).to_string().replace("\"temperature\":0", "\"n\":0"), 400, "invalid_request"),
        (chat_body("m", "x", 5).to_string().replace("\"temperature\":0", "\"n\":99"), 400, "invalid_request"),
        (
            chat_body("m", "x", 5).to_string().replace("\"temperature\":0", "\"modalities\":[\"audio\"]"),
            400,
            "unsupported_parameter",
        ),
    ] {
        let shown: String = body.chars().take(60).collect();
        let (got, answer) = client.raw(body, json_type).await.unwrap();
        assert_eq!((got, answer["error"]["code"].as_str()), (status, Some(code)), "{shown}: {answer}");
        assert!(answer["error"]["message"].as_str().is_some_and(|message| message.len() > 10), "{answer}");
    }
    let (status, answer) = client.raw("x=1", "application/x-www-form-urlencoded").await.unwrap();
    assert_eq!((status, answer["error"]["code"].as_str()), (415, Some("unsupported_media_type")));
    assert_eq!(client.get("/v2/nothing").await.unwrap().0, 404);
    assert!(client.stream(&chat_body("m", "still here", 5), |_| {}).await.unwrap().whole());
}

#[tokio::test]
async fn one_address_has_its_requests_and_a_body_nested_too_deep_is_refused_by_both_programs() {
    let fleet = fleet();
    let a = fleet.neuron("a", &fake("[harness.fake]\nstep_ms = 20\n")).await.unwrap();
    let gateway = fleet.gateway_with_api(&[&a.control], "max_requests_per_address = 1\n").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let running = tokio::spawn(client.stream_owned(chat_body("m", "hello", 40)));
    fleet.until_metric(&format!("http://{}", a.control), "neuron_num_requests_running", &[], 1.0).await.unwrap();
    let (status, error) = client.json(&chat_body("m", "hello", 1)).await.unwrap();
    assert_eq!((status, error["error"]["code"].as_str()), (429, Some("rate_limit_exceeded")), "{error}");
    assert!(running.await.unwrap().unwrap().whole());
    let deep = format!(r#"{{"model": "m", "messages": {}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    let status: Value = reqwest::get(format!("{}/api/status", gateway.admin)).await.unwrap().json().await.unwrap();
    let worker = format!("http://{}", status["nodes"][0]["status"]["data_address"].as_str().unwrap());
    for api in [&gateway.api, &worker] {
        let (status, error) = Client::new(api).unwrap().raw(deep.clone(), "application/json").await.unwrap();
        assert_eq!(status, 400, "{error}");
        assert!(error["error"]["message"].as_str().unwrap().contains("deep in one another"), "{error}");
    }
}

#[tokio::test]
async fn first_tokens_on_a_reused_connection_have_no_40_ms_step() {
    let fleet = fleet();
    let a = fleet.neuron("a", &fake("")).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let mut times = Vec::new();
    for _ in 0..30 {
        times.push(client.stream(&chat_body("m", "x", 4), |_| {}).await.unwrap().first.unwrap());
    }
    times.sort_unstable();
    eprintln!("time to first token on a reused connection: least {:?}, median {:?}", times[0], times[15]);
    // Delayed acknowledgements add their 40 ms to every single one; a busy machine does not.
    assert!(times[0] < Duration::from_millis(35), "every first token has the step: {times:?}");
}

#[tokio::test]
async fn a_load_that_lacked_the_network_is_retried_in_the_background() {
    let fleet = fleet();
    let config = "[[default_models]]\nid = \"gone\"\nharness = \"candle-of-tomorrow\"\n".to_string()
        + &fake("[harness.fake]\nfailing_loads = 2\n");
    let a = fleet.neuron("a", &config).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let answer = client.stream(&chat_body("m", "x", 4), |_| {}).await.unwrap();
    assert!(answer.whole(), "the request waited for the model: {answer:?}");
    assert!(a.process.log().contains("default model failed; going on"));
}

#[tokio::test]
async fn a_required_model_that_fails_stops_the_start_and_an_unknown_key_is_a_config_error() {
    let fleet = fleet();
    let config =
        "[[default_models]]\nid = \"m\"\nharness = \"fake\"\nrequired = true\n[harness.fake]\nfailing_loads = 1\n";
    let mut a = fleet.starting_neuron("a", config).unwrap();
    assert_eq!(a.process.wait(Duration::from_secs(20)).unwrap().code(), Some(1));
    let mut b = fleet.starting_neuron("b", "[harness.fake]\nstepms = 1\n").unwrap();
    assert_eq!(b.process.wait(Duration::from_secs(20)).unwrap().code(), Some(78));
    assert!(b.process.log().contains("stepms"), "{}", b.process.log());
}

#[tokio::test]
async fn a_second_turn_finds_the_first_in_the_cache_unless_its_salt_differs() {
    let fleet = fleet();
    let worker = fleet.neuron("a", &fake("")).await.unwrap();
    let gateway = fleet.gateway(&[&worker.control], "").await.unwrap();
    let ask = async |extra: Value| -> Value {
        let mut body = chat_body("m", &"a long way to say hello ".repeat(8), 4);
        body["stream"] = json!(false);
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let request = reqwest::Client::new().post(format!("{}/v1/chat/completions", gateway.api)).json(&body);
        request.send().await.unwrap().json().await.unwrap()
    };
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let first = ask(json!({})).await;
    let prompt = first["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(cached(&first), 0);
    let second = ask(json!({"service_tier": "priority"})).await;
    assert_eq!(cached(&second), (prompt - 1) / 32 * 32, "all whole blocks but the last token's");
    assert_eq!(second["choices"], first["choices"]);
    assert_eq!(cached(&ask(json!({"cache_salt": "mine"})).await), 0, "another tenant's prompt is not there");
    assert!(cached(&ask(json!({"cache_salt": "mine", "service_tier": "flex"})).await) > 0);
    let refused = ask(json!({"service_tier": "best"})).await;
    assert_eq!(refused["error"]["param"], "service_tier");
    let base = format!("http://{}", worker.control);
    let hits = fleet.metric(&base, "neuron_prefix_cache_hits_total", &[]).await.unwrap();
    assert_eq!(hits as u64, 2 * cached(&second));
    assert_eq!(fleet.metric(&base, "neuron_num_preemptions_total", &[]).await.unwrap(), 0.0);
}

/// A request as a gateway sends it: private headers, and maybe a resume in the body.
async fn attempt(data: &str, number: u32, body: &Value) -> String {
    let request = reqwest::Client::new().post(format!("{data}/v1/chat/completions")).json(body);
    let request = request.header("x-cortex-attempt", number).header("x-cortex-seed", 7);
    let request = request.header("x-cortex-gateway", "of-this-test");
    let request = request.header("x-cortex-completion-id", "chatcmpl-fixed").header("x-cortex-created", 1_700_000_000);
    request.send().await.unwrap().text().await.unwrap()
}

/// The ids of an attempt's token lines from index `due`, what clients would see, and the meta line.
fn read_attempt(raw: &str, mut due: usize) -> (Vec<u32>, String, Value) {
    let (mut ids, mut public, mut meta) = (Vec::new(), String::new(), Value::Null);
    for line in raw.lines() {
        let Some(private) = line.strip_prefix(":cx ") else {
            if line.starts_with("data: ") {
                public.push_str(line);
                public.push('\n');
            }
            continue;
        };
        let words: Vec<&str> = private.split(' ').collect();
        match words[0] {
            "t" => {
                assert_eq!(words[3].parse::<usize>().unwrap(), due, "indices are dense");
                let new: Vec<u32> = words[4].split(',').map(|id| id.parse().unwrap()).collect();
                due += new.len();
                ids.extend(new);
            }
            "m" => meta = serde_json::from_str(&private[2..]).unwrap(),
            "r" => panic!("refused: {private}"),
            _ => {}
        }
    }
    (ids, public, meta)
}

#[tokio::test]
async fn another_worker_resumes_after_the_last_accepted_token() {
    let fleet = fleet();
    // Without a cache, for `cached_tokens` says what each worker found in its own.
    let fake = fake("[scheduler]\nprefix_cache = false\n");
    let (a, b) = (fleet.neuron("a", &fake).await.unwrap(), fleet.neuron("b", &fake).await.unwrap());
    let gateway = fleet.gateway(&[&a.control, &b.control], "").await.unwrap();
    let status: Value = reqwest::get(format!("{}/api/status", gateway.admin)).await.unwrap().json().await.unwrap();
    let data = |i: usize| format!("http://{}", status["nodes"][i]["status"]["data_address"].as_str().unwrap());
    let mut body = chat_body("m", "go on elsewhere", 24);
    body["stream_options"] = json!({"include_usage": true});
    let (ids, whole, meta) = read_attempt(&attempt(&data(0), 1, &body).await, 0);
    assert_eq!(ids.len(), 24);
    for cut in [1, 7, 23, 24] {
        let mut resumed = body.clone();
        resumed["cortex_resume"] = json!({"choices": [{"ids": ids[..cut]}], "meta": meta});
        let (rest, public, _) = read_attempt(&attempt(&data(1), 2, &resumed).await, cut);
        assert_eq!(rest, ids[cut..], "cut at {cut}");
        assert!(whole.ends_with(&public), "cut at {cut}: what follows is byte for byte what the first would have said");
        assert!(!public.contains("assistant"), "no second role event");
    }
    let mut other = body.clone();
    other["messages"][0]["content"] = json!("another prompt");
    other["cortex_resume"] = json!({"choices": [{"ids": ids[..3]}], "meta": meta});
    assert!(attempt(&data(1), 2, &other).await.contains("resume_mismatch"));
    // A client's own private field and headers are nobody's.
    let mut forged = chat_body("m", "hello", 8);
    forged["cortex_resume"] = json!({"choices": [{"ids": [1, 2, 3]}], "meta": meta});
    let raw = attempt(&gateway.api, 9, &forged).await;
    assert!(!raw.contains(":cx") && !raw.contains("chatcmpl-fixed") && raw.contains("[DONE]"), "{raw}");
}

#[tokio::test]
async fn browsers_may_call_from_the_configured_origins_only() {
    let fleet = fleet();
    let a = fleet.neuron("a", &fake("")).await.unwrap();
    let port = fleet_tests::free_port().unwrap();
    let origin = format!("http://127.0.0.1:{port}");
    let gateway = fleet.gateway_with_api(&[&a.control], &format!("cors_origins = [\"{origin}\"]\n")).await.unwrap();
    let http = reqwest::Client::new();
    let url = format!("{}/v1/models", gateway.api);
    let header = "access-control-allow-origin";
    let ours = http.get(&url).header("origin", &origin).send().await.unwrap();
    assert_eq!(ours.headers()[header], origin.as_str());
    let theirs = http.get(&url).header("origin", "http://elsewhere").send().await.unwrap();
    assert!(theirs.headers().get(header).is_none());
    let ask = http.request(reqwest::Method::OPTIONS, format!("{}/v1/chat/completions", gateway.api));
    let named = "authorization,content-type,x-stainless-lang";
    let ask = ask.header("origin", &origin).header("access-control-request-headers", named);
    let preflight = ask.send().await.unwrap();
    assert_eq!((preflight.status().as_u16(), &preflight.headers()[header]), (204, &origin.parse().unwrap()));
    assert_eq!(preflight.headers()["access-control-allow-headers"], named, "a client's own headers come through");
}

#[tokio::test]
async fn a_slow_first_token_commits_the_stream_and_keeps_it_alive() {
    let fleet = fleet();
    let a = fleet.neuron("a", &fake("[harness.fake]\nprefill_ms = 1500\n")).await.unwrap();
    let pace = "commit_after_ms = 200\nkeep_alive_ms = 100\n";
    let gateway = fleet.gateway_with_api(&[&a.control], pace).await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let answer = client.stream(&chat_body("m", "slow", 4), |_| {}).await.unwrap();
    assert!(answer.whole(), "{answer:?}");
    assert!(answer.raw.starts_with(": keep-alive\n\n"), "{}", answer.raw);
    assert!(answer.raw.matches(": keep-alive").count() >= 3, "{}", answer.raw);
    assert!(!answer.raw.contains(":cx"));
}

#[tokio::test]
async fn a_worker_that_is_silent_before_its_first_token_is_given_up() {
    let fleet = fleet();
    let (a, b) = (fleet.neuron("a", &fake("")).await.unwrap(), fleet.neuron("b", &fake("")).await.unwrap());
    let gateway = fleet.gateway(&[&a.control, &b.control], "[proxy]\nfirst_event_timeout_ms = 400\n").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    a.process.signal(rustix::process::Signal::STOP).unwrap();
    // Within the two seconds in which the gateway does not know, some of these go to the stopped worker.
    let asked = (0..4).map(|_| client.stream_owned(chat_body("m", "hello", 4)));
    for answer in futures_util::future::join_all(asked).await {
        let answer = answer.unwrap();
        assert!(answer.whole(), "{answer:?}");
    }
    let timeouts = fleet.metric(&gateway.admin, "cortex_retries_total", &["upstream_timeout"]).await.unwrap();
    assert!(timeouts >= 1.0, "no request was on the stopped worker");
}

#[tokio::test]
async fn loading_needs_the_token_where_there_is_one_and_the_gateway_shows_it() {
    let fleet = fleet();
    let token = fleet.folder().join("token");
    std::fs::write(&token, "0123456789abcdef0123456789abcdef\n").unwrap();
    let port = fleet_tests::free_port().unwrap();
    let config = format!("{}[control]\ntoken_file = {token:?}\nbind = \"127.0.0.1:{port}\"\n", fake(""));
    let a = fleet.neuron_with_control(&format!("127.0.0.1:{port}"), &config).unwrap();
    fleet.until_ok(&format!("http://127.0.0.1:{port}/readyz"), &a.process).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], &format!("[fleet]\ntoken_file = {token:?}\n")).await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    assert!(client.stream(&chat_body("m", "hello", 4), |_| {}).await.unwrap().whole());
    let status: Value = reqwest::get(format!("{}/api/status", gateway.admin)).await.unwrap().json().await.unwrap();
    let data = status["nodes"][0]["status"]["data_address"].as_str().unwrap();
    let load = reqwest::Client::new().post(format!("http://{data}/models/load"));
    let load = load.json(&json!({"model_id": "second", "harness": "fake"}));
    let refused = load.try_clone().unwrap().send().await.unwrap();
    assert_eq!(refused.status().as_u16(), 401);
    let accepted = load.bearer_auth("0123456789abcdef0123456789abcdef").send().await.unwrap();
    assert_eq!(accepted.status().as_u16(), 200);
}

#[tokio::test]
async fn the_command_line_shows_the_fleet_and_chats() {
    let fleet = fleet();
    let a = fleet.neuron("a", &fake("")).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let run = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_test-cortex"));
        let output = command.args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, text, _) = run(&["status", "--admin", &gateway.admin]);
    assert!(code == Some(0) && text.contains("m (ready)"), "{text}");
    let (code, text, _) = run(&["status", "--json", "--admin", &gateway.admin]);
    let status: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((code, &status["nodes"][0]["routable"]), (Some(0), &json!(true)));
    // The fake engine ends by its context alone, so the command line needs a model that knows when to stop.
    let (code, _, error) = run(&["chat", "nobody", "hello", "--api", &gateway.api]);
    assert!(code == Some(1) && error.contains("does not exist"), "{error}");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_test-neuron"));
    let output = command.args(["check", "--set", "default_models=[{id=\"x\",harness=\"none\"}]"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.code() == Some(78) && text.contains("there is no harness 'none' here"), "{text}");
}
