//! The definition of sampling: `sample(logits, state, seed, choice, index)`.
//!
//! Random numbers are counter-based: the draw for a token depends on (seed, choice, index) and on nothing that
//! happened before, so a stream resumed on another worker draws the same numbers. Penalties are a function of the tokens
//! so far, which a resume has too.

use std::collections::BTreeMap;

use crate::request::Score;

/// How the next token is chosen. Filters apply in this order: temperature, top-k, top-p, min-p.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy; above 0 the logits are divided by it. Finite, 0 to 2.
    pub temperature: f32,
    /// Nucleus mass, above 0 up to 1; 1 keeps everything.
    pub top_p: f32,
    /// Most candidates kept; 0 keeps everything.
    pub top_k: u32,
    /// Least probability relative to the likeliest candidate, 0 to 1; 0 keeps everything.
    pub min_p: f32,
    /// Seeds the counter-based draws.
    pub seed: u64,
    /// Taken off the logit of each token that was generated, -2 to 2.
    pub presence: f32,
    /// Taken off it once for each time that it was, -2 to 2.
    pub frequency: f32,
    /// Divides positive logits of tokens of prompt and answer, and multiplies negative ones; 1 changes nothing.
    pub repetition: f32,
    /// Tokens before which no token may end the answer.
    pub min_tokens: u32,
}

impl Sampling {
    /// Greedy decoding: the likeliest token, the lowest id on a tie.
    pub const GREEDY: Sampling = Sampling {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        seed: 0,
        presence: 0.0,
        frequency: 0.0,
        repetition: 1.0,
        min_tokens: 0,
    };
}

/// What a token's logits depend on beside the model.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The prompt.
    pub prompt: &'a [u32],
    /// The answer so far.
    pub said: &'a [u32],
    /// Added to the logits of these tokens.
    pub bias: &'a [(u32, f32)],
    /// Tokens that end an answer.
    pub ends: &'a [u32],
}

