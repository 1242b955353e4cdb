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
fn published_templates_render_as_jinja2_renders_them() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data/templates");
    let Ok(golden) = std::fs::read_to_string(format!("{folder}/GOLDEN.json")) else {
        assert!(std::env::var("CORTEX_TEST_DATA").as_deref() != Ok("required"), "the templates are missing");
        eprintln!("SKIPPED: the published templates are not beside this checkout");
        return;
    };
    let golden: Json = serde_json::from_str(&golden).unwrap();
    let (mut all, mut right, mut wrong) = (0, 0, Vec::new());
    for (name, contexts) in golden["renders"].as_object().unwrap() {
        let source = std::fs::read_to_string(format!("{folder}/{name}")).unwrap();
        let template = ChatTemplate::new(&source, Limits::default());
        for (context, wanted) in contexts.as_object().unwrap() {
            let fields = golden["contexts"][context].as_object().unwrap();
            let got = template.as_ref().ok().map(|template| template.render(fields, GOLDEN_NOW));
            let same = match (&got, wanted.as_str()) {
                // The goldens' clock says the ISO date whatever the format.
                (Some(Ok(got)), Some(wanted)) => got.replace("01 Jan 2026", "2026-01-01") == wanted,
                (None | Some(Err(_)), None) => true,
                _ => false,
            };
            all += 1;
            right += usize::from(same);
            if !same {
                let what = match &got {
                    Some(Err(error)) => error.to_string(),
                    Some(Ok(_)) => "another text".into(),
                    None => "no template".into(),
                };
                wrong.push(format!("{name} {context}: {what}"));
            }
        }
    }
    eprintln!("{right} of {all} renderings are Jinja2's\n{}", wrong.join("\n"));
    assert!(right >= RENDERINGS_RIGHT, "{right} of {all}, {RENDERINGS_RIGHT} before:\n{}", wrong.join("\n"));
}

/// Renderings that were Jinja2's when this was written; it may only rise.
const RENDERINGS_RIGHT: usize = 186;

/// The first second of 2026.
const GOLDEN_NOW: i64 = 1_767_225_600;
