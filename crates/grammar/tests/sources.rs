//! Each kind of source, and what it lets through.
#![allow(clippy::unwrap_used)]
mod support;

use grammar::{Arguments, Cache, Compiled, Source, ToolCall, Vocabulary};
use inference::constraint::{Grammar, Violation};
use serde_json::{Value, json};
use support::{Speaker, bytes};
use words::Code;

/// Whether the text may be the whole answer, and whether it may go on.
fn takes(vocabulary: &Vocabulary, source: &Source, text: &str) -> (bool, bool) {
    let compiled = vocabulary.compile(source).unwrap_or_else(|error| panic!("{source:?}: {error}"));
    let mut matcher = compiled.open().unwrap();
    for byte in text.bytes() {
        match matcher.accept(u32::from(byte)) {
            Ok(()) => {}
            Err(Violation::Foreign(_)) => return (false, false),
            Err(violation) => panic!("{source:?}, {text}: {violation}"),
        }
    }
    (matcher.may_end().unwrap(), !matcher.is_over() && matcher.mask().unwrap().first().is_some())
}

fn is_whole(vocabulary: &Vocabulary, source: &Source, text: &str) -> bool {
    takes(vocabulary, source, text).0
}

fn schema(schema: Value) -> Source {
    Source::JsonSchema { schema, strict: true }
}

fn call(name: &str, parameters: Value) -> ToolCall {
    let before = format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": ");
    ToolCall { before, parameters, strict: false, after: "}\n</tool_call>".into(), arguments: Arguments::Json }
}

fn said(compiled: &Compiled, speaker: &Speaker, seed: u64) -> String {
    String::from_utf8(speaker.speak(compiled, seed, 40, 400).unwrap().text).unwrap()
}

#[test]
fn every_kind_of_source_lets_its_texts_through_and_no_others() {
    let (vocabulary, _) = bytes();
    let number = schema(json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}));
    let choice = Source::Choice(vec!["yes".into(), "no \"quoted\"\n".into(), "yesterday".into()]);
    let lark = Source::Lark("start: \"(\" start \")\" | \"x\"".into());
    for (source, good, bad) in [
        (&Source::JsonObject, "{}", "[]"),
        (&Source::JsonObject, "{\"a\": [1, {\"b\": null}]}", "{'a': 1}"),
        (&number, "{\"n\": 7, \"m\": true}", "{}"),
        (&number, "{\n  \"n\": -7\n}", "{\"n\": \"7\"}"),
        (&Source::Regex("a+b|c/d\\d".into()), "aab", "b"),
        (&Source::Regex("a+b|c/d\\d".into()), "c/d7", "c/d"),
        (&choice, "yes", "yest"),
        (&choice, "no \"quoted\"\n", "no"),
        (&lark, "((x))", "((x)"),
    ] {
        assert!(is_whole(&vocabulary, source, good), "{source:?}: {good}");
        assert!(!is_whole(&vocabulary, source, bad), "{source:?}: {bad}");
    }
}

#[test]
fn what_is_whole_and_can_not_go_on_is_over() {
    let (vocabulary, _) = bytes();
    assert_eq!(takes(&vocabulary, &Source::Choice(vec!["no".into(), "now".into()]), "no"), (true, true));
    assert_eq!(takes(&vocabulary, &Source::Choice(vec!["no".into(), "now".into()]), "now"), (true, false));
    assert_eq!(takes(&vocabulary, &Source::JsonObject, "{\"a\": 1}"), (true, false));
}

#[test]
fn tools_are_called_by_their_names_with_arguments_that_fit() {
    let (vocabulary, speaker) = bytes();
    let weather = json!({"type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"],
        "additionalProperties": false, "$defs": {"city": {"enum": ["Oslo", "Rome"]}}});
    let tools = vec![call("weather", weather), call("time", json!({"type": "object", "additionalProperties": false}))];
    let one = Source::Tools { tools: tools.clone(), between: None };
    let more = Source::Tools { tools, between: Some("\n".into()) };
    let oslo = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>";
    let time = "<tool_call>\n{\"name\": \"time\", \"arguments\": {}}\n</tool_call>";
    assert_eq!(takes(&vocabulary, &one, oslo), (true, false));
    assert!(!is_whole(&vocabulary, &one, &oslo.replace("Oslo", "Bonn")));
    assert!(!is_whole(&vocabulary, &one, &format!("{oslo}\n{time}")));
    assert!(is_whole(&vocabulary, &more, &format!("{oslo}\n{time}\n{oslo}")));
    let compiled = vocabulary.compile(&one).unwrap();
    for seed in 0..20 {
        assert!([oslo, time].iter().any(|call| said(&compiled, &speaker, seed).starts_with(&call[..20])));
    }
}

