//! The decoder on the kernels: CPU, packed weights, a block store of keys and values, no allocation but the logits.
//!
//! A row's logits depend on its own tokens alone, bit by bit: see the `kernels` crate for the order of every sum.

mod weights;

use inference::engine::{Batch, BlockId};
use kernels::attention::{self, Scratch, Sequence};
use kernels::kv::{KvShape, KvStore, Slot};
use kernels::rows::{Heads, place};
use kernels::{Activations, Input, Job, Level, Matrix, Pool, Wanted, matmul};
use model_files::gguf::{Tensor, TensorType};

use crate::architecture::{Architecture, RopeKind};
use crate::error::LoadError;
use crate::rope::Rope;
use crate::weights::Loader;
use crate::{KernelOptions, StepOutputs, places};

/// Positions of a block: what the kernels work in.
pub(crate) const BLOCK_TOKENS: usize = kernels::kv::BLOCK;

struct Layer {
    attention_norm: Vec<f32>,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    head_norms: Option<(Vec<f32>, Vec<f32>)>,
    output: Matrix,
    feed_norm: Vec<f32>,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

/// A step's numbers; all `[tokens, ...]`, and kept for the next.
#[derive(Default)]
struct Buffers {
    x: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mixed: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    slots: Vec<Slot>,
    blocks: Vec<u32>,
    last: Vec<f32>,
    activations: Activations,
    scratch: Scratch,
}

/// A model in memory.
pub(crate) struct Decoder {
    shape: Architecture,
    embedding: Matrix,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    /// The output's own matrix; else the embedding's.
    head: Option<Matrix>,
    rope: Rope,
    kv: KvStore,
    level: Level,
    refused: Vec<Level>,
    pool: Pool,
    buffers: Buffers,
}

/// Returns what the store holds of a model.
pub(crate) fn kv_shape(shape: &Architecture, options: &KernelOptions) -> KvShape {
    KvShape { layers: shape.layers, kv_heads: shape.kv_heads, head_dim: shape.head_dim, kind: options.kv }
}

/// Returns the bytes that a tensor takes once it is packed: what stays as it is, what becomes Q8_0, and what is widened.
pub(crate) fn packed_bytes(tensor: &Tensor) -> u64 {
    use TensorType as T;
    let numbers = tensor.shape.iter().fold(1, |product: u64, size| product.saturating_mul(*size));
    match tensor.kind {
        T::Q4K | T::Q6K | T::Q8_0 | T::F16 | T::F32 => tensor.bytes,
        T::Q4_0 | T::Q5_0 => numbers.div_ceil(T::Q8_0.block_elements()).saturating_mul(T::Q8_0.block_bytes()),
        _ => numbers.saturating_mul(4),
    }
}

fn layer(shape: &Architecture, loader: &mut Loader<'_>, i: usize) -> Result<Layer, LoadError> {
    let name = |part: &str| format!("blk.{i}.{part}.weight");
    loader.refuse_biases(i)?;
    let (hidden, width, kv_width) = (shape.hidden, shape.heads * shape.head_dim, shape.kv_width());
    let head_norms = if shape.head_norms {
        let q = loader.floats(&name("attn_q_norm"), shape.head_dim)?;
        Some((q, loader.floats(&name("attn_k_norm"), shape.head_dim)?))
    } else {
        None
    };
    Ok(Layer {
        attention_norm: loader.floats(&name("attn_norm"), hidden)?,
        q: loader.packed(&name("attn_q"), width, hidden)?,
        k: loader.packed(&name("attn_k"), kv_width, hidden)?,
        v: loader.packed(&name("attn_v"), kv_width, hidden)?,
        head_norms,
        output: loader.packed(&name("attn_output"), hidden, width)?,
        feed_norm: loader.floats(&name("ffn_norm"), hidden)?,
        gate: loader.packed(&name("ffn_gate"), shape.feed_forward, hidden)?,
        up: loader.packed(&name("ffn_up"), shape.feed_forward, hidden)?,
        down: loader.packed(&name("ffn_down"), hidden, shape.feed_forward)?,
    })
}

impl Decoder {
    pub(crate) fn load(
        shape: Architecture,
        loader: &mut Loader<'_>,
        blocks: usize,
        options: &KernelOptions,
    ) -> Result<Self, LoadError> {
        let no_thread = |error| LoadError::Options(format!("threads: {error}"));
        let (level, refused) = match options.level {
            Some(level) if !level.is_available() => {
                return Err(LoadError::Options(format!("this machine has no {level}; use {}", Level::best())));
            }
            Some(level) => (level, Vec::new()),
            None => {
                let choice = kernels::proof::choose().map_err(no_thread)?;
                (choice.level, choice.refused)
            }
        };
        let pool = Pool::new(options.threads).map_err(no_thread)?;
        let embedding = loader.packed("token_embd.weight", 0, shape.hidden)?;
        let layers = (0..shape.layers).map(|i| layer(&shape, loader, i)).collect::<Result<_, _>>()?;
        let norm = loader.floats("output_norm.weight", shape.hidden)?;
        let head = match loader.has("output.weight") {
            true => Some(loader.packed("output.weight", embedding.outputs(), shape.hidden)?),
            false => None,
        };
        let rope = Rope::load(&shape, loader)?;
        loader.finish()?;
        let kv = kv_shape(&shape, options);
        let needed = kv.block_bytes().saturating_mul(blocks);
        let kv = KvStore::new(kv, blocks).ok_or(LoadError::Memory { needed, given: isize::MAX as usize })?;
        Ok(Decoder {
            shape,
            embedding,
            layers,
            norm,
            head,
            rope,
            kv,
            level,
            refused,
            pool,
            buffers: Buffers::default(),
        })
    }

