//! Events, failures and policies with real processes and a real server; what is refused; what is remembered.
#![allow(clippy::unwrap_used)]
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::{HookOptions, HttpHookOptions};

fn hooks(options: &HooksOptions, functions: Vec<FunctionHook>) -> Result<Hooks, HookConfigError> {
    let registry = Registry::new();
    Hooks::new(options, functions, Clock::start(), HookMetrics::register(&registry, "neuron").unwrap())
}

fn turn(event: HookEvent) -> Turn {
    let model = event.of_model().then(|| "org/m".to_string());
    let (node, state_dir, harness) = ("n1".into(), "/state".into(), Some("fake".to_string()));
    Turn { event, node, state_dir, pid: 7, model, harness, port: Some(4242), detail: Value::Null }
}

fn one(event: HookEvent, policy: Option<OnFailure>, command: &[&str]) -> HooksOptions {
    let command = command.iter().map(|word| word.to_string()).collect();
    let hook =
        HookOptions { on: Some(event), command, on_failure: policy, timeout_s: Some(0.5), ..HookOptions::default() };
    HooksOptions { run: vec![hook], ..HooksOptions::default() }
}

fn script(folder: &Path, name: &str, text: &str, mode: u32) -> String {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    path.display().to_string()
}

/// Every way to fail at every event under every policy that it takes: what stops, what is said, and nothing is left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_failure_at_every_event_means_what_its_policy_says() {
    let folder = tempfile::tempdir().unwrap();
    let (alive, dir) = (folder.path().join("alive"), folder.path());
    let forks = format!("#!/bin/sh\n(trap '' TERM HUP; sleep 2; echo x >> {}) &\nexit 3\n", alive.display());
    let hangs = format!("#!/bin/sh\ntrap '' TERM\n(sleep 2; echo x >> {}) & wait\n", alive.display());
    let ways = [
        ("missing", "/nonexistent/hook".to_string(), "no such program"),
        ("not executable", script(dir, "plain", "#!/bin/sh\n", 0o644), "is it executable"),
        ("exits 1", script(dir, "one", "#!/bin/sh\nexit 1\n", 0o755), "exit status: 1"),
        ("hangs", script(dir, "hangs", &hangs, 0o755), "took longer than 0.5 s"),
        ("forks a child that hangs", script(dir, "forks", &forks, 0o755), "exit status: 3"),
        (
            "prints a hundred megabytes",
            script(dir, "prints", "#!/bin/sh\nyes | head -c 104857600\nexit 2\n", 0o755),
            "",
        ),
        ("dies by a signal", script(dir, "dies", "#!/bin/sh\nkill -9 $$\n", 0o755), "signal 9"),
    ];
    let ring = LogRing::new(64 << 10);
    let mut tasks = tokio::task::JoinSet::new();
    for event in HookEvent::ALL {
        for policy in [None, Some(OnFailure::Fail), Some(OnFailure::Warn), Some(OnFailure::Ignore)] {
            if policy == Some(OnFailure::Fail) && !event.can_stop() {
                let refused = hooks(&one(event, policy, &["x"]), Vec::new()).unwrap_err();
                assert_eq!(refused.place, "hooks.run[0].on_failure");
                continue;
            }
            for (way, program, words) in ways.clone() {
                // The endless printer takes a processor to itself: once is enough.
                if way.starts_with("prints") && (event != HookEvent::Startup || policy.is_some()) {
                    continue;
                }
                let ring = ring.clone();
                tasks.spawn(async move {
                    let set = hooks(&one(event, policy, &[&program]), Vec::new()).unwrap();
                    let ended = set.run(&turn(event), &ring).await;
                    let wanted = policy.unwrap_or(event.default_policy()) == OnFailure::Fail;
                    assert_eq!(ended.is_err(), wanted, "{way} at {event:?} under {policy:?}");
                    let report = set.reports().remove(0);
                    let failure = report.last.unwrap().failure.unwrap();
                    assert!(failure.contains(words), "{way}: {failure}");
                    assert_eq!((report.runs, report.failures), (1, 1));
                });
            }
        }
        while let Some(ended) = tasks.join_next().await {
            ended.unwrap();
        }
    }
    tokio::time::sleep(Duration::from_millis(2200)).await;
    assert!(!alive.exists(), "children outlived their hooks");
    let mine = |state: &str| {
        let own = format!(" {} ", std::process::id());
        let stats = std::fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| std::fs::read_to_string(entry.unwrap().path().join("stat")).ok());
        stats
            .filter(|stat| stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(&format!(" {state}{own}"))))
            .count()
    };
    let mut zombies = mine("Z");
    for _ in 0..40 {
        if zombies == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        zombies = mine("Z");
    }
    assert_eq!(zombies, 0, "zombies are left");
}

