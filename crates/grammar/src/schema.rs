//! What a schema may hold, checked before the compiler sees it.

use std::collections::BTreeSet;

use serde_json::{Map, Value};
use words::{Code, Error};

use crate::Limits;
use crate::compile::check_bytes;

/// Values of `format` that are enforced.
pub const FORMATS: [&str; 10] =
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"];

/// Keywords of any draft that change what fits and can't be enforced.
const UNSUPPORTED: [&str; 20] = [
    "not",
    "if",
    "then",
    "else",
    "contains",
    "minContains",
    "maxContains",
    "uniqueItems",
    "propertyNames",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "unevaluatedItems",
    "unevaluatedProperties",
    "$dynamicRef",
    "$recursiveRef",
    "$dynamicAnchor",
    "$recursiveAnchor",
    "extends",
    "disallow",
];
/// Keywords whose number is a repetition.
const REPETITIONS: [&str; 6] = ["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"];
/// Keywords that hold one schema.
pub(crate) const SCHEMA: [&str; 3] = ["items", "additionalProperties", "additionalItems"];
/// Keywords that hold schemas in order.
pub(crate) const SCHEMAS: [&str; 5] = ["anyOf", "oneOf", "allOf", "prefixItems", "items"];
/// Keywords that hold schemas by name.
pub(crate) const NAMED: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];
/// Most unsupported keywords that an error names.
const NAMED_MAX: usize = 8;

/// What was counted so far.
struct Count<'a> {
    limits: &'a Limits,
    strict: bool,
    properties: usize,
    enum_values: usize,
    alternatives: usize,
    multiples: BTreeSet<u64>,
    unsupported: Vec<String>,
}

fn refused(what: String) -> Error {
    Error::new(Code::InvalidRequest, what)
}

/// Checks a schema's size and keywords.
///
/// # Errors
/// `InvalidRequest` for what is too much, `UnsupportedParameter` with the names of keywords that a strict schema has
/// and that can't be enforced.
pub(crate) fn check(schema: &Value, strict: bool, limits: &Limits) -> Result<(), Error> {
    if !schema.is_object() && !schema.is_boolean() {
        return Err(refused("the schema must be an object".into()));
    }
    check_bytes(schema.to_string().len(), limits)?;
    check_depth(schema, limits.depth)?;
    let (multiples, unsupported) = (BTreeSet::new(), Vec::new());
    let mut count = Count { limits, strict, properties: 0, enum_values: 0, alternatives: 0, multiples, unsupported };
    count.schema(schema, "")?;
    count.done()
}

/// Checks a regular expression's size and repetitions.
///
/// # Errors
/// `InvalidRequest` for what is too much.
pub(crate) fn check_pattern(pattern: &str, limits: &Limits) -> Result<(), Error> {
    if pattern.len() > limits.pattern_bytes {
        let (bytes, most) = (pattern.len(), limits.pattern_bytes);
        return Err(refused(format!("a regular expression may have {most} bytes at most, one has {bytes}")));
    }
    check_repetitions(pattern, limits)
}

/// Checks what `{n}` and `{n,m}` repeat, all together: nested ones multiply.
pub(crate) fn check_repetitions(text: &str, limits: &Limits) -> Result<(), Error> {
    let mut product: u64 = 1;
    for part in text.split('{').skip(1) {
        let Some((inside, _)) = part.split_once('}') else { continue };
        let numbers = inside.split(',').map(str::trim).filter(|number| !number.is_empty());
        let numbers: Option<Vec<u64>> = numbers.map(|number| number.parse().ok()).collect();
        let Some(most) = numbers.and_then(|numbers| numbers.into_iter().max()) else { continue };
        product = product.saturating_mul(most.max(1));
    }
    if product > limits.repetition {
        let most = limits.repetition;
        return Err(refused(format!("the repetitions of a pattern multiply to {product}; {most} are the most")));
    }
    Ok(())
}

fn check_depth(value: &Value, left: usize) -> Result<(), Error> {
    let mut inner: Box<dyn Iterator<Item = &Value>> = match value {
        Value::Array(items) => Box::new(items.iter()),
        Value::Object(map) => Box::new(map.values()),
        _ => return Ok(()),
    };
    if left == 0 {
        return Err(refused("the schema is nested too deep".into()));
    }
    inner.try_for_each(|value| check_depth(value, left - 1))
}

