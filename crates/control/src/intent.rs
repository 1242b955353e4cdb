//! Orders to a node, between the generated messages and the vocabulary.

use std::time::Duration;

use words::{
    Canary, Code, Epoch, Error, HandoffPolicy, Incarnation, Intent, IntentOrder, ModelId, RolloutClaim, RolloutId,
};

use crate::convert::incarnation_to_proto;
use crate::proto;

/// Longest text of a canary, in bytes.
const CANARY_BYTES_MAX: usize = 16 << 10;

pub(crate) fn intent_to_proto(intent: Intent) -> proto::Intent {
    match intent {
        Intent::None => proto::Intent::None,
        Intent::Restart => proto::Intent::Restart,
        Intent::Cordon => proto::Intent::Cordon,
        Intent::Drain => proto::Intent::Drain,
    }
}

/// An intent of a newer version is read as a cordon: not routable.
pub(crate) fn intent_from_proto(intent: i32) -> Intent {
    match proto::Intent::try_from(intent) {
        Ok(proto::Intent::Unspecified | proto::Intent::None) => Intent::None,
        Ok(proto::Intent::Restart) => Intent::Restart,
        Ok(proto::Intent::Drain) => Intent::Drain,
        Ok(proto::Intent::Cordon) | Err(_) => Intent::Cordon,
    }
}

/// Makes the message of an order.
pub fn intent_order_to_proto(order: &IntentOrder) -> proto::SetIntentRequest {
    proto::SetIntentRequest {
        seen_epoch: order.seen.0,
        intent: intent_to_proto(order.intent).into(),
        incarnation: order.incarnation.map(incarnation_to_proto),
        deadline_ms: order.deadline.map(|deadline| deadline.as_millis() as u64),
        handoff: match order.handoff {
            HandoffPolicy::Now => proto::HandoffPolicy::Now,
            HandoffPolicy::Soft => proto::HandoffPolicy::Soft,
            HandoffPolicy::Never => proto::HandoffPolicy::Never,
        }
        .into(),
        rollout: order.rollout.as_ref().map(|claim| proto::RolloutClaim {
            rollout_id: claim.id.to_string(),
            lease_revision: claim.lease_revision,
            hold_ttl_ms: claim.hold_ttl_ms,
            canary: claim.canary.as_ref().map(|canary| proto::Canary {
                model_id: canary.model.to_string(),
                prompt: canary.prompt.clone(),
                answer: canary.answer.clone(),
            }),
        }),
        upgrade: order.upgrade.clone().unwrap_or_default(),
    }
}

/// Reads the message of an order. Unlike in a status, nothing unknown is guessed at: the order is refused.
///
/// # Errors
/// `InvalidRequest` that names the field.
pub fn intent_order_from_proto(message: proto::SetIntentRequest) -> Result<IntentOrder, Error> {
    let unknown = |field: &str| Error::invalid(field, format!("{field} is of a newer version than this worker"));
    let intent = match proto::Intent::try_from(message.intent) {
        Ok(proto::Intent::None) => Intent::None,
        Ok(proto::Intent::Restart) => Intent::Restart,
        Ok(proto::Intent::Cordon) => Intent::Cordon,
        Ok(proto::Intent::Drain) => Intent::Drain,
        Ok(proto::Intent::Unspecified) | Err(_) => return Err(unknown("intent")),
    };
    let handoff = match proto::HandoffPolicy::try_from(message.handoff) {
        Ok(proto::HandoffPolicy::Now) => HandoffPolicy::Now,
        Ok(proto::HandoffPolicy::Soft | proto::HandoffPolicy::Unspecified) => HandoffPolicy::Soft,
        Ok(proto::HandoffPolicy::Never) => HandoffPolicy::Never,
        Err(_) => return Err(unknown("handoff")),
    };
    Ok(IntentOrder {
        seen: Epoch(message.seen_epoch),
        intent,
        incarnation: message
            .incarnation
            .map(|incarnation| Incarnation { counter: incarnation.counter, random: incarnation.random }),
        deadline: message.deadline_ms.map(Duration::from_millis),
        handoff,
        rollout: message.rollout.map(claim_from_proto).transpose()?,
        upgrade: Some(message.upgrade).filter(|name| !name.is_empty()),
    })
}

fn claim_from_proto(message: proto::RolloutClaim) -> Result<RolloutClaim, Error> {
    let canary = message.canary.map(|canary| {
        if canary.prompt.len() + canary.answer.len() > CANARY_BYTES_MAX {
            return Err(Error::new(Code::InvalidRequest, format!("a canary has at most {CANARY_BYTES_MAX} bytes")));
        }
        let model = ModelId::new(canary.model_id).map_err(|error| Error::invalid("canary", error.to_string()))?;
        Ok(Canary { model, prompt: canary.prompt, answer: canary.answer })
    });
    Ok(RolloutClaim {
        id: RolloutId::new(message.rollout_id).map_err(|error| Error::invalid("rollout_id", error.to_string()))?,
        lease_revision: message.lease_revision,
        hold_ttl_ms: message.hold_ttl_ms,
        canary: canary.transpose()?,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_order_survives_the_wire_and_an_unknown_one_is_refused() {
        let order = IntentOrder {
            seen: Epoch(7),
            intent: Intent::Restart,
            incarnation: Some(Incarnation { counter: 3, random: 9 }),
            deadline: Some(Duration::from_secs(5)),
            handoff: HandoffPolicy::Never,
            rollout: Some(RolloutClaim {
                id: RolloutId::new("r-1").unwrap(),
                lease_revision: 4,
                hold_ttl_ms: 60_000,
                canary: Some(Canary { model: ModelId::new("m").unwrap(), prompt: "2+2".into(), answer: "4".into() }),
            }),
            upgrade: Some("rpm".into()),
        };
        let message = intent_order_to_proto(&order);
        assert_eq!(intent_order_from_proto(message.clone()).unwrap(), order);
        for wrong in [
            proto::SetIntentRequest { intent: 99, ..message.clone() },
            proto::SetIntentRequest { intent: 0, ..message.clone() },
            proto::SetIntentRequest { handoff: 99, ..message },
        ] {
            assert_eq!(intent_order_from_proto(wrong).unwrap_err().code(), Code::InvalidRequest);
        }
    }

    #[test]
    fn an_intent_of_a_newer_version_is_not_routable() {
        assert_eq!(intent_from_proto(99), Intent::Cordon);
    }
}
