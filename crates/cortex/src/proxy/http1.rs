//! Answers of HTTP/1.1 as bytes: the head, and where a body ends. Pure; a worker's stream passes here once and uncopied.

use bytes::{Bytes, BytesMut};
use http::{HeaderName, HeaderValue, Response, StatusCode, Version};
use httparse::Header;

/// Most bytes of a head.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Most headers of a head.
const HEADERS_MAX: usize = 64;
/// Most bytes of a chunk's size line, or of a trailer.
const LINE_BYTES_MAX: usize = 4096;
/// Most trailers; nobody sends any.
const TRAILERS_MAX: usize = 64;

/// What is no answer of HTTP/1.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no answer of HTTP/1.1: {0}")]
pub(crate) struct Malformed(&'static str);

/// Where a body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// After so many bytes more.
    Length(u64),
    /// Before a chunk's size.
    Size,
    /// Inside a chunk, with so many bytes to come.
    Chunk(u64),
    /// Behind a chunk's bytes.
    ChunkEnd,
    /// Behind the last chunk; so many trailers were read.
    Trailers(usize),
    /// With the connection.
    Close,
    /// Here.
    Over,
}

/// What could be taken from the buffer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// Bytes of the body.
    Data(Bytes),
    /// Nothing before more has come.
    Nothing,
    /// The body's end.
    End,
}

/// A request's head on its way out.
#[derive(Debug)]
pub(super) struct RequestHead(Vec<u8>);

impl RequestHead {
    /// Begins the head of a POST.
    pub(super) fn post(path: &str, host: &str) -> Self {
        let mut head = RequestHead(Vec::with_capacity(512));
        for part in ["POST ", path, " HTTP/1.1\r\nhost: ", host, "\r\n"] {
            head.0.extend_from_slice(part.as_bytes());
        }
        head
    }

    /// Adds a field. A value that would end it is not sent.
    pub(super) fn field(self, name: &str, value: &[u8]) -> Self {
        let whole = memchr::memchr3(b'\r', b'\n', 0, value).is_none();
        self.line(name, if whole { value } else { b"-" })
    }

    /// Adds a field that is a number.
    pub(super) fn number(self, name: &str, value: u64) -> Self {
        self.line(name, itoa::Buffer::new().format(value).as_bytes())
    }

    fn line(mut self, name: &str, value: &[u8]) -> Self {
        for part in [name.as_bytes(), b": ", value, b"\r\n"] {
            self.0.extend_from_slice(part);
        }
        self
    }

    /// Ends it, before a body of so many bytes.
    pub(super) fn end(self, length: usize) -> Vec<u8> {
        let mut head = self.number("content-length", length as u64).0;
        head.extend_from_slice(b"\r\n");
        head
    }
}

/// A whole head. Only an answer that is no success keeps its fields.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) response: Response<()>,
    pub(super) framing: Framing,
    /// The connection may be used again after the body's end.
    pub(super) reusable: bool,
}

/// Takes a head off the buffer; `None` before it is whole.
///
/// # Errors
/// [`Malformed`], also for a head over its bounds or with two different ends.
pub(super) fn take_head(buffer: &mut BytesMut) -> Result<Option<Head>, Malformed> {
    if buffer.is_empty() {
        return Ok(None);
    }
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Response::new(&mut headers);
    let length = match parsed.parse(buffer) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if buffer.len() > HEAD_BYTES_MAX => {
            return Err(Malformed("its head is too long"));
        }
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(Malformed("its head does not parse")),
    };
    let mut response = Response::new(());
    let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok());
    *response.status_mut() = status.ok_or(Malformed("its status is none"))?;
    let newer = parsed.version == Some(1);
    *response.version_mut() = if newer { Version::HTTP_11 } else { Version::HTTP_10 };
    let (fields, status) = (&*parsed.headers, response.status());
    // Nobody asks for those of a success.
    for field in fields.iter().filter(|_| !status.is_success()) {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| Malformed("a header's name is none"))?;
        let value = HeaderValue::from_bytes(field.value).map_err(|_| Malformed("a header's value is none"))?;
        response.headers_mut().append(name, value);
    }
    let framing = framing(status, fields)?;
    let reusable = newer && framing != Framing::Close && !says(fields, "connection", "close");
    let _ = buffer.split_to(length);
    Ok(Some(Head { response, framing, reusable }))
}

