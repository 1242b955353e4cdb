//! Scores and embeddings are functions of the tokens alone, whatever the chunks, the cache, preemptions and resumes.
#![allow(clippy::unwrap_used)]
use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use crate::engine::{Capabilities, Outputs, RowOutput, Wanted};
use crate::fake::fake_outputs;
use crate::request::{ChoiceStart, EventKind, Limits, Pooling, Priority, Score, Scoring, Submission, Task};
use crate::sampling::score;
use crate::test_kit::*;

/// Each score that a request told, by choice and position; none comes twice.
fn scores(rig: &Rig, key: u64, prompt: usize) -> BTreeMap<(u32, usize), Score> {
    let mut all = BTreeMap::new();
    for event in rig.events.iter().filter(|event| event.request.0 == key) {
        let (at, score) = match event.kind.clone() {
            EventKind::Scored { choice, position, score, .. } => ((choice, position), score),
            EventKind::Token { choice, index, score: Some(score), .. } => ((choice, prompt + index as usize), *score),
            _ => continue,
        };
        assert!(all.insert(at, score).is_none(), "{at:?} is scored twice");
    }
    all
}

fn embedded(rig: &Rig, key: u64) -> Vec<Vec<f32>> {
    let of_key = rig.events.iter().filter(|event| event.request.0 == key);
    of_key
        .filter_map(|event| match &event.kind {
            EventKind::Embedded { vector, .. } => Some(vector.clone()),
            _ => None,
        })
        .collect()
}

fn mean(prompt: &str) -> Vec<f32> {
    let ids: Vec<u32> = prompt.bytes().map(u32::from).collect();
    let states = (1..=ids.len()).map(|end| fake_outputs(&ids[..end]).1);
    let add = |mut sum: Vec<f64>, state: Vec<f32>| {
        sum.iter_mut().zip(&state).for_each(|(sum, number)| *sum += f64::from(*number));
        sum
    };
    states.fold(vec![0.0; crate::FAKE_WIDTH], add).iter().map(|sum| (sum / ids.len() as f64) as f32).collect()
}

#[derive(Clone, Debug)]
struct Wish {
    prompt: String,
    accepted: Vec<usize>,
    scoring: Scoring,
    urgent: bool,
}

fn wish() -> impl Strategy<Value = Wish> {
    let scoring =
        (0usize..4, any::<bool>(), any::<bool>()).prop_map(|(top, prompt, accepted)| Scoring { top, prompt, accepted });
    ("(shared ){0,3}[a-c]{1,9}", proptest::collection::vec(0usize..7, 1..4), scoring, any::<bool>())
        .prop_map(|(prompt, accepted, scoring, urgent)| Wish { prompt, accepted, scoring, urgent })
}

proptest! {
    #[test]
    fn a_score_is_that_of_its_context_and_comes_once(
        wishes in proptest::collection::vec(wish(), 1..6), prefill_tokens in 1usize..20, blocks in 24usize..64,
        gap in 0usize..6,
    ) {
        const MAX: usize = 8;
        let mut rig = Rig::new(Capabilities { blocks, ..capabilities() }, Limits { prefill_tokens, ..limits() });
        for (key, wish) in (0..).zip(&wishes) {
            let said = oracle(&wish.prompt, MAX);
            let choices = wish.accepted.iter().map(|count| ChoiceStart { accepted: said[..*count].to_vec() }).collect();
            let priority = if wish.urgent { Priority::High } else { Priority::Low };
            let task = Task::Score(wish.scoring);
            rig.submit(Submission { choices, task, priority, ..submission(key, &wish.prompt, MAX) });
            rig.steps(gap);
        }
        rig.run_out();
        for (key, wish) in (0..).zip(&wishes) {
            prop_assert!(done(&rig.events, key).is_some());
            let (length, said) = (wish.prompt.len(), oracle(&wish.prompt, MAX));
            let whole: Vec<u32> = wish.prompt.bytes().map(u32::from).chain(said).collect();
            let told = scores(&rig, key, length);
            let mut due = 0;
            for (choice, accepted) in (0u32..).zip(&wish.accepted) {
                let again = wish.scoring.accepted || wish.scoring.prompt && choice == 0;
                let first = if again { length } else { length + accepted };
                for position in first..length + MAX {
                    prop_assert!(told.contains_key(&(choice, position)), "choice {choice}, {position}");
                }
                due += length + MAX - first;
            }
            due += if wish.scoring.prompt { length - 1 } else { 0 };
            prop_assert_eq!(told.len(), due, "no more and no less");
            for ((_, position), told) in told {
                let logits = fake_outputs(&whole[..position]).0;
                prop_assert_eq!(told, score(&logits, whole[position], wish.scoring.top));
            }
        }
    }

    #[test]
    fn an_embedding_is_pooled_over_its_own_tokens(
        prompts in proptest::collection::vec(("(shared ){0,3}[a-c]{1,9}", any::<bool>()), 1..6), prefill_tokens in 1usize..20,
        gap in 0usize..6,
    ) {
        let mut rig = Rig::new(capabilities(), Limits { prefill_tokens, ..limits() });
        for (key, (prompt, means)) in (0..).zip(&prompts) {
            let task = Task::Embed(if *means { Pooling::Mean } else { Pooling::Last });
            rig.submit(Submission { task, ..submission(key, prompt, 0) });
            rig.steps(gap);
        }
        rig.run_out();
        for (key, (prompt, means)) in (0..).zip(&prompts) {
            let ids: Vec<u32> = prompt.bytes().map(u32::from).collect();
            let wanted = if *means { mean(prompt) } else { fake_outputs(&ids).1 };
            prop_assert_eq!(embedded(&rig, key), vec![wanted]);
            let usage = done(&rig.events, key).unwrap();
            prop_assert_eq!((usage.prompt_tokens, usage.completion_tokens), (prompt.len(), 0));
        }
        prop_assert_eq!(rig.scheduler.load().blocks_used, 0);
    }
}

