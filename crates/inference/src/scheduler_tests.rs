//! What a request sees of the scheduler: its tokens, its text, its end.
#![allow(clippy::unwrap_used)]
use super::*;
use std::time::Duration;

use crate::fake::FakeEngine;
use crate::request::ChoiceStart;
use crate::test_kit::{capabilities, done, ids, limits, oracle, run_out, step, submission, text};
use crate::text::StopRules;

fn scheduler() -> Scheduler {
    crate::test_kit::scheduler(capabilities(), limits())
}

#[test]
fn every_request_gets_the_oracles_tokens_whatever_shares_its_batch() {
    let (mut scheduler, mut engine) = (scheduler(), FakeEngine::new(capabilities()));
    let prompts = ["a", "hello there, this prompt takes several chunks", "xyz", "the fourth", "a fifth one waits"];
    for (key, prompt) in prompts.iter().enumerate() {
        scheduler.submit(Moment::ZERO, submission(key as u64, prompt, 12 + key)).unwrap();
    }
    let events = run_out(&mut scheduler, &mut engine);
    for (key, prompt) in prompts.iter().enumerate() {
        assert_eq!(ids(&events, key as u64, 0), oracle(prompt, 12 + key), "request {key}");
        let usage = Usage { prompt_tokens: prompt.len(), completion_tokens: 12 + key, cached_tokens: 0 };
        assert_eq!(done(&events, key as u64), Some(usage));
    }
    let load = scheduler.load();
    assert_eq!((load.running, load.waiting, load.blocks_used, load.preemptions), (0, 0, 0, 0));
}

#[test]
fn a_resume_goes_on_at_the_next_index_and_releases_the_same_text() {
    let prompt = "cut me anywhere";
    let (mut whole, mut engine) = (scheduler(), FakeEngine::new(capabilities()));
    whole.submit(Moment::ZERO, submission(0, prompt, 30)).unwrap();
    let uncut = run_out(&mut whole, &mut engine);
    let all = ids(&uncut, 0, 0);
    for cut in 1..=all.len() {
        let (mut second, mut engine) = (scheduler(), FakeEngine::new(capabilities()));
        let choices = vec![ChoiceStart { accepted: all[..cut].to_vec() }];
        second.submit(Moment::ZERO, Submission { choices, ..submission(0, prompt, 30) }).unwrap();
        let events = run_out(&mut second, &mut engine);
        assert_eq!(ids(&events, 0, 0), all[cut..], "cut at {cut}");
        assert_eq!(text(&events, 0), text(&uncut, 0), "cut at {cut}");
        assert_eq!(done(&events, 0), done(&uncut, 0), "usage adds up over attempts");
    }
}

#[test]
fn a_resume_holds_back_the_half_of_a_stop_string_it_was_given() {
    let prompt = "stops";
    let (mut first, mut engine) = (scheduler(), FakeEngine::new(capabilities()));
    first.submit(Moment::ZERO, submission(0, prompt, 20)).unwrap();
    let events = run_out(&mut first, &mut engine);
    let all = ids(&events, 0, 0);
    let shown = text(&events, 0);
    let stop: String = shown.chars().skip(6).take(3).collect();
    let rules = Arc::new(StopRules { strings: vec![stop.clone()], tokens: vec![] });
    let until = &shown[..shown.find(&stop).unwrap()];
    for cut in 0..all.len() {
        let (mut second, mut engine) = (scheduler(), FakeEngine::new(capabilities()));
        let choices = vec![ChoiceStart { accepted: all[..cut].to_vec() }];
        let request = Submission { choices, stop: rules.clone(), ..submission(0, prompt, 20) };
        second.submit(Moment::ZERO, request).unwrap();
        assert_eq!(text(&run_out(&mut second, &mut engine), 0), until, "cut at {cut}");
    }
}

#[test]
fn choices_of_one_request_end_each_for_itself_and_finished_ones_are_not_run_again() {
    let (mut scheduler, mut engine) = (scheduler(), FakeEngine::new(capabilities()));
    let accepted = oracle("two", 9);
    let choices = vec![ChoiceStart { accepted: accepted.clone() }, ChoiceStart { accepted: accepted[..4].to_vec() }];
    scheduler.submit(Moment::ZERO, Submission { choices, ..submission(5, "two", 9) }).unwrap();
    let events = run_out(&mut scheduler, &mut engine);
    assert_eq!(ids(&events, 5, 0), []);
    assert_eq!(ids(&events, 5, 1), accepted[4..]);
    assert_eq!(done(&events, 5), Some(Usage { prompt_tokens: 3, completion_tokens: 18, cached_tokens: 0 }));
}

