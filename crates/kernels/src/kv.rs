//! The store of keys and values: blocks of [`BLOCK`] positions, each a layer, a block and a KV head in one place.
//!
//! A head's block holds keys as `[width][BLOCK]`, so that lanes of a score are positions, then values as
//! `[BLOCK][width]`; `width` is the head's, rounded up to whole vectors. What is read is what was rounded into it.

use crate::aligned::Aligned;
use crate::pool::Disjoint;
use crate::simd::{LANES, Simd, levels};
use crate::{Level, Pool};

/// Positions of a block.
pub const BLOCK: usize = 32;

/// How a number is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvType {
    /// Half precision, rounded to the nearest.
    #[default]
    F16,
    /// As it was computed.
    F32,
}

impl KvType {
    /// Bytes of a number.
    pub const fn bytes(self) -> usize {
        match self {
            KvType::F16 => 2,
            KvType::F32 => 4,
        }
    }

    /// The name, in options and fingerprints.
    pub const fn name(self) -> &'static str {
        match self {
            KvType::F16 => "f16",
            KvType::F32 => "f32",
        }
    }
}

/// What a store holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Layers of the model.
    pub layers: usize,
    /// KV heads a layer.
    pub kv_heads: usize,
    /// Numbers of a head's key, and of its value.
    pub head_dim: usize,
    /// How numbers are stored.
    pub kind: KvType,
}

impl KvShape {
    /// Numbers of a key in the store.
    pub(crate) fn width(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Bytes of one head's part of a block, of one layer.
    pub(crate) fn head_bytes(&self) -> usize {
        2 * BLOCK * self.width() * self.kind.bytes()
    }

    fn layer_bytes(&self) -> usize {
        self.kv_heads * self.head_bytes()
    }

    /// Bytes of a block, over all layers; the largest number where it passes that.
    pub fn block_bytes(&self) -> usize {
        let width = self.head_dim.saturating_add(LANES - 1) / LANES * LANES;
        [self.layers, self.kv_heads, width, 2 * BLOCK, self.kind.bytes()].into_iter().fold(1, usize::saturating_mul)
    }
}

/// Where one token's key and value belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The block.
    pub block: u32,
    /// The position in it.
    pub offset: u32,
}

/// Blocks of all layers.
pub struct KvStore {
    shape: KvShape,
    blocks: usize,
    layers: Vec<Aligned>,
}

impl KvStore {
    /// Returns a store of `blocks` blocks of zeros; `None` past the address space.
    pub fn new(shape: KvShape, blocks: usize) -> Option<Self> {
        let bytes = blocks.checked_mul(shape.layer_bytes())?;
        let layers = (0..shape.layers).map(|_| Aligned::zeros(bytes)).collect::<Option<_>>()?;
        Some(KvStore { shape, blocks, layers })
    }

    /// Returns what it holds.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Returns the number of blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Copies one block over another, in all layers.
    ///
    /// # Panics
    /// When either does not exist.
    pub fn copy(&mut self, from: u32, to: u32) {
        let bytes = self.shape.layer_bytes();
        for layer in &mut self.layers {
            let from = from as usize * bytes;
            layer.bytes_mut().copy_within(from..from + bytes, to as usize * bytes);
        }
    }

    /// Returns a block's bytes: its layers one after another, [`KvShape::block_bytes`] in all.
    ///
    /// # Panics
    /// When it does not exist.
    pub fn export(&self, block: u32) -> Vec<u8> {
        let bytes = self.shape.layer_bytes();
        let mut out = Vec::with_capacity(self.shape.block_bytes());
        for layer in &self.layers {
            out.extend_from_slice(&layer.bytes()[block as usize * bytes..][..bytes]);
        }
        out
    }

