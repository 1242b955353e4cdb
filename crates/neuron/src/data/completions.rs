//! `POST /v1/completions`.

use grammar::Source;
use wire::format::Wish;
use wire::generation::Generation;
use wire::output::{Opening, Style};
use wire::text::{self, CompletionRequest, Echo, TextEncoder, TextFolder};
use wire::{Encoder, Endpoint, Fold, Identity};
use words::Error;

use super::admission::{Ask, Asked, place};
use super::answer::Form;
use crate::constraint;
use crate::harness::{ChatText, Prompt};

/// Tokenises a prompt; `at` names it in errors.
pub(super) fn tokens_of(text: &dyn ChatText, prompt: &text::Prompt, at: &str) -> Result<Prompt, Error> {
    let ids = match prompt {
        text::Prompt::Text(prompt) => text.encode(prompt, true).map_err(|error| error.at(at))?,
        text::Prompt::Tokens(ids) => ids.clone(),
    };
    match ids.is_empty() {
        true => Err(Error::invalid(at, format!("'{at}' has no tokens; this model needs a text to begin from"))),
        false => Ok(Prompt { ids, opening: Opening::default() }),
    }
}

fn echo(request: &CompletionRequest, asked: &Asked) -> Echo {
    let text = |(prompt, ids): (&text::Prompt, &Vec<u32>)| match prompt {
        text::Prompt::Text(text) => text.clone(),
        text::Prompt::Tokens(_) => asked.text.decode(ids),
    };
    let prompts: Vec<String> = match request.echo {
        true => request.prompts.iter().zip(&asked.prompts).map(text).collect(),
        false => Vec::new(),
    };
    Echo { prompts: prompts.into(), choices: request.generation.choices }
}

impl Ask for CompletionRequest {
    const ENDPOINT: Endpoint = Endpoint::Completions;
    const TEXT: &'static str = "prompt";

    fn parse(body: &[u8]) -> Result<Self, Error> {
        CompletionRequest::parse(body)
    }

    fn generation(&self) -> &Generation {
        &self.generation
    }

    fn prompts(&self, text: &dyn ChatText, _now: u64) -> Result<Vec<Prompt>, Error> {
        let all = self.prompts.iter().enumerate();
        all.map(|(i, prompt)| tokens_of(text, prompt, &place(Self::TEXT, i, self.prompts.len()))).collect()
    }

    fn echoes(&self) -> bool {
        self.echo
    }

    fn constraint(&self, _style: &Style, opening: Opening) -> Option<(Source, &'static str)> {
        // No template has said anything of reasoning here.
        let format = |wish: &Wish| (constraint::source(&wish.format, &Style::default(), opening), wish.param);
        self.format.as_ref().map(format)
    }

    fn form(&self, identity: Identity, asked: &Asked, _plain: bool) -> Form {
        let (generation, echo) = (&self.generation, echo(self, asked));
        match generation.stream {
            true => Form::Stream(Encoder::Text(TextEncoder::new(identity, generation.include_usage, echo))),
            false => {
                let choices = asked.prompts.len() * generation.choices as usize;
                Form::Whole(Fold::Text(TextFolder::new(identity, choices, generation.logprobs.is_some(), &echo)))
            }
        }
    }
}
