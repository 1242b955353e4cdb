//! What the choices of one answer have said: their text taken apart, their tokens counted.

use std::sync::Arc;

use inference::{ChoiceStart, FinishReason, TokenBytes};
use wire::output::{Delta, OutputParser};
use wire::private::Finish;

/// What a token, or a resume's past, added to a choice.
#[derive(Debug, Default)]
pub(super) struct Said {
    /// Parts of the message, in order.
    pub(super) parts: Vec<Delta>,
    /// How the choice ended, as clients read it.
    pub(super) finish: Finish,
    /// Tokens of the choice's reasoning so far.
    pub(super) reasoning: u32,
}

struct Choice {
    parser: OutputParser,
    /// Accepted ones included.
    tokens: u32,
    over: bool,
}

/// All choices of one answer.
pub(super) struct Output {
    choices: Vec<Choice>,
    table: Arc<TokenBytes>,
    plain: bool,
    /// A choice ended by what it said, and its scheduler does not know.
    early: bool,
}

impl Output {
    /// Begins; `starts` tells what each choice has already. Its text comes by [`Output::resumed`].
    pub(super) fn new(parser: OutputParser, table: Arc<TokenBytes>, starts: &[ChoiceStart]) -> Self {
        let choice = |start: &ChoiceStart| {
            let mut parser = parser.clone();
            start.accepted.iter().for_each(|id| parser.count(table.get(*id)));
            Choice { parser, tokens: start.accepted.len() as u32, over: false }
        };
        Output { choices: starts.iter().map(choice).collect(), plain: parser.plain(), table, early: false }
    }

    /// Whether all text is content.
    pub(super) fn plain(&self) -> bool {
        self.plain
    }

    /// Takes the text of the accepted tokens.
    pub(super) fn resumed(&mut self, choice: u32, text: &str, finish: Option<FinishReason>) -> Said {
        self.take(choice, text, finish).unwrap_or_default()
    }

    /// Takes a token; `None` when its choice is over already.
    pub(super) fn token(&mut self, choice: u32, id: u32, text: &str, finish: Option<FinishReason>) -> Option<Said> {
        let entry = self.choices.get_mut(choice as usize).filter(|entry| !entry.over)?;
        entry.tokens += 1;
        entry.parser.count(self.table.get(id));
        self.take(choice, text, finish)
    }

    /// Takes the early end of a choice, with the text that it still had; `None` when it is over already.
    pub(super) fn stopped(&mut self, choice: u32, text: &str) -> Option<Said> {
        let entry = self.choices.get_mut(choice as usize).filter(|entry| !entry.over)?;
        let mut parts = entry.parser.push(text);
        parts.extend(entry.parser.finish());
        entry.over = true;
        Some(Said { parts, finish: None, reasoning: entry.parser.reasoning_tokens() })
    }

    fn take(&mut self, choice: u32, text: &str, finish: Option<FinishReason>) -> Option<Said> {
        let entry = self.choices.get_mut(choice as usize).filter(|entry| !entry.over)?;
        let mut parts = entry.parser.push(text);
        let cut = entry.parser.over();
        self.early |= cut && finish.is_none();
        entry.over = cut || finish.is_some();
        if entry.over {
            parts.extend(entry.parser.finish());
        }
        let finish = match finish {
            _ if cut => Some("tool_calls"),
            Some(FinishReason::Stop) if entry.parser.called() => Some("tool_calls"),
            Some(FinishReason::Stop) => Some("stop"),
            Some(FinishReason::Length) => Some("length"),
            None => None,
        };
        Some(Said { parts, finish, reasoning: entry.parser.reasoning_tokens() })
    }

    /// Whether every choice is over, one of them by what it said.
    pub(super) fn cut_short(&self) -> bool {
        self.early && self.choices.iter().all(|choice| choice.over)
    }

    /// Returns how many tokens were said.
    pub(super) fn tokens(&self) -> u32 {
        self.choices.iter().map(|choice| choice.tokens).sum()
    }

    /// Returns how many of them were reasoning.
    pub(super) fn reasoning_tokens(&self) -> u32 {
        self.choices.iter().map(|choice| choice.parser.reasoning_tokens()).sum()
    }
}
