//! A byte-level BPE with the qwen2 pre-tokeniser, trained on the corpus.

use anyhow::{Result, anyhow};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, SplitDelimiterBehavior,
    TokenizerBuilder, TokenizerImpl,
};

/// The pre-tokeniser's pattern, as qwen2 and its successors have it.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Tokens in all, specials included.
pub const VOCABULARY: usize = 1536;
/// Ends a text.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// Begins a turn.
pub const TURN: &str = "<|im_start|>";
/// Ends a turn.
pub const END_OF_TURN: &str = "<|im_end|>";

/// The tokenizer's type.
pub type Bpe = TokenizerImpl<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

fn loud(error: tokenizers::Error) -> anyhow::Error {
    anyhow!("{error}")
}

/// Trains the tokenizer; the same text gives the same tokenizer.
pub fn train(text: &[String]) -> Result<Bpe> {
    let split = Split::new(SplitPattern::Regex(QWEN2.into()), SplitDelimiterBehavior::Isolated, false).map_err(loud)?;
    let bytes = ByteLevel::new(false, false, false);
    let steps = vec![PreTokenizerWrapper::Split(split), PreTokenizerWrapper::ByteLevel(bytes)];
    let mut tokenizer: Bpe = TokenizerBuilder::default()
        .with_model(BPE::default())
        .with_normalizer(None)
        .with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(Sequence::new(steps))))
        .with_post_processor(None)
        .with_decoder(Some(DecoderWrapper::ByteLevel(bytes)))
        .build()
        .map_err(loud)?;
    let specials = [END_OF_TEXT, TURN, END_OF_TURN].map(|text| AddedToken::from(text, true));
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(VOCABULARY)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(specials.to_vec())
        .build();
    tokenizer.train(&mut trainer, text.iter()).map_err(loud)?;
    Ok(tokenizer)
}

/// Tokenises an exchange as its turns: the ids, and which of them the model has to say.
pub fn exchange(tokenizer: &Bpe, turns: &[(String, String)]) -> Result<(Vec<u32>, Vec<bool>)> {
    let (mut ids, mut said) = (Vec::new(), Vec::new());
    let mut push = |text: &str, by_model: bool| -> Result<()> {
        let encoding = tokenizer.encode(text, false).map_err(loud)?;
        ids.extend_from_slice(encoding.get_ids());
        said.resize(ids.len(), by_model);
        Ok(())
    };
    for (user, model) in turns {
        push(&format!("{TURN}user\n{user}{END_OF_TURN}\n{TURN}assistant\n"), false)?;
        push(&format!("{model}{END_OF_TURN}"), true)?;
        push("\n", false)?;
    }
    Ok((ids, said))
}
