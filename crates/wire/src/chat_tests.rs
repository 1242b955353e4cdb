#![allow(clippy::unwrap_used)]
use super::*;
use crate::{Peek, without_private_fields};
use proptest::prelude::*;
use serde_json::json;

fn request(extra: Value) -> Result<ChatRequest, Error> {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    ChatRequest::parse(body.to_string().as_bytes())
}

fn at(extra: Value) -> String {
    let error = request(extra).unwrap_err();
    assert_eq!(error.code().row().http, 400, "{error}");
    error.param().unwrap_or("").to_string()
}

#[test]
fn bad_values_name_their_field() {
    for (extra, param) in [
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": -5}), "max_tokens"),
        (json!({"max_completion_tokens": 1.5}), "max_completion_tokens"),
        (json!({"temperature": 2.1}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"top_p": -0.1}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"logprobs": 5}), "logprobs"),
        (json!({"min_p": 3}), "min_p"),
        (json!({"stop": ["a", 1]}), "stop"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": vec!["x"; 17]}), "stop"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"stream": true, "stream_options": {"include_usage": 1}}), "stream_options.include_usage"),
        (json!({"model": 7}), "model"),
        (json!({"model": ""}), "model"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "hi"}), "messages"),
        (json!({"messages": [7]}), "messages[0]"),
        (json!({"messages": [{"role": "robot", "content": ""}]}), "messages[0].role"),
        (json!({"messages": [{"role": "tool", "content": ""}]}), "messages[0].tool_call_id"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "messages[0].content[0]"),
        (
            json!({"messages": [{"role": "assistant", "content": null, "tool_calls": [{}]}]}),
            "messages[0].tool_calls[0].id",
        ),
        (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
        (json!({"chat_template_kwargs": {"tools": []}}), "chat_template_kwargs.tools"),
        (json!({"reasoning_effort": "some"}), "reasoning_effort"),
    ] {
        assert_eq!(at(extra.clone()), param, "{extra}");
    }
}

#[test]
fn what_is_not_json_is_refused_in_words() {
    for (body, words) in [
        ("", "ends in the middle"),
        ("{\"model\": ", "ends in the middle"),
        ("[]", "must be a JSON object"),
        ("{\"temperature\": NaN}", "not valid JSON"),
        ("{\"temperature\": 1e999}", "not valid JSON"),
        (&"[".repeat(10_000), "deep in one another"),
    ] {
        let error = ChatRequest::parse(body.as_bytes()).unwrap_err();
        assert!(error.message().contains(words), "{error}");
    }
}

#[test]
fn the_newer_name_of_the_token_limit_wins() {
    let both = request(json!({"max_tokens": 5, "max_completion_tokens": 9})).unwrap();
    assert_eq!(both.generation.max_tokens, Some(9));
    assert_eq!(request(json!({"max_tokens": null})).unwrap().generation.max_tokens, None);
}

#[test]
fn negative_seeds_are_seeds() {
    assert_eq!(request(json!({"seed": -1})).unwrap().generation.seed, Some(u64::MAX));
}

#[test]
fn a_gateway_reads_the_model_without_building_the_rest() {
    let body = br#"{"messages": [{"x": [1, {"y": "z"}]}], "model": "org/name", "stream": true, "seed": 4}"#;
    let peek = Peek::parse(body).unwrap();
    assert_eq!(peek.model_id().unwrap().as_str(), "org/name");
    assert_eq!((peek.stream, peek.resume.is_some()), (Some(true), false));
    assert!(Peek::parse(br#"{"stream": "yes"}"#).is_err());
    let private = br#"{"model": "m", "cortex_resume": {"choices": []}}"#;
    assert!(Peek::parse(private).unwrap().resume.is_some());
    assert_eq!(without_private_fields(private).unwrap(), br#"{"model":"m"}"#);
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = ChatRequest::parse(&body);
        let _ = Peek::parse(&body);
    }
}
