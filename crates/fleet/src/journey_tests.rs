//! The ways of requests: what follows each end of an attempt, and that every way ends.

use proptest::prelude::*;

use super::*;

const LIMITS: JourneyLimits =
    JourneyLimits { retries_max: 2, route_wait: Duration::from_secs(10), continue_wait: Duration::from_secs(60) };

fn origin() -> Origin {
    let print = |byte| Fingerprint([byte; 32]);
    Origin { prompt_hash: print(1), continue_fingerprint: print(2), exact_fingerprint: print(3) }
}

fn at(seconds: u64) -> Moment {
    Moment::after_start(Duration::from_secs(seconds))
}

fn budget() -> RetryBudget {
    RetryBudget::new(at(0), 1.0, 100.0)
}

fn failed(code: Code) -> Ending {
    Ending::Failed(Error::new(code, "x"))
}

/// A journey whose present attempt runs and has given `tokens` tokens of one choice.
fn running(streamed: bool, tokens: u32) -> Journey {
    let mut journey = Journey::new(1, streamed, LIMITS, at(0));
    let attempt = journey.open(Slot(0));
    journey.began(origin()).unwrap_or_else(|error| panic!("{error}"));
    for index in 0..tokens {
        assert_eq!(journey.accept(attempt, 0, index, &[7], false), Ok(()));
    }
    journey
}

fn code(step: &Step) -> Option<Code> {
    match step {
        Step::Fail(error) => Some(error.code()),
        _ => None,
    }
}

#[test]
fn a_crash_after_the_first_token_is_continued_elsewhere_and_has_its_own_patience() {
    let mut journey = running(true, 3);
    assert!(matches!(journey.ended(at(5), failed(Code::UpstreamFailed), &mut budget()), Step::Again));
    assert_eq!((journey.wait_until(), journey.tried()), (at(65), &[Slot(0)][..]));
    let successor = journey.successor();
    assert_eq!(successor.map(|successor| successor.continue_fingerprint), Some(Fingerprint([2; 32])));
}

#[test]
fn a_crash_is_worth_waiting_for_and_has_its_own_patience_and_a_considered_word_is_not() {
    let mut journey = running(true, 0);
    assert!(matches!(journey.ended(at(9), failed(Code::UpstreamFailed), &mut budget()), Step::Again));
    assert_eq!(journey.wait_until(), at(19));
    for code in [Code::UpstreamFailed, Code::UpstreamTimeout, Code::EngineFailed, Code::Draining] {
        assert!(worth_waiting(code), "{code:?}");
    }
    for code in [Code::Overloaded, Code::ModelNotHere, Code::ModelLoading, Code::InvalidRequest, Code::Internal] {
        assert!(!worth_waiting(code), "{code:?}");
    }
}

#[test]
fn a_cancelled_request_goes_nowhere_else_and_a_client_with_tokens_keeps_them() {
    let mut begun = running(true, 3);
    assert!(matches!(begun.ended(at(5), failed(Code::Cancelled), &mut budget()), Step::Complete));
    let nobody = Ending::NobodyFound(Error::new(Code::Cancelled, "x"));
    assert!(matches!(running(true, 3).ended(at(5), nobody, &mut budget()), Step::Complete));
    for (streamed, tokens) in [(true, 0), (false, 0), (false, 3)] {
        let step = running(streamed, tokens).ended(at(5), failed(Code::Cancelled), &mut budget());
        assert_eq!(code(&step), Some(Code::Cancelled), "{streamed} {tokens}");
    }
}

#[test]
fn before_the_first_token_nobody_needs_a_successor() {
    let mut journey = running(true, 0);
    assert!(matches!(journey.ended(at(5), failed(Code::UpstreamFailed), &mut budget()), Step::Again));
    assert_eq!(journey.successor(), None);
}