#[tokio::test]
async fn a_hook_knows_its_turn_by_its_environment_its_input_and_its_macros() {
    let mut options = one(
        HookEvent::AfterHealthy,
        None,
        &[
            "sh",
            "-c",
            "cat; echo; echo \"$NEURON_EVENT $NEURON_MODEL $NEURON_PORT $EXTRA\"; echo ${MODEL} ${PLACE} ${PID}",
        ],
    );
    options.macros = [("PLACE".to_string(), "/slots".to_string())].into();
    options.run[0].env = [("EXTRA".to_string(), "${PLACE}/x".to_string())].into();
    let ring = LogRing::new(64 << 10);
    hooks(&options, Vec::new()).unwrap().run(&turn(HookEvent::AfterHealthy), &ring).await.unwrap();
    let lines: Vec<String> = ring.tail(10).into_iter().map(|line| line.text).collect();
    let told: Value = serde_json::from_str(&lines[0]).unwrap();
    assert_eq!((told["event"].as_str(), told["model"].as_str()), (Some("after_healthy"), Some("org/m")));
    assert_eq!(lines[1..], ["after_healthy org/m 4242 /slots/x", "org/m /slots 7"]);
    assert_eq!(&*ring.tail(1)[0].source, "sh");
}

#[tokio::test]
async fn hooks_run_in_order_and_a_failing_shutdown_hook_skips_nothing() {
    let hook = |event, n: usize| HookOptions {
        on: Some(event),
        command: ["sh", "-c", &format!("echo {n}; exit {n}")].map(String::from).to_vec(),
        ..HookOptions::default()
    };
    let events = [HookEvent::Shutdown, HookEvent::Ready];
    let run = events.iter().flat_map(|event| (0..3).map(|n| hook(*event, n))).collect();
    let set = hooks(&HooksOptions { run, ..HooksOptions::default() }, Vec::new()).unwrap();
    for (event, wanted) in events.into_iter().zip(["2 1 0", "0 1 2"]) {
        let ring = LogRing::new(4096);
        set.run(&turn(event), &ring).await.unwrap();
        let lines: Vec<String> = ring.tail(9).into_iter().map(|line| line.text).collect();
        assert_eq!(lines.join(" "), wanted);
    }
    let first = hook(HookEvent::Startup, 1);
    let run = vec![first.clone(), hook(HookEvent::Startup, 0)];
    let ring = LogRing::new(4096);
    let set = hooks(&HooksOptions { run, ..HooksOptions::default() }, Vec::new()).unwrap();
    assert!(
        set.run(&turn(HookEvent::Startup), &ring).await.unwrap_err().to_string().contains("'sh' of startup failed")
    );
    assert_eq!(ring.tail(9).len(), 1, "nothing runs after what stopped the start");
}

#[tokio::test]
async fn a_hook_for_some_models_runs_for_these_alone() {
    let mut options = one(HookEvent::Ready, None, &["true"]);
    options.run[0].models = vec!["org/*".into(), "exact".into()];
    let (set, ring) = (hooks(&options, Vec::new()).unwrap(), LogRing::new(4096));
    for (model, runs) in [("org/m", 1), ("other/m", 1), ("exact", 2), ("exactly", 2)] {
        set.run(&Turn { model: Some(model.into()), ..turn(HookEvent::Ready) }, &ring).await.unwrap();
        assert_eq!(set.reports()[0].runs, runs, "{model}");
    }
    assert_eq!(set.longest(HookEvent::Ready, Some("org/m")), Duration::from_millis(500));
    assert_eq!(set.longest(HookEvent::Ready, Some("other")), Duration::ZERO);
}

/// Answers one request with `status` after reading it; hands back what it read.
async fn server(status: &'static str) -> (String, tokio::task::JoinHandle<String>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/tell?m=${{MODEL}}", listener.local_addr().unwrap());
    let task = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let (mut seen, mut buffer) = (Vec::new(), [0; 4096]);
        while !String::from_utf8_lossy(&seen).contains("}") {
            match stream.read(&mut buffer).await.unwrap() {
                0 => break,
                read => seen.extend_from_slice(&buffer[..read]),
            }
        }
        if !status.is_empty() {
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 5\r\n\r\nsaid\n");
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
        tokio::time::sleep(Duration::from_secs(if status.is_empty() { 5 } else { 0 })).await;
        String::from_utf8_lossy(&seen).into_owned()
    });
    (url, task)
}

