//! Keys and values by block: one pair of tensors a layer, `[kv_heads, blocks * block_tokens, head_dim]` in f32.
//!
//! A head's context is then a plain matrix: in place where a row's blocks are neighbours, after one gather where not.

use candle_core::{DType, Device, Result, Tensor};
use inference::engine::{BlockCopy, BlockId, Row};

use crate::architecture::Architecture;

/// The store of all layers.
#[derive(Debug)]
pub(crate) struct KvStore {
    layers: Vec<(Tensor, Tensor)>,
    block_tokens: usize,
}

/// Where the positions `0..length` of a row are.
pub(crate) enum Place {
    /// One range, starting there.
    Range(usize),
    /// One by one.
    Scattered(Tensor),
}

/// The axis of slots.
const SLOTS: usize = 1;

impl KvStore {
    pub(crate) fn new(shape: &Architecture, blocks: usize, block_tokens: usize, device: &Device) -> Result<Self> {
        let empty = || Tensor::zeros((shape.kv_heads, blocks * block_tokens, shape.head_dim), DType::F32, device);
        let layers = (0..shape.layers).map(|_| Ok((empty()?, empty()?))).collect::<Result<_>>()?;
        Ok(KvStore { layers, block_tokens })
    }

    /// Copies whole blocks, in order.
    pub(crate) fn copy(&self, copies: &[BlockCopy]) -> Result<()> {
        for copy in copies.iter().filter(|copy| copy.from != copy.to) {
            let (from, to) = (copy.from.0 as usize * self.block_tokens, copy.to.0 as usize * self.block_tokens);
            for tensor in self.layers.iter().flat_map(|(keys, values)| [keys, values]) {
                // `Tensor::copy` would clone the layer's whole store.
                let block = tensor.narrow(SLOTS, from, self.block_tokens)?.force_contiguous()?;
                tensor.slice_set(&block, SLOTS, to)?;
            }
        }
        Ok(())
    }

    /// Returns a block's numbers, little-endian: its layers one after another, keys before values.
    pub(crate) fn export(&self, block: BlockId) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for tensor in self.layers.iter().flat_map(|(keys, values)| [keys, values]) {
            let part = tensor.narrow(SLOTS, block.0 as usize * self.block_tokens, self.block_tokens)?;
            for number in part.flatten_all()?.to_vec1::<f32>()? {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
        }
        Ok(bytes)
    }

    /// Puts a block back; `bytes` are as many as [`KvStore::export`] gives.
    pub(crate) fn import(&self, block: BlockId, bytes: &[u8]) -> Result<()> {
        let mut numbers = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        for tensor in self.layers.iter().flat_map(|(keys, values)| [keys, values]) {
            let (heads, _, width) = tensor.dims3()?;
            let part: Vec<f32> = numbers.by_ref().take(heads * self.block_tokens * width).collect();
            let part = Tensor::from_vec(part, (heads, self.block_tokens, width), tensor.device())?;
            tensor.slice_set(&part, SLOTS, block.0 as usize * self.block_tokens)?;
        }
        Ok(())
    }

    /// Writes a row's new keys and values `[kv_heads, tokens, head_dim]` at its positions.
    pub(crate) fn write(&self, layer: usize, row: &Row, keys: &Tensor, values: &Tensor) -> Result<()> {
        let (key_store, value_store) = &self.layers[layer];
        let end = row.start + row.tokens.len();
        let mut position = row.start;
        while position < end {
            let block = position / self.block_tokens;
            let count = ((block + 1) * self.block_tokens).min(end) - position;
            let slot = row.blocks[block].0 as usize * self.block_tokens + position % self.block_tokens;
            let from = position - row.start;
            key_store.slice_set(&keys.narrow(SLOTS, from, count)?.contiguous()?, SLOTS, slot)?;
            value_store.slice_set(&values.narrow(SLOTS, from, count)?.contiguous()?, SLOTS, slot)?;
            position += count;
        }
        Ok(())
    }

    /// Finds where a row's positions up to its end are; the same for every layer.
    pub(crate) fn place(&self, row: &Row, device: &Device) -> Result<Place> {
        let length = row.start + row.tokens.len();
        let blocks = &row.blocks[..length.div_ceil(self.block_tokens)];
        if blocks.windows(2).all(|pair| pair[0].0 + 1 == pair[1].0) {
            return Ok(Place::Range(blocks[0].0 as usize * self.block_tokens));
        }
        let slot =
            |p: usize| blocks[p / self.block_tokens].0 * self.block_tokens as u32 + (p % self.block_tokens) as u32;
        Ok(Place::Scattered(Tensor::from_vec((0..length).map(slot).collect(), length, device)?))
    }

    /// Returns a row's keys and values `[kv_heads, length, head_dim]`; each head's matrix is contiguous.
    pub(crate) fn read(&self, layer: usize, place: &Place, length: usize) -> Result<(Tensor, Tensor)> {
        let (keys, values) = &self.layers[layer];
        let part = |store: &Tensor| match place {
            Place::Range(start) => store.narrow(SLOTS, *start, length),
            Place::Scattered(slots) => store.index_select(slots, SLOTS),
        };
        Ok((part(keys)?, part(values)?))
    }
}
