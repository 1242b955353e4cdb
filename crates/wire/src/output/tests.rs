#![allow(clippy::unwrap_used)]
use serde_json::json;

use super::*;
use crate::tools::ToolChoice;

const HERMES: Style = Style { tools: Some(ToolStyle::Hermes), reasoning: None, takes_tools: true };
const LLAMA: Style = Style { tools: Some(ToolStyle::Llama), reasoning: None, takes_tools: true };
const MISTRAL: Style = Style { tools: Some(ToolStyle::Mistral), reasoning: None, takes_tools: true };
const CODER: Style = Style { tools: Some(ToolStyle::QwenCoder), reasoning: None, takes_tools: true };
const SEED: Style = Style { tools: Some(ToolStyle::Seed), reasoning: None, takes_tools: true };
const GLM: Style = Style { tools: Some(ToolStyle::Glm), reasoning: None, takes_tools: true };
const FUNCTIONARY: Style = Style { tools: Some(ToolStyle::Functionary), reasoning: None, takes_tools: true };
const FORMS: [Style; 7] = [HERMES, LLAMA, MISTRAL, FUNCTIONARY, CODER, SEED, GLM];
const TAGS: ReasoningStyle = ReasoningStyle { open: "<think>", close: "</think>" };

fn tools() -> Tools {
    let tool =
        |name: &str, parameters| crate::tools::Tool { name: name.into(), description: None, parameters, strict: false };
    let typed = json!({"type": "object", "properties": {
        "city": {"type": "string"}, "n": {"type": "integer"}, "list": {"type": "array"}, "flag": {"type": "boolean"},
        "maybe": {"type": ["string", "null"]}, "any": {},
    }});
    let list = vec![tool("get_weather", Some(typed)), tool("f", None)];
    Tools { list, choice: ToolChoice::Auto, parallel: true, ..Tools::default() }
}

fn thinking(style: Style) -> Style {
    Style { reasoning: Some(TAGS), ..style }
}

/// A message, put together from deltas as a client does it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Said {
    reasoning: String,
    content: String,
    calls: Vec<(String, String)>,
}

impl Said {
    fn take(&mut self, delta: Delta) {
        match delta {
            Delta::Reasoning(text) => self.reasoning.push_str(&text),
            Delta::Content(text) => self.content.push_str(&text),
            Delta::Call { index, name } => {
                assert_eq!(index as usize, self.calls.len(), "indices have no gaps");
                self.calls.push((name, String::new()));
            }
            Delta::Arguments { index, text } => self.calls[index as usize].1.push_str(&text),
        }
    }
}

fn parse(mut parser: OutputParser, pieces: &[&str]) -> Said {
    let mut said = Said::default();
    for piece in pieces {
        parser.push(piece).into_iter().for_each(|delta| said.take(delta));
    }
    parser.finish().into_iter().for_each(|delta| said.take(delta));
    assert_eq!(parser.called(), !said.calls.is_empty());
    said
}

fn run(style: Style, opening: Opening, text: &str) -> Said {
    parse(OutputParser::new(&style, opening, &tools()), &[text])
}

fn said(reasoning: &str, content: &str, calls: &[(&str, &str)]) -> Said {
    let calls = calls.iter().map(|(name, arguments)| (name.to_string(), arguments.to_string())).collect();
    Said { reasoning: reasoning.into(), content: content.into(), calls }
}

#[test]
fn reasoning_comes_first_and_its_tags_are_gone() {
    for (opening, text, reasoning, content) in [
        (Opening::Free, "<think>\na b\n</think>\n\nhello ", "a b", "hello "),
        (Opening::Free, " \n<think>a</think>b", "a", "b"),
        (Opening::Free, "hello <think>no</think>", "", "hello <think>no</think>"),
        (Opening::Free, " \n<thi", "", " \n<thi"),
        (Opening::Free, "<thin air", "", "<thin air"),
        (Opening::Inside, "a</b></think>c", "a</b>", "c"),
        (Opening::Inside, "a\n\n  b \n</think>\n c", "a\n\n  b", "c"),
        (Opening::Inside, "never over </thi", "never over </thi", ""),
        (Opening::Inside, "<</think>x", "<", "x"),
        (Opening::Inside, "</think></think>x", "", "</think>x"),
        (Opening::Over, "\nhello", "", "hello"),
        (Opening::Over, "<think>x", "", "<think>x"),
        (Opening::Free, "", "", ""),
    ] {
        let style = Style { reasoning: Some(TAGS), ..Style::default() };
        assert_eq!(run(style, opening, text), said(reasoning, content, &[]), "{text:?}");
    }
}

