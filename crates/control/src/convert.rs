//! Between the generated messages and the vocabulary. What is unknown or damaged becomes "not routable", never "fine".

use words::{
    ActivationProgress, CRUMBS_MAX, Capabilities, DrainPhase, DrainProgress, Epoch, Fingerprint, GatewayId, Generation,
    Hold, IdError, Incarnation, ModelCard, ModelId, ModelLoad, ModelState, ModelStatus, NodeId, NodeMemory, NodeState,
    NodeStatus, RolloutId, UpgradeOutcome,
};

use crate::STREAM_FORMAT;
use crate::intent::{intent_from_proto, intent_to_proto};
use crate::proto;

/// Makes the message of a node's status.
pub fn node_status_to_proto(status: &NodeStatus) -> proto::NodeStatus {
    let (state, phase) = node_state_to_proto(status.state);
    proto::NodeStatus {
        node_id: status.node.to_string(),
        incarnation: Some(incarnation_to_proto(status.incarnation)),
        generation: status.generation.0,
        epoch: status.epoch.0,
        intent: intent_to_proto(status.intent).into(),
        state: state.into(),
        drain_phase: phase.into(),
        data_address: status.data_address.clone(),
        version: status.version.clone(),
        activation: Some(proto::Activation {
            total: status.activation.total,
            done: status.activation.done,
            failed: status.activation.failed,
            current_model_id: status.activation.current.as_ref().map(ModelId::to_string).unwrap_or_default(),
        }),
        models: status.models.iter().map(model_status_to_proto).collect(),
        gateway_ids: status.gateways.iter().map(GatewayId::to_string).collect(),
        in_flight: status.in_flight,
        hold: status.hold.as_ref().map(|hold| proto::Hold {
            rollout_id: hold.rollout.to_string(),
            lease_revision: hold.lease_revision,
            ttl_ms: hold.ttl_ms,
        }),
        stream_format: STREAM_FORMAT,
        rollout_id: status.rollout.as_ref().map(RolloutId::to_string).unwrap_or_default(),
        drain: status.drain.as_ref().map(|drain| proto::DrainProgress {
            deadline_ms: drain.deadline_ms,
            waiting_for: drain.waiting_for.clone(),
        }),
        crumbs: status.crumbs.iter().map(|crumb| crumb.0.to_vec()).collect(),
        upgrade: status.upgrade.as_ref().map(|upgrade| proto::UpgradeOutcome {
            name: upgrade.name.clone(),
            ok: upgrade.ok,
            detail: upgrade.detail.clone(),
            at_unix_s: upgrade.at,
        }),
        memory: Some(proto::NodeMemory { budget: status.memory.budget, used: status.memory.used }),
    }
}

/// Reads the message of a node's status.
///
/// # Errors
/// When it has no usable node id. Models without a usable id are left out: nobody could name them.
pub fn node_status_from_proto(message: proto::NodeStatus) -> Result<NodeStatus, IdError> {
    let incarnation = message.incarnation.unwrap_or_default();
    let activation = message.activation.clone().unwrap_or_default();
    Ok(NodeStatus {
        node: NodeId::new(message.node_id.clone())?,
        incarnation: Incarnation { counter: incarnation.counter, random: incarnation.random },
        generation: Generation(message.generation),
        epoch: Epoch(message.epoch),
        intent: intent_from_proto(message.intent),
        state: node_state_from_proto(message.state, message.drain_phase),
        data_address: message.data_address,
        version: message.version,
        activation: ActivationProgress {
            total: activation.total,
            done: activation.done,
            failed: activation.failed,
            current: ModelId::new(activation.current_model_id).ok(),
        },
        models: message.models.into_iter().filter_map(|model| model_status_from_proto(model).ok()).collect(),
        gateways: message.gateway_ids.into_iter().filter_map(|id| GatewayId::new(id).ok()).collect(),
        in_flight: message.in_flight,
        hold: message.hold.and_then(|hold| {
            let rollout = RolloutId::new(hold.rollout_id).ok()?;
            Some(Hold { rollout, lease_revision: hold.lease_revision, ttl_ms: hold.ttl_ms })
        }),
        rollout: RolloutId::new(message.rollout_id).ok(),
        drain: message
            .drain
            .map(|drain| DrainProgress { deadline_ms: drain.deadline_ms, waiting_for: drain.waiting_for }),
        crumbs: message.crumbs.iter().take(CRUMBS_MAX).map(|crumb| fingerprint(crumb)).collect(),
        upgrade: message.upgrade.map(|upgrade| UpgradeOutcome {
            name: upgrade.name,
            ok: upgrade.ok,
            detail: upgrade.detail,
            at: upgrade.at_unix_s,
        }),
        memory: message
            .memory
            .map(|memory| NodeMemory { budget: memory.budget, used: memory.used })
            .unwrap_or_default(),
    })
}

