//! Random lives of many requests: whatever is submitted, preempted, cancelled, paused or failed in whatever order,
//! nothing is lost, doubled or leaked, and whoever finishes has the oracle's tokens.
#![allow(clippy::unwrap_used)]
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use words::Code;

use crate::engine::Capabilities;
use crate::request::{ChoiceStart, EventKind, Limits, Priority, RequestKey, Submission};
use crate::test_kit::{Rig, capabilities, count, done, ids, limits, oracle, submission};

#[derive(Clone, Debug)]
struct Wish {
    prefix: usize,
    length: usize,
    max: usize,
    accepted: Vec<usize>,
    class: usize,
    salt: u8,
    deadline: Option<u64>,
}

#[derive(Clone, Debug)]
enum Action {
    Submit(Wish),
    Cancel(u64),
    Stop(u64),
    Pause(u64, bool),
    Steps(usize),
    Fail,
    Wait(u64),
    HandBack,
    Import,
}

fn wish() -> impl Strategy<Value = Wish> {
    let accepted = proptest::collection::vec(prop_oneof![3 => Just(0usize), 1 => 0usize..8], 1..4);
    let deadline = prop_oneof![6 => Just(None), 1 => (1u64..40).prop_map(Some)];
    (0usize..8, 1usize..30, 1usize..24, accepted, 0usize..3, 0u8..2, deadline).prop_map(
        |(prefix, length, max, accepted, class, salt, deadline)| {
            let accepted = accepted.into_iter().map(|count| count.min(max - 1)).collect();
            Wish { prefix, length, max, accepted, class, salt, deadline }
        },
    )
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        6 => wish().prop_map(Action::Submit),
        1 => (0u64..40).prop_map(Action::Cancel),
        1 => (0u64..40).prop_map(Action::Stop),
        1 => ((0u64..40), any::<bool>()).prop_map(|(key, paused)| Action::Pause(key, paused)),
        8 => (1usize..6).prop_map(Action::Steps),
        1 => (0u8..4).prop_map(|n| if n == 0 { Action::Fail } else { Action::Steps(1) }),
        1 => (1u64..20).prop_map(Action::Wait),
        1 => (0u8..2).prop_map(|n| if n == 0 { Action::Import } else { Action::Steps(2) }),
        1 => (0u8..4).prop_map(|n| if n == 0 { Action::HandBack } else { Action::Steps(2) }),
    ]
}

