#![allow(clippy::unwrap_used)]
use serde_json::json;

use super::*;

fn render(source: &str, context: Json) -> Result<String, TemplateError> {
    ChatTemplate::new(source, Limits::default())?.render(context.as_object().unwrap(), 1_700_000_000)
}

#[test]
fn values_print_as_python_prints_them() {
    let context = json!({"d": {"a": [1, true, null, "it's"]}, "t": true});
    assert_eq!(render("{{ d }} {{ t }} {{ none }}", context).unwrap(), "{'a': [1, True, None, \"it's\"]} True None");
}

#[test]
fn json_is_what_python_dumps() {
    let context = json!({"d": {"b": "<é>", "a": [1, {}]}});
    assert_eq!(render("{{ d | tojson }}", context.clone()).unwrap(), r#"{"b": "<é>", "a": [1, {}]}"#);
    assert_eq!(
        render("{{ d | tojson(ensure_ascii=true, sort_keys=true) }}", context.clone()).unwrap(),
        r#"{"a": [1, {}], "b": "<\u00e9>"}"#
    );
    assert_eq!(render("{{ d.a | tojson(indent=2) }}", context).unwrap(), "[\n  1,\n  {}\n]");
}

#[test]
fn a_template_may_refuse_and_may_not_run_for_ever() {
    let raised = render("{{ raise_exception('no tools') }}", json!({})).unwrap_err();
    assert!(matches!(raised, TemplateError::Raised(words) if words == "no tools"));
    let deep = "{% macro m() %}{{ raise_exception('deep') }}{% endmacro %}{% if true %}{{ m() }}{% endif %}";
    assert!(matches!(render(deep, json!({})).unwrap_err(), TemplateError::Raised(words) if words == "deep"));
    let absent = render("{% include 'x' %}", json!({})).unwrap_err();
    assert!(matches!(absent, TemplateError::Render(_)), "{absent}");
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    assert!(matches!(render(endless, json!({})), Err(TemplateError::Render(_))));
    assert!(matches!(render("{% if %}", json!({})), Err(TemplateError::Source(_))));
}

#[test]
fn the_time_is_the_one_given() {
    assert_eq!(render("{{ strftime_now('%d %b %Y') }}", json!({})).unwrap(), "14 Nov 2023");
}

#[test]
fn arguments_come_in_the_form_that_a_template_prints() {
    let wanted = |call: &str| {
        let source =
            format!("{{% for m in messages %}}{{% for c in m.tool_calls %}}{call}{{% endfor %}}{{% endfor %}}");
        let template = ChatTemplate::new(&source, Limits::default()).unwrap();
        let call = json!({"function": {"name": "f", "arguments": "{\"a\": 1}"}});
        let message = template.fit_arguments(&json!({"role": "assistant", "tool_calls": [call]}));
        template.render(json!({"messages": [message]}).as_object().unwrap(), 0).unwrap()
    };
    assert_eq!(wanted("{{ c.function.arguments | tojson }}"), r#"{"a": 1}"#);
    assert_eq!(wanted("{{ c.function.arguments }}"), r#"{"a": 1}"#);
    assert_eq!(wanted("{{ '```' + c.function.arguments }}"), r#"```{"a": 1}"#);
    let items = "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}";
    assert_eq!(wanted(items), "<a>1");
    let broken = ChatTemplate::new("{{ messages[0].tool_calls[0].function.arguments }}", Limits::default()).unwrap();
    let message = broken.fit_arguments(&json!({"tool_calls": [{"function": {"arguments": "{\"a\": "}}]}));
    assert_eq!(message["tool_calls"][0]["function"]["arguments"], "{\"a\": ");
}

fn golden() -> Option<(&'static str, Json)> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/templates");
    let Ok(golden) = std::fs::read_to_string(format!("{folder}/GOLDEN.json")) else {
        assert!(std::env::var("CORTEX_TEST_DATA").as_deref() != Ok("required"), "the templates are missing");
        eprintln!("SKIPPED: the published templates are not beside this checkout");
        return None;
    };
    Some((folder, serde_json::from_str(&golden).unwrap()))
}

/// Says how a rendering differs from the golden one, if it does.
fn difference(
    template: Result<&ChatTemplate, &TemplateError>,
    fields: &Map<String, Json>,
    wanted: &Json,
) -> Option<String> {
    let got = template.ok().map(|template| template.render(fields, GOLDEN_NOW));
    match (got, wanted.as_str()) {
        // The goldens' clock says the ISO date whatever the format.
        (Some(Ok(got)), Some(wanted)) if got.replace("01 Jan 2026", "2026-01-01") == wanted => None,
        (None | Some(Err(_)), None) => None,
        (Some(Err(error)), _) => Some(error.to_string()),
        (Some(Ok(_)), _) => Some("another text".into()),
        (None, _) => Some("no template".into()),
    }
}

#[test]
fn published_templates_render_as_jinja2_renders_them() {
    let Some((folder, golden)) = golden() else { return };
    let (mut templates, mut right, mut wrong) = (0, 0, Vec::new());
    for (name, contexts) in golden["renders"].as_object().unwrap() {
        let source = std::fs::read_to_string(format!("{folder}/{name}")).unwrap();
        let template = ChatTemplate::new(&source, Limits::default());
        let mut differences = Vec::new();
        for (context, wanted) in contexts.as_object().unwrap() {
            let fields = golden["contexts"][context].as_object().unwrap();
            let difference = difference(template.as_ref(), fields, wanted);
            differences.extend(difference.map(|difference| format!("{name} {context}: {difference}")));
        }
        eprintln!(
            "{name}: {} of {}",
            contexts.as_object().unwrap().len() - differences.len(),
            contexts.as_object().unwrap().len()
        );
        templates += 1;
        right += usize::from(differences.is_empty());
        wrong.extend(differences);
    }
    eprintln!("{right} of {templates} templates are Jinja2's in every context\n{}", wrong.join("\n"));
    assert!(right >= TEMPLATES_RIGHT, "{right} of {templates}, {TEMPLATES_RIGHT} before:\n{}", wrong.join("\n"));
    assert!(wrong.len() <= RENDERINGS_WRONG, "{}, {RENDERINGS_WRONG} before:\n{}", wrong.len(), wrong.join("\n"));
}

/// What a server gives: tools that are none where there are none, and arguments in a form of the server's choice.
#[test]
fn what_a_server_gives_renders_as_what_transformers_gives() {
    let Some((folder, golden)) = golden() else { return };
    let mut wrong = Vec::new();
    for (name, contexts) in golden["renders"].as_object().unwrap() {
        let source = std::fs::read_to_string(format!("{folder}/{name}")).unwrap();
        let Ok(template) = ChatTemplate::new(&source, Limits::default()) else { continue };
        for (context, wanted) in contexts.as_object().unwrap().iter().filter(|(_, wanted)| wanted.is_string()) {
            let mut fields = golden["contexts"][context].as_object().unwrap().clone();
            fields.entry("tools").or_insert(Json::Null);
            for message in fields["messages"].as_array_mut().unwrap() {
                for call in message.get_mut("tool_calls").and_then(Json::as_array_mut).into_iter().flatten() {
                    let text = call["function"]["arguments"].to_string();
                    call["function"]["arguments"] = text.into();
                }
                *message = template.fit_arguments(message);
            }
            let difference = difference(Ok(&template), &fields, wanted);
            wrong.extend(
                difference.map(|difference| format!("{name} {context} {:?}: {difference}", template.arguments)),
            );
        }
    }
    eprintln!("{}", wrong.join("\n"));
    assert!(wrong.len() <= RENDERINGS_WRONG, "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// Templates of which every rendering was Jinja2's when this was written; it may only rise.
const TEMPLATES_RIGHT: usize = 36;
/// Renderings that were not; it may only fall.
const RENDERINGS_WRONG: usize = 4;

/// The first second of 2026.
const GOLDEN_NOW: i64 = 1_767_225_600;

#[test]
fn a_chat_of_thousands_of_messages_stays_within_the_fuel() {
    let Some((folder, golden)) = golden() else { return };
    let role = |i: usize| if i.is_multiple_of(2) { "user" } else { "assistant" };
    let messages: Vec<Json> = (0..4095).map(|i| json!({"role": role(i), "content": "hello"})).collect();
    let mut wrong = Vec::new();
    for (name, contexts) in golden["renders"].as_object().unwrap() {
        let source = std::fs::read_to_string(format!("{folder}/{name}")).unwrap();
        let template = ChatTemplate::new(&source, Limits::default()).unwrap();
        if !contexts["tools"].is_string() {
            continue;
        }
        let mut fields = golden["contexts"]["tools"].as_object().unwrap().clone();
        fields.insert("messages".into(), messages.clone().into());
        if let Err(error) = template.render(&fields, GOLDEN_NOW) {
            wrong.push(format!("{name}: {error}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
