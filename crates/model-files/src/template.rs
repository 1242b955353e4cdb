//! Chat templates: Jinja2 as Hugging Face renders it, on minijinja, with bounds.

mod arguments;
mod python;

use std::io::{self, Write};

use minijinja::{Environment, Error as JinjaError, ErrorKind, UndefinedBehavior, Value};
use serde_json::{Map, Value as Json};

use arguments::Arguments;

/// What a template may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of the template.
    pub source_bytes: usize,
    /// Names, numbers and signs in one tag: how deep its expression can be, and so how much of the stack it can take.
    pub tag_tokens: usize,
    /// Steps of a rendering, and so its time: about a second for the default, of which thousands of messages take a part.
    pub fuel: u64,
    /// Depth of calls and includes.
    pub recursion: usize,
    /// Bytes of a rendering.
    pub output_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        // The longest tag of a published template has 58.
        Limits { source_bytes: 1 << 20, tag_tokens: 1000, fuel: 4_000_000, recursion: 200, output_bytes: 16 << 20 }
    }
}

/// Why a template gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// It does not parse, or is over its limit.
    #[error("the chat template is unusable: {0}")]
    Source(String),
    /// There is none.
    #[error("the model has no chat template; it was not made for chats")]
    Absent,
    /// It refused the messages by `raise_exception`.
    #[error("the chat template refuses these messages: {0}")]
    Raised(String),
    /// It failed, or went over a bound.
    #[error("the chat template failed: {0}")]
    Render(String),
}

/// A compiled template; rendering is pure.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    limits: Limits,
    arguments: Arguments,
}

const NAME: &str = "chat";

/// No template has so many lines, or so long ones.
const LINE_MAX: usize = 60_000;

/// The cause of `raise_exception`'s error, by which it is told from all others, however deep in macros it was raised.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raised(error: &JinjaError) -> Option<String> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        cause = error.source();
    }
    None
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// `Source` when it does not parse or is too long.
    pub fn new(source: &str, limits: Limits) -> Result<Self, TemplateError> {
        if source.len() > limits.source_bytes {
            let words = format!("it has {} bytes, more than {}", source.len(), limits.source_bytes);
            return Err(TemplateError::Source(words));
        }
        // The lexer counts lines, and characters of a line, in sixteen bits.
        let lines = source.split('\n');
        if lines.clone().any(|line| line.len() >= LINE_MAX) || lines.count() >= LINE_MAX {
            return Err(TemplateError::Source(format!("it has {LINE_MAX} lines or more, or bytes in one line")));
        }
        let tokens = longest_tag(source.as_bytes());
        if tokens > limits.tag_tokens {
            let words = format!("one of its tags has {tokens} names and signs, more than {}", limits.tag_tokens);
            return Err(TemplateError::Source(words));
        }
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(limits.fuel));
        environment.set_recursion_limit(limits.recursion);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(python::format);
        environment.add_filter("tojson", python::tojson);
        environment.add_filter("length", python::length);
        environment.add_filter("count", python::length);
        environment.add_filter("string", |value: Value| python::text(&value));
        environment.add_test("iterable", python::iterable);
        environment.add_function("raise_exception", |message: String| -> Result<Value, JinjaError> {
            Err(JinjaError::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message)))
        });
        let compiled = environment.add_template_owned(NAME, source.to_string());
        compiled.map_err(|error| TemplateError::Source(format!("{error:#}")))?;
        let mut template =
            ChatTemplate { environment, source: source.to_string(), limits, arguments: Arguments::default() };
        template.arguments = Arguments::wanted_by(&template);
        Ok(template)
    }

    /// Returns a message with the arguments of its calls in the form that this template prints well.
    pub fn fit_arguments(&self, message: &Json) -> Json {
        self.arguments.fit(message)
    }

    /// Returns the template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders with `context` (messages, tools, add_generation_prompt, bos_token, ...). `now` is what
    /// `strftime_now` sees, in Unix seconds, as UTC, so that every worker renders the same.
    ///
    /// # Errors
    /// `Raised` when the template refuses, `Render` when it fails or goes over a bound.
    pub fn render(&self, context: &Map<String, Json>, now: i64) -> Result<String, TemplateError> {
        let failed = |error: JinjaError| match raised(&error) {
            Some(message) => TemplateError::Raised(message),
            None => TemplateError::Render(error.to_string()),
        };
        let template = self.environment.get_template(NAME).map_err(failed)?;
        let clock = Value::from_function(move |format: String| strftime(now, &format));
        let fields = context.iter().map(|(key, value)| (key.clone(), Value::from_serialize(value)));
        let context: Value = fields.chain([("strftime_now".to_string(), clock)]).collect();
        let mut out = Bounded { bytes: Vec::new(), limit: self.limits.output_bytes };
        template.render_captured_to(context, &mut out).map_err(failed)?;
        String::from_utf8(out.bytes).map_err(|error| TemplateError::Render(error.to_string()))
    }
}

/// Returns how many names, numbers and signs the longest tag has; text in quotes is one. A tag ends where its brackets
/// do, as the lexer sees it; one without an end goes on to the template's.
fn longest_tag(source: &[u8]) -> usize {
    let (mut at, mut longest) = (0, 0);
    while at < source.len() {
        match source.get(at..at + 2) {
            Some(b"{{" | b"{%") => {
                let (tokens, end) = tag(source, at + 2);
                longest = longest.max(tokens);
                at = end;
            }
            Some(b"{#") => {
                let end = source[at..].windows(2).position(|pair| pair == b"#}");
                at = end.map_or(source.len(), |end| at + end + 2);
            }
            _ => at += 1,
        }
    }
    longest
}

/// Counts a tag's tokens; returns also where it ends.
fn tag(source: &[u8], mut at: usize) -> (usize, usize) {
    let (mut tokens, mut open) = (0, 0usize);
    let word = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_' || !byte.is_ascii();
    while let Some(byte) = source.get(at) {
        tokens += 1;
        at += 1;
        match byte {
            b'}' | b'%' if open == 0 && source.get(at) == Some(&b'}') => return (tokens, at + 1),
            b'(' | b'[' | b'{' => open += 1,
            b')' | b']' | b'}' => open = open.saturating_sub(1),
            b'\'' | b'"' => {
                while source.get(at).is_some_and(|inner| inner != byte) {
                    at += if source[at] == b'\\' { 2 } else { 1 };
                }
                at += 1;
            }
            byte if byte.is_ascii_whitespace() => tokens -= 1,
            byte if word(byte) => at += source[at..].iter().take_while(|&byte| word(byte)).count(),
            _ => {}
        }
    }
    (tokens, source.len())
}

fn strftime(now: i64, format: &str) -> Result<String, JinjaError> {
    let wrong = |error: jiff::Error| JinjaError::new(ErrorKind::InvalidOperation, error.to_string());
    let time = jiff::Timestamp::from_second(now).map_err(wrong)?.to_zoned(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(format, &time).map_err(wrong)
}

/// Refuses to grow past its limit.
struct Bounded {
    bytes: Vec<u8>,
    limit: usize,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit {
            return Err(io::Error::other("the rendering is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod tests;
