//! `POST /v1/chat/completions`.

use wire::chat::ChatRequest;
use wire::generation::Generation;
use wire::output::{Opening, OutputParser, Style};
use wire::tools::ToolChoice;
use wire::{ChatEncoder, Folder, Identity};
use words::{Code, Error};

use super::admission::Ask;
use super::answer::Form;
use crate::harness::{ChatInput, ChatText, Prompt};

impl Ask for ChatRequest {
    const TEXT: &'static str = "messages";

    fn parse(body: &[u8]) -> Result<Self, Error> {
        ChatRequest::parse(body)
    }

    fn generation(&self) -> &Generation {
        &self.generation
    }

    fn check(&self, style: &Style) -> Result<(), Error> {
        if !self.tools.active() {
            return Ok(());
        }
        let refused = |at: &str, message: &str| Err(Error::new(Code::UnsupportedParameter, message).at(at));
        if !style.takes_tools {
            return refused("tools", "this model's chat template takes no tools; leave 'tools' out");
        }
        if style.tools.is_none() {
            let message = "this server can't tell the tool calls of this model from its text; an operator may name their \
                           form by 'tool_parser' of the model";
            return refused("tools", message);
        }
        match self.tools.choice {
            ToolChoice::None | ToolChoice::Auto => Ok(()),
            // A model can only be asked to call; what it says has to be constrained.
            ToolChoice::Required | ToolChoice::Named(_) => {
                refused("tool_choice", "'tool_choice' may be none or auto; this server can't force a call yet")
            }
        }
    }

    fn prompt(&self, text: &dyn ChatText, now: u64) -> Result<Prompt, Error> {
        let tools = if self.tools.active() { self.tools.definitions.as_slice() } else { &[] };
        text.prompt(&ChatInput { messages: &self.messages, tools, variables: &self.variables }, now)
    }

    fn parser(&self, style: &Style, opening: Opening) -> OutputParser {
        OutputParser::new(style, opening, &self.tools)
    }

    fn form(&self, identity: Identity, choices: usize, plain: bool) -> Form {
        match self.generation.stream {
            true => Form::Stream(ChatEncoder::new(identity, self.generation.include_usage)),
            false => Form::Whole(Folder::new(identity, choices, plain)),
        }
    }
}