/// Returns the values of a field.
fn values<'a>(fields: &'a [Header<'a>], name: &'static str) -> impl Iterator<Item = &'a [u8]> {
    fields.iter().filter(move |field| field.name.eq_ignore_ascii_case(name)).map(|field| field.value)
}

/// Whether one of a field's words is this one.
fn says(fields: &[Header<'_>], name: &'static str, word: &str) -> bool {
    values(fields, name)
        .flat_map(|value| value.split(|byte| *byte == b','))
        .any(|said| said.trim_ascii().eq_ignore_ascii_case(word.as_bytes()))
}

fn framing(status: StatusCode, fields: &[Header<'_>]) -> Result<Framing, Malformed> {
    if status.is_informational() || status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED {
        return Ok(Framing::Over);
    }
    let mut lengths = values(fields, "content-length");
    let chunked = values(fields, "transfer-encoding").next().is_some();
    match (lengths.next(), lengths.next()) {
        (None, None) if chunked && says(fields, "transfer-encoding", "chunked") => Ok(Framing::Size),
        (None, None) if chunked => Err(Malformed("its transfer encoding is not chunked")),
        (None, None) => Ok(Framing::Close),
        (Some(length), None) if !chunked => {
            let digits = std::str::from_utf8(length).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
            let length = digits.and_then(|text| text.parse().ok()).ok_or(Malformed("its length is none"))?;
            Ok(if length == 0 { Framing::Over } else { Framing::Length(length) })
        }
        _ => Err(Malformed("it has two ends")),
    }
}

/// Takes a line off the buffer, without its end; `None` before it is whole.
fn take_line(buffer: &mut BytesMut) -> Result<Option<BytesMut>, Malformed> {
    let Some(end) = memchr::memchr(b'\n', &buffer[..buffer.len().min(LINE_BYTES_MAX)]) else {
        return if buffer.len() < LINE_BYTES_MAX { Ok(None) } else { Err(Malformed("a line is too long")) };
    };
    let mut line = buffer.split_to(end + 1);
    match line.strip_suffix(b"\r\n") {
        Some(rest) => line.truncate(rest.len()),
        None => return Err(Malformed("a line has no proper end")),
    }
    Ok(Some(line))
}

/// Reads a chunk's size; what follows a semicolon says nothing to us.
fn chunk_size(line: &[u8]) -> Result<u64, Malformed> {
    let digits = line.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii_end();
    let digits = std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_hexdigit()));
    digits.and_then(|text| u64::from_str_radix(text, 16).ok()).ok_or(Malformed("a chunk's size is none"))
}

impl Framing {
    /// Takes the next bytes of the body, or its end, off the buffer.
    ///
    /// # Errors
    /// [`Malformed`] where a chunk should begin or end and does not.
    pub(super) fn take(&mut self, buffer: &mut BytesMut) -> Result<Taken, Malformed> {
        loop {
            match *self {
                Framing::Over => return Ok(Taken::End),
                _ if buffer.is_empty() => return Ok(Taken::Nothing),
                Framing::Close => return Ok(Taken::Data(buffer.split().freeze())),
                Framing::Length(left) | Framing::Chunk(left) => {
                    let data = buffer.split_to(buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX)));
                    let left = left - data.len() as u64;
                    *self = match (*self, left) {
                        (Framing::Length(_), 0) => Framing::Over,
                        (Framing::Length(_), left) => Framing::Length(left),
                        (_, 0) => Framing::ChunkEnd,
                        (_, left) => Framing::Chunk(left),
                    };
                    return Ok(Taken::Data(data.freeze()));
                }
                Framing::Size => {
                    let Some(line) = take_line(buffer)? else { return Ok(Taken::Nothing) };
                    *self = match chunk_size(&line)? {
                        0 => Framing::Trailers(0),
                        size => Framing::Chunk(size),
                    };
                }
                Framing::ChunkEnd => {
                    let Some(line) = take_line(buffer)? else { return Ok(Taken::Nothing) };
                    if !line.is_empty() {
                        return Err(Malformed("a chunk is longer than its size"));
                    }
                    *self = Framing::Size;
                }
                Framing::Trailers(count) => {
                    let Some(line) = take_line(buffer)? else { return Ok(Taken::Nothing) };
                    *self = match count {
                        _ if line.is_empty() => Framing::Over,
                        TRAILERS_MAX.. => return Err(Malformed("it has too many trailers")),
                        count => Framing::Trailers(count + 1),
                    };
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "http1_tests.rs"]
mod tests;