    pub(crate) fn vocabulary(&self) -> usize {
        self.embedding.outputs()
    }

    pub(crate) fn level(&self) -> Level {
        self.level
    }

    /// Levels that the machine has and that gave other bits than the portable one.
    pub(crate) fn refused(&self) -> &[Level] {
        &self.refused
    }

    /// Bytes of all matrices.
    pub(crate) fn weight_bytes(&self) -> usize {
        let layers = self.layers.iter();
        let all = layers.flat_map(|l| [&l.q, &l.k, &l.v, &l.output, &l.gate, &l.up, &l.down]);
        all.chain([&self.embedding]).chain(&self.head).map(Matrix::bytes).sum()
    }

    pub(crate) fn kv(&self) -> &KvStore {
        &self.kv
    }

    pub(crate) fn kv_mut(&mut self) -> &mut KvStore {
        &mut self.kv
    }

    /// Runs a checked batch; returns what its rows want, in order.
    pub(crate) fn step(&mut self, batch: &Batch) -> StepOutputs {
        for copy in batch.copies.iter().filter(|copy| copy.from != copy.to) {
            self.kv.copy(copy.from.0, copy.to.0);
        }
        let tokens = batch.tokens();
        if tokens == 0 {
            return StepOutputs::default();
        }
        self.begin(batch, tokens);
        let blocks = std::mem::take(&mut self.buffers.blocks);
        let mut rest = blocks.as_slice();
        let mut sequences = Vec::with_capacity(batch.rows.len());
        for row in &batch.rows {
            let (own, others) = rest.split_at(row.blocks.len());
            sequences.push(Sequence { start: row.start, tokens: row.tokens.len(), blocks: own });
            rest = others;
        }
        for i in 0..self.layers.len() {
            self.attention(i, &sequences);
            self.feed_forward(i);
        }
        self.buffers.blocks = blocks;
        self.outputs(batch)
    }

    /// Fills what all layers read: embeddings, angles, and where the tokens belong.
    fn begin(&mut self, batch: &Batch, tokens: usize) {
        let (shape, b) = (&self.shape, &mut self.buffers);
        b.x.resize(tokens * shape.hidden, 0.0);
        let (width, kv_width) = (shape.heads * shape.head_dim, shape.kv_width());
        for (buffer, width) in [
            (&mut b.q, width),
            (&mut b.mixed, width),
            (&mut b.k, kv_width),
            (&mut b.v, kv_width),
            (&mut b.gate, shape.feed_forward),
            (&mut b.up, shape.feed_forward),
        ] {
            buffer.resize(tokens * width, 0.0);
        }
        b.slots.clear();
        b.blocks.clear();
        b.cos.clear();
        b.sin.clear();
        let ids = batch.rows.iter().flat_map(|row| &row.tokens);
        for (id, x) in ids.zip(b.x.chunks_exact_mut(shape.hidden)) {
            self.embedding.row(*id as usize, x);
        }
        for row in &batch.rows {
            b.blocks.extend(row.blocks.iter().map(|BlockId(block)| block));
            for position in row.start..row.start + row.tokens.len() {
                let BlockId(block) = row.blocks[position / BLOCK_TOKENS];
                b.slots.push(Slot { block, offset: (position % BLOCK_TOKENS) as u32 });
                self.rope.push_angles(position, &mut b.cos, &mut b.sin);
            }
        }
    }

