//! Hooks: at which turns of a node's and a model's life they run, in which order, and what a failure means.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A turn at which hooks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum HookEvent {
    /// The process has its configuration and loads nothing yet.
    Startup,
    /// A model's files are here; its memory is not taken yet.
    BeforeLoad,
    /// A model has answered its warm-up; it is not ready before these have ended.
    AfterHealthy,
    /// A model takes requests.
    Ready,
    /// A running request was cancelled by an operator.
    StopGeneration,
    /// A model has no requests any more; its memory is not given back before these have ended.
    BeforeStop,
    /// A model's memory is free.
    AfterUnload,
    /// Every model is unloaded; the process ends after these.
    Shutdown,
}

impl HookEvent {
    /// All of them, in the order of a life.
    pub const ALL: [HookEvent; 8] = [
        HookEvent::Startup,
        HookEvent::BeforeLoad,
        HookEvent::AfterHealthy,
        HookEvent::Ready,
        HookEvent::StopGeneration,
        HookEvent::BeforeStop,
        HookEvent::AfterUnload,
        HookEvent::Shutdown,
    ];

    /// Returns its name in configurations, metrics and the hooks folder.
    pub fn name(self) -> &'static str {
        match self {
            HookEvent::Startup => "startup",
            HookEvent::BeforeLoad => "before_load",
            HookEvent::AfterHealthy => "after_healthy",
            HookEvent::Ready => "ready",
            HookEvent::StopGeneration => "stop_generation",
            HookEvent::BeforeStop => "before_stop",
            HookEvent::AfterUnload => "after_unload",
            HookEvent::Shutdown => "shutdown",
        }
    }

    /// Finds an event by its name.
    pub fn parse(name: &str) -> Option<HookEvent> {
        HookEvent::ALL.into_iter().find(|event| event.name() == name)
    }

    /// Whether it is about one model; the others are about the whole node.
    pub fn of_model(self) -> bool {
        !matches!(self, HookEvent::Startup | HookEvent::Shutdown)
    }

    /// Whether something waits for it that a failure can still stop.
    pub fn can_stop(self) -> bool {
        matches!(self, HookEvent::Startup | HookEvent::BeforeLoad | HookEvent::AfterHealthy)
    }

    /// Returns what a failure means where nothing else is said.
    pub fn default_policy(self) -> OnFailure {
        match self {
            HookEvent::Startup | HookEvent::BeforeLoad => OnFailure::Fail,
            _ => OnFailure::Warn,
        }
    }

    /// Puts hooks that were declared in this order into the order in which they run: what was set up last is torn
    /// down first.
    pub fn run_order<T>(self, mut declared: Vec<T>) -> Vec<T> {
        if self == HookEvent::Shutdown {
            declared.reverse();
        }
        declared
    }
}

/// What a hook's failure means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnFailure {
    /// What waits for the hook fails too. Only where [`HookEvent::can_stop`].
    Fail,
    /// A warning, and on.
    Warn,
    /// On, with a word for those who look closely.
    Ignore,
}

/// What follows a hook's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookVerdict {
    /// The next hook, or what waited for the last.
    GoOn,
    /// The same, after a warning.
    Warn,
    /// No further hook of this event; what waited fails.
    Stop,
}

/// Judges a hook that ended.
pub fn hook_verdict(event: HookEvent, policy: OnFailure, failed: bool) -> HookVerdict {
    match (failed, policy) {
        (false, _) | (true, OnFailure::Ignore) => HookVerdict::GoOn,
        (true, OnFailure::Fail) if event.can_stop() => HookVerdict::Stop,
        (true, OnFailure::Fail | OnFailure::Warn) => HookVerdict::Warn,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_event_is_found_by_its_name() {
        for event in HookEvent::ALL {
            assert_eq!(HookEvent::parse(event.name()), Some(event));
            assert_eq!(serde_json::to_value(event).unwrap(), event.name());
        }
        assert_eq!(HookEvent::parse("before_lunch"), None);
    }

    #[test]
    fn shutdown_runs_backwards_and_everything_else_as_declared() {
        for event in HookEvent::ALL {
            let wanted = if event == HookEvent::Shutdown { vec![3, 2, 1] } else { vec![1, 2, 3] };
            assert_eq!(event.run_order(vec![1, 2, 3]), wanted);
        }
    }

    #[test]
    fn no_failure_stops_a_way_out_and_only_fail_stops_a_way_in() {
        for event in HookEvent::ALL {
            for policy in [OnFailure::Fail, OnFailure::Warn, OnFailure::Ignore] {
                assert_eq!(hook_verdict(event, policy, false), HookVerdict::GoOn);
                let stops = hook_verdict(event, policy, true) == HookVerdict::Stop;
                assert_eq!(stops, policy == OnFailure::Fail && event.can_stop(), "{event:?} {policy:?}");
            }
            assert!(event.default_policy() != OnFailure::Fail || event.can_stop());
        }
    }
}
