//! `POST /v1/chat/completions`.

use inference::{Scoring, Task};
use wire::chat::ChatRequest;
use wire::generation::Generation;
use wire::{ChatEncoder, Encoder, Endpoint, Fold, Folder, Identity};
use words::Error;

use super::admission::{Ask, Asked};
use super::answer::Form;
use crate::harness::ChatText;

impl Ask for ChatRequest {
    const ENDPOINT: Endpoint = Endpoint::Chat;
    const TEXT: &'static str = "messages";

    fn parse(body: &[u8]) -> Result<Self, Error> {
        ChatRequest::parse(body)
    }

    fn generation(&self) -> &Generation {
        &self.generation
    }

    fn prompts(&self, text: &dyn ChatText, now: u64) -> Result<Vec<Vec<u32>>, Error> {
        Ok(vec![text.prompt(&self.messages, now)?])
    }

    fn task(&self, _asked: &Asked) -> Result<Task, Error> {
        let scoring = |top: u32| {
            let accepted = !self.generation.stream;
            Task::Score(Scoring { top: top as usize, prompt: false, accepted })
        };
        Ok(self.generation.logprobs.map_or(Task::Generate, scoring))
    }

    fn form(&self, identity: Identity, _asked: &Asked) -> Form {
        let generation = &self.generation;
        match generation.stream {
            true => Form::Stream(Encoder::Chat(ChatEncoder::new(identity, generation.include_usage))),
            false => {
                let scored = generation.logprobs.is_some();
                Form::Whole(Fold::Chat(Folder::new(identity, generation.choices as usize, scored)))
            }
        }
    }
}
