//! Causal attention of one row: its new queries over all its keys, grouped heads together.

use candle_core::{Device, Result, Tensor};
use candle_nn::ops::softmax_last_dim;

use crate::architecture::Architecture;

/// Most scores (heads x queries x keys) that exist at a time: 64 MiB of f32. A longer chunk goes in tiles.
const SCORES_MAX: usize = 1 << 24;

/// Queries of one head group up to which the product is faster the other way round: 1.8 ms instead of 5.1 ms for two
/// queries over 2,000 keys of 8 heads of 128, on two cores.
const FEW_QUERIES: usize = 8;

/// Returns `[tokens, heads * head_dim]` for `q [tokens, heads, head_dim]` whose first position is `start`, over
/// `keys` and `values` `[kv_heads, start + tokens, head_dim]`.
pub(crate) fn attend(shape: &Architecture, q: &Tensor, keys: &Tensor, values: &Tensor, start: usize) -> Result<Tensor> {
    let tokens = q.dim(0)?;
    #[cfg(feature = "flash-attn")]
    if tokens > 1 && q.device().is_cuda() && shape.head_dim <= FLASH_HEAD_MAX {
        return flash(shape, q, keys, values);
    }
    let tile = (SCORES_MAX / (shape.heads * (start + tokens))).max(1);
    if tile >= tokens {
        return attend_tile(shape, q, keys, values, start);
    }
    let part = |from: usize| {
        let count = tile.min(tokens - from);
        let seen = start + from + count;
        let (keys, values) = (keys.narrow(1, 0, seen)?, values.narrow(1, 0, seen)?);
        attend_tile(shape, &q.narrow(0, from, count)?, &keys, &values, start + from)
    };
    Tensor::cat(&(0..tokens).step_by(tile).map(part).collect::<Result<Vec<_>>>()?, 0)
}

/// Widest head that flash attention takes.
#[cfg(feature = "flash-attn")]
const FLASH_HEAD_MAX: usize = 256;

/// The same through flash attention, in f16. Its causal mask is aligned to the last key, so `start` needs no word.
#[cfg(feature = "flash-attn")]
fn flash(shape: &Architecture, q: &Tensor, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
    use candle_core::DType;
    let (tokens, heads, width) = q.dims3()?;
    let by_position = |x: &Tensor| x.transpose(0, 1)?.unsqueeze(0)?.to_dtype(DType::F16)?.contiguous();
    let q = q.unsqueeze(0)?.to_dtype(DType::F16)?.contiguous()?;
    let scale = 1.0 / (shape.head_dim as f32).sqrt();
    let mixed = candle_flash_attn::flash_attn(&q, &by_position(keys)?, &by_position(values)?, scale, true)?;
    mixed.squeeze(0)?.to_dtype(DType::F32)?.reshape((tokens, heads * width))
}

fn attend_tile(shape: &Architecture, q: &Tensor, keys: &Tensor, values: &Tensor, start: usize) -> Result<Tensor> {
    let (tokens, heads, width) = q.dims3()?;
    let (length, kv_heads) = (start + tokens, shape.kv_heads);
    let group = heads / kv_heads;
    // Heads of one group lie next to each other, so their queries become rows of one matrix.
    let q = q.transpose(0, 1)?.contiguous()?.reshape((kv_heads, group * tokens, width))?;
    let q = (q / (width as f64).sqrt())?;
    let scores = products(&q, keys)?;
    let scores = if tokens > 1 {
        let scores = scores.reshape((kv_heads, group, tokens, length))?;
        let masked = scores.broadcast_add(&mask(start, tokens, q.device())?)?;
        masked.reshape((kv_heads, group * tokens, length))?
    } else {
        scores
    };
    let mixed = softmax_last_dim(&scores)?.matmul(values)?;
    mixed.reshape((heads, tokens, width))?.transpose(0, 1)?.contiguous()?.reshape((tokens, heads * width))
}

/// Returns `queries x keys^T`. Operands are transposed by their strides alone: both CPU and CUDA products read them so.
///
/// On the CPU a product packs its right operand, so for few queries the many keys stand on the left.
fn products(queries: &Tensor, keys: &Tensor) -> Result<Tensor> {
    if queries.dim(1)? <= FEW_QUERIES {
        return keys.matmul(&queries.transpose(1, 2)?)?.transpose(1, 2)?.contiguous();
    }
    queries.matmul(&keys.transpose(1, 2)?)
}

/// Hides from each query what comes after it.
fn mask(start: usize, tokens: usize, device: &Device) -> Result<Tensor> {
    let length = start + tokens;
    let seen = |i: usize, j: usize| if j <= start + i { 0.0 } else { f32::NEG_INFINITY };
    let values: Vec<f32> = (0..tokens).flat_map(|i| (0..length).map(move |j| seen(i, j))).collect();
    Tensor::from_vec(values, (tokens, length), device)
}
