//! What an operator says of models: the catalogue, what is loaded at start, and the memory for them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use service::config::UnusableOption;
use wire::output::Overrides;
use words::{ModelCard, ModelId};

use super::process::{ProcessOptions, check_entry};
use super::{Options, PROCESS_HARNESS};
use crate::sampling::Defaults;

/// Most of any figure of memory.
pub(super) const MEMORY_MIB_MAX: usize = 1 << 26;
/// Most entries of a list of models.
const MODELS_MAX: usize = 512;
/// Most other names of one model.
const ALIASES_MAX: usize = 64;
/// Most characters of what is shown of a model.
const WORDS_MAX: usize = 1024;
/// Most tokens of a warm-up.
const WARMUP_TOKENS_MAX: u32 = 4096;
/// Longest time without a request before a model goes, in seconds: a month.
const TTL_MAX: u64 = 31 * 86_400;

/// A model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ModelEntry {
    /// The name clients use.
    pub id: String,
    /// Other names that clients may use for it; each names one model, and none is another model's id.
    pub aliases: Vec<String>,
    /// Such as 'qwen3', for those who choose.
    pub family: Option<String>,
    /// Who made it, for those who choose.
    pub provider: Option<String>,
    /// What it is for, in a sentence.
    pub description: Option<String>,
    /// What it is good at, such as 'tools' or 'vision': shown as it is, and believed by nobody.
    pub capabilities: Vec<String>,
    /// The harness: 'candle' (the default), 'process' (an external engine) or 'fake'.
    pub harness: Option<String>,
    /// A GGUF file, a folder with one, or a model on a hub: `org/repo[:QUANT][@REVISION]`, which is fetched once. What
    /// begins with '/', '.' or '~', ends in '.gguf' or is there is a path; 'hf://' before it makes anything a reference.
    /// When absent, an id of the form 'org/repo' is one.
    pub path: Option<PathBuf>,
    /// Which file of several, such as 'Q8_0'.
    pub quant: Option<String>,
    /// 'auto' (the default), 'cpu', 'cuda' or 'cuda:N'.
    pub device: Option<String>,
    /// Longest context served of it, prompt and answer together, in tokens; its harness's and its own bound it too. 0:
    /// those alone.
    pub context_length: usize,
    /// The form of its tool calls: 'auto' (the default: told by its chat template), 'hermes', 'llama', 'mistral',
    /// 'functionary', 'qwen3_coder', 'seed_oss', 'glm45' or 'none'.
    pub tool_parser: Option<String>,
    /// The form of its reasoning: 'auto' (the default: told by its chat template), 'think' or 'none'.
    pub reasoning_parser: Option<String>,
    /// Whether the worker refuses to start without it. Of models loaded at start alone.
    pub required: bool,
    /// It is unloaded after this long without a request, in seconds; 0: never. Of the catalogue alone: a request brings it
    /// back.
    pub ttl_s: u64,
    /// It is never evicted, and stays when its time is over. Models outside the catalogue always are: no request could
    /// bring them back.
    pub pin: bool,
    /// Of two models that could be evicted the one with the lower figure goes.
    pub priority: i32,
    /// Memory that it is expected to take once loaded, in MiB, where its harness can't tell or tells wrong; 0: the
    /// harness tells. Once it is loaded, what it takes is measured.
    pub memory_mib: usize,
    /// What it is asked before it serves, so that the first real request finds it warm; absent: a word.
    pub warmup: Option<String>,
    /// Tokens of the answer to that.
    pub warmup_tokens: Option<u32>,
    /// How it samples where a request says nothing; before what its own files say. An external engine is not told.
    pub sampling: Option<SamplingOptions>,
    /// The external engine, for the harness 'process'.
    pub process: Option<ProcessOptions>,
}

/// How a model samples where a request says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingOptions {
    /// From 0 to 2.
    pub temperature: Option<f32>,
    /// Above 0, to 1.
    pub top_p: Option<f32>,
    /// Most candidates; 0: all.
    pub top_k: Option<u32>,
    /// From 0 to 1.
    pub min_p: Option<f32>,
    /// From -2 to 2.
    pub presence_penalty: Option<f32>,
    /// From -2 to 2.
    pub frequency_penalty: Option<f32>,
    /// Above 0, to 2; 1 does nothing.
    pub repetition_penalty: Option<f32>,
    /// Most tokens of an answer.
    pub max_tokens: Option<u32>,
}

