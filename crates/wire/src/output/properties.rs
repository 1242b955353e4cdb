//! Whatever a model says, in whatever pieces.

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn is_object(text: &str) -> bool {
    serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(text).is_ok()
}

/// Whether arguments may go on to be an object; a call that is cut off after its name has none.
fn begins_object(text: &str) -> bool {
    text.is_empty() || text.starts_with('{')
}

fn deltas(mut parser: OutputParser, pieces: &[&str]) -> Vec<Delta> {
    let mut all: Vec<Delta> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
    all.extend(parser.finish());
    all
}

/// Merges a delta as clients do, who know nothing of what it is: texts are joined, lists go by their index.
fn merge(message: &mut serde_json::Value, delta: &serde_json::Value) {
    for (key, more) in delta.as_object().unwrap() {
        let so_far = message.as_object_mut().unwrap().entry(key).or_insert(serde_json::Value::Null);
        match more {
            serde_json::Value::String(more) if so_far.is_string() => {
                *so_far = json!(so_far.as_str().unwrap().to_string() + more);
            }
            serde_json::Value::Object(_) if so_far.is_object() => merge(so_far, more),
            serde_json::Value::Array(calls) => {
                let mut call = calls[0].clone();
                let index = call.as_object_mut().unwrap().shift_remove("index").unwrap().as_u64().unwrap() as usize;
                if so_far.is_null() {
                    *so_far = json!([]);
                }
                let list = so_far.as_array_mut().unwrap();
                match list.get_mut(index) {
                    Some(known) => merge(known, &call),
                    None => list.push(call),
                }
            }
            _ => *so_far = more.clone(),
        }
    }
}

/// Texts that are almost calls: marks, pieces of JSON, whole calls, noise.
fn text() -> impl Strategy<Value = String> {
    let whole = json!({"name": "f", "arguments": {"a": [1, "é{\"", null]}}).to_string();
    let bits = [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<|python_tag|>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "f",
        "\"name\"",
        ":",
        "\"f\"",
        "\"arguments\"",
        "{",
        "}",
        "[",
        "]",
        ",",
        ";",
        " ",
        "\n",
        "\\",
        "\"",
        "é",
        "<",
        "</",
        "x",
        "1",
        "-",
        "null",
        "{\"name\": \"f\", \"parameters\": {}}",
        "{\"name\":\"g\"}",
        "tool_call>",
        "[TOOL_",
        "<seed:tool_call>",
        "</seed:tool_call>",
        "<function=f>",
        "<function=",
        "<parameter=a>",
        "<parameter=",
        "</parameter>",
        "</function>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
        "<tool_call>{\"name\": \"f\", \"arguments\": {",
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}</tool_call>",
        "<|python_tag|>{\"name\": \"f\", \"parameters\": {\"a\"",
        "[TOOL_CALLS]f[ARGS]{",
        "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {},",
        "<tool_call><function=f><parameter=a>",
        "<tool_call>f<arg_key>a</arg_key><arg_value>",
    ];
    let mut bits: Vec<String> = bits.iter().map(|bit| bit.to_string()).collect();
    bits.push(whole);
    proptest::collection::vec(prop_oneof![8 => proptest::sample::select(bits), 1 => "\\PC{0,3}"], 0..40)
        .prop_map(|bits| bits.concat())
}

fn style() -> impl Strategy<Value = (Style, Opening, Tools)> {
    let styles = [&FORMS[..], &[Style::default()]].concat();
    let openings = [Opening::Free, Opening::Inside, Opening::Over];
    let pick = (proptest::sample::select(styles), proptest::sample::select(openings.to_vec()));
    let flags = (any::<bool>(), any::<bool>(), proptest::bool::weighted(0.25));
    (pick, flags).prop_map(|((style, opening), (thinks, parallel, forced))| {
        let style = if thinks { thinking(style) } else { style };
        let choice = if forced { ToolChoice::Required } else { ToolChoice::Auto };
        (style, opening, Tools { parallel, choice, ..tools() })
    })
}

