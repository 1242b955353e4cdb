//! What an operator asks for, as JSON, and the policy that it makes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use fleet::FleetView;
use fleet::rollout::{MaxUnavailable, Policy};
use serde::{Deserialize, Serialize};
use words::{Canary, Error, HandoffPolicy, ModelId, NodeId};

/// Longest span that may be asked for, in seconds: a day.
const SPAN_S_MAX: f64 = 86_400.0;

/// The body of `POST /api/rollout`; what is absent has its default.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Ask {
    /// The nodes to restart, in this order; all of the fleet, as configured, when empty.
    pub(crate) order: Vec<NodeId>,
    /// `2` or `25%`.
    pub(crate) max_unavailable: Option<String>,
    /// The floor of models that are named.
    pub(crate) min_available: BTreeMap<ModelId, u32>,
    /// The floor of all others.
    pub(crate) min_available_default: Option<u32>,
    /// Models that may go dark.
    pub(crate) allow_dark: BTreeSet<ModelId>,
    /// `PROMPT=ANSWER` or `MODEL:PROMPT=ANSWER`.
    pub(crate) canary: Option<String>,
    /// The `[upgrade.NAME]` to run on each node.
    pub(crate) upgrade: Option<String>,
    /// From the order to the cut of what still runs.
    pub(crate) deadline_s: Option<f64>,
    /// When running streams are handed over.
    pub(crate) handoff: HandoffPolicy,
    /// How long a node may take to come back.
    pub(crate) back_within_s: Option<f64>,
    /// How long a node is healthy before the next one goes.
    pub(crate) health_s: Option<f64>,
    /// How long a node is held without a word of the coordinator.
    pub(crate) hold_ttl_s: Option<f64>,
    /// How long the rollout waits for capacity before it pauses.
    pub(crate) wait_s: Option<f64>,
    /// Only say what would be done.
    pub(crate) dry_run: bool,
}

impl Ask {
    /// Makes the policy, for the fleet as it is seen.
    ///
    /// # Errors
    /// `InvalidRequest` with the field at fault.
    pub(crate) fn policy(&self, view: &FleetView) -> Result<Policy, Error> {
        let targets = if self.order.is_empty() { everybody(view)? } else { known(&self.order, view)? };
        let mut policy = Policy::new(targets);
        if let Some(text) = &self.max_unavailable {
            policy.max_unavailable = max_unavailable(text)?;
        }
        policy.min_available.models = self.min_available.clone();
        policy.min_available.default = self.min_available_default.unwrap_or(policy.min_available.default);
        policy.allow_dark = self.allow_dark.clone();
        policy.canary = self.canary.as_deref().map(|text| canary(text, view)).transpose()?;
        policy.upgrade = self.upgrade.clone();
        let deadline = self.deadline_s.map(|seconds| span("deadline_s", seconds)).transpose()?;
        policy.deadline_ms = deadline.map(|deadline| deadline.as_millis() as u64);
        policy.handoff = self.handoff;
        let set = |field: &mut Duration, name: &str, seconds: Option<f64>| -> Result<(), Error> {
            *field = seconds.map(|seconds| span(name, seconds)).transpose()?.unwrap_or(*field);
            Ok(())
        };
        set(&mut policy.back_within, "back_within_s", self.back_within_s)?;
        set(&mut policy.health_for, "health_s", self.health_s)?;
        set(&mut policy.hold_ttl, "hold_ttl_s", self.hold_ttl_s)?;
        set(&mut policy.blocked_max, "wait_s", self.wait_s)?;
        Ok(policy)
    }
}

/// Reads a span of at most a day, in seconds.
///
/// # Errors
/// `InvalidRequest` with the field.
pub(crate) fn span(field: &str, seconds: f64) -> Result<Duration, Error> {
    if !(0.0..=SPAN_S_MAX).contains(&seconds) {
        return Err(Error::invalid(field, format!("must be from 0 to {SPAN_S_MAX} seconds, it is {seconds}")));
    }
    Ok(Duration::from_secs_f64(seconds))
}

fn max_unavailable(text: &str) -> Result<MaxUnavailable, Error> {
    let wrong = || Error::invalid("max_unavailable", format!("must be a number or a share like 25%, it is '{text}'"));
    match text.strip_suffix('%') {
        Some(share) => share.trim().parse().map(MaxUnavailable::Percent).map_err(|_| wrong()),
        None => text.trim().parse().map(MaxUnavailable::Count).map_err(|_| wrong()),
    }
}

/// Returns the nodes that are named, once it is sure that there are any such.
fn known(order: &[NodeId], view: &FleetView) -> Result<Vec<NodeId>, Error> {
    let here = || view.nodes().filter_map(|(_, node)| node.status.as_ref()).map(|status| &status.node);
    match order.iter().find(|name| !here().any(|known| known == *name)) {
        None => Ok(order.to_vec()),
        Some(name) => {
            let here = here().map(NodeId::as_str).collect::<Vec<_>>().join(", ");
            let message = format!("there is no worker '{name}' that was heard from; those that were are {here}");
            Err(Error::invalid("order", message))
        }
    }
}

