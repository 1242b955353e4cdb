//! Constraints in the scheduler: what they let through, where they end a choice, and what they survive.
#![allow(clippy::unwrap_used)]
use std::sync::Arc;

use proptest::prelude::*;
use words::{Code, Moment};

use super::{Grammar, Mask, Matcher, Violation};
use crate::engine::{Outputs, RowOutput, Wanted};
use crate::request::{ChoiceStart, EventKind, FinishReason, Priority, Submission};
use crate::sampling::Sampling;
use crate::test_kit::{Rig, capabilities, count, done, ids, limits, submission, text};
use crate::text::StopRules;
use crate::{FAKE_END_TOKEN, FAKE_VOCABULARY};

/// Words from a list, parted by dashes: at least `least` of them, at most `most`.
#[derive(Clone, Debug)]
struct Words {
    list: &'static [&'static str],
    least: usize,
    most: usize,
    /// Tokens after which it breaks.
    breaks_after: usize,
}

struct WordsMatcher {
    words: Words,
    said: String,
    taken: usize,
}

impl Grammar for Words {
    fn open(&self) -> Result<Box<dyn Matcher>, Violation> {
        Ok(Box::new(WordsMatcher { words: self.clone(), said: String::new(), taken: 0 }))
    }
}

impl WordsMatcher {
    fn fits(&self, said: &str) -> bool {
        let parts: Vec<&str> = said.split('-').collect();
        let (last, whole) = parts.split_last().unwrap();
        parts.len() <= self.words.most
            && whole.iter().all(|part| self.words.list.contains(part))
            && self.words.list.iter().any(|word| word.starts_with(last))
    }
}

impl Matcher for WordsMatcher {
    fn mask(&mut self) -> Result<Mask, Violation> {
        if self.taken >= self.words.breaks_after {
            return Err(Violation::TooComplex);
        }
        let mut mask = Mask::default();
        for byte in 0..128u8 {
            if self.fits(&format!("{}{}", self.said, char::from(byte))) {
                mask.allow(u32::from(byte));
            }
        }
        Ok(mask)
    }

    fn accept(&mut self, id: u32) -> Result<(), Violation> {
        if !self.mask()?.allows(id) {
            return Err(Violation::Foreign(id));
        }
        self.taken += 1;
        self.said.push(char::from(id as u8));
        Ok(())
    }

    fn may_end(&mut self) -> Result<bool, Violation> {
        let parts: Vec<&str> = self.said.split('-').collect();
        Ok(parts.len() >= self.words.least && parts.iter().all(|part| self.words.list.contains(part)))
    }

    fn is_over(&self) -> bool {
        let last = self.said.rsplit('-').next().unwrap();
        let longer = self.words.list.iter().any(|word| word.len() > last.len() && word.starts_with(last));
        self.said.split('-').count() == self.words.most && self.words.list.contains(&last) && !longer
    }
}

const WORDS: Words = Words { list: &["yes", "no", "now"], least: 2, most: 4, breaks_after: 1_000 };

fn constrained(key: u64, prompt: &str, max: usize, words: &Words) -> Submission {
    let stop = Arc::new(StopRules { strings: vec![], tokens: vec![FAKE_END_TOKEN] });
    Submission { constraint: Some(Arc::new(words.clone())), stop, ..submission(key, prompt, max) }
}

fn finish(rig: &Rig, key: u64) -> Option<FinishReason> {
    rig.events.iter().filter(|event| event.request.0 == key).find_map(|event| match &event.kind {
        EventKind::Token { finish, .. } | EventKind::Resumed { finish, .. } => *finish,
        _ => None,
    })
}

fn run(submission: Submission) -> (String, Option<FinishReason>, Vec<u32>) {
    let mut rig = Rig::new(capabilities(), limits());
    let key = submission.request.0;
    rig.submit(submission);
    rig.run_out();
    (text(&rig.events, key), finish(&rig, key), ids(&rig.events, key, 0))
}

fn is_whole(said: &str) -> bool {
    let parts: Vec<&str> = said.split('-').collect();
    (2..=4).contains(&parts.len()) && parts.iter().all(|part| WORDS.list.contains(part))
}

