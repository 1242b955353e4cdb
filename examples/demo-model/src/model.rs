//! The Qwen3 architecture in plain, differentiable candle operations.

use std::collections::HashMap;

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::{Module, RmsNorm};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Width of the model.
pub const HIDDEN: usize = 256;
/// Layers.
pub const LAYERS: usize = 2;
/// Query heads.
pub const HEADS: usize = 4;
/// Key and value heads.
pub const KV_HEADS: usize = 2;
/// Width of a head.
pub const HEAD: usize = 64;
/// Width of the feed-forward network.
pub const FEED: usize = 512;
/// Most tokens of a sequence.
pub const CONTEXT: usize = 4096;
/// Base of the rotary angles.
pub const ROPE_BASE: f32 = 10_000.0;
/// Keeps the norms finite.
pub const EPS: f64 = 1e-6;

/// The weights by their GGUF names.
pub type Weights = HashMap<String, Tensor>;

/// Returns the name and shape of every weight, in the order of the file.
pub fn shapes(vocabulary: usize) -> Vec<(String, Vec<usize>)> {
    let mut all = vec![("token_embd.weight".to_string(), vec![vocabulary, HIDDEN])];
    for layer in 0..LAYERS {
        let mut add = |name: &str, shape: &[usize]| all.push((format!("blk.{layer}.{name}.weight"), shape.to_vec()));
        add("attn_norm", &[HIDDEN]);
        add("attn_q", &[HEADS * HEAD, HIDDEN]);
        add("attn_k", &[KV_HEADS * HEAD, HIDDEN]);
        add("attn_v", &[KV_HEADS * HEAD, HIDDEN]);
        add("attn_q_norm", &[HEAD]);
        add("attn_k_norm", &[HEAD]);
        add("attn_output", &[HIDDEN, HEADS * HEAD]);
        add("ffn_norm", &[HIDDEN]);
        add("ffn_gate", &[FEED, HIDDEN]);
        add("ffn_up", &[FEED, HIDDEN]);
        add("ffn_down", &[HIDDEN, FEED]);
    }
    all.push(("output_norm.weight".to_string(), vec![HIDDEN]));
    all
}

/// Draws the first weights: ones for norms, seeded normal numbers of deviation 0.02 for the rest.
pub fn initial(vocabulary: usize, seed: u64) -> Result<HashMap<String, Var>> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut normal = move || {
        let (a, b): (f32, f32) = (rng.random::<f32>().max(1e-12), rng.random());
        0.02 * (-2.0 * a.ln()).sqrt() * (std::f32::consts::TAU * b).cos()
    };
    let mut vars = HashMap::new();
    for (name, shape) in shapes(vocabulary) {
        let count = shape.iter().product();
        let norm = name.contains("norm");
        let values: Vec<f32> = (0..count).map(|_| if norm { 1.0 } else { normal() }).collect();
        vars.insert(name, Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu)?)?);
    }
    Ok(vars)
}

/// The model over some weights.
pub struct Model<'a> {
    weights: &'a Weights,
    cos: Tensor,
    sin: Tensor,
}

impl<'a> Model<'a> {
    /// Makes the model for sequences of at most `length` tokens.
    pub fn new(weights: &'a Weights, length: usize) -> Result<Self> {
        let frequency = |i: usize| 1.0 / ROPE_BASE.powf(2.0 * i as f32 / HEAD as f32);
        let angles: Vec<f32> = (0..length).flat_map(|t| (0..HEAD / 2).map(move |i| t as f32 * frequency(i))).collect();
        let angles = Tensor::from_vec(angles, (length, HEAD / 2), &Device::Cpu)?;
        Ok(Model { weights, cos: angles.cos()?, sin: angles.sin()? })
    }

    fn weight(&self, name: &str) -> Result<&Tensor> {
        self.weights.get(name).with_context(|| format!("no weight {name}"))
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        Ok(RmsNorm::new(self.weight(name)?.clone(), EPS).forward_diff(&x.contiguous()?)?)
    }

    fn linear(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        Ok(candle_nn::Linear::new(self.weight(name)?.clone(), None).forward(x)?)
    }

    /// Returns the logits `[batch, length, vocabulary]` of ids `[batch, length]`.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let (batch, length) = ids.dims2()?;
        let embedding = self.weight("token_embd.weight")?;
        let mut x = embedding.index_select(&ids.flatten_all()?, 0)?.reshape((batch, length, HIDDEN))?;
        let mask: Vec<f32> =
            (0..length).flat_map(|i| (0..length).map(move |j| if j <= i { 0.0 } else { f32::NEG_INFINITY })).collect();
        let mask = Tensor::from_vec(mask, (1, 1, length, length), &Device::Cpu)?;
        for layer in 0..LAYERS {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            let normed = self.norm(&x, &name("attn_norm"))?;
            let heads = |part: &str, count: usize| -> Result<Tensor> {
                let flat = self.linear(&normed, &name(part))?;
                Ok(flat.reshape((batch, length, count, HEAD))?.transpose(1, 2)?)
            };
            let q = self.rotate(&self.norm(&heads("attn_q", HEADS)?, &name("attn_q_norm"))?)?;
            let k = self.rotate(&self.norm(&heads("attn_k", KV_HEADS)?, &name("attn_k_norm"))?)?;
            let (k, v) = (repeat(&k)?, repeat(&heads("attn_v", KV_HEADS)?)?);
            let scores = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? / (HEAD as f64).sqrt())?;
            let shares = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
            let mixed = shares.matmul(&v)?.transpose(1, 2)?.reshape((batch, length, HEADS * HEAD))?;
            x = (x + self.linear(&mixed, &name("attn_output"))?)?;
            let normed = self.norm(&x, &name("ffn_norm"))?;
            let gate = self.linear(&normed, &name("ffn_gate"))?.silu()?;
            let inner = (gate * self.linear(&normed, &name("ffn_up"))?)?;
            x = (x + self.linear(&inner, &name("ffn_down"))?)?;
        }
        let normed = self.norm(&x, "output_norm.weight")?;
        self.linear(&normed, "token_embd.weight")
    }

    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let length = x.dim(2)?;
        let (cos, sin) = (self.cos.narrow(0, 0, length)?, self.sin.narrow(0, 0, length)?);
        Ok(candle_nn::rotary_emb::rope_slow(&x.contiguous()?, &cos, &sin)?)
    }
}

fn repeat(x: &Tensor) -> Result<Tensor> {
    let (batch, heads, length, width) = x.dims4()?;
    let times = HEADS / KV_HEADS;
    let wide = x.unsqueeze(2)?.expand((batch, heads, times, length, width))?;
    Ok(wide.reshape((batch, heads * times, length, width))?.contiguous()?)
}

/// Rounds every weight to f16 and back, as the file will hold it.
pub fn rounded(weights: &Weights) -> Result<Weights> {
    let round = |tensor: &Tensor| tensor.to_dtype(DType::F16)?.to_dtype(DType::F32);
    weights
        .iter()
        .map(|(name, tensor)| {
            let kept = if name.contains("norm") { tensor.clone() } else { round(tensor)? };
            Ok((name.clone(), kept))
        })
        .collect()
}
