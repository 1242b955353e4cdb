//! Types of a client library that others wrote accept what we encode.
#![allow(clippy::unwrap_used)]

use async_openai::types::chat::{CreateChatCompletionResponse, CreateChatCompletionStreamResponse, FinishReason};

use crate::{ChatEncoder, Folder, Identity, Usage};

fn identity() -> Identity {
    Identity { id: "chatcmpl-1".into(), created: 7, model: "m".into() }
}

#[test]
fn a_client_librarys_types_accept_every_chunk_and_the_fold() {
    let encoder = ChatEncoder::new(identity(), true);
    let events = [
        encoder.role(0),
        encoder.content(0, "é\"\n", None),
        encoder.finish(0, "length"),
        encoder.usage(Usage { prompt: 3, completion: 4, cached: 1 }).unwrap(),
    ];
    let chunks: Vec<CreateChatCompletionStreamResponse> =
        events.iter().map(|event| serde_json::from_slice(event.strip_prefix(b"data: ").unwrap()).unwrap()).collect();
    assert_eq!(chunks[1].choices[0].delta.content.as_deref(), Some("é\"\n"));
    assert_eq!(chunks[2].choices[0].finish_reason, Some(FinishReason::Length));
    assert_eq!(chunks[3].usage.as_ref().unwrap().total_tokens, 7);

    let mut folder = Folder::new(identity(), 1, false);
    folder.content(0, "hello");
    folder.finish(0, "stop");
    let whole: CreateChatCompletionResponse =
        serde_json::from_str(&folder.done(Usage { prompt: 1, completion: 2, cached: 0 })).unwrap();
    assert_eq!(whole.choices[0].message.content.as_deref(), Some("hello"));
}
