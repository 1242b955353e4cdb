//! A stream outlives the worker under it, byte for byte: cut at every position, in every way.
//!
//! `CORTEX_CUT_PROMPTS` sets how many prompts are cut at all positions (20 by default).
#![allow(clippy::unwrap_used)]

use fleet_tests::{Answer, Client, Cut, Rig, chat_body};
use serde_json::{Value, json};

fn worker(model: neuron::options::ModelEntry) -> neuron::options::Options {
    let mut options = neuron::options::Options { default_models: vec![model], ..Default::default() };
    options.harness.candle.kv_cache_mib = 32;
    options.harness.candle.threads = 1;
    options
}

fn fake() -> neuron::options::ModelEntry {
    neuron::options::ModelEntry { id: "m".into(), harness: Some("fake".into()), ..Default::default() }
}

/// The events of each choice by themselves: which choice's event comes first is chance.
fn by_choice(answer: &Answer) -> Vec<String> {
    let mut parts: Vec<String> = Vec::new();
    for event in answer.bytes().split_inclusive("\n\n") {
        let index = event.find("\"index\":").map_or(0, |at| {
            let digits: String = event[at + 8..].chars().take_while(char::is_ascii_digit).collect();
            digits.parse::<usize>().unwrap() + 1
        });
        parts.resize(parts.len().max(index + 1), String::new());
        parts[index].push_str(event);
    }
    parts
}

/// Prompts are computed anew in each request: what a cache holds differs between a first time and a second.
fn request(model: &str, prompt: &str, max_tokens: u32, more: Value) -> Value {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let salt = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let mut body = chat_body(model, prompt, max_tokens);
    body["stream_options"] = json!({"include_usage": true});
    body["cache_salt"] = json!(format!("salt {salt}"));
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// Cuts one answer at every mark, and says how many cuts were made; each must leave it byte-equal to the uncut one.
async fn cut_everywhere(rig: &Rig, client: &Client, body: &dyn Fn() -> Value) -> usize {
    rig.arm([]);
    let whole = client.stream(&body(), |_| {}).await.unwrap();
    assert!(whole.whole(), "{whole:?}");
    let wanted = by_choice(&whole);
    let mut made = 0;
    // At the mark, inside its line, inside its event's data, just before its end.
    for mark in 0.. {
        let cut = Cut { mark, bytes: [0, 9, 60, 25][mark % 4], hangs: false };
        rig.arm([cut]);
        let answer = client.stream(&body(), |_| {}).await.unwrap();
        assert_eq!(by_choice(&answer), wanted, "{cut:?}");
        match rig.cuts_made() {
            0 => break,
            cuts => made += cuts,
        }
    }
    made
}

fn prompts() -> usize {
    std::env::var("CORTEX_CUT_PROMPTS").ok().and_then(|count| count.parse().ok()).unwrap_or(20)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_cut_at_any_token_is_the_uncut_stream() {
    let rig = Rig::start(&[worker(fake()), worker(fake())], Default::default()).await.unwrap();
    let client = Client::new(&rig.api).unwrap();
    let mut made = 0;
    for i in 0..prompts() {
        let more = match i % 4 {
            0 => json!({}),
            1 => json!({"temperature": 1.0, "seed": i}),
            // The fake engine's letters make such stops half matched again and again, and some whole.
            2 => json!({"stop": ["abcde", "e", "é"]}),
            _ => json!({"n": 2}),
        };
        made += cut_everywhere(&rig, &client, &|| request("m", &format!("prompt {i}"), 14, more.clone())).await;
    }
    eprintln!("{made} cuts of {} prompts", prompts());
    assert!(made > prompts() * 8, "{made} cuts are too few");
}

/// A worker whose models say what their prompts tell them to, each in its form of calls.
fn scripted() -> neuron::options::Options {
    let model = |parser: &str| neuron::options::ModelEntry {
        id: parser.into(),
        tool_parser: Some(parser.into()),
        reasoning_parser: Some("think".into()),
        ..fake()
    };
    let default_models = ["hermes", "llama", "mistral", "qwen3_coder", "glm45"].map(model).to_vec();
    neuron::options::Options { default_models, ..Default::default() }
}

/// A request to a model that says `script`; with `opened`, its prompt begins its reasoning.
fn scripted_request(model: &str, script: &str, opened: bool, more: Value) -> Value {
    let tool = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}});
    let mut body = request(model, &format!("\u{2}{script}\u{3}{}", if opened { "<think>" } else { "" }), 400, more);
    if body.get("tools").is_none() {
        body["tools"] = json!([tool("get_weather"), tool("f")]);
    }
    body
}

