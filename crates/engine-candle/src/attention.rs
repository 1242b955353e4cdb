//! Causal attention of one row: its new queries over all its keys, grouped heads together.

use candle_core::{Device, Result, Tensor};
use candle_nn::ops::softmax_last_dim;

use crate::architecture::Architecture;

/// Returns `[tokens, heads * head_dim]` for `q [tokens, heads, head_dim]` whose first position is `start`, over
/// `keys` and `values` `[start + tokens, kv_width]`.
pub(crate) fn attend(shape: &Architecture, q: &Tensor, keys: &Tensor, values: &Tensor, start: usize) -> Result<Tensor> {
    let (tokens, heads, width) = q.dims3()?;
    let (length, kv_heads) = (start + tokens, shape.kv_heads);
    let group = heads / kv_heads;
    let by_head = |x: &Tensor| x.reshape((length, kv_heads, width))?.transpose(0, 1);
    // Heads of one group lie next to each other, so their queries become rows of one matrix.
    let q = q.transpose(0, 1)?.contiguous()?.reshape((kv_heads, group * tokens, width))?;
    let q = (q / (width as f64).sqrt())?;
    let scores = q.matmul(&by_head(keys)?.transpose(1, 2)?.contiguous()?)?;
    let scores = if tokens > 1 {
        let scores = scores.reshape((kv_heads, group, tokens, length))?;
        let masked = scores.broadcast_add(&mask(start, tokens, q.device())?)?;
        masked.reshape((kv_heads, group * tokens, length))?
    } else {
        scores
    };
    let mixed = softmax_last_dim(&scores)?.matmul(&by_head(values)?.contiguous()?)?;
    mixed.reshape((heads, tokens, width))?.transpose(0, 1)?.contiguous()?.reshape((tokens, heads * width))
}

/// Hides from each query what comes after it.
fn mask(start: usize, tokens: usize, device: &Device) -> Result<Tensor> {
    let length = start + tokens;
    let seen = |i: usize, j: usize| if j <= start + i { 0.0 } else { f32::NEG_INFINITY };
    let values: Vec<f32> = (0..tokens).flat_map(|i| (0..length).map(move |j| seen(i, j))).collect();
    Tensor::from_vec(values, (tokens, length), device)
}
