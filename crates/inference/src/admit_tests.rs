//! Who runs and who waits: classes, preemption, ageing, deadlines.
#![allow(clippy::unwrap_used)]
use std::time::Duration;

use super::*;
use crate::engine::Capabilities;
use crate::request::{ChoiceStart, Limits, Submission};
use crate::test_kit::{Rig, capabilities, count, done, ids, limits, oracle, submission, text};

fn classed(key: u64, class: Priority, prompt: &str, max: usize) -> Submission {
    Submission { priority: class, ..submission(key, prompt, max) }
}

fn is_running(rig: &Rig, key: u64) -> bool {
    rig.scheduler.running.values().any(|seq| seq.choice.request == RequestKey(key))
}

fn failed(rig: &Rig, key: u64, code: Code) -> bool {
    count(&rig.events, key, |kind| matches!(kind, EventKind::Failed(c, _) if *c == code)) == 1
}

/// Room for one row.
fn narrow() -> Rig {
    Rig::new(capabilities(), Limits { max_running: 1, max_waiting: 100, ..limits() })
}

#[test]
fn a_preempted_request_goes_on_as_if_nothing_had_happened() {
    for steps in 1..16 {
        let mut rig = narrow();
        rig.submit(classed(0, Priority::Low, "a prompt of three chunks", 12));
        rig.steps(steps);
        if done(&rig.events, 0).is_some() {
            continue;
        }
        rig.submit(classed(1, Priority::High, "urgent", 5));
        rig.step();
        assert!(is_running(&rig, 1) && !is_running(&rig, 0), "preempted at step {steps}");
        rig.run_out();
        assert_eq!(ids(&rig.events, 0, 0), oracle("a prompt of three chunks", 12));
        assert_eq!(ids(&rig.events, 1, 0), oracle("urgent", 5));
        assert_eq!(count(&rig.events, 0, |kind| matches!(kind, EventKind::Started { .. })), 1);
        assert_eq!(done(&rig.events, 0).unwrap().completion_tokens, 12);
        assert_eq!(done(&rig.events, 0).unwrap().cached_tokens, 0, "its own blocks are no hit");
        assert_eq!(rig.scheduler.load().preemptions, 1);
        let twice = rig.computed[&(0, 0)].len() - 35;
        assert!(twice <= 4, "only the block that was not whole is computed again, not {twice} tokens");
    }
}

#[test]
fn a_preempted_request_shows_the_same_text() {
    let (mut whole, mut cut) = (narrow(), narrow());
    whole.submit(submission(0, "the same text", 30));
    whole.run_out();
    cut.submit(submission(0, "the same text", 30));
    for key in 1..5 {
        cut.steps(6);
        cut.submit(classed(key, Priority::High, "in between", 2));
    }
    cut.run_out();
    assert_eq!(cut.scheduler.load().preemptions, 4);
    assert_eq!(text(&cut.events, 0), text(&whole.events, 0));
}

#[test]
fn a_request_of_several_choices_is_preempted_as_a_whole() {
    for steps in 1..12 {
        let mut rig = Rig::new(capabilities(), limits());
        let said = oracle("ten tokens", 8);
        let choices = [0, 5, 0].map(|count| ChoiceStart { accepted: said[..count].to_vec() }).to_vec();
        rig.submit(Submission { choices, ..classed(0, Priority::Low, "ten tokens", 8) });
        rig.steps(steps);
        let over = done(&rig.events, 0).is_some();
        for key in 1..3 {
            rig.submit(classed(key, Priority::Normal, "two more", 4));
        }
        rig.run_out();
        assert_eq!(rig.scheduler.load().preemptions, u64::from(!over && steps < 5), "at step {steps}");
        for (choice, accepted) in [(0, 0), (1, 5), (2, 0)] {
            assert_eq!(ids(&rig.events, 0, choice), said[accepted..], "choice {choice}, step {steps}");
        }
        assert_eq!(count(&rig.events, 0, |kind| matches!(kind, EventKind::Resumed { .. })), 1);
    }
}

#[test]
fn the_lowest_class_and_its_latest_arrival_make_room() {
    let mut rig = Rig::new(capabilities(), limits());
    let classes = [Priority::Normal, Priority::Low, Priority::Low, Priority::High];
    for (key, class) in (0..).zip(classes) {
        rig.submit(classed(key, class, "some prompt", 20));
    }
    rig.step();
    for (key, victim) in [(4, 2), (5, 1), (6, 0)] {
        rig.submit(classed(key, Priority::High, "urgent", 20));
        rig.step();
        assert!(is_running(&rig, key) && !is_running(&rig, victim), "{victim} makes room for {key}");
    }
    rig.submit(classed(7, Priority::High, "urgent", 20));
    rig.step();
    assert!(!is_running(&rig, 7), "nobody makes room for its own class");
    rig.run_out();
    assert!((0..8).all(|key| done(&rig.events, key).is_some()));
}

