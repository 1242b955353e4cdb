//! What a node and its models went through: the last changes of each, with their times.

use std::collections::{BTreeMap, VecDeque};

use words::{ModelHistory, ModelId, StateChange};

/// Changes that are kept of one machine.
const CHANGES_MAX: usize = 64;
/// Models whose history is kept; the one whose last change is the oldest goes first.
const MODELS_MAX: usize = 256;

/// The changes, in bounded memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    node: VecDeque<StateChange>,
    models: BTreeMap<ModelId, VecDeque<StateChange>>,
}

fn add(changes: &mut VecDeque<StateChange>, change: StateChange) {
    if changes.back().is_some_and(|last| (&last.state, &last.why) == (&change.state, &change.why)) {
        return;
    }
    if changes.len() == CHANGES_MAX {
        changes.pop_front();
    }
    changes.push_back(change);
}

impl History {
    /// Takes a state of the node; one that it is in already is no change.
    pub(crate) fn node(&mut self, change: StateChange) {
        add(&mut self.node, change);
    }

    /// Takes a state of a model; one that it is in already is no change.
    pub(crate) fn model(&mut self, id: &ModelId, change: StateChange) {
        if self.models.len() >= MODELS_MAX && !self.models.contains_key(id) {
            let last = |changes: &VecDeque<StateChange>| changes.back().map_or(0, |change| change.at_unix_ms);
            let oldest = self.models.iter().min_by_key(|(_, changes)| last(changes)).map(|(id, _)| id.clone());
            oldest.map(|id| self.models.remove(&id));
        }
        add(self.models.entry(id.clone()).or_default(), change);
    }

    /// Returns all of it, the oldest first.
    pub(crate) fn read(&self) -> (Vec<StateChange>, Vec<ModelHistory>) {
        let of = |(model, states): (&ModelId, &VecDeque<StateChange>)| ModelHistory {
            model: model.clone(),
            states: states.iter().cloned().collect(),
        };
        (self.node.iter().cloned().collect(), self.models.iter().map(of).collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn change(state: &str, at_unix_ms: u64) -> StateChange {
        StateChange { state: state.into(), at_unix_ms, why: String::new() }
    }

    #[test]
    fn the_last_changes_are_kept_and_a_state_is_no_change_of_itself() {
        let mut history = History::default();
        for i in 0..200 {
            history.node(change(if i / 2 % 2 == 0 { "ready" } else { "drained" }, i));
        }
        let (node, _) = history.read();
        assert_eq!((node.len(), node.last().unwrap().at_unix_ms), (CHANGES_MAX, 198));
        assert!(
            node.windows(2).all(|pair| pair[0].state != pair[1].state && pair[0].at_unix_ms + 2 == pair[1].at_unix_ms)
        );
    }

    #[test]
    fn of_too_many_models_the_one_that_did_nothing_for_the_longest_is_forgotten() {
        let mut history = History::default();
        let id = |i: u64| ModelId::new(format!("m{i}")).unwrap();
        (0..MODELS_MAX as u64).for_each(|i| history.model(&id(i), change("ready", i)));
        history.model(&id(0), change("draining", 1000));
        history.model(&id(999), change("fetching", 1001));
        let (_, models) = history.read();
        assert_eq!(models.len(), MODELS_MAX);
        assert!(models.iter().any(|model| model.model == id(0)) && !models.iter().any(|model| model.model == id(1)));
    }
}
