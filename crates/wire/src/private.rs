//! What the two programs say to each other inside HTTP: private headers, a private body field, private lines.
//!
//! A private line is a comment of the event stream that starts with `:cx `, before the event's own lines:
//!
//! | line | means |
//! |---|---|
//! | `:cx m {json}` | [`Meta`]: what the worker made of the request, once, as it begins to run it |
//! | `:cx p {text}` | progress while queued, loading or prefilling, each second |
//! | `:cx t A C I ids F R` | tokens: attempt, choice, index of the first id, ids by comma, finish (see [`Finish`]; `-`: none), tokens of the choice's reasoning so far |
//! | `:cx u P C H R` | usage: prompt tokens, completion tokens, prompt tokens found in the cache, tokens of reasoning |
//! | `:cx w N` | something of the answer that nobody else can go on from, N tokens of it, as far as they are counted |
//! | `:cx + ` | this event and the next one are one: neither counts without the other |
//! | `:cx h ` | the worker is leaving; whoever knows another one may take the stream there |
//! | `:cx r {json}` | [`Refusal`]: this worker will not go on; the stream ends here |
//!
//! The gateway strips them by slicing. None ever reaches a client, and none is taken from one.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use words::{Code, Error, Fingerprint};

use crate::completion::Usage;

/// Every private header's name starts so; from clients they are removed.
pub const HEADER_PREFIX: &str = "x-cortex-";
/// The attempt's number, from 1; its presence asks for private lines.
pub const ATTEMPT_HEADER: &str = "x-cortex-attempt";
/// Which gateway asks, so that its attempts end when its session does.
pub const GATEWAY_HEADER: &str = "x-cortex-gateway";
/// Names the rollout whose coordinator asks its canary; a held worker answers nothing else.
pub const CANARY_HEADER: &str = "x-cortex-canary";
/// Fixes the seed of a request that has none of its own.
pub const SEED_HEADER: &str = "x-cortex-seed";
/// Fixes the completion's id.
pub const COMPLETION_ID_HEADER: &str = "x-cortex-completion-id";
/// Fixes `created`, and the time that the chat template sees: Unix seconds.
pub const CREATED_HEADER: &str = "x-cortex-created";
/// Carries an error's code from a worker.
pub const ERROR_HEADER: &str = "x-cortex-error";
/// Names the request in both programs' logs; public, and made where absent.
pub const REQUEST_ID_HEADER: &str = "x-request-id";
/// The body field of a resume.
pub const RESUME_FIELD: &str = "cortex_resume";
/// How every private line starts.
pub const LINE_PREFIX: &[u8] = b":cx ";
/// Most ids a resume may carry, over all choices.
pub const RESUME_IDS_MAX: usize = 1 << 20;

/// What the first attempt made of the request; a later one must agree.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// BLAKE3 over the prompt's token ids, little-endian.
    pub prompt_hash: Fingerprint,
    /// How many ids those are.
    pub prompt_tokens: u32,
    /// Sampling as resolved.
    pub sampling: ResolvedSampling,
    /// Who may continue.
    pub continue_fingerprint: Fingerprint,
    /// Who gives equal bytes.
    pub exact_fingerprint: Fingerprint,
    /// Tokens of the prompt that the first attempt found in its cache: what the usage says of them.
    #[serde(default)]
    pub cached: u32,
}

/// Sampling after request, model defaults and fallback were folded.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ResolvedSampling {
    pub temperature: f32,
    pub top_p: f32,
    pub top_k: u32,
    pub min_p: f32,
    pub seed: u64,
    pub max_tokens: u32,
    #[serde(default)]
    pub presence: f32,
    #[serde(default)]
    pub frequency: f32,
    #[serde(default = "one")]
    pub repetition: f32,
    #[serde(default)]
    pub min_tokens: u32,
}

fn one() -> f32 {
    1.0
}

/// The resume: what earlier attempts had, per choice, and what the first one said of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Resume {
    /// One entry a choice.
    pub choices: Vec<ResumeChoice>,
    /// The first attempt's meta.
    pub meta: Meta,
}

/// One choice of a resume.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ResumeChoice {
    /// Ids that the gateway accepted, from index 0.
    pub ids: Vec<u32>,
}

