//! Model files from a Hugging Face hub, kept in the cache layout that `huggingface_hub` and hf-hub read and write.
//!
//! ```text
//! Reference -find-> Found (commit, files) -fetch-> a path in snapshots/
//!                                           |
//!      HEAD (etag, size) -> lock -> GET with a range -> blobs/<etag>.incomplete -> hash, fsync, rename -> symlink
//! ```
//! What a name means and which file is chosen is decided in `reference`, `names` and `choose`, without a socket. No
//! text of the network becomes part of a path but through `names`.

mod blob;
mod cache;
mod choose;
mod digest;
mod error;
mod fetch;
mod http;
mod lock;
mod names;
mod reference;
mod settings;
mod transfer;

pub use error::HubError;
pub use fetch::{Found, Hub, Pulled, Report};
pub use names::FileName;
pub use reference::{Reference, Source};
pub use settings::{Limits, Settings};
