//! What an answer may say: a grammar opens one matcher a choice, and the matcher says which tokens may come next.
//!
//! The rules, where a constraint meets the other things that decide a token:
//! - The mask comes last, after bias and penalties: they choose among the tokens that may come and never add one.
//! - A token that ends answers may come where the grammar may end, or where its text is allowed like any other's.
//! - Where the grammar can't go on, the choice ends as `stop`, whatever `min_tokens` and `ignore_eos` say.
//! - A stop string, or `max_tokens`, ends the choice wherever the grammar is.

use std::fmt;

use words::{Code, Error};

/// A grammar, compiled for one vocabulary.
pub trait Grammar: Send + Sync + fmt::Debug {
    /// Opens a matcher at the grammar's start.
    ///
    /// # Errors
    /// [`Violation`] when it can't be opened.
    fn open(&self) -> Result<Box<dyn Matcher>, Violation>;
}

/// Follows one choice through its grammar. After an error it is not asked again.
pub trait Matcher: Send {
    /// Returns the tokens that may come next as text; none where the grammar can't go on.
    ///
    /// # Errors
    /// [`Violation::TooComplex`] when that takes more than its bound.
    fn mask(&mut self) -> Result<Mask, Violation>;

    /// Takes the next token of the answer.
    ///
    /// # Errors
    /// [`Violation::Foreign`] when the token may not come here, or another violation.
    fn accept(&mut self, id: u32) -> Result<(), Violation>;

    /// Returns whether the answer may end here.
    ///
    /// # Errors
    /// [`Violation`] when the grammar can't tell.
    fn may_end(&mut self) -> Result<bool, Violation>;

    /// Returns whether the answer is whole and no token can follow.
    fn is_over(&self) -> bool;
}

/// Why a constraint can't be kept. It ends the request, and no other one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// Following the grammar takes more work or memory than one request may.
    TooComplex,
    /// No token of the vocabulary can go on, and the answer may not end.
    DeadEnd,
    /// The token may not come here.
    Foreign(u32),
    /// A fault of the matcher.
    Broken(String),
}

impl Violation {
    /// Returns what a client hears of it.
    pub fn told(&self) -> (Code, &'static str) {
        match self {
            Violation::TooComplex => (
                Code::InvalidRequest,
                "the answer's format became too complex to follow; simplify its schema or grammar",
            ),
            Violation::DeadEnd => (Code::InvalidRequest, "no token of the model can go on in the answer's format"),
            Violation::Foreign(_) => (Code::ResumeMismatch, "what an earlier attempt said does not fit the format"),
            Violation::Broken(_) => (Code::Internal, "the answer's format could not be followed"),
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::Foreign(id) => write!(f, "token {id} does not fit the grammar"),
            Violation::Broken(what) => write!(f, "the matcher failed: {what}"),
            Violation::TooComplex | Violation::DeadEnd => f.write_str(self.told().1),
        }
    }
}

impl std::error::Error for Violation {}

impl From<Violation> for Error {
    fn from(violation: Violation) -> Self {
        let (code, message) = violation.told();
        Error::new(code, message).because(violation)
    }
}

/// A set of tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mask {
    /// Bit `id % 32` of word `id / 32`.
    words: Vec<u32>,
}

impl Mask {
    /// Makes a mask of the words that hold token `id` at bit `id % 32` of word `id / 32`.
    pub fn new(words: Vec<u32>) -> Self {
        Mask { words }
    }

    /// Whether the token is in the set; ids past the words are not.
    pub fn allows(&self, id: u32) -> bool {
        self.words.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
    }

    /// Adds a token.
    pub fn allow(&mut self, id: u32) {
        let word = id as usize / 32;
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (id % 32);
    }

    /// Lists the tokens of the set, the lowest first.
    pub fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        let bits = |word: u32| (0..32u32).filter(move |bit| word >> bit & 1 == 1);
        let words = (0u32..).zip(&self.words).filter(|(_, word)| **word != 0);
        words.flat_map(move |(i, word)| bits(*word).map(move |bit| i * 32 + bit))
    }

    /// Returns the lowest token of the set.
    pub fn first(&self) -> Option<u32> {
        self.ids().next()
    }

    /// Takes every token outside the set out of the running.
    pub fn apply(&self, logits: &mut [f32]) {
        let whole = self.words.iter().copied().chain(std::iter::repeat(0));
        for (word, logits) in whole.zip(logits.chunks_mut(32)) {
            if word == u32::MAX {
                continue;
            }
            for (bit, logit) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// Returns what may come next, `ends` included.
///
/// # Errors
/// [`Violation::DeadEnd`] when nothing may, or the matcher's own.
pub(crate) fn next_mask(matcher: &mut dyn Matcher, ends: &[u32], vocabulary: usize) -> Result<Mask, Violation> {
    let mut mask = matcher.mask()?;
    if matcher.may_end()? {
        ends.iter().filter(|id| (**id as usize) < vocabulary).for_each(|id| mask.allow(*id));
    }
    match mask.first() {
        Some(id) if (id as usize) < vocabulary => Ok(mask),
        _ => Err(Violation::DeadEnd),
    }
}

#[cfg(test)]
#[path = "constraint_tests.rs"]
mod tests;
