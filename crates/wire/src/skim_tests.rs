//! The fast look at a request against `serde_json`'s. `PROPTEST_CASES` raises the budget of each property.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::Peek;

/// What is skimmed is what `serde_json` reads; what is not has `serde_json`'s answer. Returns whether it was skimmed.
fn same(body: &[u8]) -> bool {
    let shown = || String::from_utf8_lossy(body).into_owned();
    let whole = Peek::whole(body).map_err(|error| error.to_string());
    let skimmed = Peek::skim(body);
    if let Some(skimmed) = &skimmed {
        assert_eq!(Ok(skimmed), whole.as_ref(), "{}", shown());
    }
    assert_eq!(Peek::parse(body).map_err(|error| error.to_string()), whole, "{}", shown());
    skimmed.is_some()
}

const NAMES: [&str; 14] = [
    "model",
    "stream",
    "n",
    "prompt",
    "stream_options",
    "cortex_resume",
    "messages",
    "include_usage",
    "",
    "Model",
    "mod",
    "mod\\u0065l",
    "\u{e9}t\u{e9}",
    "a\\n",
];

/// Bytes that mean something to somebody, and some that nobody may write.
const BYTES: &[u8] = b"\"\"\\\\{}[],::  \n\r\t\x0b\x0c\x00\x1f\x7f/0019-+.eEntfuabld\xc3\xa9\xff\xed\xa0";

fn byte() -> impl Strategy<Value = u8> {
    prop_oneof![8 => prop::sample::select(BYTES), 1 => any::<u8>()]
}

/// A value as somebody might write it: with white space anywhere, escapes, and any spelling of numbers.
fn written() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        prop::sample::select(
            vec!["null", "true", "false", "0", "1", "-0", "\"\"", "[]", "{ }", "\"m\"", "1e999", "-"]
                .into_iter()
                .map(String::from)
                .collect::<Vec<_>>()
        ),
        "-?(0|[1-9][0-9]{0,20})(\\.[0-9]{1,3})?([eE][+-]?[0-9]{1,3})?",
        "-?[0-9]{0,2}\\.?[0-9]{0,2}[eE]?[+-]?[0-9]{0,1}",
        "\"([a-z /]|\\\\[nrtbf/\"\\\\]|\\\\u[0-9a-f]{4}|\\\\u[dD][89cC]00|\u{e9}|\u{1F600}){0,40}\"",
        "\"[a-z ]{0,90}\"",
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        let space = || "[ \n\t\r]{0,2}";
        let item = (space(), inner, space()).prop_map(|(before, value, after)| before + &value + &after);
        let field = (prop::sample::select(&NAMES[..]), space(), item.clone());
        prop_oneof![
            prop::collection::vec(item, 0..4).prop_map(|items| format!("[{}]", items.join(","))),
            prop::collection::vec(field, 0..4).prop_map(|fields| object(&fields)),
        ]
    })
}

fn object(fields: &[(&str, String, String)]) -> String {
    let fields = fields.iter().map(|(name, space, value)| format!("{space}\"{name}\"{space}:{value}"));
    format!("{{{}}}", fields.collect::<Vec<_>>().join(","))
}

fn body() -> impl Strategy<Value = String> {
    let field = (prop::sample::select(&NAMES[..]), "[ \n\t\r]{0,2}", written());
    (prop::collection::vec(field, 0..7), "[ \n]{0,2}").prop_map(|(fields, space)| object(&fields) + &space)
}

proptest! {
    #[test]
    fn what_is_skimmed_is_what_is_read(body in body()) {
        same(body.as_bytes());
    }

    #[test]
    fn a_damaged_body_is_skimmed_only_where_it_can_be_read(
        body in body(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0..3u8, byte()), 0..5),
        cut in prop::option::weighted(0.3, any::<prop::sample::Index>()),
    ) {
        let mut body = body.into_bytes();
        for (at, kind, byte) in edits {
            let at = at.index(body.len().max(1));
            match kind {
                0 => body.insert(at, byte),
                _ if body.is_empty() => {}
                1 => body[at] = byte,
                _ => drop(body.remove(at)),
            }
        }
        if let Some(cut) = cut {
            body.truncate(cut.index(body.len() + 1));
        }
        same(&body);
    }

    #[test]
    fn any_bytes_are_skimmed_only_where_they_can_be_read(rest in prop::collection::vec(byte(), 0..24), inside: bool) {
        let rest = if inside { [b"{\"a\":".as_slice(), &rest, b"}"].concat() } else { rest };
        same(&rest);
    }

    #[test]
    fn an_ordinary_request_is_skimmed(
        content in ".{0,200}", model in "[a-z/]{1,9}", n in 1..9, stream: bool, pretty: bool, deep in 0..60usize
    ) {
        let body = json!({"messages": [{"role": "user", "content": content}], "model": model, "n": n, "stream": stream,
            "prompt": [content], "stream_options": {"include_usage": true}, "temperature": 0.5, "x": null, "y": []});
        let mut body = if pretty { serde_json::to_string_pretty(&body) } else { serde_json::to_string(&body) }.unwrap();
        let nested = format!(",\"z\":{}{}}}", "[".repeat(deep), "]".repeat(deep));
        body.truncate(body.len() - 1);
        body += if deep == 0 { "}" } else { &nested };
        prop_assert!(same(body.as_bytes()));
    }
}