#[test]
fn a_long_prompt_never_keeps_a_running_decode_waiting() {
    let (mut scheduler, mut engine) = (scheduler(), FakeEngine::new(capabilities()));
    scheduler.submit(Moment::ZERO, submission(0, "a", 60)).unwrap();
    let mut events = Vec::new();
    step(&mut scheduler, &mut engine, Moment::ZERO, &mut events);
    scheduler.submit(Moment::ZERO, submission(1, &"long".repeat(20), 4)).unwrap();
    for count in 2..10 {
        step(&mut scheduler, &mut engine, Moment::ZERO, &mut events);
        assert_eq!(ids(&events, 0, 0).len(), count, "each step decodes the running request");
    }
    assert_eq!(ids(&events, 1, 0).len(), 0, "80 tokens in chunks of 8 take 10 steps");
}

#[test]
fn a_paused_request_waits_alone() {
    let (mut scheduler, mut engine) = (scheduler(), FakeEngine::new(capabilities()));
    scheduler.submit(Moment::ZERO, submission(0, "a", 9)).unwrap();
    scheduler.submit(Moment::ZERO, submission(1, "b", 9)).unwrap();
    scheduler.set_paused(RequestKey(0), true);
    let events = run_out(&mut scheduler, &mut engine);
    assert_eq!((ids(&events, 0, 0).len(), ids(&events, 1, 0).len()), (0, 9));
    scheduler.set_paused(RequestKey(0), false);
    assert_eq!(ids(&run_out(&mut scheduler, &mut engine), 0, 0), oracle("a", 9));
}

#[test]
fn queued_work_is_handed_back_whole_and_running_work_goes_on() {
    let (mut scheduler, mut engine) = (scheduler(), FakeEngine::new(capabilities()));
    for key in 0..7 {
        scheduler.submit(Moment::ZERO, submission(key, "abc", 5)).unwrap();
    }
    let mut events = Vec::new();
    step(&mut scheduler, &mut engine, Moment::ZERO, &mut events);
    scheduler.hand_back(&mut events);
    let back = |e: &&Event| matches!(e.kind, EventKind::Failed(Code::Draining, _));
    assert_eq!(events.iter().filter(back).map(|e| e.request.0).collect::<Vec<_>>(), [4, 5, 6]);
    events.extend(run_out(&mut scheduler, &mut engine));
    assert_eq!((0..4).filter(|key| done(&events, *key).is_some()).count(), 4);
}

#[test]
fn the_queue_is_bounded_in_length_and_in_time() {
    let mut scheduler = scheduler();
    let accepted = (0..40).filter(|key| scheduler.submit(Moment::ZERO, submission(*key, "abc", 5)).is_ok()).count();
    assert_eq!(accepted, 8);
    let mut events = Vec::new();
    let late = Moment::after_start(Duration::from_secs(61));
    assert!(scheduler.plan(late, &mut events).is_none());
    assert_eq!(events.len(), 8);
    assert!(events.iter().all(|e| matches!(e.kind, EventKind::Failed(Code::Overloaded, _))));
}

#[test]
fn what_can_never_fit_is_refused_at_once() {
    let mut scheduler = scheduler();
    let code = |r: Result<(), words::Error>| r.unwrap_err().code();
    let long = "x".repeat(96);
    assert_eq!(code(scheduler.submit(Moment::ZERO, submission(0, &long, 1))), Code::ContextLengthExceeded);
    assert_eq!(code(scheduler.submit(Moment::ZERO, submission(0, "", 1))), Code::InvalidRequest);
    assert_eq!(code(scheduler.submit(Moment::ZERO, submission(0, "a", 0))), Code::InvalidRequest);
    let foreign = ChoiceStart { accepted: vec![9_999] };
    let resume = Submission { choices: vec![foreign], ..submission(0, "a", 4) };
    assert_eq!(code(scheduler.submit(Moment::ZERO, resume)), Code::InvalidRequest);
    assert_eq!(scheduler.load().waiting, 0);
}
