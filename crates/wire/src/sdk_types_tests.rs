//! Types of a client library that others wrote accept what we encode.
#![allow(clippy::unwrap_used)]

use async_openai::types::chat::{CreateChatCompletionResponse, CreateChatCompletionStreamResponse, FinishReason};

use crate::output::Delta;
use crate::{ChatEncoder, Folder, Identity, Usage};

fn identity() -> Identity {
    Identity { id: "chatcmpl-1".into(), created: 7, model: "m".into() }
}

#[test]
fn a_client_librarys_types_accept_every_chunk_and_the_fold() {
    let encoder = ChatEncoder::new(identity(), true);
    let events = [
        encoder.role(0, true),
        encoder.content(0, "é\"\n", None),
        encoder.role(1, false),
        encoder.part(1, &Delta::Reasoning("hm".into()), None),
        encoder.part(1, &Delta::Call { index: 0, name: "f".into() }, None),
        encoder.part(1, &Delta::Arguments { index: 0, text: "{}".into() }, None),
        encoder.finish(1, "tool_calls"),
        encoder.finish(0, "length"),
        encoder.usage(Usage { prompt: 3, completion: 4, cached: 1, reasoning: 1 }).unwrap(),
    ];
    let chunks: Vec<CreateChatCompletionStreamResponse> =
        events.iter().map(|event| serde_json::from_slice(event.strip_prefix(b"data: ").unwrap()).unwrap()).collect();
    assert_eq!(chunks[1].choices[0].delta.content.as_deref(), Some("é\"\n"));
    let call = |i: usize| chunks[i].choices[0].delta.tool_calls.as_ref().unwrap()[0].clone();
    assert_eq!((call(4).index, call(4).function.unwrap().name.as_deref()), (0, Some("f")));
    assert_eq!((call(5).id, call(5).function.unwrap().arguments.as_deref()), (None, Some("{}")));
    assert_eq!(chunks[6].choices[0].finish_reason, Some(FinishReason::ToolCalls));
    assert_eq!(chunks[7].choices[0].finish_reason, Some(FinishReason::Length));
    assert_eq!(chunks[8].usage.as_ref().unwrap().total_tokens, 7);

    let mut folder = Folder::new(identity(), 2, false, false);
    folder.part(0, &Delta::Content("hello".into()));
    folder.part(1, &Delta::Call { index: 0, name: "f".into() });
    folder.finish(0, "stop");
    let whole: CreateChatCompletionResponse =
        serde_json::from_str(&folder.done(Usage { prompt: 1, completion: 2, ..Usage::default() })).unwrap();
    assert_eq!(whole.choices[0].message.content.as_deref(), Some("hello"));
    assert_eq!(whole.choices[1].message.content, None);
    assert_eq!(whole.choices[1].message.tool_calls.as_ref().unwrap().len(), 1);
}