impl Resume {
    /// Reads the private body field.
    ///
    /// # Errors
    /// `InvalidRequest` when it has another shape or too many ids.
    pub fn from_value(value: Value) -> Result<Self, Error> {
        let resume: Resume =
            serde_json::from_value(value).map_err(|error| Error::invalid(RESUME_FIELD, error.to_string()))?;
        let ids: usize = resume.choices.iter().map(|choice| choice.ids.len()).sum();
        if ids > RESUME_IDS_MAX || resume.choices.is_empty() {
            return Err(Error::invalid(
                RESUME_FIELD,
                format!("a resume has 1 choice or more and {RESUME_IDS_MAX} ids at most"),
            ));
        }
        Ok(resume)
    }

    /// Puts the resume into the client's body by one splice after the opening brace.
    ///
    /// # Errors
    /// `Internal` when the body is no JSON object, which the gateway has checked before.
    pub fn splice(&self, body: &[u8]) -> Result<Bytes, Error> {
        let open = body.iter().position(|byte| *byte == b'{');
        let open = open.ok_or_else(|| Error::internal("a body without an opening brace was to be resumed"))?;
        let field = serde_json::to_vec(self).map_err(Error::internal)?;
        let rest = &body[open + 1..];
        let empty = rest.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'}');
        let mut out = Vec::with_capacity(body.len() + field.len() + RESUME_FIELD.len() + 4);
        out.extend_from_slice(b"{\"");
        out.extend_from_slice(RESUME_FIELD.as_bytes());
        out.extend_from_slice(b"\":");
        out.extend_from_slice(&field);
        out.extend_from_slice(if empty { b"" } else { b"," });
        out.extend_from_slice(rest);
        Ok(out.into())
    }
}

/// A refusal inside a stream that has begun on the wire but not for the client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The error's code.
    pub code: String,
    /// Its public message.
    pub message: String,
    /// The field at fault.
    #[serde(default)]
    pub param: Option<String>,
}

impl From<&Error> for Refusal {
    fn from(error: &Error) -> Self {
        let param = error.param().map(str::to_string);
        Refusal { code: error.code().row().code.to_string(), message: error.message().to_string(), param }
    }
}

impl From<Refusal> for Error {
    /// A code of a newer version is read as a failed worker that is never retried.
    fn from(refusal: Refusal) -> Self {
        let code = Code::from_text(&refusal.code).unwrap_or(Code::Internal);
        let error = Error::new(code, refusal.message);
        match refusal.param {
            Some(param) => error.at(param),
            None => error,
        }
    }
}

/// A [`Meta`] as it stands in its line. A gateway needs to know what it says only where an attempt fails or leaves, so it
/// keeps the text, and reads it then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaText(Box<str>);

impl MetaText {
    /// Reads it; `None` when it is no meta.
    pub fn read(&self) -> Option<Meta> {
        serde_json::from_str(&self.0).ok()
    }
}

impl From<&Meta> for MetaText {
    fn from(meta: &Meta) -> Self {
        MetaText(serde_json::to_string(meta).unwrap_or_default().into())
    }
}

/// The finish that a token line carries: `stop`, `length` or `tool_calls`.
pub type Finish = Option<&'static str>;

/// One private line.
#[derive(Clone, Debug, PartialEq)]
pub enum Line {
    /// `m`
    Meta(MetaText),
    /// `p`
    Progress(String),
    /// `t`
    Tokens {
        /// The attempt that says so.
        attempt: u32,
        /// The choice.
        choice: u32,
        /// The index of the first id.
        index: u32,
        /// The ids.
        ids: Vec<u32>,
        /// How the last id ended the choice, if it did.
        finish: Finish,
        /// How many of the choice's tokens so far were reasoning.
        reasoning: u32,
    },
    /// `u`
    Usage(Usage),
    /// `w`
    Words(u32),
    /// `+`
    More,
    /// `h`
    Offer,
    /// `r`
    Refusal(Refusal),
}

impl Line {
    /// Appends the line, line feed included.
    pub fn write(&self, out: &mut Vec<u8>) {
        let text = match self {
            Line::Meta(meta) => format!("m {}", meta.0),
            Line::Progress(text) => format!("p {}", text.replace(['\r', '\n'], " ")),
            Line::Tokens { attempt, choice, index, ids, finish, reasoning } => {
                let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
                format!("t {attempt} {choice} {index} {} {} {reasoning}", ids.join(","), finish.unwrap_or("-"))
            }
            Line::Usage(Usage { prompt, completion, cached, reasoning }) => {
                format!("u {prompt} {completion} {cached} {reasoning}")
            }
            Line::Words(tokens) => format!("w {tokens}"),
            Line::More => "+ ".to_string(),
            Line::Offer => "h ".to_string(),
            Line::Refusal(refusal) => format!("r {}", serde_json::to_string(refusal).unwrap_or_default()),
        };
        out.extend_from_slice(LINE_PREFIX);
        out.extend_from_slice(text.as_bytes());
        out.push(b'\n');
    }

