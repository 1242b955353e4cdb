//! Tools and template variables, over a fleet in this process whose models are told what to say.
#![allow(clippy::unwrap_used)]

use fleet_tests::{Client, Rig};
use neuron::options::{ModelEntry, Options};
use serde_json::{Value, json};

fn worker() -> Options {
    let model = |id: &str, parser: Option<&str>| ModelEntry {
        id: id.into(),
        harness: Some("fake".into()),
        tool_parser: parser.map(str::to_string),
        reasoning_parser: parser.map(|_| "think".into()),
        ..ModelEntry::default()
    };
    Options { default_models: vec![model("m", Some("hermes")), model("mute", None)], ..Options::default() }
}

fn tool() -> Value {
    json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}})
}

fn body(model: &str, more: Value) -> Value {
    let mut body = json!({"model": model, "messages": [{"role": "user", "content": "\u{2}hi\u{3}"}], "max_tokens": 50});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_be_honoured_is_refused_by_name() {
    let rig = Rig::start(&[worker()], cortex::options::Options::default()).await.unwrap();
    let client = Client::new(&rig.api).unwrap();
    for (model, more, param, words) in [
        ("mute", json!({"tools": [tool()]}), "tools", "tool_parser"),
        ("mute", json!({"tools": [tool()], "tool_choice": "required"}), "tools", "tool_parser"),
        (
            "m",
            json!({"tools": [tool()], "tool_choice": "required", "response_format": {"type": "json_object"}}),
            "response_format",
            "leave this one out",
        ),
        ("m", json!({"tools": [{"type": "function"}]}), "tools[0].function", "object"),
        ("m", json!({"functions": [{"name": "f"}], "tools": [tool()]}), "functions", "older form"),
        ("mute", json!({"functions": [{"name": "f"}]}), "functions", "tool_parser"),
        ("m", json!({"chat_template_kwargs": {"messages": []}}), "chat_template_kwargs.messages", "set by the server"),
        ("m", json!({"reasoning_effort": "huge"}), "reasoning_effort", "minimal"),
        ("m", json!({"messages": [{"role": "tool", "content": "x"}]}), "messages[0].tool_call_id", "id of a call"),
    ] {
        let (status, answer) = client.json(&body(model, more.clone())).await.unwrap();
        assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(param)), "{more} {answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(words), "{answer}");
    }
    for more in
        [json!({"tools": [tool()], "tool_choice": "none"}), json!({"tools": []}), json!({"tool_choice": "auto"})]
    {
        let (status, answer) = client.json(&body("mute", more)).await.unwrap();
        assert_eq!((status, answer["choices"][0]["message"]["content"].as_str()), (200, Some("hi")), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tools_and_variables_reach_the_template() {
    let rig = Rig::start(&[worker()], cortex::options::Options::default()).await.unwrap();
    let client = Client::new(&rig.api).unwrap();
    let prompt = async |more: Value| {
        let (status, answer) = client.json(&body("m", more)).await.unwrap();
        assert_eq!(status, 200, "{answer}");
        answer["usage"]["prompt_tokens"].as_u64().unwrap() as usize
    };
    // The fake model's template writes what it is given, a byte a token.
    let bare = prompt(json!({})).await;
    assert_eq!(prompt(json!({"tools": [tool()]})).await, bare + tool().to_string().len() + 1);
    assert_eq!(prompt(json!({"tools": [tool()], "tool_choice": "none"})).await, bare);
    assert_eq!(prompt(json!({"chat_template_kwargs": {"a": 1}})).await, bare + "a=1\n".len());
    let off = "reasoning_effort=\"none\"\nenable_thinking=false\nthinking=false\n".len();
    assert_eq!(prompt(json!({"reasoning_effort": "none"})).await, bare + off);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_a_model_chooses_comes_out_in_pieces() {
    let rig = Rig::start(&[worker()], cortex::options::Options::default()).await.unwrap();
    let client = Client::new(&rig.api).unwrap();
    let text = "I ask. <tool_call>\n{\"name\": \"f\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>";
    let script = json!([{"role": "user", "content": format!("\u{2}{text}\u{3}")}]);
    let more = json!({"tools": [tool()], "messages": script, "stream": true, "max_tokens": 200});
    let answer = client.stream(&body("m", more), |_| {}).await.unwrap();
    let events = answer.raw.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
    let chunks = events.filter_map(|event| serde_json::from_str::<Value>(event).ok());
    let calls: Vec<Value> = chunks
        .filter_map(|chunk| chunk["choices"][0]["delta"].get("tool_calls").map(|calls| calls[0].clone()))
        .collect();
    let first = &calls[0];
    let id = first["id"].as_str().unwrap();
    let wanted = json!({"index": 0, "id": id, "type": "function", "function": {"name": "f", "arguments": ""}});
    assert_eq!(*first, wanted);
    // The fake model's tokens are bytes.
    let pieces: Vec<&str> = calls[1..].iter().map(|call| call["function"]["arguments"].as_str().unwrap()).collect();
    assert_eq!(pieces.concat(), "{\"city\": \"Paris\"}");
    assert!(pieces.iter().all(|piece| piece.len() == 1), "{pieces:?}");
    assert!(calls[1..].iter().all(|call| call.as_object().unwrap().len() == 2), "an index and a function");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_functions_reads_the_call_in_their_words() {
    let rig = Rig::start(&[worker()], cortex::options::Options::default()).await.unwrap();
    let client = Client::new(&rig.api).unwrap();
    let call = "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}</tool_call>";
    let messages = json!([
        {"role": "assistant", "content": null, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "y"},
        {"role": "user", "content": format!("\u{2}{call}{call}\u{3}")},
    ]);
    let more =
        |stream: bool| json!({"functions": [{"name": "f"}], "messages": messages, "stream": stream, "max_tokens": 200});
    let (status, answer) = client.json(&body("m", more(false))).await.unwrap();
    assert_eq!(status, 200, "{answer}");
    let choice = &answer["choices"][0];
    let wanted = json!({"role": "assistant", "content": null, "function_call": {"name": "f", "arguments": "{\"a\": 1}"},
        "refusal": null});
    assert_eq!((&choice["message"], &choice["finish_reason"]), (&wanted, &json!("function_call")));
    let streamed = client.stream(&body("m", more(true)), |_| {}).await.unwrap();
    assert!(
        streamed.raw.contains("\"delta\":{\"function_call\":{\"name\":\"f\",\"arguments\":\"\"}}"),
        "{}",
        streamed.raw
    );
    assert!(streamed.raw.contains("\"finish_reason\":\"function_call\"") && !streamed.raw.contains("tool_calls"));
}
