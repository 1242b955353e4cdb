//! `GET /api/lifecycle`: what the workers' inspectors see.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::HeaderMap;
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use service::token::authorise;
use words::{Error, Inspection};

use crate::admin::{Admin, Refused};
use crate::{command, operate};

/// Which workers are looked at.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Wanted {
    /// One, by its name or control address; all otherwise.
    node: Option<String>,
}

/// The answer.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Inspections {
    pub(crate) nodes: Vec<Inspected>,
}

/// One worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Inspected {
    /// Its control address.
    pub(crate) control: String,
    /// What its inspector sees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) lifecycle: Option<Inspection>,
    /// Why nothing is seen of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

/// With a node its own refusal is the answer's.
pub(crate) async fn inspect(
    State(admin): State<Arc<Admin>>,
    Query(wanted): Query<Wanted>,
    headers: HeaderMap,
) -> Result<Json<Inspections>, Refused> {
    authorise(admin.token.as_ref(), &headers)?;
    let token = admin.token.as_ref();
    if let Some(node) = &wanted.node {
        let (control, _) = operate::find(&admin, node)?;
        let lifecycle = Some(command::inspect(&control, token).await?);
        return Ok(Json(Inspections { nodes: vec![Inspected { control, lifecycle, error: None }] }));
    }
    let view = admin.fleet.view();
    let looks = view.nodes().map(async |(_, node)| {
        let control = node.control_address.clone();
        let seen: Result<Inspection, Error> = command::inspect(&control, token).await;
        let error = seen.as_ref().err().map(|error| error.message().to_string());
        Inspected { control, lifecycle: seen.ok(), error }
    });
    Ok(Json(Inspections { nodes: join_all(looks).await }))
}
