//! Traces over OTLP: real programs, a collector of our own, and one trace from the client's span to decode.
#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::routing::post;
use fleet_tests::{Client, Fleet, Neuron, chat_body, programs};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;

const WORKER: &str = "[[default_models]]\nid = \"m\"\nharness = \"fake\"\n[harness.fake]\nstep_ms = 5\n";
/// Longer than any test: what arrives was flushed by an exit.
const NEVER: (&str, &str) = ("OTEL_BSP_SCHEDULE_DELAY", "60000");

/// A span as it arrived, with its program.
#[derive(Clone, Debug)]
struct Arrived {
    service: String,
    instance: String,
    span: Span,
}

fn text(attributes: &[KeyValue], key: &str) -> String {
    let value = attributes.iter().find(|known| known.key == key).and_then(|known| known.value.clone());
    show(&value.unwrap_or_default())
}

fn show(value: &AnyValue) -> String {
    match &value.value {
        Some(any_value::Value::StringValue(text)) => text.clone(),
        Some(any_value::Value::IntValue(number)) => number.to_string(),
        Some(any_value::Value::DoubleValue(number)) => number.to_string(),
        Some(any_value::Value::BoolValue(flag)) => flag.to_string(),
        Some(any_value::Value::ArrayValue(values)) => values.values.iter().map(show).collect::<Vec<_>>().join(","),
        _ => String::new(),
    }
}

impl Arrived {
    fn text(&self, key: &str) -> String {
        text(&self.span.attributes, key)
    }

    fn failed(&self) -> bool {
        self.span.status.as_ref().is_some_and(|status| status.code == 2)
    }
}

/// A collector: takes what it is sent.
#[derive(Clone, Default)]
struct Collector {
    spans: Arc<Mutex<Vec<Arrived>>>,
}

async fn take(State(collector): State<Collector>, headers: HeaderMap, body: Bytes) -> &'static str {
    assert_eq!(headers["content-type"], "application/x-protobuf");
    assert_eq!(headers["x-tenant"], "ours", "OTEL_EXPORTER_OTLP_HEADERS are sent");
    let export = ExportTraceServiceRequest::decode(body).unwrap();
    for resource in export.resource_spans {
        let about = resource.resource.unwrap_or_default().attributes;
        for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            let (service, instance) = (text(&about, "service.name"), text(&about, "service.instance.id"));
            collector.spans.lock().unwrap().push(Arrived { service, instance, span });
        }
    }
    ""
}

impl Collector {
    /// Starts it; returns its URL.
    async fn start(&self) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().route("/v1/traces", post(take)).with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        url
    }

    fn of(&self, trace: &str) -> Vec<Arrived> {
        let spans = self.spans.lock().unwrap();
        spans.iter().filter(|arrived| hex(&arrived.span.trace_id) == trace).cloned().collect()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn fleet(variables: &[(&str, &str)]) -> Fleet {
    let programs = programs(env!("CARGO_BIN_EXE_test-cortex"), env!("CARGO_BIN_EXE_test-neuron"));
    Fleet::new(programs).unwrap().with_environment(variables)
}

/// Returns the spans below another, in the order of their beginnings.
fn below<'a>(spans: &'a [Arrived], parent: &[u8]) -> Vec<&'a Arrived> {
    let mut found: Vec<&Arrived> = spans.iter().filter(|arrived| arrived.span.parent_span_id == parent).collect();
    found.sort_by_key(|arrived| arrived.span.start_time_unix_nano);
    found
}

fn named<'a>(spans: &[&'a Arrived], name: &str) -> Vec<&'a Arrived> {
    spans.iter().filter(|arrived| arrived.span.name == name).copied().collect()
}

/// Asks with a client's own trace; returns the status and the whole answer.
async fn ask(api: &str, traceparent: &str, tokens: u32) -> (u16, String) {
    let request = reqwest::Client::new().post(format!("{api}/v1/chat/completions"));
    let request = request.header("traceparent", traceparent).header("tracestate", "vendor=1");
    let response = request.json(&chat_body("m", "hello", tokens)).send().await.unwrap();
    (response.status().as_u16(), response.text().await.unwrap())
}

async fn leave(gateway: fleet_tests::Gateway, workers: Vec<Neuron>) {
    let processes = [gateway.process].into_iter().chain(workers.into_iter().map(|worker| worker.process));
    for mut process in processes {
        if process.alive().unwrap() {
            process.terminate().unwrap();
            process.wait(Duration::from_secs(10)).unwrap();
        }
    }
}

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const UNSAMPLED: &str = "11111111111111111111111111111111";
const PARENT: &str = "00f067aa0ba902b7";
/// Leaves at once when nothing runs.
const QUICK: &str = "[drain]\nsettle_ms = 0\n";