#[test]
fn calls_of_each_form_are_read() {
    let paris = ("get_weather", r#"{"city": "Paris"}"#);
    for (style, text, content, calls) in [
        (
            HERMES,
            "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>",
            "",
            vec![paris],
        ),
        (
            HERMES,
            "Let me see.\n<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>\n<tool_call>\n{\"arguments\": {\"city\": \"Paris\"}, \"name\": \"get_weather\"}\n</tool_call>\n",
            "Let me see.",
            vec![("f", "{}"), paris],
        ),
        (
            HERMES,
            "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"</tool_call>\\\"}\"}}</tool_call> and",
            " and",
            vec![("f", r#"{"a": "</tool_call>\"}"}"#)],
        ),
        (
            HERMES,
            "<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool_call>",
            "",
            vec![("f", r#"{"a": 1}"#)],
        ),
        (HERMES, "<tool_call>{\"name\": \"f\"}", "", vec![("f", "{}")]),
        (LLAMA, "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\"}}", "", vec![paris]),
        (
            LLAMA,
            "\n<|python_tag|>{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"f\", \"parameters\": {\"a\":[1,{}]}}",
            "",
            vec![("f", "{}"), ("f", r#"{"a":[1,{}]}"#)],
        ),
        (
            LLAMA,
            "{\"type\": \"function\", \"name\": \"f\", \"parameters\": {\"n\": -1.5e3}}\n",
            "",
            vec![("f", r#"{"n": -1.5e3}"#)],
        ),
        (
            MISTRAL,
            "[TOOL_CALLS][{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}, {\"name\": \"f\", \"arguments\": {}, \"id\": \"abcdefghi\"}]",
            "",
            vec![paris, ("f", "{}")],
        ),
        (MISTRAL, "[TOOL_CALLS] {\"name\": \"f\", \"arguments\": {}}", "", vec![("f", "{}")]),
        (
            MISTRAL,
            "Well [TOOL_CALLS]get_weather[ARGS]{\"city\": \"Paris\"}[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}",
            "Well",
            vec![paris, ("f", "{}")],
        ),
        (MISTRAL, "[TOOL_CALLS]f {\"a\": 1}", "", vec![("f", r#"{"a": 1}"#)]),
        (
            FUNCTIONARY,
            "So:\n<function=get_weather>{\"city\": \"Paris\"}</function><function=f>{}</function>\n",
            "So:",
            vec![paris, ("f", "{}")],
        ),
    ] {
        assert_eq!(run(style, Opening::Free, text), said("", content, &calls), "{text}");
    }
}

#[test]
fn what_is_no_call_is_content_to_the_last_byte() {
    for (style, texts) in [
        (
            HERMES,
            vec![
                "<tool_call>not json</tool_call>",
                "<tool_call>\n{\"name\": \"nobody\", \"arguments\": {}}\n</tool_call>",
                "<tool_call>{\"name\": \"f\", \"arguments\": [1]}</tool_call>",
                "<tool_call>{\"name\": \"f\", \"arguments\": \"x\"}</tool_call>",
                "<tool_call>{\"name\": 1}</tool_call>",
                "<tool_call>{\"name\": \"f\", \"arguments\": ",
                "<tool_call>{\"name\": \"nobody\", \"arguments\": {\"a\": [1]}}</tool_call>",
                "<tool_call>{\"arguments\": {\"a\": 01}, \"name\": \"f\"}</tool_call>",
                "<tool_call>[]</tool_call>",
                "<tool_call>",
                "a < b <tool",
                "{\"name\": \"f\", \"arguments\": {}}",
                " trailing space \n",
            ],
        ),
        (
            LLAMA,
            vec![
                "{\"temperature\": 3}",
                "{ a set }",
                "<|python_tag|>print(1)",
                "see {\"name\": \"f\", \"parameters\": {}}",
                "\n\n  hello",
            ],
        ),
        (MISTRAL, vec!["[TOOL_CALLS][]", "[TOOL_CALLS]nobody[ARGS]{}", "[TOOL_CALLS]!", "[TOOL_CALLS][1]", "[TOOL"]),
        (
            CODER,
            vec![
                "<tool_call>\n<function=nobody>\n</function>\n</tool_call>",
                "<tool_call>{\"name\": \"f\"}</tool_call>",
                "<tool_call>\n<function=f",
                "<tool_call> f",
                "<parameter=a>1</parameter>",
            ],
        ),
        (
            FUNCTIONARY,
            vec!["<function=nobody>{}</function>", "<function=f>[]</function>", "<function=f", "<function>{}"],
        ),
        (SEED, vec!["<tool_call><parameter=a></parameter></tool_call>", "<seed:tool_call><function=>"]),
        (
            GLM,
            vec![
                "<tool_call>f is my tool",
                "<tool_call>nobody</tool_call>",
                "<tool_call>f\n<arg_value>",
                "<tool_call></tool_call>",
                "<tool_call>{\"name\": \"f\"}</tool_call>",
            ],
        ),
    ] {
        for text in texts {
            assert_eq!(run(style, Opening::Free, text), said("", text, &[]), "{text:?}");
        }
    }
    let rest = "<tool_call>\n <tool_call><function=f></function></tool_call>";
    assert_eq!(run(CODER, Opening::Free, rest), said("", "<tool_call>", &[("f", "{}")]));
    let rest = "<tool_call><tool_call>{\"name\":\"f\"}</tool_call>";
    assert_eq!(run(HERMES, Opening::Free, rest), said("", "<tool_call>", &[("f", "{}")]));
}

#[test]
fn calls_come_after_the_reasoning_only() {
    let call = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    let text = format!("<think>maybe {call}?</think>\n\n{call}");
    let wanted = said(&format!("maybe {call}?"), "", &[("f", "{}")]);
    assert_eq!(run(thinking(HERMES), Opening::Free, &text), wanted);
}

#[test]
fn a_request_that_calls_nothing_is_searched_for_nothing() {
    let call = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    let none = Tools { choice: ToolChoice::None, ..tools() };
    let parser = OutputParser::new(&HERMES, Opening::Free, &none);
    assert!(parser.plain());
    assert_eq!(parse(parser, &[call]), said("", call, &[]));
}

#[test]
fn after_the_one_call_that_is_allowed_nothing_comes() {
    let call = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    let mut parser = OutputParser::new(&HERMES, Opening::Free, &Tools { parallel: false, ..tools() });
    let (first, rest) = call.split_at(call.len() - 12);
    assert_eq!(parser.push(first).len(), 2);
    assert!(parser.over() && parser.called());
    assert_eq!((parser.push(rest), parser.push(call), parser.finish()), (vec![], vec![], vec![]));
}

#[test]
fn a_call_past_its_bounds_is_content() {
    let long = format!("<tool_call>{{\"arguments\": {{\"a\": \"{}\"}}, \"name\": \"f\"}}", "x".repeat(CALL_BYTES_MAX));
    let got = run(HERMES, Opening::Free, &long);
    assert_eq!((got.content.len(), got.calls.len()), (long.len(), 0));
    let deep = format!("<tool_call>{{\"a\":{}", "[".repeat(ARGUMENTS_DEPTH_MAX));
    assert_eq!(run(HERMES, Opening::Free, &deep), said("", &deep, &[]));
    let wide = format!("<tool_call>{{\"name\": \"f\"{}}}", ", \"a\": 1".repeat(16));
    assert_eq!(run(HERMES, Opening::Free, &wide), said("", &wide, &[]));
    let wide = format!("[TOOL_CALLS]f[ARGS]{{\"b\": 1{}}}", ", \"a\": 1".repeat(16));
    assert_eq!(run(MISTRAL, Opening::Free, &wide).calls.len(), 1);
    let many = "<tool_call>{\"name\": \"f\"}</tool_call>".repeat(CALLS_MAX as usize + 1);
    let got = run(HERMES, Opening::Free, &many);
    assert_eq!(
        (got.calls.len(), got.content.as_str()),
        (CALLS_MAX as usize, "<tool_call>{\"name\": \"f\"}</tool_call>")
    );
}

#[test]
fn ids_are_the_same_for_every_attempt_and_differ_by_place() {
    let id = call_id("chatcmpl-1", 0, 0);
    assert_eq!(id, call_id("chatcmpl-1", 0, 0));
    assert!(id.len() == 9 && id.bytes().all(|byte| byte.is_ascii_alphanumeric()));
    let others = [call_id("chatcmpl-1", 0, 1), call_id("chatcmpl-1", 1, 0), call_id("chatcmpl-2", 0, 0)];
    assert!(!others.contains(&id));
}

#[test]
fn what_a_constraint_writes_around_arguments_is_a_call() {
    for style in FORMS {
        let (before, after) = style.tools.unwrap().around("f");
        let arguments = match style.tools.unwrap().argument() {
            Some([before, between, line, after]) => format!("{before}a{between}1{line}{after}\n"),
            None => "{\"a\": 1}".into(),
        };
        assert_eq!(
            run(style, Opening::Free, &format!("{before}{arguments}{after}")),
            said("", "", &[("f", r#"{"a": 1}"#)])
        );
    }
}

#[test]
fn a_name_comes_out_once_it_is_certain_and_arguments_as_they_are_said() {
    let call = Delta::Call { index: 0, name: "f".into() };
    let piece = |text: &str| Delta::Arguments { index: 0, text: text.into() };
    for choice in [ToolChoice::Auto, ToolChoice::Required, ToolChoice::Named("f".into())] {
        for style in [HERMES, LLAMA, MISTRAL, FUNCTIONARY] {
            let (before, after) = style.tools.unwrap().around("f");
            let mut parser = OutputParser::new(&style, Opening::Free, &Tools { choice: choice.clone(), ..tools() });
            assert_eq!(parser.push(&before), []);
            assert_eq!(parser.push("{\"a"), [call.clone(), piece("{\"a")]);
            assert_eq!(parser.push("\": {}"), [piece("\": {}")]);
            assert_eq!(parser.clone().finish(), [], "what is cut off stays a part");
            assert_eq!(parser.push("} "), [piece("}")]);
            assert_eq!((parser.push(after), parser.finish()), (vec![], vec![]));
        }
    }
    let mut parser = OutputParser::new(&MISTRAL, Opening::Free, &tools());
    assert_eq!(parser.push("[TOOL_CALLS]f[ARGS]"), []);
    assert_eq!(parser.push("{"), [call.clone(), piece("{")]);
    for (style, steps) in [
        (
            CODER,
            [
                ("Well.\n<tool_call>\n<function=f", vec![Delta::Content("Well.".into())]),
                (">\n", vec![call.clone()]),
                ("<parameter=city>\nPa\"r", vec![piece("{\"city\": \"Pa\\\"r")]),
                ("is\n", vec![piece("is")]),
                ("</parameter", vec![]),
                (">\n<parameter=any>[1", vec![piece("\", \"any\": ")]),
                (", 2]\n</parameter>", vec![piece("[1, 2]")]),
                ("\n</function>\n</tool_call>", vec![piece("}")]),
            ],
        ),
        (
            GLM,
            [
                ("<tool_call>f", vec![]),
                ("\n", vec![]),
                ("<arg_key>city</arg_key>", vec![call]),
                ("<arg_value>Paris</arg_", vec![piece("{\"city\": \"Paris")]),
                ("value>\n<arg_key>n</arg_key><arg_value>1", vec![piece("\", \"n\": ")]),
                ("7", vec![]),
                ("</arg_value>", vec![piece("17")]),
                ("</tool_call>", vec![piece("}")]),
            ],
        ),
    ] {
        let mut parser = OutputParser::new(&style, Opening::Free, &tools());
        for (text, wanted) in steps {
            assert_eq!(parser.push(text), wanted, "{text}");
        }
        assert_eq!(parser.finish(), []);
    }
}

#[test]
fn once_a_name_is_out_what_is_no_json_goes_out_as_it_is_said() {
    for (style, text, content, calls) in [
        (
            HERMES,
            "<tool_call>{\"name\": \"f\", \"arguments\": {city: 1}}</tool_call> x",
            " x",
            vec![("f", "{city: 1}")],
        ),
        (HERMES, "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 01}}", "", vec![("f", "{\"a\": 01}")]),
        // A line's end in a string is a usual fault.
        (
            HERMES,
            "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"x\n} y\"}}\n</tool_call>",
            "",
            vec![("f", "{\"a\": \"x\n} y\"}")],
        ),
        (
            HERMES,
            "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1</tool_call> <tool_call>{\"name\": \"f\"}</tool_call>",
            "",
            vec![("f", "{\"a\": 1"), ("f", "{}")],
        ),
        (
            HERMES,
            "<tool_call>{\"name\": \"f\", \"arguments\": {\"city\": \"Par</tool_call>",
            "",
            vec![("f", "{\"city\": \"Par</tool_call>")],
        ),
        // The object's own bracket is missing.
        (HERMES, "<tool_call>{\"name\": \"f\", \"arguments\": {}\n</tool_call> x", " x", vec![("f", "{}")]),
        (
            HERMES,
            "<tool_call>{\"name\": \"f\", \"arguments\": {a}, 1}</tool_call>",
            ", 1}</tool_call>",
            vec![("f", "{a}")],
        ),
        (LLAMA, "{\"name\": \"f\", \"parameters\": {}", "", vec![("f", "{}")]),
        (LLAMA, "{\"name\": \"f\", \"parameters\": {[1}]}; what", "; what", vec![("f", "{[1}]")]),
        (MISTRAL, "[TOOL_CALLS]f[ARGS]{'a': 1} x", " x", vec![("f", "{'a': 1}")]),
        (
            CODER,
            "<tool_call><function=f>so <parameter=a>1</parameter></function></tool_call>",
            "so <parameter=a>1</parameter></function></tool_call>",
            vec![("f", "{}")],
        ),
        (
            CODER,
            "<tool_call><function=f><parameter=a>1</parameter>\n<tool_call><function=f></function></tool_call>",
            "",
            vec![("f", "{\"a\": 1}"), ("f", "{}")],
        ),
        (CODER, "<tool_call><function=f><parameter=a>1</parameter></tool_call>.", ".", vec![("f", "{\"a\": 1}")]),
        // The mark was forgotten.
        (CODER, "I ask.\n<function=f>\n</function>\n</tool_call>\n", "I ask.", vec![("f", "{}")]),
        (CODER, "<function=f></function><function=g>", "<function=g>", vec![("f", "{}")]),
        (CODER, "<func> <function=> <function=f", "<func> <function=> <function=f", vec![]),
        (CODER, "<tool_call><function=f><parameter=a\n>1", "<parameter=a\n>1", vec![("f", "{}")]),
        (CODER, "<tool_call><function=f><parameter=a>1</para", "", vec![("f", "{\"a\": ")]),
        (GLM, "<tool_call>f<arg_key>a</arg_key>1", "<arg_key>a</arg_key>1", vec![("f", "{}")]),
        (GLM, "<tool_call>f<arg_key>a</arg_key><arg_value>x", "", vec![("f", "{\"a\": \"x")]),
    ] {
        assert_eq!(run(style, Opening::Free, text), said("", content, &calls), "{text}");
    }
}

#[test]
fn reasoning_is_counted_by_token() {
    for (opening, tokens, wanted) in [
        (Opening::Free, vec!["<think>", "\n", "a", " b", "</think>", "\n\n", "c"], 5),
        (Opening::Free, vec!["\n", "<th", "ink>a", "</th", "ink>b", "c"], 5),
        (Opening::Free, vec!["<th", "at", "</think>"], 0),
        (Opening::Free, vec!["<th"], 0),
        (Opening::Inside, vec!["a", "</", "think", ">", "b"], 4),
        (Opening::Inside, vec!["a", "b", ""], 3),
        (Opening::Inside, vec!["</think>", "<think>", "b"], 1),
        (Opening::Over, vec!["<think>", "b"], 0),
        (Opening::Free, vec!["<think>a</think>b", "c"], 1),
    ] {
        let mut count = ReasoningCount::new(TAGS, opening);
        tokens.iter().for_each(|token| count.push(token.as_bytes()));
        assert_eq!(count.tokens(), wanted, "{tokens:?}");
    }
}

#[test]
fn an_operators_word_wins_over_the_template() {
    let style = Style::of_template("tools <tool_call> </think>");
    assert_eq!(style.with(Overrides::default()), style);
    assert_eq!(style.with(Overrides::read(Some("auto"), Some("auto")).unwrap()), style);
    let other = style.with(Overrides::read(Some("mistral"), Some("none")).unwrap());
    assert_eq!((other.tools, other.reasoning, other.takes_tools), (Some(ToolStyle::Mistral), None, true));
    assert_eq!(style.with(Overrides::read(Some("none"), None).unwrap()).tools, None);
    assert_eq!(Overrides::read(Some("xml"), None).unwrap_err().0, "tool_parser");
    assert_eq!(Overrides::read(None, Some("xml")).unwrap_err().0, "reasoning_parser");
}

#[test]
fn the_prompts_end_tells_how_an_answer_begins() {
    let style = thinking(HERMES);
    assert_eq!(style.opening("<assistant><think>\n"), Opening::Inside);
    assert_eq!(style.opening("<assistant><think>\n\n</think>\n\n"), Opening::Over);
    assert_eq!(style.opening("<assistant>\n"), Opening::Free);
    assert_eq!(HERMES.opening("<think>"), Opening::Free);
}

#[path = "properties.rs"]
mod properties;

#[path = "published.rs"]
mod published;
