//! Byte-level BPE through the tokenizers library, with the pre-tokeniser that a GGUF names.

use std::collections::HashMap;

use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::{Piece, TYPE_CONTROL, TokenizerError};
use crate::gguf::{GgufError, Header};

const TYPE_USER: i64 = 4;

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The pre-tokenisers by the names that GGUF files use.
fn pattern(name: &str) -> Option<&'static str> {
    match name {
        "gpt-2" | "gpt2" => Some(GPT2),
        "qwen2" | "deepseek-r1-qwen" => Some(QWEN2),
        "llama-bpe" | "llama3" | "llama-v3" => Some(LLAMA3),
        _ => None,
    }
}

fn damaged(error: impl std::fmt::Display) -> TokenizerError {
    TokenizerError::Damaged(error.to_string())
}

pub(super) fn from_gguf(
    header: &Header,
    texts: &[String],
    types: &[i64],
) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let name = header.str("tokenizer.ggml.pre").unwrap_or("gpt-2");
    let unsupported = || TokenizerError::Unsupported { what: "pre-tokeniser", name: name.into() };
    let pattern = pattern(name).ok_or_else(unsupported)?;
    let key = "tokenizer.ggml.merges";
    let merges = header.strings(key).ok_or(GgufError::Metadata { key: key.into(), problem: "absent, or no list" })?;
    let merges = merges.iter().map(|merge| {
        let (left, right) = merge.split_once(' ').ok_or_else(|| damaged(format!("'{merge}' is no merge")))?;
        Ok((left.to_string(), right.to_string()))
    });
    let merges = merges.collect::<Result<Vec<_>, TokenizerError>>()?;
    let vocabulary: HashMap<String, u32> = texts.iter().cloned().zip(0u32..).collect();
    if vocabulary.len() != texts.len() {
        return Err(damaged("a token is there twice"));
    }
    let vocabulary = vocabulary.into_iter().collect::<ahash::AHashMap<_, _>>();
    let model = BPE::builder().vocab_and_merges(vocabulary, merges).build().map_err(damaged)?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    let split = Split::new(SplitPattern::Regex(pattern.into()), SplitDelimiterBehavior::Isolated, false);
    let steps = vec![
        PreTokenizerWrapper::Split(split.map_err(damaged)?),
        PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, false)),
    ];
    tokenizer.with_pre_tokenizer(Some(Sequence::new(steps)));
    let special = |kind: i64| kind == TYPE_CONTROL || kind == TYPE_USER;
    let added = texts.iter().zip(types).filter(|(_, kind)| special(**kind));
    let added = added.map(|(text, kind)| AddedToken::from(text.clone(), *kind == TYPE_CONTROL).normalized(false));
    let added: Vec<AddedToken> = added.collect();
    tokenizer.add_special_tokens(added).map_err(damaged)?;
    Ok(tokenizer)
}

/// Returns the byte that a character of the byte-level alphabet stands for (GPT-2's table).
fn byte_of(character: char) -> Option<u8> {
    let printable = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let code = character as u32;
    if code < 256 {
        return printable(code).then_some(code as u8);
    }
    // The bytes that are not printable follow each other from 256 on.
    (0..256u32).filter(|byte| !printable(*byte)).nth(code as usize - 256).map(|byte| byte as u8)
}

fn plain(text: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = text.chars().map(byte_of).collect();
    // A token outside the alphabet is spelled as it is.
    bytes.unwrap_or_else(|| text.as_bytes().to_vec())
}

pub(super) fn pieces(texts: &[String], types: &[i64]) -> Vec<Piece> {
    let piece = |(text, kind): (&String, &i64)| match *kind {
        TYPE_CONTROL => Piece { bytes: Vec::new(), control: true },
        TYPE_USER => Piece { bytes: text.as_bytes().to_vec(), control: false },
        _ => Piece { bytes: plain(text), control: false },
    };
    texts.iter().zip(types).map(piece).collect()
}
