//! Whether the configured models fit the memory that models may take: those that are loaded at start together, and each of
//! the others beside what never goes.

use super::{Finding, memory_budget};
use crate::activation::spec_of;
use crate::harness::{Harnesses, Sizes};
use crate::options::{ModelEntry, Options};

/// What one configured model needs, as far as that is known before it is loaded.
#[derive(Clone, Debug, PartialEq)]
struct Need {
    id: String,
    /// In bytes.
    bytes: u64,
    /// It is loaded at start.
    at_start: bool,
    /// Once loaded it is never evicted.
    stays: bool,
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

fn sum<'a>(needs: impl Iterator<Item = &'a Need>) -> u64 {
    needs.fold(0, |sum: u64, need| sum.saturating_add(need.bytes))
}

fn names<'a>(needs: impl Iterator<Item = &'a Need>) -> String {
    let each: Vec<String> = needs.map(|need| format!("'{}' {} MiB", need.id, mib(need.bytes))).collect();
    each.join(", ")
}

/// Says what does not fit. What a configured budget has no room for can never be loaded; one that was not configured may
/// be another at the next start.
fn judge(budget: u64, configured: bool, needs: &[Need]) -> Vec<Finding> {
    const WHAT: &str = "model memory";
    let misfit: fn(&str, String, String) -> Finding = if configured { Finding::fault } else { Finding::warning };
    let within = format!("models may take {} MiB{}", mib(budget), if configured { "" } else { ", what is free now" });
    let raise = "raise memory.budget_mib";
    let mut findings = Vec::new();
    let start = || needs.iter().filter(|need| need.at_start);
    let (at_start, too_many) = (sum(start()), sum(start()) > budget);
    if too_many {
        let found = format!("{within}; those loaded at start need {} MiB: {}", mib(at_start), names(start()));
        findings.push(misfit(WHAT, found, format!("take some out of [[default_models]], or {raise}")));
    }
    for need in needs.iter().filter(|need| !(need.at_start && too_many)) {
        let beside = || start().filter(|other| other.stays && other.id != need.id);
        let taken = sum(beside());
        if need.bytes.saturating_add(taken) <= budget {
            continue;
        }
        let found = match taken {
            0 => format!("{within}; '{}' needs {} MiB", need.id, mib(need.bytes)),
            _ => format!("{within}; '{}' needs {} MiB beside {}", need.id, mib(need.bytes), names(beside())),
        };
        findings.push(misfit(WHAT, found, format!("give it a smaller context_length or another quant, or {raise}")));
    }
    let pinned = || needs.iter().filter(|need| need.stays);
    if findings.is_empty() && sum(pinned()) > budget {
        let found = format!("{within}; what is never evicted needs {} MiB: {}", mib(sum(pinned())), names(pinned()));
        findings.push(Finding::warning(WHAT, found, format!("pin fewer, or {raise}: who comes last finds no room")));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(WHAT, format!("{within}; those loaded at start need {} MiB", mib(at_start))));
    }
    findings
}

/// Looks at all configured models whose need is known: those of a hub are known once they are fetched.
pub(super) fn look(options: &Options, harnesses: &Harnesses) -> Vec<Finding> {
    let budget = memory_budget(options);
    if budget == 0 || options.entries().next().is_none() {
        return Vec::new();
    }
    let need = |entry: &ModelEntry| {
        let spec = spec_of(entry).ok()?;
        // Whatever else is wrong with it is told beside its name.
        let estimated = harnesses.find(&spec.harness).ok()?.estimate(&spec, Sizes::of(options));
        let at_start = options.default_models.iter().any(|named| named.id == entry.id);
        let stays = entry.card(options.is_catalogued(&entry.id)).pinned;
        Some(Need { id: entry.id.clone(), bytes: estimated.ok()?, at_start, stays })
    };
    let needs: Vec<Need> = options.entries().filter_map(need).collect();
    judge(budget, options.memory.budget_mib.is_some(), &needs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Level;

    /// Models by id, MiB, and whether they are loaded at start (`s`) and stay (`p`).
    fn needs(models: &[(&str, u64, &str)]) -> Vec<Need> {
        let need = |(id, mib, how): &(&str, u64, &str)| Need {
            id: id.to_string(),
            bytes: mib << 20,
            at_start: how.contains('s'),
            stays: how.contains('p'),
        };
        models.iter().map(need).collect()
    }

    fn judged(configured: bool, models: &[(&str, u64, &str)]) -> Vec<(Level, String)> {
        let found = judge(100 << 20, configured, &needs(models));
        found.into_iter().map(|finding| (finding.level, finding.found)).collect()
    }

    #[test]
    fn what_can_never_fit_is_a_fault_with_its_figures_and_by_a_guess_a_warning() {
        let big = [("big", 120, ""), ("small", 10, "")];
        let words = "models may take 100 MiB; 'big' needs 120 MiB";
        assert_eq!(judged(true, &big), [(Level::Fault, words.to_string())]);
        let guessed = &judged(false, &big)[0];
        assert!(guessed.0 == Level::Warning && guessed.1.contains("100 MiB, what is free now;"), "{guessed:?}");
        let beside = judged(true, &[("always", 70, "sp"), ("x", 40, ""), ("y", 30, "")]);
        let words = "models may take 100 MiB; 'x' needs 40 MiB beside 'always' 70 MiB";
        assert_eq!(beside, [(Level::Fault, words.to_string())]);
    }

    #[test]
    fn models_loaded_at_start_must_fit_together_and_others_by_turns() {
        let start = judged(true, &[("a", 60, "sp"), ("b", 50, "s")]);
        let words = "models may take 100 MiB; those loaded at start need 110 MiB: 'a' 60 MiB, 'b' 50 MiB";
        assert_eq!(start, [(Level::Fault, words.to_string())]);
        let turns = judged(true, &[("a", 60, ""), ("b", 60, "s"), ("c", 60, "")]);
        assert_eq!(turns, [(Level::Ok, "models may take 100 MiB; those loaded at start need 60 MiB".to_string())]);
    }

    #[test]
    fn pinned_models_that_do_not_fit_together_are_warned_of() {
        let pinned = judged(true, &[("a", 60, "p"), ("b", 50, "p"), ("c", 10, "")]);
        let words = "models may take 100 MiB; what is never evicted needs 110 MiB: 'a' 60 MiB, 'b' 50 MiB";
        assert_eq!(pinned, [(Level::Warning, words.to_string())]);
    }
}