fn everybody(view: &FleetView) -> Result<Vec<NodeId>, Error> {
    let named = |(_, node): (fleet::Slot, &fleet::NodeView)| {
        let unheard = || {
            let message = format!("the worker at {} was never heard from; name the others", node.control_address);
            Error::invalid("order", message)
        };
        node.status.as_ref().map(|status| status.node.clone()).ok_or_else(unheard)
    };
    view.nodes().map(named).collect()
}

/// Reads a canary. The model comes before the first `:` that ends a model's name; without one the fleet must have one
/// model only. The answer comes after the last `=`.
fn canary(text: &str, view: &FleetView) -> Result<Canary, Error> {
    let wrong = |message: String| Error::invalid("canary", message);
    let models: Vec<ModelId> = view.models().into_iter().map(|model| model.id).collect();
    let (question, answer) =
        text.rsplit_once('=').ok_or_else(|| wrong("must be PROMPT=ANSWER or MODEL:PROMPT=ANSWER".into()))?;
    let named = |model: &&ModelId| question.strip_prefix(model.as_str()).is_some_and(|rest| rest.starts_with(':'));
    let (model, prompt) = match models.iter().filter(named).max_by_key(|model| model.as_str().len()) {
        Some(model) => (model, &question[model.as_str().len() + 1..]),
        None if models.len() == 1 => (&models[0], question),
        None => {
            let names: Vec<_> = models.iter().map(|model| model.as_str()).collect();
            return Err(wrong(format!("it must begin with a model's name and ':', one of: {}", names.join(", "))));
        }
    };
    if prompt.is_empty() || answer.is_empty() {
        return Err(wrong("neither the prompt nor the answer may be empty".into()));
    }
    Ok(Canary { model: model.clone(), prompt: prompt.into(), answer: answer.into() })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use fleet::Slot;
    use words::{Incarnation, ModelState, ModelStatus, Moment, NodeStatus};

    use super::*;

    fn view(models: &[&str]) -> FleetView {
        let mut view = FleetView::new(["a:1".to_string()]);
        let mut status = NodeStatus::new(NodeId::new("a").unwrap(), Incarnation::default());
        let model = |name: &&str| ModelStatus {
            state: ModelState::Ready,
            harness: "fake".into(),
            ..ModelStatus::absent(ModelId::new(*name).unwrap())
        };
        status.models = models.iter().map(model).collect();
        view.observe(Moment::ZERO, Slot(0), status);
        view
    }

    #[test]
    fn a_canary_names_its_model_unless_there_is_only_one() {
        let read = |text: &str, models: &[&str]| {
            canary(text, &view(models)).map(|canary| (canary.model.to_string(), canary.prompt, canary.answer))
        };
        let of = |model: &str, prompt: &str, answer: &str| (model.to_string(), prompt.to_string(), answer.to_string());
        assert_eq!(read("2+2==4", &["m"]).unwrap(), of("m", "2+2=", "4"));
        assert_eq!(read("Note: say x=x", &["m"]).unwrap(), of("m", "Note: say x", "x"));
        assert_eq!(read("m:say x=x", &["m", "n"]).unwrap(), of("m", "say x", "x"));
        assert_eq!(read("q:7b:say x=x", &["q", "q:7b"]).unwrap(), of("q:7b", "say x", "x"));
        let refused = |text: &str, models: &[&str]| read(text, models).unwrap_err().message().to_string();
        assert!(refused("say x=x", &["m", "n"]).contains("one of: m, n"));
        assert!(refused("say x", &["m"]).contains("PROMPT=ANSWER"));
        assert!(refused("say x=", &["m"]).contains("empty"));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_field() {
        let refused = |ask: Ask| {
            let error = ask.policy(&view(&["m"])).unwrap_err();
            error.param().unwrap().to_string()
        };
        assert_eq!(refused(Ask { max_unavailable: Some("many".into()), ..Ask::default() }), "max_unavailable");
        assert_eq!(refused(Ask { health_s: Some(-1.0), ..Ask::default() }), "health_s");
        assert_eq!(refused(Ask { deadline_s: Some(f64::NAN), ..Ask::default() }), "deadline_s");
        let named = |order: &str| Ask { order: vec![NodeId::new(order).unwrap()], ..Ask::default() };
        assert_eq!(named("a").policy(&view(&["m"])).unwrap().targets, [NodeId::new("a").unwrap()]);
        let error = named("b").policy(&view(&["m"])).unwrap_err();
        assert!(error.param() == Some("order") && error.message().contains("'b'"), "{error}");
        let error = Ask::default().policy(&FleetView::new(["a:1".to_string()])).unwrap_err();
        assert!(error.message().contains("a:1"), "{error}");
        let ask = Ask { max_unavailable: Some("25%".into()), health_s: Some(0.5), ..Ask::default() };
        let policy = ask.policy(&view(&["m"])).unwrap();
        assert_eq!(policy.max_unavailable, MaxUnavailable::Percent(25));
        assert_eq!(policy.health_for, Duration::from_millis(500));
        assert_eq!(policy.targets, [NodeId::new("a").unwrap()]);
    }
}