/// Makes the message of an incarnation.
pub fn incarnation_to_proto(incarnation: Incarnation) -> proto::Incarnation {
    proto::Incarnation { counter: incarnation.counter, random: incarnation.random }
}

fn node_state_to_proto(state: NodeState) -> (proto::NodeState, proto::DrainPhase) {
    use proto::{DrainPhase as P, NodeState as S};
    match state {
        NodeState::Activating => (S::Activating, P::Unspecified),
        NodeState::Ready => (S::Ready, P::Unspecified),
        NodeState::Held => (S::Held, P::Unspecified),
        NodeState::Draining(DrainPhase::Settle) => (S::Draining, P::Settle),
        NodeState::Draining(DrainPhase::Closed) => (S::Draining, P::Closed),
        NodeState::Draining(DrainPhase::Handoff) => (S::Draining, P::Handoff),
        NodeState::Draining(DrainPhase::Force) => (S::Draining, P::Force),
        NodeState::Drained => (S::Drained, P::Unspecified),
        NodeState::Unloading => (S::Unloading, P::Unspecified),
        NodeState::Stopped => (S::Stopped, P::Unspecified),
        NodeState::Unknown => (S::Unspecified, P::Unspecified),
    }
}

fn node_state_from_proto(state: i32, phase: i32) -> NodeState {
    use proto::{DrainPhase as P, NodeState as S};
    match (S::try_from(state), P::try_from(phase)) {
        (Ok(S::Activating), _) => NodeState::Activating,
        (Ok(S::Ready), _) => NodeState::Ready,
        (Ok(S::Held), _) => NodeState::Held,
        (Ok(S::Draining), Ok(P::Settle)) => NodeState::Draining(DrainPhase::Settle),
        (Ok(S::Draining), Ok(P::Closed)) => NodeState::Draining(DrainPhase::Closed),
        (Ok(S::Draining), Ok(P::Handoff)) => NodeState::Draining(DrainPhase::Handoff),
        (Ok(S::Draining), Ok(P::Force)) => NodeState::Draining(DrainPhase::Force),
        (Ok(S::Drained), _) => NodeState::Drained,
        (Ok(S::Unloading), _) => NodeState::Unloading,
        (Ok(S::Stopped), _) => NodeState::Stopped,
        (Ok(S::Unspecified | S::Draining) | Err(_), _) => NodeState::Unknown,
    }
}

const MODEL_STATES: [(ModelState, proto::ModelState); 10] = [
    (ModelState::Absent, proto::ModelState::Absent),
    (ModelState::Fetching, proto::ModelState::Fetching),
    (ModelState::Loading, proto::ModelState::Loading),
    (ModelState::Warming, proto::ModelState::Warming),
    (ModelState::Ready, proto::ModelState::Ready),
    (ModelState::Draining, proto::ModelState::Draining),
    (ModelState::Unloading, proto::ModelState::Unloading),
    (ModelState::Failed, proto::ModelState::Failed),
    (ModelState::Recovering, proto::ModelState::Recovering),
    (ModelState::Unknown, proto::ModelState::Unspecified),
];

