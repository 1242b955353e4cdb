//! `POST /v1/chat/completions`.

use wire::chat::ChatRequest;
use wire::generation::Generation;
use wire::{ChatEncoder, Folder, Identity};
use words::Error;

use super::admission::Ask;
use super::answer::Form;
use crate::harness::ChatText;

impl Ask for ChatRequest {
    const TEXT: &'static str = "messages";

    fn parse(body: &[u8]) -> Result<Self, Error> {
        ChatRequest::parse(body)
    }

    fn generation(&self) -> &Generation {
        &self.generation
    }

    fn prompt(&self, text: &dyn ChatText, now: u64) -> Result<Vec<u32>, Error> {
        text.prompt(&self.messages, now)
    }

    fn form(&self, identity: Identity, choices: usize) -> Form {
        match self.generation.stream {
            true => Form::Stream(ChatEncoder::new(identity, self.generation.include_usage)),
            false => Form::Whole(Folder::new(identity, choices)),
        }
    }
}