#[test]
fn arguments_in_tags_fit_their_types_and_texts_stand_as_they_are() {
    let (vocabulary, speaker) = bytes();
    let tool = |parameters: Value, texts: &[&str], strict| ToolCall {
        before: "<call=f>\n".into(),
        parameters,
        strict,
        after: "</call>".into(),
        arguments: Arguments::Tagged {
            around: ["<arg=", ">\n", "\n", "</arg>"],
            texts: texts.iter().map(|text| text.to_string()).collect(),
        },
    };
    let one = |parameters: &Value, texts: &[&str], strict| Source::Tools {
        tools: vec![tool(parameters.clone(), texts, strict)],
        between: None,
    };
    let parameters = json!({"type": "object", "properties": {
        "city": {"type": "string"}, "n": {"$ref": "#/$defs/n"}, "unit": {"enum": ["C", "<F>", 3]},
    }, "required": ["city", "unit"], "$defs": {"n": {"type": "integer"}}});
    let source = one(&parameters, &["city", "unit"], false);
    let call = |arguments: &str| format!("<call=f>\n{arguments}</call>");
    let argument = |key: &str, value: &str| format!("<arg={key}>\n{value}\n</arg>\n");
    let city = argument("city", "Paris\n\"</ar");
    let unit = argument("unit", "<F>");
    assert_eq!(takes(&vocabulary, &source, &call(&format!("{city}{unit}"))), (true, false));
    assert!(is_whole(&vocabulary, &source, &call(&format!("{city}{}{}", argument("n", "-3"), argument("unit", "3")))));
    for bad in [
        city.clone(),
        format!("{unit}{city}"),
        format!("{city}{}", argument("unit", "K")),
        format!("{city}{}{unit}", argument("n", "many")),
        format!("{}{unit}", argument("city", "a</arg>b")),
        format!("{city}{unit}{}", argument("more", "1")),
    ] {
        assert!(!is_whole(&vocabulary, &source, &call(&bad)), "{bad}");
    }
    // Without properties anything may come, unless it is said that nothing may.
    let open = one(&json!({"type": "object"}), &[], false);
    assert!(is_whole(&vocabulary, &open, &call("")) && is_whole(&vocabulary, &open, &call(&city)));
    let closed = one(&json!({"additionalProperties": false}), &[], false);
    assert!(is_whole(&vocabulary, &closed, &call("")) && !is_whole(&vocabulary, &closed, &call(&city)));
    let compiled = vocabulary.compile(&source).unwrap();
    for seed in 0..5 {
        assert!(said(&compiled, &speaker, seed).starts_with("<call=f>\n<arg=city>\n"));
    }
    // As many as an agent has.
    let many = |i| ToolCall { before: format!("<call=f{i}>\n"), ..tool(parameters.clone(), &["city", "unit"], false) };
    let many = Source::Tools { tools: (0..60).map(many).collect(), between: Some("\n".into()) };
    let (first, last) = (call(&format!("{city}{unit}")).replace("=f>", "=f0>"), call(&format!("{city}{unit}")));
    assert!(is_whole(&vocabulary, &many, &format!("{first}\n{}", last.replace("=f>", "=f59>"))));
    let narrow = json!({"properties": {"a": {"type": "string", "maxLength": 3}}});
    assert!(vocabulary.compile(&one(&narrow, &["a"], false)).is_ok(), "left to the model");
    let error = vocabulary.compile(&one(&narrow, &["a"], true)).unwrap_err();
    assert!(error.code() == Code::UnsupportedParameter && error.message().contains("'maxLength'"), "{error}");
    let error = vocabulary.compile(&one(&json!({"properties": {"a>": {}}}), &["a>"], false)).unwrap_err();
    assert!(error.code() == Code::InvalidRequest && error.message().contains("a>"), "{error}");
}

