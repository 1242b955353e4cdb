//! Reading weights: exactly the ranges that the checked header gives, in the shapes that the decoder expects.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::quantized::{GgmlDType, QMatMul, QTensor, ggml_file::qtensor_from_ggml};
use candle_core::{Device, Module, Result as CandleResult, Tensor};
use model_files::gguf::{Header, TensorType};

use crate::LoadProgress;
use crate::error::LoadError;

pub(crate) fn dtype(kind: TensorType) -> Option<GgmlDType> {
    Some(match kind {
        TensorType::F32 => GgmlDType::F32,
        TensorType::F16 => GgmlDType::F16,
        TensorType::BF16 => GgmlDType::BF16,
        TensorType::Q4_0 => GgmlDType::Q4_0,
        TensorType::Q4_1 => GgmlDType::Q4_1,
        TensorType::Q5_0 => GgmlDType::Q5_0,
        TensorType::Q5_1 => GgmlDType::Q5_1,
        TensorType::Q8_0 => GgmlDType::Q8_0,
        TensorType::Q2K => GgmlDType::Q2K,
        TensorType::Q3K => GgmlDType::Q3K,
        TensorType::Q4K => GgmlDType::Q4K,
        TensorType::Q5K => GgmlDType::Q5K,
        TensorType::Q6K => GgmlDType::Q6K,
        TensorType::Q8K => return None,
    })
}

/// Reads tensors by name.
pub(crate) struct Loader<'a> {
    header: &'a Header,
    file: File,
    path: PathBuf,
    device: Device,
    progress: &'a mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    done: u64,
    all: u64,
    used: BTreeSet<&'a str>,
}

struct Raw {
    bytes: Vec<u8>,
    dtype: GgmlDType,
    /// Outermost dimension first.
    shape: Vec<usize>,
}

impl<'a> Loader<'a> {
    pub(crate) fn open(
        path: &Path,
        header: &'a Header,
        device: Device,
        progress: &'a mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<Self, LoadError> {
        let file = File::open(path).map_err(|source| LoadError::Io { path: path.into(), source })?;
        let all = header.tensors.iter().map(|tensor| tensor.bytes).sum();
        Ok(Loader { header, file, path: path.into(), device, progress, done: 0, all, used: BTreeSet::new() })
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.header.tensor(name).is_some()
    }

    /// Refuses a file with a tensor that nothing read: the model would run without it, and answer wrongly.
    pub(crate) fn finish(&self) -> Result<(), LoadError> {
        match self.header.tensors.iter().find(|tensor| !self.used.contains(tensor.name.as_str())) {
            Some(left) => {
                let problem = "is not part of the supported architecture, or of a layer past the last".into();
                Err(LoadError::Tensor { name: left.name.clone(), problem })
            }
            None => Ok(()),
        }
    }

    /// Refuses biases of queries, keys and values: no supported architecture has them.
    pub(crate) fn refuse_biases(&self, layer: usize) -> Result<(), LoadError> {
        for part in ["attn_q", "attn_k", "attn_v"] {
            let name = format!("blk.{layer}.{part}.bias");
            if self.has(&name) {
                return Err(LoadError::Tensor { name, problem: "is a bias, which is not supported".into() });
            }
        }
        Ok(())
    }

    /// Finds a tensor of the wanted shape, 0 standing for any number, and goes to its bytes in the file. Returns its
    /// type, its shape with the outermost dimension first, and its size in bytes.
    pub(crate) fn find(&mut self, name: &str, wanted: &[usize]) -> Result<(TensorType, Vec<usize>, u64), LoadError> {
        let wrong = |problem: String| LoadError::Tensor { name: name.into(), problem };
        let tensor = self.header.tensor(name).ok_or_else(|| wrong("is absent".into()))?;
        let shape: Vec<usize> = tensor.shape.iter().rev().map(|side| *side as usize).collect();
        let fits = shape.len() == wanted.len() && shape.iter().zip(wanted).all(|(a, b)| *b == 0 || a == b);
        if !fits {
            return Err(wrong(format!("has the shape {shape:?}, not {wanted:?}")));
        }
        self.file.seek(SeekFrom::Start(tensor.offset)).map_err(|source| self.io(source))?;
        Ok((tensor.kind, shape, tensor.bytes))
    }

    fn io(&self, source: std::io::Error) -> LoadError {
        LoadError::Io { path: self.path.clone(), source }
    }