/// What models may take.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryOptions {
    /// Memory for all models together, in MiB: of the GPUs where models go there, else of the host. Absent: what is free
    /// of it at the start.
    pub budget_mib: Option<usize>,
    /// How long a model keeps serving, in seconds, while another waits for its memory and it is never without work; then
    /// it takes no new requests, ends those that it has, and makes room.
    pub turn_s: f64,
}

impl Default for MemoryOptions {
    fn default() -> Self {
        MemoryOptions { budget_mib: None, turn_s: 10.0 }
    }
}

impl MemoryOptions {
    /// Returns how long a model keeps serving while another waits.
    pub fn turn(&self) -> Duration {
        super::seconds(self.turn_s)
    }
}

impl SamplingOptions {
    fn check(&self) -> Result<(), UnusableOption> {
        let none_below = f32::MIN_POSITIVE;
        for (key, value, low, high) in [
            ("temperature", self.temperature, 0.0, 2.0),
            ("top_p", self.top_p, none_below, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            ("repetition_penalty", self.repetition_penalty, none_below, 2.0),
        ] {
            if let Some(value) = value.filter(|value| !(low..=high).contains(value)) {
                let low = if low == none_below { "above 0".to_string() } else { format!("from {low}") };
                let problem = format!("must be {low} to {high}, it is {value}");
                return Err(UnusableOption { key: format!("sampling.{key}"), problem });
            }
        }
        match self.max_tokens {
            Some(0) => Err(UnusableOption { key: "sampling.max_tokens".into(), problem: "must be 1 or more".into() }),
            _ => Ok(()),
        }
    }

    /// Puts what is said here over what a model's files say.
    pub(crate) fn over(&self, files: Defaults) -> Defaults {
        Defaults {
            temperature: self.temperature.or(files.temperature),
            top_p: self.top_p.or(files.top_p),
            top_k: self.top_k.or(files.top_k),
            min_p: self.min_p.or(files.min_p),
            presence: self.presence_penalty.or(files.presence),
            frequency: self.frequency_penalty.or(files.frequency),
            repetition: self.repetition_penalty.or(files.repetition),
            max_tokens: self.max_tokens.or(files.max_tokens),
        }
    }
}

impl ModelEntry {
    /// Reads what is said of calls and reasoning.
    ///
    /// # Errors
    /// [`UnusableOption`] with the key alone.
    pub fn overrides(&self) -> Result<Overrides, UnusableOption> {
        let read = Overrides::read(self.tool_parser.as_deref(), self.reasoning_parser.as_deref());
        read.map_err(|(key, words)| UnusableOption { key: key.into(), problem: format!("must be {words}") })
    }

    /// Says whether an external engine serves it.
    pub(crate) fn is_external(&self) -> bool {
        self.harness.as_deref() == Some(PROCESS_HARNESS)
    }

    /// Says whether it says nothing but its id, and whether it is required.
    fn is_name_alone(&self) -> bool {
        *self == ModelEntry { id: self.id.clone(), required: self.required, ..ModelEntry::default() }
    }

    /// Makes what is published of it; `on_demand` says whether it stands in the catalogue.
    pub(crate) fn card(&self, on_demand: bool) -> ModelCard {
        ModelCard {
            aliases: self.aliases.iter().filter_map(|alias| ModelId::new(alias.clone()).ok()).collect(),
            family: self.family.clone(),
            provider: self.provider.clone(),
            description: self.description.clone(),
            capabilities: self.capabilities.clone(),
            on_demand,
            pinned: self.pin || !on_demand,
            priority: self.priority,
            ttl_s: if on_demand { self.ttl_s } else { 0 },
            memory_estimate: (self.memory_mib as u64) << 20,
        }
    }

