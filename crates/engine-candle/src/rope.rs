//! Rotary positions in f32, from angles computed in f64: exact at any position.

use candle_core::{D, Device, Result, Tensor};

use crate::architecture::{Architecture, RopeKind};

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
    /// Makes the frequencies; `factors` divide them one by one where a model has such.
    pub(crate) fn new(architecture: &Architecture, factors: Option<&[f32]>) -> Self {
        let half = architecture.rope_dim / 2;
        let frequency = |i: usize| {
            let plain = architecture.rope_base.powf(-2.0 * i as f64 / architecture.rope_dim as f64);
            let factor = factors.and_then(|factors| factors.get(i)).map_or(1.0, |factor| f64::from(*factor));
            plain / factor / architecture.rope_scale
        };
        Rope { kind: architecture.rope, frequencies: (0..half).map(frequency).collect() }
    }

    /// Computes the angles of these positions.
    pub(crate) fn angles(&self, positions: &[usize], device: &Device) -> Result<Angles> {
        let half = self.frequencies.len();
        let (mut cos, mut sin) =
            (Vec::with_capacity(positions.len() * half), Vec::with_capacity(positions.len() * half));
        for position in positions {
            for frequency in &self.frequencies {
                let (s, c) = (*position as f64 * frequency).sin_cos();
                cos.push(c as f32);
                sin.push(s as f32);
            }
        }
        let shape = (positions.len(), 1, half);
        Ok(Angles { cos: Tensor::from_vec(cos, shape, device)?, sin: Tensor::from_vec(sin, shape, device)? })
    }

    /// Rotates `x [tokens, heads, head_dim]`.
    pub(crate) fn rotate(&self, x: &Tensor, angles: &Angles) -> Result<Tensor> {
        let (tokens, heads, width) = x.dims3()?;
        let half = width / 2;
        let turn = |a: &Tensor, b: &Tensor| -> Result<(Tensor, Tensor)> {
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