const HERMES: &str = "<think>\nhm, é\n</think>\n\nI ask.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"é\"}}\n\
                      </tool_call>\n<tool_call>{\"name\":\"get_weather\"}</tool_call>";

const CODER: &str = "<think>hm</think>I ask.\n<tool_call>\n<function=f>\n<parameter=a>\né \"so\"\n</parameter>\n<parameter=b>\n[1, 2]\n\
                     </parameter>\n</function>\n</tool_call>";

/// Puts a stream together as clients do: each choice's message and finish, and the usage.
fn folded(answer: &Answer, choices: usize) -> (Vec<(Value, Value)>, Value) {
    let empty = json!({"role": null, "content": null, "refusal": null});
    let mut all = vec![(empty, Value::Null); choices];
    let mut usage = Value::Null;
    for event in answer.raw.split("\n\n").filter_map(|event| event.strip_prefix("data: ")) {
        let Ok(chunk) = serde_json::from_str::<Value>(event) else { continue };
        usage = chunk["usage"].clone();
        let Some(choice) = chunk["choices"].get(0) else { continue };
        let (message, finish) = &mut all[choice["index"].as_u64().unwrap() as usize];
        assert!(finish.is_null(), "nothing comes after the finish");
        *finish = choice["finish_reason"].clone();
        for (key, value) in choice["delta"].as_object().unwrap() {
            match (key.as_str(), value.as_str()) {
                ("tool_calls", _) => {
                    let (call, index) = (&value[0], value[0]["index"].as_u64().unwrap() as usize);
                    let calls = message.as_object_mut().unwrap().entry("tool_calls").or_insert_with(|| json!([]));
                    let calls = calls.as_array_mut().unwrap();
                    if index == calls.len() {
                        let mut call = call.clone();
                        call.as_object_mut().unwrap().shift_remove("index");
                        calls.push(call);
                        continue;
                    }
                    let so_far = &mut calls[index]["function"]["arguments"];
                    *so_far =
                        json!(so_far.as_str().unwrap().to_string() + call["function"]["arguments"].as_str().unwrap());
                    assert_eq!((call.as_object().unwrap().len(), call["function"].as_object().unwrap().len()), (2, 1));
                }
                (_, Some(more)) => message[key] = json!(message[key].as_str().unwrap_or_default().to_string() + more),
                _ => {}
            }
        }
    }
    (all, usage)
}

/// Asks for one JSON, and returns each choice's message and finish, and the usage.
async fn asked_whole(client: &Client, mut body: Value) -> (Vec<(Value, Value)>, Value) {
    body["stream"] = json!(false);
    body["stream_options"] = Value::Null;
    let (status, answer) = client.json(&body).await.unwrap();
    assert_eq!(status, 200, "{answer}");
    let choices = answer["choices"].as_array().unwrap().iter();
    (
        choices.map(|choice| (choice["message"].clone(), choice["finish_reason"].clone())).collect(),
        answer["usage"].clone(),
    )
}

