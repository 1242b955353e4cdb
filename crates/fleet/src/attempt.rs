//! The fence of one request: which worker may still speak, and for which token.
//!
//! A gateway accepts only the current attempt and the next index of each choice, so that nothing is lost and
//! nothing comes twice, whatever an earlier attempt still sends.

/// Why tokens were not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FenceError {
    /// They are of an attempt that was given up.
    OldAttempt,
    /// They are not the next ones of their choice.
    WrongIndex {
        /// The index that was due.
        due: u32,
    },
    /// Their choice is over, or was never asked for.
    NoSuchChoice,
}

impl std::fmt::Display for FenceError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FenceError::OldAttempt => f.write_str("tokens of an attempt that was given up"),
            FenceError::WrongIndex { due } => write!(f, "tokens out of turn, index {due} was due"),
            FenceError::NoSuchChoice => f.write_str("tokens of a choice that is over or was never asked for"),
        }
    }
}

impl std::error::Error for FenceError {}

/// What one choice has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    /// Its ids from index 0.
    pub ids: Vec<u32>,
    /// Whether it is over.
    pub finished: bool,
}

/// The account of one request, over all its attempts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    attempt: u32,
    choices: Vec<Accepted>,
}

impl Fence {
    /// Makes the account of a request with `choices` choices; no attempt is open yet.
    pub fn new(choices: usize) -> Self {
        Fence { attempt: 0, choices: vec![Accepted::default(); choices] }
    }

    /// Opens the next attempt and closes the one before; returns its number, from 1.
    pub fn open(&mut self) -> u32 {
        self.attempt += 1;
        self.attempt
    }

    /// Accepts tokens of `attempt`, of which the first has `index` in `choice`.
    ///
    /// # Errors
    /// [`FenceError`] when they are old, out of turn or nobody's; the account is then unchanged.
    pub fn accept(
        &mut self,
        attempt: u32,
        choice: u32,
        index: u32,
        ids: &[u32],
        finished: bool,
    ) -> Result<(), FenceError> {
        if attempt != self.attempt {
            return Err(FenceError::OldAttempt);
        }
        let known = self.choices.get_mut(choice as usize).filter(|known| !known.finished);
        let known = known.ok_or(FenceError::NoSuchChoice)?;
        let due = known.ids.len() as u32;
        if index != due {
            return Err(FenceError::WrongIndex { due });
        }
        known.ids.extend_from_slice(ids);
        known.finished = finished;
        Ok(())
    }

    /// Returns the current attempt's number, 0 before the first.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Returns what each choice has.
    pub fn choices(&self) -> &[Accepted] {
        &self.choices
    }

    /// Returns whether every choice is over.
    pub fn finished(&self) -> bool {
        self.choices.iter().all(|choice| choice.finished)
    }

    /// Returns whether any token was accepted.
    pub fn begun(&self) -> bool {
        self.choices.iter().any(|choice| !choice.ids.is_empty() || choice.finished)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_current_attempt_and_the_next_index_are_accepted() {
        let mut fence = Fence::new(2);
        let first = fence.open();
        assert_eq!(fence.accept(first, 0, 0, &[5, 6], false), Ok(()));
        assert_eq!(fence.accept(first, 0, 1, &[6], false), Err(FenceError::WrongIndex { due: 2 }));
        assert_eq!(fence.accept(first, 0, 3, &[8], false), Err(FenceError::WrongIndex { due: 2 }));
        let second = fence.open();
        assert_eq!(fence.accept(first, 0, 2, &[7], false), Err(FenceError::OldAttempt));
        assert_eq!(fence.accept(second, 0, 2, &[7], true), Ok(()));
        assert_eq!(fence.accept(second, 0, 3, &[8], false), Err(FenceError::NoSuchChoice));
        assert_eq!(fence.accept(second, 2, 0, &[8], false), Err(FenceError::NoSuchChoice));
        assert_eq!(fence.choices()[0].ids, [5, 6, 7]);
        assert!(!fence.choices()[1].finished);
    }
}
