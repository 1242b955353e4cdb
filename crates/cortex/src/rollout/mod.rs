//! Rolling restarts: the store of their progress, the task that carries them out, the admin API and the command line.
//!
//! Every gateway runs the task; the one that has the lease acts. What may be done is decided by
//! [`fleet::rollout::plan`] alone.

mod admin;
mod ask;
mod cli;
mod executor;
mod hands;
mod metrics;
mod store;

use std::path::Path;
use std::sync::Arc;

use axum::Router;
use service::clock::Clock;
use service::token::Token;
use words::GatewayId;

pub(crate) use ask::span;
pub(crate) use cli::{RolloutArgs, run};
pub(crate) use metrics::RolloutMetrics;

use crate::fleet_task::Fleet;
use crate::gateway::GatewayError;

/// What rollouts take from their gateway.
pub(crate) struct Surroundings<'a> {
    pub(crate) fleet: &'a Fleet,
    pub(crate) clock: Clock,
    pub(crate) gateway: &'a GatewayId,
    pub(crate) token: &'a Option<Token>,
    pub(crate) metrics: RolloutMetrics,
}

/// Makes the admin routes and, where a store is configured, starts the task.
///
/// # Errors
/// [`GatewayError`] when the HTTP client can't be made. The store is opened later, and again and again.
pub(crate) fn start(
    store: Option<&Path>,
    around: Surroundings<'_>,
) -> Result<(Router, Option<executor::Running>), GatewayError> {
    let Surroundings { fleet, clock, gateway, token, metrics } = around;
    let shelf = store.map(|path| store::Shelf::new(Arc::new(store::SqliteStore::new(path)), path));
    let (fleet, gateway, token) = (fleet.clone(), gateway.clone(), token.clone());
    let running = match shelf.clone() {
        None => None,
        Some(shelf) => {
            let hands = Arc::new(hands::Orders::new(token.clone())?);
            let (fleet, gateway) = (fleet.clone(), gateway.clone());
            Some(executor::Executor { fleet, clock, gateway, shelf, hands, metrics }.spawn())
        }
    };
    Ok((admin::router(admin::RolloutAdmin { fleet, clock, gateway, token, shelf }), running))
}
