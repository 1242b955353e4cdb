//! A schema in the form that the compiler gets: what it would read too loosely is said in other words.

use serde_json::{Map, Value, json};

use crate::schema::{NAMED, SCHEMA, SCHEMAS};

/// Largest integer where a schema sets no bound: every reader of JSON that knows 64-bit integers holds it, and an answer
/// can't go on in digits for ever.
const INTEGER_MAX: f64 = 1e18;

const DATE: &str = concat!(
    r"(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])",
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))",
    r"|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)",
);
const TIME: &str =
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])";

/// Returns the pattern of a format whose own rule in the compiler lets through what a strict reader refuses: a leap
/// second anywhere, the 29th of February of any year.
fn pattern(format: &str) -> Option<String> {
    match format {
        "date" => Some(format!("^{DATE}$")),
        "time" => Some(format!("^{TIME}$")),
        "date-time" => Some(format!("^{DATE}T{TIME}$")),
        _ => None,
    }
}

/// Returns the schema as the compiler gets it. It was checked: its depth is bounded.
pub(crate) fn prepare(schema: &Value) -> Value {
    let Value::Object(map) = schema else { return schema.clone() };
    let mut prepared = Map::with_capacity(map.len());
    for (key, value) in map {
        let name = key.as_str();
        let value = match value {
            Value::Object(_) if SCHEMA.contains(&name) => prepare(value),
            Value::Array(list) if SCHEMAS.contains(&name) => list.iter().map(prepare).collect(),
            Value::Object(named) if NAMED.contains(&name) => {
                Value::Object(named.iter().map(|(name, schema)| (name.clone(), prepare(schema))).collect())
            }
            _ => value.clone(),
        };
        prepared.insert(key.clone(), value);
    }
    restate_format(&mut prepared);
    bound_integers(&mut prepared);
    Value::Object(prepared)
}

fn restate_format(schema: &mut Map<String, Value>) {
    let Some(pattern) = schema.get("format").and_then(Value::as_str).and_then(pattern) else { return };
    schema.remove("format");
    if !schema.contains_key("pattern") {
        schema.insert("pattern".into(), pattern.into());
        return;
    }
    let rule = json!({"type": "string", "pattern": pattern});
    match schema.get_mut("allOf") {
        Some(Value::Array(all)) => all.push(rule),
        _ => _ = schema.insert("allOf".into(), json!([rule])),
    }
}

fn bound_integers(schema: &mut Map<String, Value>) {
    if schema.get("type").and_then(Value::as_str) != Some("integer") {
        return;
    }
    let number = |key: &str| schema.get(key).and_then(Value::as_f64);
    let low = number("minimum").or(number("exclusiveMinimum"));
    let high = number("maximum").or(number("exclusiveMaximum"));
    if high.is_none() && low.is_none_or(|low| low < INTEGER_MAX) {
        schema.insert("maximum".into(), INTEGER_MAX.into());
    }
    if low.is_none() && high.is_none_or(|high| high > -INTEGER_MAX) {
        schema.insert("minimum".into(), (-INTEGER_MAX).into());
    }
}
