//! The reader. Every count is checked against its limit and against what the rest of the file could hold.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::path::Path;

use super::{GgufError, Header, Limits, Tensor, TensorType, Value};

const MAGIC: [u8; 4] = *b"GGUF";
const ALIGNMENT_KEY: &str = "general.alignment";
const ALIGNMENT_DEFAULT: u64 = 32;
const ALIGNMENT_MAX: u64 = 1 << 20;
const DIMENSIONS_MAX: u32 = 4;

struct Reader<'a, R> {
    inner: R,
    read: u64,
    length: u64,
    limits: &'a Limits,
}

impl Header {
    /// Reads and checks a file's header; tensor data is not touched.
    ///
    /// # Errors
    /// [`GgufError`] for everything that is not as the format says.
    pub fn read(path: &Path, limits: &Limits) -> Result<Header, GgufError> {
        let io = |source| GgufError::Io { path: path.into(), source };
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        Header::read_from(BufReader::with_capacity(1 << 20, file), length, limits)
    }

    /// Reads and checks a header from any reader of `length` bytes.
    ///
    /// # Errors
    /// As [`Header::read`].
    pub fn read_from(reader: impl Read, length: u64, limits: &Limits) -> Result<Header, GgufError> {
        Reader { inner: reader, read: 0, length, limits }.header()
    }
}

fn malformed<T>(words: String) -> Result<T, GgufError> {
    Err(GgufError::Malformed(words))
}

fn limit(what: &'static str, value: u64, limit: u64) -> Result<(), GgufError> {
    if value > limit { Err(GgufError::Limit { what, value, limit }) } else { Ok(()) }
}