/// Makes the message of a model's status.
pub fn model_status_to_proto(status: &ModelStatus) -> proto::ModelStatus {
    let bit = |set: bool, capability: proto::Capability| if set { 1u64 << capability as u32 } else { 0 };
    let state = MODEL_STATES.iter().find(|(state, _)| *state == status.state);
    proto::ModelStatus {
        model_id: status.id.to_string(),
        state: state.map_or(proto::ModelState::Unspecified, |(_, state)| *state).into(),
        harness: status.harness.clone(),
        context_length: status.context_length,
        created_unix_s: status.created,
        continue_fingerprint: status.continue_fingerprint.0.to_vec(),
        exact_fingerprint: status.exact_fingerprint.0.to_vec(),
        capabilities: bit(status.capabilities.chat, proto::Capability::Chat)
            | bit(status.capabilities.continuation, proto::Capability::Continuation),
        load: Some(proto::ModelLoad {
            running: status.load.running,
            waiting: status.load.waiting,
            max_running: status.load.max_running,
            max_waiting: status.load.max_waiting,
            kv_blocks: status.load.kv_blocks,
            kv_blocks_used: status.load.kv_blocks_used,
        }),
        progress_permille: status.progress_permille,
        failure: status.failure.clone().unwrap_or_default(),
        inter_token_p99_ms: status.inter_token_p99_ms,
        card: Some(card_to_proto(&status.card)),
        memory_bytes: status.memory_bytes,
        idle_s: status.idle_s,
        since_unix_ms: status.since_unix_ms,
        eta_ms: status.eta_ms,
    }
}

fn card_to_proto(card: &ModelCard) -> proto::ModelCard {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    proto::ModelCard {
        aliases: card.aliases.iter().map(ModelId::to_string).collect(),
        family: text(&card.family),
        provider: text(&card.provider),
        description: text(&card.description),
        capabilities: card.capabilities.clone(),
        on_demand: card.on_demand,
        pinned: card.pinned,
        priority: card.priority,
        ttl_s: card.ttl_s,
        memory_estimate: card.memory_estimate,
    }
}

fn card_from_proto(card: proto::ModelCard) -> ModelCard {
    let text = |text: String| Some(text).filter(|text| !text.is_empty());
    ModelCard {
        aliases: card.aliases.into_iter().filter_map(|alias| ModelId::new(alias).ok()).collect(),
        family: text(card.family),
        provider: text(card.provider),
        description: text(card.description),
        capabilities: card.capabilities,
        on_demand: card.on_demand,
        pinned: card.pinned,
        priority: card.priority,
        ttl_s: card.ttl_s,
        memory_estimate: card.memory_estimate,
    }
}

/// Reads the message of a model's status.
///
/// # Errors
/// When it has no usable model id.
pub fn model_status_from_proto(message: proto::ModelStatus) -> Result<ModelStatus, IdError> {
    let has = |capability: proto::Capability| message.capabilities & (1 << capability as u32) != 0;
    let load = message.load.unwrap_or_default();
    let state = MODEL_STATES.iter().find(|(_, state)| *state as i32 == message.state);
    Ok(ModelStatus {
        state: state.map_or(ModelState::Unknown, |(state, _)| *state),
        capabilities: Capabilities {
            chat: has(proto::Capability::Chat),
            continuation: has(proto::Capability::Continuation),
        },
        id: ModelId::new(message.model_id)?,
        harness: message.harness,
        context_length: message.context_length,
        created: message.created_unix_s,
        continue_fingerprint: fingerprint(&message.continue_fingerprint),
        exact_fingerprint: fingerprint(&message.exact_fingerprint),
        load: ModelLoad {
            running: load.running,
            waiting: load.waiting,
            max_running: load.max_running,
            max_waiting: load.max_waiting,
            kv_blocks: load.kv_blocks,
            kv_blocks_used: load.kv_blocks_used,
        },
        progress_permille: message.progress_permille,
        failure: (!message.failure.is_empty()).then_some(message.failure),
        inter_token_p99_ms: message.inter_token_p99_ms,
        card: message.card.map(card_from_proto).unwrap_or_default(),
        memory_bytes: message.memory_bytes,
        idle_s: message.idle_s,
        since_unix_ms: message.since_unix_ms,
        eta_ms: message.eta_ms,
    })
}

