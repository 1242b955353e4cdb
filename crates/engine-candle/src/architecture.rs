//! What the decoder has to know of a model: everything that differs between architectures, as data.

use model_files::gguf::Header;

use crate::error::LoadError;

/// How pairs of a head's numbers are rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeKind {
    /// A number with the one half a head further (NEOX).
    Halves,
    /// A number with its neighbour; llama's GGUF files are permuted for it.
    Neighbours,
}

/// A model's description.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Architecture {
    pub layers: usize,
    pub hidden: usize,
    pub feed_forward: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub context_length: usize,
    pub norm_epsilon: f32,
    /// Norms of their own for queries and keys.
    pub head_norms: bool,
    pub rope: RopeKind,
    pub rope_base: f64,
    /// Positions are divided by it.
    pub rope_scale: f64,
    /// Numbers of a head that are rotated.
    pub rope_dim: usize,
}

/// Most layers, heads and the like that are believed.
const COUNT_MAX: u64 = 1 << 20;

impl Architecture {
    /// Reads the description from a header's metadata.
    ///
    /// # Errors
    /// `Architecture` for one that is not supported, `Metadata` for settings that are absent or impossible.
    pub fn read(header: &Header) -> Result<Self, LoadError> {
        let name = header.str("general.architecture").unwrap_or("unknown");
        let (head_norms, rope) = match name {
            "qwen3" => (true, RopeKind::Halves),
            "llama" => (false, RopeKind::Neighbours),
            other => return Err(LoadError::Architecture(other.into())),
        };
        let wrong = |key: &str, problem: &str| LoadError::Metadata { key: key.into(), problem: problem.into() };
        let optional = |part: &str| header.u64(&format!("{name}.{part}"));
        let count = |part: &str| {
            let key = format!("{name}.{part}");
            let value = header.get(&key).ok_or_else(|| wrong(&key, "is absent"))?;
            let value = value.as_u64().ok_or_else(|| wrong(&key, "must be one whole number for all layers"))?;
            if value == 0 || value > COUNT_MAX {
                return Err(wrong(&key, &format!("must be from 1 to {COUNT_MAX}, it is {value}")));
            }
            Ok(value as usize)
        };
        let (hidden, heads) = (count("embedding_length")?, count("attention.head_count")?);
        let kv_heads = if header.get(&format!("{name}.attention.head_count_kv")).is_some() {
            count("attention.head_count_kv")?
        } else {
            heads
        };
        let head_dim = if header.get(&format!("{name}.attention.key_length")).is_some() {
            count("attention.key_length")?
        } else {
            hidden / heads
        };
        if heads % kv_heads != 0 || head_dim == 0 || head_dim % 2 != 0 {
            return Err(wrong(
                &format!("{name}.attention.head_count"),
                "does not fit its KV heads, or heads have no even width",
            ));
        }
        if optional("attention.value_length").is_some_and(|length| length as usize != head_dim) {
            return Err(wrong(
                &format!("{name}.attention.value_length"),
                "differs from the key length, which is not supported",
            ));
        }
        let rope_dim = optional("rope.dimension_count").map_or(head_dim, |n| n as usize);
        if rope_dim != head_dim {
            return Err(wrong(
                &format!("{name}.rope.dimension_count"),
                "differs from the head's width, which is not supported",
            ));
        }
        if optional("expert_count").is_some_and(|experts| experts > 0) {
            return Err(wrong(&format!("{name}.expert_count"), "says a mixture of experts, which is not supported"));
        }
        // Without a type a factor is linear, as llama.cpp reads it; older files write zero for none.
        let factor = header.f32(&format!("{name}.rope.scaling.factor")).unwrap_or(0.0);
        let rope_scale = match header.str(&format!("{name}.rope.scaling.type")) {
            Some("none") => 1.0,
            None | Some("linear") if factor == 0.0 => 1.0,
            None | Some("linear") if factor.is_finite() && factor > 0.0 => f64::from(factor),
            None | Some("linear") => return Err(wrong(&format!("{name}.rope.scaling.factor"), "is impossible")),
            Some(_) => {
                let problem = "is not supported; supported are none and linear";
                return Err(wrong(&format!("{name}.rope.scaling.type"), problem));
            }
        };
        let epsilon = header.f32(&format!("{name}.attention.layer_norm_rms_epsilon")).unwrap_or(1e-5);
        let rope_base = header.f32(&format!("{name}.rope.freq_base")).unwrap_or(10_000.0);
        if !(epsilon > 0.0 && epsilon < 1.0 && rope_base > 1.0 && rope_base.is_finite()) {
            return Err(wrong(&format!("{name}.rope.freq_base"), "or the norm's epsilon is impossible"));
        }
        Ok(Architecture {
            layers: count("block_count")?,
            hidden,
            feed_forward: count("feed_forward_length")?,
            heads,
            kv_heads,
            head_dim,
            context_length: count("context_length")?,
            norm_epsilon: epsilon,
            head_norms,
            rope,
            rope_base: f64::from(rope_base),
            rope_scale,
            rope_dim,
        })
    }

    /// Returns the width of all KV heads together.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Returns the bytes of KV that one block takes, over all layers, in f32. Counts come from the file unchecked by
    /// any tensor yet, so a product past 64 bits is the largest number, not a panic.
    pub fn kv_block_bytes(&self, block_tokens: usize) -> usize {
        [self.layers, self.kv_heads, self.head_dim, block_tokens, 2 * 4].into_iter().fold(1, usize::saturating_mul)
    }
}
