//! Everything there is to know of a model before an engine loads it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use crate::gguf::{self, GgufError, Header};
use crate::template::{self, ChatTemplate, TemplateError};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// Why a model's files are not used.
#[derive(Debug, thiserror::Error)]
pub enum ModelFilesError {
    /// A file or folder can't be read.
    #[error("{path} can't be read: {source}")]
    Io {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A folder without the one file that is wanted.
    #[error("{path} has {found}; name one file, or one of them by its quant")]
    Choice {
        /// Which folder.
        path: PathBuf,
        /// What is there.
        found: String,
    },
    /// The GGUF file is unusable.
    #[error("{path}: {source}")]
    Gguf {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: GgufError,
    },
    /// The tokenizer is unusable.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template is unusable.
    #[error(transparent)]
    Template(#[from] TemplateError),
}

/// What the model's makers say about generation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[allow(missing_docs)]
pub struct GenerationDefaults {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition: Option<f32>,
}

/// A model's files, read and checked.
pub struct ModelFiles {
    /// The GGUF file.
    pub path: PathBuf,
    /// Its header.
    pub header: Header,
    /// How texts become tokens.
    pub tokenizer: Tokenizer,
    /// How messages become a prompt; none for a model that was not made for chats.
    pub template: Option<ChatTemplate>,
    /// What its makers say about generation.
    pub defaults: GenerationDefaults,
    /// Every token that ends an answer: the tokenizer's, and those that its makers name for generation.
    pub end_tokens: Vec<u32>,
    /// Which architecture it has.
    pub architecture: String,
    /// Most tokens of prompt and answer together.
    pub context_length: usize,
}

/// Most files of a folder that are looked at.
const FOLDER_FILES_MAX: usize = 10_000;
/// Most bytes of a side file.
const SIDE_FILE_BYTES_MAX: u64 = 8 << 20;

/// Finds the GGUF file that a path means: itself, or the one in a folder, or the one of them that `quant` names.
///
/// # Errors
/// `Io` when there is nothing, `Choice` when there are none or several.
pub fn resolve(path: &Path, quant: Option<&str>) -> Result<PathBuf, ModelFilesError> {
    let io = |source| ModelFilesError::Io { path: path.into(), source };
    if !std::fs::metadata(path).map_err(io)?.is_dir() {
        return Ok(path.into());
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(io)?.take(FOLDER_FILES_MAX) {
        let file = entry.map_err(io)?.path();
        let name = file.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        let wanted = quant.is_none_or(|quant| name.contains(&quant.to_lowercase()));
        if name.ends_with(".gguf") && wanted {
            found.push(file);
        }
    }
    found.sort();
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => Err(ModelFilesError::Choice { path: path.into(), found: "no such GGUF file".into() }),
        _ => {
            let names: Vec<_> = found.iter().filter_map(|file| file.file_name()).map(|n| n.to_string_lossy()).collect();
            let found = format!("{} GGUF files ({})", names.len(), names.join(", "));
            Err(ModelFilesError::Choice { path: path.into(), found })
        }
    }
}

fn side_file(folder: &Path, name: &str) -> Option<String> {
    let path = folder.join(name);
    let fits = std::fs::metadata(&path).is_ok_and(|metadata| metadata.len() <= SIDE_FILE_BYTES_MAX);
    fits.then(|| std::fs::read_to_string(&path).ok()).flatten()
}

/// A template is a text, or a list of named ones of which `default` counts.
fn template_source(folder: &Path, header: &Header) -> Option<String> {
    if let Some(source) = header.str("tokenizer.chat_template") {
        return Some(source.into());
    }
    if let Some(source) = side_file(folder, "chat_template.jinja") {
        return Some(source);
    }
    let config: Json = serde_json::from_str(&side_file(folder, "tokenizer_config.json")?).ok()?;
    let named = |list: &Vec<Json>| {
        list.iter().find(|entry| entry["name"] == "default")?["template"].as_str().map(str::to_string)
    };
    match &config["chat_template"] {
        Json::String(source) => Some(source.clone()),
        Json::Array(list) => named(list),
        _ => None,
    }
}

/// Adds to `ends` what the makers name, one token or several, as far as those are tokens at all.
fn end_tokens(side: &Json, ends: &[u32], vocabulary: usize) -> Vec<u32> {
    let named = match &side["eos_token_id"] {
        Json::Array(ids) => ids.as_slice(),
        id => std::slice::from_ref(id),
    };
    let named = named.iter().filter_map(Json::as_u64).filter(|id| *id < vocabulary as u64).map(|id| id as u32);
    let mut all: Vec<u32> = ends.iter().copied().chain(named).collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn generation_config(folder: &Path) -> Json {
    let side = side_file(folder, "generation_config.json").and_then(|text| serde_json::from_str::<Json>(&text).ok());
    side.unwrap_or_default()
}

fn defaults(side: &Json, header: &Header) -> GenerationDefaults {
    let number = |key: &str, named: &str| {
        let own = header.f32(&format!("general.sampling.{named}"));
        own.or(side[key].as_f64().map(|number| number as f32)).filter(|number| number.is_finite() && *number >= 0.0)
    };
    let sampled = side["do_sample"].as_bool() != Some(false);
    GenerationDefaults {
        temperature: if sampled { number("temperature", "temp") } else { Some(0.0) },
        top_p: number("top_p", "top_p"),
        top_k: number("top_k", "top_k").map(|k| k as u32),
        min_p: number("min_p", "min_p"),
        repetition: number("repetition_penalty", "penalty_repeat").filter(|penalty| *penalty > 0.0),
    }
}

impl ModelFiles {
    /// Reads and checks a GGUF file and what lies beside it.
    ///
    /// # Errors
    /// [`ModelFilesError`], in words that name the file.
    pub fn open(path: &Path, quant: Option<&str>) -> Result<Self, ModelFilesError> {
        let path = resolve(path, quant)?;
        let read = Header::read(&path, &gguf::Limits::default());
        let header = read.map_err(|source| ModelFilesError::Gguf { path: path.clone(), source })?;
        let folder = path.parent().unwrap_or(Path::new(".")).to_path_buf();
        let tokenizer = match header.get("tokenizer.ggml.tokens") {
            Some(_) => Tokenizer::from_gguf(&header)?,
            None => Tokenizer::from_dir(&folder)?,
        };
        let source = template_source(&folder, &header);
        let template = source.map(|source| ChatTemplate::new(&source, template::Limits::default())).transpose()?;
        let missing = |key: String| ModelFilesError::Gguf {
            path: path.clone(),
            source: GgufError::Metadata { key, problem: "absent" },
        };
        let key = "general.architecture";
        let architecture = header.str(key).ok_or_else(|| missing(key.into()))?.to_string();
        let key = format!("{architecture}.context_length");
        let context_length = header.u64(&key).ok_or_else(|| missing(key))? as usize;
        let side = generation_config(&folder);
        let defaults = defaults(&side, &header);
        let end_tokens = end_tokens(&side, tokenizer.end_tokens(), tokenizer.vocab_size());
        Ok(ModelFiles { path, header, tokenizer, template, defaults, end_tokens, architecture, context_length })
    }

    /// Renders a chat into the prompt's text. As transformers has it, `tools` is none when there are no tools, and
    /// `variables` are variables like the others; those that are set here win.
    ///
    /// # Errors
    /// [`TemplateError`]; `Absent` when the model has no template.
    pub fn render(
        &self,
        messages: &[Json],
        tools: &[Json],
        variables: &Map<String, Json>,
        now: i64,
    ) -> Result<String, TemplateError> {
        let template = self.template.as_ref().ok_or(TemplateError::Absent)?;
        let named = |id: Option<u32>| id.and_then(|id| self.tokenizer.token_text(id)).unwrap_or_default();
        let mut context = variables.clone();
        let messages = messages.iter().map(|message| template.fit_arguments(message)).collect();
        context.insert("messages".into(), Json::Array(messages));
        context.insert("tools".into(), if tools.is_empty() { Json::Null } else { tools.into() });
        context.insert("add_generation_prompt".into(), true.into());
        context.insert("bos_token".into(), named(self.tokenizer.bos()).into());
        context.insert("eos_token".into(), named(self.tokenizer.eos()).into());
        template.render(&context, now)
    }

    /// Hashes all that decides which tokens follow a prompt: weights, tokenizer, template, context and position
    /// settings, the stream's format. Reads the whole file.
    ///
    /// # Errors
    /// `Io` when the file can't be read.
    pub fn continue_fingerprint(&self, context_length: usize, stream_format: u32) -> Result<[u8; 32], ModelFilesError> {
        let io = |source| ModelFilesError::Io { path: self.path.clone(), source };
        let mut hash = blake3::Hasher::new();
        hash.update(&self.tokenizer.fingerprint());
        let template = self.template.as_ref().map(ChatTemplate::source).unwrap_or_default();
        hash.update(blake3::hash(template.as_bytes()).as_bytes());
        hash.update(format!("{context_length} {stream_format} {:?}", self.end_tokens).as_bytes());
        // Everything of the architecture's own: RoPE, epsilons, head counts.
        let prefix = format!("{}.", self.architecture);
        for (key, value) in self.header.metadata.iter().filter(|(key, _)| key.starts_with(&prefix)) {
            hash.update(format!("{key}={value:?};").as_bytes());
        }
        for tensor in &self.header.tensors {
            hash.update(format!("{} {:?} {:?};", tensor.name, tensor.shape, tensor.kind).as_bytes());
        }
        let mut file = File::open(&self.path).map_err(io)?;
        file.seek(SeekFrom::Start(self.header.data_offset)).map_err(io)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let length = file.read(&mut buffer).map_err(io)?;
            if length == 0 {
                return Ok(*hash.finalize().as_bytes());
            }
            hash.update(&buffer[..length]);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn generation_defaults_come_from_the_file_then_from_what_lies_beside_it() {
        let side: Json = serde_json::from_str(
            r#"{"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1,
            "eos_token_id": [7, 3, 900]}"#,
        )
        .unwrap();
        let all = GenerationDefaults {
            temperature: Some(0.6),
            top_p: Some(0.95),
            top_k: Some(20),
            min_p: Some(0.05),
            repetition: Some(1.1),
        };
        let none = || Header {
            version: 3,
            metadata: std::collections::BTreeMap::new(),
            tensors: Vec::new(),
            alignment: 32,
            data_offset: 0,
        };
        let mut header = none();
        assert_eq!(defaults(&side, &header), all);
        assert_eq!(end_tokens(&side, &[2, 3], 100), [2, 3, 7]);
        assert_eq!(end_tokens(&serde_json::json!({"eos_token_id": 5}), &[2], 100), [2, 5]);
        assert_eq!(end_tokens(&Json::Null, &[2], 100), [2]);
        // What the file itself says comes first; greedy models say so beside it.
        for (key, value) in [("temp", 0.3), ("top_p", 0.5), ("top_k", 9.0), ("min_p", 0.1), ("penalty_repeat", 1.3)] {
            header.metadata.insert(format!("general.sampling.{key}"), gguf::Value::F32(value));
        }
        let own = GenerationDefaults {
            temperature: Some(0.3),
            top_p: Some(0.5),
            top_k: Some(9),
            min_p: Some(0.1),
            repetition: Some(1.3),
        };
        assert_eq!(defaults(&side, &header), own);
        let greedy: Json = serde_json::json!({"do_sample": false, "temperature": 0.7, "top_p": -1.0});
        let told = defaults(&greedy, &none());
        assert_eq!((told.temperature, told.top_p), (Some(0.0), None));
    }

    #[test]
    fn a_folder_needs_one_file_or_a_quant_that_picks_one() {
        let folder = tempfile::tempdir().unwrap();
        let error = |quant| resolve(folder.path(), quant).unwrap_err().to_string();
        assert!(error(None).contains("no such GGUF file"));
        std::fs::write(folder.path().join("m-Q8_0.gguf"), "").unwrap();
        assert!(resolve(folder.path(), None).unwrap().ends_with("m-Q8_0.gguf"));
        std::fs::write(folder.path().join("m-F16.gguf"), "").unwrap();
        assert!(error(None).contains("m-F16.gguf, m-Q8_0.gguf"));
        assert!(resolve(folder.path(), Some("q8_0")).unwrap().ends_with("m-Q8_0.gguf"));
        assert!(resolve(Path::new("/nowhere/m.gguf"), None).is_err());
    }
}
