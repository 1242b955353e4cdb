//! Which files of a repo a reference means.

use std::collections::BTreeMap;

use crate::names::FileName;
use crate::{HubError, Reference};

/// What is preferred where a reference names no quant: good answers in little memory first.
const PREFERRED: &[&str] = &["Q4_K_M", "Q8_0", "Q6_K", "Q5_K_M", "Q4_0", "F16", "BF16", "F32"];
/// Files beside a GGUF file that say how to talk to the model.
const SIDE_FILES: &[&str] = &["chat_template.jinja", "tokenizer_config.json", "generation_config.json"];
/// Parts of names of GGUF files that are no language models.
const NOT_MODELS: &[&str] = &["mmproj", "imatrix"];
/// Most choices that an error lists.
const LISTED_MAX: usize = 40;

/// The chosen files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    /// The model's files: one, or the parts of a split one in their order.
    pub(crate) model: Vec<FileName>,
    /// What lies beside it and is read with it.
    pub(crate) side: Vec<FileName>,
}

/// A model of a repo: one file, or all parts of one.
struct Candidate {
    /// The name without the number of the part, without `.gguf`.
    stem: String,
    parts: BTreeMap<u32, FileName>,
    /// How many parts there must be.
    wanted: u32,
}

/// Splits `name-00001-of-00003` into its stem, the part's number and their count.
fn part_of(stem: &str) -> Option<(&str, u32, u32)> {
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(number) || !digits(count) {
        return None;
    }
    Some((stem, number.parse().ok()?, count.parse().ok()?))
}

fn candidates<'a>(names: impl Iterator<Item = &'a FileName>) -> Vec<Candidate> {
    let mut found: BTreeMap<(String, u32), Candidate> = BTreeMap::new();
    for name in names {
        let Some((whole, end)) = name.as_str().split_at_checked(name.as_str().len().saturating_sub(5)) else {
            continue;
        };
        let base = whole.rsplit('/').next().unwrap_or(whole).to_lowercase();
        if !end.eq_ignore_ascii_case(".gguf") || NOT_MODELS.iter().any(|other| base.contains(other)) {
            continue;
        }
        let (stem, number, wanted) = part_of(whole).unwrap_or((whole, 1, 1));
        let candidate = || Candidate { stem: stem.into(), parts: BTreeMap::new(), wanted };
        found.entry((stem.into(), wanted)).or_insert_with(candidate).parts.insert(number, name.clone());
    }
    found.into_values().filter(|candidate| candidate.parts.keys().copied().eq(1..=candidate.wanted)).collect()
}

/// Returns whether `quant` stands in `stem` as a whole: `Q4_K` is not in `x-Q4_K_M`, nor `Q4_XS` in `x-IQ4_XS`.
fn names_quant(stem: &str, quant: &str) -> bool {
    let (stem, quant) = (stem.to_lowercase(), quant.to_lowercase());
    stem.match_indices(&quant).any(|(at, _)| {
        let before = stem[..at].chars().next_back();
        let after = stem[at + quant.len()..].chars().next();
        before.is_none_or(|c| !c.is_alphanumeric()) && after.is_none_or(|c| !c.is_alphanumeric() && c != '_')
    })
}

