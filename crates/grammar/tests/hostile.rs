//! Sources from strangers: whatever they hold, the compiler answers within a second and half a gigabyte.
//!
//! Alone in its process, which it measures. `CORTEX_HOSTILE` sets how many random sources there are.
#![allow(clippy::unwrap_used)]
mod support;

use std::time::Duration;

use grammar::{Arguments, Source, ToolCall, Vocabulary};
use inference::constraint::Violation;
use serde_json::{Map, Value, json};
use support::{Noise, Speaker, computed, vocabulary};

/// Longest that a source may compute.
const COMPILE_MAX: Duration = Duration::from_secs(1);
/// Longest that one mask may compute.
const MASK_MAX: Duration = Duration::from_millis(250);
/// Most memory that the process may take beside what it had.
const MEMORY_MAX_KIB: u64 = 512 << 10;

/// Most memory that this process ever had, in KiB; 0 where the system does not tell.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

#[derive(Default)]
struct Worst {
    compile: Duration,
    mask: Duration,
    compiled: usize,
    refused: usize,
    broken: usize,
    faults: Vec<String>,
}

fn try_source(vocabulary: &Vocabulary, speaker: &Speaker, source: &Source, name: &str, worst: &mut Worst) {
    if std::env::var_os("CORTEX_HOSTILE_NAMES").is_some() {
        eprintln!("{name}");
    }
    let before = (computed(), peak_kib());
    let compiled = vocabulary.compile(source);
    let took = computed() - before.0;
    let grown = peak_kib() - before.1;
    if took > Duration::from_millis(200) || grown > 50 << 10 {
        eprintln!("{name}: {took:?}, {grown} KiB");
    }
    worst.compile = worst.compile.max(took);
    if took > COMPILE_MAX {
        worst.faults.push(format!("{name} took {took:?}"));
    }
    match compiled {
        Err(error) => {
            worst.refused += 1;
            if error.code().row().http != 400 || error.message().len() > 600 {
                worst.faults.push(format!("{name}: {error}"));
            }
            if error.message().contains("the compiler failed") {
                eprintln!("{name}: {error}");
            }
        }
        Ok(compiled) => {
            worst.compiled += 1;
            match speaker.speak(&compiled, 1, 40, 60) {
                Ok(said) => {
                    let slowest = said.slowest;
                    if slowest > Duration::from_millis(20) {
                        eprintln!("{name}: a mask took {slowest:?}");
                    }
                    worst.mask = worst.mask.max(slowest);
                    if slowest > MASK_MAX {
                        worst.faults.push(format!("{name}: a mask took {slowest:?}"));
                    }
                }
                Err(Violation::Broken(what)) => worst.faults.push(format!("{name}: {what}")),
                Err(_) => worst.broken += 1,
            }
        }
    }
}

fn nested(depth: usize, wrap: impl Fn(Value) -> Value) -> Value {
    (0..depth).fold(json!({"type": "string"}), |inner, _| wrap(inner))
}