/// `CORTEX_PARSER_CASES` sets how many texts each property is tried with.
fn cases() -> u32 {
    std::env::var("CORTEX_PARSER_CASES").ok().and_then(|count| count.parse().ok()).unwrap_or(400)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    #[test]
    fn deltas_are_the_same_whatever_the_pieces(text in text(), (style, opening, tools) in style(), cuts in any::<u64>()) {
        let new = || OutputParser::new(&style, opening, &tools);
        let whole = parse(new(), &[&text]);
        let mut pieces = Vec::new();
        let mut rest = text.as_str();
        for (i, (at, _)) in text.char_indices().enumerate().skip(1) {
            if cuts >> (i % 64) & 1 == 1 {
                let (piece, more) = rest.split_at(at - (text.len() - rest.len()));
                pieces.push(piece);
                rest = more;
            }
        }
        pieces.push(rest);
        prop_assert_eq!(&parse(new(), &pieces), &whole);
        // What was pushed at once, as on a resume, leaves what was pushed in pieces.
        let (mut slow, mut fast) = (new(), new());
        let (tail, head) = pieces.split_last().unwrap();
        head.iter().for_each(|piece| drop(slow.push(piece)));
        fast.push(&head.concat());
        prop_assert_eq!(slow.push(tail), fast.push(tail));
        prop_assert_eq!(slow.finish(), fast.finish());
    }

    #[test]
    fn the_stream_in_any_pieces_folds_to_the_answer_in_one_json(
        text in text(),
        (style, opening, tools) in style(),
        size in 1..9_usize,
        functions in any::<bool>(),
    ) {
        let identity = crate::Identity { id: "chatcmpl-1".into(), created: 7, model: "m".into() };
        let encoder = crate::ChatEncoder::new(identity.clone(), false).functions(functions);
        let mut folder = crate::Folder::new(identity, 1, false, false).functions(functions);
        // Functions are called once at most.
        let tools = Tools { parallel: tools.parallel && !functions, ..tools };
        let whole = OutputParser::new(&style, opening, &tools);
        deltas(whole, &[&text]).iter().for_each(|part| folder.part(0, part));
        let chars: Vec<char> = text.chars().collect();
        let pieces: Vec<String> = chars.chunks(size).map(|piece| piece.iter().collect()).collect();
        let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
        let mut message = json!({"role": "assistant", "content": null, "refusal": null});
        for part in deltas(OutputParser::new(&style, opening, &tools), &pieces) {
            let event = encoder.part(0, &part, None);
            let chunk: serde_json::Value = serde_json::from_slice(event.strip_prefix(b"data: ").unwrap()).unwrap();
            merge(&mut message, &chunk["choices"][0]["delta"]);
        }
        let answer: serde_json::Value = serde_json::from_str(&folder.done(crate::Usage::default())).unwrap();
        prop_assert_eq!(&message, &answer["choices"][0]["message"]);
    }

    #[test]
    fn a_call_names_a_tool_and_its_arguments_begin_an_object(text in text(), (style, opening, tools) in style()) {
        let got = parse(OutputParser::new(&style, opening, &tools), &[&text]);
        for (name, arguments) in &got.calls {
            prop_assert!(tools.list.iter().any(|tool| tool.name == *name));
            prop_assert!(begins_object(arguments), "{}", arguments);
        }
        // What was written as tags is an object, but for a last one that is cut off.
        let tagged = style.tools.is_some_and(|form| form.argument().is_some());
        for (_, arguments) in got.calls.iter().rev().skip(1).filter(|_| tagged) {
            prop_assert!(is_object(arguments), "{}", arguments);
        }
        prop_assert!(tools.parallel || got.calls.len() <= 1);
        // Nothing is lost but reasoning's tags and white space.
        if got.calls.is_empty() && style.reasoning.is_none() {
            prop_assert_eq!(got.content, text);
        } else if got.calls.is_empty() {
            let length = |text: &str| text.chars().filter(|c| !is_space(*c)).count();
            let lost = length(&text) - length(&got.reasoning) - length(&got.content);
            prop_assert!([0, TAGS.open.len(), TAGS.close.len(), TAGS.open.len() + TAGS.close.len()].contains(&lost));
        }
    }

    #[test]
    fn what_was_written_as_calls_is_read_as_they_were(
        form in 0..4_usize,
        calls in proptest::collection::vec((any::<bool>(), object(), any::<bool>()), 1..4),
        content in "([a-zé ]{0,9}[a-zé.])?",
    ) {
        let calls: Vec<(&str, String)> = calls.iter().map(|(f, object, pretty)| {
            let text = if *pretty { serde_json::to_string_pretty(object) } else { serde_json::to_string(object) };
            (if *f { "f" } else { "get_weather" }, text.unwrap())
        }).collect();
        let form = FORMS[form];
        let object = |(name, arguments): &(&str, String), key: &str| format!("{{\"name\": \"{name}\",\"{key}\":{arguments}}}");
        let all = |key: &str| calls.iter().map(|call| object(call, key)).collect::<Vec<_>>();
        let text = match form.tools.unwrap() {
            ToolStyle::Llama => format!("{content}\n<|python_tag|>{}", all("parameters").join("; ")),
            ToolStyle::Functionary => {
                let all = calls.iter().map(|(name, arguments)| format!("<function={name}>{arguments}</function>"));
                format!("{content} {}", all.collect::<Vec<_>>().join(" "))
            }
            ToolStyle::Mistral => format!("{content}[TOOL_CALLS] [{}]", all("arguments").join(" ,\n")),
            _ => format!("{content}\n<tool_call>\n{}\n</tool_call>\n", all("arguments").join("</tool_call><tool_call>")),
        };
        let wanted: Vec<(&str, &str)> = calls.iter().map(|(name, arguments)| (*name, arguments.as_str())).collect();
        prop_assert_eq!(run(form, Opening::Free, &text), said("", &content, &wanted), "{}", text);
    }

    #[test]
    fn what_was_written_as_tags_is_read_by_its_types(
        form in 4..7_usize,
        city in value_text(),
        n in any::<i64>(),
        list in proptest::collection::vec(value_text(), 0..4),
        flag in any::<bool>(),
        any in value_text(),
    ) {
        let style = FORMS[form];
        let wanted = json!({"city": city, "n": n, "list": list, "flag": flag, "any": any});
        let [before, between, line, after] = style.tools.unwrap().argument().unwrap();
        let written = |(key, value): (&String, &serde_json::Value)| {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_string);
            // A line's end at the edges would be taken for the form's own.
            let value = if style.tools == Some(ToolStyle::Seed) { format!("\n{value}\n") } else { value };
            format!("{before}{key}{between}{value}{line}{after}\n")
        };
        let arguments: String = wanted.as_object().unwrap().iter().map(written).collect();
        let (head, tail) = style.tools.unwrap().around("get_weather");
        let got = run(style, Opening::Free, &format!("{head}{arguments}{tail}"));
        prop_assert_eq!(got.calls.len(), 1, "{:?}", got);
        prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&got.calls[0].1).unwrap(), wanted);
        prop_assert_eq!(got.content, "");
    }

    #[test]
    fn a_call_with_faults_is_a_call_or_content((style, opening, tools) in style(), faults in faults()) {
        let arguments = "{\"a\": [1, {\"b\": \"\\\"é\"}], \"c\": null}";
        let (before, after) = style.tools.map_or((String::new(), ""), |style| style.around("get_weather"));
        let mut text: Vec<char> = format!("<think>so</think>{before}{arguments}{after}").chars().collect();
        for (at, fault) in faults {
            let at = at.index(text.len().max(1)).min(text.len());
            match fault {
                Some(c) if at % 2 == 0 => text.insert(at, c),
                Some(c) if at < text.len() => text[at] = c,
                _ if at < text.len() => drop(text.remove(at)),
                _ => {}
            }
        }
        let text: String = text.into_iter().collect();
        let got = parse(OutputParser::new(&style, opening, &tools), &[&text]);
        for (name, arguments) in &got.calls {
            prop_assert!(name == "get_weather" || name == "f");
            prop_assert!(begins_object(arguments), "{}", arguments);
        }
        if got.calls.is_empty() && style.reasoning.is_none() {
            prop_assert_eq!(got.content, text);
        }
    }
}

