//! Why a model can't be loaded.

use std::path::PathBuf;

/// Why a model can't be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Another architecture.
    #[error("the architecture '{0}' is not supported; supported are: qwen3, llama")]
    Architecture(String),
    /// A setting that is absent, or that this engine does not do.
    #[error("the metadata '{key}' {problem}")]
    Metadata {
        /// Which one.
        key: String,
        /// What is wrong.
        problem: String,
    },
    /// A tensor that is absent, or has another shape or type.
    #[error("the tensor '{name}' {problem}")]
    Tensor {
        /// Which one.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// The file can't be read.
    #[error("{path} can't be read: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A setting is outside its limits.
    #[error("{0}")]
    Options(String),
    /// The device is not there.
    #[error("{0}")]
    Device(String),
    /// Not one block of KV fits.
    #[error("one KV block needs {needed} bytes, and {given} are given to all; raise kv_cache_mib")]
    Memory {
        /// Bytes of one block.
        needed: usize,
        /// Bytes of all.
        given: usize,
    },
    /// Nobody wants it any more.
    #[error("the load was cancelled")]
    Cancelled,
    /// candle failed.
    #[error("candle: {0}")]
    Candle(#[from] candle_core::Error),
}