    /// Puts a block's bytes back, as [`KvStore::export`] gave them.
    ///
    /// # Panics
    /// When the block does not exist, or it is another number of bytes.
    pub fn import(&mut self, block: u32, bytes: &[u8]) {
        let each = self.shape.layer_bytes();
        assert_eq!(bytes.len(), each * self.layers.len(), "the bytes of a block");
        for (layer, part) in self.layers.iter_mut().zip(bytes.chunks_exact(each.max(1))) {
            layer.bytes_mut()[block as usize * each..][..each].copy_from_slice(part);
        }
    }

    /// Writes the keys and values `[slots, kv_heads, head_dim]` of one layer.
    ///
    /// # Panics
    /// When a slot does not exist, or lengths don't fit.
    pub fn write(&mut self, level: Level, pool: &mut Pool, layer: usize, slots: &[Slot], keys: &[f32], values: &[f32]) {
        let level = level.checked();
        let shape = self.shape;
        let numbers = slots.len() * shape.kv_heads * shape.head_dim;
        assert!(keys.len() == numbers && values.len() == numbers, "a key and a value for each slot");
        let exists = |slot: &Slot| (slot.block as usize) < self.blocks && (slot.offset as usize) < BLOCK;
        assert!(slots.iter().all(exists), "slots of the store");
        let store = Disjoint(self.layers[layer].bytes_mut().as_mut_ptr());
        let heads = |head: usize| {
            let Disjoint(store) = &store;
            for (i, slot) in slots.iter().enumerate() {
                let at = (i * shape.kv_heads + head) * shape.head_dim;
                let place = slot.block as usize * shape.layer_bytes() + head * shape.head_bytes();
                // SAFETY: the level and all slots were checked; heads are disjoint in the store.
                unsafe {
                    let (key, value) = (keys.as_ptr().add(at), values.as_ptr().add(at));
                    put(level, &shape, store.add(place), slot.offset as usize, key, value);
                }
            }
        };
        // A few tokens are written sooner than anybody wakes up.
        if slots.len() < 8 {
            (0..shape.kv_heads).for_each(heads);
        } else {
            pool.run(shape.kv_heads, &|head, _| heads(head));
        }
    }

    /// Returns where a head's part of a block is.
    pub(crate) fn head(&self, layer: usize, block: u32, head: usize) -> &[u8] {
        let at = block as usize * self.shape.layer_bytes() + head * self.shape.head_bytes();
        &self.layers[layer].bytes()[at..][..self.shape.head_bytes()]
    }
}

impl std::fmt::Debug for KvStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KvStore of {} blocks of {:?}", self.blocks, self.shape)
    }
}

levels! {
    unsafe fn put(shape: &KvShape, head: *mut u8, offset: usize, key: *const f32, value: *const f32) = put_body
}

#[inline(always)]
unsafe fn put_body<S: Simd>(shape: &KvShape, head: *mut u8, offset: usize, key: *const f32, value: *const f32) {
    let (n, width) = (shape.head_dim, shape.width());
    for from in (0..n).step_by(LANES) {
        let count = (n - from).min(LANES);
        let mut lanes = [[0f32; LANES]; 2];
        std::ptr::copy_nonoverlapping(key.add(from), lanes[0].as_mut_ptr(), count);
        std::ptr::copy_nonoverlapping(value.add(from), lanes[1].as_mut_ptr(), count);
        let value_at = BLOCK * width + offset * width + from;
        match shape.kind {
            KvType::F32 => {
                let head: *mut f32 = head.cast();
                for i in 0..count {
                    *head.add((from + i) * BLOCK + offset) = lanes[0][i];
                }
                S::store(head.add(value_at), S::load(lanes[1].as_ptr()));
            }
            KvType::F16 => {
                let head: *mut u16 = head.cast();
                let mut halves = [0u16; LANES];
                S::store_half(halves.as_mut_ptr(), S::load(lanes[0].as_ptr()));
                for i in 0..count {
                    *head.add((from + i) * BLOCK + offset) = halves[i];
                }
                S::store_half(head.add(value_at), S::load(lanes[1].as_ptr()));
            }
        }
    }
}
