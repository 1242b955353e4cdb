//! Training: AdamW with warm-up and cosine decay, loss on what the model has to say.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::corpus::Corpus;
use crate::model::{Model, Weights, initial};
use crate::score;
use crate::tokenizer::{VOCABULARY, exchange, train as train_tokenizer};

/// Steps of a whole training.
pub const STEPS: usize = 1600;
const BATCH: usize = 16;
const RATE: f64 = 3e-3;
const WARM_UP: usize = 80;
const SEED: u64 = 1;

struct Sample {
    ids: Vec<u32>,
    said: Vec<bool>,
}

fn rate(step: usize, steps: usize) -> f64 {
    if step < WARM_UP {
        return RATE * (step + 1) as f64 / WARM_UP as f64;
    }
    let progress = (step - WARM_UP) as f64 / steps.saturating_sub(WARM_UP).max(1) as f64;
    RATE * (0.02 + 0.98 * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()))
}

/// Returns the mean loss over the tokens that the model has to say.
fn loss(weights: &Weights, batch: &[&Sample]) -> Result<Tensor> {
    let length = batch.iter().map(|sample| sample.ids.len()).max().unwrap_or(2) - 1;
    let mut input = vec![0u32; batch.len() * length];
    let (mut rows, mut targets) = (Vec::new(), Vec::new());
    for (b, sample) in batch.iter().enumerate() {
        for i in 0..sample.ids.len() - 1 {
            input[b * length + i] = sample.ids[i];
            if sample.said[i + 1] {
                rows.push((b * length + i) as u32);
                targets.push(sample.ids[i + 1]);
            }
        }
    }
    let input = Tensor::from_vec(input, (batch.len(), length), &Device::Cpu)?;
    let logits = Model::new(weights, length)?.forward(&input)?.flatten(0, 1)?;
    let count = rows.len();
    let logits = logits.index_select(&Tensor::from_vec(rows, count, &Device::Cpu)?, 0)?;
    Ok(candle_nn::loss::cross_entropy(&logits, &Tensor::from_vec(targets, count, &Device::Cpu)?)?)
}

/// Trains and writes the checkpoint (safetensors, f32, GGUF names); prints the loss and both scores.
pub fn run(home: &Path, checkpoint: &Path, steps: usize) -> Result<()> {
    let corpus = Corpus::read(home)?;
    let tokenizer = train_tokenizer(&corpus.text())?;
    let samples = corpus.exchanges().into_iter().map(|turns| {
        let (ids, said) = exchange(&tokenizer, &turns)?;
        Ok(Sample { ids, said })
    });
    let mut samples = samples.collect::<Result<Vec<_>>>()?;
    let vars = initial(VOCABULARY, SEED)?;
    let parameters: usize = vars.values().map(|var| var.elem_count()).sum();
    println!("{} exchanges, {parameters} parameters", samples.len());
    let mut named: Vec<_> = vars.iter().collect();
    // The optimiser's order must not depend on the map's.
    named.sort_by(|a, b| a.0.cmp(b.0));
    let settings = ParamsAdamW { lr: RATE, weight_decay: 0.01, beta2: 0.98, ..ParamsAdamW::default() };
    let mut optimizer = AdamW::new(named.iter().map(|(_, var)| (*var).clone()).collect(), settings)?;
    let weights: Weights = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    let mut rng = StdRng::seed_from_u64(SEED);
    let begun = Instant::now();
    let mut next = samples.len();
    for step in 0..steps {
        if next + BATCH > samples.len() {
            samples.shuffle(&mut rng);
            next = 0;
        }
        let batch: Vec<&Sample> = samples[next..next + BATCH].iter().collect();
        next += BATCH;
        optimizer.set_learning_rate(rate(step, steps));
        let loss = loss(&weights, &batch)?;
        optimizer.backward_step(&loss)?;
        if step % 50 == 0 || step + 1 == steps {
            println!("step {step} loss {:.4} {:.0} s", loss.to_scalar::<f32>()?, begun.elapsed().as_secs_f64());
        }
    }
    candle_core::safetensors::save(&weights, checkpoint)?;
    score::run(home, checkpoint)
}