// Waiting for an exit blocks a thread; the collector needs another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_trace_leads_from_the_client_through_the_gateway_to_prefill_and_decode() {
    let collector = Collector::default();
    let url = collector.start().await;
    let fleet = fleet(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &url), ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=ours"), NEVER]);
    let a = fleet.neuron("a", WORKER).await.unwrap();
    let gateway = fleet.gateway(&[&a.control], QUICK).await.unwrap();
    let (status, answer) = ask(&gateway.api, &format!("00-{TRACE}-{PARENT}-01"), 20).await;
    assert!(status == 200 && answer.ends_with("data: [DONE]\n\n"), "{answer}");
    assert_eq!(ask(&gateway.api, &format!("00-{UNSAMPLED}-{PARENT}-00"), 4).await.0, 200);
    assert!(collector.spans.lock().unwrap().is_empty(), "nothing is due yet");
    leave(gateway, vec![a]).await;
    assert!(collector.of(UNSAMPLED).is_empty(), "the client's word on sampling is kept");

    let spans = collector.of(TRACE);
    assert_eq!(spans.len(), 7, "{spans:#?}");
    assert!(spans.iter().all(|arrived| arrived.span.trace_state == "vendor=1"), "{spans:#?}");
    assert!(spans.iter().all(|arrived| !arrived.failed()));
    let roots: Vec<&Arrived> = spans.iter().filter(|arrived| hex(&arrived.span.parent_span_id) == PARENT).collect();
    let [root] = roots.as_slice() else { panic!("not one root: {spans:#?}") };
    assert_eq!((root.service.as_str(), root.span.name.as_str(), root.span.kind), ("cortex", "chat m", 2));
    let parts = below(&spans, &root.span.span_id);
    assert_eq!(parts.iter().map(|part| part.span.name.as_str()).collect::<Vec<_>>(), ["route", "proxy"]);
    let proxy = parts[1];
    assert_eq!((proxy.text("cortex.node").as_str(), proxy.text("cortex.outcome").as_str()), ("a", "ok"));
    assert_eq!(proxy.span.kind, 3, "a client of the worker");
    let worker = below(&spans, &proxy.span.span_id);
    let [worker] = worker.as_slice() else { panic!("not one request on the worker: {spans:#?}") };
    assert_eq!((worker.service.as_str(), worker.instance.as_str()), ("neuron", "a"));
    assert_eq!((worker.span.name.as_str(), worker.span.kind), ("chat m", 2));
    let parts = below(&spans, &worker.span.span_id);
    assert_eq!(parts.iter().map(|part| part.span.name.as_str()).collect::<Vec<_>>(), ["queue", "prefill", "decode"]);
    for pair in parts.windows(2) {
        let (ends, begins) = (pair[0].span.end_time_unix_nano, pair[1].span.start_time_unix_nano);
        assert!(ends.abs_diff(begins) < 2_000_000, "one part follows another, {ends} {begins}");
    }
    let decode = parts[2].span.end_time_unix_nano - parts[2].span.start_time_unix_nano;
    assert!(decode > 19 * 4_000_000, "19 steps of 5 ms took {decode} ns");
    for span in [root, worker] {
        for (key, value) in [
            ("gen_ai.operation.name", "chat"),
            ("gen_ai.provider.name", "cortex"),
            ("gen_ai.request.model", "m"),
            ("gen_ai.usage.input_tokens", "11"),
            ("gen_ai.usage.output_tokens", "20"),
        ] {
            assert_eq!(span.text(key), value, "{key} of {}", span.service);
        }
        assert!(span.text("gen_ai.response.id").starts_with("chatcmpl-"));
    }
    assert_eq!(worker.text("gen_ai.request.max_tokens"), "20");
    assert_eq!(worker.text("gen_ai.response.finish_reasons"), "length");
    assert!(!format!("{spans:?}").contains("hello"), "what is said stays with those who say it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_continued_stream_is_one_trace_with_an_attempt_that_failed_and_one_that_did_not() {
    let collector = Collector::default();
    let url = collector.start().await;
    let fleet = fleet(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &url), ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=ours"), NEVER]);
    let mut workers = vec![fleet.neuron("a", WORKER).await.unwrap(), fleet.neuron("b", WORKER).await.unwrap()];
    let gateway = fleet.gateway(&[&workers[0].control, &workers[1].control], QUICK).await.unwrap();
    let asked = {
        let api = gateway.api.clone();
        tokio::spawn(async move { ask(&api, &format!("00-{TRACE}-{PARENT}-01"), 300).await })
    };
    let begun = Instant::now();
    let runner = 'found: loop {
        assert!(begun.elapsed() < Duration::from_secs(10), "nobody runs it");
        for (i, worker) in workers.iter().enumerate() {
            let base = format!("http://{}", worker.control);
            if fleet.metric(&base, "neuron_generation_tokens_total", &[]).await.unwrap() > 10.0 {
                break 'found i;
            }
        }
    };
    let mut victim = workers.remove(runner);
    victim.process.kill().unwrap();
    let (status, answer) = asked.await.unwrap();
    assert!(status == 200 && answer.ends_with("data: [DONE]\n\n"), "{answer}");
    leave(gateway, workers).await;

    let spans = collector.of(TRACE);
    let all: Vec<&Arrived> = spans.iter().collect();
    let roots: Vec<&Arrived> = spans.iter().filter(|arrived| hex(&arrived.span.parent_span_id) == PARENT).collect();
    let [root] = roots.as_slice() else { panic!("not one root: {spans:#?}") };
    assert!(!root.failed());
    assert_eq!((root.text("cortex.attempts").as_str(), root.text("cortex.continuations").as_str()), ("2", "1"));
    assert_eq!(root.text("gen_ai.usage.output_tokens"), "300");
    let attempts = named(&below(&spans, &root.span.span_id), "proxy");
    let [first, second] = attempts.as_slice() else { panic!("not two attempts: {spans:#?}") };
    assert!(first.failed() && first.text("error.type") == "upstream_failed", "{first:#?}");
    assert!(!second.failed() && second.text("cortex.outcome") == "ok", "{second:#?}");
    assert_ne!(first.text("cortex.node"), second.text("cortex.node"));
    let accepted: u32 = second.text("cortex.accepted_tokens").parse().unwrap();
    assert!(accepted > 5, "{accepted}");
    // The one that was killed told nobody; the other one's request hangs below the second attempt.
    let worker = below(&spans, &second.span.span_id);
    assert_eq!((worker.len(), worker[0].text("cortex.attempt").as_str()), (1, "2"));
    assert_eq!(worker[0].text("gen_ai.usage.output_tokens"), (300 - accepted).to_string());
    assert_eq!(named(&all, "decode").len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_hangs_costs_spans_and_neither_requests_nor_the_exit() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    // It takes connections and says nothing, for ever.
    let mute = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            held.push(stream);
        }
    });
    let fleet = fleet(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &url),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "60000"),
        ("OTEL_BSP_SCHEDULE_DELAY", "10"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "8"),
    ]);
    let worker = fleet.neuron("a", &WORKER.replace("step_ms = 5", "step_ms = 0")).await.unwrap();
    let gateway = fleet.gateway(&[&worker.control], QUICK).await.unwrap();
    let client = Client::new(&gateway.api).unwrap();
    for _ in 0..20 {
        assert!(client.stream(&chat_body("m", "hello", 4), |_| {}).await.unwrap().whole());
    }
    let dropped = fleet.metric(&gateway.admin, "cortex_trace_spans_total", &["outcome=\"dropped\""]).await.unwrap();
    // Three spans a request; eight wait, and up to eight are with the collector.
    assert!(dropped >= 20.0 * 3.0 - 16.0 - 3.0, "{dropped} dropped");
    let begun = Instant::now();
    leave(gateway, vec![worker]).await;
    let took = begun.elapsed();
    eprintln!("both programs were gone after {took:?}");
    assert!(took < Duration::from_secs(6), "{took:?}");
    mute.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_without_traces_passes_the_clients_on() {
    let collector = Collector::default();
    let url = collector.start().await;
    let fleet = fleet(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &url), ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=ours"), NEVER]);
    let worker = fleet.neuron("a", WORKER).await.unwrap();
    let fleet = fleet.with_environment(&[]);
    let gateway = fleet.gateway(&[&worker.control], QUICK).await.unwrap();
    assert_eq!(ask(&gateway.api, &format!("00-{TRACE}-{PARENT}-01"), 4).await.0, 200);
    assert_eq!(ask(&gateway.api, "nonsense", 4).await.0, 200);
    let log = gateway.process.log();
    assert!(!log.contains("trace_id"), "{log}");
    leave(gateway, vec![worker]).await;
    let spans = collector.of(TRACE);
    let roots: Vec<&Arrived> = spans.iter().filter(|arrived| hex(&arrived.span.parent_span_id) == PARENT).collect();
    assert_eq!((spans.len(), roots.len(), roots[0].service.as_str()), (4, 1, "neuron"), "{spans:#?}");
    assert!(spans.iter().all(|arrived| arrived.span.trace_state == "vendor=1"), "{spans:#?}");
    assert_eq!(collector.spans.lock().unwrap().len(), 8, "a traceparent that is none begins a trace");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_variable_that_can_not_be_used_stops_the_start_and_is_named() {
    let fleet = fleet(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://x:4317"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]);
    let mut worker = fleet.starting_neuron("a", WORKER).unwrap();
    assert_eq!(worker.process.wait(Duration::from_secs(20)).unwrap().code(), Some(78));
    let log = worker.process.log();
    assert!(log.contains("OTEL_EXPORTER_OTLP_PROTOCOL") && log.contains("grpc"), "{log}");
}
