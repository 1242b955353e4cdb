#![allow(clippy::unwrap_used)]
use std::path::{Path, PathBuf};

use super::*;
use crate::gguf::Limits;

fn shared(name: &str) -> Option<PathBuf> {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data")).join(name);
    if path.exists() {
        return Some(path);
    }
    assert!(std::env::var("CORTEX_TEST_DATA").as_deref() != Ok("required"), "{name} is missing");
    eprintln!("SKIPPED: {name} is not beside this checkout");
    None
}

#[test]
fn the_qwen3_tokenizer_gives_every_oracle_case() {
    let Some(folder) = shared("tokenizers/qwen3") else { return };
    let tokenizer = Tokenizer::from_dir(&folder).unwrap();
    let inputs = std::fs::read_to_string(folder.join("oracle.inp")).unwrap();
    let outputs = std::fs::read_to_string(folder.join("oracle.out")).unwrap();
    let inputs: Vec<&str> = inputs.split("\n__ggml_vocab_test__\n").collect();
    let outputs: Vec<&str> = outputs.lines().collect();
    let mut checked = 0;
    for (input, output) in inputs.iter().zip(&outputs) {
        let wanted: Vec<u32> = output.split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert_eq!(tokenizer.encode(input, false).unwrap(), wanted, "{input:?}");
        let bytes: Vec<u8> = wanted.iter().flat_map(|id| tokenizer.pieces()[*id as usize].bytes.clone()).collect();
        // The tokenizer normalises to NFC, so only what is normal already comes back as it was.
        if input.is_ascii() {
            assert_eq!(String::from_utf8_lossy(&bytes), *input);
        }
        checked += 1;
    }
    assert!(checked >= 40, "only {checked} cases were found");
    assert!(tokenizer.end_tokens().len() >= 2);
}

#[test]
fn stories260k_tokenises_alike_from_both_kinds_of_file() {
    let Some(folder) = shared("models/stories260K") else { return };
    let golden: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("golden_greedy.json")).unwrap()).unwrap();
    let wanted: Vec<u32> = serde_json::from_value(golden[1]["prompt_ids"].clone()).unwrap();
    let header = Header::read(&folder.join("stories260K-f32.gguf"), &Limits::default()).unwrap();
    let from_gguf = Tokenizer::from_gguf(&header).unwrap();
    let from_json = Tokenizer::from_dir(&folder).unwrap();
    let prompt = golden[1]["prompt"].as_str().unwrap();
    for tokenizer in [&from_gguf, &from_json] {
        assert_eq!(tokenizer.encode(prompt, true).unwrap(), wanted);
        assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.vocab_size()), (Some(1), Some(2), 512));
        let ids: Vec<u32> = serde_json::from_value(golden[1]["token_ids"].clone()).unwrap();
        let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.pieces()[*id as usize].bytes.clone()).collect();
        assert_eq!(String::from_utf8_lossy(&bytes).trim_start(), golden[1]["text"].as_str().unwrap());
    }
    for text in ["", "Lily said: \"no!\"\n\n  two  spaces", "ünïcödé 🙂", "</s> spelled <s>"] {
        assert_eq!(from_gguf.encode(text, true).unwrap(), from_json.encode(text, true).unwrap(), "{text:?}");
    }
}