impl Count<'_> {
    fn schema(&mut self, schema: &Value, path: &str) -> Result<(), Error> {
        let Value::Object(map) = schema else { return Ok(()) };
        self.keywords(map, path)?;
        for (key, value) in map {
            let at = || format!("{path}/{key}");
            match value {
                Value::Object(_) if SCHEMA.contains(&key.as_str()) => self.schema(value, &at())?,
                Value::Array(list) if SCHEMAS.contains(&key.as_str()) => {
                    self.alternatives += list.len();
                    for (i, schema) in list.iter().enumerate() {
                        self.schema(schema, &format!("{path}/{key}/{i}"))?;
                    }
                }
                Value::Object(schemas) if NAMED.contains(&key.as_str()) => {
                    if schemas.len() > self.limits.properties {
                        let most = self.limits.properties;
                        return Err(refused(format!("'{}' has more than {most} entries", at())));
                    }
                    self.properties += schemas.len();
                    for (name, schema) in schemas {
                        self.schema(schema, &format!("{path}/{key}/{name}"))?;
                    }
                    if key == "patternProperties" {
                        schemas.keys().try_for_each(|pattern| check_pattern(pattern, self.limits))?;
                    }
                }
                _ => {}
            }
        }
        self.bounds()
    }

    /// Checks the keywords of one schema object.
    fn keywords(&mut self, map: &Map<String, Value>, path: &str) -> Result<(), Error> {
        for (key, value) in map {
            let at = || format!("{path}/{key}");
            match (key.as_str(), value) {
                // Without effect when false.
                ("uniqueItems", Value::Bool(false)) => {}
                (key, _) if UNSUPPORTED.contains(&key) => self.unsupported.push(at()),
                ("format", Value::String(name)) if !FORMATS.contains(&name.as_str()) => {
                    self.unsupported.push(format!("{} '{name}'", at()));
                }
                ("$ref", Value::String(target)) if !target.starts_with('#') => {
                    return Err(refused(format!("'{}' must point into the schema, like '#/$defs/name'", at())));
                }
                ("pattern", Value::String(pattern)) => check_pattern(pattern, self.limits)?,
                ("enum", Value::Array(values)) => self.enum_values += values.len(),
                ("multipleOf", Value::Number(number)) => {
                    // As many states as the number has without its point; past the limit it does not matter how many.
                    let digits = number.to_string().replace(['.', '-'], "");
                    self.multiples.insert(digits.parse::<u64>().unwrap_or(u64::MAX).max(1));
                    let product = self.multiples.iter().fold(1u64, |product, digits| product.saturating_mul(*digits));
                    if product > self.limits.multiple {
                        return Err(refused(format!("'{}' and others are too fine to be enforced", at())));
                    }
                }
                (key, Value::Number(number)) if REPETITIONS.contains(&key) => {
                    let most = self.limits.repetition;
                    if number.as_u64().is_none_or(|number| number > most) {
                        return Err(refused(format!("'{}' must be from 0 to {most}, it is {number}", at())));
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn bounds(&self) -> Result<(), Error> {
        let limits = self.limits;
        for (count, most, what) in [
            (self.properties, limits.all_properties, "properties and definitions"),
            (self.enum_values, limits.enum_values, "values in its enums"),
            (self.alternatives, limits.alternatives, "alternatives"),
        ] {
            if count > most {
                return Err(refused(format!("the schema has more than {most} {what}")));
            }
        }
        Ok(())
    }

    fn done(mut self) -> Result<(), Error> {
        if !self.strict || self.unsupported.is_empty() {
            return Ok(());
        }
        let more = self.unsupported.len().saturating_sub(NAMED_MAX);
        self.unsupported.truncate(NAMED_MAX);
        let and_more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let names = self.unsupported.join(", ");
        let message = format!("this server can't enforce {names}{and_more}; leave them out, or 'strict'");
        Err(Error::new(Code::UnsupportedParameter, message))
    }
}
