//! Chat templates that others published: which form they tell, and calls as they print them.

use super::*;

/// Reads a file of the published templates; `None`, loudly, where they are not beside this checkout.
fn published(name: &str) -> Option<String> {
    let text = std::fs::read_to_string(format!("{}/../../../shared/data/templates/{name}", env!("CARGO_MANIFEST_DIR")));
    if text.is_err() {
        assert!(std::env::var("CORTEX_TEST_DATA").as_deref() != Ok("required"), "the templates are missing");
        eprintln!("SKIPPED: the published templates are not beside this checkout");
    }
    text.ok()
}

#[test]
fn a_call_as_a_published_template_prints_it_is_read() {
    let Some(golden) = published("GOLDEN.json") else { return };
    let golden: serde_json::Value = serde_json::from_str(&golden).unwrap();
    let mut read = Vec::new();
    for (name, renders) in golden["renders"].as_object().unwrap() {
        let style = Style { reasoning: None, ..Style::of_template(&published(name).unwrap()) };
        let (Some(form), Some(turn)) = (style.tools, renders["tool_turn"].as_str()) else { continue };
        let mark = if form == ToolStyle::Llama { "{\"name\": " } else { form.open() };
        let call = &turn[turn.rfind(mark).unwrap()..];
        let got = run(style, Opening::Free, call);
        let wanted = [("get_weather".to_string(), "{\"city\": \"Paris\", \"n\": 3}".to_string())];
        assert_eq!(got.calls, wanted, "{name}: {call}");
        read.push(form);
    }
    for form in FORMS.map(|style| style.tools.unwrap()) {
        assert!(read.contains(&form), "{form:?} has no template");
    }
    assert!(read.len() >= 18, "{read:?}");
}

#[test]
fn published_templates_tell_their_style() {
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
        ("meetkai-functionary-medium-v3.1", Some(ToolStyle::Functionary), None, true),
        ("Qwen3-Coder", Some(ToolStyle::QwenCoder), None, true),
        ("stepfun-ai-Step-3.5-Flash", Some(ToolStyle::QwenCoder), Some("<think>"), true),
        ("ByteDance-Seed-OSS", Some(ToolStyle::Seed), Some("<seed:think>"), true),
        ("GLM-4.6", Some(ToolStyle::Glm), Some("<think>"), true),
        ("GLM-4.7-Flash", Some(ToolStyle::Glm), Some("<think>"), true),
        ("google-gemma-2-2b-it", None, None, false),
        ("unsloth-Apriel-1.5", None, None, true),
    ] {
        let Some(template) = published(&format!("{name}.jinja")) else { return };
        let style = Style::of_template(&template);
        let got = (style.tools, style.reasoning.map(|tags| tags.open), style.takes_tools);
        assert_eq!(got, (tools, reasoning, takes_tools), "{name}");
    }
}
