//! Every endpoint through a whole fleet: answers, errors, retries, and the published schema of each answer.
#![allow(clippy::unwrap_used)]

use fleet_tests::{Client, Cut, Rig};
use serde_json::{Value, json};

fn workers(count: usize) -> Vec<neuron::options::Options> {
    let model = neuron::options::ModelEntry { id: "m".into(), harness: Some("fake".into()), ..Default::default() };
    vec![neuron::options::Options { default_models: vec![model], ..Default::default() }; count]
}

async fn fleet(count: usize) -> (Rig, Client) {
    let rig = Rig::start(&workers(count), Default::default()).await.unwrap();
    let client = Client::new(&rig.api).unwrap();
    (rig, client)
}

async fn ask(client: &Client, path: &'static str, body: Value) -> Value {
    let (status, answer) = client.at(path).json(&body).await.unwrap();
    assert_eq!(status, 200, "{path} {body}: {answer}");
    answer
}

fn floats(entry: &Value) -> Vec<f64> {
    entry["embedding"].as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_of_embeddings_is_each_text_by_itself_in_order() {
    let (_rig, client) = fleet(2).await;
    let texts: Vec<String> = (0..40).map(|i| format!("text {i} {}", "long ".repeat(i))).collect();
    let all = ask(&client, "/v1/embeddings", json!({"model": "m", "input": texts})).await;
    assert_eq!(all["data"].as_array().unwrap().len(), 40);
    let tokens: usize = texts.iter().map(String::len).sum();
    assert_eq!(all["usage"], json!({"prompt_tokens": tokens, "total_tokens": tokens}));
    for (i, text) in texts.iter().enumerate().step_by(7) {
        let alone = ask(&client, "/v1/embeddings", json!({"model": "m", "input": text})).await;
        assert_eq!((&all["data"][i]["index"], &all["data"][i]["object"]), (&json!(i), &json!("embedding")));
        assert_eq!(all["data"][i]["embedding"], alone["data"][0]["embedding"], "{text}");
        let ids: Vec<u8> = text.bytes().collect();
        let by_ids = ask(&client, "/v1/embeddings", json!({"model": "m", "input": ids, "dimensions": 24})).await;
        assert_eq!(by_ids["data"][0], alone["data"][0], "{text}");
        let length: f64 = floats(&alone["data"][0]).iter().map(|number| number * number).sum();
        assert!((length - 1.0).abs() < 1e-6, "{length}");
    }
    let cut = ask(&client, "/v1/embeddings", json!({"model": "m", "input": texts[0], "dimensions": 5})).await;
    let (cut, whole) = (floats(&cut["data"][0]), floats(&all["data"][0]));
    let scale = cut[0] / whole[0];
    assert!(cut.len() == 5 && cut.iter().zip(&whole).all(|(cut, whole)| (cut - whole * scale).abs() < 1e-6), "{cut:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_without_tokens_is_retried_on_another_worker() {
    let (rig, client) = fleet(2).await;
    for (path, body) in [
        ("/v1/embeddings", json!({"model": "m", "input": ["a", "b"]})),
        ("/tokenize", json!({"model": "m", "prompt": "abc"})),
        ("/detokenize", json!({"model": "m", "tokens": [97]})),
    ] {
        rig.arm([]);
        let whole = ask(&client, path, body.clone()).await;
        rig.arm([Cut { mark: 0, bytes: 9, hangs: false }]);
        assert_eq!(ask(&client, path, body).await, whole);
        assert_eq!(rig.cuts_made(), 1, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_of_a_text_are_its_text_again() {
    let (_rig, client) = fleet(1).await;
    let text = "caf\u{e9} 🙂";
    let body = json!({"model": "m", "prompt": text, "return_token_strs": true});
    let answer = ask(&client, "/tokenize", body).await;
    assert_eq!((&answer["count"], &answer["max_model_len"]), (&json!(text.len()), &json!(8192)));
    assert_eq!(answer["token_strs"].as_array().unwrap().len(), text.len());
    let again = ask(&client, "/detokenize", json!({"model": "m", "tokens": answer["tokens"]})).await;
    assert_eq!(again, json!({"prompt": text}));
    let chat = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    let answer = ask(&client, "/tokenize", chat).await;
    assert_eq!((&answer["count"], &answer["token_strs"]), (&json!("user:hi\n".len()), &Value::Null));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn choices_of_several_prompts_are_numbered_prompt_by_prompt() {
    let (_rig, client) = fleet(1).await;
    let one = async |prompt: &str| {
        let body = json!({"model": "m", "prompt": prompt, "max_tokens": 9});
        ask(&client, "/v1/completions", body).await["choices"][0]["text"].clone()
    };
    let prompts: Vec<String> = (0..20).map(|i| format!("prompt {i}")).collect();
    let body = json!({"model": "m", "prompt": prompts, "n": 3, "max_tokens": 9, "echo": true});
    let all = ask(&client, "/v1/completions", body).await;
    assert_eq!(all["choices"].as_array().unwrap().len(), 60);
    for (i, choice) in all["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!(choice["index"], i);
        let prompt = &prompts[i / 3];
        assert_eq!(choice["text"], format!("{prompt}{}", one(prompt).await.as_str().unwrap()));
    }
    assert_eq!(all["usage"]["completion_tokens"], 60 * 9);
    let tokens: usize = prompts.iter().map(String::len).sum();
    assert_eq!(all["usage"]["prompt_tokens"], tokens, "a prompt counts once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_text_completion_has_openais_defaults_and_a_stream_folds_to_it() {
    let (_rig, client) = fleet(1).await;
    let client = client.at("/v1/completions");
    let body = json!({"model": "m", "prompt": "go on", "logprobs": 2});
    let (_, whole) = client.json(&body).await.unwrap();
    assert_eq!(
        (&whole["usage"]["completion_tokens"], &whole["choices"][0]["finish_reason"]),
        (&json!(16), &json!("length"))
    );
    let mut streamed = body.clone();
    (streamed["stream"], streamed["stream_options"]) = (json!(true), json!({"include_usage": true}));
    let answer = client.stream(&streamed, |_| {}).await.unwrap();
    assert!(answer.whole());
    assert_eq!(answer.text, whole["choices"][0]["text"].as_str().unwrap());
    assert_eq!(answer.usage.unwrap(), whole["usage"]);
    let logprobs = &whole["choices"][0]["logprobs"];
    for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[key].as_array().unwrap().len(), 16, "{key}");
    }
    assert!(logprobs["top_logprobs"][0].as_object().unwrap().len() >= 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_name_what_is_wrong_and_what_there_is() {
    let (_rig, client) = fleet(1).await;
    let long = "x".repeat(9000);
    for (path, body, param, words) in [
        ("/v1/completions", json!({"model": "m", "prompt": ""}), "prompt", "no tokens"),
        ("/v1/completions", json!({"model": "m", "prompt": long}), "prompt", "context holds 8192"),
        ("/v1/completions", json!({"model": "m", "prompt": ["a", long]}), "prompt[1]", "context holds 8192"),
        ("/v1/completions", json!({"model": "m", "prompt": [1, 300]}), "prompt", "300 is no token"),
        ("/v1/completions", json!({"model": "m", "prompt": "a", "suffix": "b"}), "suffix", "not supported"),
        ("/v1/completions", json!({"model": "m", "prompt": vec!["a"; 129]}), "prompt", "128"),
        ("/v1/completions", json!({"model": "m", "prompt": ["a", "b"], "n": 65}), "prompt", "128"),
        ("/v1/embeddings", json!({"model": "m", "input": ["a", long]}), "input[1]", "context holds 8192"),
        ("/v1/embeddings", json!({"model": "m", "input": "a", "dimensions": 25}), "dimensions", "24 at most"),
        ("/v1/embeddings", json!({"model": "m"}), "input", "string"),
        (
            "/v1/chat/completions",
            json!({"model": "m", "messages": [{"role": "user", "content": "a"}], "top_logprobs": 1}),
            "top_logprobs",
            "needs 'logprobs'",
        ),
        ("/tokenize", json!({"model": "m"}), "prompt", "needed"),
        ("/detokenize", json!({"model": "m", "tokens": [257]}), "tokens", "257 is no token"),
    ] {
        let (status, answer) = client.at(path).json(&body).await.unwrap();
        assert_eq!(status, 400, "{path}: {answer}");
        assert_eq!(answer["error"]["param"], param, "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(words), "{answer}");
    }
    let (status, answer) = client.at("/v1/responses").json(&json!({})).await.unwrap();
    assert_eq!(status, 404);
    let message = answer["error"]["message"].as_str().unwrap();
    for path in ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize", "/v1/models"]
    {
        assert!(message.contains(path), "{message}");
    }
    let (status, answer) = client.get("/v1/embeddings").await.unwrap();
    assert_eq!((status, &answer["error"]["code"]), (405, &json!("method_not_allowed")));
    let (status, answer) = client.at("/v1/embeddings").json(&json!({"model": "nobody", "input": "a"})).await.unwrap();
    assert_eq!((status, &answer["error"]["code"]), (404, &json!("model_not_found")));
}

/// The published schemas; `None`, loudly, where the document is absent.
fn schemas() -> Option<Value> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data/openai/openapi.json");
    let Ok(text) = std::fs::read_to_string(path) else {
        assert!(std::env::var("CORTEX_TEST_DATA").as_deref() != Ok("required"), "the OpenAI document is missing");
        eprintln!("SKIPPED: the OpenAI document is not beside this checkout");
        return None;
    };
    let document: Value = serde_json::from_str(&text).unwrap();
    let mut schemas = document["components"]["schemas"].clone();
    allow_null(&mut schemas);
    Some(schemas)
}

/// The document says `nullable` as OpenAPI 3.0 did, which a reader of 3.1 passes over.
fn allow_null(schema: &mut Value) {
    match schema {
        Value::Array(items) => items.iter_mut().for_each(allow_null),
        Value::Object(map) => {
            map.values_mut().for_each(allow_null);
            if map.remove("nullable") == Some(Value::Bool(true)) {
                *schema = json!({"anyOf": [schema.take(), {"type": "null"}]});
            }
        }
        _ => {}
    }
}

fn validator(schemas: &Value, name: &str) -> jsonschema::Validator {
    assert!(schemas[name].is_object(), "the document has no {name}");
    let schema = json!({"$ref": format!("#/components/schemas/{name}"), "components": {"schemas": schemas}});
    jsonschema::validator_for(&schema).unwrap()
}

/// What the document leaves unsaid of streams: the usage of all but the last event is null, as its own words say, and a
/// text's finish is null before its end, though it has the type of a whole answer's.
fn as_whole(mut chunk: Value) -> Value {
    if chunk["usage"].is_null() {
        chunk.as_object_mut().unwrap().remove("usage");
    }
    if chunk["object"] == "text_completion" {
        for choice in chunk["choices"].as_array_mut().unwrap().iter_mut().filter(|c| c["finish_reason"].is_null()) {
            choice["finish_reason"] = json!("stop");
        }
    }
    chunk
}

fn check(validator: &jsonschema::Validator, value: &Value) {
    let errors: Vec<String> =
        validator.iter_errors(value).map(|error| format!("{} at {}", error, error.instance_path())).collect();
    assert!(errors.is_empty(), "{value:#}\n{errors:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_what_the_published_schemas_say() {
    let Some(schemas) = schemas() else { return };
    let (_rig, client) = fleet(1).await;
    let messages = json!([{"role": "user", "content": "hi"}]);
    let chats = [json!({}), json!({"n": 2}), json!({"logprobs": true, "top_logprobs": 2}), json!({"stop": ["e"]})];
    let texts = [json!({}), json!({"n": 2, "echo": true}), json!({"logprobs": 2}), json!({"stop": "e", "logprobs": 0})];
    let embeddings =
        [json!({"input": "a"}), json!({"input": ["a", "b"], "dimensions": 3}), json!({"input": [[1], [2]]})];
    let with = |base: Value, more: &Value| {
        let mut body = base;
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    for (path, base, many, whole, chunk) in [
        (
            "/v1/chat/completions",
            json!({"model": "m", "messages": messages, "max_tokens": 6}),
            chats.as_slice(),
            "CreateChatCompletionResponse",
            Some("CreateChatCompletionStreamResponse"),
        ),
        (
            "/v1/completions",
            json!({"model": "m", "prompt": "hi", "max_tokens": 6}),
            texts.as_slice(),
            "CreateCompletionResponse",
            Some("CreateCompletionResponse"),
        ),
        ("/v1/embeddings", json!({"model": "m"}), embeddings.as_slice(), "CreateEmbeddingResponse", None),
    ] {
        let of_whole = validator(&schemas, whole);
        for more in many {
            check(&of_whole, &ask(&client, path, with(base.clone(), more)).await);
            let Some(of_chunk) = chunk.map(|chunk| validator(&schemas, chunk)) else { continue };
            let stream = json!({"stream": true, "stream_options": {"include_usage": true}});
            let answer = client.at(path).stream(&with(with(base.clone(), more), &stream), |_| {}).await.unwrap();
            assert!(answer.whole(), "{answer:?}");
            let events = answer.raw.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
            for event in events.filter(|event| *event != "[DONE]") {
                check(&of_chunk, &as_whole(serde_json::from_str(event).unwrap()));
            }
        }
    }
    let models = validator(&schemas, "ListModelsResponse");
    check(&models, &client.get("/v1/models").await.unwrap().1);
}
