//! `POST /tokenize` and `POST /detokenize`: answered without the engine.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use serde_json::Map;
use service::traces::Span;
use wire::Endpoint;
use wire::tokens::{DetokenizeRequest, Detokenized, Source, TokenizeRequest, Tokenized};
use words::{Code, Error};

use super::DataPlane;
use super::admission::{Entered, Private, answered, enter, one_json};
use super::forward;
use crate::harness::ChatInput;
use crate::ready::ReadyModel;

fn json(value: &impl serde::Serialize) -> Result<String, Error> {
    serde_json::to_string(value).map_err(Error::internal)
}

pub(super) async fn tokenize(State(plane): State<Arc<DataPlane>>, headers: HeaderMap, body: Body) -> Response {
    answered(Endpoint::Tokenize, &plane, &headers, async |private: Private| {
        let entered = enter(&plane, &headers, &private, body).await?;
        if let Some(place) = forward::attach(&plane, &private, &entered).await? {
            return forward::answer(&plane, private, entered, place, Endpoint::Tokenize, &mut Span::default()).await;
        }
        let Entered { admission: _admission, bytes, .. } = entered;
        let request = TokenizeRequest::parse(&bytes)?;
        let model = plane.models.attach(&request.model).await?;
        plane.metrics.unknown_fields(model.id.as_str(), request.unknown_fields);
        let created = private.created;
        let tokenized = plane.texts.work(bytes.len(), move || tokens(&model, &request, created)).await?;
        Ok(one_json(json(&tokenized)?, tokenized.count as u32, &private))
    })
    .await
}

fn tokens(model: &ReadyModel, request: &TokenizeRequest, now: u64) -> Result<Tokenized, Error> {
    let local = model.local()?;
    let tokens = match &request.source {
        Source::Prompt(text) => {
            local.text.encode(text, request.add_special_tokens).map_err(|error| error.at("prompt"))?
        }
        Source::Messages(messages) => {
            local.text.prompt(&ChatInput { messages, tools: &[], variables: &Map::new() }, now)?.ids
        }
    };
    let spell = |id: &u32| String::from_utf8_lossy(&local.text.spell(*id).bytes).into_owned();
    let token_strs = request.return_token_strs.then(|| tokens.iter().map(spell).collect());
    Ok(Tokenized { count: tokens.len(), max_model_len: model.context_length, tokens, token_strs })
}

pub(super) async fn detokenize(State(plane): State<Arc<DataPlane>>, headers: HeaderMap, body: Body) -> Response {
    answered(Endpoint::Detokenize, &plane, &headers, async |private: Private| {
        let entered = enter(&plane, &headers, &private, body).await?;
        if let Some(place) = forward::attach(&plane, &private, &entered).await? {
            return forward::answer(&plane, private, entered, place, Endpoint::Detokenize, &mut Span::default()).await;
        }
        let Entered { admission: _admission, bytes, .. } = entered;
        let request = DetokenizeRequest::parse(&bytes)?;
        let model = plane.models.attach(&request.model).await?;
        plane.metrics.unknown_fields(model.id.as_str(), request.unknown_fields);
        let count = request.tokens.len() as u32;
        let vocabulary = model.local()?.vocabulary;
        if let Some(id) = request.tokens.iter().find(|id| **id as usize >= vocabulary) {
            let message = format!("{id} is no token; the vocabulary has {vocabulary}");
            return Err(Error::new(Code::InvalidRequest, message).at("tokens"));
        }
        let decode = move || Ok(Detokenized { prompt: model.local()?.text.decode(&request.tokens) });
        let detokenized = plane.texts.work(bytes.len(), decode).await?;
        Ok(one_json(json(&detokenized)?, count, &private))
    })
    .await
}
