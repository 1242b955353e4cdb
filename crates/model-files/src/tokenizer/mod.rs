//! Tokenizers from a GGUF's metadata or from `tokenizer.json`: byte-level BPE and SentencePiece.

mod bpe;
mod json;
mod spm;

use std::path::PathBuf;

use crate::gguf::{GgufError, Header, Value};

/// What a token adds to the output.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Its bytes; empty for control tokens.
    pub bytes: Vec<u8>,
    /// Whether it steers instead of speaking.
    pub control: bool,
}

/// Why there is no tokenizer.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The metadata lacks something.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A kind that is not supported.
    #[error("the tokenizer {what} '{name}' is not supported")]
    Unsupported {
        /// Of what.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// A file can't be read.
    #[error("{path} can't be read: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The tokenizer's data contradicts itself.
    #[error("the tokenizer is damaged: {0}")]
    Damaged(String),
    /// A text could not be tokenised.
    #[error("the text can't be tokenised: {0}")]
    Encode(String),
}

enum Kind {
    Library(Box<tokenizers::Tokenizer>),
    Spm(Box<spm::Spm>),
}

/// A tokenizer; encoding is pure and may run on any thread.
pub struct Tokenizer {
    kind: Kind,
    texts: Vec<String>,
    pieces: Vec<Piece>,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    end_tokens: Vec<u32>,
    fingerprint: [u8; 32],
}

/// Control tokens that end a turn, by the names that the vendors gave them.
const TURN_ENDS: [&str; 9] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "</s>",
    "<|return|>",
];

/// ggml's token types.
const TYPE_CONTROL: i64 = 3;

/// The token list of a GGUF.
struct Vocabulary<'a> {
    texts: &'a [String],
    types: Vec<i64>,
    scores: Vec<f32>,
}

fn vocabulary(header: &Header) -> Result<Vocabulary<'_>, TokenizerError> {
    let missing = |key: &str| GgufError::Metadata { key: key.into(), problem: "absent, or no list" };
    let texts = header.strings("tokenizer.ggml.tokens").ok_or_else(|| missing("tokenizer.ggml.tokens"))?;
    if texts.is_empty() {
        return Err(TokenizerError::Damaged("it has no tokens".into()));
    }
    let types = match header.get("tokenizer.ggml.token_type") {
        Some(Value::Integers(types)) if types.len() == texts.len() => types.clone(),
        None => vec![1; texts.len()],
        Some(_) => return Err(TokenizerError::Damaged("its token types do not fit its tokens".into())),
    };
    let scores = match header.get("tokenizer.ggml.scores") {
        Some(Value::Floats(scores)) if scores.len() == texts.len() => scores.clone(),
        None => Vec::new(),
        Some(_) => return Err(TokenizerError::Damaged("its scores do not fit its tokens".into())),
    };
    Ok(Vocabulary { texts, types, scores })
}

impl Tokenizer {
    /// Makes the tokenizer that a GGUF describes.
    ///
    /// # Errors
    /// [`TokenizerError`] when metadata is absent, damaged, or of an unsupported kind.
    pub fn from_gguf(header: &Header) -> Result<Self, TokenizerError> {
        let vocabulary = vocabulary(header)?;
        let model = header.str("tokenizer.ggml.model").unwrap_or_default();
        let (kind, pieces, add_bos) = match model {
            "gpt2" => {
                let library = bpe::from_gguf(header, vocabulary.texts, &vocabulary.types)?;
                (Kind::Library(Box::new(library)), bpe::pieces(vocabulary.texts, &vocabulary.types), false)
            }
            "llama" => {
                let spaced = header.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true);
                let spm = spm::Spm::new(vocabulary.texts, &vocabulary.types, &vocabulary.scores, spaced)?;
                (Kind::Spm(Box::new(spm)), spm::pieces(vocabulary.texts, &vocabulary.types), true)
            }
            other => return Err(TokenizerError::Unsupported { what: "model", name: other.into() }),
        };
        let texts = vocabulary.texts.to_vec();
        let known = |key: &str| header.u32(key).filter(|id| (*id as usize) < texts.len());
        let (bos, eos) = (known("tokenizer.ggml.bos_token_id"), known("tokenizer.ggml.eos_token_id"));
        let eot = known("tokenizer.ggml.eot_token_id");
        let control = |id: usize| vocabulary.types[id] == TYPE_CONTROL;
        let end_tokens = end_tokens(&texts, eos.into_iter().chain(eot), control);
        let add_bos = header.bool("tokenizer.ggml.add_bos_token").unwrap_or(add_bos);
        let merges = header.strings("tokenizer.ggml.merges").unwrap_or_default();
        let mut hash = blake3::Hasher::new();
        let settings = format!("{model} {:?} {add_bos}", header.str("tokenizer.ggml.pre"));
        for text in texts.iter().chain(merges).chain([&settings]) {
            hash.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        }
        let fingerprint = *hash.finalize().as_bytes();
        Ok(Tokenizer { kind, texts, pieces, bos, eos, add_bos, end_tokens, fingerprint })
    }

    /// Tokenises. With `add_special` the begin token comes first where the model wants one; control tokens that
    /// the text spells out are taken as such.
    ///
    /// # Errors
    /// `Encode` when the library refuses the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let mut ids: Vec<u32> = self.bos.filter(|_| add_special && self.add_bos).into_iter().collect();
        match &self.kind {
            Kind::Library(library) => {
                let encoding = library.encode_fast(text, false);
                let encoding = encoding.map_err(|error| TokenizerError::Encode(error.to_string()))?;
                ids.extend_from_slice(encoding.get_ids());
            }
            Kind::Spm(spm) => spm.encode(text, &mut ids),
        }
        Ok(ids)
    }

    /// Returns the text of tokens. Control tokens are spelled out; ids outside the vocabulary, and the space that the
    /// tokenizer put before a text, are left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        let (mut bytes, mut begins) = (Vec::new(), matches!(&self.kind, Kind::Spm(spm) if spm.spaced()));
        for id in ids {
            let Some(piece) = self.pieces.get(*id as usize) else { continue };
            if piece.control {
                bytes.extend_from_slice(self.texts[*id as usize].as_bytes());
                continue;
            }
            let shown = if begins { piece.bytes.strip_prefix(b" ") } else { None };
            bytes.extend_from_slice(shown.unwrap_or(&piece.bytes));
            begins = false;
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Returns how many tokens there are.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// Returns what each token adds to the output, in order of id.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Returns the begin token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Returns the end token.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Returns whether prompts start with the begin token.
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// Returns every token that ends an answer.
    pub fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }

    /// Returns a token as the vocabulary spells it.
    pub fn token_text(&self, id: u32) -> Option<&str> {
        self.texts.get(id as usize).map(String::as_str)
    }

    /// Returns a hash of all that decides how texts become tokens.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }
}

fn end_tokens(texts: &[String], named: impl Iterator<Item = u32>, control: impl Fn(usize) -> bool) -> Vec<u32> {
    let by_name =
        |(id, text): (usize, &String)| (TURN_ENDS.contains(&text.as_str()) && control(id)).then_some(id as u32);
    let mut ends: Vec<u32> = named.chain(texts.iter().enumerate().filter_map(by_name)).collect();
    ends.sort_unstable();
    ends.dedup();
    ends
}

#[cfg(test)]
mod tests;