#[test]
fn two_crashes_in_a_row_without_a_new_token_are_poison() {
    let mut journey = running(true, 3);
    for slot in 1..=5 {
        assert!(matches!(journey.ended(at(5), failed(Code::UpstreamFailed), &mut budget()), Step::Again));
        let attempt = journey.open(Slot(slot));
        assert!(journey.began(origin()).is_ok());
        assert_eq!(journey.accept(attempt, 0, 2 + slot as u32, &[9], false), Ok(()));
    }
    assert!(matches!(journey.ended(at(6), failed(Code::UpstreamTimeout), &mut budget()), Step::Again), "it got on");
    journey.open(Slot(8));
    assert!(journey.began(origin()).is_ok());
    assert!(matches!(journey.ended(at(6), failed(Code::UpstreamTimeout), &mut budget()), Step::Again));
    journey.open(Slot(9));
    assert!(journey.began(origin()).is_ok());
    let end = journey.ended(at(7), failed(Code::EngineFailed), &mut budget());
    assert_eq!(code(&end), Some(Code::PoisonRequest));
    assert!(journey.poisoned());
}

#[test]
fn a_worker_that_dies_with_the_request_still_queued_says_nothing_against_it() {
    let mut journey = Journey::new(1, true, LIMITS, at(0));
    for slot in 0..2 {
        journey.open(Slot(slot));
        journey.reached();
        journey.queued();
        assert!(matches!(journey.ended(at(5), failed(Code::UpstreamFailed), &mut budget()), Step::Again));
    }
    journey.open(Slot(2));
    let end = journey.ended(at(5), failed(Code::UpstreamFailed), &mut budget());
    assert_eq!((code(&end), journey.poisoned()), (Some(Code::UpstreamFailed), false), "its retries are used up");
}

#[test]
fn a_request_that_workers_die_of_before_they_say_a_word_is_poison_too() {
    let mut journey = Journey::new(1, true, LIMITS, at(0));
    journey.open(Slot(0));
    journey.reached();
    assert!(matches!(journey.ended(at(5), failed(Code::UpstreamFailed), &mut budget()), Step::Again));
    journey.open(Slot(1));
    journey.reached();
    assert_eq!(code(&journey.ended(at(5), failed(Code::UpstreamFailed), &mut budget())), Some(Code::PoisonRequest));
}

#[test]
fn eight_crashes_are_continued_and_hand_overs_are_free() {
    let mut journey = running(true, 1);
    let mut crashes = 0;
    for round in 0..60 {
        let ending = if round % 4 == 0 { failed(Code::UpstreamFailed) } else { Ending::HandedOver };
        crashes += u32::from(round % 4 == 0);
        let step = journey.ended(at(5), ending, &mut budget());
        if crashes > CONTINUATIONS_MAX {
            assert_eq!(code(&step), Some(Code::UpstreamFailed));
            return;
        }
        assert!(matches!(step, Step::Again), "round {round}");
        let attempt = journey.open(Slot(1));
        assert!(journey.began(origin()).is_ok());
        assert_eq!(journey.accept(attempt, 0, 1 + round, &[9], false), Ok(()));
    }
    panic!("crashes were never counted");
}

#[test]
fn when_only_the_bookkeeping_was_lost_a_stream_is_completed_and_one_json_is_folded_again() {
    for streamed in [true, false] {
        let mut journey = running(streamed, 2);
        assert_eq!(journey.accept(1, 0, 2, &[4], true), Ok(()));
        let step = journey.ended(at(5), failed(Code::UpstreamFailed), &mut budget());
        assert!(matches!((streamed, step), (true, Step::Complete) | (false, Step::Again)));
    }
}

#[test]
fn what_no_other_worker_would_mend_ends_the_request() {
    for fault in [Code::InvalidRequest, Code::Internal, Code::DeadlinePassed, Code::TemplateRejected] {
        let step = running(true, 3).ended(at(5), failed(fault), &mut budget());
        assert_eq!(code(&step), Some(fault));
    }
}

#[test]
fn a_search_that_found_nobody_ends_the_request_and_is_no_second_crash() {
    for last in [Code::UpstreamFailed, Code::Draining, Code::ModelLoading, Code::NoReplica] {
        let mut journey = running(true, 3);
        assert!(matches!(journey.ended(at(5), failed(Code::UpstreamFailed), &mut budget()), Step::Again));
        let nobody = Ending::NobodyFound(Error::new(last, "x"));
        assert_eq!(code(&journey.ended(at(65), nobody, &mut budget())), Some(last));
        assert!(!journey.poisoned());
    }
}