#[test]
fn reasoning_may_come_first_and_is_free() {
    let (vocabulary, _) = bytes();
    let then = || Box::new(Source::Choice(vec!["yes".into()]));
    let free = Source::Reasoned { open: Some("<think>".into()), close: "</think>".into(), then: then() };
    let inside = Source::Reasoned { open: None, close: "</think>".into(), then: then() };
    for (source, text, whole) in [
        (&free, "yes", true),
        (&free, "<think>no, or\n{</thin</think>\n\nyes", true),
        (&free, "<think>yes", false),
        (&free, "well, yes", false),
        (&inside, "yes", false),
        (&inside, "yes?</think>yes", true),
        (&inside, "a</think>b</think>yes", false),
    ] {
        assert_eq!(is_whole(&vocabulary, source, text), whole, "{text}");
    }
}

#[test]
fn what_a_strict_schema_can_not_enforce_is_named() {
    let (vocabulary, _) = bytes();
    let bad = json!({"type": "object", "properties": {"a": {"not": {}}, "b": {"type": "string", "format": "iri"},
        "c": {"type": "array", "uniqueItems": true}, "d": {"uniqueItems": false}}});
    let error = vocabulary.compile(&schema(bad.clone())).unwrap_err();
    assert_eq!(error.code(), Code::UnsupportedParameter);
    for name in ["/properties/a/not", "/properties/b/format 'iri'", "/properties/c/uniqueItems"] {
        assert!(error.message().contains(name), "{error}");
    }
    assert!(!error.message().contains("/d/"), "{error}");
    let lenient = Source::JsonSchema { schema: bad, strict: false };
    assert!(is_whole(&vocabulary, &lenient, "{\"c\": [1, 1]}"), "left to the model");
    // A property may have any name, also a keyword's.
    assert!(is_whole(&vocabulary, &schema(json!({"properties": {"not": {"type": "null"}}})), "{\"not\": null}"));
}

#[test]
fn a_source_that_can_not_be_is_refused_in_words() {
    let (vocabulary, _) = bytes();
    for (source, word) in [
        (schema(json!({"type": "integer", "minimum": 5, "maximum": 4})), "schema"),
        (schema(json!({"$ref": "#/$defs/none"})), "schema"),
        (schema(json!({"$ref": "http://elsewhere/"})), "point into the schema"),
        (schema(json!({"type": "string", "maxLength": 1_000_000})), "/maxLength"),
        (schema(json!([])), "must be an object"),
        (Source::Regex("(".into()), "regular expression"),
        (Source::Regex(String::new()), "no text"),
        (Source::Regex("(a{1000}){1000}".into()), "multiply"),
        (Source::Choice(vec![]), "choice"),
        (Source::Lark("start: nothing".into()), "grammar"),
        (Source::Tools { tools: vec![], between: None }, "tool"),
    ] {
        let error = vocabulary.compile(&source).unwrap_err();
        assert!(error.code().row().http == 400 && error.message().contains(word), "{source:?}: {error}");
    }
}

#[test]
fn formats_that_are_told_as_supported_compile() {
    let (vocabulary, speaker) = bytes();
    for format in grammar::FORMATS {
        let rule = json!({"type": "string", "format": format});
        let compiled = vocabulary.compile(&schema(rule.clone())).unwrap();
        let judge = jsonschema::options().should_validate_formats(true).build(&rule).unwrap();
        for seed in 0..10 {
            let spoken = speaker.speak(&compiled, seed, 5, 400).unwrap();
            let text = String::from_utf8(spoken.text).unwrap();
            if spoken.ended {
                assert!(judge.is_valid(&serde_json::from_str(&text).unwrap()), "{format}: {text}");
            }
        }
    }
}

#[test]
fn the_cache_keeps_what_was_used_last_and_tells_sources_apart() {
    let (vocabulary, _) = bytes();
    let sources: Vec<Source> = (0..4).map(|i| Source::Choice(vec![format!("choice {i}")])).collect();
    let mut cache = Cache::new(3);
    for source in &sources {
        assert!(cache.find(source.key()).is_none());
        cache.keep(source.key(), vocabulary.compile(source).unwrap().into());
        cache.find(sources[0].key()).unwrap();
    }
    let kept: Vec<bool> = sources.iter().map(|source| cache.find(source.key()).is_some()).collect();
    assert_eq!(kept, [true, false, true, true]);
    let strict = |strict| Source::JsonSchema { schema: json!({}), strict }.key();
    assert_ne!(strict(true), strict(false));
}
