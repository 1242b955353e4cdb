//! `POST /api/nodes/{node}/pull`: a worker's download, passed on line by line.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use control::error_from_status;
use control::proto::PullProgress;
use futures_util::stream;
use serde::{Deserialize, Serialize};
use service::token::authorise;
use tonic::Streaming;
use words::{Code, Error};

use crate::admin::{Admin, Refused};
use crate::{command, operate};

/// A worker that says nothing for this long is given up; it speaks at least each second.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(20);

/// The body of the request.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Wanted {
    /// A model's id in the worker's configuration, or `org/repo[:QUANT][@REVISION]`.
    pub(crate) model: String,
}

/// One line of the answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Line {
    /// Bytes that are there.
    pub(crate) bytes_done: u64,
    /// Bytes of all files that were missing.
    pub(crate) bytes_total: u64,
    /// Where the model is on the worker's host; in the last line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) path: Option<String>,
    /// Why it failed; in the last line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

impl From<PullProgress> for Line {
    fn from(progress: PullProgress) -> Self {
        let path = Some(progress.path).filter(|path| !path.is_empty());
        Line { bytes_done: progress.bytes_done, bytes_total: progress.bytes_total, path, error: None }
    }
}

impl From<Error> for Line {
    fn from(error: Error) -> Self {
        Line { error: Some(error.message().to_string()), ..Line::default() }
    }
}

/// Reads the next line; the second is whether it is the last.
async fn next(messages: &mut Streaming<PullProgress>) -> (Line, bool) {
    let lost = |message: &str| Error::new(Code::UpstreamFailed, message);
    let outcome = match tokio::time::timeout(SILENCE_MAX, messages.message()).await {
        Ok(Ok(Some(progress))) => Ok(progress),
        Ok(Ok(None)) => Err(lost("the worker ended the call before the files were there")),
        Ok(Err(status)) => Err(error_from_status(&status)),
        Err(_) => Err(lost("the worker has fallen silent")),
    };
    let line = outcome.map_or_else(Line::from, Line::from);
    let last = line.path.is_some() || line.error.is_some();
    (line, last)
}

/// The answer is a line of JSON at least each second. A caller that leaves ends the download; what came is kept.
pub(crate) async fn pull(
    State(admin): State<Arc<Admin>>,
    Path(node): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Refused> {
    authorise(admin.token.as_ref(), &headers)?;
    let wanted: Wanted = operate::read_json(body).await?;
    let (control, status) = operate::find(&admin, &node)?;
    tracing::info!(node = %status.node, model = wanted.model, "pull");
    let messages = command::pull(&control, admin.token.as_ref(), wanted.model).await?;
    let lines = stream::unfold(Some(messages), |messages| async move {
        let mut messages = messages?;
        let (line, last) = next(&mut messages).await;
        let text = serde_json::to_string(&line).map(|text| Bytes::from(text + "\n"));
        Some((text, (!last).then_some(messages)))
    });
    let kind = [(header::CONTENT_TYPE, "application/x-ndjson")];
    Ok((kind, Body::from_stream(lines)).into_response())
}
