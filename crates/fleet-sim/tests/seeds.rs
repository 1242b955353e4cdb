//! The simulation as a test: many seeds without a breach, all of it exercised, equal runs from equal seeds, and each
//! planted bug found.
#![allow(clippy::print_stdout)]

use fleet_sim::{Counters, Planted, RunOptions, run};

/// Seeds of an ordinary test run.
const SEEDS: u64 = 200;
/// Seeds within which every planted bug must show.
const SEEDS_TO_FIND: u64 = 2_000;

#[test]
fn no_seed_breaks_an_invariant_and_everything_happens() {
    let mut counters = Counters::default();
    for seed in 0..SEEDS {
        let report = run(seed, RunOptions::default());
        if let Some(violation) = report.violation {
            panic!("seed {seed}: {violation}\n{}", report.log);
        }
        counters.merge(&report.counters);
    }
    assert_eq!(counters.never(), Vec::<&str>::new(), "what never happens is not tested");
}

#[test]
fn equal_seeds_give_equal_logs_byte_by_byte() {
    let options = RunOptions { whole_log: true, ..RunOptions::default() };
    for seed in [1, 7, 23] {
        let (first, second) = (run(seed, options), run(seed, options));
        assert!(first.log.len() > 1_000);
        assert_eq!(first.log, second.log, "seed {seed}");
        assert_eq!((first.counters, first.events), (second.counters, second.events));
    }
    assert_ne!(run(1, options).log, run(2, options).log);
}

/// Finds a planted bug, by one of the invariants that it must break.
fn find(bug: Planted, invariants: &[&str]) {
    let options = RunOptions { planted: Some(bug), ..RunOptions::default() };
    let found = (0..SEEDS_TO_FIND).find_map(|seed| Some((seed, run(seed, options).violation?)));
    let (seed, violation) = found.unwrap_or_else(|| panic!("{bug:?} is not found within {SEEDS_TO_FIND} seeds"));
    assert!(invariants.contains(&violation.invariant), "{bug:?} shows at seed {seed} as {violation}");
    println!("{bug:?}: seed {seed}, {violation}");
}

macro_rules! found {
    ($($name:ident: $bug:ident by $($invariant:literal)|+;)*) => {
        $(
            #[test]
            fn $name() {
                find(Planted::$bug, &[$($invariant),+]);
            }
        )*

        #[test]
        fn every_planted_bug_is_looked_for() {
            let looked_for = [$(Planted::$bug),*];
            assert!(Planted::ALL.iter().all(|bug| looked_for.contains(bug)));
        }
    };
}

found! {
    closing_before_the_gateways_know_is_found: SkipSettle by "DR1";
    passing_on_what_the_fence_refuses_is_found: DropFence by "ST2" | "ST1";
    taking_orders_of_another_epoch_is_found: IgnoreEpochs by "GN1";
    releasing_a_permit_as_a_process_starts_is_found: PermitOnStart by "RO1" | "RO2" | "LV1";
    counting_on_what_is_silent_is_found: StaleCapacity by "RO1";
    forgetting_queued_work_is_found: ForgetQueued by "AD1";
    restarting_the_last_replica_is_found: RestartLast by "RO1";
    letting_in_after_closing_is_found: AcceptAfterClosed by "DR1";
    continuing_at_the_wrong_index_is_found: WrongIndex by "ST2" | "DR3";
    releasing_a_lease_twice_is_found: DoubleRelease by "LS1";
    giving_memory_away_too_early_is_found: Overcommit by "MB1";
    letting_requests_wait_for_ever_is_found: WaitForEver by "LW1";
    not_telling_an_engine_of_a_cancelled_request_is_found: DeafToCancel by "CN1";
    waiting_for_ever_for_what_was_cancelled_is_found: KeepCancelled by "CN1";
}
