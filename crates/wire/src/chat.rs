//! `POST /v1/chat/completions`: from bytes to a request that holds only what is honoured.

use serde_json::{Map, Value};
use words::Error;

use crate::fields;
use crate::format::Wish;
use crate::generation::{Checked, Generation, flag};
use crate::logprobs;
use crate::messages::messages;
use crate::template::variables;
use crate::tools::Tools;

/// A checked request.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatRequest {
    /// Messages with plain-text contents, as the chat template takes them; the arguments of calls are JSON texts.
    pub messages: Vec<Value>,
    /// What the model may call.
    pub tools: Tools,
    /// Further variables of the chat template.
    pub variables: Map<String, Value>,
    /// What every answer must be.
    pub format: Option<Wish>,
    /// All the rest.
    pub generation: Generation,
}

impl ChatRequest {
    /// Reads a request.
    ///
    /// # Errors
    /// `InvalidRequest` with the field in `param`, or `UnsupportedParameter`.
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        let mut checked = Checked::read(body, fields::CHAT)?;
        let mut generation = checked.generation()?;
        let map = &mut checked.map;
        generation.logprobs = logprobs(map)?;
        let (messages, tools, variables) = (messages(map.remove("messages"))?, Tools::read(map)?, variables(map)?);
        let format = Wish::read(map)?;
        Ok(ChatRequest { messages, tools, variables, format, generation })
    }
}

/// Reads how many of the likeliest tokens are told beside each; `None` when tokens are not told.
fn logprobs(map: &Map<String, Value>) -> Result<Option<u32>, Error> {
    let (wanted, top) = (flag(map, "logprobs"), logprobs::top(map, "top_logprobs")?);
    match (wanted, top) {
        (false, Some(1..)) => Err(Error::invalid("top_logprobs", "'top_logprobs' needs 'logprobs' to be true")),
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0))),
    }
}

#[cfg(test)]
#[path = "chat_tests.rs"]
mod tests;
