//! Weights from the file into tiles, sixteen rows at a time.

use candle_core::Device;
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use kernels::{Matrix, MatrixBuilder, Source};
use model_files::gguf::TensorType;

use crate::error::LoadError;
use crate::weights::{Loader, dtype};

/// Returns how the kernels read a type; `None` for one that is widened to F32 first.
fn source(kind: TensorType) -> Option<Source> {
    Some(match kind {
        TensorType::F32 => Source::F32,
        TensorType::F16 => Source::F16,
        TensorType::BF16 => Source::BF16,
        TensorType::Q4_0 => Source::Q4_0,
        TensorType::Q5_0 => Source::Q5_0,
        TensorType::Q8_0 => Source::Q8_0,
        TensorType::Q4K => Source::Q4K,
        TensorType::Q6K => Source::Q6K,
        _ => return None,
    })
}

impl Loader<'_> {
    /// Reads a vector as plain floats.
    pub(crate) fn floats(&mut self, name: &str, length: usize) -> Result<Vec<f32>, LoadError> {
        Ok(self.vector(name, length)?.to_vec1()?)
    }

    /// Reads a matrix `[outputs, inputs]` into tiles; 0 outputs stand for any number. The file's bytes are never held
    /// but for sixteen rows.
    pub(crate) fn packed(&mut self, name: &str, outputs: usize, inputs: usize) -> Result<Matrix, LoadError> {
        let wrong = |problem: String| LoadError::Tensor { name: name.into(), problem };
        let (kind, shape, bytes) = self.find(name, &[outputs, inputs])?;
        let outputs = shape[0];
        let unsupported = || wrong(format!("has the type {kind:?}, which is not supported"));
        let file_type = dtype(kind).ok_or_else(unsupported)?;
        let packed = source(kind);
        let mut builder = MatrixBuilder::new(packed.unwrap_or(Source::F32), outputs, inputs)
            .ok_or_else(|| wrong(format!("has rows of {inputs}, which are no whole blocks of {kind:?}")))?;
        let row_bytes = bytes as usize / outputs;
        let (mut rows, mut done) = (Vec::new(), 0);
        while builder.wanted() > 0 {
            let count = (outputs - done).min(16);
            rows.resize(count * row_bytes, 0);
            self.read_next(&mut rows)?;
            if packed.is_some() {
                builder.push(&rows);
            } else {
                let tensor = qtensor_from_ggml(file_type, &rows, vec![count, inputs], &Device::Cpu)?;
                let wide: Vec<f32> = tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?;
                builder.push(&wide.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<_>>());
            }
            done += count;
        }
        self.told(name, bytes)?;
        Ok(builder.finish())
    }
}
