//! A request can be stopped at every point of its life: what it said stays, and its place is free at once.
#![allow(clippy::unwrap_used)]
use std::sync::Arc;

use proptest::prelude::*;

use crate::engine::Capabilities;
use crate::request::{ChoiceStart, EventKind, Limits, Pooling, Priority, RequestKey, Submission, Task, Usage};
use crate::test_kit::*;
use crate::text::StopRules;

/// Returns the choices that said that they stop, with what they released then.
fn stopped(rig: &Rig, key: u64) -> Vec<(u32, String)> {
    let of_key = rig.events.iter().filter(|event| event.request == RequestKey(key));
    let stop = |kind: &EventKind| match kind {
        EventKind::Stopped { choice, text } => Some((*choice, text.clone())),
        _ => None,
    };
    of_key.filter_map(|event| stop(&event.kind)).collect()
}

fn stop(rig: &mut Rig, key: u64) -> bool {
    let known = rig.scheduler.stop(RequestKey(key), &mut rig.events);
    rig.audit();
    known
}

fn lossy(ids: &[u32]) -> String {
    String::from_utf8_lossy(&ids.iter().map(|id| *id as u8).collect::<Vec<_>>()).into_owned()
}

fn free(rig: &Rig) -> bool {
    let load = rig.scheduler.load();
    (load.running, load.waiting, load.blocks_used) == (0, 0, 0)
}

#[test]
fn a_queued_request_stops_without_a_token_and_those_behind_it_run() {
    let mut rig = Rig::new(capabilities(), Limits { max_running: 1, ..limits() });
    (1..=3).for_each(|key| rig.submit(submission(key, "a prompt", 4)));
    rig.step();
    assert!(stop(&mut rig, 2) && !stop(&mut rig, 2), "once");
    assert_eq!(stopped(&rig, 2), [(0, String::new())]);
    assert_eq!(done(&rig.events, 2), Some(Usage { prompt_tokens: 8, ..Usage::default() }));
    rig.run_out();
    assert!(done(&rig.events, 3).is_some() && ids(&rig.events, 2, 0).is_empty());
}

#[test]
fn a_request_that_computes_its_prompt_stops_and_its_blocks_come_back() {
    let mut rig = Rig::new(capabilities(), limits());
    rig.submit(Submission { choices: vec![ChoiceStart::default(); 3], ..submission(1, &"long ".repeat(10), 4) });
    rig.step();
    assert!(ids(&rig.events, 1, 0).is_empty() && stop(&mut rig, 1) && free(&rig));
    assert_eq!(stopped(&rig, 1).iter().map(|(choice, _)| *choice).collect::<Vec<_>>(), [0, 1, 2]);
}

#[test]
fn a_choice_that_has_ended_does_not_end_again() {
    let mut rig = Rig::new(capabilities(), limits());
    let said = oracle("prompt", 6);
    let choices = vec![ChoiceStart { accepted: said[..5].to_vec() }, ChoiceStart::default()];
    rig.submit(Submission { choices, ..submission(1, "prompt", 6) });
    rig.run_out_until(|rig| ids(&rig.events, 1, 0).len() == 1 && !ids(&rig.events, 1, 1).is_empty());
    assert!(stop(&mut rig, 1) && free(&rig));
    assert_eq!(stopped(&rig, 1).iter().map(|(choice, _)| *choice).collect::<Vec<_>>(), [1]);
}

#[test]
fn a_paused_and_a_preempted_request_stop_like_others() {
    let mut rig = Rig::new(Capabilities { blocks: 6, ..capabilities() }, limits());
    rig.submit(Submission { priority: Priority::Low, ..submission(1, "low", 16) });
    rig.steps(4);
    rig.scheduler.set_paused(RequestKey(1), true);
    rig.submit(Submission { priority: Priority::High, ..submission(2, "high", 16) });
    rig.step();
    assert_eq!(rig.scheduler.load().preemptions, 1);
    let said = ids(&rig.events, 1, 0).len();
    assert!(said > 0 && stop(&mut rig, 1));
    assert_eq!(done(&rig.events, 1).map(|usage| usage.completion_tokens), Some(said));
    assert!(oracle("low", 16).starts_with(&ids(&rig.events, 1, 0)));
}

#[test]
fn a_resume_that_never_ran_tells_what_it_came_with() {
    let mut rig = Rig::new(capabilities(), limits());
    let accepted = oracle("prompt", 3);
    let wanted = lossy(&accepted);
    rig.submit(Submission { choices: vec![ChoiceStart { accepted }], ..submission(1, "prompt", 6) });
    assert!(stop(&mut rig, 1) && free(&rig));
    assert_eq!(text(&rig.events, 1), wanted);
    assert_eq!(done(&rig.events, 1).map(|usage| usage.completion_tokens), Some(3));
}

#[test]
fn an_embedding_stops_without_its_vector() {
    let mut rig = Rig::new(capabilities(), limits());
    rig.submit(Submission { task: Task::Embed(Pooling::Mean), ..submission(1, &"long ".repeat(10), 0) });
    rig.step();
    assert!(stop(&mut rig, 1) && free(&rig));
    assert_eq!(count(&rig.events, 1, |kind| matches!(kind, EventKind::Embedded { .. })), 0);
}

proptest! {
    #[test]
    fn text_that_was_held_back_is_released_by_a_stop(steps in 0usize..20, choices in 1usize..4) {
        let mut rig = Rig::new(capabilities(), limits());
        let said: Vec<char> = lossy(&oracle("prompt", 24)).chars().collect();
        // Each begun by the answer, and none in it: much is held back.
        let strings = (0..4).map(|at| said[at * 3..at * 3 + 8].iter().chain(&['\u{1}']).collect()).collect();
        let stop_rules = Arc::new(StopRules { strings, tokens: Vec::new() });
        let choices = vec![ChoiceStart::default(); choices];
        rig.submit(Submission { choices: choices.clone(), stop: stop_rules, ..submission(1, "prompt", 24) });
        rig.steps(steps);
        prop_assert!(stop(&mut rig, 1) && free(&rig));
        for choice in 0..choices.len() as u32 {
            let mut shown = String::new();
            for event in &rig.events {
                match &event.kind {
                    EventKind::Token { choice: of, text, .. } | EventKind::Stopped { choice: of, text }
                        if *of == choice => shown.push_str(text),
                    _ => {}
                }
            }
            let generated = lossy(&ids(&rig.events, 1, choice));
            let rest = generated.strip_prefix(&shown);
            prop_assert!(matches!(rest, Some("" | "\u{fffd}")), "all but half a character: {shown:?} of {generated:?}");
        }
    }
}