#[test]
fn what_ends_by_itself_is_whole_and_what_is_cut_is_a_beginning() {
    let (mut ended, mut cut) = (0, 0);
    for i in 0..200 {
        let prompt = format!("prompt {i}");
        let sampling = Sampling { temperature: (i % 3) as f32, seed: i, ..Sampling::GREEDY };
        let (said, finish, ids) = run(Submission { sampling, ..constrained(0, &prompt, 9, &WORDS) });
        match finish.unwrap() {
            FinishReason::Stop => {
                assert!(is_whole(&said), "{said}");
                ended += 1;
            }
            FinishReason::Length => {
                assert!(said.len() == 9 && ids.len() == 9, "{said}");
                cut += 1;
            }
        }
    }
    assert!(ended > 50 && cut > 20, "{ended} ended, {cut} cut");
}

#[test]
fn a_grammar_that_can_not_go_on_ends_the_choice_at_once() {
    let four = Words { list: &["aa"], least: 4, most: 4, ..WORDS };
    let ends_unknown = |max| Submission { stop: Arc::default(), ..constrained(0, "p", max, &four) };
    let (said, finish, ids) = run(ends_unknown(50));
    assert_eq!((said.as_str(), finish, ids.len()), ("aa-aa-aa-aa", Some(FinishReason::Stop), 11));
    let exact = run(ends_unknown(11));
    assert_eq!(exact.1, Some(FinishReason::Stop), "whole, though no token was left");
    // The end of a stop string that never comes is not lost.
    let stop = Arc::new(StopRules { strings: vec!["a!".into()], tokens: vec![] });
    assert_eq!(run(Submission { stop, ..constrained(0, "p", 50, &four) }).0, "aa-aa-aa-aa");
}

#[test]
fn a_least_length_holds_as_long_as_the_grammar_goes_on() {
    for i in 0..50 {
        let sampling = Sampling { min_tokens: 40, ..Sampling::GREEDY };
        let (said, finish, _) = run(Submission { sampling, ..constrained(0, &format!("{i}"), 30, &WORDS) });
        assert!(is_whole(&said) && said.split('-').count() == 4, "{said}");
        assert_eq!(finish, Some(FinishReason::Stop));
    }
}

#[test]
fn bias_chooses_among_what_may_come_and_never_adds_to_it() {
    let bias = |list: &[(u32, f32)]| Submission { bias: list.into(), ..constrained(0, "p", 30, &WORDS) };
    let (said, ..) = run(bias(&[(u32::from(b'x'), 100.0), (u32::from(b'y'), 300.0)]));
    assert!(said.starts_with("yes-yes") && is_whole(&said), "{said}");
    let never: Vec<_> = (0..FAKE_VOCABULARY as u32).map(|id| (id, f32::NEG_INFINITY)).collect();
    let (said, ..) = run(bias(&never));
    assert!(is_whole(&said), "{said}: the lowest of what may come, when nothing is likely");
}

#[test]
fn a_stop_string_cuts_wherever_the_grammar_is() {
    let stop = Arc::new(StopRules { strings: vec!["-".into()], tokens: vec![FAKE_END_TOKEN] });
    let (said, finish, _) = run(Submission { stop, ..constrained(0, "p", 30, &WORDS) });
    assert!(WORDS.list.contains(&said.as_str()), "{said}");
    assert_eq!(finish, Some(FinishReason::Stop));
}

#[test]
fn an_end_token_that_the_grammar_needs_as_text_ends_the_choice_there() {
    let stop = Arc::new(StopRules { strings: vec![], tokens: vec![u32::from(b'-')] });
    let (said, finish, _) = run(Submission { stop, ..constrained(0, "p", 30, &WORDS) });
    assert!(WORDS.list.contains(&said.as_str()), "{said}");
    assert_eq!(finish, Some(FinishReason::Stop));
}

#[test]
fn a_matcher_that_breaks_ends_its_request_alone() {
    let mut rig = Rig::new(capabilities(), limits());
    rig.submit(constrained(0, "one", 30, &Words { breaks_after: 3, ..WORDS }));
    rig.submit(constrained(1, "two", 30, &Words { list: &["\u{e9}"], ..WORDS }));
    rig.submit(constrained(2, "three", 30, &WORDS));
    rig.submit(submission(3, "four", 30));
    rig.run_out();
    for key in [0, 1] {
        let failed = |kind: &EventKind| matches!(kind, EventKind::Failed(Code::InvalidRequest, _));
        assert_eq!(count(&rig.events, key, failed), 1, "request {key}");
    }
    assert!(is_whole(&text(&rig.events, 2)) && done(&rig.events, 3).is_some());
    assert_eq!(rig.scheduler.load().blocks_used, 0);
}

