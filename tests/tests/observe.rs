//! What operators see: rules, alerts and the dashboard over a real Prometheus that scrapes a real fleet.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fleet_tests::prometheus::{Prometheus, promtool, tool};
use fleet_tests::{Client, Fleet, Gateway, Neuron, chat_body, programs};
use serde_json::Value;
use words::Code;

/// Metrics that stay without samples, or without an increase, in this test: nothing of the kind happens here, or once.
const QUIET: [&str; 4] = [
    "cortex_continuation_gap_seconds",
    "cortex_retries_total",
    "neuron_client_disconnects_total",
    "neuron_download_bytes_total",
];

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn read(file: &str) -> String {
    std::fs::read_to_string(deploy().join(file)).unwrap_or_else(|error| panic!("deploy/{file}: {error}"))
}

/// Returns the metrics of deploy/METRICS.md: name, and type with help.
fn documented() -> BTreeMap<String, (String, String)> {
    let text = read("METRICS.md");
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `"));
    let row = |row: &str| {
        let cells: Vec<&str> = row.trim_end_matches(" |").split(" | ").collect();
        (cells[0].trim_end_matches('`').to_string(), (cells[1].to_string(), cells[3..].join(" | ")))
    };
    rows.map(row).collect()
}

/// Returns the names of our metrics in an expression, text in quotes left out.
fn names(expression: &str) -> BTreeSet<String> {
    let unquoted: String = expression.split('"').step_by(2).collect();
    let words = unquoted.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':');
    let ours = |word: &&str| ["cortex", "neuron"].iter().any(|prefix| word.starts_with(prefix));
    words.filter(ours).map(str::to_string).collect()
}

/// Returns a metric's name as it is registered.
fn family(name: &str, known: &BTreeMap<String, (String, String)>) -> String {
    let parts = ["_bucket", "_sum", "_count"].iter().filter_map(|part| name.strip_suffix(part));
    let mut histograms = parts.filter(|name| known.get(*name).is_some_and(|(kind, _)| kind == "histogram"));
    histograms.next().unwrap_or(name).to_string()
}

/// Returns the dashboard's expressions with their panels' titles, variables filled in.
fn panels() -> Vec<(String, String)> {
    let dashboard: Value = serde_json::from_str(&read("grafana/fleet.json")).unwrap();
    let fill = |text: &str| text.replace("$__rate_interval", "10s").replace("$model", ".*").replace("$instance", ".*");
    let mut found = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let title = panel["title"].as_str().unwrap().to_string();
            found.push((title, fill(target["expr"].as_str().unwrap())));
        }
    }
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        if let Some(query) = variable["definition"].as_str() {
            let inner = query.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')')).unwrap();
            let (metric, label) = inner.split_once(", ").unwrap();
            found.push((format!("the variable {}", variable["name"]), format!("count by ({label}) ({metric})")));
        }
    }
    found
}

#[test]
fn rules_and_alerts_are_valid_and_each_alert_fires() {
    let Some(program) = tool("promtool") else { return };
    let folder = deploy().join("prometheus");
    promtool(&program, &folder, &["check", "config", "scrape.yml"], "").unwrap();
    let said = promtool(&program, &folder, &["test", "rules", "alerts.test.yml"], "").unwrap();
    assert!(said.contains("SUCCESS"), "{said}");
    let (alerts, tests) = (read("prometheus/alerts.yml"), read("prometheus/alerts.test.yml"));
    let mut count = 0;
    for alert in alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        let fires = format!("alertname: {alert}\n        exp_alerts:\n          - exp_labels");
        assert!(tests.contains(&fires), "no test fires {alert}");
        count += 1;
    }
    assert!(count >= 7, "{count} alerts");
}

#[test]
fn the_error_budget_counts_what_the_fleet_owes() {
    let owed = Code::ALL.iter().map(|code| code.row()).filter(|row| row.http >= 500).map(|row| row.code);
    let wanted = format!("outcome=~\"{}\"", owed.collect::<Vec<_>>().join("|"));
    let rules = read("prometheus/rules.yml");
    let found: Vec<&str> = rules.lines().filter(|line| line.contains("outcome=~")).collect();
    assert_eq!(found.len(), 4, "one for each window");
    for line in found {
        assert!(line.contains(&wanted), "{line}\nhas not {wanted}");
    }
}

