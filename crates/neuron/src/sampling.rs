//! Sampling resolves once: request, then the model's generation defaults, then the fallback.

use inference::sampling::Sampling;
use wire::generation::Generation;
use wire::private::ResolvedSampling;

/// What is said of a model's generation: by its operator, else by its files.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Defaults {
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) top_k: Option<u32>,
    pub(crate) min_p: Option<f32>,
    pub(crate) presence: Option<f32>,
    pub(crate) frequency: Option<f32>,
    pub(crate) repetition: Option<f32>,
    pub(crate) max_tokens: Option<u32>,
}

/// Folds the three layers. `room` is what the context leaves for the answer; `fallback_max` of 0 means all of it.
pub(crate) fn resolve(
    request: &Generation,
    defaults: &Defaults,
    seed: u64,
    fallback_max: u32,
    room: u32,
) -> ResolvedSampling {
    let fallback_max = if fallback_max == 0 { room } else { fallback_max };
    ResolvedSampling {
        temperature: request.temperature.or(defaults.temperature).unwrap_or(1.0).clamp(0.0, 2.0),
        top_p: request.top_p.or(defaults.top_p).unwrap_or(1.0).clamp(f32::MIN_POSITIVE, 1.0),
        top_k: request.top_k.or(defaults.top_k).unwrap_or(0),
        min_p: request.min_p.or(defaults.min_p).unwrap_or(0.0).clamp(0.0, 1.0),
        seed: request.seed.unwrap_or(seed),
        max_tokens: request.max_tokens.or(defaults.max_tokens).unwrap_or(fallback_max).min(room).max(1),
        presence: request.shaping.presence.or(defaults.presence).unwrap_or(0.0),
        frequency: request.shaping.frequency.or(defaults.frequency).unwrap_or(0.0),
        repetition: request.shaping.repetition.or(defaults.repetition).unwrap_or(1.0),
        min_tokens: request.shaping.min_tokens,
    }
}

/// Returns the scheduler's form.
pub(crate) fn scheduled(resolved: &ResolvedSampling) -> Sampling {
    Sampling {
        temperature: resolved.temperature,
        top_p: resolved.top_p,
        top_k: resolved.top_k,
        min_p: resolved.min_p,
        seed: resolved.seed,
        presence: resolved.presence,
        frequency: resolved.frequency,
        repetition: resolved.repetition,
        min_tokens: resolved.min_tokens,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use wire::chat::ChatRequest;

    use super::*;

    #[test]
    fn the_request_wins_then_the_model_then_the_fallback() {
        let request = |extra: &str| {
            let body = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"x"}}]{extra}}}"#);
            ChatRequest::parse(body.as_bytes()).unwrap().generation
        };
        let model = Defaults { temperature: Some(0.6), top_k: Some(20), ..Defaults::default() };
        let bare = resolve(&request(""), &model, 5, 0, 100);
        assert_eq!((bare.temperature, bare.top_k, bare.top_p, bare.seed, bare.max_tokens), (0.6, 20, 1.0, 5, 100));
        let full = resolve(&request(r#","temperature":0,"top_k":1,"seed":8,"max_tokens":7"#), &model, 5, 0, 100);
        assert_eq!((full.temperature, full.top_k, full.seed, full.max_tokens), (0.0, 1, 8, 7));
        assert_eq!(resolve(&request(""), &model, 5, 30, 100).max_tokens, 30);
        assert_eq!(resolve(&request(r#","max_tokens":700"#), &model, 5, 30, 100).max_tokens, 100);
    }
}
