//! What Python prints: values as `str` does, JSON as `json.dumps` does.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, Value};
use serde_json::Value as Json;

/// Deepest nesting that is printed.
const DEPTH_MAX: usize = 128;

/// Prints a value as Jinja2 does.
pub(super) fn format(out: &mut Output<'_>, state: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Bool | ValueKind::None | ValueKind::Map | ValueKind::Seq | ValueKind::Number => {
            out.write_str(&text(value)).map_err(Error::from)
        }
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// Python's `str`.
pub(super) fn text(value: &Value) -> String {
    match value.kind() {
        ValueKind::String | ValueKind::Undefined => value.to_string(),
        _ => {
            let mut out = String::new();
            repr(value, &mut out, 0);
            out
        }
    }
}

/// Python's `repr`.
fn repr(value: &Value, out: &mut String, depth: usize) {
    let deeper = depth + 1;
    match value.kind() {
        _ if depth > DEPTH_MAX => out.push_str("..."),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::None => out.push_str("None"),
        ValueKind::String => quote(value.as_str().unwrap_or_default(), out),
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(&key, out, deeper);
                out.push_str(": ");
                repr(&value.get_item(&key).unwrap_or_default(), out, deeper);
            }
            out.push('}');
        }
        ValueKind::Seq => {
            out.push('[');
            for (i, item) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(&item, out, deeper);
            }
            out.push(']');
        }
        _ => out.push_str(&value.to_string()),
    }
}

/// A string as Python quotes it: single quotes, unless it has some and no double ones.
fn quote(text: &str, out: &mut String) {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(mark);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == mark => out.extend(['\\', c]),
            c => out.push(c),
        }
    }
    out.push(mark);
}

/// `length`: of what is undefined it is 0, as in Jinja2.
pub(super) fn length(value: &Value) -> Result<usize, Error> {
    let none = || Error::new(ErrorKind::InvalidOperation, format!("a {} has no length", value.kind()));
    if value.is_undefined() { Ok(0) } else { value.len().ok_or_else(none) }
}

/// `is iterable`: none is not, and what is undefined is, as in Jinja2.
pub(super) fn iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// `tojson` as Hugging Face has it: `json.dumps` with `ensure_ascii`, `indent`, `separators` and `sort_keys`.
pub(super) fn tojson(value: Value, arguments: Kwargs) -> Result<Value, Error> {
    let json: Json = serde_json::to_value(&value)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, "the value is no JSON").with_source(error))?;
    let indent: Option<usize> = arguments.get("indent")?;
    let ascii: Option<bool> = arguments.get("ensure_ascii")?;
    let sorted: Option<bool> = arguments.get("sort_keys")?;
    let separators: Option<Vec<String>> = arguments.get("separators")?;
    arguments.assert_all_used()?;
    let default_item = if indent.is_some() { "," } else { ", " };
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        _ => (default_item.to_string(), ": ".to_string()),
    };
    let style = Style {
        indent: indent.map(|i| i.min(64)),
        ascii: ascii.unwrap_or(false),
        sorted: sorted.unwrap_or(false),
        item,
        key,
    };
    let mut out = String::new();
    style.dump(&json, 0, &mut out);
    Ok(Value::from_safe_string(out))
}

struct Style {
    indent: Option<usize>,
    ascii: bool,
    sorted: bool,
    item: String,
    key: String,
}

impl Style {
    fn line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn dump(&self, json: &Json, depth: usize, out: &mut String) {
        match json {
            Json::Array(items) if !items.is_empty() => {
                out.push('[');
                for (i, item) in items.iter().enumerate() {
                    out.push_str(if i > 0 { &self.item } else { "" });
                    self.line(depth + 1, out);
                    self.dump(item, depth + 1, out);
                }
                self.line(depth, out);
                out.push(']');
            }
            Json::Object(fields) if !fields.is_empty() => {
                let mut fields: Vec<_> = fields.iter().collect();
                if self.sorted {
                    fields.sort_by_key(|(key, _)| key.as_str());
                }
                out.push('{');
                for (i, (key, value)) in fields.into_iter().enumerate() {
                    out.push_str(if i > 0 { &self.item } else { "" });
                    self.line(depth + 1, out);
                    self.string(key, out);
                    out.push_str(&self.key);
                    self.dump(value, depth + 1, out);
                }
                self.line(depth, out);
                out.push('}');
            }
            Json::String(text) => self.string(text, out),
            other => out.push_str(&other.to_string()),
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        let quoted = serde_json::to_string(text).unwrap_or_default();
        if !self.ascii {
            out.push_str(&quoted);
            return;
        }
        let mut units = [0; 2];
        for c in quoted.chars() {
            if c.is_ascii() {
                out.push(c);
            } else {
                c.encode_utf16(&mut units).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
            }
        }
    }
}
