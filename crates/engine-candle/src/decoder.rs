//! The decoder: a ragged batch through every layer.

use candle_core::{Device, Result, Tensor};
use candle_nn::ops::rms_norm;
use inference::engine::Batch;

use crate::architecture::Architecture;
use crate::attention::attend;
use crate::error::LoadError;
use crate::kv::{KvStore, Place};
use crate::rope::{Angles, Rope};
use crate::weights::{Embedding, Loader, Matrix};
use crate::{StepOutputs, places as places_of};

struct Layer {
    attention_norm: Tensor,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    head_norms: Option<(Tensor, Tensor)>,
    output: Matrix,
    feed_norm: Tensor,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

/// A model in memory.
pub(crate) struct Decoder {
    shape: Architecture,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Matrix,
    rope: Rope,
    kv: KvStore,
    device: Device,
}

fn layer(shape: &Architecture, loader: &mut Loader<'_>, i: usize) -> std::result::Result<Layer, LoadError> {
    let name = |part: &str| format!("blk.{i}.{part}.weight");
    loader.refuse_biases(i)?;
    let (hidden, width, kv_width) = (shape.hidden, shape.heads * shape.head_dim, shape.kv_width());
    let head_norms = if shape.head_norms {
        let q = loader.vector(&name("attn_q_norm"), shape.head_dim)?;
        Some((q, loader.vector(&name("attn_k_norm"), shape.head_dim)?))
    } else {
        None
    };
    Ok(Layer {
        attention_norm: loader.vector(&name("attn_norm"), hidden)?,
        q: loader.matrix(&name("attn_q"), width, hidden)?,
        k: loader.matrix(&name("attn_k"), kv_width, hidden)?,
        v: loader.matrix(&name("attn_v"), kv_width, hidden)?,
        head_norms,
        output: loader.matrix(&name("attn_output"), hidden, width)?,
        feed_norm: loader.vector(&name("ffn_norm"), hidden)?,
        gate: loader.matrix(&name("ffn_gate"), shape.feed_forward, hidden)?,
        up: loader.matrix(&name("ffn_up"), shape.feed_forward, hidden)?,
        down: loader.matrix(&name("ffn_down"), hidden, shape.feed_forward)?,
    })
}

impl Decoder {
    pub(crate) fn load(
        shape: Architecture,
        loader: &mut Loader<'_>,
        blocks: usize,
        block_tokens: usize,
    ) -> std::result::Result<Self, LoadError> {
        let device = loader.device().clone();
        let embedding = loader.embedding("token_embd.weight", shape.hidden)?;
        let layers = (0..shape.layers).map(|i| layer(&shape, loader, i)).collect::<std::result::Result<_, _>>()?;
        let norm = loader.vector("output_norm.weight", shape.hidden)?;
        let head = match loader.has("output.weight") {
            true => loader.matrix("output.weight", embedding.rows(), shape.hidden)?,
            false => embedding.tied()?,
        };
        let rope = Rope::load(&shape, loader)?;
        loader.finish()?;
        let kv = KvStore::new(&shape, blocks, block_tokens, &device)?;
        Ok(Decoder { shape, embedding, layers, norm, head, rope, kv, device })
    }

    pub(crate) fn vocabulary(&self) -> usize {
        self.embedding.rows()
    }

    pub(crate) fn kv(&self) -> &KvStore {
        &self.kv
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Runs a checked batch; returns what its rows want, in order.
    pub(crate) fn step(&self, batch: &Batch) -> Result<StepOutputs> {
        self.kv.copy(&batch.copies)?;
        let ids: Vec<u32> = batch.rows.iter().flat_map(|row| row.tokens.iter().copied()).collect();
        let positions: Vec<usize> =
            batch.rows.iter().flat_map(|row| (0..row.tokens.len()).map(|i| row.start + i)).collect();
        if ids.is_empty() {
            return Ok(StepOutputs::default());
        }
        let angles = self.rope.angles(&positions, &self.device)?;
        let places = batch.rows.iter().map(|row| self.kv.place(row, &self.device)).collect::<Result<Vec<_>>>()?;
        let mut x = self.embedding.lookup(&ids)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let normed = rms_norm(&x, &layer.attention_norm, self.shape.norm_epsilon)?;
            x = (x + self.attention(i, layer, &normed, batch, &places, &angles)?)?;
            let normed = rms_norm(&x, &layer.feed_norm, self.shape.norm_epsilon)?;
            let inner = (layer.gate.apply(&normed)?.silu()? * layer.up.apply(&normed)?)?;
            x = (x + layer.down.apply(&inner)?)?;
        }
        let logits = match self.normed(&x, &places_of(batch, false))? {
            Some(normed) => self.head.apply(&normed)?.flatten_all()?.to_vec1()?,
            None => Vec::new(),
        };
        let hidden = match self.normed(&x, &places_of(batch, true))? {
            Some(normed) => normed.flatten_all()?.to_vec1()?,
            None => Vec::new(),
        };
        Ok(StepOutputs { logits, hidden })
    }

    fn attention(
        &self,
        i: usize,
        layer: &Layer,
        x: &Tensor,
        batch: &Batch,
        places: &[Place],
        angles: &Angles,
    ) -> Result<Tensor> {
        let shape = &self.shape;
        let tokens = x.dim(0)?;
        let q = layer.q.apply(x)?.reshape((tokens, shape.heads, shape.head_dim))?;
        let k = layer.k.apply(x)?.reshape((tokens, shape.kv_heads, shape.head_dim))?;
        let v = layer.v.apply(x)?.reshape((tokens, shape.kv_heads, shape.head_dim))?;
        let (q, k) = match &layer.head_norms {
            Some((qn, kn)) => (rms_norm(&q, qn, shape.norm_epsilon)?, rms_norm(&k, kn, shape.norm_epsilon)?),
            None => (q, k),
        };
        let q = self.rope.rotate(&q, angles)?;
        let k = self.rope.rotate(&k, angles)?;
        let (k, v) = (k.transpose(0, 1)?.contiguous()?, v.transpose(0, 1)?.contiguous()?);
        let mut mixed = Vec::with_capacity(batch.rows.len());
        let mut at = 0;
        for (row, place) in batch.rows.iter().zip(places) {
            let count = row.tokens.len();
            self.kv.write(i, row, &k.narrow(1, at, count)?, &v.narrow(1, at, count)?)?;
            let (keys, values) = self.kv.read(i, place, row.start + count)?;
            mixed.push(attend(shape, &q.narrow(0, at, count)?, &keys, &values, row.start)?);
            at += count;
        }
        layer.output.apply(&Tensor::cat(&mixed, 0)?)
    }

    /// Returns the normed states of some of the step's tokens; `None` for none.
    fn normed(&self, x: &Tensor, places: &[usize]) -> Result<Option<Tensor>> {
        if places.is_empty() {
            return Ok(None);
        }
        let places: Vec<u32> = places.iter().map(|place| *place as u32).collect();
        let x = x.index_select(&Tensor::new(places, &self.device)?, 0)?;
        rms_norm(&x, &self.norm, self.shape.norm_epsilon).map(Some)
    }
}
