//! The grammars that were compiled last.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::{Compiled, Source};

/// A source's hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key([u8; 32]);

impl Source {
    /// Returns the hash of all that decides what the source compiles to.
    pub fn key(&self) -> Key {
        // The text of the enum says it all: its variants, the order of properties, and the strings quoted.
        Key(*blake3::hash(format!("{self:?}").as_bytes()).as_bytes())
    }
}

/// Compiled grammars by their sources, those used last; at most as many as it was made for.
#[derive(Debug)]
pub struct Cache {
    /// The one used last comes first.
    entries: VecDeque<(Key, Arc<Compiled>)>,
    most: usize,
}

impl Cache {
    /// Makes a cache of at most `most` grammars.
    pub fn new(most: usize) -> Self {
        Cache { entries: VecDeque::new(), most }
    }

    /// Finds a grammar, and keeps it longer for that.
    pub fn find(&mut self, key: Key) -> Option<Arc<Compiled>> {
        let at = self.entries.iter().position(|(known, _)| *known == key)?;
        let entry = self.entries.remove(at)?;
        let found = entry.1.clone();
        self.entries.push_front(entry);
        Some(found)
    }

    /// Keeps a grammar; those not used for longest give way.
    pub fn keep(&mut self, key: Key, grammar: Arc<Compiled>) {
        self.entries.retain(|(known, _)| *known != key);
        self.entries.push_front((key, grammar));
        self.entries.truncate(self.most);
    }
}