#[test]
fn nobody_is_preempted_in_vain_or_beyond_need() {
    let tight = Capabilities { blocks: 24, ..capabilities() };
    let mut rig = Rig::new(tight, limits());
    rig.submit(classed(0, Priority::High, &"h".repeat(40), 20));
    rig.submit(classed(1, Priority::Low, "small", 3));
    rig.step();
    rig.submit(classed(2, Priority::High, &"b".repeat(40), 20));
    rig.step();
    assert!(is_running(&rig, 1), "two blocks more would not be enough");
    assert_eq!(rig.scheduler.load().preemptions, 0);

    let mut rig = Rig::new(tight, limits());
    rig.submit(classed(0, Priority::Low, &"b".repeat(60), 20));
    rig.submit(classed(1, Priority::Low, "small", 3));
    rig.step();
    rig.submit(classed(2, Priority::Normal, &"n".repeat(40), 20));
    rig.step();
    assert!(is_running(&rig, 1) && is_running(&rig, 2) && !is_running(&rig, 0), "the small one is spared");
    assert_eq!(rig.scheduler.load().preemptions, 1);
}

#[test]
fn a_request_is_immune_after_its_last_preemption() {
    let mut rig = narrow();
    rig.submit(classed(0, Priority::Low, "often in the way", 40));
    rig.step();
    for key in 1..10 {
        rig.submit(classed(key, Priority::High, "urgent", 2));
        for _ in 0..4 {
            rig.step();
        }
    }
    assert_eq!(rig.scheduler.load().preemptions, u64::from(MAX_PREEMPTIONS));
    assert!(is_running(&rig, 0));
    rig.run_out();
    assert_eq!(ids(&rig.events, 0, 0), oracle("often in the way", 40));
    assert!((1..10).all(|key| done(&rig.events, key).is_some()));
}

#[test]
fn an_endless_stream_of_urgent_work_starves_nobody() {
    for class in [Priority::Normal, Priority::Low] {
        let mut rig = narrow();
        rig.submit(classed(0, class, "patient", 10));
        let mut over = None;
        for key in 1..400 {
            // More than one row can do: the queue of urgent ones is never empty.
            while rig.scheduler.queue.len() < 3 {
                let next = 1000 * key + rig.scheduler.load().waiting as u64 + 1;
                rig.submit(classed(next, Priority::High, "urgent", 3));
            }
            rig.step();
            rig.after(Duration::from_millis(500));
            if done(&rig.events, 0).is_some() {
                over = Some(rig.now.elapsed());
                break;
            }
        }
        let over = over.unwrap();
        assert!(over < limits().max_wait, "{class:?} ended after {over:?}");
        assert_eq!(ids(&rig.events, 0, 0), oracle("patient", 10));
    }
}

#[test]
fn a_big_request_is_not_passed_by_small_ones() {
    let mut rig = Rig::new(Capabilities { blocks: 24, ..capabilities() }, limits());
    rig.submit(submission(0, "first", 30));
    rig.step();
    rig.submit(submission(1, &"big".repeat(20), 30));
    for key in 2..6 {
        rig.submit(submission(key, "small", 2));
    }
    rig.step();
    assert_eq!((rig.scheduler.load().running, rig.scheduler.load().waiting), (1, 5));
    rig.run_out();
    let order: Vec<u64> = rig
        .events
        .iter()
        .filter(|event| matches!(event.kind, EventKind::Started { .. }))
        .map(|event| event.request.0)
        .collect();
    assert_eq!(order, [0, 1, 2, 3, 4, 5]);
}

#[test]
fn classes_come_before_arrival_and_preempted_ones_before_their_class() {
    let mut rig = narrow();
    rig.submit(classed(0, Priority::Normal, "runs first", 8));
    rig.step();
    let classes = [Priority::Low, Priority::Normal, Priority::High, Priority::Low, Priority::High, Priority::Normal];
    for (key, class) in (1..).zip(classes) {
        rig.submit(classed(key, class, "next", 2));
    }
    rig.run_out();
    let ends = rig.events.iter().filter(|event| matches!(event.kind, EventKind::Done(_)));
    assert_eq!(ends.map(|event| event.request.0).collect::<Vec<_>>(), [3, 5, 0, 2, 6, 1, 4]);
}