fn live(actions: Vec<Action>, capabilities: Capabilities, limits: Limits) -> Result<(u64, u64), TestCaseError> {
    let mut rig = Rig::new(capabilities, limits);
    let mut before = Rig::new(self::capabilities(), self::limits());
    before.submit(submission(0, &"shared ".repeat(7), 9));
    before.run_out();
    let kept = before.export();
    let mut wishes: BTreeMap<u64, (String, Wish)> = BTreeMap::new();
    let (mut cancelled, mut stopped) = (BTreeSet::new(), BTreeSet::new());
    for (key, action) in (0..).zip(actions) {
        match action {
            Action::Submit(wish) => {
                // Few different beginnings, so that prefixes are shared and salts matter.
                let prompt = "shared ".repeat(wish.prefix) + &"different ".repeat(3)[..wish.length];
                let said = oracle(&prompt, wish.max);
                let start = |count: &usize| ChoiceStart { accepted: said[..*count].to_vec() };
                let request = Submission {
                    choices: wish.accepted.iter().map(start).collect(),
                    priority: [Priority::High, Priority::Normal, Priority::Low][wish.class],
                    salt: [wish.salt; 32],
                    deadline: wish.deadline.map(|seconds| rig.now + Duration::from_secs(seconds)),
                    ..submission(key, &prompt, wish.max)
                };
                if rig.scheduler.submit(rig.now, request).is_ok() {
                    wishes.insert(key, (prompt, wish));
                }
            }
            Action::Cancel(target) => {
                if rig.scheduler.cancel(RequestKey(target)) {
                    cancelled.insert(target);
                }
            }
            Action::Stop(target) => {
                if rig.scheduler.stop(RequestKey(target), &mut rig.events) {
                    stopped.insert(target);
                }
            }
            Action::Pause(target, paused) => rig.scheduler.set_paused(RequestKey(target), paused),
            Action::Steps(count) => rig.steps(count),
            Action::Fail => drop(rig.failing_step()),
            Action::Wait(seconds) => rig.after(Duration::from_secs(seconds)),
            Action::Import => rig.import(&kept),
            Action::HandBack => {
                rig.scheduler.hand_back(&mut rig.events);
                prop_assert_eq!(rig.scheduler.queue.fresh(), 0);
            }
        }
        rig.audit();
    }
    for key in wishes.keys() {
        rig.scheduler.set_paused(RequestKey(*key), false);
    }
    rig.run_out();
    let load = rig.scheduler.load();
    prop_assert_eq!((load.running, load.waiting, load.blocks_used), (0, 0, 0), "KV2: everything comes back");
    prop_assert!(load.prefix_hit_tokens <= load.prefix_query_tokens);
    for (key, (prompt, wish)) in &wishes {
        let ended = count(&rig.events, *key, |kind| matches!(kind, EventKind::Done(_) | EventKind::Failed(..)));
        prop_assert_eq!(ended, usize::from(!cancelled.contains(key)), "ST1: one end each");
        let internal = count(&rig.events, *key, |kind| matches!(kind, EventKind::Failed(Code::Internal, _)));
        prop_assert_eq!(internal, 0, "what was counted is there");
        let started = count(&rig.events, *key, |kind| matches!(kind, EventKind::Started { .. }));
        prop_assert!(started <= 1, "started once");
        let handed = count(&rig.events, *key, |kind| matches!(kind, EventKind::Failed(Code::Draining, _)));
        prop_assert!(handed + started <= 1, "work that ran is not handed back");
        let limit = wish.max.min(capabilities.context_length - prompt.len());
        let wanted = oracle(prompt, limit);
        for (choice, accepted) in (0..).zip(&wish.accepted) {
            let got = ids(&rig.events, *key, choice);
            prop_assert!(wanted[*accepted..].starts_with(&got), "ST2: a prefix of the oracle's");
            let whole = got.len() == limit - accepted;
            prop_assert!(
                stopped.contains(key) || done(&rig.events, *key).is_none() || whole,
                "a finished one is whole"
            );
            let stops = |kind: &EventKind| matches!(kind, EventKind::Stopped { choice: c, .. } if *c == choice);
            let stops = count(&rig.events, *key, stops);
            prop_assert_eq!(stops, usize::from(stopped.contains(key) && !whole), "each choice has one end");
        }
        if let (Some(usage), true) = (done(&rig.events, *key), stopped.contains(key)) {
            let generated: usize =
                (0..).zip(&wish.accepted).map(|(i, had)| had + ids(&rig.events, *key, i).len()).sum();
            prop_assert_eq!(usage.completion_tokens, generated, "a stopped one is paid for what it said");
        } else if let Some(usage) = done(&rig.events, *key) {
            let of_prompt: BTreeSet<usize> =
                rig.computed[&(*key, 0)].iter().copied().filter(|position| *position < prompt.len()).collect();
            let never = prompt.len() - of_prompt.len();
            prop_assert!(usage.cached_tokens <= never, "no more than were spared");
            prop_assert!(usage.cached_tokens == never || load.preemptions > 0, "and no less");
            prop_assert_eq!(usage.completion_tokens, limit * wish.accepted.len());
        }
    }
    Ok((load.preemptions, load.prefix_hit_tokens))
}

/// Room for about two and a half requests, so that they fight for it.
fn tight() -> Capabilities {
    Capabilities { blocks: 30, ..capabilities() }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn nothing_is_lost_doubled_or_leaked(actions in proptest::collection::vec(action(), 1..80)) {
        live(actions, capabilities(), limits())?;
    }

    #[test]
    fn nothing_is_lost_doubled_or_leaked_where_room_is_short(
        actions in proptest::collection::vec(action(), 1..80),
        step_tokens in 1usize..24,
        rows in 3usize..5,
        prefix_cache in prop_oneof![3 => Just(true), 1 => Just(false)],
    ) {
        let capabilities = Capabilities { max_step_tokens: step_tokens, ..tight() };
        live(actions, capabilities, Limits { max_running: rows, prefix_cache, ..limits() })?;
    }
}

#[test]
fn the_random_lives_do_preempt_and_share() {
    use proptest::strategy::ValueTree;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let (mut preemptions, mut hits) = (0, 0);
    for _ in 0..30 {
        let actions = proptest::collection::vec(action(), 40..80).new_tree(&mut runner).unwrap().current();
        let (p, h) = live(actions, tight(), limits()).unwrap();
        (preemptions, hits) = (preemptions + p, hits + h);
    }
    assert!(preemptions > 20 && hits > 1000, "{preemptions} preemptions, {hits} tokens found");
}
