//! What the tests of this crate share: vocabularies, noise, a speaker that says what a grammar lets through.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use grammar::{Compiled, Limits, Vocabulary};
use inference::TokenBytes;
use inference::constraint::{Grammar, Mask, Violation};
use model_files::tokenizer::Tokenizer;

/// Counter-based noise (SplitMix64).
pub struct Noise(pub u64);

impl Noise {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }
}

pub fn shared(name: &str) -> Option<PathBuf> {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data")).join(name);
    if path.exists() {
        return Some(path);
    }
    assert!(std::env::var("CORTEX_TEST_DATA").as_deref() != Ok("required"), "{name} is missing");
    eprintln!("SKIPPED: {name} is not beside this checkout");
    None
}

/// The vocabulary of the tokenizer in `folder`, and who speaks it.
pub fn vocabulary(folder: &str) -> Option<(Vocabulary, Speaker)> {
    let tokenizer = Tokenizer::from_dir(&shared(folder)?).unwrap();
    let table = TokenBytes::new(tokenizer.pieces().iter().map(|piece| &piece.bytes));
    let begun = computed();
    let vocabulary = Vocabulary::new(&table, Limits::default()).unwrap();
    eprintln!("{folder}: the tree of {} tokens took {:?}", table.len(), computed() - begun);
    Some((vocabulary, Speaker::new(table)))
}

/// One byte a token, and a token without text.
pub fn bytes() -> (Vocabulary, Speaker) {
    let table = inference::fake_token_bytes();
    (Vocabulary::new(&table, Limits::default()).unwrap(), Speaker::new(table))
}

/// What was said, and how.
#[derive(Debug, Default)]
pub struct Said {
    pub text: Vec<u8>,
    /// Whether it ended; otherwise it was cut.
    pub ended: bool,
    pub tokens: usize,
    /// How long the matcher took to open, by the clock.
    pub opening: Duration,
    /// How long each mask took, by the clock.
    pub masks: Vec<Duration>,
    /// How long the slowest one computed, as far as the system tells.
    pub slowest: Duration,
}

/// Says what random logits would have a model say, as far as grammars let it.
pub struct Speaker {
    table: TokenBytes,
    /// Tokens that bring the end of an answer nearer, the best first.
    closers: [Vec<u32>; 3],
}

impl Speaker {
    pub fn new(table: TokenBytes) -> Self {
        let mut closers = [Vec::new(), Vec::new(), Vec::new()];
        for id in 0..table.len() as u32 {
            match table.get(id) {
                [b'"' | b'}' | b']'] => closers[0].push(id),
                [b'"' | b'}' | b']', ..] => closers[1].push(id),
                [b',' | b'0'..=b'9' | b'-'] => closers[2].push(id),
                _ => {}
            }
        }
        Speaker { table, closers }
    }

    /// The likeliest token of random logits is any of them.
    fn any(&self, mask: &Mask, noise: &mut Noise) -> Option<u32> {
        let size = self.table.len();
        let tried = (0..64).map(|_| noise.below(size) as u32).find(|id| mask.allows(*id));
        let from = noise.below(size) as u32;
        let after = || (from..size as u32).find(|id| mask.allows(*id));
        tried.or_else(after).or_else(|| mask.first())
    }

    fn closer(&self, mask: &Mask, noise: &mut Noise) -> Option<u32> {
        self.closers.iter().find_map(|ids| {
            let from = noise.below(ids.len());
            ids[from..].iter().chain(&ids[..from]).copied().find(|id| mask.allows(*id))
        })
    }

    /// Says one answer of at most `most` tokens. After `patience` tokens it longs for the end, and takes it where it
    /// can.
    pub fn speak(&self, grammar: &Compiled, seed: u64, patience: usize, most: usize) -> Result<Said, Violation> {
        let mut noise = Noise(seed);
        let begun = Instant::now();
        let mut matcher = grammar.open()?;
        let mut said = Said { opening: begun.elapsed(), ..Said::default() };
        while said.tokens < most {
            let begun = (Instant::now(), computed());
            let mask = matcher.mask()?;
            said.masks.push(begun.0.elapsed());
            said.slowest = said.slowest.max(computed() - begun.1);
            let tired = said.tokens >= patience;
            let may_end = matcher.may_end()?;
            assert!(may_end || !matcher.is_over(), "what is over is whole");
            if matcher.is_over() || may_end && (tired || noise.chance(20)) {
                said.ended = true;
                return Ok(said);
            }
            let closer = if tired { self.closer(&mask, &mut noise) } else { None };
            let Some(id) = closer.or_else(|| self.any(&mask, &mut noise)) else {
                said.ended = may_end;
                return if may_end { Ok(said) } else { Err(Violation::DeadEnd) };
            };
            matcher.accept(id)?;
            said.text.extend_from_slice(self.table.get(id));
            said.tokens += 1;
        }
        Ok(said)
    }
}

/// How long this thread has computed, where the system tells; else the time that passed.
pub fn computed() -> Duration {
    static BEGUN: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    let told = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanos = told.and_then(|text| text.split_whitespace().next()?.parse().ok()).map(Duration::from_nanos);
    nanos.unwrap_or_else(|| BEGUN.get_or_init(Instant::now).elapsed())
}
