//! The prefix cache through the scheduler: what is found, by whom, and that the count of it is the truth.
#![allow(clippy::unwrap_used)]
use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;

use crate::engine::{Batch, BlockCopy, BlockId, Engine, EngineError, Row, SequenceId, Wanted};
use crate::request::{ChoiceStart, EventKind, Limits, Submission};
use crate::sampling::Sampling;
use crate::test_kit::{Rig, capabilities, done, ids, limits, oracle, submission};

/// Runs one request to its end; returns its cached tokens and the positions the engine computed for it.
fn run(rig: &mut Rig, submission: Submission) -> (usize, Vec<usize>) {
    let key = submission.request.0;
    rig.submit(submission);
    rig.run_out();
    (done(&rig.events, key).unwrap().cached_tokens, rig.computed[&(key, 0)].clone())
}

#[test]
fn a_prefix_that_was_computed_before_is_not_computed_again() {
    let mut rig = Rig::new(capabilities(), limits());
    assert_eq!(run(&mut rig, submission(0, "the system prompt, and a", 4)).0, 0);
    let (cached, computed) = run(&mut rig, submission(1, "the system prompt, but b", 4));
    assert_eq!((cached, computed[0]), (16, 16), "four blocks of four tokens are equal");
    assert_eq!(ids(&rig.events, 1, 0), oracle("the system prompt, but b", 4));
    let load = rig.scheduler.load();
    assert_eq!((load.prefix_query_tokens, load.prefix_hit_tokens), (48, 16));
}

#[test]
fn a_prompt_that_is_known_as_a_whole_computes_its_last_block_again() {
    let mut rig = Rig::new(capabilities(), limits());
    run(&mut rig, submission(0, "eight to", 4));
    let (cached, computed) = run(&mut rig, submission(1, "eight to", 4));
    assert_eq!((cached, computed), (4, (4..11).collect()));
    assert_eq!(ids(&rig.events, 1, 0), ids(&rig.events, 0, 0));
}

#[test]
fn what_was_generated_is_found_in_the_next_turn() {
    let mut rig = Rig::new(capabilities(), limits());
    run(&mut rig, submission(0, "turn one", 9));
    let turn: String = oracle("turn one", 9).iter().map(|id| char::from(*id as u8)).filter(char::is_ascii).collect();
    if turn.len() == 9 {
        let next = format!("turn one{turn} and more");
        let (cached, _) = run(&mut rig, submission(1, &next, 4));
        assert_eq!(cached, 16, "of 17 tokens the last was never computed");
    }
    let prompt = oracle_context("turn one", 9);
    let (cached, _) = run(&mut rig, Submission { prompt: prompt.into(), ..submission(2, "", 4) });
    assert_eq!(cached, 16);
}

fn oracle_context(prompt: &str, count: usize) -> Vec<u32> {
    prompt.bytes().map(u32::from).chain(oracle(prompt, count)).collect()
}

#[test]
fn a_resume_finds_what_it_said_and_counts_the_prompt_only() {
    let mut rig = Rig::new(capabilities(), limits());
    run(&mut rig, submission(0, "ten tokens", 20));
    let choices = vec![ChoiceStart { accepted: oracle("ten tokens", 14) }];
    let (cached, computed) = run(&mut rig, Submission { choices, ..submission(1, "ten tokens", 20) });
    assert_eq!((cached, computed[0]), (10, 20), "24 tokens, of which the last is computed again");
    assert_eq!(ids(&rig.events, 1, 0), oracle("ten tokens", 20)[14..]);
}

#[test]
fn tenants_of_different_salts_share_nothing() {
    let mut rig = Rig::new(capabilities(), limits());
    let with = |key, salt: u8| Submission { salt: [salt; 32], ..submission(key, "the same prompt for all", 4) };
    assert_eq!(run(&mut rig, with(0, 1)).0, 0);
    assert_eq!(run(&mut rig, with(1, 2)).0, 0);
    assert_eq!(run(&mut rig, with(2, 1)).0, 20);
    let known = rig.scheduler.export_prefixes();
    let of = |salt: u8| known.iter().filter(|known| known.salt == [salt; 32]).map(|k| k.block).collect::<BTreeSet<_>>();
    assert!(of(1).is_disjoint(&of(2)));
    assert_eq!(of(1).len(), of(2).len());
}

