//! What travels over HTTP: OpenAI types, the field table, the SSE codec, the error envelope and the private lines.

pub mod chat;
mod completion;
pub mod embeddings;
mod endpoint;
mod envelope;
pub mod fields;
pub mod foreign;
pub mod format;
pub mod generation;
mod logprobs;
pub mod messages;
pub mod models;
pub mod output;
mod peek;
pub mod private;
pub mod shaping;
mod skim;
mod sse;
pub mod template;
pub mod text;
pub mod tokens;
pub mod tools;

pub use completion::{ChatEncoder, Folder, Identity, Usage, with_private};
pub use endpoint::{Encoder, Endpoint, Fold};
pub use envelope::{ErrorEnvelope, ErrorResponse, LoadingObject, check_media_type, error_event};
pub use logprobs::{TOP_LOGPROBS_MAX, TokenLogprob};
pub use peek::{Peek, with_model, without_private_fields};
pub use sse::{DONE_EVENT, EventSplitter, EventTooLarge, HTTP_SSE_CONTENT_TYPE, KEEP_ALIVE_EVENT, data_event};

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod sdk_types_tests;
#[cfg(test)]
mod skim_tests;