#[test]
fn accepted_ids_that_break_the_grammar_are_refused_and_leave_no_trace() {
    let mut rig = Rig::new(capabilities(), limits());
    for accepted in ["yex", "yes-no-now-x", "\u{7f}"] {
        let accepted = accepted.bytes().map(u32::from).collect();
        let resume = Submission { choices: vec![ChoiceStart { accepted }], ..constrained(0, "p", 30, &WORDS) };
        let error = rig.scheduler.submit(Moment::ZERO, resume).unwrap_err();
        assert_eq!(error.code(), Code::ResumeMismatch);
        assert_eq!(rig.scheduler.load(), crate::Load { blocks: 64, ..crate::Load::default() });
    }
    let early = vec![u32::from(b'y'), FAKE_END_TOKEN];
    let resume = Submission { choices: vec![ChoiceStart { accepted: early }], ..constrained(0, "p", 30, &WORDS) };
    assert_eq!(rig.scheduler.submit(Moment::ZERO, resume).unwrap_err().code(), Code::ResumeMismatch);
}

#[test]
fn an_engine_that_chooses_a_constrained_token_by_itself_ends_the_request() {
    let mut rig = Rig::new(capabilities(), limits());
    rig.submit(constrained(0, "p", 30, &WORDS));
    let batch = rig.scheduler.plan(rig.now, &mut rig.events).unwrap();
    assert_eq!(batch.rows[0].wanted, Wanted::Logits(1));
    let outputs = Outputs { rows: vec![RowOutput::Token(u32::from(b'x'))] };
    rig.scheduler.complete(&batch, outputs, &mut rig.events);
    assert_eq!(count(&rig.events, 0, |kind| matches!(kind, EventKind::Failed(Code::EngineFailed, _))), 1);
}

#[test]
fn a_preempted_request_goes_on_in_its_grammar() {
    for i in 0..20 {
        let prompt = format!("a prompt {i}");
        let alone = run(constrained(0, &prompt, 20, &WORDS));
        let mut rig = Rig::new(capabilities(), crate::Limits { max_running: 1, ..limits() });
        rig.submit(constrained(0, &prompt, 20, &WORDS));
        rig.steps(4 + i % 3);
        rig.submit(Submission { priority: Priority::High, ..constrained(1, "urgent", 20, &WORDS) });
        rig.run_out();
        assert_eq!(rig.scheduler.load().preemptions, 1);
        assert_eq!((text(&rig.events, 0), ids(&rig.events, 0, 0)), (alone.0, alone.2));
    }
}

proptest! {
    #[test]
    fn a_resume_at_any_token_says_what_the_whole_would_have(
        (prompt, cut, temperature, seed) in ("[a-z]{1,12}", 0usize..16, 0u8..3, any::<u64>())
    ) {
        let sampling = Sampling { temperature: f32::from(temperature), seed, ..Sampling::GREEDY };
        let request = Submission { sampling, ..constrained(0, &prompt, 18, &WORDS) };
        let (whole, reason, said) = run(request.clone());
        let cut = cut.min(said.len());
        let choices = vec![ChoiceStart { accepted: said[..cut].to_vec() }];
        let (rest, then, more) = run(Submission { choices, ..request });
        prop_assert_eq!((rest, then), (whole, reason));
        prop_assert_eq!(more, &said[cut..]);
    }

    #[test]
    fn a_mask_leaves_exactly_its_tokens(tokens in proptest::collection::btree_set(0u32..200, 0..50), size in 1usize..220) {
        let mut mask = Mask::default();
        tokens.iter().for_each(|id| mask.allow(*id));
        let mut logits = vec![1.0; size];
        mask.apply(&mut logits);
        for (id, logit) in (0u32..).zip(logits) {
            prop_assert_eq!(logit == 1.0, tokens.contains(&id));
            prop_assert_eq!(mask.allows(id), tokens.contains(&id));
        }
        prop_assert_eq!(mask.first(), tokens.first().copied());
    }
}
