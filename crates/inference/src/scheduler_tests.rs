#![allow(clippy::unwrap_used)]
use super::*;
use std::time::Duration;

use crate::engine::Engine;
use crate::fake::{FakeEngine, fake_next_token, fake_token_bytes};
use crate::request::ChoiceStart;
use crate::text::StopRules;
use proptest::prelude::*;

fn capabilities() -> Capabilities {
    Capabilities {
        max_batch: 4,
        max_step_tokens: 24,
        block_tokens: 4,
        blocks: 64,
        context_length: 96,
        vocab_size: crate::FAKE_VOCABULARY,
    }
}

fn limits() -> Limits {
    Limits { max_running: 4, max_waiting: 8, max_wait: Duration::from_secs(60), prefill_tokens: 8 }
}

fn scheduler() -> Scheduler {
    Scheduler::new(capabilities(), limits(), Arc::new(fake_token_bytes()))
}

fn submission(key: u64, prompt: &str, max_tokens: usize) -> Submission {
    Submission {
        request: RequestKey(key),
        prompt: prompt.bytes().map(u32::from).collect(),
        choices: vec![ChoiceStart::default()],
        sampling: Sampling::GREEDY,
        max_tokens,
        stop: Arc::default(),
    }
}

fn oracle(prompt: &str, count: usize) -> Vec<u32> {
    let mut context: Vec<u32> = prompt.bytes().map(u32::from).collect();
    for _ in 0..count {
        context.push(fake_next_token(&context));
    }
    context.split_off(prompt.len())
}

fn step(scheduler: &mut Scheduler, engine: &mut FakeEngine, now: Moment, events: &mut Vec<Event>) -> bool {
    let Some(batch) = scheduler.plan(now, events) else { return false };
    let outputs = engine.step(&batch).unwrap();
    scheduler.complete(&batch, outputs, events);
    true
}

fn run_out(scheduler: &mut Scheduler, engine: &mut FakeEngine) -> Vec<Event> {
    let mut events = Vec::new();
    for _ in 0..10_000 {
        if !step(scheduler, engine, Moment::ZERO, &mut events) {
            return events;
        }
    }
    panic!("the scheduler does not come to rest");
}

fn ids(events: &[Event], key: u64, choice: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for event in events.iter().filter(|event| event.request == RequestKey(key)) {
        if let EventKind::Token { choice: c, index, id, .. } = &event.kind
            && *c == choice
        {
            assert!(found.is_empty() || found.last().is_some_and(|(last, _)| last + 1 == *index), "indices are dense");
            found.push((*index, *id));
        }
    }
    found.into_iter().map(|(_, id)| id).collect()
}

fn text(events: &[Event], key: u64) -> String {
    let mut whole = String::new();
    for event in events.iter().filter(|event| event.request == RequestKey(key)) {
        match &event.kind {
            EventKind::Token { text, .. } | EventKind::Resumed { text, .. } => whole.push_str(text),
            _ => {}
        }
    }
    whole
}

fn done(events: &[Event], key: u64) -> Option<Usage> {
    events.iter().find_map(|event| match event.kind {
        EventKind::Done(usage) if event.request == RequestKey(key) => Some(usage),
        _ => None,
    })
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
        let usage = Usage { prompt_tokens: prompt.len(), completion_tokens: 12 + key };
        assert_eq!(done(&events, key as u64), Some(usage));
    }
    assert_eq!(scheduler.load(), Load { blocks: 64, ..Load::default() });
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
    assert_eq!(done(&events, 5), Some(Usage { prompt_tokens: 3, completion_tokens: 18 }));
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

#[derive(Clone, Debug)]
enum Action {
    Submit { prompt: usize, max: usize, accepted: usize },
    Cancel(u64),
    Pause(u64, bool),
    Step,
    HandBack,
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        3 => (1usize..60, 1usize..30, 0usize..8).prop_map(|(prompt, max, accepted)| Action::Submit {
            prompt, max, accepted: accepted.min(max),
        }),
        1 => (0u64..40).prop_map(Action::Cancel),
        1 => ((0u64..40), any::<bool>()).prop_map(|(key, paused)| Action::Pause(key, paused)),
        8 => Just(Action::Step),
        1 => Just(Action::HandBack),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn nothing_is_lost_doubled_or_leaked(actions in proptest::collection::vec(action(), 1..120)) {
        let (mut scheduler, mut engine) = (scheduler(), FakeEngine::new(capabilities()));
        let mut events = Vec::new();
        let mut live: BTreeMap<u64, (String, usize, usize)> = BTreeMap::new();
        let mut cancelled = std::collections::BTreeSet::new();
        for (key, action) in actions.into_iter().enumerate() {
            let key = key as u64;
            match action {
                Action::Submit { prompt, max, accepted } => {
                    let text = format!("{key:03}{}", "p".repeat(prompt));
                    let choices = vec![ChoiceStart { accepted: oracle(&text, accepted) }];
                    let request = Submission { choices, ..submission(key, &text, max) };
                    if scheduler.submit(Moment::ZERO, request).is_ok() {
                        live.insert(key, (text, max, accepted));
                    }
                }
                Action::Cancel(target) => {
                    if scheduler.cancel(RequestKey(target)) {
                        cancelled.insert(target);
                    }
                }
                Action::Pause(target, paused) => scheduler.set_paused(RequestKey(target), paused),
                Action::Step => {
                    step(&mut scheduler, &mut engine, Moment::ZERO, &mut events);
                }
                Action::HandBack => scheduler.hand_back(&mut events),
            }
            let load = scheduler.load();
            prop_assert!(load.running <= 4 && load.waiting <= 8, "AD1");
            prop_assert!(load.running > 0 || load.blocks_used == 0, "KV2");
        }
        for key in live.keys() {
            scheduler.set_paused(RequestKey(*key), false);
        }
        events.extend(run_out(&mut scheduler, &mut engine));
        prop_assert_eq!(scheduler.load().blocks_used, 0, "KV1");
        for (key, (prompt, max, accepted)) in &live {
            let ends = events.iter().filter(|e| e.request.0 == *key
                && matches!(e.kind, EventKind::Done(_) | EventKind::Failed(..))).count();
            prop_assert_eq!(ends, usize::from(!cancelled.contains(key)), "ST1: one end each");
            let limit = (*max).min(96 - prompt.len());
            let wanted = oracle(prompt, limit);
            let got = ids(&events, *key, 0);
            prop_assert!(wanted[*accepted..].starts_with(&got), "ST2: a prefix of the oracle's");
            if done(&events, *key).is_some() {
                prop_assert_eq!(got.len(), limit - accepted, "a finished request is whole");
            }
        }
    }
}
