//! `POST /v1/embeddings`.

use inference::Task;
use wire::embeddings::{EmbeddingFolder, EmbeddingRequest, EncodingFormat};
use wire::generation::Generation;
use wire::text;
use wire::{Endpoint, Fold, Identity};
use words::{Code, Error};

use super::admission::{Ask, Asked, place};
use super::answer::Form;
use super::completions::tokens_of;
use crate::harness::{ChatText, Prompt};

/// Most bytes of the vectors of one answer: within what a gateway takes as one event.
const VECTOR_BYTES_MAX: usize = 15 << 20;

/// Bytes that a number takes as text, at most, or in base64.
fn number_bytes(format: EncodingFormat) -> usize {
    match format {
        EncodingFormat::Float => 16,
        EncodingFormat::Base64 => 6,
    }
}

impl Ask for EmbeddingRequest {
    const ENDPOINT: Endpoint = Endpoint::Embeddings;
    const TEXT: &'static str = "input";

    fn parse(body: &[u8]) -> Result<Self, Error> {
        EmbeddingRequest::parse(body)
    }

    fn generation(&self) -> &Generation {
        &self.generation
    }

    fn prompts(&self, text: &dyn ChatText, _now: u64) -> Result<Vec<Prompt>, Error> {
        let tokens = |(i, input): (usize, &text::Prompt)| {
            let mut prompt = tokens_of(text, input, &place(Self::TEXT, i, self.inputs.len()))?;
            if let (text::Prompt::Text(_), Some(end)) = (input, text.embedding_end())
                && prompt.ids.last() != Some(&end)
            {
                prompt.ids.push(end);
            }
            Ok(prompt)
        };
        self.inputs.iter().enumerate().map(tokens).collect()
    }

    fn task(&self, asked: &Asked) -> Result<Task, Error> {
        let unsupported = |how: &String| {
            let message = format!("the model pools its embeddings by {how}, which is not supported");
            Error::new(Code::UnsupportedParameter, message).at("model")
        };
        let pooling = asked.pooling.as_ref().map_err(unsupported)?;
        if let Some(dimensions) = self.dimensions.filter(|dimensions| *dimensions as usize > asked.width) {
            let message = format!("'dimensions' may be {} at most for this model, it is {dimensions}", asked.width);
            return Err(Error::invalid("dimensions", message));
        }
        let numbers = self.dimensions.map_or(asked.width, |dimensions| dimensions as usize);
        let most = (VECTOR_BYTES_MAX / (numbers * number_bytes(self.format)).max(1)).max(1);
        if self.inputs.len() > most {
            let message =
                format!("'input' has {} texts; {most} vectors of {numbers} numbers are the most", self.inputs.len());
            return Err(Error::invalid("input", message));
        }
        Ok(Task::Embed(*pooling))
    }

    fn form(&self, identity: Identity, asked: &Asked, _plain: bool) -> Form {
        let inputs = asked.prompts.len();
        Form::Whole(Fold::Embeddings(EmbeddingFolder::new(identity.model, self.format, self.dimensions, inputs)))
    }
}
