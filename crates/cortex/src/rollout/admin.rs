//! The admin API of rollouts. Any gateway that shares the store takes an operator's word; the coordinator acts on it.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use fleet::rollout::{Phase, Rollout, World, notes, rehearse};
use http::HeaderMap;
use rand::Rng;
use serde_json::{Value, json};
use service::clock::Clock;
use service::token::{Token, authorise};
use words::{Code, Error, GatewayId, RolloutId};

use super::ask::Ask;
use super::store::{Shelf, StoreError, Stored};
use crate::admin::Refused;
use crate::fleet_task::Fleet;
use crate::operate::read_json;

/// Tries of one change, when others change the rollout at the same time.
const TRIES: usize = 8;

/// What the handlers need.
#[derive(Clone)]
pub(crate) struct RolloutAdmin {
    pub(crate) fleet: Fleet,
    pub(crate) clock: Clock,
    pub(crate) gateway: GatewayId,
    pub(crate) token: Option<Token>,
    /// None where no store is configured.
    pub(crate) shelf: Option<Shelf>,
}

/// Makes the routes.
pub(crate) fn router(admin: RolloutAdmin) -> Router {
    Router::new()
        .route("/api/rollout", get(show).post(begin))
        .route("/api/rollout/pause", post(|state, headers| change(state, headers, |rollout, _| rollout.pause())))
        .route("/api/rollout/resume", post(|state, headers| change(state, headers, Rollout::resume)))
        .route("/api/rollout/abort", post(|state, headers| change(state, headers, |rollout, _| rollout.abort())))
        .with_state(Arc::new(admin))
}

fn answer(result: Result<Value, Error>) -> Response {
    match result {
        Ok(value) => axum::Json(value).into_response(),
        Err(error) => Refused::from(error).into_response(),
    }
}

impl RolloutAdmin {
    fn check(&self, headers: &HeaderMap) -> Result<(), Error> {
        authorise(self.token.as_ref(), headers)
    }

    fn shelf(&self) -> Result<&Shelf, Error> {
        self.shelf.as_ref().ok_or_else(|| {
            let message = "no rollout store is configured: set [rollout] store = \"/var/lib/cortex/rollout.sqlite\", \
                           the same file for all gateways of one host";
            Error::new(Code::InvalidRequest, message)
        })
    }

    async fn begin(&self, ask: Ask) -> Result<Value, Error> {
        let shelf = self.shelf()?;
        let view = self.fleet.view();
        let policy = ask.policy(&view)?;
        let world = World { view: &view, me: &self.gateway, now: self.clock.now() };
        let waves = rehearse(&policy, &world)?;
        if ask.dry_run {
            return Ok(json!({ "dry_run": true, "waves": waves, "policy": policy }));
        }
        let id = RolloutId::new(format!("r-{:012x}", rand::rng().random::<u64>() >> 16)).map_err(Error::internal)?;
        let stored = shelf.load().await?;
        if let Some(known) = stored.rollout.filter(|rollout| !rollout.phase.over()) {
            let message = format!("the rollout {} is {}; resume or abort it first", known.id, known.phase.name());
            return Err(Error::new(Code::Conflict, message));
        }
        shelf.swap(stored.revision, None, &Rollout::new(id.clone(), policy.clone())).await?;
        tracing::info!(rollout = %id, nodes = policy.targets.len(), "rollout begun");
        Ok(json!({ "id": id, "waves": waves, "policy": policy }))
    }

    async fn change(&self, change: impl Fn(&mut Rollout, &World<'_>) -> Result<(), Error>) -> Result<Value, Error> {
        let shelf = self.shelf()?;
        for _ in 0..TRIES {
            let Stored { rollout, revision, .. } = shelf.load().await?;
            let mut rollout = rollout.ok_or_else(|| Error::new(Code::Conflict, "there is no rollout"))?;
            let view = self.fleet.view();
            change(&mut rollout, &World { view: &view, me: &self.gateway, now: self.clock.now() })?;
            match shelf.swap(revision, None, &rollout).await {
                Ok(_) => {
                    tracing::info!(rollout = %rollout.id, phase = rollout.phase.name(), "rollout changed by an operator");
                    return Ok(json!({ "id": rollout.id, "phase": rollout.phase.name() }));
                }
                Err(StoreError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(StoreError::Conflict.into())
    }

    async fn show(&self) -> Result<Value, Error> {
        let stored = self.shelf()?.load().await?;
        let view = self.fleet.view();
        let world = World { view: &view, me: &self.gateway, now: self.clock.now() };
        let Some(rollout) = stored.rollout else { return Ok(json!({ "rollout": null })) };
        let why = match &rollout.phase {
            Phase::Paused { node: Some(node), why } => Some(format!("{node}: {why}")),
            Phase::Paused { node: None, why } => Some(why.to_string()),
            _ => None,
        };
        let notes: serde_json::Map<String, Value> =
            notes(&rollout, &world).into_iter().map(|(node, note)| (node.to_string(), note.into())).collect();
        Ok(json!({ "rollout": rollout, "coordinator": stored.lease.holder, "why": why, "notes": notes }))
    }
}

async fn show(State(admin): State<Arc<RolloutAdmin>>) -> Response {
    answer(admin.show().await)
}

async fn begin(State(admin): State<Arc<RolloutAdmin>>, headers: HeaderMap, body: Body) -> Response {
    let begin = async {
        admin.check(&headers)?;
        admin.begin(read_json(body).await?).await
    };
    answer(begin.await)
}

async fn change(
    State(admin): State<Arc<RolloutAdmin>>,
    headers: HeaderMap,
    change: impl Fn(&mut Rollout, &World<'_>) -> Result<(), Error>,
) -> Response {
    let changed = async {
        admin.check(&headers)?;
        admin.change(change).await
    };
    answer(changed.await)
}
