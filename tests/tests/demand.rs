//! Models that a request loads: real workers on the fake harness, with memory for fewer models than they know.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use fleet_tests::{Answer, Client, Fleet, Neuron, chat_body, fake_answer, free_port, programs};
use serde_json::{Value, json};

fn fleet() -> Fleet {
    Fleet::new(programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"))).unwrap()
}

/// A catalogue of models of one memory each, by name and what else their entries say.
fn catalogue(budget: usize, fake: &str, models: &[(&str, &str)]) -> String {
    let entry = |(id, more): &(&str, &str)| {
        let memory = if more.contains("memory_mib") { "" } else { "memory_mib = 100\n" };
        format!("[[models]]\nid = \"{id}\"\nharness = \"fake\"\n{memory}{more}\n")
    };
    let models: String = models.iter().map(entry).collect();
    format!("{models}[memory]\nbudget_mib = {budget}\nturn_s = 0.3\n[harness.fake]\n{fake}\n")
}

struct Worker {
    neuron: Neuron,
    control: String,
    api: String,
    client: Client,
}

impl Worker {
    async fn start(fleet: &Fleet, config: &str) -> Worker {
        Self::start_with(fleet, config, "").await
    }

    async fn start_with(fleet: &Fleet, config: &str, data: &str) -> Worker {
        let data = format!("bind = \"127.0.0.1:0\"\n{data}");
        let neuron = fleet.starter().neuron_with_data("a", free_port().unwrap(), &data, config).unwrap();
        fleet.until_ok(&format!("http://{}/readyz", neuron.control), &neuron.process).await.unwrap();
        let api = neuron.process.data_url().await.unwrap();
        let (control, client) = (format!("http://{}", neuron.control), Client::new(&api).unwrap());
        Worker { neuron, control, api, client }
    }

    async fn ask(&self, model: &str, message: &str, tokens: u32) -> Answer {
        self.client.stream(&chat_body(model, message, tokens), |_| {}).await.unwrap()
    }

    /// Asks, and wants the oracle's answer.
    async fn right(&self, model: &str, message: &str) {
        let answer = self.ask(model, message, 8).await;
        assert!(answer.whole() && answer.text == fake_answer(message, 8), "{model}: {answer:?}");
    }

    async fn models(&self) -> Value {
        self.client.get("/models").await.unwrap().1
    }

    async fn model(&self, id: &str) -> Value {
        let models = self.models().await;
        models.as_array().unwrap().iter().find(|model| model["id"] == id).cloned().unwrap_or_default()
    }

    async fn until(&self, id: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        for _ in 0..500 {
            let model = self.model(id).await;
            if wanted(&model) {
                return model;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{id} is not as wanted: {}\n{}", self.models().await, self.neuron.process.log());
    }

    async fn until_state(&self, id: &str, state: &str) -> Value {
        self.until(id, |model| model["state"] == state).await
    }

    async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        let answer = reqwest::Client::new().post(format!("{}{path}", self.api)).json(&body).send().await.unwrap();
        (answer.status().as_u16(), answer.json().await.unwrap_or_default())
    }

    async fn loads(&self, fleet: &Fleet, labels: &[&str]) -> f64 {
        fleet.metric(&self.control, "neuron_model_loads_total", labels).await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_loads_an_absent_model_by_its_name_or_an_alias_and_many_start_one_load() {
    let fleet = fleet();
    let models = [("m", "aliases = [\"small\"]\nfamily = \"f\"\nwarmup = \"a\"\nwarmup_tokens = 3"), ("other", "")];
    let worker = Worker::start(&fleet, &catalogue(500, "load_ms = 200", &models)).await;
    let absent = worker.model("m").await;
    assert_eq!((&absent["state"], &absent["card"]["on_demand"]), (&json!("absent"), &json!(true)), "{absent}");
    let (_, list) = worker.client.get("/v1/models").await.unwrap();
    assert_eq!(list["data"].as_array().unwrap().len(), 2, "{list}");

    let asks = (0..20).map(|i| {
        let worker = &worker;
        async move { worker.right(if i % 2 == 0 { "m" } else { "small" }, &format!("question {i}")).await }
    });
    futures_util::future::join_all(asks).await;
    assert_eq!(worker.loads(&fleet, &["model=\"m\"", "outcome=\"ok\""]).await, 1.0);
    let ready = worker.until("m", |model| model["state"] == "ready").await;
    assert_eq!(ready["memory_bytes"], json!(100 << 20));
    assert!(ready["since_unix_ms"].as_u64().unwrap() > 0, "{ready}");
    assert_eq!(worker.model("other").await["state"], "absent", "nobody asked for it");
    let nobody = worker.ask("third", "x", 1).await;
    assert_eq!((nobody.status, &nobody.error.unwrap()["code"]), (404, &json!("model_not_here")));
    for (path, state) in [("/models/unload", "absent"), ("/models/load", "ready")] {
        assert_eq!(worker.post(path, json!({"model_id": "small"})).await.0, 200, "{path}");
        assert_eq!(worker.model("m").await["state"], state, "an alias means its model");
    }
    assert_eq!(worker.models().await.as_array().unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_entry_says_of_answers_and_context_holds() {
    let fleet = fleet();
    let models = [("m", "context_length = 64\nsampling = { max_tokens = 3 }\nwarmup = \"a word\"")];
    let worker = Worker::start(&fleet, &catalogue(500, "", &models)).await;
    let mut body = chat_body("m", "x", 1);
    body.as_object_mut().unwrap().remove("max_tokens");
    let answer = worker.client.stream(&body, |_| {}).await.unwrap();
    assert!(answer.whole() && answer.text == fake_answer("x", 3), "{answer:?}");
    worker.right("m", "a request's own limit wins").await;
    let long = worker.ask("m", &"x".repeat(100), 1).await;
    assert_eq!((long.status, &long.error.unwrap()["code"]), (400, &json!("context_length_exceeded")));
    assert_eq!(worker.client.get("/v1/models/m").await.unwrap().1["max_model_len"], 64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_while_its_model_loads_cancels_no_load_and_holds_nothing() {
    let fleet = fleet();
    let worker = Worker::start(&fleet, &catalogue(150, "load_ms = 400", &[("a", ""), ("b", "")])).await;
    let left = tokio::time::timeout(Duration::from_millis(150), worker.ask("a", "x", 1)).await;
    assert!(left.is_err(), "it does not load that fast");
    worker.until_state("a", "ready").await;
    worker.until("a", |model| model["idle_s"].as_u64() >= Some(1)).await;
    worker.right("b", "in its place").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_with_a_stream_is_never_evicted_and_its_end_makes_room() {
    let fleet = fleet();
    let config = catalogue(150, "step_ms = 10", &[("a", ""), ("b", "")]);
    let worker = Worker::start(&fleet, &config).await;
    worker.right("a", "warm").await;
    worker.until("a", |model| model["load"]["running"] == 0).await;
    let long = async {
        let answer = worker.ask("a", "a long one", 100).await;
        assert!(answer.whole() && answer.text == fake_answer("a long one", 100), "{answer:?}");
        tokio::time::Instant::now()
    };
    let wants_room = async {
        worker.until("a", |model| model["load"]["running"] == 1).await;
        worker.right("b", "next").await;
        tokio::time::Instant::now()
    };
    let (stream_over, answered) = tokio::join!(long, wants_room);
    assert!(answered > stream_over);
    assert_eq!(worker.model("a").await["state"], "absent");
    assert_eq!(fleet.metric(&worker.control, "neuron_model_evictions_total", &["model=\"a\""]).await.unwrap(), 1.0);
    assert_eq!(fleet.metric(&worker.control, "neuron_memory_used_bytes", &[]).await.unwrap(), f64::from(100 << 20));
    for gauge in ["neuron_kv_cache_usage_ratio", "neuron_kv_cache_kept_ratio", "neuron_num_requests_running"] {
        assert_eq!(
            fleet.metric(&worker.control, gauge, &["model=\"a\""]).await.unwrap(),
            0.0,
            "{gauge} of a model that is gone"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_pinned_stays_and_what_does_not_fit_is_refused_with_the_numbers() {
    let fleet = fleet();
    let models = [("a", "pin = true"), ("b", ""), ("c", ""), ("big", "memory_mib = 1000")];
    let worker = Worker::start(&fleet, &catalogue(250, "", &models)).await;
    for model in ["a", "b", "c"] {
        worker.right(model, "x").await;
    }
    let state = async |id: &str| worker.model(id).await["state"].clone();
    assert_eq!([state("a").await, state("b").await, state("c").await], ["ready", "absent", "ready"]);
    let refused = worker.ask("big", "x", 1).await;
    let error = refused.error.unwrap();
    assert_eq!((refused.status, &error["code"]), (503, &json!("insufficient_memory")), "{error}");
    let words = error["message"].as_str().unwrap();
    assert!(words.contains("'big' needs 1000 MiB; models may take 250 MiB"), "{words}");
    assert!(words.contains("'a' 100 MiB, pinned"), "{words}");
    let (status, body) = worker.post("/models/load", json!({"model_id": "b", "make_room": false})).await;
    assert_eq!((status, &body["error"]["code"]), (503, &json!("insufficient_memory")), "{body}");
    assert_eq!([state("a").await, state("c").await], ["ready", "ready"]);
    assert_eq!(worker.post("/models/load", json!({"model_id": "b"})).await.0, 200);
    assert_eq!([state("a").await, state("b").await, state("c").await], ["ready", "ready", "absent"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_model_goes_after_its_time_and_its_next_request_brings_it_back() {
    let fleet = fleet();
    let worker = Worker::start(&fleet, &catalogue(500, "step_ms = 15", &[("m", "ttl_s = 1"), ("n", "")])).await;
    worker.right("n", "stays").await;
    let answer = worker.ask("m", "longer than its time", 100).await;
    assert!(answer.whole() && answer.text == fake_answer("longer than its time", 100), "{answer:?}");
    worker.until_state("m", "absent").await;
    worker.right("m", "again").await;
    assert_eq!(worker.loads(&fleet, &["model=\"m\"", "outcome=\"ok\""]).await, 2.0);
    assert_eq!(fleet.metric(&worker.control, "neuron_model_ttl_unloads_total", &["model=\"m\""]).await.unwrap(), 1.0);
    assert_eq!(worker.model("n").await["state"], "ready");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unload_stops_a_load_and_tells_those_who_wait_for_it() {
    let fleet = fleet();
    let worker = Worker::start(&fleet, &catalogue(500, "load_ms = 20000", &[("m", "")])).await;
    let asks = futures_util::future::join_all((0..3).map(|_| worker.ask("m", "x", 1)));
    let unload = async {
        // One that came after the unload would begin a load of its own.
        while worker.client.get("/health").await.unwrap().1["in_flight"] != 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        worker.until_state("m", "loading").await;
        let begun = tokio::time::Instant::now();
        let (status, body) = worker.post("/models/unload", json!({"model_id": "m"})).await;
        assert_eq!((status, begun.elapsed() < Duration::from_secs(5)), (200, true), "{body}");
    };
    let (answers, ()) = tokio::join!(asks, unload);
    for answer in answers {
        assert_eq!((answer.status, &answer.error.unwrap()["code"]), (503, &json!("draining")));
    }
    assert_eq!(worker.model("m").await["state"], "absent");
    assert_eq!(worker.loads(&fleet, &["model=\"m\"", "outcome=\"cancelled\""]).await, 1.0);
    assert_eq!(fleet.metric(&worker.control, "neuron_memory_used_bytes", &[]).await.unwrap(), 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_models_that_fit_one_at_a_time_answer_everybody_right() {
    let fleet = fleet();
    let config = catalogue(150, "step_ms = 2\nload_ms = 30", &[("a", ""), ("b", "")]);
    let worker = Worker::start(&fleet, &config).await;
    let until = tokio::time::Instant::now() + Duration::from_secs(4);
    let hammer = |client: usize| {
        let worker = &worker;
        async move {
            let mut asked = 0;
            while tokio::time::Instant::now() < until {
                // Two of them want one model alone, so that it is never idle.
                let model = if client < 2 || (asked + client).is_multiple_of(2) { "a" } else { "b" };
                worker.right(model, &format!("{client} asks {asked}")).await;
                asked += 1;
            }
            asked
        }
    };
    let never_over = async {
        let (mut most, budget) = (0.0f64, f64::from(150 << 20));
        while tokio::time::Instant::now() < until {
            let used = fleet.metric(&worker.control, "neuron_memory_used_bytes", &[]).await.unwrap();
            assert!(used <= budget, "{used} of {budget}");
            most = most.max(used);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        most
    };
    let (asked, most) = tokio::join!(futures_util::future::join_all((0..8).map(hammer)), never_over);
    let asked: usize = asked.into_iter().sum();
    assert!(most > 0.0);
    let evictions = fleet.metric(&worker.control, "neuron_model_evictions_total", &[]).await.unwrap();
    assert!(evictions >= 4.0 && asked > 30, "{asked} answers over {evictions} swaps");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_finds_no_room_in_time_is_told_who_holds_it() {
    let fleet = fleet();
    let config = catalogue(150, "step_ms = 20", &[("a", ""), ("b", "")]);
    let worker = Worker::start_with(&fleet, &config, "load_wait_s = 0.5").await;
    worker.right("a", "warm").await;
    worker.until("a", |model| model["load"]["running"] == 0).await;
    let long = async { assert!(worker.ask("a", "a long one", 100).await.whole()) };
    let refused = async {
        worker.until("a", |model| model["load"]["running"] == 1).await;
        let answer = worker.ask("b", "x", 1).await;
        let error = answer.error.unwrap();
        assert_eq!((answer.status, &error["code"]), (503, &json!("insufficient_memory")), "{error}");
        assert!(error["message"].as_str().unwrap().contains("'a' 100 MiB, in use"), "{error}");
    };
    tokio::join!(long, refused);
    worker.right("b", "now").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_whose_model_does_not_come_in_time_is_told_how_far_it_is() {
    let fleet = fleet();
    let config = catalogue(500, "load_ms = 3000", &[("m", "")]);
    let worker = Worker::start_with(&fleet, &config, "load_wait_s = 0.6").await;
    let body = chat_body("m", "x", 1);
    let url = format!("{}/v1/chat/completions", worker.api);
    let answer = reqwest::Client::new().post(url).json(&body).send().await.unwrap();
    let (status, after) = (answer.status().as_u16(), answer.headers()["retry-after"].to_str().unwrap().to_string());
    let body: Value = answer.json().await.unwrap();
    let (error, loading) = (&body["error"], &body["error"]["loading"]);
    assert_eq!(
        (status, &error["code"], &loading["state"]),
        (503, &json!("model_loading"), &json!("loading")),
        "{body}"
    );
    let (progress, eta) = (loading["progress"].as_f64().unwrap(), loading["eta_s"].as_f64().unwrap());
    assert!(progress > 0.05 && progress < 0.5 && eta > 1.0 && eta < 4.0, "{body}");
    assert_eq!(after.parse::<f64>().unwrap(), eta.ceil());
    worker.until_state("m", "ready").await;
    worker.right("m", "then it is there").await;
}
