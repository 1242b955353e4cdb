#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;
use serde_json::json;

fn request(extra: Value) -> Result<CompletionRequest, Error> {
    let mut body = json!({"model": "m", "prompt": "hi"});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    CompletionRequest::parse(body.to_string().as_bytes())
}

fn at(extra: Value) -> String {
    let error = request(extra).unwrap_err();
    assert_eq!(error.code().row().http, 400, "{error}");
    error.param().unwrap_or("").to_string()
}

#[test]
fn a_prompt_is_a_text_or_tokens_or_a_list_of_them() {
    let prompts = |prompt: Value| request(json!({"prompt": prompt})).unwrap().prompts;
    let text = |text: &str| Prompt::Text(text.into());
    assert_eq!(prompts(json!("")), [text("")]);
    assert_eq!(prompts(json!(["a", "b"])), [text("a"), text("b")]);
    assert_eq!(prompts(json!([1, 2])), [Prompt::Tokens(vec![1, 2])]);
    assert_eq!(prompts(json!([[1], [2, 3]])), [Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]);
}

#[test]
fn bad_values_name_their_field() {
    for (extra, param) in [
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": {}}), "prompt"),
        (json!({"prompt": [1, "a"]}), "prompt"),
        (json!({"prompt": [-1]}), "prompt"),
        (json!({"prompt": ["a", 1]}), "prompt[1]"),
        (json!({"prompt": ["a", []]}), "prompt[1]"),
        (json!({"prompt": vec!["a"; 129]}), "prompt"),
        (json!({"prompt": vec!["a"; 65], "n": 2}), "prompt"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"best_of": 3}), "best_of"),
        (json!({"suffix": "x"}), "suffix"),
        (json!({"echo": 1}), "echo"),
    ] {
        assert_eq!(at(extra.clone()), param, "{extra}");
    }
}

#[test]
fn what_is_absent_has_openais_defaults() {
    let bare = request(json!({"best_of": 1, "suffix": null})).unwrap();
    assert_eq!((bare.generation.max_tokens, bare.generation.logprobs, bare.echo), (Some(16), None, false));
    assert_eq!(request(json!({"logprobs": 0})).unwrap().generation.logprobs, Some(0));
}

#[test]
fn the_fold_echoes_and_tells_tokens_as_openai_does() {
    let identity = Identity { id: "cmpl-1".into(), created: 7, model: "m".into() };
    let echo = Echo { prompts: ["a".to_string(), "b".to_string()].into(), choices: 1 };
    let mut folder = TextFolder::new(identity, 2, true, &echo);
    let first = TokenLogprob { bytes: b"b".to_vec(), logprob: None, top: vec![], offset: 0 };
    let top = vec![(b"x".to_vec(), -0.25), (b"x".to_vec(), -0.5)];
    let second = TokenLogprob { bytes: b"\xff".to_vec(), logprob: Some(-1.0), top, offset: 1 };
    folder.score(1, &[first, second]);
    folder.content(1, "c");
    folder.finish(1, "stop");
    let whole: Value =
        serde_json::from_str(&folder.done(Usage { prompt: 1, completion: 1, ..Usage::default() })).unwrap();
    assert_eq!(whole["object"], "text_completion");
    assert_eq!((&whole["choices"][0]["text"], &whole["choices"][1]["text"]), (&json!("a"), &json!("bc")));
    let wanted = json!({"text_offset": [0, 1], "token_logprobs": [null, -1.0], "tokens": ["b", "\u{fffd}"],
        "top_logprobs": [null, {"x": -0.25, "\u{fffd}": -1.0}]});
    assert_eq!(whole["choices"][1]["logprobs"], wanted);
    assert_eq!(whole["choices"][1]["finish_reason"], "stop");
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = CompletionRequest::parse(&body);
    }
}