/// Texts that are no JSON of another type, and hold no tag that would end a value.
fn value_text() -> impl Strategy<Value = String> {
    let bits = ["a", "é", "\"", "\\", "\n", " ", "<", "</", "</par", "{", "}", "1", "null", "<tool_call>", "\u{1}"];
    let text = proptest::collection::vec(proptest::sample::select(bits.to_vec()), 0..12).prop_map(|bits| bits.concat());
    text.prop_filter("a text", |text| {
        serde_json::from_str::<serde::de::IgnoredAny>(text.trim_matches(is_space)).is_err()
            && !text.contains("</parameter>")
    })
}

fn object() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(|flag| json!(flag)),
        any::<i32>().prop_map(|n| json!(n)),
        "[a\"\\\\{}\\[\\]<>é\n]{0,6}|</tool_call>".prop_map(|text| json!(text)),
    ];
    let value = leaf.prop_recursive(3, 12, 4, |inner| {
        let list = proptest::collection::vec(inner.clone(), 0..4).prop_map(|items| json!(items));
        let object = proptest::collection::btree_map("[a-c\"]{0,2}", inner, 0..4).prop_map(|fields| json!(fields));
        prop_oneof![list, object]
    });
    proptest::collection::btree_map("[a-c\"]{0,2}", value, 0..4).prop_map(|fields| json!(fields))
}