fn fingerprint(bytes: &[u8]) -> Fingerprint {
    Fingerprint(bytes.try_into().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    use words::Intent;

    fn status(state: NodeState) -> NodeStatus {
        let model = ModelStatus {
            id: ModelId::new("org/m").unwrap(),
            state: ModelState::Warming,
            harness: "candle".into(),
            context_length: 4096,
            created: 17,
            continue_fingerprint: Fingerprint([7; 32]),
            exact_fingerprint: Fingerprint([8; 32]),
            capabilities: Capabilities { chat: true, continuation: false },
            load: ModelLoad { running: 1, waiting: 2, max_running: 3, max_waiting: 4, kv_blocks: 5, kv_blocks_used: 6 },
            progress_permille: 900,
            failure: Some("why".into()),
            inter_token_p99_ms: 31,
            card: ModelCard {
                aliases: vec![ModelId::new("other").unwrap()],
                family: Some("f".into()),
                provider: Some("p".into()),
                description: Some("d".into()),
                capabilities: vec!["tools".into()],
                on_demand: true,
                pinned: true,
                priority: -3,
                ttl_s: 60,
                memory_estimate: 1 << 40,
            },
            memory_bytes: 1 << 33,
            idle_s: 12,
            since_unix_ms: 1_700_000_000_000,
            eta_ms: Some(0),
        };
        NodeStatus {
            node: NodeId::new("n1").unwrap(),
            incarnation: Incarnation { counter: 3, random: u64::MAX },
            generation: Generation(9),
            epoch: Epoch(2),
            intent: Intent::Cordon,
            state,
            data_address: "127.0.0.1:1".into(),
            version: "1".into(),
            activation: ActivationProgress { total: 3, done: 2, failed: 1, current: ModelId::new("x").ok() },
            models: vec![model],
            gateways: [GatewayId::new("g").unwrap()].into(),
            in_flight: 4,
            hold: Some(Hold { rollout: RolloutId::new("r").unwrap(), lease_revision: 5, ttl_ms: 6 }),
            rollout: RolloutId::new("r").ok(),
            drain: Some(DrainProgress { deadline_ms: 8, waiting_for: "3 streams".into() }),
            crumbs: vec![Fingerprint([4; 32])],
            upgrade: Some(UpgradeOutcome { name: "rpm".into(), ok: true, detail: "done".into(), at: 5 }),
            memory: NodeMemory { budget: 1 << 41, used: 7 },
        }
    }

    #[test]
    fn a_status_survives_the_wire_in_every_state() {
        for state in [
            NodeState::Activating,
            NodeState::Ready,
            NodeState::Held,
            NodeState::Draining(DrainPhase::Settle),
            NodeState::Draining(DrainPhase::Closed),
            NodeState::Draining(DrainPhase::Handoff),
            NodeState::Draining(DrainPhase::Force),
            NodeState::Drained,
            NodeState::Unloading,
            NodeState::Stopped,
            NodeState::Unknown,
        ] {
            let sent = status(state);
            assert_eq!(node_status_from_proto(node_status_to_proto(&sent)).unwrap(), sent);
        }
    }

    #[test]
    fn what_a_newer_version_says_is_not_routable() {
        let mut message = node_status_to_proto(&status(NodeState::Ready));
        message.state = 99;
        message.models[0].state = 99;
        let read = node_status_from_proto(message).unwrap();
        assert_eq!((read.state, read.models[0].state), (NodeState::Unknown, ModelState::Unknown));
    }

    #[test]
    fn a_status_without_a_node_id_is_refused() {
        assert!(node_status_from_proto(proto::NodeStatus::default()).is_err());
    }
}
