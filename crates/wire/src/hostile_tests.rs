//! What nobody should send. `PROPTEST_CASES` raises the budget of each property (256 by default).
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use proptest::prelude::*;
use serde_json::{Value, json};
use words::Code;

use crate::chat::ChatRequest;
use crate::fields::{CHAT, rows};
use crate::generation::DEPTH_MAX;
use crate::private::{LINE_PREFIX, Line, strip};
use crate::{EventSplitter, Peek, without_private_fields};

/// A body with so many arrays around nothing, in a field of its own or in a message.
fn nested(depth: usize, field: &str) -> Vec<u8> {
    let deep = "[".repeat(depth) + &"]".repeat(depth);
    let body = match field {
        "content" => format!(r#"{{"model": "m", "messages": [{{"role": "user", "content": {deep}}}]}}"#),
        field => format!(r#"{{"model": "m", "messages": [{{"role": "user", "content": "x"}}], "{field}": {deep}}}"#),
    };
    body.into_bytes()
}

#[test]
fn a_body_nested_without_end_is_refused_in_words() {
    for field in ["content", "anything", "n", "stop", "logit_bias", "cortex_resume", "stream_options"] {
        for depth in [DEPTH_MAX, 100_000] {
            let error = ChatRequest::parse(&nested(depth, field)).unwrap_err();
            assert_eq!(error.code(), Code::InvalidRequest, "{field}");
            assert!(error.message().contains("deep in one another"), "{field}: {error}");
            // A gateway does not build what it does not need, and leaves the word to the worker.
            if let Err(error) = Peek::parse(&nested(depth, field)) {
                assert_eq!(error.code(), Code::InvalidRequest, "{field}");
                assert!(error.message().contains("deep in one another"), "{field}: {error}");
            }
        }
    }
    assert!(without_private_fields(&nested(100_000, "anything")).is_err());
    assert!(ChatRequest::parse(&nested(DEPTH_MAX - 1, "anything")).is_ok());
    let quoted = format!(r#"{{"model": "m", "messages": [{{"role": "user", "content": "{}\""}}]}}"#, "[".repeat(1000));
    assert!(ChatRequest::parse(quoted.as_bytes()).is_ok(), "text may have any brackets");
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        prop_oneof![Just("user"), Just("text"), Just("assistant"), Just("auto")].prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        let key = prop_oneof![Just("role"), Just("content"), Just("type"), Just("text"), Just("name"), Just("1")];
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::Array),
            proptest::collection::vec((key, inner), 0..4)
                .prop_map(|fields| fields.into_iter().map(|(key, value)| (key.to_string(), value)).collect()),
        ]
    })
}

fn field() -> impl Strategy<Value = String> {
    let known: Vec<String> = rows(CHAT).map(|field| field.name.to_string()).collect();
    prop_oneof![8 => proptest::sample::select(known), 1 => "[a-z_]{1,8}"]
}

proptest! {
    #[test]
    fn whatever_a_field_holds_the_answer_is_a_request_or_a_named_fault(
        fields in proptest::collection::vec((field(), any_json()), 0..6)
    ) {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "x"}]});
        for (name, value) in fields {
            body[name] = value;
        }
        let body = body.to_string().into_bytes();
        match ChatRequest::parse(&body) {
            Ok(request) => {
                let peek = Peek::parse(&body).unwrap();
                prop_assert_eq!(peek.model_id().unwrap(), request.generation.model);
                prop_assert_eq!(peek.stream.unwrap_or(false), request.generation.stream);
                prop_assert_eq!(peek.choices(crate::Endpoint::Chat).unwrap(), request.generation.choices);
                prop_assert_eq!(peek.include_usage(), request.generation.include_usage);
            }
            Err(error) => prop_assert_eq!(error.code().row().http, 400),
        }
    }

    #[test]
    fn a_damaged_request_makes_nobody_panic(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in 0usize..400
    ) {
        let body = json!({"model": "org/m", "messages": [{"role": "user", "content": [{"type": "text", "text": "\u{1F600}"}]}],
            "stop": ["a"], "logit_bias": {"5": 1}, "n": 2, "stream": true, "stream_options": {"include_usage": true}});
        let mut body = body.to_string().into_bytes();
        for (at, byte) in edits {
            let at = at.index(body.len());
            body[at] = byte;
        }
        body.truncate(cut.max(1));
        let _ = (ChatRequest::parse(&body), Peek::parse(&body), without_private_fields(&body));
    }

    #[test]
    fn no_bytes_make_a_private_line_reach_a_client(
        start in prop_oneof![Just(""), Just(":cx t "), Just(":cx m {"), Just(":cx + \n:cx "), Just(":cx u 1 2")],
        rest in proptest::collection::vec(prop_oneof![any::<u8>(), Just(b'\n'), Just(b' '), Just(b'1')], 0..80),
    ) {
        let event = Bytes::from([start.as_bytes(), &rest].concat());
        let mut lines = Vec::new();
        let public = strip(&event, &mut lines);
        prop_assert!(!public.starts_with(LINE_PREFIX));
        prop_assert!(event.ends_with(&public) && lines.len() <= event.len() / LINE_PREFIX.len());
    }

    #[test]
    fn token_lines_survive_their_text(
        attempt: u32, choice: u32, index: u32, ids in proptest::collection::vec(any::<u32>(), 1..9), stops: bool
    ) {
        let line = Line::Tokens { attempt, choice, index, ids, finish: stops.then_some("stop"), reasoning: 0 };
        let mut read = Vec::new();
        prop_assert!(strip(&line.event(), &mut read).is_empty());
        prop_assert_eq!(read, vec![line]);
    }

    #[test]
    fn a_splitter_holds_no_more_than_its_limit_and_one_chunk(
        chunks in proptest::collection::vec("[a\n]{0,20}", 0..30), limit in 1usize..40
    ) {
        let mut splitter = EventSplitter::new(limit);
        for chunk in chunks {
            splitter.push(Bytes::from(chunk.into_bytes()));
            loop {
                match splitter.next_event() {
                    Ok(Some(event)) => prop_assert!(event.ends_with(b"\n\n")),
                    Ok(None) => break,
                    // It is given up then.
                    Err(_) => return Ok(()),
                }
            }
            prop_assert!(splitter.discard_partial() <= limit);
        }
    }
}

#[test]
fn a_stream_cut_in_two_or_three_at_any_bytes_is_the_whole_stream() {
    let text = ":cx + \ndata: 1\n\n:cx t 1 0 0 7 -\ndata: {\"a\": \"\u{e9}\"}\n\n: keep-alive\n\ndata: [DONE]\n\n";
    let whole = events(&[text.as_bytes()]);
    assert_eq!(whole.len(), 4);
    for dialect in ["\n", "\r\n"] {
        let text = text.replace('\n', dialect);
        let whole = events(&[text.as_bytes()]);
        for i in 0..=text.len() {
            for k in i..=text.len() {
                let bytes = text.as_bytes();
                let cut = events(&[&bytes[..i], &bytes[i..k], &bytes[k..]]);
                assert_eq!(cut.concat(), whole.concat(), "cut at {i} and {k}");
                if dialect == "\n" {
                    assert_eq!(cut, whole, "cut at {i} and {k}");
                }
            }
        }
    }
}

fn events(chunks: &[&[u8]]) -> Vec<Vec<u8>> {
    let (mut splitter, mut events) = (EventSplitter::new(1 << 20), Vec::new());
    for chunk in chunks {
        splitter.push(Bytes::copy_from_slice(chunk));
        while let Some(event) = splitter.next_event().unwrap() {
            events.push(event.to_vec());
        }
    }
    events
}
