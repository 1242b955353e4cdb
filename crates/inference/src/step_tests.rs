//! Batches: choices of one request share its prompt, copy what they write to, and keep to the budgets.
#![allow(clippy::unwrap_used)]
use std::sync::Arc;

use words::Moment;

use crate::engine::{Capabilities, Outputs, RowOutput};
use crate::request::{ChoiceStart, EventKind, Limits, RequestKey, Submission};
use crate::test_kit::{Rig, capabilities, count, done, ids, limits, oracle, submission};

fn choices(key: u64, prompt: &str, max: usize, accepted: &[usize]) -> Submission {
    let said = oracle(prompt, max);
    let choices = accepted.iter().map(|count| ChoiceStart { accepted: said[..*count].to_vec() }).collect();
    Submission { choices, ..submission(key, prompt, max) }
}

#[test]
fn choices_share_the_prompts_full_blocks_and_copy_its_last_one() {
    for (prompt, shared) in [("ten tokens", 2), ("twelve toks.", 2), ("thirteen tok.", 3), ("abc", 0), ("a", 0)] {
        let mut rig = Rig::new(capabilities(), limits());
        rig.submit(choices(0, prompt, 9, &[0; 4]));
        rig.step();
        let all = (prompt.len() + 9).div_ceil(4);
        assert_eq!(rig.scheduler.load().blocks_used, all + 3 * (all - shared), "{prompt}: shared ones count once");
        rig.run_out();
        for choice in 0..4 {
            assert_eq!(ids(&rig.events, 0, choice), oracle(prompt, 9), "{prompt}, choice {choice}");
            let first = if choice == 0 { 0 } else { prompt.len() - 1 };
            let end = prompt.len() + 8;
            assert_eq!(rig.computed[&(0, choice)], (first..end).collect::<Vec<_>>(), "{prompt}, choice {choice}");
        }
        let partial = usize::from(!(prompt.len() - 1).is_multiple_of(4));
        assert_eq!(rig.copies, 3 * partial, "{prompt}: nothing to copy where the own block begins");
    }
}

#[test]
fn a_request_whose_shared_blocks_count_once_is_not_refused() {
    let mut rig = Rig::new(Capabilities { blocks: 24, ..capabilities() }, limits());
    // 80 tokens of prompt are 20 blocks; each choice needs one more.
    rig.submit(choices(0, &"long".repeat(20), 4, &[1, 1, 1, 1]));
    rig.run_out();
    assert!(done(&rig.events, 0).is_some());
    let error = rig.scheduler.submit(Moment::ZERO, choices(1, &"long".repeat(20), 5, &[1, 1, 1, 1])).unwrap_err();
    assert_eq!(error.code(), words::Code::ContextLengthExceeded);
}

#[test]
fn choices_with_different_beginnings_share_the_prompt_only() {
    let mut rig = Rig::new(capabilities(), limits());
    rig.submit(choices(0, "ten tokens", 16, &[5, 0, 11, 2]));
    rig.run_out();
    for (choice, accepted) in (0..).zip([5, 0, 11, 2]) {
        assert_eq!(ids(&rig.events, 0, choice), oracle("ten tokens", 16)[accepted..], "choice {choice}");
        let first = [0, 9, 10, 10][choice as usize];
        assert_eq!(rig.computed[&(0, choice)][0], first, "choice {choice}");
    }
}

#[test]
fn a_first_choice_that_ends_at_once_leaves_the_others_whole() {
    for prompt in ["ten tokens", "twelve toks."] {
        let mut rig = Rig::new(Capabilities { max_step_tokens: 2, ..capabilities() }, limits());
        rig.submit(choices(0, prompt, 8, &[7, 0, 0, 3]));
        rig.run_out();
        for (choice, accepted) in (0..).zip([7, 0, 0, 3]) {
            assert_eq!(ids(&rig.events, 0, choice), oracle(prompt, 8)[accepted..], "choice {choice}");
        }
        assert_eq!(rig.scheduler.load().blocks_used, 0);
    }
}

#[test]
fn a_cached_prompt_is_shared_at_once() {
    let mut rig = Rig::new(capabilities(), limits());
    rig.submit(submission(0, "thirteen tok.", 9));
    rig.run_out();
    rig.submit(choices(1, "thirteen tok.", 9, &[0; 4]));
    rig.step();
    assert_eq!(rig.computed.iter().filter(|((key, _), _)| *key == 1).count(), 4, "all run in the first step");
    rig.run_out();
    assert_eq!(ids(&rig.events, 1, 3), oracle("thirteen tok.", 9));
    assert_eq!(done(&rig.events, 1).unwrap().cached_tokens, 12);
}