#[test]
fn the_dashboard_shows_metrics_that_are_documented_or_recorded() {
    let (known, rules) = (documented(), read("prometheus/rules.yml"));
    for (title, expression) in panels() {
        for name in names(&expression) {
            let recorded = rules.contains(&format!("record: {name}\n"));
            assert!(recorded || known.contains_key(&family(&name, &known)), "{title}: {name} is nothing we export");
        }
    }
}

/// Writes Prometheus' configuration for this fleet: the shipped one, with its own hosts and no patience.
async fn configure(fleet: &Fleet, gateway: &Gateway) -> PathBuf {
    let folder = fleet.folder();
    let quick = |text: String| text.replace(": 15s", ": 500ms").replace("for: 1m", "for: 1s");
    for file in ["rules.yml", "alerts.yml"] {
        std::fs::write(folder.join(file), quick(read(&format!("prometheus/{file}")))).unwrap();
    }
    let (code, targets) = fleet.cortex(&["targets", "--admin", &gateway.admin]).await.unwrap();
    assert_eq!(code, Some(0), "{targets}");
    std::fs::write(folder.join("neurons.json"), &targets).unwrap();
    let admin = gateway.admin.strip_prefix("http://").unwrap();
    let config = fleet.folder().join(format!("cortex-{}.toml", admin.rsplit(':').next().unwrap()));
    let (_, configured) = fleet.cortex(&["targets", "--config", config.to_str().unwrap()]).await.unwrap();
    assert_eq!(configured, targets, "what is configured is what the gateway knows");
    let (shipped, workers) = (read("prometheus/scrape.yml"), "static_configs:\n      - targets: [\"127.0.0.1:13231\"]");
    assert!(shipped.contains(workers) && shipped.contains("127.0.0.1:31314"), "the shipped file has other hosts");
    let ours = shipped.replace("127.0.0.1:31314", admin);
    let ours = ours.replace(workers, "file_sd_configs:\n      - files: [\"neurons.json\"]");
    let path = folder.join("prometheus.yml");
    std::fs::write(&path, quick(ours)).unwrap();
    path
}

/// Fetches a program's metrics.
async fn scrape(base: &str, query: &str) -> (u16, String) {
    let response = reqwest::get(format!("{base}/metrics{query}")).await.unwrap();
    (response.status().as_u16(), response.text().await.unwrap())
}

/// Checks that a program exports what is documented, and as it is documented.
fn check_documented(text: &str) {
    let known = documented();
    let (mut help, mut seen) = (BTreeMap::new(), 0);
    for line in text.lines() {
        if let Some((name, words)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            help.insert(name, words);
        }
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            let wanted = known.get(name).unwrap_or_else(|| panic!("{name} is not in METRICS.md; run cargo xtask gen"));
            assert_eq!((wanted.0.as_str(), wanted.1.as_str()), (kind, help[name]), "{name}");
            seen += 1;
        }
    }
    assert!(seen > 10, "{seen} families");
}

/// Runs a few requests: twice the same long prompt, so that the second finds its prefix.
async fn load(client: &Client) {
    let body = chat_body("m", &"say something of some length ".repeat(6), 12);
    let requests = (0..4).map(|_| client.stream(&body, |_| {}));
    for answer in futures_util::future::join_all(requests).await {
        assert!(answer.unwrap().whole());
    }
}

async fn check_metrics(gateway: &Gateway, worker: &Neuron) {
    let Some(program) = tool("promtool") else { return };
    let worker = format!("http://{}", worker.control);
    for base in [gateway.admin.as_str(), &worker] {
        let (_, text) = scrape(base, "").await;
        check_documented(&text);
        let said = promtool(&program, &deploy(), &["check", "metrics"], &text).unwrap();
        assert_eq!(said, "", "{base}: promtool has something to say");
    }
    let (status, text) = scrape(&worker, "?compat=vllm").await;
    assert_eq!(status, 200);
    for name in ["num_requests_running", "kv_cache_usage_perc", "generation_tokens_total", "request_success_total"] {
        assert!(text.contains(&format!("\nvllm:{name}{{engine=\"0\",")), "vllm:{name} is not in\n{text}");
    }
    let (status, text) = scrape(&worker, "?compat=tgi").await;
    let error: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((status, error["error"]["param"].as_str()), (400, Some("compat")));
}