/// Chooses among a repo's files. Names that are no file names are passed over: nothing is ever done with them.
///
/// # Errors
/// [`HubError::Choice`] with what there is, when nothing fits or several do.
pub(crate) fn choose(reference: &Reference, names: &[String]) -> Result<Choice, HubError> {
    let usable: Vec<FileName> = names.iter().filter_map(|name| FileName::new(name).ok()).collect();
    if usable.len() < names.len() {
        let unsafe_names = names.len() - usable.len();
        tracing::warn!(repo = reference.repo(), unsafe_names, "the repo lists names that are no file names");
    }
    let all = candidates(usable.iter());
    let is_file = |candidate: &&Candidate, quant: &str| {
        candidate.parts.values().any(|name| name.as_str() == quant) || candidate.stem == quant
    };
    let fitting = |quant: &str| -> Vec<&Candidate> {
        let exact: Vec<_> = all.iter().filter(|candidate| is_file(candidate, quant)).collect();
        if !exact.is_empty() {
            return exact;
        }
        all.iter().filter(|candidate| names_quant(&candidate.stem, quant)).collect()
    };
    let chosen = match reference.quant() {
        Some(quant) => fitting(quant),
        None if all.len() == 1 => all.iter().collect(),
        None => PREFERRED.iter().map(|quant| fitting(quant)).find(|found| !found.is_empty()).unwrap_or_default(),
    };
    let [chosen] = chosen[..] else {
        let listed = if chosen.is_empty() { all.iter().collect() } else { chosen };
        let mut choices: Vec<_> = listed.iter().map(|candidate| format!("{}.gguf", candidate.stem)).collect();
        if choices.len() > LISTED_MAX {
            let more = choices.len() - LISTED_MAX;
            choices.truncate(LISTED_MAX);
            choices.push(format!("{more} more"));
        }
        return Err(HubError::Choice { reference: reference.to_string(), choices });
    };
    let model: Vec<FileName> = chosen.parts.values().cloned().collect();
    let side = SIDE_FILES.iter().filter_map(|name| model.first()?.beside(name));
    let side = side.filter(|name| usable.contains(name)).collect();
    Ok(Choice { model, side })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The chosen model files, or the choices of the error.
    fn check(reference: &str, names: &[&str]) -> Result<Vec<String>, Vec<String>> {
        let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        match choose(&Reference::parse(reference).unwrap(), &names) {
            Ok(choice) => Ok(choice.model.iter().map(|name| name.as_str().to_string()).collect()),
            Err(HubError::Choice { choices, .. }) => Err(choices),
            Err(error) => panic!("{error}"),
        }
    }

    fn strings(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    const MANY: &[&str] = &[
        "README.md",
        "m-Q4_K_M.gguf",
        "m-Q4_K_S.gguf",
        "m-IQ4_XS.gguf",
        "m-bf16.gguf",
        "mmproj-m-f16.gguf",
        "m-Q8_0.gguf",
    ];

    #[test]
    fn a_quant_is_matched_whole_and_in_any_case() {
        assert_eq!(check("o/r:q4_k_m", MANY), Ok(strings(&["m-Q4_K_M.gguf"])));
        assert_eq!(check("o/r:Q8_0", MANY), Ok(strings(&["m-Q8_0.gguf"])));
        for absent in ["Q4_K", "Q4_XS", "f16", "8_0", "Q8"] {
            assert_eq!(check(&format!("o/r:{absent}"), MANY).unwrap_err().len(), 5, "{absent}");
        }
        assert_eq!(check("o/r:Q8_0", &["Q8_0/model.gguf", "F16/model.gguf"]), Ok(strings(&["Q8_0/model.gguf"])));
    }

    #[test]
    fn without_a_quant_the_only_one_or_the_preferred_one_is_taken() {
        assert_eq!(check("o/r", MANY), Ok(strings(&["m-Q4_K_M.gguf"])));
        assert_eq!(check("o/r", &["x-Q2_K.gguf", "a.txt"]), Ok(strings(&["x-Q2_K.gguf"])));
        assert_eq!(check("o/r", &["x-Q2_K.gguf", "x-Q3_K.gguf"]), Err(strings(&["x-Q2_K.gguf", "x-Q3_K.gguf"])));
        assert_eq!(check("o/r", &["a.txt"]), Err(Vec::new()));
    }

    #[test]
    fn several_that_fit_are_listed_and_a_file_name_settles_it() {
        let names = &["a-Q8_0.gguf", "b-Q8_0.gguf"];
        assert_eq!(check("o/r:Q8_0", names), Err(strings(names)));
        assert_eq!(check("o/r:b-Q8_0.gguf", names), Ok(strings(&["b-Q8_0.gguf"])));
        assert_eq!(check("o/r:b-q8_0", names), Ok(strings(&["b-Q8_0.gguf"])));
    }

    #[test]
    fn all_parts_of_a_split_file_are_one_choice_and_half_of_them_none() {
        let parts = &["m-Q8_0-00002-of-00002.gguf", "m-Q8_0-00001-of-00002.gguf", "m-F16-00001-of-00002.gguf"];
        let wanted = strings(&["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"]);
        assert_eq!(check("o/r:Q8_0", parts), Ok(wanted));
        assert_eq!(check("o/r:F16", parts), Err(strings(&["m-Q8_0.gguf"])));
    }

    #[test]
    fn names_that_lead_elsewhere_are_never_chosen() {
        assert_eq!(check("o/r:Q8_0", &["../../m-Q8_0.gguf", "/m-Q8_0.gguf", "a\\m-Q8_0.gguf"]), Err(Vec::new()));
        assert_eq!(check("o/r", &["../m-Q8_0.gguf", "m-F16.gguf"]), Ok(strings(&["m-F16.gguf"])));
    }

    #[test]
    fn side_files_come_from_the_models_own_folder() {
        let names = strings(&["q/m.gguf", "q/generation_config.json", "tokenizer_config.json"]);
        let choice = choose(&Reference::parse("o/r").unwrap(), &names).unwrap();
        assert_eq!(choice.side, [FileName::new("q/generation_config.json").unwrap()]);
    }
}
