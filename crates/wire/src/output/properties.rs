//! Whatever a model says, in whatever pieces.

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn is_object(text: &str) -> bool {
    serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(text).is_ok()
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
    ];
    let mut bits: Vec<String> = bits.iter().map(|bit| bit.to_string()).collect();
    bits.push(whole);
    proptest::collection::vec(prop_oneof![8 => proptest::sample::select(bits), 1 => "\\PC{0,3}"], 0..40)
        .prop_map(|bits| bits.concat())
}

fn style() -> impl Strategy<Value = (Style, Opening, Tools)> {
    let styles = [HERMES, LLAMA, MISTRAL, Style::default()];
    let openings = [Opening::Free, Opening::Inside, Opening::Over];
    let pick = (proptest::sample::select(styles.to_vec()), proptest::sample::select(openings.to_vec()));
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
    fn a_call_names_a_tool_and_its_arguments_are_an_object(text in text(), (style, opening, tools) in style()) {
        let got = parse(OutputParser::new(&style, opening, &tools), &[&text]);
        for (name, arguments) in &got.calls {
            prop_assert!(tools.list.iter().any(|tool| tool.name == *name));
            prop_assert!(is_object(arguments) || tools.choice == ToolChoice::Required);
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
            prop_assert!(is_object(arguments) || tools.choice == ToolChoice::Required);
        }
        if got.calls.is_empty() && style.reasoning.is_none() {
            prop_assert_eq!(got.content, text);
        }
    }
}

fn faults() -> impl Strategy<Value = Vec<(proptest::sample::Index, Option<char>)>> {
    let c = proptest::sample::select(vec!['"', '{', '}', '[', ']', ',', ':', '\\', '<', '>', '\n', 'x', '\0', 'é']);
    proptest::collection::vec((any::<proptest::sample::Index>(), proptest::option::of(c)), 0..5)
}

/// If any of these took a time that grows with the square of its length, this would not end.
#[test]
fn a_long_hostile_text_ends() {
    for style in [HERMES, LLAMA, MISTRAL] {
        for bit in [
            "<tool_call>",
            "<tool_call>{\"",
            "<tool_call>{\":\"",
            "[TOOL_CALLS][{",
            "[TOOL_CALLS]f",
            "{",
            "<",
            "[",
            " ",
        ] {
            let text = bit.repeat((1 << 16) / bit.len());
            let got = run(thinking(style), Opening::Free, &text);
            assert_eq!(got.content, text, "{bit}");
        }
        let open = run(thinking(style), Opening::Inside, &"</think".repeat(1 << 13));
        assert_eq!(open.reasoning.len(), 7 << 13);
    }
}
