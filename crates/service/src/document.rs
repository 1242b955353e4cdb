//! What operators read of a configuration, generated from its types: an example, a schema, a reference.

use std::fmt::Write;

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

/// Returns the JSON schema of a configuration.
pub fn schema<T: JsonSchema>() -> Value {
    schemars::schema_for!(T).to_value()
}

/// One key.
struct Key<'a> {
    path: String,
    text: &'a str,
    kind: String,
    default: Option<&'a Value>,
}

/// How often a table may be there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Once.
    One,
    /// Again and again, in order.
    List,
    /// Once for each name.
    Named,
    /// Once or not at all.
    Maybe,
}

/// One table of keys.
struct Table<'a> {
    path: String,
    text: &'a str,
    form: Form,
    keys: Vec<Key<'a>>,
}

/// Returns what an optional table is, where a schema is one.
fn optional<'a>(root: &'a Value, schema: &'a Value) -> Option<&'a Value> {
    let some = schema["anyOf"].as_array()?.iter().find(|schema| schema["type"] != "null")?;
    Some(resolve(root, some)).filter(|schema| schema["properties"].is_object())
}

fn resolve<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    let named = schema["$ref"].as_str().and_then(|name| name.strip_prefix("#/$defs/"));
    named.map_or(schema, |name| &root["$defs"][name])
}

fn text(schema: &Value) -> &str {
    schema["description"].as_str().unwrap_or_default()
}

fn kind_of(root: &Value, schema: &Value) -> String {
    let schema = resolve(root, schema);
    let variants = schema["oneOf"].as_array().or(schema["enum"].as_array());
    if let Some(variants) = variants {
        let names = variants.iter().filter_map(|variant| variant["const"].as_str().or(variant.as_str()));
        return names.map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(" or ");
    }
    match &schema["type"] {
        Value::String(kind) if kind == "array" => format!("list of {}", kind_of(root, &schema["items"])),
        Value::String(kind) => kind.clone(),
        Value::Array(kinds) => {
            let kinds = kinds.iter().filter_map(Value::as_str).filter(|kind| *kind != "null");
            format!("{}, optional", kinds.collect::<Vec<_>>().join(" or "))
        }
        _ => "value".into(),
    }
}

fn walk<'a>(
    root: &'a Value,
    schema: &'a Value,
    defaults: Option<&'a Value>,
    table: Table<'a>,
    out: &mut Vec<Table<'a>>,
) {
    let mut table = table;
    let mut below = Vec::new();
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let target = resolve(root, property);
        let words = if text(property).is_empty() { text(target) } else { text(property) };
        let path = if table.path.is_empty() { name.clone() } else { format!("{}.{name}", table.path) };
        // Tables that may be absent have no defaults but those of their keys.
        let own = Some(&property["default"]).filter(|default| table.form == Form::Maybe && !default.is_null());
        let default = defaults.and_then(|defaults| defaults.get(name)).or(own);
        let (items, named) = (resolve(root, &target["items"]), resolve(root, &target["additionalProperties"]));
        if let Some(target) = optional(root, property) {
            below.push((target, None, Table { path, text: words, form: Form::Maybe, keys: Vec::new() }));
        } else if target["properties"].is_object() {
            let table = Table { path, text: words, form: Form::One, keys: Vec::new() };
            below.push((target, default, table));
        } else if items["properties"].is_object() {
            below.push((items, None, Table { path, text: words, form: Form::List, keys: Vec::new() }));
        } else if named["properties"].is_object() {
            let path = format!("{path}.NAME");
            below.push((named, None, Table { path, text: words, form: Form::Named, keys: Vec::new() }));
        } else {
            table.keys.push(Key { path: name.clone(), text: words, kind: kind_of(root, property), default });
        }
    }
    out.push(table);
    for (schema, defaults, table) in below {
        walk(root, schema, defaults, table, out);
    }
}

fn tables<'a>(root: &'a Value, defaults: &'a Value) -> Vec<Table<'a>> {
    let mut out = Vec::new();
    walk(
        root,
        root,
        Some(defaults),
        Table { path: String::new(), text: "", form: Form::One, keys: Vec::new() },
        &mut out,
    );
    out.retain(|table| !table.keys.is_empty());
    out
}

fn toml_text(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(format!("{text:?}")),
        other => Some(other.to_string()),
    }
}

fn comment(out: &mut String, words: &str) {
    words.lines().for_each(|line| _ = writeln!(out, "# {line}"));
}

/// Returns a commented example: every key with its meaning, its default commented out.
pub fn example_toml<T: JsonSchema + Serialize + Default>(program: &str) -> String {
    let root = schema::<T>();
    let defaults = serde_json::to_value(T::default()).unwrap_or_default();
    let mut out = format!(
        "# The configuration of {program}. Every key is shown with its default; a key that is left out has it.\n\
         # The environment overrides the file: {}__TABLE__KEY=value.\n",
        program.to_uppercase()
    );
    for table in tables(&root, &defaults) {
        out.push('\n');
        comment(&mut out, table.text);
        match (table.path.as_str(), table.form) {
            ("", _) => {}
            (path, Form::One) => _ = writeln!(out, "[{path}]"),
            (path, Form::List) => _ = writeln!(out, "# [[{path}]]"),
            (path, Form::Named | Form::Maybe) => _ = writeln!(out, "# [{path}]"),
        }
        for key in &table.keys {
            comment(&mut out, key.text);
            let value = key.default.and_then(toml_text);
            match value {
                Some(value) => _ = writeln!(out, "# {} = {value}", key.path),
                None => _ = writeln!(out, "# {} = ({})", key.path, key.kind),
            }
        }
    }
    out
}

/// Returns the reference: one table of keys for each table of the file.
pub fn reference_markdown<T: JsonSchema + Serialize + Default>(program: &str) -> String {
    let root = schema::<T>();
    let defaults = serde_json::to_value(T::default()).unwrap_or_default();
    let mut out = format!("# Configuration of {program}\n\nGenerated from the program; don't edit.\n");
    for table in tables(&root, &defaults) {
        let heading = match (table.path.as_str(), table.form) {
            ("", _) => "Top level".to_string(),
            (path, Form::One | Form::Named | Form::Maybe) => format!("`[{path}]`"),
            (path, Form::List) => format!("`[[{path}]]`"),
        };
        let _ =
            write!(out, "\n## {heading}\n\n{}\n\n| key | type | default | meaning |\n|---|---|---|---|\n", table.text);
        for key in &table.keys {
            let default = key.default.and_then(toml_text).map(|value| format!("`{value}`")).unwrap_or_default();
            let words = key.text.replace('\n', " ").replace('|', "\\|");
            let _ = writeln!(out, "| `{}` | {} | {default} | {words} |", key.path, key.kind.replace('|', "\\|"));
        }
    }
    out
}