    fn check(&self, macros: &BTreeMap<String, String>) -> Result<(), UnusableOption> {
        let wrong = |key: &str, problem: String| Err(UnusableOption { key: key.into(), problem });
        if let Err(error) = ModelId::new(self.id.clone()) {
            return wrong("id", error.to_string());
        }
        self.overrides()?;
        check_entry(self.harness.as_deref(), self.process.as_ref(), self.path.is_some(), macros)?;
        self.sampling.unwrap_or_default().check()?;
        for (i, alias) in self.aliases.iter().enumerate() {
            if let Err(error) = ModelId::new(alias.clone()) {
                return wrong(&format!("aliases[{i}]"), error.to_string());
            }
        }
        for (key, length, most) in [
            ("aliases", self.aliases.len(), ALIASES_MAX),
            ("capabilities", self.capabilities.len(), ALIASES_MAX),
            ("memory_mib", self.memory_mib, MEMORY_MIB_MAX),
            ("ttl_s", self.ttl_s as usize, TTL_MAX as usize),
            ("warmup_tokens", self.warmup_tokens.unwrap_or(1) as usize, WARMUP_TOKENS_MAX as usize),
        ] {
            if length > most {
                return wrong(key, format!("may be {most} at most, it is {length}"));
            }
        }
        if self.warmup_tokens == Some(0) {
            return wrong("warmup_tokens", "must be 1 or more".into());
        }
        let capabilities = self.capabilities.iter().map(|words| ("capabilities", Some(words)));
        let words = [("family", &self.family), ("provider", &self.provider), ("description", &self.description)];
        for (key, words) in words.into_iter().map(|(key, words)| (key, words.as_ref())).chain(capabilities) {
            if words.is_some_and(|words| words.chars().count() > WORDS_MAX) {
                return wrong(key, format!("may have {WORDS_MAX} characters at most"));
            }
        }
        Ok(())
    }
}

impl Options {
    /// Finds what is configured of a model, by its id or another name: in the catalogue, else among those loaded at start.
    pub(crate) fn entry(&self, name: &str) -> Option<&ModelEntry> {
        let named = |entry: &&ModelEntry| entry.id == name || entry.aliases.iter().any(|alias| alias == name);
        self.models.iter().chain(&self.default_models).find(named)
    }

    /// Says whether a model stands in the catalogue.
    pub(crate) fn is_catalogued(&self, id: &str) -> bool {
        self.models.iter().any(|entry| entry.id == id)
    }

    /// Lists what is configured of all models, each once: the catalogue's first.
    pub(crate) fn entries(&self) -> impl Iterator<Item = &ModelEntry> {
        let others = self.default_models.iter().filter(|entry| !self.is_catalogued(&entry.id));
        self.models.iter().chain(others)
    }

