//! The writer: metadata, then tensors whose data is produced while it is written.

use std::io::{self, Write};

use super::{TensorType, Value};

const ALIGNMENT: u64 = 32;

/// Produces a tensor's bytes, exactly as many as its shape and type need.
pub type Source<'a> = Box<dyn FnOnce(&mut dyn Write) -> io::Result<()> + 'a>;

struct Pending<'a> {
    name: String,
    shape: Vec<u64>,
    kind: TensorType,
    bytes: u64,
    source: Source<'a>,
}

/// Collects what a file will hold.
#[derive(Default)]
pub struct Builder<'a> {
    metadata: Vec<(String, Value)>,
    tensors: Vec<Pending<'a>>,
}

/// Counts, so that a source that gives too much or too little is found.
struct Counted<'a, W> {
    inner: &'a mut W,
    written: u64,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.written += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<'a> Builder<'a> {
    /// Makes an empty file.
    pub fn new() -> Self {
        Builder::default()
    }

    /// Adds a metadata entry.
    pub fn add(&mut self, key: impl Into<String>, value: Value) -> &mut Self {
        self.metadata.push((key.into(), value));
        self
    }

    /// Adds a tensor; `shape` has its innermost dimension first.
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        shape: &[u64],
        kind: TensorType,
        source: Source<'a>,
    ) -> &mut Self {
        let bytes = shape.iter().product::<u64>() / kind.block_elements() * kind.block_bytes();
        self.tensors.push(Pending { name: name.into(), shape: shape.to_vec(), kind, bytes, source });
        self
    }

    /// Writes the file.
    ///
    /// # Errors
    /// Those of `out`, and `InvalidData` when a source gave another number of bytes than its shape needs.
    pub fn write_to(self, out: &mut impl Write) -> io::Result<()> {
        let mut head = Vec::new();
        head.extend_from_slice(b"GGUF");
        head.extend_from_slice(&3u32.to_le_bytes());
        head.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        head.extend_from_slice(&(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_string(&mut head, key);
            put_value(&mut head, value);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            put_string(&mut head, &tensor.name);
            head.extend_from_slice(&(tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().for_each(|side| head.extend_from_slice(&side.to_le_bytes()));
            head.extend_from_slice(&tensor.kind.code().to_le_bytes());
            head.extend_from_slice(&offset.to_le_bytes());
            offset = (offset + tensor.bytes).next_multiple_of(ALIGNMENT);
        }
        head.resize(head.len().next_multiple_of(ALIGNMENT as usize), 0);
        out.write_all(&head)?;
        for tensor in self.tensors {
            let mut counted = Counted { inner: out, written: 0 };
            (tensor.source)(&mut counted)?;
            if counted.written != tensor.bytes {
                let words = format!("tensor '{}' gave {} bytes of {}", tensor.name, counted.written, tensor.bytes);
                return Err(io::Error::new(io::ErrorKind::InvalidData, words));
            }
            let padding = tensor.bytes.next_multiple_of(ALIGNMENT) - tensor.bytes;
            out.write_all(&[0; ALIGNMENT as usize][..padding as usize])?;
        }
        out.flush()
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    let mut put = |code: u32, bytes: &[u8]| {
        out.extend_from_slice(&code.to_le_bytes());
        out.extend_from_slice(bytes);
    };
    match value {
        Value::U8(n) => put(0, &n.to_le_bytes()),
        Value::I8(n) => put(1, &n.to_le_bytes()),
        Value::U16(n) => put(2, &n.to_le_bytes()),
        Value::I16(n) => put(3, &n.to_le_bytes()),
        Value::U32(n) => put(4, &n.to_le_bytes()),
        Value::I32(n) => put(5, &n.to_le_bytes()),
        Value::F32(n) => put(6, &n.to_le_bytes()),
        Value::Bool(truth) => put(7, &[u8::from(*truth)]),
        Value::U64(n) => put(10, &n.to_le_bytes()),
        Value::I64(n) => put(11, &n.to_le_bytes()),
        Value::F64(n) => put(12, &n.to_le_bytes()),
        Value::String(text) => {
            put(8, &[]);
            put_string(out, text);
        }
        Value::Strings(list) => {
            put(9, &8u32.to_le_bytes());
            out.extend_from_slice(&(list.len() as u64).to_le_bytes());
            list.iter().for_each(|text| put_string(out, text));
        }
        Value::Floats(list) => {
            put(9, &6u32.to_le_bytes());
            out.extend_from_slice(&(list.len() as u64).to_le_bytes());
            list.iter().for_each(|n| out.extend_from_slice(&n.to_le_bytes()));
        }
        // As 32 bits, which every reader of token types expects.
        Value::Integers(list) => {
            put(9, &5u32.to_le_bytes());
            out.extend_from_slice(&(list.len() as u64).to_le_bytes());
            list.iter().for_each(|n| out.extend_from_slice(&(*n as i32).to_le_bytes()));
        }
    }
}