#[test]
fn a_byte_anywhere_in_a_long_text_counts() {
    for length in [0, 1, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 127, 130] {
        for at in 0..length {
            for bytes in
                [&b"\x1f"[..], b"\x00", b"\n", b" ", b"\"", b"\\", b"\\n", b"\\u00e9", b"\\u00g9", b"\xff", b"\x7f"]
            {
                for name in ["content", "prompt", "model"] {
                    let text = [&vec![b'a'; at], bytes, &vec![b'b'; length - at]].concat();
                    let body = [format!("{{\"{name}\":\"").as_bytes(), &text, b"\"}"].concat();
                    let skimmed = same(&body);
                    let fine =
                        matches!(bytes, b" " | b"\\n" | b"\\u00e9" | b"\x7f") || bytes == b"\xff" && name == "content";
                    assert_eq!(skimmed, fine || (bytes == b"\\" && at < length), "{}", String::from_utf8_lossy(&body));
                }
            }
        }
    }
}

#[test]
fn five_signs_in_any_order_are_skimmed_only_where_they_can_be_read() {
    let signs = ["[", "]", "{", "}", ",", ":", "\"a\"", "1"];
    let mut values = vec![String::new()];
    for _ in 0..5 {
        let longer = values.iter().flat_map(|value| signs.map(|sign| value.clone() + sign));
        values = longer.collect();
        for value in &values {
            same(format!("{{\"x\":{value}}}").as_bytes());
            same(value.as_bytes());
        }
    }
}

#[test]
fn a_backslash_stands_before_what_it_may_and_nothing_else() {
    for byte in 0..=u8::MAX {
        let body = [b"{\"a\":\"\\".as_slice(), &[byte], b"0000\"}"].concat();
        assert_eq!(same(&body), b"\"\\/bfnrtu".contains(&byte), "{byte}");
    }
}

#[test]
fn what_is_out_of_the_ordinary_is_left_to_serde() {
    let deep = |depth: usize| format!("{{\"y\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
    for depth in [1, 63, 64, 65, 66, 126, 127, 128, 129, 1000] {
        assert_eq!(same(deep(depth).as_bytes()), depth <= 65, "{depth}");
        for name in ["model", "n", "prompt", "stream_options", "cortex_resume"] {
            same(deep(depth).replace('y', name).as_bytes());
        }
    }
    for body in [
        "",
        " ",
        "{",
        "[]",
        "[\"m\", true, 1]",
        "null",
        "{}x",
        "{} {}",
        "{,}",
        "{\"a\":1,}",
        "{\"a\":[1,]}",
        "{\"a\" 1}",
        "{\"a\":01}",
        "{\"a\":-}",
        "{\"a\":1.}",
        "{\"a\":.5}",
        "{\"a\":+1}",
        "{\"a\":1e}",
        "{\"a\":nul}",
        "{\"a\":[}]}",
        "{\"a\":{\"b\"}}",
        "{\"a\":{1:2}}",
        "{\"a\":\"\u{1}\"}",
        "{\"mod\\u0065l\":\"m\"}",
        "\u{feff}{}",
        "{\"model\":\"a\",\"model\":\"a\"}",
        "{\"n\":null,\"n\":1}",
        "{\"model\":1}",
        "{\"stream\":\"yes\"}",
        "{\"prompt\":\"\\ud800\"}",
        "{\"\u{e9}\":1}",
        "{\"n\":1e999}",
    ] {
        assert!(!same(body.as_bytes()), "{body}");
    }
    for body in ["{}", " { } ", "{\"a\":1e999}", "{\"a\":\"\\ud800\"}", "{\"a\":1,\"a\":[]}", "{\"model\":null}"] {
        assert!(same(body.as_bytes()), "{body}");
    }
    let peek = Peek::skim(br#" {"messages": [{"content": "\"model\": 1"}], "prompt": ["a", "b"], "model" : "x\/y" } "#);
    let peek = peek.unwrap();
    assert_eq!((peek.model.as_deref(), peek.prompt.0, peek.n), (Some("x/y"), 2, None::<Value>));
}
