//! Answers under random JSON schemas, said with random logits, judged by another program.
//!
//! `CORTEX_SCHEMAS` sets how many schemas the large vocabulary gets (100 by default); the small one gets 1,000.
#![allow(clippy::unwrap_used)]
mod support;

use std::time::Duration;

use grammar::Source;
use serde_json::{Map, Value, json};
use support::{Noise, computed, vocabulary};

fn string(noise: &mut Noise) -> Value {
    let mut schema = json!({"type": "string"});
    match noise.below(6) {
        0 => {
            let patterns = [
                "^[a-z]{2,5}$",
                "^\\d{3}-\\d{2}$",
                "^(foo|bar)+$",
                "x",
                "^[^\"\\\\]{1,4}$",
                "^\\w+@\\w+\\.com$",
                "^.{0,6}$",
            ];
            schema["pattern"] = json!(noise.pick(&patterns));
        }
        1 => schema["format"] = json!(noise.pick(&["date", "time", "date-time", "uuid", "ipv4", "email", "duration"])),
        2 | 3 => {
            let least = noise.below(4);
            schema["minLength"] = json!(least);
            schema["maxLength"] = json!(least + noise.below(12));
        }
        _ => {}
    }
    schema
}

fn number(noise: &mut Noise) -> Value {
    let integer = noise.chance(60);
    let mut schema = json!({"type": if integer { "integer" } else { "number" }});
    let low = noise.below(2_000) as i64 - 1_000;
    let high = low + 1 + noise.below(500) as i64;
    let half = |n: i64| if integer { json!(n) } else { json!(n as f64 + 0.5) };
    match noise.below(6) {
        0 => schema["minimum"] = half(low),
        1 => schema["maximum"] = half(high),
        2 => (schema["minimum"], schema["maximum"]) = (half(low), half(high)),
        // Endless digits come so near to an open bound that a reader of 64 bits takes them for it.
        3 if integer => (schema["exclusiveMinimum"], schema["exclusiveMaximum"]) = (half(low), half(high + 1)),
        4 if integer => schema["multipleOf"] = json!(noise.below(12) + 1),
        _ => {}
    }
    schema
}

fn constant(noise: &mut Noise) -> Value {
    noise.pick(&[
        json!(null),
        json!(true),
        json!(42),
        json!(-7),
        json!(2.5),
        json!("a \"quoted\" text"),
        json!("línea\nnueva"),
        json!(["a", 1]),
        json!({"k": "v"}),
        json!(""),
    ])
}

fn object(noise: &mut Noise, depth: usize) -> Value {
    let names = ["name", "id", "tags", "a b", "größe", "x/y", "\"q\"", "value"];
    let mut properties = Map::new();
    for _ in 0..noise.below(5) {
        properties.insert(noise.pick(&names).into(), schema(noise, depth - 1));
    }
    let required: Vec<&String> = properties.keys().filter(|_| noise.chance(60)).collect();
    let mut schema_ = json!({"type": "object", "required": required});
    match noise.below(4) {
        0 => {}
        1 => schema_["additionalProperties"] = schema(noise, depth.saturating_sub(2)),
        _ => schema_["additionalProperties"] = json!(false),
    }
    schema_["properties"] = Value::Object(properties);
    schema_
}

fn array(noise: &mut Noise, depth: usize) -> Value {
    let mut schema_ = json!({"type": "array", "items": schema(noise, depth - 1)});
    let least = noise.below(3);
    if noise.chance(60) {
        schema_["minItems"] = json!(least);
        schema_["maxItems"] = json!(least + noise.below(4));
    }
    if noise.chance(20) {
        schema_["prefixItems"] = json!([schema(noise, depth - 1), schema(noise, depth - 1)]);
    }
    schema_
}

