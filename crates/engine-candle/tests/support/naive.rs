//! The decoder once more, as plain loops in f64 over one sequence, without a cache: written from the papers' formulas and
//! sharing nothing with the engine.

use super::model::Model;

/// Returns the logits after every token.
pub fn forward(model: &Model, tokens: &[u32]) -> Vec<Vec<f32>> {
    let hidden = model.shape.hidden;
    let table = &model.weights["token_embd.weight"];
    let row = |token: &u32| table[*token as usize * hidden..][..hidden].iter().map(|n| f64::from(*n)).collect();
    let mut states: Vec<Vec<f64>> = tokens.iter().map(row).collect();
    for layer in 0..model.shape.layers {
        let attended = attention(model, layer, &states);
        for (state, change) in states.iter_mut().zip(&attended) {
            add(state, change);
            let change = feed_forward(model, layer, state);
            add(state, &change);
        }
    }
    let output = if model.shape.tied { "token_embd" } else { "output" };
    let logits = |state: &Vec<f64>| linear(model, output, &norm(model, "output_norm", state));
    states.iter().map(|state| logits(state).iter().map(|n| *n as f32).collect()).collect()
}

fn add(state: &mut [f64], change: &[f64]) {
    state.iter_mut().zip(change).for_each(|(s, c)| *s += c);
}

fn linear(model: &Model, name: &str, x: &[f64]) -> Vec<f64> {
    let rows = model.weights[&format!("{name}.weight")].chunks_exact(x.len());
    rows.map(|row| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()).collect()
}

fn norm(model: &Model, name: &str, x: &[f64]) -> Vec<f64> {
    let mean = x.iter().map(|n| n * n).sum::<f64>() / x.len() as f64;
    let weights = &model.weights[&format!("{name}.weight")];
    x.iter().zip(weights).map(|(n, w)| n / (mean + 1e-6).sqrt() * f64::from(*w)).collect()
}

fn rotate(model: &Model, head: &mut [f64], position: usize) {
    let shape = &model.shape;
    let half = head.len() / 2;
    for i in 0..half {
        let mut angle = position as f64 / f64::from(shape.rope_base).powf(2.0 * i as f64 / head.len() as f64);
        angle /= f64::from(shape.linear_factor.unwrap_or(1.0));
        if let Some(divisors) = model.weights.get("rope_freqs.weight") {
            angle /= f64::from(divisors[i]);
        }
        let (a, b) = if shape.family == "qwen3" { (i, i + half) } else { (2 * i, 2 * i + 1) };
        let (x, y) = (head[a], head[b]);
        head[a] = x * angle.cos() - y * angle.sin();
        head[b] = x * angle.sin() + y * angle.cos();
    }
}

fn attention(model: &Model, layer: usize, states: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let shape = &model.shape;
    let size = shape.head_dim;
    let name = |part: &str| format!("blk.{layer}.{part}");
    let heads = |part: &str, x: &[f64], position: Option<usize>| -> Vec<Vec<f64>> {
        let whole = linear(model, &name(part), x);
        let split = whole.chunks_exact(size).map(|head| {
            let mut head = head.to_vec();
            if let Some(position) = position {
                if shape.qk_norm() {
                    head = norm(model, &name(&format!("{part}_norm")), &head);
                }
                rotate(model, &mut head, position);
            }
            head
        });
        split.collect()
    };
    let (mut keys, mut values, mut out) = (Vec::new(), Vec::new(), Vec::new());
    for (position, state) in states.iter().enumerate() {
        let x = norm(model, &name("attn_norm"), state);
        keys.push(heads("attn_k", &x, Some(position)));
        values.push(heads("attn_v", &x, None));
        let mut mixed = Vec::new();
        for (head, query) in heads("attn_q", &x, Some(position)).iter().enumerate() {
            let group = head / (shape.heads / shape.kv_heads);
            let dot = |key: &Vec<Vec<f64>>| key[group].iter().zip(query).map(|(k, q)| k * q).sum::<f64>();
            let scores: Vec<f64> = keys.iter().map(|key| dot(key) / (size as f64).sqrt()).collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|score| (score - top).exp()).sum();
            for i in 0..size {
                let parts = scores.iter().zip(&values).map(|(score, value)| (score - top).exp() * value[group][i]);
                mixed.push(parts.sum::<f64>() / total);
            }
        }
        out.push(linear(model, &name("attn_output"), &mixed));
    }
    out
}

fn feed_forward(model: &Model, layer: usize, state: &[f64]) -> Vec<f64> {
    let name = |part: &str| format!("blk.{layer}.{part}");
    let x = norm(model, &name("ffn_norm"), state);
    let gate = linear(model, &name("ffn_gate"), &x);
    let up = linear(model, &name("ffn_up"), &x);
    let gated: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
    linear(model, &name("ffn_down"), &gated)
}
