//! The model machine: one table of what a model in each state accepts.
//!
//! ```text
//! Absent -load-> Fetching -> Loading -> Warming -> Ready -unload|drain-> Draining -> Unloading -> Absent
//!   any step may fail -> Failed        Ready -device fault-> Recovering -> Loading -> Warming -> Ready
//!                                                 ^- it does not come up again -'
//!                                      Ready -nobody is in-> Unloading
//! ```
//! `model_life` says what is done in each state, and who is told what.

use words::ModelState;

/// What happens to a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelInput {
    /// Someone wants it loaded.
    Load,
    /// Its files are on this host.
    Fetched,
    /// Its weights are in memory.
    Loaded,
    /// It answered its warm-up prompt.
    Warmed,
    /// Someone wants it gone, or the node drains.
    Unload,
    /// Nobody is in, and nobody gets in any more: there is nothing to drain.
    Close,
    /// Its last request has ended, or the budget has.
    Emptied,
    /// Its memory is free.
    Unloaded,
    /// The step in hand failed.
    Fail,
    /// Its device failed under it, or did not come up again.
    DeviceFault,
}

/// An input that the model's state does not accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefusedTransition {
    /// The state it is in.
    pub from: ModelState,
    /// What was asked.
    pub input: ModelInput,
}

impl std::fmt::Display for RefusedTransition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a model that is {:?} does not accept {:?}", self.from, self.input)
    }
}

impl std::error::Error for RefusedTransition {}

/// Returns the state that follows.
///
/// # Errors
/// [`RefusedTransition`] for every pair that is not in the diagram.
pub fn next_model_state(from: ModelState, input: ModelInput) -> Result<ModelState, RefusedTransition> {
    use ModelInput as I;
    use ModelState as S;
    match (from, input) {
        (S::Absent | S::Failed, I::Load) => Ok(S::Fetching),
        (S::Fetching, I::Fetched) => Ok(S::Loading),
        (S::Recovering, I::Load) => Ok(S::Loading),
        (S::Loading, I::Loaded) => Ok(S::Warming),
        (S::Warming, I::Warmed) => Ok(S::Ready),
        (S::Ready, I::Unload) => Ok(S::Draining),
        (S::Ready, I::Close) => Ok(S::Unloading),
        (S::Ready | S::Loading | S::Warming, I::DeviceFault) => Ok(S::Recovering),
        // A load that is not over is cancelled at its next step.
        (S::Fetching | S::Loading | S::Warming | S::Recovering, I::Unload) => Ok(S::Unloading),
        (S::Failed, I::Unload) => Ok(S::Absent),
        (S::Draining, I::Emptied) => Ok(S::Unloading),
        (S::Unloading, I::Unloaded) => Ok(S::Absent),
        (S::Fetching | S::Loading | S::Warming | S::Recovering | S::Unloading, I::Fail) => Ok(S::Failed),
        (from, input) => Err(RefusedTransition { from, input }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const INPUTS: [ModelInput; 10] = [
        ModelInput::Load,
        ModelInput::Fetched,
        ModelInput::Loaded,
        ModelInput::Warmed,
        ModelInput::Unload,
        ModelInput::Close,
        ModelInput::Emptied,
        ModelInput::Unloaded,
        ModelInput::Fail,
        ModelInput::DeviceFault,
    ];

    #[test]
    fn a_model_comes_and_goes() {
        let path = [
            ModelInput::Load,
            ModelInput::Fetched,
            ModelInput::Loaded,
            ModelInput::Warmed,
            ModelInput::Unload,
            ModelInput::Emptied,
            ModelInput::Unloaded,
        ];
        let end = path.into_iter().try_fold(ModelState::Absent, next_model_state).unwrap();
        assert_eq!(end, ModelState::Absent);
    }

    #[test]
    fn an_unknown_state_accepts_nothing() {
        assert!(INPUTS.into_iter().all(|input| next_model_state(ModelState::Unknown, input).is_err()));
    }

    proptest! {
        #[test]
        fn one_load_at_a_time_and_ready_only_when_warmed(
            inputs in proptest::collection::vec(proptest::sample::select(INPUTS.to_vec()), 0..60)
        ) {
            let (mut state, mut loading, mut warmed) = (ModelState::Absent, 0, false);
            for input in inputs {
                let Ok(next) = next_model_state(state, input) else { continue };
                match input {
                    ModelInput::Load => loading += 1,
                    ModelInput::Warmed => { loading -= 1; warmed = true }
                    ModelInput::Fail if state != ModelState::Unloading => loading = 0,
                    ModelInput::DeviceFault => loading = 0,
                    ModelInput::Unload if state != ModelState::Ready => loading = 0,
                    _ => {}
                }
                warmed &= matches!(next, ModelState::Ready | ModelState::Draining);
                prop_assert!(loading <= 1, "LC1");
                prop_assert!(next != ModelState::Ready || warmed);
                state = next;
            }
        }
    }
}
