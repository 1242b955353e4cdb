#![allow(clippy::unwrap_used)]
use super::*;
use crate::tools::ToolChoice;

const HERMES: Style = Style { tools: Some(ToolStyle::Hermes), reasoning: None, takes_tools: true };
const LLAMA: Style = Style { tools: Some(ToolStyle::Llama), reasoning: None, takes_tools: true };
const MISTRAL: Style = Style { tools: Some(ToolStyle::Mistral), reasoning: None, takes_tools: true };
const TAGS: ReasoningStyle = ReasoningStyle { open: "<think>", close: "</think>" };

fn tools() -> Tools {
    let tool =
        |name: &str| crate::tools::Tool { name: name.into(), description: None, parameters: None, strict: false };
    let list = vec![tool("get_weather"), tool("f")];
    Tools { list, choice: ToolChoice::Auto, parallel: true, definitions: Vec::new() }
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
                "<tool_call>{\"name\": \"f\", \"arguments\": {\"city\": \"Par</tool_call>",
                "<tool_call>{\"name\": \"f\", \"arguments\": {city: 1}}</tool_call>",
                "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 01}}</tool_call>",
                "<tool_call>{\"name\": \"f\", \"arguments\": [1]}</tool_call>",
                "<tool_call>{\"name\": \"f\", \"arguments\": \"x\"}</tool_call>",
                "<tool_call>{\"name\": 1}</tool_call>",
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
                "{\"name\": \"f\", \"parameters\": {}",
                "<|python_tag|>print(1)",
                "see {\"name\": \"f\", \"parameters\": {}}",
                "\n\n  hello",
            ],
        ),
        (MISTRAL, vec!["[TOOL_CALLS][]", "[TOOL_CALLS]nobody[ARGS]{}", "[TOOL_CALLS]!", "[TOOL_CALLS][1]", "[TOOL"]),
    ] {
        for text in texts {
            assert_eq!(run(style, Opening::Free, text), said("", text, &[]), "{text:?}");
        }
    }
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
    let long = format!("<tool_call>{{\"name\": \"f\", \"arguments\": {{\"a\": \"{}\"}}}}", "x".repeat(CALL_BYTES_MAX));
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
    for style in [HERMES, LLAMA, MISTRAL] {
        let (before, after) = style.tools.unwrap().around("f");
        assert_eq!(
            run(style, Opening::Free, &format!("{before}{{\"a\": 1}}{after}")),
            said("", "", &[("f", r#"{"a": 1}"#)])
        );
    }
}

#[test]
fn the_arguments_of_a_forced_call_come_out_as_they_are_said() {
    let forced = Tools { choice: ToolChoice::Required, ..tools() };
    for style in [HERMES, LLAMA, MISTRAL] {
        let (before, after) = style.tools.unwrap().around("f");
        let mut parser = OutputParser::new(&style, Opening::Free, &forced);
        assert_eq!(parser.push(&before), []);
        let call = Delta::Call { index: 0, name: "f".into() };
        let piece = |text: &str| Delta::Arguments { index: 0, text: text.into() };
        assert_eq!(parser.push("{\"a"), [call, piece("{\"a")]);
        assert_eq!(parser.push("\": {}"), [piece("\": {}")]);
        assert_eq!(parser.clone().finish(), [], "what is cut off stays a part");
        assert_eq!(parser.push("} "), [piece("}")]);
        assert_eq!((parser.push(after), parser.finish()), (vec![], vec![]));
    }
    let named = "[TOOL_CALLS]f[ARGS]{\"a\": 1}";
    assert_eq!(
        parse(OutputParser::new(&MISTRAL, Opening::Free, &forced), &[named]),
        said("", "", &[("f", r#"{"a": 1}"#)])
    );
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
fn published_templates_tell_their_style() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/templates");
    if !std::path::Path::new(folder).exists() {
        assert!(std::env::var("CORTEX_TEST_DATA").as_deref() != Ok("required"), "the templates are missing");
        eprintln!("SKIPPED: the published templates are not beside this checkout");
        return;
    }
    for (name, tools, reasoning, takes_tools) in [
        ("Qwen-Qwen3-0.6B", Some(ToolStyle::Hermes), Some("<think>"), true),
        ("Qwen-QwQ-32B", Some(ToolStyle::Hermes), Some("<think>"), true),
        ("Qwen-Qwen2.5-7B-Instruct", Some(ToolStyle::Hermes), None, true),
        ("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", Some(ToolStyle::Hermes), None, true),
        ("meta-llama-Llama-3.1-8B-Instruct", Some(ToolStyle::Llama), None, true),
        ("meta-llama-Llama-3.2-3B-Instruct", Some(ToolStyle::Llama), None, true),
        ("mistralai-Mistral-Nemo-Instruct-2407", Some(ToolStyle::Mistral), None, true),
        ("Mistral-Small-3.2-24B-Instruct-2506", Some(ToolStyle::Mistral), None, true),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", None, Some("<think>"), false),
        ("meetkai-functionary-medium-v3.1", None, None, true),
        ("Qwen3-Coder", None, None, true),
        ("GLM-4.6", None, Some("<think>"), true),
        ("google-gemma-2-2b-it", None, None, false),
    ] {
        let style = Style::of_template(&std::fs::read_to_string(format!("{folder}/{name}.jinja")).unwrap());
        let got = (style.tools, style.reasoning.map(|tags| tags.open), style.takes_tools);
        assert_eq!(got, (tools, reasoning, takes_tools), "{name}");
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