    /// Makes an event of this line alone.
    pub fn event(&self) -> Bytes {
        let mut out = Vec::with_capacity(64);
        self.write(&mut out);
        out.push(b'\n');
        out.into()
    }

    /// Reads a line without its prefix and line feed; `None` for one that a newer version speaks.
    pub fn parse(text: &[u8]) -> Option<Line> {
        let (kind, rest) = text.split_at_checked(2)?;
        let text = || std::str::from_utf8(rest).ok();
        match kind {
            b"m " => Some(Line::Meta(MetaText(text()?.into()))),
            b"+ " => Some(Line::More),
            b"h " => Some(Line::Offer),
            b"p " => Some(Line::Progress(text()?.to_string())),
            b"r " => serde_json::from_slice(rest).ok().map(Line::Refusal),
            b"w " => number(rest).map(Line::Words),
            b"u " => {
                let mut words = rest.split(|byte| *byte == b' ');
                let mut next = || number(words.next()?);
                let (prompt, completion) = (next()?, next()?);
                // An older worker says less.
                let (cached, reasoning) = (next().unwrap_or(0), next().unwrap_or(0));
                Some(Line::Usage(Usage { prompt, completion, cached, reasoning }))
            }
            b"t " => {
                let mut words = rest.split(|byte| *byte == b' ');
                let mut next = || number(words.next()?);
                let (attempt, choice, index) = (next()?, next()?, next()?);
                let ids = numbers(words.next()?)?;
                let finish = match words.next()? {
                    b"-" => None,
                    b"stop" => Some("stop"),
                    b"length" => Some("length"),
                    b"tool_calls" => Some("tool_calls"),
                    _ => return None,
                };
                let reasoning = words.next().and_then(number).unwrap_or(0);
                Some(Line::Tokens { attempt, choice, index, ids, finish, reasoning })
            }
            _ => None,
        }
    }
}

/// Reads a whole decimal number.
fn number(text: &[u8]) -> Option<u32> {
    match numbers_of(text, |_| {})? {
        (0, last) => Some(last),
        _ => None,
    }
}

/// Reads numbers with commas between them.
fn numbers(text: &[u8]) -> Option<Vec<u32>> {
    // Most are of four digits or more.
    let mut numbers = Vec::with_capacity(text.len() / 4 + 1);
    let (_, last) = numbers_of(text, |number| numbers.push(number))?;
    numbers.push(last);
    Some(numbers)
}

/// Reads numbers with commas between them in one walk; returns how many stand before the last one, and that.
fn numbers_of(text: &[u8], mut before: impl FnMut(u32)) -> Option<(usize, u32)> {
    let (mut count, mut value, mut begun) = (0, 0u64, false);
    for byte in text {
        match byte {
            b'0'..=b'9' => {
                value = value * 10 + u64::from(byte - b'0');
                begun = true;
                if value > u64::from(u32::MAX) {
                    return None;
                }
            }
            b',' if begun => {
                before(value as u32);
                (count, value, begun) = (count + 1, 0, false);
            }
            _ => return None,
        }
    }
    begun.then_some((count, value as u32))
}

