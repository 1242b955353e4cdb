//! Constraints on answers: JSON schemas, regular expressions and grammars, compiled to token masks by llguidance.
//!
//! ```text
//! Vocabulary (one a model) + Source -> compile, bounded by Limits -> Compiled (kept in a Cache) -> a matcher a choice
//! ```
//! Sources come from strangers. What can be counted (bytes, depth, properties, repetitions) is counted before the
//! compiler sees it; the rest is bounded by its fuel, in steps and not in time, so that equal sources fare equally.

mod cache;
mod compile;
mod prepare;
mod schema;
mod tools;
mod vocabulary;

use serde_json::Value;

pub use cache::{Cache, Key};
pub use compile::Compiled;
pub use schema::FORMATS;
pub use tools::{Arguments, ToolCall};
pub use vocabulary::Vocabulary;

/// What an answer must be.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema describes.
    JsonSchema {
        /// The schema, draft 4 to 2020-12.
        schema: Value,
        /// Whether a keyword that can't be enforced refuses the schema; otherwise it is left to the model.
        strict: bool,
    },
    /// Text that a regular expression, in Rust's syntax, matches from its beginning to its end.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// Text of a context-free grammar in llguidance's dialect of Lark.
    Lark(String),
    /// Calls of tools, and nothing else.
    Tools {
        /// The tools that may be called; at least one.
        tools: Vec<ToolCall>,
        /// What parts calls; without it there is exactly one.
        between: Option<String>,
    },
    /// Reasoning, which is free, and then what the other source says; not for [`Source::Lark`].
    Reasoned {
        /// What opens the reasoning; without it the prompt has opened it already. An answer may leave out what it
        /// would have to open.
        open: Option<String>,
        /// What closes it.
        close: String,
        /// What comes then.
        then: Box<Source>,
    },
}

/// What a source may be at most.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a source, a schema's as compact JSON.
    pub bytes: usize,
    /// Bytes of one pattern in a schema.
    pub pattern_bytes: usize,
    /// Levels of a schema's JSON below its root.
    pub depth: usize,
    /// Properties of one object in a schema.
    pub properties: usize,
    /// Properties and definitions in a schema, over all its objects.
    pub all_properties: usize,
    /// Values in a schema's enums, over all of them, or texts of a choice.
    pub enum_values: usize,
    /// Alternatives in a schema, over all its `anyOf`, `oneOf` and `allOf`.
    pub alternatives: usize,
    /// The product of all different `multipleOf` of a schema, their decimal points left out: an automaton's states.
    pub multiple: u64,
    /// A repetition in a schema or pattern: lengths, items, properties, `{n}`.
    pub repetition: u64,
    /// Nodes that a grammar may have.
    pub grammar_size: usize,
    /// Steps that building the lexer may take; about 50 a microsecond.
    pub lexer_fuel: u64,
    /// Steps that the lexer may take for one mask; about 14 a microsecond.
    pub mask_fuel: u64,
    /// Items that the parser may make for one mask; about 20 a microsecond.
    pub mask_items: usize,
    /// States that a lexer may have; up to 2 kB each.
    pub lexer_states: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            bytes: 128 << 10,
            pattern_bytes: 2048,
            depth: 64,
            properties: 1_000,
            all_properties: 2_000,
            enum_values: 5_000,
            alternatives: 1_000,
            multiple: 100_000,
            repetition: 10_000,
            grammar_size: 200_000,
            lexer_fuel: 1_000_000,
            mask_fuel: 100_000,
            mask_items: 50_000,
            lexer_states: 25_000,
        }
    }
}