#[tokio::test]
async fn a_call_sends_the_turn_and_its_status_is_its_outcome() {
    for (status, words) in [("204 No Content", ""), ("500 Internal Server Error", "answered 500"), ("", "took longer")]
    {
        let (url, task) = server(status).await;
        let mut options = one(HookEvent::Ready, None, &[]);
        let headers = [("x-node".to_string(), "${NODE}".to_string())].into();
        options.run[0].http = Some(HttpHookOptions { url, headers, ..HttpHookOptions::default() });
        let (set, ring) = (hooks(&options, Vec::new()).unwrap(), LogRing::new(4096));
        set.run(&turn(HookEvent::Ready), &ring).await.unwrap();
        let failure = set.reports()[0].last.clone().unwrap().failure.unwrap_or_default();
        assert!(failure.contains(words) && failure.is_empty() == words.is_empty(), "{failure}");
        if !status.is_empty() {
            let seen = task.await.unwrap();
            assert!(seen.starts_with("POST /tell?m=org/m HTTP/1.1") && seen.contains("x-node: n1"), "{seen}");
            assert!(seen.contains(r#""event":"ready""#), "{seen}");
        }
    }
    let mut options = one(HookEvent::BeforeLoad, None, &[]);
    let url = "http://127.0.0.1:1/".to_string();
    options.run[0].http = Some(HttpHookOptions { url, ..HttpHookOptions::default() });
    let set = hooks(&options, Vec::new()).unwrap();
    let stopped = set.run(&turn(HookEvent::BeforeLoad), &LogRing::new(64)).await.unwrap_err();
    assert!(stopped.to_string().contains("could not be called"), "{stopped}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn functions_run_fail_panic_and_are_given_up() {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let functions = vec![
        FunctionHook::blocking("counts", HookEvent::Ready, move |turn| {
            assert_eq!(turn.model.as_deref(), Some("org/m"));
            counted.fetch_add(1, Ordering::Relaxed);
            Ok(())
        })
        .described("counts how often a model became ready"),
        FunctionHook::asynchronous("refuses", HookEvent::Ready, async |_| Err("no".to_string())),
        FunctionHook::blocking("panics", HookEvent::Ready, |_| panic!("on purpose")),
        FunctionHook::blocking("sticks", HookEvent::Ready, |_| {
            std::thread::sleep(Duration::from_secs(2));
            Ok(())
        })
        .within(Duration::from_millis(50)),
        FunctionHook::asynchronous("hangs", HookEvent::Ready, async |_| std::future::pending().await)
            .within(Duration::from_millis(50)),
    ];
    let (set, ring) = (hooks(&HooksOptions::default(), functions).unwrap(), LogRing::new(64));
    for _ in 0..2 {
        set.run(&turn(HookEvent::Ready), &ring).await.unwrap();
    }
    let failures: Vec<Option<String>> = set.reports().into_iter().map(|report| report.last.unwrap().failure).collect();
    let words = |text: &str| Some(text.to_string());
    let given_up = "an earlier run of it has not ended yet";
    let wanted = [None, words("no"), words("it panicked"), words(given_up), words("it took longer than 0.05 s")];
    assert_eq!((failures.as_slice(), count.load(Ordering::Relaxed)), (&wanted[..], 2));
    let fails = FunctionHook::blocking("x", HookEvent::BeforeStop, |_| Ok(())).on_failure(OnFailure::Fail);
    assert!(hooks(&HooksOptions::default(), vec![fails]).is_err());
}

#[test]
fn what_could_never_run_is_refused_with_its_place() {
    let refused = |change: fn(&mut HooksOptions)| {
        let mut options = one(HookEvent::Ready, None, &["true"]);
        change(&mut options);
        let error = hooks(&options, Vec::new()).unwrap_err();
        (error.place, error.problem)
    };
    let (place, problem) = refused(|options| options.run[0].command.push("${NOPE}".into()));
    assert!(place == "hooks.run[0].command" && problem.contains("'ready' knows EVENT"), "{place}: {problem}");
    assert_eq!(refused(|options| options.run[0].on = None).0, "hooks.run[0].on");
    assert_eq!(refused(|options| options.run[0].command.clear()).0, "hooks.run[0]");
    assert_eq!(refused(|options| options.run[0].timeout_s = Some(f64::NAN)).0, "hooks.run[0].timeout_s");
    assert_eq!(refused(|options| _ = options.macros.insert("PORT".into(), "1".into())).0, "hooks.macros.PORT");
    let with_both = |options: &mut HooksOptions| options.run[0].http = Some(HttpHookOptions::default());
    assert_eq!(refused(with_both).0, "hooks.run[0]");
    let (place, _) = refused(|options| {
        options.run[0].command.clear();
        options.run[0].http = Some(HttpHookOptions { url: "ftp://x".into(), ..HttpHookOptions::default() });
    });
    assert_eq!(place, "hooks.run[0].http.url");
    assert_eq!(refused(|options| options.run = vec![options.run[0].clone(); HOOKS_MAX + 1]).0, "hooks");
    let (place, _) = refused(|options| {
        options.run[0].on = Some(HookEvent::Startup);
        options.run[0].models = vec!["m".into()];
    });
    assert_eq!(place, "hooks.run[0].models");
    assert_eq!(refused(|options| options.folder = Some("/nonexistent/folder".into())).0, "/nonexistent/folder");
}
