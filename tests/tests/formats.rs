//! Answers that must be something: schemas, patterns, forced calls, over a fleet in this process.
#![allow(clippy::unwrap_used)]

use fleet_tests::{Answer, Client, Cut, Rig};
use neuron::options::{ModelEntry, Options};
use serde_json::{Value, json};

/// Every form of calls, and the model that has it.
const FORMS: [&str; 7] = ["hermes", "llama", "mistral", "functionary", "qwen3_coder", "seed_oss", "glm45"];

fn worker() -> Options {
    let model = |id: &str, parser: Option<&str>| ModelEntry {
        id: id.into(),
        harness: Some("fake".into()),
        tool_parser: parser.map(str::to_string),
        ..ModelEntry::default()
    };
    let default_models = [model("m", None)].into_iter().chain(FORMS.map(|form| model(form, Some(form)))).collect();
    Options { default_models, ..Options::default() }
}

fn person() -> Value {
    json!({"type": "object", "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "é"]}, "maxItems": 2},
    }, "required": ["name", "age", "tags"], "additionalProperties": false})
}

fn schema(schema: Value) -> Value {
    json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": schema}}})
}

fn body(model: &str, prompt: &str, more: Value) -> Value {
    let mut body = json!({"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 400});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn is_person(text: &str) -> bool {
    let value: Value = serde_json::from_str(text).unwrap();
    let name = value["name"].as_str().map_or(0, |name| name.chars().count());
    let tags = value["tags"].as_array().unwrap();
    (1..=6).contains(&name)
        && (0..=130).contains(&value["age"].as_i64().unwrap())
        && tags.iter().all(|tag| ["a", "b", "é"].iter().any(|known| tag == known))
        && value.as_object().unwrap().len() == 3
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_under_a_schema_cut_at_any_token_is_the_uncut_stream() {
    let rig = Rig::start(&[worker(), worker()], cortex::options::Options::default()).await.unwrap();
    let client = Client::new(&rig.api).unwrap();
    for more in [json!({"temperature": 0}), json!({"temperature": 1.0, "seed": 3})] {
        let mut request = body("m", "somebody", schema(person()));
        request["stream"] = json!(true);
        request["cache_salt"] = json!("cut");
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let ask = async |cuts: Vec<Cut>| -> Answer {
            rig.arm(cuts);
            client.stream(&request, |_| {}).await.unwrap()
        };
        let whole = ask(vec![]).await;
        assert!(whole.whole() && is_person(&whole.text), "{}", whole.text);
        let mut made = 0;
        for mark in 0.. {
            let cut = Cut { mark, bytes: [0, 9, 60, 25][mark % 4], hangs: false };
            let answer = ask(vec![cut]).await;
            assert_eq!(answer.bytes(), whole.bytes(), "{cut:?}");
            match rig.cuts_made() {
                0 => break,
                cuts => made += cuts,
            }
        }
        assert!(made > 30, "{made} cuts of {}", whole.text);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_format_is_kept_and_what_can_not_be_is_refused_by_its_field() {
    let rig = Rig::start(&[worker()], cortex::options::Options::default()).await.unwrap();
    let client = Client::new(&rig.api).unwrap();
    let said = async |prompt: &str, more: Value| {
        let (status, answer) = client.json(&body("m", prompt, more)).await.unwrap();
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
        answer["choices"][0]["message"]["content"].as_str().unwrap().to_string()
    };
    for i in 0..5 {
        let prompt = format!("prompt {i}");
        assert!(is_person(&said(&prompt, schema(person())).await));
        let pattern = json!({"response_format": {"type": "regex", "pattern": "[0-9]{3}-(yes|no)"}});
        let text = said(&prompt, pattern).await;
        assert!(
            text.len() >= 6 && text[..3].bytes().all(|b| b.is_ascii_digit()) && text.as_bytes()[3] == b'-',
            "{text}"
        );
        assert!(["red", "blue"].contains(&said(&prompt, json!({"guided_choice": ["red", "blue"]})).await.as_str()));
        let grammar = json!({"structured_outputs": {"grammar": "start: \"(\" start \")\" | \"x\""}, "max_tokens": 400});
        let text = said(&prompt, grammar).await;
        assert_eq!(text.matches('(').count(), text.matches(')').count(), "{text}");
    }
    // The schema of a script that begins so: the model's own words as far as they fit.
    assert_eq!(said("\u{2}{\"a\": 1}\u{3}", json!({"response_format": {"type": "json_object"}})).await, "{\"a\": 1}");
    let named = |json_schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": json_schema}});
    let inner = "response_format.json_schema.schema";
    for (more, param, word) in [
        (schema(json!({"not": {}})), inner, "/not"),
        (schema(json!({"type": "integer", "minimum": 2, "maximum": 1})), inner, "schema"),
        (named(json!({"schema": {}})), "response_format.json_schema.name", "letters"),
        (json!({"guided_regex": "("}), "guided_regex", "regular expression"),
        (json!({"guided_regex": "(a{999}){999}"}), "guided_regex", "multiply"),
        (json!({"structured_outputs": {"grammar": "start: x"}}), "structured_outputs.grammar", "grammar"),
    ] {
        let (status, answer) = client.json(&body("m", "x", more.clone())).await.unwrap();
        assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(param)), "{more} {answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(word), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forced_call_is_made_whatever_the_model_would_have_said() {
    let rig = Rig::start(&[worker()], cortex::options::Options::default()).await.unwrap();
    let client = Client::new(&rig.api).unwrap();
    let tool = |name: &str, cities: Value| {
        let parameters = json!({"type": "object", "properties": {"city": {"enum": cities}}, "required": ["city"],
            "additionalProperties": false});
        json!({"type": "function", "function": {"name": name, "parameters": parameters}})
    };
    let tools = json!([tool("weather", json!(["Oslo", "Rome"])), tool("time", json!(["Bonn"]))]);
    let named = json!({"type": "function", "function": {"name": "time"}});
    let script = "\u{2}I would rather not.\u{3}";
    for form in FORMS {
        for (choice, names) in [(json!("required"), vec!["weather", "time"]), (named.clone(), vec!["time"])] {
            let more = json!({"tools": tools, "tool_choice": choice, "parallel_tool_calls": false});
            let (status, answer) = client.json(&body(form, script, more)).await.unwrap();
            assert_eq!(status, 200, "{form}: {answer}");
            let call = &answer["choices"][0]["message"]["tool_calls"][0]["function"];
            assert!(names.iter().any(|name| call["name"] == *name), "{form}: {answer}");
            let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
            assert!(["Oslo", "Rome", "Bonn"].iter().any(|city| arguments["city"] == *city), "{form}: {answer}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_text_completion_is_held_to_a_format_as_a_chat_is() {
    let rig = Rig::start(&[worker(), worker()], cortex::options::Options::default()).await.unwrap();
    let client = Client::new(&rig.api).unwrap().at("/v1/completions");
    let ask = async |more: Value| {
        let mut body = json!({"model": "m", "prompt": ["one", "two"], "max_tokens": 400});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        client.json(&body).await.unwrap()
    };
    for more in
        [schema(person()), json!({"guided_json": person()}), json!({"structured_outputs": {"json": person()}, "n": 2})]
    {
        let (status, answer) = ask(more).await;
        assert_eq!(status, 200, "{answer}");
        for choice in answer["choices"].as_array().unwrap() {
            assert!(is_person(choice["text"].as_str().unwrap()) && choice["finish_reason"] == "stop", "{choice}");
        }
    }
    let (_, answer) = ask(json!({"guided_choice": ["red", "blue"], "echo": true})).await;
    let text = answer["choices"][1]["text"].as_str().unwrap();
    assert!(["twored", "twoblue"].contains(&text), "{text}");
    let (status, answer) = ask(json!({"guided_regex": "("})).await;
    assert_eq!((status, answer["error"]["param"].as_str()), (400, Some("guided_regex")), "{answer}");
}