#[test]
fn a_choice_that_is_over_is_scored_again_where_a_whole_answer_needs_it() {
    for (stop_at, accepted) in [(3usize, true), (3, false), (1, true)] {
        let said = oracle("ten tokens", 8);
        let stop = Arc::new(crate::StopRules { strings: vec![], tokens: vec![said[stop_at - 1]] });
        let over = ChoiceStart { accepted: said[..stop_at].to_vec() };
        let whole = ChoiceStart { accepted: said.clone() };
        let scoring = Scoring { top: 2, prompt: false, accepted };
        for choices in [vec![over.clone(), ChoiceStart::default()], vec![ChoiceStart::default(), over]] {
            let mut rig = Rig::new(capabilities(), limits());
            let ended = choices.iter().position(|choice| !choice.accepted.is_empty()).unwrap() as u32;
            rig.submit(Submission {
                choices,
                stop: stop.clone(),
                task: Task::Score(scoring),
                ..submission(0, "ten tokens", 8)
            });
            rig.run_out();
            assert!(done(&rig.events, 0).is_some());
            let told = scores(&rig, 0, 10).keys().filter(|(choice, _)| *choice == ended).count();
            assert_eq!(told, if accepted { stop_at - 1 } else { 0 }, "all but the end token");
            assert_eq!(ids(&rig.events, 0, ended), [], "nothing is said again");
        }
        let mut rig = Rig::new(capabilities(), limits());
        rig.submit(Submission { choices: vec![whole], task: Task::Score(scoring), ..submission(0, "ten tokens", 8) });
        rig.run_out();
        assert_eq!(scores(&rig, 0, 10).len(), if accepted { 8 } else { 0 }, "ended by its length");
        assert_eq!(done(&rig.events, 0).unwrap().completion_tokens, 8);
    }
}

#[test]
fn an_embedding_fills_the_context_and_a_generation_leaves_room() {
    let mut rig = Rig::new(capabilities(), limits());
    let full = "x".repeat(capabilities().context_length);
    rig.submit(Submission { task: Task::Embed(Pooling::Mean), ..submission(0, &full, 0) });
    rig.run_out();
    assert_eq!(embedded(&rig, 0), [mean(&full)]);
    let longer = Submission { task: Task::Embed(Pooling::Last), ..submission(1, &format!("{full}x"), 0) };
    assert!(rig.scheduler.submit(rig.now, longer).is_err());
    assert!(rig.scheduler.submit(rig.now, submission(2, &full, 1)).is_err());
    assert!(rig.scheduler.submit(rig.now, submission(3, "x", 0)).is_err(), "a generation generates");
}

#[test]
fn an_urgent_request_that_takes_the_room_of_an_embedding_changes_nothing_in_it() {
    let mut rig = Rig::new(Capabilities { blocks: 8, ..capabilities() }, Limits { prefill_tokens: 3, ..limits() });
    let prompt = "some twenty-five tokens..";
    rig.submit(Submission { task: Task::Embed(Pooling::Mean), priority: Priority::Low, ..submission(0, prompt, 0) });
    rig.steps(4);
    rig.submit(Submission { priority: Priority::High, ..submission(1, "urgent", 20) });
    rig.run_out();
    assert_eq!(rig.scheduler.load().preemptions, 1);
    assert_eq!(embedded(&rig, 0), [mean(prompt)]);
}

#[test]
fn a_step_holds_no_more_logits_of_prompts_than_its_bound() {
    let large = Capabilities { context_length: 400, max_step_tokens: 400, blocks: 200, ..capabilities() };
    let mut rig = Rig::new(large, Limits { prefill_tokens: 400, ..limits() });
    let task = Task::Score(Scoring { top: 0, prompt: true, accepted: true });
    for key in 0..2 {
        rig.submit(Submission { task, ..submission(key, &"long ".repeat(40), 2) });
    }
    while let Some(batch) = rig.scheduler.plan(rig.now, &mut rig.events) {
        let logits: usize =
            batch.rows.iter().filter(|row| row.tokens.len() > 1).map(|row| row.wanted.positions()).sum();
        assert!(logits <= 64, "{logits}");
        let outputs = crate::engine::Engine::step(&mut rig.engine, &batch).unwrap();
        rig.scheduler.complete(&batch, outputs, &mut rig.events);
    }
    assert_eq!([0, 1].map(|key| scores(&rig, key, 200).len()), [201, 201]);
}

#[test]
fn an_engine_that_gives_another_output_than_was_wanted_fails_the_request() {
    for wrong in [RowOutput::Nothing, RowOutput::Token(1), RowOutput::Logits(vec![0.0]), RowOutput::Hidden(vec![])] {
        let mut rig = Rig::new(capabilities(), limits());
        let task = Task::Score(Scoring { top: 1, prompt: false, accepted: false });
        rig.submit(Submission { task, ..submission(0, "abc", 3) });
        let batch = rig.scheduler.plan(rig.now, &mut rig.events).unwrap();
        assert_eq!(batch.rows[0].wanted, Wanted::Logits(1));
        rig.scheduler.complete(&batch, Outputs { rows: vec![wrong] }, &mut rig.events);
        let failed = |kind: &EventKind| matches!(kind, EventKind::Failed(words::Code::EngineFailed, _));
        assert_eq!(count(&rig.events, 0, failed), 1);
    }
}