fn bombs() -> Vec<(&'static str, Value)> {
    let many = |count: usize, of: &dyn Fn(usize) -> Value| (0..count).map(of).collect::<Vec<_>>();
    let named = |count: usize, of: &dyn Fn(usize) -> Value| {
        (0..count).map(|i| (format!("property_{i}"), of(i))).collect::<Map<_, _>>()
    };
    let text = json!({"type": "string"});
    let doubling: Map<String, Value> = (0..40)
        .map(|i| {
            let next = format!("#/$defs/d{}", i + 1);
            (format!("d{i}"), json!({"allOf": [{"$ref": next}, {"$ref": next}]}))
        })
        .chain([("d40".into(), json!({"type": "integer"}))])
        .collect();
    vec![
        ("enum of 5,000", json!({"enum": many(5_000, &|i| json!(format!("value number {i}")))})),
        ("enum past the limit", json!({"enum": many(6_000, &|i| json!(i))})),
        ("long strings in an enum", json!({"enum": many(100, &|i| json!("x".repeat(1_000) + &i.to_string()))})),
        ("1,000 properties", json!({"properties": named(1_000, &|_| text.clone()), "additionalProperties": false})),
        ("1,000 properties and others", json!({"properties": named(1_000, &|_| text.clone())})),
        ("5,000 properties and others", json!({"type": "object", "properties": named(5_000, &|_| json!(true))})),
        (
            "1,000 required properties",
            json!({"type": "object", "properties": named(1_000, &|_| json!({"type": "integer"})),
                "required": many(1_000, &|i| json!(format!("property_{i}")))}),
        ),
        ("long strings", json!({"type": "string", "minLength": 10_000, "maxLength": 10_000})),
        (
            "many long strings",
            json!({"properties": named(300, &|i| json!({"type": "string", "maxLength": 9_000 + i}))}),
        ),
        ("long arrays", json!({"type": "array", "items": text, "minItems": 10_000, "maxItems": 10_000})),
        ("arrays in arrays", nested(8, |inner| json!({"type": "array", "items": inner, "maxItems": 10_000}))),
        (
            "objects with counts",
            nested(
                6,
                |inner| json!({"type": "object", "additionalProperties": inner, "minProperties": 50, "maxProperties": 100}),
            ),
        ),
        ("deep arrays", nested(30, |inner| json!({"type": "array", "items": inner}))),
        ("too deep", nested(60, |inner| json!({"type": "array", "items": inner}))),
        (
            "wide anyOf of objects",
            json!({"anyOf": many(500, &|i| json!({"type": "object", "properties":
            {"kind": {"const": i}, format!("p{i}"): {"type": "string"}}, "required": ["kind"]}))}),
        ),
        ("anyOf in anyOf", nested(9, |inner| json!({"anyOf": [inner, {"type": "array", "items": inner}]}))),
        (
            "allOf of anyOf",
            json!({"allOf": many(12, &|i| json!({"anyOf": [{"minimum": i}, {"maximum": -(i as i64)}]}))}),
        ),
        ("allOf of allOf", nested(12, |inner| json!({"allOf": [inner, inner]}))),
        ("refs that double", json!({"$ref": "#/$defs/d0", "$defs": doubling})),
        ("a ref to itself", json!({"$ref": "#"})),
        ("a ref to itself by name", json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})),
        (
            "refs in a circle",
            json!({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}, {}]},
            "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}}),
        ),
        ("an endless object", json!({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]})),
        ("a ref elsewhere", json!({"$ref": "http://127.0.0.1/schema"})),
        ("a ref to a file", json!({"$ref": "file:///etc/passwd"})),
        ("repetitions", json!({"type": "string", "pattern": "^(a{1,100}){1,100}$"})),
        ("nested repetitions", json!({"type": "string", "pattern": "((a{1,100}){1,100}){1,100}"})),
        ("unicode repetitions", json!({"type": "string", "pattern": "^[\\p{L}\\p{N}]{0,5000}$"})),
        ("exponential search", json!({"type": "string", "pattern": "[ab]*a[ab]{24}"})),
        ("alternatives", json!({"type": "string", "pattern": "(a|aa|aaa|b.*c|.*d){1,200}x"})),
        ("look-around", json!({"type": "string", "pattern": "(?=a)(?!b)c"})),
        ("back reference", json!({"type": "string", "pattern": "(a)\\1"})),
        ("no regular expression", json!({"type": "string", "pattern": "(((("})),
        (
            "patterns that overlap",
            json!({"patternProperties": {"a.*": true, ".*b": {"type": "string"}, "[ab]*a[ab]{15}": {}}}),
        ),
        (
            "many patterns",
            json!({"type": "object", "patternProperties":
            (0..60).map(|i| (format!("^k{i}_[a-z]{{1,20}}$"), json!({"type": "integer"}))).collect::<Map<_, _>>()}),
        ),
        ("huge bounds", json!({"type": "number", "minimum": -1e308, "maximum": 1e308})),
        ("tiny bounds", json!({"type": "number", "exclusiveMinimum": 5e-324, "maximum": 1e-300})),
        (
            "narrow bounds",
            json!({"type": "number", "minimum": 0.123_456_789_012_345_6, "maximum": 0.123_456_789_012_345_7}),
        ),
        ("wrong bounds", json!({"type": "integer", "minimum": 5, "maximum": -5})),
        ("a huge multiple", json!({"type": "integer", "multipleOf": 1_000_003})),
        ("a tiny multiple", json!({"type": "number", "multipleOf": 1e-300})),
        ("a multiple of nothing", json!({"type": "number", "multipleOf": 0})),
        ("multiples of all", json!({"allOf": many(40, &|i| json!({"multipleOf": i + 2})), "type": "integer"})),
        ("big numbers", json!({"type": "string", "maxLength": 18_446_744_073_709_551_615u64})),
        ("wrong types", json!({"type": 7, "properties": [], "required": "x", "enum": {}, "anyOf": 3})),
        ("no types", json!({"type": [], "enum": []})),
        ("settings of the compiler", json!({"x-guidance": {"whitespace_pattern": "(((", "lenient": "yes"}})),
        ("a null", json!(null)),
        ("false", json!(false)),
        ("true", json!(true)),
        ("a const past all", json!({"const": "c".repeat(120_000)})),
        ("a name past all", json!({"properties": {"n".repeat(100_000): {}}, "required": ["n"]})),
        (
            "formats",
            json!({"properties": named(300, &|i| json!({"type": "string", "format": grammar::FORMATS[i % 10]}))}),
        ),
    ]
}

