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
        ("m", json!({"functions": [{"name": "f"}]}), "functions", "not supported"),
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
