//! What clients of chats read.
#![allow(clippy::unwrap_used)]
use super::*;
use serde_json::{Value, json};

fn identity() -> Identity {
    Identity { id: "chatcmpl-1".into(), created: 7, model: "m".into() }
}

fn data(event: &Bytes) -> Value {
    serde_json::from_slice(event.strip_prefix(b"data: ").unwrap()).unwrap()
}

#[test]
fn usage_is_null_until_the_last_event_and_absent_unless_asked_for() {
    let asked = ChatEncoder::new(identity(), true);
    assert_eq!(data(&asked.content(0, "x", None))["usage"], Value::Null);
    assert!(data(&asked.content(0, "x", None)).as_object().unwrap().contains_key("usage"));
    let last = data(&asked.usage(Usage { prompt: 3, completion: 4, cached: 2, reasoning: 1 }).unwrap());
    assert_eq!(last["choices"], json!([]));
    assert_eq!(
        last["usage"],
        json!({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2}, "completion_tokens_details": {"reasoning_tokens": 1}})
    );
    let unasked = ChatEncoder::new(identity(), false);
    assert!(!data(&unasked.content(0, "x", None)).as_object().unwrap().contains_key("usage"));
    assert!(unasked.usage(Usage::default()).is_none());
}

#[test]
fn the_role_comes_first_and_the_finish_has_an_empty_delta() {
    let encoder = ChatEncoder::new(identity(), false);
    let delta = |event: Bytes| data(&event)["choices"][0]["delta"].clone();
    assert_eq!(delta(encoder.role(0, true)), json!({"role": "assistant", "content": "", "refusal": null}));
    assert_eq!(delta(encoder.role(0, false))["content"], Value::Null);
    assert_eq!(delta(encoder.finish(0, "stop")), json!({}));
}

#[test]
fn the_fold_has_every_key_that_clients_expect() {
    let mut folder = Folder::new(identity(), 1, true, false);
    folder.part(0, &output::Delta::Content("a".into()));
    folder.part(0, &output::Delta::Content("b".into()));
    folder.finish(0, "length");
    let wanted = json!({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 7, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "ab", "refusal": null},
            "logprobs": null, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": 0}},
    });
    assert_eq!(
        serde_json::from_str::<Value>(&folder.done(Usage { prompt: 1, completion: 2, ..Usage::default() })).unwrap(),
        wanted
    );
}

#[test]
fn a_cancelled_choice_says_so_beside_a_reason_that_every_client_knows() {
    let choice = |value: &Value| (value["finish_reason"].clone(), value["stop_reason"].clone());
    let chunk = data(&ChatEncoder::new(identity(), false).cancelled(0));
    let mut folder = Folder::new(identity(), 2, true, false);
    folder.finish(0, "length");
    folder.cancelled(1);
    let whole: Value = serde_json::from_str(&folder.done(Usage::default())).unwrap();
    for cancelled in [&chunk["choices"][0], &whole["choices"][1]] {
        assert_eq!(choice(cancelled), (json!("length"), json!("cancelled")));
    }
    assert!(!whole["choices"][0].as_object().unwrap().contains_key("stop_reason"));
}

#[test]
fn reasoning_and_calls_are_what_clients_of_openai_read() {
    use output::Delta as Part;
    let parts = [
        Part::Reasoning("hm".into()),
        Part::Call { index: 0, name: "f".into() },
        Part::Arguments { index: 0, text: "{\"a\": 1}".into() },
    ];
    let encoder = ChatEncoder::new(identity(), false);
    let mut folder = Folder::new(identity(), 1, false, false);
    let deltas: Vec<Value> =
        parts.iter().map(|part| data(&encoder.part(0, part, None))["choices"][0]["delta"].clone()).collect();
    parts.iter().for_each(|part| folder.part(0, part));
    let id = call_id("chatcmpl-1", 0, 0);
    assert_eq!(
        deltas,
        [
            json!({"reasoning_content": "hm"}),
            json!({"tool_calls": [{"index": 0, "id": id, "type": "function",
                "function": {"name": "f", "arguments": ""}}]}),
            json!({"tool_calls": [{"index": 0, "function": {"arguments": "{\"a\": 1}"}}]}),
        ]
    );
    let whole: Value = serde_json::from_str(&folder.done(Usage::default())).unwrap();
    let call = json!({"id": id, "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}});
    let wanted = json!({"role": "assistant", "content": null, "reasoning_content": "hm",
        "tool_calls": [call], "refusal": null});
    assert_eq!(whole["choices"][0]["message"], wanted);
}

#[test]
fn tokens_are_told_with_their_bytes_and_rivals() {
    let scored =
        TokenLogprob { bytes: b"\xc3".to_vec(), logprob: Some(-0.5), top: vec![(b"a".to_vec(), -0.25)], offset: 0 };
    let wanted = json!({"content": [{"token": "\u{fffd}", "logprob": -0.5, "bytes": [195],
        "top_logprobs": [{"token": "a", "logprob": -0.25, "bytes": [97]}]}], "refusal": null});
    let chunk = data(&ChatEncoder::new(identity(), false).content(0, "", Some(std::slice::from_ref(&scored))));
    assert_eq!((&chunk["choices"][0]["logprobs"], &chunk["choices"][0]["delta"]["content"]), (&wanted, &json!("")));
    let mut folder = Folder::new(identity(), 1, true, true);
    folder.score(0, &[scored]);
    let whole: Value = serde_json::from_str(&folder.done(Usage::default())).unwrap();
    assert_eq!(whole["choices"][0]["logprobs"], wanted);
}

#[test]
fn private_lines_alone_are_an_event_of_their_own() {
    let line = Line::Usage(Usage { prompt: 1, completion: 2, ..Usage::default() });
    assert_eq!(with_private(&[line], &[]), ":cx u 1 2 0 0\n\n");
}

#[test]
fn a_client_of_functions_reads_one_call_in_their_words() {
    use output::Delta as Part;
    let parts = [Part::Call { index: 0, name: "f".into() }, Part::Arguments { index: 0, text: "{}".into() }];
    let encoder = ChatEncoder::new(identity(), false).functions(true);
    let mut folder = Folder::new(identity(), 1, false, false).functions(true);
    let choice = |event: Bytes| data(&event)["choices"][0].clone();
    let deltas = parts.each_ref().map(|part| choice(encoder.part(0, part, None))["delta"].clone());
    assert_eq!(
        deltas,
        [json!({"function_call": {"name": "f", "arguments": ""}}), json!({"function_call": {"arguments": "{}"}})]
    );
    parts.iter().for_each(|part| folder.part(0, part));
    folder.finish(0, "tool_calls");
    let whole: Value = serde_json::from_str(&folder.done(Usage::default())).unwrap();
    let message = json!({"role": "assistant", "content": null, "function_call": {"name": "f", "arguments": "{}"},
        "refusal": null});
    assert_eq!(
        (&whole["choices"][0]["message"], &whole["choices"][0]["finish_reason"]),
        (&message, &json!("function_call"))
    );
    assert_eq!(choice(encoder.finish(0, "tool_calls"))["finish_reason"], "function_call");
    assert_eq!(choice(encoder.finish(0, "length"))["finish_reason"], "length");
}