#[test]
fn without_a_cache_nothing_is_kept_and_choices_still_share() {
    let mut rig = Rig::new(capabilities(), Limits { prefix_cache: false, ..limits() });
    run(&mut rig, submission(0, "a prompt of some blocks", 4));
    assert_eq!(run(&mut rig, submission(1, "a prompt of some blocks", 4)).0, 0);
    let choices = vec![ChoiceStart::default(); 3];
    run(&mut rig, Submission { choices, ..submission(2, "a prompt of some blocks", 4) });
    assert_eq!(rig.computed[&(2, 2)][0], 22);
    let load = rig.scheduler.load();
    assert_eq!((load.blocks_cached, load.prefix_query_tokens), (0, 0));
    assert_eq!(rig.scheduler.import_prefix(None, [0; 32], vec![1; 4]), None);
}

#[test]
fn equal_prompts_at_once_are_computed_twice_and_kept_once() {
    let mut rig = Rig::new(capabilities(), limits());
    rig.submit(submission(0, "sixteen tokens..", 6));
    rig.submit(submission(1, "sixteen tokens..", 6));
    rig.run_out();
    for key in 0..2 {
        assert_eq!(ids(&rig.events, key, 0), oracle("sixteen tokens..", 6));
        assert_eq!(done(&rig.events, key).unwrap().cached_tokens, 0);
    }
    assert_eq!(rig.scheduler.load().blocks_cached, 5, "21 computed tokens have five full blocks");
}

#[test]
fn the_cache_never_keeps_anybody_waiting() {
    let mut rig = Rig::new(capabilities(), limits());
    for key in 0..12 {
        run(&mut rig, submission(key, &format!("{key:02}{}", "x".repeat(60)), 4));
    }
    assert!(rig.scheduler.load().blocks_cached > 48, "the cache is as good as full");
    for key in 20..24 {
        rig.submit(submission(key, &format!("{key:02}{}", "y".repeat(50)), 10));
    }
    rig.step();
    assert_eq!(rig.scheduler.load().running, 4, "64 blocks hold four requests of 62 tokens");
    rig.run_out();
    assert_eq!(ids(&rig.events, 23, 0), oracle(&format!("23{}", "y".repeat(50)), 10));
}

#[test]
fn a_failed_step_leaves_what_was_published_and_publishes_nothing() {
    let mut rig = Rig::new(capabilities(), limits());
    rig.submit(submission(0, "a prompt in three chunks", 4));
    rig.step();
    rig.failing_step();
    assert!(matches!(rig.events.last().unwrap().kind, EventKind::Failed(words::Code::EngineFailed, _)));
    assert_eq!(rig.scheduler.load().blocks_cached, 2, "the first chunk of eight");
    let (cached, _) = run(&mut rig, submission(1, "a prompt in three chunks", 4));
    assert_eq!(cached, 8);
    assert_eq!(ids(&rig.events, 1, 0), oracle("a prompt in three chunks", 4));
}

#[test]
fn prefixes_outlive_a_process() {
    let mut first = Rig::new(capabilities(), limits());
    run(&mut first, submission(0, "kept over a restart", 4));
    run(&mut first, Submission { salt: [3; 32], ..submission(1, "kept, but for another", 4) });
    let mut second = Rig::new(capabilities(), limits());
    let kept = first.export();
    assert!(kept.iter().all(|(_, bytes)| bytes.len() == first.engine.block_bytes()));
    second.import(&kept);
    assert_eq!(second.scheduler.load().blocks_cached, first.scheduler.load().blocks_cached);
    let (cached, computed) = run(&mut second, submission(0, "kept over a restart", 4));
    assert_eq!((cached, computed[0]), (16, 16));
    assert_eq!(ids(&second.events, 0, 0), oracle("kept over a restart", 4));
}