#[test]
fn an_origin_that_is_read_late_binds_as_one_that_is_read_at_once() {
    let mut journey = Journey::new(1, true, LIMITS, at(0));
    let attempt = journey.open(Slot(0));
    journey.runs();
    assert_eq!(journey.accept(attempt, 0, 0, &[7], false), Ok(()));
    assert!(journey.successor().is_none(), "nobody may go on with what nobody has read");
    assert_eq!(
        code(&journey.clone().ended(at(5), failed(Code::UpstreamFailed), &mut budget())),
        Some(Code::UpstreamFailed)
    );
    journey.originates(origin());
    assert!(matches!(journey.ended(at(5), failed(Code::UpstreamFailed), &mut budget()), Step::Again));
    assert_eq!(journey.successor().map(|successor| successor.exact_fingerprint), Some(Fingerprint([3; 32])));
    journey.open(Slot(1));
    let other = Origin { continue_fingerprint: Fingerprint([9; 32]), ..origin() };
    assert_eq!(journey.began(other).map_err(|error| error.code()), Err(Code::ResumeMismatch));
}

#[test]
fn an_attempt_that_read_another_prompt_is_refused() {
    let mut journey = running(true, 3);
    assert!(matches!(journey.ended(at(5), Ending::HandedOver, &mut budget()), Step::Again));
    journey.open(Slot(1));
    let other = Origin { prompt_hash: Fingerprint([9; 32]), ..origin() };
    assert_eq!(journey.began(other).map_err(|error| error.code()), Err(Code::ResumeMismatch));
    let step = journey.ended(at(5), failed(Code::ResumeMismatch), &mut budget());
    assert!(matches!(step, Step::Again), "a third worker may agree");
}

proptest! {
    /// Whatever workers do, a request ends; tokens are accepted once each, in order.
    #[test]
    fn every_way_ends(
        script in proptest::collection::vec((0usize..6, 0u32..3, any::<bool>()), 0..2_000), streamed in any::<bool>()
    ) {
        let codes = [Code::UpstreamFailed, Code::UpstreamTimeout, Code::EngineFailed, Code::Draining, Code::Overloaded];
        let mut journey = Journey::new(1, streamed, LIMITS, at(0));
        let mut budget = budget();
        let mut attempts = 0;
        for (what, tokens, starts) in script {
            let attempt = journey.open(Slot(what));
            attempts += 1;
            if starts && journey.began(origin()).is_ok() {
                for _ in 0..tokens {
                    let index = journey.accepted() as u32;
                    prop_assert!(journey.accept(attempt - 1, 0, index, &[1], false).is_err());
                    prop_assert!(journey.accept(attempt, 0, index + 1, &[1], false).is_err());
                    prop_assert_eq!(journey.accept(attempt, 0, index, &[1], false), Ok(()));
                }
            }
            let ending = codes.get(what).map_or(Ending::HandedOver, |code| failed(*code));
            match journey.ended(at(attempts), ending, &mut budget) {
                Step::Again => {}
                Step::Fail(_) => return Ok(()),
                Step::Complete => prop_assert!(false, "nothing had finished"),
            }
        }
        let bound = u64::from(HAND_BACKS_MAX + CONTINUATIONS_MAX + LIMITS.retries_max) + 1;
        prop_assert!(attempts <= bound, "{attempts} attempts");
    }
}

#[test]
fn words_that_nobody_can_go_on_from_bind_a_request_to_its_attempt() {
    for ending in [failed(Code::EngineFailed), failed(Code::Draining), Ending::HandedOver] {
        let mut journey = Journey::new(1, true, LIMITS, at(0));
        journey.open(Slot(0));
        journey.reached();
        assert!(!journey.bound());
        journey.bind();
        let wanted = if let Ending::Failed(error) = &ending { error.code() } else { Code::StreamCut };
        assert_eq!(code(&journey.ended(at(5), ending, &mut budget())), Some(wanted));
        assert!(journey.bound() && !journey.poisoned());
    }
}