/// Takes the private lines off the front of an event; what stays is the client's, empty when nothing was.
///
/// Lines that don't parse are dropped too: a client must never see one.
pub fn strip(event: &Bytes, lines: &mut Vec<Line>) -> Bytes {
    let mut at = 0;
    while event[at..].starts_with(LINE_PREFIX) {
        let start = at + LINE_PREFIX.len();
        let length = memchr::memchr(b'\n', &event[start..]).unwrap_or(event.len() - start);
        lines.extend(Line::parse(&event[start..start + length]));
        at = (start + length + 1).min(event.len());
    }
    if at > 0 && event[at..].iter().all(|byte| matches!(byte, b'\n' | b'\r')) {
        return Bytes::new();
    }
    event.slice(at..)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn meta() -> Meta {
        Meta {
            prompt_hash: Fingerprint([1; 32]),
            prompt_tokens: 3,
            sampling: ResolvedSampling {
                temperature: 0.7,
                top_p: 1.0,
                top_k: 0,
                min_p: 0.0,
                seed: 9,
                max_tokens: 5,
                presence: 0.5,
                frequency: -1.0,
                repetition: 1.1,
                min_tokens: 2,
            },
            continue_fingerprint: Fingerprint([2; 32]),
            exact_fingerprint: Fingerprint([3; 32]),
            cached: 2,
        }
    }

    #[test]
    fn every_line_survives_its_text_and_is_stripped_by_slicing() {
        let lines = vec![
            Line::Meta(MetaText::from(&meta())),
            Line::Progress("queued 3".into()),
            Line::Tokens { attempt: 2, choice: 1, index: 17, ids: vec![5, 600], finish: None, reasoning: 3 },
            Line::Tokens { attempt: 2, choice: 0, index: 1, ids: vec![7], finish: Some("tool_calls"), reasoning: 0 },
            Line::Words(3),
            Line::More,
            Line::Offer,
            Line::Usage(Usage { prompt: 4, completion: 9, cached: 3, reasoning: 2 }),
            Line::Refusal(Refusal { code: "draining".into(), message: "bye\nnow".into(), param: None }),
        ];
        let mut event = Vec::new();
        lines.iter().for_each(|line| line.write(&mut event));
        event.extend_from_slice(b"data: {}\n\n");
        let mut read = Vec::new();
        assert_eq!(strip(&event.into(), &mut read), "data: {}\n\n");
        assert_eq!(read, lines);
    }

    #[test]
    fn a_meta_is_read_from_its_line_when_it_is_asked() {
        let Some(Line::Meta(text)) = Line::parse(&[b"m ", serde_json::to_vec(&meta()).unwrap().as_slice()].concat())
        else {
            panic!("no meta");
        };
        assert_eq!(text.read(), Some(meta()));
        let Some(Line::Meta(nonsense)) = Line::parse(b"m {}") else { panic!("no meta") };
        assert_eq!(nonsense.read(), None);
    }

    #[test]
    fn what_is_no_line_is_none() {
        for text in [
            "",
            "t",
            "t ",
            "t 1",
            "t 1 0 0  - 0",
            "t 1 0 0 5, - 0",
            "t 1 0 0 ,5 - 0",
            "t 1,2 0 0 5 - 0",
            "t 1 0 0 4294967296 - 0",
            "t 1 0 0 5 soon 0",
            "t -1 0 0 5 - 0",
            "t 1 0 +0 5 - 0",
            "u 1",
            "u x 1",
            "x 1",
            "m",
        ] {
            assert_eq!(Line::parse(text.as_bytes()), None, "{text:?}");
        }
        let most = Line::Tokens { attempt: 1, choice: 0, index: 0, ids: vec![u32::MAX], finish: None, reasoning: 0 };
        assert_eq!(Line::parse(b"t 1 0 0 4294967295 -"), Some(most), "an older worker says less");
    }

    #[test]
    fn a_private_line_alone_leaves_nothing_and_an_unknown_one_is_never_shown() {
        let mut lines = Vec::new();
        assert!(strip(&Line::Progress("x".into()).event(), &mut lines).is_empty());
        assert_eq!(strip(&Bytes::from_static(b":cx z future\ndata: 1\n\n"), &mut lines), "data: 1\n\n");
        assert_eq!(strip(&Bytes::from_static(b": keep-alive\n\n"), &mut lines), ": keep-alive\n\n");
        assert_eq!(lines.len(), 1);
    }

    #[test]
    fn a_resume_is_one_splice_and_reads_back() {
        let resume = Resume { choices: vec![ResumeChoice { ids: vec![1, 2] }], meta: meta() };
        for body in [&b"{ }"[..], b" {\"model\":\"m\"}"] {
            let spliced = resume.splice(body).unwrap();
            let mut value: Value = serde_json::from_slice(&spliced).unwrap();
            let field = value.as_object_mut().unwrap().remove(RESUME_FIELD).unwrap();
            assert_eq!(Resume::from_value(field).unwrap(), resume);
            assert_eq!(value, serde_json::from_slice::<Value>(body).unwrap());
        }
    }
}