    /// Reads the next bytes of the tensor that was found.
    pub(crate) fn read_next(&mut self, bytes: &mut [u8]) -> Result<(), LoadError> {
        self.file.read_exact(bytes).map_err(|source| self.io(source))
    }

    /// Tells the progress that a tensor is there.
    pub(crate) fn told(&mut self, name: &str, bytes: u64) -> Result<(), LoadError> {
        self.done += bytes;
        if let Some(tensor) = self.header.tensor(name) {
            self.used.insert(&tensor.name);
        }
        match (self.progress)(LoadProgress { bytes_done: self.done, bytes: self.all }) {
            ControlFlow::Break(()) => Err(LoadError::Cancelled),
            ControlFlow::Continue(()) => Ok(()),
        }
    }

    fn raw(&mut self, name: &str, wanted: &[usize]) -> Result<Raw, LoadError> {
        let (kind, shape, size) = self.find(name, wanted)?;
        let unsupported = || format!("has the type {kind:?}, which is not supported");
        let dtype = dtype(kind).ok_or_else(|| LoadError::Tensor { name: name.into(), problem: unsupported() })?;
        let mut bytes = vec![0; size as usize];
        self.read_next(&mut bytes)?;
        self.told(name, size)?;
        Ok(Raw { bytes, dtype, shape })
    }

    /// Reads a vector as f32.
    pub(crate) fn vector(&mut self, name: &str, length: usize) -> Result<Tensor, LoadError> {
        let raw = self.raw(name, &[length])?;
        let tensor = qtensor_from_ggml(raw.dtype, &raw.bytes, raw.shape, &self.device)?;
        Ok(tensor.dequantize(&self.device)?)
    }

    /// Reads a matrix to multiply with: `[outputs, inputs]`; 0 stands for any number.
    pub(crate) fn matrix(&mut self, name: &str, outputs: usize, inputs: usize) -> Result<Matrix, LoadError> {
        let raw = self.raw(name, &[outputs, inputs])?;
        let tensor = qtensor_from_ggml(raw.dtype, &raw.bytes, raw.shape, &self.device)?;
        Ok(Matrix(QMatMul::from_qtensor(tensor)?))
    }

    /// Reads the token embedding, and makes of the same bytes the matrix of a tied output.
    pub(crate) fn embedding(&mut self, name: &str, hidden: usize) -> Result<Embedding, LoadError> {
        let Raw { bytes, dtype, shape } = self.raw(name, &[0, hidden])?;
        let row_bytes = bytes.len() / shape[0];
        Ok(Embedding { bytes, dtype, row_bytes, rows: shape[0], hidden, device: self.device.clone() })
    }
}

/// A weight matrix. candle multiplies quantised ones as they are, with activations quantised by rows; F32, F16
/// and BF16 ones are widened to f32, so that products of f16 weights are exact.
#[derive(Debug)]
pub(crate) struct Matrix(QMatMul);

impl Matrix {
    /// Returns `x [rows, inputs]` times the matrix: `[rows, outputs]`.
    pub(crate) fn apply(&self, x: &Tensor) -> CandleResult<Tensor> {
        self.0.forward(x)
    }
}

/// The token embedding in the file's own bytes: only the rows that a step needs are widened.
#[derive(Debug)]
pub(crate) struct Embedding {
    bytes: Vec<u8>,
    dtype: GgmlDType,
    row_bytes: usize,
    rows: usize,
    hidden: usize,
    device: Device,
}

impl Embedding {
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the rows of `ids` as f32: `[ids, hidden]`. Ids were checked against [`Embedding::rows`].
    pub(crate) fn lookup(&self, ids: &[u32]) -> CandleResult<Tensor> {
        let mut picked = Vec::with_capacity(ids.len() * self.row_bytes);
        for id in ids {
            let start = *id as usize * self.row_bytes;
            picked.extend_from_slice(&self.bytes[start..start + self.row_bytes]);
        }
        let rows: QTensor = qtensor_from_ggml(self.dtype, &picked, vec![ids.len(), self.hidden], &self.device)?;
        rows.dequantize(&self.device)
    }

    /// Returns the same weights as an output matrix.
    pub(crate) fn tied(&self) -> CandleResult<Matrix> {
        let tensor = qtensor_from_ggml(self.dtype, &self.bytes, vec![self.rows, self.hidden], &self.device)?;
        Ok(Matrix(QMatMul::from_qtensor(tensor)?))
    }
}