fn faults() -> impl Strategy<Value = Vec<(proptest::sample::Index, Option<char>)>> {
    let c = proptest::sample::select(vec!['"', '{', '}', '[', ']', ',', ':', '\\', '<', '>', '\n', 'x', '\0', 'é']);
    proptest::collection::vec((any::<proptest::sample::Index>(), proptest::option::of(c)), 0..5)
}

/// If any of these took a time that grows with the square of its length, this would not end.
#[test]
fn a_long_hostile_text_ends() {
    for style in FORMS {
        for bit in [
            "<tool_call>",
            "<tool_call>{\"",
            "<tool_call>{\":\"",
            "[TOOL_CALLS][{",
            "[TOOL_CALLS]f",
            "<function=",
            "<tool_call>f<",
            "<arg_key>",
            "{",
            "<",
            "[",
            " ",
        ] {
            let text = bit.repeat((1 << 14) / bit.len());
            let got = run(thinking(style), Opening::Free, &text);
            assert_eq!(got.content, text, "{bit}");
        }
        let open = run(thinking(style), Opening::Inside, &"</think".repeat(1 << 13));
        assert_eq!(open.reasoning.len(), 7 << 13);
    }
}

/// The same of a call whose name is out, and whose value may be anything.
#[test]
fn a_long_hostile_call_ends() {
    for (style, head) in [
        (HERMES, "<tool_call>{\"name\": \"f\", \"arguments\": {"),
        (HERMES, "<tool_call>{\"name\": \"f\", \"arguments\": {x"),
        (MISTRAL, "[TOOL_CALLS]f[ARGS]{"),
        (CODER, "<tool_call><function=f><parameter=any>1"),
        (CODER, "<tool_call><function=f><parameter=any>"),
        (CODER, "<tool_call><function=f><parameter=any"),
        (GLM, "<tool_call>f<arg_key>any</arg_key><arg_value>"),
    ] {
        for bit in [" ", "<", "{", "[1", "\"", "\\", "</parameter", "</tool_call", "<parameter=a>", "</parameter>\n"] {
            let got = run(style, Opening::Free, &format!("{head}{}", bit.repeat((1 << 13) / bit.len())));
            assert_eq!((got.calls.len(), got.calls[0].0.as_str()), (1, "f"), "{head}{bit}");
        }
    }
}