fn schema(noise: &mut Noise, depth: usize) -> Value {
    match if depth == 0 { noise.below(7) } else { noise.below(14) } {
        0 | 1 => string(noise),
        2 | 3 => number(noise),
        4 => json!({"type": noise.pick(&["boolean", "null"])}),
        5 => json!({"const": constant(noise)}),
        6 => {
            let count = 1 + noise.below(5);
            json!({"enum": (0..count).map(|_| constant(noise)).collect::<Vec<_>>()})
        }
        7..=9 => object(noise, depth),
        10 | 11 => array(noise, depth),
        12 => json!({"anyOf": [schema(noise, depth - 1), schema(noise, depth - 1)]}),
        _ => json!({"$ref": noise.pick(&["#/$defs/leaf", "#/$defs/tree"])}),
    }
}

/// A whole schema; its definitions hold one that names itself.
fn document(seed: u64) -> Value {
    let mut noise = Noise(seed);
    let mut root = if noise.chance(80) { object(&mut noise, 3) } else { schema(&mut noise, 3) };
    let tree = json!({"type": "object", "properties": {"leaf": {"$ref": "#/$defs/leaf"},
        "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
        "required": ["leaf"], "additionalProperties": false});
    root["$defs"] = json!({"leaf": schema(&mut noise, 0), "tree": tree});
    root
}

/// Says one answer for each schema; all that end must fit, and nearly all end.
fn check(folder: &str, schemas: u64) {
    let Some((vocabulary, speaker)) = vocabulary(folder) else { return };
    let (mut ended, mut cut, mut huge, mut refused, mut tokens) = (0, 0, 0, 0, 0);
    let mut masks: Vec<Duration> = Vec::new();
    let (mut slowest, mut opening) = (Duration::ZERO, Duration::ZERO);
    let begun = computed();
    let mut compiling = Duration::ZERO;
    for seed in 0..schemas {
        let schema = document(seed);
        let before = computed();
        let compiled = vocabulary.compile(&Source::JsonSchema { schema: schema.clone(), strict: true });
        compiling += computed() - before;
        let compiled = match compiled {
            Ok(compiled) => compiled,
            Err(error) => {
                eprintln!("seed {seed} is refused: {error}");
                refused += 1;
                continue;
            }
        };
        let said =
            speaker.speak(&compiled, seed, 60, 600).unwrap_or_else(|error| panic!("seed {seed}: {error}: {schema}"));
        tokens += said.tokens;
        masks.extend(&said.masks);
        slowest = slowest.max(said.slowest);
        opening += said.opening;
        if !said.ended {
            cut += 1;
            continue;
        }
        let text = String::from_utf8(said.text).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let value: Value = match serde_json::from_str(&text) {
            Ok(value) => value,
            // JSON itself sets no bound to exponents; this reader does.
            Err(error) if error.to_string().starts_with("number out of range") => {
                huge += 1;
                continue;
            }
            Err(error) => panic!("seed {seed}: {error}: {text}: {schema}"),
        };
        let judge = jsonschema::options().should_validate_formats(true).build(&schema).unwrap();
        if let Err(error) = judge.validate(&value) {
            panic!("seed {seed}: {error}\nsaid: {text}\nschema: {schema}");
        }
        ended += 1;
    }
    masks.sort_unstable();
    let at = |permille: usize| masks[(masks.len() - 1) * permille / 1000];
    eprintln!(
        "{folder}: {schemas} schemas, {ended} answers ended and fit, {cut} were cut, {huge} had numbers \
         past 64 bits, {refused} refused; {tokens} tokens; \
         compiling took {:?} each, opening {:?}; masks p50 {:?} p99 {:?} p99.9 {:?} max {:?}, of which at most {slowest:?} were \
         computed; {:?} in all",
        compiling / schemas as u32,
        opening / schemas as u32,
        at(500),
        at(990),
        at(999),
        at(1000),
        computed() - begun
    );
    assert!(ended * 100 >= schemas * 95, "{ended} of {schemas} ended, {cut} were cut, {refused} were refused");
}

#[test]
fn whatever_ends_under_a_schema_fits_it_with_a_small_vocabulary() {
    check("models/stories260K", 1_000);
}

#[test]
fn whatever_ends_under_a_schema_fits_it_with_a_large_vocabulary() {
    let wanted = std::env::var("CORTEX_SCHEMAS").ok().and_then(|count| count.parse().ok());
    check("tokenizers/qwen3", wanted.unwrap_or(100));
}