fn random(noise: &mut Noise, depth: usize) -> Value {
    let keys = [
        "type",
        "properties",
        "items",
        "enum",
        "const",
        "anyOf",
        "oneOf",
        "allOf",
        "$ref",
        "required",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "multipleOf",
        "minItems",
        "maxItems",
        "prefixItems",
        "additionalProperties",
        "patternProperties",
        "$defs",
        "not",
        "if",
        "minProperties",
        "exclusiveMinimum",
        "$id",
        "$schema",
        "definitions",
        "additionalItems",
        "x",
        "",
        "\u{ff}",
    ];
    let texts = [
        "string",
        "object",
        "array",
        "integer",
        "number",
        "null",
        "boolean",
        "#",
        "#/$defs/x",
        "#/properties",
        "^a.*$",
        "(a|b){3,9}",
        "date",
        "[^a]*\u{1F642}+",
        "\\p{Lu}",
        "a{0,900}",
        "#/",
        "",
        "\\",
        "\"",
    ];
    match if depth == 0 { noise.below(5) } else { noise.below(10) } {
        0 => json!(noise.pick(&texts)),
        1 => json!(noise.below(20)),
        2 => json!(noise.pick(&[1e300, -1e-300, 0.5, -3.25, 9_007_199_254_740_993.0, 0.1])),
        3 => json!(noise.chance(50)),
        4 => json!(null),
        5 => (0..noise.below(4)).map(|_| random(noise, depth - 1)).collect(),
        _ => {
            let map = (0..noise.below(5)).map(|_| (noise.pick(&keys).to_string(), random(noise, depth - 1)));
            Value::Object(map.collect())
        }
    }
}

#[test]
fn no_source_takes_more_than_a_second_or_half_a_gigabyte() {
    let Some((vocabulary, speaker)) = vocabulary("tokenizers/qwen3") else { return };
    let before = peak_kib();
    let mut worst = Worst::default();
    for strict in [true, false] {
        for (name, schema) in bombs() {
            try_source(&vocabulary, &speaker, &Source::JsonSchema { schema, strict }, name, &mut worst);
        }
    }
    for pattern in
        ["(a{1,100}){1,100}", "[ab]*a[ab]{24}", "(((", "(?s:.*)", "\\p{L}{1,9999}", "(?i)straße+", "", "a{99999}"]
    {
        try_source(&vocabulary, &speaker, &Source::Regex(pattern.into()), pattern, &mut worst);
    }
    let grammars = [
        "start: start",
        "start: a\na: b\nb: a | \"x\"",
        "start: x x x x\nx: y y y y\ny: z z z z\nz: \"a\" | \"b\" | \"ab\"",
        "start: (\"a\" | start)*",
        "",
        "start: <[99999999]>",
        "start: %json {\"$ref\": \"#\"}",
        "start: /(a|b)*c{1,9000}/",
        "start: s\ns: s s | s s s | \"a\" | \"\"",
        "%import common.INT\nstart: INT",
        "start: \u{0}",
        "start: @other",
        "start: x{1,9999}\nx: \"a\" | \"b\" x",
        "start: \"a\"{1000000}",
    ];
    for text in grammars {
        try_source(&vocabulary, &speaker, &Source::Lark(text.into()), text, &mut worst);
    }
    let tool = |i| ToolCall {
        before: format!("<tool_call>\n{{\"name\": \"tool_{i}\", \"arguments\": "),
        parameters: json!({"properties": {"a": {}}}),
        strict: true,
        after: "}\n</tool_call>".into(),
        arguments: Arguments::Json,
    };
    let tools = Source::Tools { tools: (0..128).map(tool).collect(), between: Some("\n".into()) };
    try_source(&vocabulary, &speaker, &tools, "128 tools", &mut worst);
    let texts: Vec<String> = (0..12).map(|j| format!("text_{j}")).collect();
    let tagged = |i| ToolCall {
        before: format!("<tool_call>\n<function=tool_{i}>\n"),
        parameters: json!({"properties": texts.iter().map(|text| (text.clone(), json!({}))).collect::<Map<_, _>>()}),
        strict: true,
        after: "</function>\n</tool_call>".into(),
        arguments: Arguments::Tagged { around: ["<parameter=", ">\n", "\n", "</parameter>"], texts: texts.clone() },
    };
    let tools = Source::Tools { tools: (0..128).map(tagged).collect(), between: Some("\n".into()) };
    try_source(&vocabulary, &speaker, &tools, "128 tools in tags", &mut worst);
    let count = std::env::var("CORTEX_HOSTILE").ok().and_then(|count| count.parse().ok()).unwrap_or(300);
    for seed in 0..count {
        let schema = random(&mut Noise(seed), 5);
        let source = Source::JsonSchema { strict: seed % 2 == 0, schema };
        try_source(&vocabulary, &speaker, &source, &format!("seed {seed}: {source:?}"), &mut worst);
    }
    let grown = peak_kib() - before;
    eprintln!(
        "{} sources compiled, {} were refused, {} could not be followed; slowest compile {:?}, slowest mask {:?}, \
         {grown} KiB more than before, {} KiB at most",
        worst.compiled,
        worst.refused,
        worst.broken,
        worst.compile,
        worst.mask,
        peak_kib()
    );
    assert!(worst.faults.is_empty(), "{:#?}", worst.faults);
    assert!(grown < MEMORY_MAX_KIB, "{grown} KiB");
    assert!(worst.compiled > 100 && worst.refused > 100);
}
