//! A model's tokens, in the form that masks are computed from.

use std::sync::Arc;

use inference::TokenBytes;
use llguidance::ParserFactory;
use llguidance::api::ParserLimits;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use words::Error;

use crate::Limits;

/// Longest token that a constrained answer may have, in bytes.
const TOKEN_BYTES_MAX: usize = 512;
/// Most tokens of a vocabulary.
const TOKENS_MAX: usize = 1 << 22;
/// No text has this byte; llguidance marks special tokens by it.
const MARKER: u8 = 0xff;

/// The tokens of one model, as a tree of their bytes. Built once a model and shared by all its grammars: it takes some
/// hundred milliseconds and about a hundred bytes a token.
pub struct Vocabulary {
    pub(crate) factory: ParserFactory,
    pub(crate) limits: Limits,
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vocabulary").field("tokens", &self.factory.tok_env().tok_trie().vocab_size()).finish()
    }
}

impl Vocabulary {
    /// Makes the tree. Tokens without bytes, those that no text can have, and those of more than 512 bytes never come
    /// in a constrained answer.
    ///
    /// # Errors
    /// `Internal` when the table has no tokens, or more than four million.
    pub fn new(table: &TokenBytes, limits: Limits) -> Result<Self, Error> {
        if table.is_empty() || table.len() > TOKENS_MAX {
            return Err(Error::internal(format!("a vocabulary of {} tokens can't be constrained", table.len())));
        }
        let word = |id| match table.get(id) {
            bytes if bytes.contains(&MARKER) || bytes.len() > TOKEN_BYTES_MAX => Vec::new(),
            bytes => bytes.to_vec(),
        };
        let words: Vec<Vec<u8>> = (0..table.len() as u32).map(word).collect();
        // The end of an answer is the scheduler's to decide.
        let info = TokRxInfo::new(words.len() as u32, INVALID_TOKEN);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
        let slices = SlicedBiasComputer::general_slices();
        let capabilities = InferenceCapabilities::default();
        let mut factory = ParserFactory::new(&environment, capabilities, &slices)
            .map_err(|error| Error::internal(error.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            initial_lexer_fuel: limits.lexer_fuel,
            step_lexer_fuel: limits.mask_fuel,
            step_max_items: limits.mask_items,
            max_lexer_states: limits.lexer_states,
            max_grammar_size: limits.grammar_size,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Vocabulary { factory, limits })
    }
}
