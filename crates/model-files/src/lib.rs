//! Bounded readers of model files: GGUF headers, tokenizers, chat templates, generation defaults, fingerprints.
//!
//! Files come from strangers: no count, offset or template of theirs is believed before it was checked.

pub mod gguf;
pub mod model;
pub mod template;
pub mod tokenizer;
