//! Logs of models and workers, line by line as the workers tell them.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use control::{error_from_status, proto};
use futures_util::stream::{self, BoxStream, StreamExt};
use serde::{Deserialize, Serialize};
use service::token::authorise;
use tonic::Streaming;
use words::{Code, Error, ModelId};

use crate::admin::{Admin, Refused};
use crate::{command, operate};

/// Lines that are told when the caller does not say how many.
pub(crate) const LINES_DEFAULT: u32 = 100;
/// Most lines of one worker's past.
const LINES_MAX: u32 = 100_000;

/// What of a log is wanted.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Wanted {
    /// The worker, by its name or control address; every one that has the model otherwise.
    node: Option<String>,
    /// Whether lines that come are told too.
    follow: bool,
    /// Most lines of those that are there.
    lines: Option<u32>,
}

/// One line of the answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Line {
    /// Whose log it is.
    pub(crate) node: String,
    /// Its number there, from 1 on; 0 when it is none of the log.
    pub(crate) sequence: u64,
    /// When it came, in milliseconds of Unix time.
    pub(crate) at_unix_ms: u64,
    /// Who wrote it.
    pub(crate) source: String,
    pub(crate) text: String,
    /// Lines before it that this reader was too slow for.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) missed: u64,
    /// Why no more comes from this worker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// `GET /api/models/{model}/logs`
pub(crate) async fn of_model(
    State(admin): State<Arc<Admin>>,
    Path(model): Path<String>,
    Query(wanted): Query<Wanted>,
    headers: HeaderMap,
) -> Result<Response, Refused> {
    authorise(admin.token.as_ref(), &headers)?;
    let id = ModelId::new(model).map_err(|error| Error::invalid("model", error.to_string()))?;
    let nodes = match &wanted.node {
        Some(node) => operate::find(&admin, node).map(|(control, status)| vec![(control, status.node.to_string())])?,
        None => {
            let view = admin.fleet.view();
            let listing = |status: &words::NodeStatus| status.models.iter().any(|model| model.id == id);
            let nodes = view.nodes().filter_map(|(_, node)| Some((node, node.status.as_ref()?)));
            let nodes = nodes.filter(|(_, status)| listing(status));
            nodes.map(|(node, status)| (node.control_address.clone(), status.node.to_string())).collect()
        }
    };
    if nodes.is_empty() {
        let message = format!("no worker that was heard from has the model '{id}'; cortex status lists them");
        return Err(Error::new(Code::ModelNotFound, message).at("model").into());
    }
    tell(&admin, id.as_str(), nodes, &wanted).await
}

/// `GET /api/nodes/{node}/logs`: the worker's own.
pub(crate) async fn of_node(
    State(admin): State<Arc<Admin>>,
    Path(node): Path<String>,
    Query(wanted): Query<Wanted>,
    headers: HeaderMap,
) -> Result<Response, Refused> {
    authorise(admin.token.as_ref(), &headers)?;
    let (control, status) = operate::find(&admin, &node)?;
    tell(&admin, "", vec![(control, status.node.to_string())], &wanted).await
}

/// The answer is a line of JSON for each line. It ends with what is there, or with its caller.
async fn tell(admin: &Admin, model: &str, nodes: Vec<(String, String)>, wanted: &Wanted) -> Result<Response, Refused> {
    let mut streams = Vec::new();
    let mut refused = None;
    for (control, node) in nodes {
        let lines = wanted.lines.unwrap_or(LINES_DEFAULT).min(LINES_MAX);
        let asked = proto::ModelLogsRequest { model_id: model.to_string(), follow: wanted.follow, lines };
        match command::logs(&control, admin.token.as_ref(), asked).await {
            Ok(messages) => streams.push(lines_of(node, messages)),
            Err(error) => {
                let line = Line { node, error: Some(error.message().to_string()), ..Line::default() };
                streams.push(stream::iter([line]).boxed());
                refused = Some(error);
            }
        }
    }
    if let (1, Some(error)) = (streams.len(), refused) {
        return Err(error.into());
    }
    let texts =
        stream::select_all(streams).map(|line| serde_json::to_string(&line).map(|text| Bytes::from(text + "\n")));
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(texts)).into_response())
}

fn lines_of(node: String, messages: Streaming<proto::LogLines>) -> BoxStream<'static, Line> {
    let batches = stream::unfold(Some(messages), move |messages| {
        let node = node.clone();
        async move {
            let mut messages = messages?;
            match messages.message().await {
                Ok(Some(batch)) => Some((batch_lines(&node, batch), Some(messages))),
                Ok(None) => None,
                Err(status) => {
                    let error = Some(error_from_status(&status).message().to_string());
                    Some((vec![Line { node, error, ..Line::default() }], None))
                }
            }
        }
    });
    batches.flat_map(stream::iter).boxed()
}

fn batch_lines(node: &str, batch: proto::LogLines) -> Vec<Line> {
    let mut missed = batch.missed;
    let line = |line: proto::LogLine| Line {
        node: node.to_string(),
        sequence: line.sequence,
        at_unix_ms: line.at_unix_ms,
        source: line.source,
        text: line.text,
        missed: std::mem::take(&mut missed),
        error: None,
    };
    batch.lines.into_iter().map(line).collect()
}