/// Changes logits as `sampling` and `context` say, with vLLM's meanings and in its order: bias, tokens that may not come
/// yet, repetition over prompt and answer, then frequency and presence over the answer. Ids outside `logits` are skipped.
pub fn shape(logits: &mut [f32], sampling: &Sampling, context: &Context<'_>) {
    for (id, bias) in context.bias {
        if let Some(logit) = logits.get_mut(*id as usize) {
            *logit += bias;
        }
    }
    if context.said.len() < sampling.min_tokens as usize {
        for id in context.ends {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    let repeats = sampling.repetition != 1.0;
    if !repeats && sampling.presence == 0.0 && sampling.frequency == 0.0 {
        return;
    }
    let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
    for id in context.prompt.iter().filter(|_| repeats) {
        counts.entry(*id).or_default();
    }
    for id in context.said {
        *counts.entry(*id).or_default() += 1;
    }
    for (id, count) in counts {
        let Some(logit) = logits.get_mut(id as usize) else { continue };
        *logit = if *logit > 0.0 { *logit / sampling.repetition } else { *logit * sampling.repetition };
        if count > 0 {
            *logit -= sampling.frequency * count as f32 + sampling.presence;
        }
    }
}

/// Whether [`shape`] may change anything.
pub fn shapes(sampling: &Sampling, context: &Context<'_>) -> bool {
    let penalties = sampling.repetition != 1.0 || sampling.presence != 0.0 || sampling.frequency != 0.0;
    penalties || !context.bias.is_empty() || context.said.len() < sampling.min_tokens as usize
}

/// Draws a number in `[0, 1)` from (seed, choice, index).
///
/// Three rounds of the SplitMix64 finaliser (Steele, Lea, Flood 2014), one a word of the counter.
pub fn uniform(seed: u64, choice: u32, index: u32) -> f64 {
    fn mix(mut z: u64) -> u64 {
        z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    let bits = mix(mix(mix(seed) ^ u64::from(choice)) ^ (u64::from(index) << 1 | 1));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// The least log-probability that is told, also of what is impossible: JSON knows no infinity, and OpenAI says so too.
pub const LOGPROB_MIN: f32 = -9999.0;

/// Says how likely `id` was, and the `top` likeliest tokens: the log-softmax of `logits`, of which NaN is impossible.
pub fn score(logits: &[f32], id: u32, top: usize) -> Score {
    let highest = logits.iter().fold(f32::NEG_INFINITY, |highest, logit| highest.max(*logit));
    let total: f64 = logits.iter().filter(|l| !l.is_nan()).map(|logit| f64::from(logit - highest).exp()).sum();
    let logprob = |logit: f32| ((f64::from(logit - highest) - total.ln()) as f32).max(LOGPROB_MIN);
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(top + 1);
    for (id, &logit) in (0u32..).zip(logits) {
        if logit.is_nan() || best.len() == top && best.last().is_none_or(|(_, least)| logit <= *least) {
            continue;
        }
        let place = best.partition_point(|(_, other)| *other >= logit);
        best.insert(place, (id, logit));
        best.truncate(top);
    }
    let own = logits.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY);
    Score { logprob: logprob(own), top: best.into_iter().map(|(id, logit)| (id, logprob(logit))).collect() }
}

/// Returns the likeliest token, the lowest id on a tie; NaN never wins.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, &logit) in logits.iter().enumerate() {
        if logit > best.1 {
            best = (id, logit);
        }
    }
    best.0 as u32
}

/// Chooses the token at `index` of `choice`.
///
/// A pure function: equal arguments give equal tokens on every machine that has IEEE 754 `exp` of the same
/// library; candidates of equal logit are ordered by id.
pub fn sample(logits: &[f32], sampling: &Sampling, choice: u32, index: u32) -> u32 {
    if sampling.temperature <= 0.0 || sampling.top_k == 1 {
        return argmax(logits);
    }
    let mut candidates: Vec<(u32, f32)> =
        logits.iter().enumerate().filter(|(_, l)| **l > f32::NEG_INFINITY).map(|(i, l)| (i as u32, *l)).collect();
    if candidates.is_empty() {
        return argmax(logits);
    }
    let by_rank = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let keep = sampling.top_k as usize;
    if keep > 0 && keep < candidates.len() {
        candidates.select_nth_unstable_by(keep - 1, by_rank);
        candidates.truncate(keep);
    }
    candidates.sort_unstable_by(by_rank);

    let top = candidates[0].1;
    let temperature = f64::from(sampling.temperature);
    let weights: Vec<f64> = candidates.iter().map(|(_, l)| (f64::from(l - top) / temperature).exp()).collect();
    let mut kept = weights.len();
    if sampling.top_p < 1.0 {
        let wanted = f64::from(sampling.top_p) * weights.iter().sum::<f64>();
        let mut mass = 0.0;
        for (i, weight) in weights.iter().enumerate() {
            mass += weight;
            if mass >= wanted {
                kept = i + 1;
                break;
            }
        }
    }
    if sampling.min_p > 0.0 {
        // The likeliest candidate has weight 1, so weights are already relative to it.
        let floor = f64::from(sampling.min_p);
        kept = kept.min(weights.iter().take_while(|w| **w >= floor).count().max(1));
    }
    let total: f64 = weights[..kept].iter().sum();
    let mut left = uniform(sampling.seed, choice, index) * total;
    for (candidate, weight) in candidates[..kept].iter().zip(&weights) {
        left -= weight;
        if left < 0.0 {
            return candidate.0;
        }
    }
    candidates[kept - 1].0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits() -> Vec<f32> {
        vec![1.0, 3.0, 2.0, 3.0, f32::NEG_INFINITY, 0.0]
    }

    #[test]
    fn a_score_is_the_log_softmax_and_its_top_falls_with_the_lower_id_first() {
        let score = super::score(&logits(), 2, 3);
        let total: f64 = [1.0, 3.0, 2.0, 3.0, 0.0f64].iter().map(|logit| logit.exp()).sum();
        let logprob = |logit: f64| (logit - total.ln()) as f32;
        let near = |a: f32, b: f32| (a - b).abs() < 1e-6;
        assert!(near(score.logprob, logprob(2.0)), "{score:?}");
        assert_eq!(score.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3, 2]);
        assert!(near(score.top[0].1, logprob(3.0)) && score.top[2].1 == score.logprob);
        assert_eq!(super::score(&logits(), 4, 0), Score { logprob: LOGPROB_MIN, top: vec![] });
        assert_eq!(super::score(&[f32::NAN, 0.0], 0, 9).top, [(1, 0.0)]);
        assert_eq!(super::score(&[f32::NAN], 0, 1), Score { logprob: LOGPROB_MIN, top: vec![] });
    }

    #[test]
    fn greedy_takes_the_lowest_id_on_a_tie() {
        assert_eq!(sample(&logits(), &Sampling::GREEDY, 0, 0), 1);
        assert_eq!(argmax(&[f32::NAN, 1.0]), 1);
    }

    #[test]
    fn draws_depend_on_seed_choice_and_index_only() {
        let warm = Sampling { temperature: 1.0, seed: 7, ..Sampling::GREEDY };
        let run = |order: &[u32]| {
            let mut got: Vec<(u32, u32)> = order.iter().map(|i| (*i, sample(&logits(), &warm, 0, *i))).collect();
            got.sort_unstable();
            got
        };
        let forward: Vec<u32> = (0..64).collect();
        let backward: Vec<u32> = (0..64).rev().collect();
        assert_eq!(run(&forward), run(&backward));
        let other: Vec<u32> = (0..64).map(|i| sample(&logits(), &warm, 1, i)).collect();
        assert_ne!(run(&forward).into_iter().map(|(_, t)| t).collect::<Vec<_>>(), other);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let warm = Sampling { temperature: 1.0, seed: 1, ..Sampling::GREEDY };
        let flat = [0.0f32, (3.0f32).ln()];
        let ones = (0..20_000).filter(|i| sample(&flat, &warm, 0, *i) == 1).count();
        assert!((14_700..15_300).contains(&ones), "3:1 odds gave {ones} of 20000");
    }

    #[test]
    fn penalties_bias_and_least_lengths_are_what_vllm_says_they_are() {
        let context = Context { prompt: &[2, 9], said: &[1, 1, 5], bias: &[(0, 4.5), (77, 1.0)], ends: &[3] };
        let shaped = |sampling: Sampling| {
            let mut logits = vec![1.0, 3.0, 2.0, 3.0, f32::NEG_INFINITY, -1.0];
            shape(&mut logits, &sampling, &context);
            logits
        };
        let none = f32::NEG_INFINITY;
        assert_eq!(shaped(Sampling::GREEDY), [5.5, 3.0, 2.0, 3.0, none, -1.0]);
        let counted = Sampling { presence: 0.5, frequency: 0.25, ..Sampling::GREEDY };
        assert_eq!(shaped(counted), [5.5, 2.0, 2.0, 3.0, none, -1.75]);
        let repeated = Sampling { repetition: 2.0, min_tokens: 4, ..Sampling::GREEDY };
        assert_eq!(shaped(repeated), [5.5, 1.5, 1.0, none, none, -2.0]);
        assert_eq!(shaped(Sampling { min_tokens: 3, ..Sampling::GREEDY })[3], 3.0);
        let plain = Context { bias: &[], ..context };
        assert!(!shapes(&Sampling::GREEDY, &plain) && shapes(&Sampling::GREEDY, &context));
    }

    #[test]
    fn filters_keep_what_they_promise() {
        let base = Sampling { temperature: 1.0, seed: 3, ..Sampling::GREEDY };
        let seen = |s: Sampling| {
            let mut ids: Vec<u32> = (0..2_000).map(|i| sample(&logits(), &s, 0, i)).collect();
            ids.sort_unstable();
            ids.dedup();
            ids
        };
        assert_eq!(seen(base), [0, 1, 2, 3, 5]);
        assert_eq!(seen(Sampling { top_k: 2, ..base }), [1, 3]);
        assert_eq!(seen(Sampling { top_p: 0.5, ..base }), [1, 3]);
        assert_eq!(seen(Sampling { min_p: 0.3, ..base }), [1, 2, 3]);
    }
}
