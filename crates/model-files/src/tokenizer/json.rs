//! Tokenizers from `tokenizer.json` and `tokenizer_config.json`, through the tokenizers library.

use std::path::Path;

use serde_json::Value;

use super::{Kind, Piece, TYPE_CONTROL, Tokenizer, TokenizerError, bpe, end_tokens, spm};

/// Most bytes of a tokenizer's file.
const FILE_BYTES_MAX: u64 = 64 << 20;

fn read(path: &Path) -> Result<Vec<u8>, TokenizerError> {
    let io = |source| TokenizerError::Io { path: path.into(), source };
    let length = std::fs::metadata(path).map_err(io)?.len();
    if length > FILE_BYTES_MAX {
        return Err(io(std::io::Error::other(format!("it has {length} bytes, more than {FILE_BYTES_MAX}"))));
    }
    std::fs::read(path).map_err(io)
}

/// A special token is a text, or an object with one.
fn named<'a>(config: &'a Value, key: &str) -> Option<&'a str> {
    config[key].as_str().or(config[key]["content"].as_str())
}

impl Tokenizer {
    /// Makes the tokenizer of a folder with `tokenizer.json` and, if it is there, `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`TokenizerError`] when a file can't be read or is damaged.
    pub fn from_dir(folder: &Path) -> Result<Self, TokenizerError> {
        let bytes = read(&folder.join("tokenizer.json"))?;
        let damaged = |error: &dyn std::fmt::Display| TokenizerError::Damaged(error.to_string());
        let library = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| damaged(&error))?;
        let config_path = folder.join("tokenizer_config.json");
        let config = if config_path.exists() { read(&config_path)? } else { b"{}".to_vec() };
        let config: Value = serde_json::from_slice(&config).map_err(|error| damaged(&error))?;
        let raw: Value = serde_json::from_slice(&bytes).map_err(|error| damaged(&error))?;
        let size = library.get_vocab_size(true);
        let texts: Vec<String> = (0..size as u32).map(|id| library.id_to_token(id).unwrap_or_default()).collect();
        let mut types = vec![1i64; size];
        for (id, token) in library.get_added_tokens_decoder() {
            if let Some(kind) = types.get_mut(id as usize) {
                *kind = if token.special { TYPE_CONTROL } else { 4 };
            }
        }
        let byte_level = raw["decoder"].to_string().contains("\"ByteLevel\"");
        if !byte_level {
            let bytes = |text: &String| text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
            texts.iter().zip(&mut types).filter(|(text, _)| bytes(text)).for_each(|(_, kind)| *kind = 6);
        }
        let pieces: Vec<Piece> = if byte_level { bpe::pieces(&texts, &types) } else { spm::pieces(&texts, &types) };
        let id = |key: &str| named(&config, key).and_then(|text| library.token_to_id(text));
        let (bos, eos) = (id("bos_token"), id("eos_token"));
        let ends = end_tokens(&texts, eos.into_iter(), |id| types[id] == TYPE_CONTROL);
        let add_bos = config["add_bos_token"].as_bool().unwrap_or(!byte_level);
        let mut hash = blake3::Hasher::new();
        hash.update(&bytes).update(&[u8::from(add_bos)]);
        let fingerprint = *hash.finalize().as_bytes();
        let kind = Kind::Library(Box::new(library));
        Ok(Tokenizer { kind, texts, pieces, bos, eos, add_bos, end_tokens: ends, fingerprint })
    }
}