    /// Lists the models to load at start, in order: what the catalogue says of those that are a name alone.
    pub(crate) fn at_start(&self) -> Vec<ModelEntry> {
        let whole = |entry: &ModelEntry| {
            let known = self.models.iter().find(|known| known.id == entry.id).cloned();
            ModelEntry { required: entry.required, ..known.unwrap_or_else(|| entry.clone()) }
        };
        self.default_models.iter().map(whole).collect()
    }
}

/// Checks the entries, each and beside the others.
pub(super) fn check(options: &Options) -> Result<(), UnusableOption> {
    let lists = [("models", &options.models), ("default_models", &options.default_models)];
    let mut names: BTreeMap<&str, String> = BTreeMap::new();
    let wrong = |key: String, problem: String| Err(UnusableOption { key, problem });
    for (list, entries) in lists {
        let mut seen = BTreeSet::new();
        if entries.len() > MODELS_MAX {
            return wrong(list.into(), format!("may have {MODELS_MAX} entries at most"));
        }
        for (i, entry) in entries.iter().enumerate() {
            let at = |key: &str| format!("{list}[{i}].{key}");
            entry
                .check(&options.hooks.macros)
                .map_err(|error| UnusableOption { key: at(&error.key), problem: error.problem })?;
            if !seen.insert(&entry.id) {
                return wrong(at("id"), format!("'{}' is there twice", entry.id));
            }
            names.insert(&entry.id, format!("the id of {list}[{i}]"));
        }
    }
    for (i, entry) in options.models.iter().enumerate() {
        if entry.required {
            let problem = "is of [[default_models]]: name the model there, with required = true".into();
            return wrong(format!("models[{i}].required"), problem);
        }
    }
    for (i, entry) in options.default_models.iter().enumerate() {
        if options.is_catalogued(&entry.id) && !entry.is_name_alone() {
            let problem = format!("'{}' stands in [[models]] too: say all of it there, and only its id here", entry.id);
            return wrong(format!("default_models[{i}].id"), problem);
        }
    }
    for (list, entries) in lists {
        for (i, entry) in entries.iter().enumerate() {
            for (j, alias) in entry.aliases.iter().enumerate() {
                let here = format!("{list}[{i}].aliases[{j}]");
                if let Some(other) = names.insert(alias, format!("an alias of '{}'", entry.id)) {
                    return wrong(here, format!("'{alias}' is {other} too: a name means one model"));
                }
            }
        }
    }
    if let Some(mib) = options.memory.budget_mib.filter(|mib| !(1..=MEMORY_MIB_MAX).contains(mib)) {
        return wrong("memory.budget_mib".into(), format!("must be from 1 to {MEMORY_MIB_MAX}, it is {mib}"));
    }
    let turn_s = options.memory.turn_s;
    if !(0.1..=86_400.0).contains(&turn_s) {
        return wrong("memory.turn_s".into(), format!("must be from 0.1 to 86400, it is {turn_s}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn entry(id: &str, aliases: &[&str]) -> ModelEntry {
        let aliases = aliases.iter().map(|alias| alias.to_string()).collect();
        ModelEntry { id: id.into(), harness: Some("fake".into()), aliases, ..ModelEntry::default() }
    }

    fn fault(options: &Options) -> String {
        options.check().unwrap_err().to_string()
    }

    #[test]
    fn a_name_means_one_model() {
        let options = |models: &[ModelEntry]| Options { models: models.to_vec(), ..Options::default() };
        assert!(options(&[entry("a", &["x", "y"]), entry("b", &["z"])]).check().is_ok());
        for (models, wanted) in [
            ([entry("a", &["x"]), entry("b", &["x"])], "'x' is an alias of 'a' too"),
            ([entry("a", &[]), entry("b", &["a"])], "'a' is the id of models[0] too"),
            ([entry("a", &["x", "x"]), entry("b", &[])], "'x' is an alias of 'a' too"),
            ([entry("a", &[]), entry("a", &[])], "'a' is there twice"),
        ] {
            let fault = fault(&options(&models));
            assert!(fault.contains(wanted), "{fault}");
        }
    }

    #[test]
    fn a_model_loaded_at_start_is_said_in_one_place() {
        let catalogued = ModelEntry { ttl_s: 9, ..entry("a", &[]) };
        let name = ModelEntry { id: "a".into(), required: true, ..ModelEntry::default() };
        let options = |start: &ModelEntry| Options {
            models: vec![catalogued.clone()],
            default_models: vec![start.clone()],
            ..Options::default()
        };
        let start = options(&name).at_start();
        assert!(start[0].ttl_s == 9 && start[0].required && start[0].harness.as_deref() == Some("fake"));
        assert!(fault(&options(&entry("a", &[]))).contains("stands in [[models]] too"));
        let cards = [true, false].map(|on_demand| catalogued.card(on_demand));
        assert!(!cards[0].pinned && cards[0].ttl_s == 9);
        assert!(cards[1].pinned && cards[1].ttl_s == 0, "no request could bring it back");
    }

    #[test]
    fn what_a_model_samples_with_is_checked_and_wins_over_its_files() {
        let with = |sampling: SamplingOptions| Options {
            models: vec![ModelEntry { sampling: Some(sampling), ..entry("a", &[]) }],
            ..Options::default()
        };
        let hot = SamplingOptions { temperature: Some(2.5), ..SamplingOptions::default() };
        assert!(fault(&with(hot)).contains("models[0].sampling.temperature"), "{}", fault(&with(hot)));
        let files = Defaults { temperature: Some(0.1), top_k: Some(9), ..Defaults::default() };
        let own = SamplingOptions { temperature: Some(0.7), max_tokens: Some(5), ..SamplingOptions::default() };
        let folded = own.over(files);
        assert_eq!((folded.temperature, folded.top_k, folded.max_tokens), (Some(0.7), Some(9), Some(5)));
    }
}
