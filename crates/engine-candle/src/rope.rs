//! Rotary positions in f32, from angles computed in f64: exact at any position.

use candle_core::{D, Device, Tensor};

use crate::architecture::{Architecture, RopeKind};
use crate::error::LoadError;
use crate::weights::Loader;

/// The frequencies of one model.
#[derive(Debug)]
pub(crate) struct Rope {
    kind: RopeKind,
    frequencies: Vec<f64>,
}

/// Cosines and sines of one step's positions: `[tokens, 1, head_dim / 2]` each.
pub(crate) struct Angles {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// Makes the frequencies, divided one by one where a model has factors for that.
    pub(crate) fn load(architecture: &Architecture, loader: &mut Loader<'_>) -> Result<Self, LoadError> {
        let name = "rope_freqs.weight";
        let half = architecture.rope_dim / 2;
        let factors = if loader.has(name) { loader.floats(name, half)? } else { vec![1.0; half] };
        if factors.iter().any(|factor| !factor.is_finite() || *factor <= 0.0) {
            let problem = "has a factor that is not above zero".into();
            return Err(LoadError::Tensor { name: name.into(), problem });
        }
        let frequency = |(i, factor): (usize, &f32)| {
            // `libm` and not the system's library: the same bits on every machine.
            let plain = libm::pow(architecture.rope_base, -2.0 * i as f64 / architecture.rope_dim as f64);
            plain / f64::from(*factor) / architecture.rope_scale
        };
        Ok(Rope { kind: architecture.rope, frequencies: factors.iter().enumerate().map(frequency).collect() })
    }

    /// Adds one position's cosines and sines: `[head_dim / 2]` each.
    pub(crate) fn push_angles(&self, position: usize, cos: &mut Vec<f32>, sin: &mut Vec<f32>) {
        for frequency in &self.frequencies {
            let (s, c) = libm::sincos(position as f64 * frequency);
            cos.push(c as f32);
            sin.push(s as f32);
        }
    }

    /// Computes the angles of these positions.
    pub(crate) fn angles(&self, positions: &[usize], device: &Device) -> candle_core::Result<Angles> {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in positions {
            self.push_angles(*position, &mut cos, &mut sin);
        }
        let shape = (positions.len(), 1, self.frequencies.len());
        Ok(Angles { cos: Tensor::from_vec(cos, shape, device)?, sin: Tensor::from_vec(sin, shape, device)? })
    }

    /// Rotates `x [tokens, heads, head_dim]`.
    pub(crate) fn rotate(&self, x: &Tensor, angles: &Angles) -> candle_core::Result<Tensor> {
        let (tokens, heads, width) = x.dims3()?;
        let half = width / 2;
        let turn = |a: &Tensor, b: &Tensor| -> candle_core::Result<(Tensor, Tensor)> {
            let first = (a.broadcast_mul(&angles.cos)? - b.broadcast_mul(&angles.sin)?)?;
            let second = (b.broadcast_mul(&angles.cos)? + a.broadcast_mul(&angles.sin)?)?;
            Ok((first, second))
        };
        match self.kind {
            RopeKind::Halves => {
                let (first, second) = turn(&x.narrow(2, 0, half)?, &x.narrow(2, half, half)?)?;
                Tensor::cat(&[first, second], D::Minus1)
            }
            RopeKind::Neighbours => {
                let pairs = x.reshape((tokens, heads, half, 2))?;
                let (even, odd) = (pairs.narrow(3, 0, 1)?.squeeze(3)?, pairs.narrow(3, 1, 1)?.squeeze(3)?);
                let (first, second) = turn(&even, &odd)?;
                Tensor::stack(&[first, second], 3)?.reshape((tokens, heads, width))
            }
        }
    }
}