impl<R: Read> Reader<'_, R> {
    fn fill(&mut self, buffer: &mut [u8], what: &'static str) -> Result<(), GgufError> {
        self.read += buffer.len() as u64;
        limit("the header's size in bytes", self.read, self.limits.header_bytes)?;
        self.inner.read_exact(buffer).map_err(|source| match source.kind() {
            ErrorKind::UnexpectedEof => GgufError::Truncated(what),
            _ => GgufError::Io { path: what.into(), source },
        })
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], GgufError> {
        let mut buffer = [0; N];
        self.fill(&mut buffer, what)?;
        Ok(buffer)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// Refuses a count that the rest of the file can't hold, before anything is reserved for it.
    fn room(&self, what: &'static str, count: u64, bytes_each: u64) -> Result<(), GgufError> {
        let left = self.length.saturating_sub(self.read);
        if count.checked_mul(bytes_each).is_none_or(|bytes| bytes > left) {
            return Err(GgufError::Truncated(what));
        }
        Ok(())
    }

    fn string(&mut self, what: &'static str, most: u64) -> Result<String, GgufError> {
        let length = self.u64(what)?;
        limit(what, length, most)?;
        self.room(what, length, 1)?;
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes, what)?;
        String::from_utf8(bytes).or_else(|_| malformed(format!("{what} is not UTF-8")))
    }

    fn header(mut self) -> Result<Header, GgufError> {
        if self.array::<4>("its first bytes")? != MAGIC {
            return Err(GgufError::Magic);
        }
        let version = self.u32("the version")?;
        if !(2..=3).contains(&version) {
            return Err(GgufError::Version(version));
        }
        let tensors = self.u64("the number of tensors")?;
        limit("the number of tensors", tensors, self.limits.tensors)?;
        let entries = self.u64("the number of metadata entries")?;
        limit("the number of metadata entries", entries, self.limits.entries)?;
        self.room("the metadata", entries, 13)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..entries {
            let key = self.string("a metadata key's length", self.limits.name_bytes)?;
            let kind = self.u32("a metadata type")?;
            let value = self.value(kind)?;
            if metadata.insert(key.clone(), value).is_some() {
                return malformed(format!("the metadata key '{key}' is there twice"));
            }
        }
        let alignment = match metadata.get(ALIGNMENT_KEY) {
            None => ALIGNMENT_DEFAULT,
            Some(value) => value.as_u64().unwrap_or(0),
        };
        if !alignment.is_power_of_two() || alignment > ALIGNMENT_MAX {
            return malformed(format!("the alignment must be a power of two up to {ALIGNMENT_MAX}, it is {alignment}"));
        }
        self.room("the tensor list", tensors, 24)?;
        let listed = (0..tensors).map(|_| self.tensor()).collect::<Result<Vec<_>, _>>()?;
        let data_offset = self.read.next_multiple_of(alignment);
        let tensors = place(listed, alignment, data_offset, self.length)?;
        Ok(Header { version, metadata, tensors, alignment, data_offset })
    }

    fn value(&mut self, kind: u32) -> Result<Value, GgufError> {
        const WHAT: &str = "a metadata value";
        Ok(match kind {
            0 => Value::U8(self.array::<1>(WHAT)?[0]),
            1 => Value::I8(i8::from_le_bytes(self.array(WHAT)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(WHAT)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(WHAT)?)),
            4 => Value::U32(self.u32(WHAT)?),
            5 => Value::I32(i32::from_le_bytes(self.array(WHAT)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(WHAT)?)),
            7 => Value::Bool(self.truth()?),
            8 => Value::String(self.string("a metadata string's length", self.limits.string_bytes)?),
            9 => self.list()?,
            10 => Value::U64(self.u64(WHAT)?),
            11 => Value::I64(i64::from_le_bytes(self.array(WHAT)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(WHAT)?)),
            other => return malformed(format!("metadata type {other} does not exist")),
        })
    }

    fn truth(&mut self) -> Result<bool, GgufError> {
        match self.array::<1>("a metadata value")? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => malformed(format!("a truth value is {other}, not 0 or 1")),
        }
    }

    fn list(&mut self) -> Result<Value, GgufError> {
        let kind = self.u32("an array's type")?;
        let count = self.u64("an array's length")?;
        limit("an array's length", count, self.limits.array_elements)?;
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return malformed("arrays of arrays are not supported".into()),
            other => return malformed(format!("metadata type {other} does not exist")),
        };
        self.room("an array", count, least)?;
        match kind {
            8 => {
                let mut list = Vec::with_capacity(count as usize);
                for _ in 0..count {
                    list.push(self.string("an array's string", self.limits.string_bytes)?);
                }
                Ok(Value::Strings(list))
            }
            6 | 12 => {
                let floats = (0..count).map(|_| Ok(self.value(kind)?.as_f32().unwrap_or(f32::NAN)));
                Ok(Value::Floats(floats.collect::<Result<_, GgufError>>()?))
            }
            _ => {
                let integers = (0..count).map(|_| Ok(integer(&self.value(kind)?)));
                Ok(Value::Integers(integers.collect::<Result<_, GgufError>>()?))
            }
        }
    }

    fn tensor(&mut self) -> Result<Tensor, GgufError> {
        let name = self.string("a tensor's name", self.limits.name_bytes)?;
        let dimensions = self.u32("a tensor's number of dimensions")?;
        if !(1..=DIMENSIONS_MAX).contains(&dimensions) {
            return malformed(format!("tensor '{name}' has {dimensions} dimensions, not 1 to {DIMENSIONS_MAX}"));
        }
        let shape = (0..dimensions).map(|_| self.u64("a tensor's shape")).collect::<Result<Vec<_>, _>>()?;
        let code = self.u32("a tensor's type")?;
        let offset = self.u64("a tensor's offset")?;
        let Some(kind) = TensorType::from_code(code) else {
            return malformed(format!("tensor '{name}' has type {code}, which is not supported"));
        };
        let elements = shape.iter().try_fold(1u64, |product, side| product.checked_mul(*side));
        let Some(elements) = elements.filter(|elements| *elements > 0) else {
            return malformed(format!("tensor '{name}' has an impossible shape {shape:?}"));
        };
        if shape[0] % kind.block_elements() != 0 {
            return malformed(format!("tensor '{name}' has rows of {} numbers, no multiple of a block", shape[0]));
        }
        match (elements / kind.block_elements()).checked_mul(kind.block_bytes()) {
            Some(bytes) => Ok(Tensor { name, shape, kind, offset, bytes }),
            None => malformed(format!("tensor '{name}' has an impossible shape {shape:?}")),
        }
    }
}

fn integer(value: &Value) -> i64 {
    match *value {
        Value::I8(n) => n.into(),
        Value::I16(n) => n.into(),
        Value::I32(n) => n.into(),
        Value::I64(n) => n,
        Value::Bool(truth) => truth.into(),
        ref other => other.as_u64().map_or(0, |n| n as i64),
    }
}

/// Turns offsets into places in the file: aligned, inside it, not overlapping, each name once.
fn place(mut tensors: Vec<Tensor>, alignment: u64, data: u64, length: u64) -> Result<Vec<Tensor>, GgufError> {
    let mut names = BTreeSet::new();
    for tensor in &mut tensors {
        if !names.insert(tensor.name.clone()) {
            return malformed(format!("tensor '{}' is there twice", tensor.name));
        }
        if tensor.offset % alignment != 0 {
            return malformed(format!("tensor '{}' is not aligned to {alignment}", tensor.name));
        }
        let end = data.checked_add(tensor.offset).and_then(|start| start.checked_add(tensor.bytes));
        if end.is_none_or(|end| end > length) {
            return malformed(format!("tensor '{}' reaches past the end of the file", tensor.name));
        }
        tensor.offset += data;
    }
    let mut by_place: Vec<&Tensor> = tensors.iter().collect();
    by_place.sort_by_key(|tensor| tensor.offset);
    for pair in by_place.windows(2) {
        if pair[0].offset + pair[0].bytes > pair[1].offset {
            return malformed(format!("tensors '{}' and '{}' overlap", pair[0].name, pair[1].name));
        }
    }
    Ok(tensors)
}
