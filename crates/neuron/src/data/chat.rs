//! `POST /v1/chat/completions`.

use grammar::Source;
use wire::chat::ChatRequest;
use wire::format::Wish;
use wire::generation::Generation;
use wire::output::{Opening, OutputParser, Style};
use wire::tools::ToolChoice;
use wire::{ChatEncoder, Encoder, Endpoint, Fold, Folder, Identity};
use words::{Code, Error};

use super::admission::{Ask, Asked};
use super::answer::Form;
use crate::constraint;
use crate::harness::{ChatInput, ChatText, Prompt};

impl Ask for ChatRequest {
    const ENDPOINT: Endpoint = Endpoint::Chat;
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
        let field = if self.tools.functions { "functions" } else { "tools" };
        let refused = |at: &str, message: &str| Err(Error::new(Code::UnsupportedParameter, message).at(at));
        if !style.takes_tools {
            return refused(field, &format!("this model's chat template takes no tools; leave '{field}' out"));
        }
        if style.tools.is_none() {
            let message = "this server can't tell the tool calls of this model from its text; an operator may name their \
                           form by 'tool_parser' of the model";
            return refused(field, message);
        }
        let forced = !matches!(self.tools.choice, ToolChoice::None | ToolChoice::Auto);
        match &self.format {
            Some(wish) if forced => {
                refused(wish.param, "a call that 'tool_choice' forces has its own format; leave this one out")
            }
            _ => Ok(()),
        }
    }

    fn prompts(&self, text: &dyn ChatText, now: u64) -> Result<Vec<Prompt>, Error> {
        let tools = if self.tools.active() { self.tools.definitions.as_slice() } else { &[] };
        let input = ChatInput { messages: &self.messages, tools, variables: &self.variables };
        Ok(vec![text.prompt(&input, now)?])
    }

    fn constraint(&self, style: &Style, opening: Opening) -> Option<(Source, &'static str)> {
        let field = if self.tools.functions { "functions" } else { "tools" };
        let calls = constraint::calls(&self.tools, style, opening).map(|source| (source, field));
        let format = |wish: &Wish| (constraint::source(&wish.format, style, opening), wish.param);
        calls.or_else(|| self.format.as_ref().map(format))
    }

    fn parser(&self, style: &Style, opening: Opening) -> OutputParser {
        OutputParser::new(style, opening, &self.tools)
    }

    fn form(&self, identity: Identity, _asked: &Asked, plain: bool) -> Form {
        let generation = &self.generation;
        match generation.stream {
            true => {
                let encoder = ChatEncoder::new(identity, generation.include_usage);
                Form::Stream(Encoder::Chat(encoder.functions(self.tools.functions)))
            }
            false => {
                let scored = generation.logprobs.is_some();
                let folder = Folder::new(identity, generation.choices as usize, plain, scored);
                Form::Whole(Fold::Chat(folder.functions(self.tools.functions)))
            }
        }
    }
}
