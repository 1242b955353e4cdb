//! What travels over HTTP: OpenAI types, the field table, the SSE codec, the error envelope and the private lines.

pub mod chat;
mod completion;
mod envelope;
pub mod fields;
pub mod models;
pub mod private;
pub mod shaping;
mod sse;

pub use completion::{ChatEncoder, Folder, Identity, Usage, with_private};
pub use envelope::{ErrorEnvelope, ErrorResponse, check_media_type, error_event};
pub use sse::{DONE_EVENT, EventSplitter, EventTooLarge, HTTP_SSE_CONTENT_TYPE, KEEP_ALIVE_EVENT, data_event};

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod sdk_types_tests;
