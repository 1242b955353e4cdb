//! GGUF, versions 2 and 3, little-endian: the header's reader and a writer.
//!
//! Follows the format's description in ggml's documentation (`docs/gguf.md`).

mod read;
mod value;
mod write;

use std::collections::BTreeMap;
use std::path::PathBuf;

pub use value::Value;
pub use write::{Builder, Source};

/// What a reader accepts.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Metadata entries.
    pub entries: u64,
    /// Tensors.
    pub tensors: u64,
    /// Bytes of one string.
    pub string_bytes: u64,
    /// Elements of one array.
    pub array_elements: u64,
    /// Bytes of the whole header.
    pub header_bytes: u64,
    /// Bytes of a tensor's or key's name.
    pub name_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            entries: 65_536,
            tensors: 65_536,
            string_bytes: 4 << 20,
            array_elements: 4 << 20,
            header_bytes: 256 << 20,
            name_bytes: 65_535,
        }
    }
}

/// How a tensor's numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum TensorType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Q8K,
}

impl TensorType {
    const TABLE: [(TensorType, u32, u64, u64); 14] = [
        (TensorType::F32, 0, 1, 4),
        (TensorType::F16, 1, 1, 2),
        (TensorType::Q4_0, 2, 32, 18),
        (TensorType::Q4_1, 3, 32, 20),
        (TensorType::Q5_0, 6, 32, 22),
        (TensorType::Q5_1, 7, 32, 24),
        (TensorType::Q8_0, 8, 32, 34),
        (TensorType::Q2K, 10, 256, 84),
        (TensorType::Q3K, 11, 256, 110),
        (TensorType::Q4K, 12, 256, 144),
        (TensorType::Q5K, 13, 256, 176),
        (TensorType::Q6K, 14, 256, 210),
        (TensorType::Q8K, 15, 256, 292),
        (TensorType::BF16, 30, 1, 2),
    ];

    /// Finds a type by its number in the file.
    pub fn from_code(code: u32) -> Option<Self> {
        Self::TABLE.iter().find(|row| row.1 == code).map(|row| row.0)
    }

    fn row(self) -> (u32, u64, u64) {
        let row = Self::TABLE.iter().find(|row| row.0 == self);
        row.map_or((0, 1, 4), |row| (row.1, row.2, row.3))
    }

    /// Returns the type's number in the file.
    pub fn code(self) -> u32 {
        self.row().0
    }

    /// Returns how many numbers a block holds.
    pub fn block_elements(self) -> u64 {
        self.row().1
    }

    /// Returns how many bytes a block has.
    pub fn block_bytes(self) -> u64 {
        self.row().2
    }
}

/// One tensor's entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its shape as in the file: innermost dimension first; one to four, none zero.
    pub shape: Vec<u64>,
    /// How it is stored.
    pub kind: TensorType,
    /// Where its data starts, from the file's start.
    pub offset: u64,
    /// How many bytes that is; `offset + bytes` is inside the file.
    pub bytes: u64,
}

/// A checked header.
#[derive(Clone, Debug)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The metadata.
    pub metadata: BTreeMap<String, Value>,
    /// The tensors, in the file's order.
    pub tensors: Vec<Tensor>,
    /// What tensor data is aligned to.
    pub alignment: u64,
    /// Where tensor data starts.
    pub data_offset: u64,
}

/// Why a file is not read.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The system failed.
    #[error("the file {path} can't be read: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file ends inside its header.
    #[error("the file is truncated: it ends inside {0}")]
    Truncated(&'static str),
    /// The first four bytes are others.
    #[error("this is no GGUF file: it does not start with 'GGUF'")]
    Magic,
    /// Written on a big-endian machine, or of another version.
    #[error("GGUF version {0} is not supported; convert the file to version 3, little-endian")]
    Version(u32),
    /// A count or length is over its limit.
    #[error("{what} is {value}, more than the limit of {limit}")]
    Limit {
        /// What was counted.
        what: &'static str,
        /// The count.
        value: u64,
        /// The limit.
        limit: u64,
    },
    /// The header contradicts itself or the format.
    #[error("{0}")]
    Malformed(String),
    /// A metadata entry that is needed is absent or has another type.
    #[error("the metadata '{key}' is {problem}")]
    Metadata {
        /// Which key.
        key: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

impl Header {
    /// Returns an entry.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// Returns a text.
    pub fn str(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// Returns a whole number that is not negative.
    pub fn u64(&self, key: &str) -> Option<u64> {
        self.get(key)?.as_u64()
    }

    /// Returns a whole number that fits 32 bits.
    pub fn u32(&self, key: &str) -> Option<u32> {
        self.u64(key)?.try_into().ok()
    }

    /// Returns a number.
    pub fn f32(&self, key: &str) -> Option<f32> {
        self.get(key)?.as_f32()
    }

    /// Returns a truth value.
    pub fn bool(&self, key: &str) -> Option<bool> {
        self.get(key)?.as_bool()
    }

    /// Returns a list of texts.
    pub fn strings(&self, key: &str) -> Option<&[String]> {
        match self.get(key)? {
            Value::Strings(list) => Some(list),
            _ => None,
        }
    }

    /// Returns a tensor's entry.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }
}

#[cfg(test)]
mod tests;