#[test]
fn a_request_can_be_cancelled_or_paused_at_every_step() {
    for steps in 0..20 {
        let mut rig = Rig::new(capabilities(), limits());
        rig.submit(choices(0, "a prompt in chunks", 8, &[0, 3, 0]));
        rig.submit(submission(1, "a prompt in turns", 8));
        rig.steps(steps);
        rig.scheduler.set_paused(RequestKey(0), true);
        rig.steps(3);
        rig.scheduler.set_paused(RequestKey(0), false);
        let live = rig.scheduler.cancel(RequestKey(0));
        rig.audit();
        assert_eq!(live, done(&rig.events, 0).is_none());
        rig.run_out();
        assert_eq!(ids(&rig.events, 1, 0), oracle("a prompt in turns", 8));
        assert_eq!(rig.scheduler.load().blocks_used, 0);
    }
}

#[test]
fn more_choices_than_the_limit_are_refused() {
    let mut rig = Rig::new(capabilities(), Limits { max_choices: 2, ..limits() });
    let error = rig.scheduler.submit(Moment::ZERO, choices(0, "abc", 4, &[0; 3])).unwrap_err();
    assert_eq!(error.code(), words::Code::InvalidRequest);
    rig.submit(choices(0, "abc", 4, &[0; 2]));
}

#[test]
fn a_step_keeps_to_the_budgets_of_prompts_and_of_the_engine() {
    let small = Capabilities { max_step_tokens: 6, ..capabilities() };
    for prefill_tokens in [0, 1, 3, 100] {
        let mut rig = Rig::new(small, Limits { prefill_tokens, ..limits() });
        for key in 0..4 {
            rig.submit(submission(key, &"many tokens".repeat(1 + key as usize), 6));
        }
        while let Some(batch) = rig.scheduler.plan(rig.now, &mut rig.events) {
            let of_prompts: usize = batch.rows.iter().map(|row| row.tokens.len()).filter(|n| *n > 1).sum();
            assert!(batch.tokens() <= 6 && of_prompts <= prefill_tokens.max(1));
            let outputs = crate::engine::Engine::step(&mut rig.engine, &batch).unwrap();
            rig.scheduler.complete(&batch, outputs, &mut rig.events);
        }
        assert!((0..4).all(|key| done(&rig.events, key).is_some()), "all end with a budget of {prefill_tokens}");
    }
}

#[test]
fn an_engine_that_gives_no_output_ends_the_request() {
    let mut rig = Rig::new(capabilities(), limits());
    rig.submit(submission(0, "abc", 4));
    let batch = rig.scheduler.plan(rig.now, &mut rig.events).unwrap();
    let nothing = Outputs { rows: vec![RowOutput::Nothing] };
    rig.scheduler.complete(&batch, nothing, &mut rig.events);
    assert_eq!(count(&rig.events, 0, |kind| matches!(kind, EventKind::Failed(words::Code::EngineFailed, _))), 1);
    rig.audit();
    assert!(!rig.step());
}

#[test]
fn a_step_hashes_each_block_once() {
    let mut rig = Rig::new(capabilities(), limits());
    let prompt: Arc<[u32]> = vec![65; 40].into();
    rig.submit(Submission { prompt, ..submission(0, "", 20) });
    let mut known = 0;
    while rig.step() {
        let hashes = rig.scheduler.running.values().map(|seq| seq.choice.hashes.len()).max().unwrap_or(known);
        assert!(hashes <= known + 2, "a step of eight tokens fills two blocks");
        known = hashes;
    }
    assert_eq!(known, 14);
}

#[test]
fn a_leader_that_finds_all_of_the_prompt_lets_the_others_run_at_once() {
    let mut rig = Rig::new(capabilities(), limits());
    rig.submit(submission(0, "twelve toks.", 9));
    rig.run_out();
    rig.submit(choices(1, "twelve toks.", 9, &[5, 0, 0]));
    rig.step();
    assert_eq!(rig.computed[&(1, 0)], [16]);
    assert_eq!((&rig.computed[&(1, 1)], &rig.computed[&(1, 2)]), (&vec![11], &vec![11]));
    rig.run_out();
    assert_eq!(ids(&rig.events, 1, 2), oracle("twelve toks.", 9));
    assert_eq!(done(&rig.events, 1).unwrap().cached_tokens, 12);
}

#[test]
fn a_prefix_that_only_later_choices_find_never_makes_a_request_too_big() {
    // Six blocks for the first choice, three more for the second one: all there are.
    let mut rig = Rig::new(Capabilities { blocks: 9, ..capabilities() }, limits());
    rig.submit(submission(0, "twelve toks.", 4));
    rig.run_out();
    rig.submit(choices(1, "twelve toks.", 12, &[0, 1]));
    rig.run_out();
    for (choice, accepted) in [(0, 0), (1, 1)] {
        assert_eq!(ids(&rig.events, 1, choice), oracle("twelve toks.", 12)[accepted..]);
    }
}
