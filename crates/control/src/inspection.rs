//! The inspector's snapshot on the wire.

use words::{
    ComponentHealth, Health, IdError, Incarnation, Inspection, ItemRun, LaneItem, ModelHistory, ModelId, NodeId,
    StateChange,
};

use crate::convert::incarnation_to_proto;
use crate::proto;

/// Makes the message of a snapshot.
pub fn inspection_to_proto(inspection: &Inspection) -> proto::GetLifecycleResponse {
    let lane = |items: &[LaneItem]| items.iter().map(item_to_proto).collect();
    let states = |states: &[StateChange]| states.iter().map(change_to_proto).collect::<Vec<_>>();
    let history =
        |model: &ModelHistory| proto::ModelHistory { model_id: model.model.to_string(), states: states(&model.states) };
    let part = |part: &ComponentHealth| proto::ComponentHealth {
        name: part.name.clone(),
        health: match part.health {
            Health::Ok => proto::Health::Ok,
            Health::Degraded => proto::Health::Degraded,
            Health::Failed => proto::Health::Failed,
            Health::Off => proto::Health::Off,
        }
        .into(),
        detail: part.detail.clone(),
    };
    proto::GetLifecycleResponse {
        node_id: inspection.node.to_string(),
        incarnation: Some(incarnation_to_proto(inspection.incarnation)),
        at_unix_ms: inspection.at_unix_ms,
        startup: lane(&inspection.startup),
        middleware: lane(&inspection.middleware),
        shutdown: lane(&inspection.shutdown),
        states: states(&inspection.states),
        models: inspection.models.iter().map(history).collect(),
        health: inspection.health.iter().map(part).collect(),
    }
}

/// Reads the message of a snapshot.
///
/// # Errors
/// When it has no usable node id.
pub fn inspection_from_proto(message: proto::GetLifecycleResponse) -> Result<Inspection, IdError> {
    let incarnation = message.incarnation.unwrap_or_default();
    let lane = |items: Vec<proto::LaneItem>| items.into_iter().map(item_from_proto).collect();
    let states = |states: Vec<proto::StateChange>| states.into_iter().map(change_from_proto).collect::<Vec<_>>();
    let history = |model: proto::ModelHistory| {
        Some(ModelHistory { model: ModelId::new(model.model_id).ok()?, states: states(model.states) })
    };
    let part = |part: proto::ComponentHealth| ComponentHealth {
        health: match part.health() {
            proto::Health::Ok => Health::Ok,
            proto::Health::Degraded => Health::Degraded,
            proto::Health::Off => Health::Off,
            proto::Health::Failed | proto::Health::Unspecified => Health::Failed,
        },
        name: part.name,
        detail: part.detail,
    };
    Ok(Inspection {
        node: NodeId::new(message.node_id)?,
        incarnation: Incarnation { counter: incarnation.counter, random: incarnation.random },
        at_unix_ms: message.at_unix_ms,
        startup: lane(message.startup),
        middleware: lane(message.middleware),
        shutdown: lane(message.shutdown),
        states: states(message.states),
        models: message.models.into_iter().filter_map(history).collect(),
        health: message.health.into_iter().map(part).collect(),
    })
}

fn item_to_proto(item: &LaneItem) -> proto::LaneItem {
    proto::LaneItem {
        name: item.name.clone(),
        description: item.description.clone(),
        source: item.source.clone(),
        event: item.event.clone(),
        guard: item.guard,
        timeout_ms: item.timeout_ms,
        runs: item.runs,
        failures: item.failures,
        last: item.last.as_ref().map(|last| proto::ItemRun {
            failure: last.failure.clone().unwrap_or_default(),
            seconds: last.seconds,
            at_unix_s: last.at_unix_s,
            model_id: last.model.clone().unwrap_or_default(),
        }),
    }
}

fn item_from_proto(item: proto::LaneItem) -> LaneItem {
    let some = |text: String| Some(text).filter(|text| !text.is_empty());
    LaneItem {
        name: item.name,
        description: item.description,
        source: item.source,
        event: item.event,
        guard: item.guard,
        timeout_ms: item.timeout_ms,
        runs: item.runs,
        failures: item.failures,
        last: item.last.map(|last| ItemRun {
            failure: some(last.failure),
            seconds: last.seconds,
            at_unix_s: last.at_unix_s,
            model: some(last.model_id),
        }),
    }
}

fn change_to_proto(change: &StateChange) -> proto::StateChange {
    proto::StateChange { state: change.state.clone(), at_unix_ms: change.at_unix_ms, why: change.why.clone() }
}

fn change_from_proto(change: proto::StateChange) -> StateChange {
    StateChange { state: change.state, at_unix_ms: change.at_unix_ms, why: change.why }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_snapshot_survives_the_wire() {
        let last = |failure: Option<&str>| ItemRun {
            failure: failure.map(str::to_string),
            seconds: 0.5,
            at_unix_s: 9,
            model: failure.map(|_| "m".to_string()),
        };
        let item = |event: &str, failure| LaneItem {
            name: "x".into(),
            description: "y".into(),
            source: "config z".into(),
            event: event.into(),
            guard: event.is_empty(),
            timeout_ms: Some(7),
            runs: 3,
            failures: 1,
            last: Some(last(failure)),
        };
        let states = vec![StateChange { state: "ready".into(), at_unix_ms: 5, why: "so".into() }];
        let part = |health| ComponentHealth { name: "part".into(), health, detail: "d".into() };
        let inspection = Inspection {
            node: NodeId::new("n").unwrap(),
            incarnation: Incarnation { counter: 1, random: 2 },
            at_unix_ms: 8,
            startup: vec![item("startup", None)],
            middleware: vec![item("", None), LaneItem::default()],
            shutdown: vec![item("shutdown", Some("exit 1"))],
            states: states.clone(),
            models: vec![ModelHistory { model: ModelId::new("m").unwrap(), states }],
            health: [Health::Ok, Health::Degraded, Health::Failed, Health::Off].map(part).to_vec(),
        };
        assert_eq!(inspection_from_proto(inspection_to_proto(&inspection)).unwrap(), inspection);
        assert!(inspection_from_proto(proto::GetLifecycleResponse::default()).is_err());
    }
}