/// Takes the ids of calls away, which differ by request; they are the same in every attempt.
fn without_ids(mut said: (Vec<(Value, Value)>, Value)) -> (Vec<(Value, Value)>, Value) {
    for (message, _) in &mut said.0 {
        for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
            assert_eq!(call["id"].as_str().unwrap().len(), 9);
            call["id"] = json!("");
        }
    }
    said
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_with_reasoning_and_calls_cut_at_any_token_is_the_uncut_stream() {
    let rig = Rig::start(&[scripted(), scripted()], Default::default()).await.unwrap();
    let client = Client::new(&rig.api).unwrap();
    let mut made = 0;
    for (model, script, opened, more) in [
        ("hermes", HERMES, false, json!({})),
        (
            "hermes",
            "hm</think><tool_call>{\"name\":\"f\"}</tool_call> and more",
            true,
            json!({"parallel_tool_calls": false}),
        ),
        ("llama", "{\"name\": \"f\", \"parameters\": {\"a\": 1}}; {\"name\": \"no", false, json!({"n": 2})),
        ("mistral", "Well [TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}, {\"name\": \"f\"}]", false, json!({})),
        // What turns out to be no JSON, and what is cut off.
        ("hermes", "<tool_call>{\"name\": \"f\", \"arguments\": {a: \"}\"</tool_call>x", false, json!({})),
        ("mistral", "[TOOL_CALLS]f[ARGS]{\"a\": \"é", false, json!({})),
        ("qwen3_coder", CODER, false, json!({})),
        ("glm45", "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>[1]</arg_value>\n</tool_call>", false, json!({})),
    ] {
        made += cut_everywhere(&rig, &client, &|| scripted_request(model, script, opened, more.clone())).await;
    }
    eprintln!("{made} cuts");
    assert!(made > 500, "{made} cuts are too few");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_folds_to_the_answer_in_one_json_which_survives_cuts() {
    let rig = Rig::start(&[scripted(), scripted()], Default::default()).await.unwrap();
    let client = Client::new(&rig.api).unwrap();
    let call = |name: &str, arguments: &str| json!({"id": "", "type": "function", "function": {"name": name, "arguments": arguments}});
    let message = |content: Value, reasoning: &str, calls: &[Value]| {
        let mut message = json!({"role": "assistant", "content": content});
        if !reasoning.is_empty() {
            message["reasoning_content"] = json!(reasoning);
        }
        if !calls.is_empty() {
            message["tool_calls"] = json!(calls);
        }
        message["refusal"] = Value::Null;
        message
    };
    let both = [call("f", "{\"a\": \"é\"}"), call("get_weather", "{}")];
    let stopped = "x</think>\n<tool_call>{\"name\":\"f\"}</tool_call><tool_call>{\"name\":\"f\"}</tool_call>";
    let broken = "<tool_call>{\"name\": \"f\", \"arguments\": {a}}</tool_call>";
    let nobodys = "<tool_call>{\"name\": \"nobody\", \"arguments\": {}}</tool_call>";
    let typed = call("f", "{\"a\": \"é \\\"so\\\"\", \"b\": [1, 2]}");
    let one = json!({"parallel_tool_calls": false, "n": 2});
    for (model, script, opened, more, wanted, finish, reasoning) in [
        ("hermes", HERMES, false, json!({}), message(json!("I ask."), "hm, é", &both), "tool_calls", 23),
        ("hermes", "hm</think>\n\nhello\n", true, json!({}), message(json!("hello\n"), "hm", &[]), "stop", 10),
        ("hermes", broken, false, json!({}), message(Value::Null, "", &[call("f", "{a}")]), "tool_calls", 0),
        ("hermes", nobodys, false, json!({}), message(json!(nobodys), "", &[]), "stop", 0),
        ("qwen3_coder", CODER, false, json!({}), message(json!("I ask."), "hm", &[typed]), "tool_calls", 17),
        (
            "hermes",
            "<think>on and on",
            false,
            json!({"max_tokens": 12}),
            message(Value::Null, "on an", &[]),
            "length",
            12,
        ),
        ("hermes", stopped, true, one, message(Value::Null, "x", &[call("f", "{}")]), "tool_calls", 18),
        ("hermes", HERMES, false, json!({"tools": []}), message(json!(&HERMES[25..]), "hm, é", &[]), "stop", 23),
        ("llama", "{\"name\": \"f\"}", false, json!({}), message(Value::Null, "", &[call("f", "{}")]), "tool_calls", 0),
        (
            "mistral",
            "[TOOL_CALLS]f[ARGS]{\"a\":[]}",
            false,
            json!({}),
            message(Value::Null, "", &[call("f", "{\"a\":[]}")]),
            "tool_calls",
            0,
        ),
    ] {
        let body = || scripted_request(model, script, opened, more.clone());
        let n = more["n"].as_u64().unwrap_or(1) as usize;
        rig.arm([]);
        let streamed = without_ids(folded(&client.stream(&body(), |_| {}).await.unwrap(), n));
        assert_eq!(streamed.0, vec![(wanted.clone(), json!(finish)); n], "{script}");
        assert_eq!(streamed.1["completion_tokens_details"]["reasoning_tokens"], reasoning, "{script}");
        let whole = without_ids(asked_whole(&client, body()).await);
        assert_eq!(whole, streamed, "{script}");
        // Every fifth mark is enough: the streams were cut at all of them.
        for mark in (2..).step_by(5) {
            rig.arm([Cut { mark, bytes: 9, hangs: false }]);
            assert_eq!(without_ids(asked_whole(&client, body()).await), whole, "{script} cut at {mark}");
            if rig.cuts_made() == 0 {
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_in_one_json_survives_cuts_too() {
    let rig = Rig::start(&[worker(fake()), worker(fake())], Default::default()).await.unwrap();
    let client = Client::new(&rig.api).unwrap();
    let ask = async || {
        let body = request("m", "whole", 12, json!({"stream": false, "stream_options": null, "n": 3}));
        let (status, mut answer) = client.json(&body).await.unwrap();
        assert_eq!(status, 200, "{answer}");
        (answer["id"], answer["created"]) = (json!(0), json!(0));
        answer
    };
    let whole = ask().await;
    assert_eq!(whole["choices"].as_array().unwrap().len(), 3);
    for mark in 0..38 {
        rig.arm([Cut { mark, bytes: 9, hangs: false }]);
        assert_eq!(ask().await, whole, "cut at {mark}");
        assert_eq!(rig.cuts_made(), usize::from(mark < 37), "cut at {mark}");
    }
}

/// Requests of every kind that tells how likely its tokens were, and of several prompts.
fn told() -> Vec<(&'static str, Value)> {
    let (chat, text) = ("/v1/chat/completions", "/v1/completions");
    vec![
        (chat, json!({"logprobs": true, "top_logprobs": 3, "n": 2, "temperature": 1, "seed": 3})),
        (chat, json!({"logprobs": true, "stop": ["abc", "e", "\u{e9}"]})),
        (text, json!({"prompt": "one"})),
        (text, json!({"prompt": "\u{e9}cho", "echo": true, "logprobs": 2, "n": 2})),
        (text, json!({"prompt": ["first", "another"], "logprobs": 0, "stop": ["e"]})),
        (text, json!({"prompt": "held", "guided_regex": "[a-z]{8}[0-9]{9}"})),
        (
            text,
            json!({"prompt": [[104, 105], [106]], "echo": true, "logprobs": 1, "temperature": 1, "seed": 9, "n": 2}),
        ),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_tells_its_tokens_cut_at_any_token_is_the_uncut_stream() {
    let rig = Rig::start(&[worker(fake()), worker(fake())], Default::default()).await.unwrap();
    for (path, more) in told() {
        let client = Client::new(&rig.api).unwrap().at(path);
        let made = cut_everywhere(&rig, &client, &|| request("m", "told", 9, more.clone())).await;
        assert!(made > 9, "{made} cuts are too few");
        let answer = client.stream(&request("m", "told", 9, more.clone()), |_| {}).await.unwrap();
        if more["stop"].is_null() && !more["logprobs"].is_null() {
            // A token an event; an echo has one of its own, and each choice has its role or echo.
            let told = answer.raw.matches("token_logprobs").count() + answer.raw.matches("\"content\":[").count();
            let choices = answer.raw.matches("\"finish_reason\":\"").count();
            let echoes = if more["echo"] == true { choices } else { 0 };
            assert_eq!(told, choices * 9 + echoes, "{}", answer.raw);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_answer_that_tells_its_tokens_survives_cuts_too() {
    let rig = Rig::start(&[worker(fake()), worker(fake())], Default::default()).await.unwrap();
    for (path, more) in told() {
        let client = Client::new(&rig.api).unwrap().at(path);
        let ask = async || {
            let mut body = request("m", "told", 7, json!({"stream": false, "stream_options": null}));
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let (status, mut answer) = client.json(&body).await.unwrap();
            assert_eq!(status, 200, "{answer}");
            (answer["id"], answer["created"]) = (json!(0), json!(0));
            answer
        };
        let whole = ask().await;
        let mut made = 0;
        for mark in 0.. {
            rig.arm([Cut { mark, bytes: 9, hangs: false }]);
            assert_eq!(ask().await, whole, "{more} cut at {mark}");
            match rig.cuts_made() {
                0 => break,
                cuts => made += cuts,
            }
        }
        assert!(made > 2, "{made} cuts are too few");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_crashes_are_survived_the_ninth_is_not_and_a_failure_is_never_done() {
    let rig = Rig::start(&[worker(fake()), worker(fake())], Default::default()).await.unwrap();
    let client = Client::new(&rig.api).unwrap();
    let body = || request("m", "again and again", 60, json!({}));
    let whole = client.stream(&body(), |_| {}).await.unwrap();
    rig.arm(vec![Cut { mark: 3, bytes: 9, hangs: false }; 8]);
    let answer = client.stream(&body(), |_| {}).await.unwrap();
    assert_eq!((answer.bytes(), rig.cuts_made()), (whole.bytes(), 8));
    rig.arm(vec![Cut { mark: 3, bytes: 9, hangs: false }; 9]);
    let answer = client.stream(&body(), |_| {}).await.unwrap();
    assert_eq!(rig.cuts_made(), 9);
    assert!(!answer.done && answer.finish.is_none(), "{answer:?}");
    assert_eq!(answer.error.unwrap()["code"], "upstream_failed");
    assert!(whole.text.starts_with(&answer.text));
    // Nine times three tokens of a byte each; a character that the last cut left half is not shown.
    assert!((26..=27).contains(&answer.text.len()), "{}", answer.text.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_crashes_without_a_new_token_end_the_request_and_harm_nobody_else() {
    let rig = Rig::start(&[worker(fake()), worker(fake())], Default::default()).await.unwrap();
    let client = Client::new(&rig.api).unwrap();
    let at = |mark| Cut { mark, bytes: 0, hangs: false };
    rig.arm([at(5), at(0), at(0)]);
    let answer = client.stream(&request("m", "poison", 20, json!({})), |_| {}).await.unwrap();
    assert_eq!(answer.error.unwrap()["code"], "request_crashes_workers");
    assert!(!answer.done);
    // No worker left a breadcrumb, so another try, which its salt makes another request, is not refused.
    rig.arm([]);
    assert!(client.stream(&request("m", "poison", 20, json!({})), |_| {}).await.unwrap().whole());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_an_equal_worker_a_stream_ends_with_words_after_its_patience() {
    let mut other = worker(fake());
    other.harness.fake.context_length = 4096;
    let mut gateway = cortex::options::Options::default();
    gateway.proxy.continue_wait_ms = 300;
    let rig = Rig::start(&[worker(fake()), other], gateway).await.unwrap();
    let client = Client::new(&rig.api).unwrap();
    // Both workers are asked in turn; whichever it is, it comes back itself, for nothing is wrong with it.
    rig.arm([Cut { mark: 5, bytes: 0, hangs: false }]);
    let answer = client.stream(&request("m", "alone", 20, json!({})), |_| {}).await.unwrap();
    assert!(answer.whole(), "the same worker goes on: {answer:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wire_that_hangs_after_the_first_token_is_left_after_five_seconds_and_the_stream_goes_on() {
    let rig = Rig::start(&[worker(fake()), worker(fake())], Default::default()).await.unwrap();
    let client = Client::new(&rig.api).unwrap();
    let body = || request("m", "hang", 30, json!({}));
    let whole = client.stream(&body(), |_| {}).await.unwrap();
    rig.arm([Cut { mark: 7, bytes: 9, hangs: true }]);
    let begun = std::time::Instant::now();
    let answer = client.stream(&body(), |_| {}).await.unwrap();
    let took = begun.elapsed().as_secs_f64();
    assert_eq!((answer.bytes(), rig.cuts_made()), (whole.bytes(), 1));
    assert!(answer.raw.matches(": keep-alive").count() >= 3, "the client is kept alive meanwhile");
    assert!((4.9..8.0).contains(&took), "{took} s");
}

/// The trained model's kernels give the same bits whatever the batch, so its streams continue byte for byte.
#[cfg(feature = "candle")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_the_real_engine_cut_at_any_token_is_the_uncut_stream() {
    let home = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/demo-model");
    let model = |file: &str| neuron::options::ModelEntry {
        id: "demo".into(),
        path: Some(format!("{home}/{file}").into()),
        ..Default::default()
    };
    let questions: Vec<Value> =
        serde_json::from_str(&std::fs::read_to_string(format!("{home}/questions.json")).unwrap()).unwrap();
    for file in ["demo-f16.gguf", "demo-q8_0.gguf"] {
        let rig = Rig::start(&[worker(model(file)), worker(model(file))], Default::default()).await.unwrap();
        let client = Client::new(&rig.api).unwrap();
        let mut made = 0;
        for (i, question) in questions.iter().take(prompts().div_ceil(5)).enumerate() {
            let question = question["question"].as_str().unwrap();
            let more = match i % 4 {
                0 => json!({}),
                1 => json!({"temperature": 1.5, "seed": i}),
                2 => json!({"presence_penalty": 1.0, "frequency_penalty": 0.7, "repetition_penalty": 1.2}),
                _ => {
                    json!({"temperature": 1.0, "seed": i, "logit_bias": {"5": 3}, "min_tokens": 20, "frequency_penalty": 1})
                }
            };
            // Every third one goes on to its own end token.
            let most = if i % 3 == 0 { 120 } else { 24 };
            made += cut_everywhere(&rig, &client, &|| request("demo", question, most, more.clone())).await;
        }
        eprintln!("{file}: {made} cuts");
        assert!(made > 20, "{made} cuts are too few");
    }
}