#[tokio::test]
async fn prometheus_sees_the_fleet_an_alert_fires_for_a_killed_worker_and_every_panel_has_data() {
    let Some(program) = tool("prometheus") else { return };
    let fleet = Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap();
    let worker = "[[default_models]]\nid = \"m\"\nharness = \"fake\"\n[harness.fake]\nstep_ms = 5\n";
    let (mut a, b) = (fleet.neuron("a", worker).await.unwrap(), fleet.neuron("b", worker).await.unwrap());
    let store = format!("[rollout]\nstore = {:?}\n", fleet.folder().join("rollout.sqlite"));
    let gateway = fleet.gateway(&[&a.control, &b.control], &store).await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    load(&client).await;
    check_metrics(&gateway, &b).await;
    let prometheus = Prometheus::start(&program, &configure(&fleet, &gateway).await).await.unwrap();
    prometheus.until("count(up == 1) == 3").await.unwrap();

    // Whoever runs on the worker when it dies goes on at the other one.
    let long = chat_body("m", "a long answer", 300);
    let streams = (0..6).map(|_| {
        let (client, long) = (client.clone(), long.clone());
        tokio::spawn(async move { client.stream(&long, |_| {}).await.unwrap() })
    });
    let streams: Vec<_> = streams.collect();
    fleet.until_metric(&format!("http://{}", a.control), "neuron_generation_tokens_total", &[], 60.0).await.unwrap();
    let calm = prometheus.query("ALERTS{alertstate=\"firing\"}").await.unwrap();
    assert!(calm.is_empty(), "alerts before anything happened: {calm:?}");
    a.process.kill().unwrap();
    let killed = Instant::now();
    let fires = format!("ALERTS{{alertname=\"NeuronDown\",alertstate=\"firing\",instance=\"{}\"}}", a.control);
    prometheus.until(&fires).await.unwrap();
    eprintln!("NeuronDown fired {:?} after the kill", killed.elapsed());
    for stream in streams {
        assert!(stream.await.unwrap().whole());
    }
    let continued = fleet.metric(&gateway.admin, "cortex_continuations_total", &[]).await.unwrap();
    assert!(continued >= 1.0, "nobody was on the worker when it died");

    let known = documented();
    let quiet = |expression: &str| names(expression).iter().any(|name| QUIET.contains(&family(name, &known).as_str()));
    let mut waiting = panels();
    let until = Instant::now() + Duration::from_secs(20);
    while !waiting.is_empty() {
        assert!(Instant::now() < until, "no data for {waiting:#?}");
        load(&client).await;
        let mut empty = Vec::new();
        for (title, expression) in waiting {
            let samples = prometheus.query(&expression).await.unwrap_or_else(|error| panic!("{title}: {error}"));
            if samples.is_empty() && !quiet(&expression) {
                empty.push((title, expression));
            }
        }
        waiting = empty;
    }
    check_rules(&prometheus).await;
}

/// Checks that every rule is healthy, and that what it looks at is exported or recorded.
async fn check_rules(prometheus: &Prometheus) {
    let known = documented();
    let data = prometheus.get("/api/v1/rules").await.unwrap();
    let groups = data["groups"].as_array().unwrap();
    let rules: Vec<&Value> = groups.iter().flat_map(|group| group["rules"].as_array().unwrap()).collect();
    let recorded: BTreeSet<&str> =
        rules.iter().filter(|rule| rule["type"] == "recording").map(|rule| rule["name"].as_str().unwrap()).collect();
    for rule in &rules {
        assert_eq!(rule["health"], "ok", "{rule:#}");
        for name in names(rule["query"].as_str().unwrap()) {
            if !recorded.contains(name.as_str()) {
                assert!(known.contains_key(&family(&name, &known)), "{}: {name} is nothing we export", rule["name"]);
            }
        }
    }
}