#[test]
fn a_deadline_ends_queued_running_and_preempted_requests() {
    let mut rig = narrow();
    let by = |seconds| Some(Moment::after_start(Duration::from_secs(seconds)));
    rig.submit(Submission { deadline: by(5), ..classed(0, Priority::Low, "preempted", 40) });
    rig.step();
    rig.submit(Submission { deadline: by(7), ..classed(1, Priority::High, "running", 40) });
    rig.step();
    rig.submit(Submission { deadline: by(6), ..submission(2, "queued", 40) });
    assert_eq!(rig.scheduler.next_deadline(), by(5));
    for (second, key) in [(5, 0), (6, 2), (7, 1)] {
        rig.now = Moment::after_start(Duration::from_secs(second));
        rig.step();
        assert!(!failed(&rig, key, Code::DeadlinePassed), "{key} has until {second}");
        rig.after(Duration::from_millis(1));
        rig.step();
        assert!(failed(&rig, key, Code::DeadlinePassed), "{key} is past {second}");
    }
    assert_eq!((rig.scheduler.next_deadline(), rig.scheduler.load().blocks_used), (None, 0));
}

#[test]
fn work_that_ran_is_neither_handed_back_nor_failed_for_waiting() {
    let mut rig = narrow();
    rig.submit(classed(0, Priority::Low, "ran already", 8));
    rig.step();
    rig.submit(classed(1, Priority::High, "urgent", 8));
    rig.step();
    rig.submit(submission(2, "fresh", 8));
    rig.scheduler.hand_back(&mut rig.events);
    assert!(failed(&rig, 2, Code::Draining) && !failed(&rig, 0, Code::Draining));
    assert_eq!(rig.scheduler.next_deadline(), None);
    rig.after(Duration::from_secs(1000));
    rig.run_out();
    assert_eq!(ids(&rig.events, 0, 0), oracle("ran already", 8));
    assert_eq!(ids(&rig.events, 1, 0), oracle("urgent", 8));
}

#[test]
fn preempted_requests_take_no_place_in_the_queue() {
    let mut rig = Rig::new(capabilities(), Limits { max_running: 2, max_waiting: 2, ..limits() });
    for key in 0..2 {
        rig.submit(classed(key, Priority::Low, "low", 20));
    }
    rig.step();
    for key in 2..4 {
        rig.submit(classed(key, Priority::High, "high", 20));
    }
    rig.step();
    assert_eq!(rig.scheduler.load().waiting, 2);
    for key in 4..6 {
        rig.submit(classed(key, Priority::High, "high", 20));
    }
    let more = rig.scheduler.submit(rig.now, submission(6, "more", 20)).unwrap_err();
    assert_eq!(more.code(), Code::Overloaded);
    rig.run_out();
    assert!((0..6).all(|key| done(&rig.events, key).is_some()));
}

#[test]
fn a_head_without_room_looks_again_only_when_something_changed() {
    let mut rig = Rig::new(Capabilities { blocks: 24, ..capabilities() }, limits());
    rig.submit(submission(0, "first", 60));
    rig.step();
    rig.submit(submission(1, &"big".repeat(20), 30));
    rig.step();
    let seen = rig.scheduler.blocked;
    assert_eq!(seen.map(|(key, _)| key), Some(RequestKey(1)));
    rig.scheduler.cancel(RequestKey(1));
    rig.submit(submission(1, "small", 3));
    rig.step();
    assert!(is_running(&rig, 1), "another request of the same name");
    rig.submit(submission(2, &"big".repeat(20), 30));
    rig.step();
    assert!(!is_running(&rig, 2));
    rig.scheduler.cancel(RequestKey(0));
    rig.scheduler.cancel(RequestKey(1));
    rig.step();
    assert!(is_running(&rig, 2));
}

#[test]
fn a_preempted_request_comes_before_an_older_one_that_aged_into_its_class() {
    let mut rig = narrow();
    rig.submit(classed(0, Priority::High, "first", 2));
    rig.submit(classed(1, Priority::Low, "ages", 2));
    rig.after(Duration::from_secs(20));
    rig.submit(classed(2, Priority::Normal, "is preempted", 8));
    rig.run_out_until(|rig| is_running(rig, 2));
    rig.after(Duration::from_secs(11));
    rig.submit(classed(3, Priority::High, "urgent", 2));
    rig.run_out();
    let ends = rig.events.iter().filter(|event| matches!(event.kind, EventKind::Done(_)));
    assert_eq!(ends.map(|event| event.request.0).collect::<Vec<_>>(), [0, 3, 2, 1]);
    assert_eq!(rig.scheduler.load().preemptions, 1, "the older one did not even start before it");
}
