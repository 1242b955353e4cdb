//! What the model knows: the share of questions that greedy decoding answers exactly.

use std::path::Path;

use anyhow::Result;
use candle_core::{Device, Tensor};

use crate::corpus::{Corpus, Dialogue};
use crate::model::{Model, Weights, rounded};
use crate::tokenizer::{Bpe, exchange, train as train_tokenizer};

/// Answers that greedy decoding gives exactly, and all there are.
///
/// An answer is exact when at each of its tokens the likeliest one is the written one, given the ones before:
/// greedy decoding then says just that.
pub fn exact(weights: &Weights, tokenizer: &Bpe, exchanges: &[Dialogue]) -> Result<(usize, usize)> {
    let mut right = 0;
    for turns in exchanges {
        let (ids, said) = exchange(tokenizer, turns)?;
        let model = Model::new(weights, ids.len())?;
        let input = Tensor::from_slice(&ids[..ids.len() - 1], (1, ids.len() - 1), &Device::Cpu)?;
        let best: Vec<u32> = model.forward(&input)?.argmax(2)?.flatten_all()?.to_vec1()?;
        let wrong = (1..ids.len()).filter(|i| said[*i] && best[i - 1] != ids[*i]).count();
        right += usize::from(wrong == 0);
    }
    Ok((right, exchanges.len()))
}

/// Returns the held-out questions with their answers.
pub fn unseen(corpus: &Corpus) -> Vec<Dialogue> {
    let pairs = corpus.questions.iter().flat_map(|q| q.unseen.iter().map(|asked| (asked.clone(), q.answer.clone())));
    pairs.map(|pair| vec![pair]).collect()
}

/// Prints both scores of a checkpoint, after rounding to f16.
pub fn run(home: &Path, checkpoint: &Path) -> Result<()> {
    let corpus = Corpus::read(home)?;
    let tokenizer = train_tokenizer(&corpus.text())?;
    let weights = rounded(&candle_core::safetensors::load(checkpoint, &Device::Cpu)?)?;
    let (right, all) = exact(&weights, &tokenizer, &corpus.exchanges())?;
    println!("trained exchanges answered exactly: {right} of {all}");
    let (right, all) = exact(&weights, &tokenizer, &unseen(&corpus))?;
    println!("unseen paraphrases answered exactly: {right} of {all}");
    Ok(())
}
