//! How likely an answer's tokens were, in its clients' terms: texts and places instead of ids.

use std::sync::Arc;

use inference::{ChoiceStart, Score};
use wire::TokenLogprob;

use crate::harness::ChatText;

/// One prompt, as far as it is told.
struct Told {
    /// Its tokens; scores up to here are its own.
    length: usize,
    /// Its tokens in order; filled only where they are echoed.
    tokens: Vec<TokenLogprob>,
    /// Characters of those.
    characters: u32,
}

/// The account of one answer's tokens.
pub(super) struct Telling {
    text: Arc<dyn ChatText>,
    prompts: Vec<Told>,
    /// Choices of each prompt.
    each: usize,
    echo: bool,
    /// Tokens of each choice that its client has already: their scores are told no more.
    had: Vec<usize>,
    /// Characters of each choice so far, from the answer's start.
    said: Vec<u32>,
}

impl Telling {
    /// Begins. `starts` are the ids that each choice's client has already; none for an answer told from its start.
    pub(super) fn new(text: Arc<dyn ChatText>, prompts: &[Vec<u32>], echo: bool, starts: &[ChoiceStart]) -> Self {
        let mut telling = Telling {
            text,
            prompts: Vec::new(),
            each: starts.len() / prompts.len().max(1),
            echo,
            had: starts.iter().map(|start| start.accepted.len()).collect(),
            said: Vec::new(),
        };
        telling.said =
            starts.iter().map(|start| start.accepted.iter().map(|id| telling.characters(*id)).sum()).collect();
        for prompt in prompts {
            telling.prompts.push(Told { length: prompt.len(), tokens: Vec::new(), characters: 0 });
            if let (true, Some(first)) = (echo, prompt.first()) {
                let place = telling.prompts.len() - 1;
                telling.echoed_token(place, *first, None);
            }
        }
        telling
    }

    /// Returns how many characters a token adds to the text.
    fn characters(&self, id: u32) -> u32 {
        let spelled = self.text.spell(id);
        if spelled.shown { String::from_utf8_lossy(&spelled.bytes).chars().count() as u32 } else { 0 }
    }

    fn told(&self, id: u32, score: Option<&Score>, offset: u32) -> TokenLogprob {
        let bytes = |id: u32| self.text.spell(id).bytes.into_owned();
        let top = score.map_or(Vec::new(), |score| score.top.iter().map(|(id, l)| (bytes(*id), *l)).collect());
        TokenLogprob { bytes: bytes(id), logprob: score.map(|score| score.logprob), top, offset }
    }

    fn echoed_token(&mut self, place: usize, id: u32, score: Option<&Score>) {
        let characters = self.characters(id);
        let offset = self.prompts.get(place).map_or(0, |prompt| prompt.characters);
        let told = self.told(id, score, offset);
        if let Some(prompt) = self.prompts.get_mut(place) {
            prompt.tokens.push(told);
            prompt.characters += characters;
        }
    }

    fn prompt_of(&self, choice: u32) -> usize {
        choice as usize / self.each.max(1)
    }

    /// Takes a token that a choice said, and tells it where it has a score.
    pub(super) fn said(&mut self, choice: u32, id: u32, score: Option<&Score>) -> Option<TokenLogprob> {
        let echoed = self.prompts.get(self.prompt_of(choice)).map_or(0, |prompt| prompt.characters);
        let (characters, said) = (self.characters(id), self.said.get(choice as usize).copied().unwrap_or(0));
        if let Some(count) = self.said.get_mut(choice as usize) {
            *count += characters;
        }
        score.map(|score| self.told(id, Some(score), echoed + said))
    }

    /// Takes the score of a token that the request came with; tells it where it is a choice's own.
    pub(super) fn scored(&mut self, choice: u32, position: usize, id: u32, score: &Score) -> Option<TokenLogprob> {
        let place = self.prompt_of(choice);
        let length = self.prompts.get(place).map_or(0, |prompt| prompt.length);
        if position >= length {
            let had = self.had.get(choice as usize).copied().unwrap_or(0);
            return if position < length + had { None } else { self.said(choice, id, Some(score)) };
        }
        if self.echo && self.prompts.get(place).is_some_and(|prompt| prompt.tokens.len() == position) {
            self.echoed_token(place, id, Some(score));
        }
        None
    }

    /// Returns the tokens of the prompt that a choice begins with.
    pub(super) fn echoed(&self, choice: u32) -> &[TokenLogprob] {
        self.prompts.get(self.prompt_of(choice)).map_or(&[], |prompt| &prompt.tokens)
    }
}