    fn attention(&mut self, i: usize, sequences: &[Sequence<'_>]) {
        let (shape, layer, b, level) = (&self.shape, &self.layers[i], &mut self.buffers, self.level);
        let pool = &mut self.pool;
        let input = Input::Normed(&b.x, &layer.attention_norm, shape.norm_epsilon);
        b.activations.fill(level, pool, input, shape.hidden, Wanted::by([&layer.q, &layer.k, &layer.v]));
        let mut jobs = [
            Job { matrix: &layer.q, out: &mut b.q, add: false },
            Job { matrix: &layer.k, out: &mut b.k, add: false },
            Job { matrix: &layer.v, out: &mut b.v, add: false },
        ];
        matmul(level, pool, &b.activations, &mut jobs);
        let halves = shape.rope == RopeKind::Halves;
        let plain = Heads { head_dim: shape.head_dim, norm: None, cos: &b.cos, sin: &b.sin, halves };
        let norms = layer.head_norms.as_ref();
        let of = |weight| (weight, shape.norm_epsilon);
        place(level, pool, &mut b.q, &Heads { norm: norms.map(|(q, _)| of(q.as_slice())), ..plain });
        place(level, pool, &mut b.k, &Heads { norm: norms.map(|(_, k)| of(k.as_slice())), ..plain });
        self.kv.write(level, pool, i, &b.slots, &b.k, &b.v);
        attention::attend(level, pool, &mut b.scratch, &self.kv, i, sequences, &b.q, &mut b.mixed);
        let width = shape.heads * shape.head_dim;
        b.activations.fill(level, pool, Input::Plain(&b.mixed), width, Wanted::by([&layer.output]));
        matmul(level, pool, &b.activations, &mut [Job { matrix: &layer.output, out: &mut b.x, add: true }]);
    }

    fn feed_forward(&mut self, i: usize) {
        let (shape, layer, b, level) = (&self.shape, &self.layers[i], &mut self.buffers, self.level);
        let pool = &mut self.pool;
        let input = Input::Normed(&b.x, &layer.feed_norm, shape.norm_epsilon);
        b.activations.fill(level, pool, input, shape.hidden, Wanted::by([&layer.gate, &layer.up]));
        let mut jobs = [
            Job { matrix: &layer.gate, out: &mut b.gate, add: false },
            Job { matrix: &layer.up, out: &mut b.up, add: false },
        ];
        matmul(level, pool, &b.activations, &mut jobs);
        let gated = Input::Gated(&b.gate, &b.up);
        b.activations.fill(level, pool, gated, shape.feed_forward, Wanted::by([&layer.down]));
        matmul(level, pool, &b.activations, &mut [Job { matrix: &layer.down, out: &mut b.x, add: true }]);
    }

    /// Gathers some of the step's tokens and norms them, into the activations.
    fn norm_last(&mut self, places: &[usize], wanted: Wanted) {
        let (hidden, b) = (self.shape.hidden, &mut self.buffers);
        b.last.clear();
        places.iter().for_each(|place| b.last.extend_from_slice(&b.x[place * hidden..(place + 1) * hidden]));
        let input = Input::Normed(&b.last, &self.norm, self.shape.norm_epsilon);
        b.activations.fill(self.level, &mut self.pool, input, hidden, wanted);
    }

    fn outputs(&mut self, batch: &Batch) -> StepOutputs {
        let (of_logits, of_hidden) = (places(batch, false), places(batch, true));
        let mut outputs = StepOutputs::default();
        if !of_hidden.is_empty() {
            self.norm_last(&of_hidden, Wanted::default());
            outputs.hidden = self.buffers.activations.floats().to_vec();
        }
        if !of_logits.is_empty() {
            let wanted = Wanted::by([self.head.as_ref().unwrap_or(&self.embedding)]);
            self.norm_last(&of_logits, wanted);
            let head = self.head.as_ref().unwrap_or(&self.embedding);
            outputs.logits.resize(of_logits.len() * head.outputs(), 0.0);
            let mut jobs = [Job { matrix: head, out: &mut outputs.logits, add: false }];
            matmul(self.level, &mut self.pool, &self.buffers.activations, &mut jobs);
        }
        outputs
    }
}