#[test]
fn an_import_that_could_not_be_filled_is_taken_back() {
    let mut rig = Rig::new(capabilities(), limits());
    let tokens: Vec<u32> = "abcd".bytes().map(u32::from).collect();
    let (block, hash) = rig.scheduler.import_prefix(None, [0; 32], tokens).unwrap();
    assert!(matches!(rig.engine.import_block(block, &[0; 3]), Err(EngineError::BadBatch(_))));
    assert!(matches!(rig.engine.import_block(BlockId(64), &[0; 32]), Err(EngineError::BadBatch(_))));
    assert!(matches!(rig.engine.export_block(BlockId(64)), Err(EngineError::BadBatch(_))));
    assert!(rig.scheduler.forget_prefix(&hash) && !rig.scheduler.forget_prefix(&hash));
    assert_eq!(run(&mut rig, submission(0, "abcdefgh", 4)).0, 0);
}

#[test]
fn the_fake_engine_refuses_batches_whose_result_depends_on_their_order() {
    let mut rig = Rig::new(capabilities(), limits());
    let row = |sequence, start, blocks: &[u32]| Row {
        sequence: SequenceId(sequence),
        tokens: vec![1],
        start,
        blocks: blocks.iter().copied().map(BlockId).collect(),
        wanted: Wanted::Token,
        sampling: Sampling::GREEDY,
    };
    let copy = |from, to| BlockCopy { from: BlockId(from), to: BlockId(to) };
    let mut step = |rows: Vec<Row>, copies: Vec<BlockCopy>| rig.engine.step(&Batch { copies, rows }).is_ok();
    assert!(step(vec![row(0, 4, &[0, 1]), row(1, 4, &[0, 2])], vec![]), "a shared prefix");
    assert!(step(vec![row(0, 5, &[0, 1]), row(1, 4, &[0, 2])], vec![copy(1, 2)]), "a source is written to after");
    assert!(!step(vec![row(0, 4, &[0, 1]), row(1, 4, &[0, 1])], vec![]), "two writers");
    assert!(!step(vec![row(0, 4, &[0, 1]), row(1, 8, &[0, 1, 2])], vec![]), "a writer and a reader");
    assert!(!step(vec![row(0, 4, &[0, 1])], vec![copy(2, 1), copy(3, 1)]), "two copies to one block");
    assert!(!step(vec![row(0, 4, &[0, 1])], vec![copy(2, 1), copy(1, 3)]), "a chain of copies");
    assert!(!step(vec![row(0, 4, &[3, 1]), row(1, 4, &[3, 2])], vec![copy(0, 3)]), "two readers of a copy");
    assert!(!step(vec![row(0, 4, &[0, 1])], vec![copy(99, 1)]), "a block that does not exist");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn cached_tokens_are_those_the_engine_never_computed(
        requests in proptest::collection::vec((0usize..5, 1usize..40, 1usize..8, 1usize..4, 0usize..4), 1..12),
        blocks in 24usize..64,
    ) {
        let mut rig = Rig::new(crate::engine::Capabilities { blocks, ..capabilities() }, limits());
        for (key, (prefix, length, max, choices, steps)) in (0..).zip(requests) {
            let prompt: String = "abcd".repeat(prefix) + &"efgh".repeat(10)[..length];
            let choices = vec![ChoiceStart::default(); choices];
            let request = Submission { choices, ..submission(key, &prompt, max) };
            if rig.scheduler.submit(rig.now, request).is_ok() {
                rig.steps(steps);
            }
            rig.after(Duration::from_millis(1));
        }
        rig.run_out();
        for event in &rig.events {
            if let EventKind::Done(usage) = event.kind {
                let computed = &rig.computed[&(event.request.0, 0)];
                let distinct: BTreeSet<usize> = computed.iter().copied().collect();
                prop_assert_eq!(distinct.len(), computed.len(), "nothing is computed twice");
                let of_prompt = distinct.range(..usage.prompt_tokens).count();
                prop_assert_eq!(usage.cached_tokens, usage.prompt_tokens - of_prompt);
                for choice in 1..4 {
                    let first = rig.computed.get(&(event.request.0, choice)).map(|computed| computed[0]);
                    prop_assert!(first.is_none_or(|first| first == usage.prompt_tokens - 1), "choices share the prompt");
                }
            }
        }
    }
}
