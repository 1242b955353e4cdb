//! Templates and messages that nobody should make: each ends, in words or in a text, soon and small.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use serde_json::json;

use super::*;

/// Most seconds of processor time: one, and more where our own code is not optimised.
const SLOWEST: f64 = if cfg!(debug_assertions) { 10.0 } else { 1.0 };

/// Seconds of processor time that this thread has used: other threads and programs are nobody's fault here.
fn cpu() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
}

fn rendered(source: &str, messages: Json) -> Result<String, TemplateError> {
    let begun = cpu();
    let template = ChatTemplate::new(source, Limits::default())?;
    let context = json!({"messages": messages, "add_generation_prompt": true, "bos_token": "<s>"});
    let result = template.render(context.as_object().unwrap(), 1_700_000_000);
    let took = cpu() - begun;
    assert!(took < SLOWEST, "{took:.3} s for {source:.80}");
    result
}

fn chat(count: usize, content: &str) -> Json {
    (0..count).map(|i| json!({"role": if i % 2 == 0 { "user" } else { "assistant" }, "content": content})).collect()
}

#[test]
fn templates_without_an_end_are_stopped() {
    let long = "{{ 'a' * 1000 }}".repeat(1000);
    for (source, what) in [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "loops in loops"),
        ("{% for a in range(99999) %}{{ messages | tojson }}{% endfor %}", "a text without an end"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "a macro that calls itself"),
        ("{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "a tree of calls"),
        (
            "{% set ns = namespace(n=0) %}{% for a in range(99999) %}{% for b in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{% endfor %}",
            "a count",
        ),
        ("{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}", "a loop that calls itself"),
        (&format!("{{% for a in range(99999) %}}{long}{{% endfor %}}"), "long texts"),
    ] {
        assert!(rendered(source, chat(50, "hello there")).is_err(), "{what} came to an end");
    }
}

#[test]
fn sources_that_are_hard_to_read_are_refused_or_read() {
    for source in [
        "(".repeat(100_000),
        format!("{{{{ {}1{} }}}}", "(".repeat(50_000), ")".repeat(50_000)),
        format!("{{{{ {}1 }}}}", "not ".repeat(50_000)),
        format!("{{{{ {}1 }}}}", "-".repeat(50_000)),
        format!("{{{{ a{} }}}}", ".b".repeat(50_000)),
        format!("{{{{ a{} }}}}", " | upper".repeat(50_000)),
        format!("{{{{ {}{} }}}}", "[".repeat(50_000), "]".repeat(50_000)),
        "{% if a %}".repeat(20_000),
        "{% for a in a %}".repeat(20_000),
        "{#".repeat(300_000),
        "a".repeat((1 << 20) + 1),
    ] {
        let _ = rendered(&source, chat(1, "x"));
    }
}

#[test]
fn a_tag_ends_where_the_lexer_ends_it() {
    for (source, tokens) in [
        ("text . . . {{ a.b }} text", 4),
        ("{# {{ a a a a }} #}{{ a }}", 2),
        ("{{ {'a': {}}.b }}", 9),
        ("{% set x = 'it\\'s }} a long text' %}{{ a }}", 5),
        ("{{ a a a", 3),
    ] {
        assert_eq!(longest_tag(source.as_bytes()), tokens, "{source}");
    }
    let deep = format!("{{{{ {{}}{} }}}}", ".b".repeat(1000));
    assert!(matches!(rendered(&deep, chat(1, "x")), Err(TemplateError::Source(_))));
}

#[test]
fn messages_of_any_size_cost_a_usual_template_little() {
    let usual = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content | trim }}\
                 {% else %}<|assistant|>{{ m.content.split('</think>')[-1] }}{% endif %}<|end|>{% endfor %}";
    for (count, content) in
        [(4096, "word ".repeat(200)), (1, "</think>".repeat(500_000)), (2, "{{ x }}{% if %}".repeat(9_000))]
    {
        let text = rendered(usual, chat(count, &content)).unwrap();
        assert!(text.starts_with("<s>"));
    }
    let said = rendered("{{ messages[0].content }}", chat(1, "{{ raise_exception('x') }}")).unwrap();
    assert_eq!(said, "{{ raise_exception('x') }}", "what messages say is text");
}

// `PROPTEST_CASES` raises the budget (64 by default).
proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.div_ceil(4), ..ProptestConfig::default() })]
    #[test]
    fn no_mix_of_pieces_makes_the_renderer_panic_or_hang(
        pieces in proptest::collection::vec(proptest::sample::select(vec![
            "{% for m in messages %}", "{% endfor %}", "{% if m.role == 'user' %}", "{% else %}", "{% endif %}", "{{ m.content }}",
            "{{ messages | tojson(indent=2) }}", "{% set ns = namespace(x=0) %}", "{% set ns.x = ns.x + 1 %}", "{{ ns.x }}",
            "{% macro f(a) %}", "{% endmacro %}", "{{ f(1) }}", "{{ m.content[1:-1] }}", "{{ m['content'] | trim | length }}",
            "{{ loop.index0 // 0 }}", "{{ loop.previtem }}", "{{ range(5) | list }}", "{{ messages[0].content.split(' ') }}",
            "{{ strftime_now('%Q') }}", "{{ raise_exception(m) }}", "{{ undefined.field }}", "{% generation %}", "{%- -%}", "{{", "}}", "text",
            "{{ 2 ** 2000 }}", "{{ 9223372036854775807 + 1 }}", "{{ 'x' % 3 }}", "{{ '%s' | format(messages) }}", "{{ m is defined }}",
        ]), 0..12),
        contents in proptest::collection::vec(".{0,20}", 0..4),
    ) {
        let messages = contents.iter().map(|text| json!({"role": "user", "content": text})).collect();
        let _ = rendered(&pieces.concat(), messages);
    }
}
