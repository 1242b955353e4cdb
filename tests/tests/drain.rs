//! Drains of real workers under real streams: whoever asks for them, nobody loses a token and no phase its budget.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use fleet_tests::scene::{asked, fake, metric, ready, stream, until_running};
use fleet_tests::{Client, Fleet, chat_body, fake_answer, free_port, programs};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

fn fleet() -> Fleet {
    Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_under_three_gateways_costs_no_client_a_token_and_is_undone() {
    let fleet = fleet();
    // So long a settle would be seen: only acknowledgements can end it in time.
    let config = fake("[harness.fake]\nstep_ms = 10\n[drain]\nsettle_max_ms = 15000\n");
    let (a, b) =
        (ready(&fleet, "a", free_port().unwrap(), &config).await.unwrap(), fleet.neuron("b", &config).await.unwrap());
    let mut gateways = Vec::new();
    for _ in 0..3 {
        gateways.push(fleet.gateway(&[&a.control, &b.control], "").await.unwrap());
    }
    let prompts: Vec<String> = (0..9).map(|i| format!("move me {i}")).collect();
    let running: Vec<_> = prompts
        .iter()
        .enumerate()
        .map(|(i, prompt)| stream(&Client::new(&gateways[i % 3].api).unwrap(), prompt, 300))
        .collect();
    until_running(&fleet, &a, 3.0).await.unwrap();
    let begun = Instant::now();
    let (code, text) = fleet.cortex(&["drain", "a", "--handoff", "now", "--admin", &gateways[0].admin]).await.unwrap();
    eprintln!("{text}drained after {:?}", begun.elapsed());
    assert!(code == Some(0) && text.contains("a: done"), "{code:?} {text}");
    assert!(begun.elapsed() < Duration::from_secs(12), "settle waited for its whole time");
    assert!(metric(&fleet, &a, "neuron_handoffs_offered_total").await.unwrap() >= 3.0);
    for gateway in &gateways {
        let seen = fleet.until_status(gateway, "a", |node| node["status"]["state"]["state"] == "drained").await;
        let seen = seen.unwrap();
        assert_eq!((&seen["routable"], &seen["status"]["in_flight"]), (&json!(false), &json!(0)));
        // What is configured stays listed, so that nobody takes the model for unknown.
        let models = seen["status"]["models"].as_array().unwrap();
        assert!(models.iter().all(|model| model["state"] == "absent"), "{models:?}");
    }
    let labels = ["node=\"a\""];
    let mut before = Vec::new();
    for gateway in &gateways {
        before.push(fleet.metric(&gateway.admin, "cortex_attempts_total", &labels).await.unwrap());
        for i in 0..7 {
            assert!(asked(gateway, &format!("elsewhere {i}")).await.unwrap().whole());
        }
    }
    for (gateway, before) in gateways.iter().zip(before) {
        assert_eq!(fleet.metric(&gateway.admin, "cortex_attempts_total", &labels).await.unwrap(), before);
    }
    for (prompt, answer) in prompts.iter().zip(running) {
        let answer = answer.await.unwrap().unwrap();
        assert!(answer.whole(), "{answer:?}");
        assert_eq!(answer.text, fake_answer(prompt, 300), "not a token is lost or doubled");
    }
    let (code, text) = fleet.cortex(&["undrain", &a.control, "--admin", &gateways[1].admin]).await.unwrap();
    assert!(code == Some(0), "{text}");
    drop(b);
    assert!(asked(&gateways[2], "back again").await.unwrap().whole(), "it serves again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_cuts_what_the_first_one_lets_run() {
    let fleet = fleet();
    let mut a = ready(&fleet, "a", free_port().unwrap(), &fake("[harness.fake]\nstep_ms = 20\n")).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let running = stream(&Client::new(&gateway.api).unwrap(), "for long", 4000);
    until_running(&fleet, &a, 1.0).await.unwrap();
    a.process.terminate().unwrap();
    let closed = |node: &Value| node["status"]["state"]["phase"] == "closed";
    fleet.until_status(&gateway, "a", closed).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(a.process.alive().unwrap(), "the first one lets it run");
    let begun = Instant::now();
    a.process.terminate().unwrap();
    assert_eq!(a.process.wait(Duration::from_secs(10)).unwrap().code(), Some(75), "cut, and the exit code says so");
    eprintln!("gone {:?} after the second signal", begun.elapsed());
    drop(gateway);
    let answer = running.await.unwrap();
    assert!(answer.is_err() || answer.is_ok_and(|answer| !answer.done), "never [DONE] after a failure");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_to_the_whole_process_group_loses_no_stream() {
    let fleet = fleet().in_one_group();
    let mut a = ready(&fleet, "a", free_port().unwrap(), &fake("[harness.fake]\nstep_ms = 10\n")).await.unwrap();
    let mut gateway = fleet.gateway(&[&a.control], "[drain]\nsettle_ms = 100\n").await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let running: Vec<_> = (0..4).map(|i| stream(&client, &format!("all leave {i}"), 150)).collect();
    until_running(&fleet, &a, 4.0).await.unwrap();
    fleet.signal_group(rustix::process::Signal::TERM).unwrap();
    for (i, answer) in running.into_iter().enumerate() {
        let answer = answer.await.unwrap().unwrap();
        assert!(answer.whole() && answer.text == fake_answer(&format!("all leave {i}"), 150), "{answer:?}");
    }
    assert_eq!(a.process.wait(Duration::from_secs(20)).unwrap().code(), Some(0));
    assert_eq!(gateway.process.wait(Duration::from_secs(20)).unwrap().code(), Some(0));
}

/// When a worker entered each state since it was told to stop, in seconds of the day, by its own log: a watcher from
/// outside can miss a state that lasted a millisecond.
fn states(log: &str) -> Vec<(String, f64)> {
    let entered = |line: &str| {
        let (time, change) = line.split_once("neuron::publisher: node state from=")?;
        let state = change.split_once(" to=")?.1.split(' ').next()?;
        let clock = time.split_once('T')?.1.split_once('Z')?.0;
        let seconds = clock.split(':').try_fold(0.0, |sum, part| Some(sum * 60.0 + part.parse::<f64>().ok()?))?;
        Some((state.to_string(), seconds))
    };
    let all: Vec<_> = log.lines().filter_map(entered).collect();
    let first = all.iter().position(|(state, _)| state.starts_with("Draining")).unwrap();
    all[first..].to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_phase_is_over_its_budget_whatever_hangs_on_the_worker() {
    let fleet = fleet();
    let limits = "[harness.fake]\nstep_ms = 20\n[scheduler]\nmax_running = 6\n\
                  [drain]\nsettle_max_ms = 2000\nhandoff_s = 1.0\ndeadline_s = 4.0\ncut_max_ms = 1000\nunload_max_s = 5.0\n";
    let config = fake(limits);
    let mut a = ready(&fleet, "a", free_port().unwrap(), &config).await.unwrap();
    let port = free_port().unwrap();
    let late = format!("127.0.0.1:{port}");
    let gateway = fleet.gateway(&[&a.control, &late], "").await.unwrap();
    let seen = fleet.status(&gateway, "a").await.unwrap();
    let address = seen["status"]["data_address"].as_str().unwrap().to_string();
    let direct = Client::new(&format!("http://{address}")).unwrap();
    // Streams that never end, one of them with a reader that stopped reading.
    let endless: Vec<_> = (0..5).map(|i| stream(&direct, &format!("endless {i}"), 8000)).collect();
    let body = chat_body("m", "nobody reads", 8000).to_string();
    let mut stopped = TcpStream::connect(&address).await.unwrap();
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
    let length = body.len();
    stopped.write_all(format!("{head}content-length: {length}\r\n\r\n{body}").as_bytes()).await.unwrap();
    until_running(&fleet, &a, 6.0).await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    let queued: Vec<_> = (0..50).map(|i| stream(&client, &format!("queued {i}"), 5)).collect();
    let base = format!("http://{}", a.control);
    fleet.until_metric(&base, "neuron_num_requests_waiting", &[], 50.0).await.unwrap();
    let mut silent = Vec::new();
    for _ in 0..1000 {
        silent.push(TcpStream::connect(&address).await.unwrap());
    }
    let b = fleet.neuron_on("b", port, &fake("")).unwrap();
    fleet.until_ok(&format!("http://{late}/readyz"), &b.process).await.unwrap();
    fleet.until_metric(&gateway.admin, "cortex_node_routable", &[], 2.0).await.unwrap();

    let begun = Instant::now();
    a.process.terminate().unwrap();
    for (i, answer) in queued.into_iter().enumerate() {
        let answer = answer.await.unwrap().unwrap();
        assert!(answer.whole() && answer.text == fake_answer(&format!("queued {i}"), 5), "{answer:?}");
    }
    let handed_back = begun.elapsed();
    let status = tokio::task::spawn_blocking(move || (a.process.wait(Duration::from_secs(30)), a)).await.unwrap();
    let took = begun.elapsed();
    assert_eq!(status.0.unwrap().code(), Some(75), "streams were cut");
    let states = states(&status.1.process.log());
    eprintln!("50 queued requests served elsewhere after {handed_back:?}; exit after {took:?}");
    let budgets = [
        ("Draining(Settle)", 2.0),
        ("Draining(Closed)", 4.0),
        ("Draining(Handoff)", 4.0),
        ("Draining(Force)", 1.0),
        ("Unloading", 5.0),
    ];
    for (phase, budget) in budgets {
        let at = states.iter().position(|(state, _)| state == phase).unwrap_or_else(|| panic!("{phase}: {states:?}"));
        let spent = (states[at + 1].1 - states[at].1).rem_euclid(86_400.0);
        eprintln!("{phase:<18} {spent:.3} of {budget} s");
        // What a busy machine's clocks add.
        assert!(spent < budget + 1.0, "{phase} took {spent} s");
    }
    assert_eq!(states.last().unwrap().0, "Stopped");
    assert!(took < Duration::from_secs_f64(4.0 + 1.0 + 5.0 + 2.0 + 1.0), "{took:?}");
    for answer in endless {
        let answer = answer.await.unwrap().unwrap();
        assert_eq!(answer.error.as_ref().unwrap()["code"], "stream_interrupted", "{answer:?}");
        assert!(!answer.done && answer.pieces > 0, "never [DONE] after a failure");
    }
    let back = fleet.metric(&gateway.admin, "cortex_retries_total", &["reason=\"draining\""]).await.unwrap();
    assert_eq!(back, 50.0, "each queued request was handed back once");
    drop((silent, stopped));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_stopped_reading_holds_no_drain() {
    let fleet = fleet();
    let limits = "[harness.fake]\ncontext_length = 200000\n[drain]\nsettle_max_ms = 500\ndeadline_s = 1.0\n\
                  cut_max_ms = 500\nunload_max_s = 2.0\n";
    let mut a = ready(&fleet, "a", free_port().unwrap(), &fake(limits)).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let seen = fleet.status(&gateway, "a").await.unwrap();
    let address: std::net::SocketAddr = seen["status"]["data_address"].as_str().unwrap().parse().unwrap();
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stopped = socket.connect(address).await.unwrap();
    let body = chat_body("m", "nobody reads", 190_000).to_string();
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
    let length = body.len();
    stopped.write_all(format!("{head}content-length: {length}\r\n\r\n{body}").as_bytes()).await.unwrap();
    // Every buffer on the way is full once no more tokens are made.
    let (mut before, mut rounds) = (0.0, 0);
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let made = metric(&fleet, &a, "neuron_generation_tokens_total").await.unwrap();
        if made > 0.0 && made == before {
            break;
        }
        (before, rounds) = (made, rounds + 1);
        assert!(rounds < 100, "the stream never stalls: {made} tokens");
    }
    assert_eq!(metric(&fleet, &a, "neuron_num_requests_running").await.unwrap(), 1.0, "it is not over");
    let begun = Instant::now();
    a.process.terminate().unwrap();
    assert_eq!(a.process.wait(Duration::from_secs(20)).unwrap().code(), Some(75));
    let took = begun.elapsed();
    eprintln!("{before} tokens in the buffers; gone after {took:?}");
    assert!(took < Duration::from_secs_f64(1.0 + 0.5 + 2.0 + 2.0 + 1.0), "{took:?}");
    drop(stopped);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_silent_gateway_asked_for_is_cancelled_when_its_lease_is_over() {
    let fleet = fleet();
    let a = fleet.neuron("a", &fake("[harness.fake]\nstep_ms = 20\n")).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], "").await.unwrap();
    let running = stream(&Client::new(&gateway.api).unwrap(), "nobody hears", 4000);
    until_running(&fleet, &a, 1.0).await.unwrap();
    gateway.process.signal(rustix::process::Signal::STOP).unwrap();
    let base = format!("http://{}", a.control);
    let took = fleet.until_metric(&base, "neuron_orphaned_requests_total", &[], 1.0).await.unwrap();
    eprintln!("cancelled {took:?} after its gateway fell silent");
    assert!(took > Duration::from_secs(5) && took < Duration::from_secs(14), "{took:?}");
    let until = Instant::now() + Duration::from_secs(5);
    while metric(&fleet, &a, "neuron_num_requests_running").await.unwrap() > 0.0 {
        assert!(Instant::now() < until, "the slot is not free");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    running.abort();
    gateway.process.signal(rustix::process::Signal::CONT).unwrap();
    fleet.until_status(&gateway, "a", |node| node["routable"] == true).await.unwrap();
    assert!(asked(&gateway, "heard again").await.unwrap().whole());
}
