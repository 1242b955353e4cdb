#![allow(clippy::unwrap_used)]
use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

const TURN: Duration = Duration::from_secs(10);

fn at(seconds: u64) -> Moment {
    Moment::after_start(Duration::from_secs(seconds))
}

fn id(name: &str) -> ModelId {
    ModelId::new(name).unwrap()
}

fn claim(name: &str, need: u64) -> Claim {
    Claim { model: id(name), need, evict: true, pinned: false, priority: 0, until: at(1000) }
}

fn idle() -> DoorFacts {
    let (open, shut, inside, waiting) = (true, false, false, false);
    DoorFacts { open, shut, inside, waiting, idle_since: at(0), opened_at: at(0) }
}

fn granted(name: &str) -> ClaimAct {
    ClaimAct::Grant(id(name))
}

#[test]
fn what_fits_is_granted_at_once_and_an_idle_model_goes_for_what_does_not() {
    let mut claims = Claims::new(10, TURN);
    claims.ask(at(0), claim("a", 6));
    assert_eq!(claims.plan(at(0), |_| idle()), [granted("a")]);
    claims.ask(at(1), claim("b", 6));
    assert_eq!(claims.plan(at(1), |_| idle()), [ClaimAct::Evict(id("a"))]);
    assert_eq!(claims.plan(at(2), |_| idle()), [], "it is told once");
    claims.stays(&id("a"));
    assert_eq!(claims.plan(at(2), |_| idle()), [ClaimAct::Evict(id("a"))], "and again, should it stay");
    assert!(claims.free(&id("a")) && claims.waits());
    assert_eq!(claims.plan(at(3), |_| idle()), [granted("b")]);
    assert_eq!((claims.used(), claims.waits()), (6, false));
}

#[test]
fn one_that_waited_for_its_turn_shuts_the_door_of_who_had_one_and_its_leaving_opens_it_again() {
    let mut claims = Claims::new(10, TURN);
    claims.ask(at(0), claim("a", 6));
    claims.plan(at(0), |_| idle());
    let busy = |shut: bool| move |id: &ModelId| DoorFacts { inside: true, shut: shut && id.as_str() == "a", ..idle() };
    claims.ask(at(1), claim("b", 6));
    assert_eq!(claims.plan(at(5), busy(false)), []);
    claims.ask(at(6), claim("c", 4));
    assert_eq!(claims.plan(at(6), busy(false)), [granted("c")], "one that fits passes it before its turn");
    claims.free(&id("c"));
    claims.ask(at(11), claim("c", 4));
    assert_eq!(claims.plan(at(11), busy(false)), [ClaimAct::Shut(id("a"))], "and not after it");
    assert_eq!(claims.plan(at(12), busy(true)), [], "it is told once");
    claims.free(&id("b"));
    assert_eq!(claims.plan(at(13), busy(true)), [granted("c"), ClaimAct::Reopen(id("a"))]);
}

#[test]
fn what_can_not_fit_is_refused_at_once_and_what_did_not_in_time_then() {
    let mut claims = Claims::new(10, TURN);
    let refused = |acts: Vec<ClaimAct>| match acts.as_slice() {
        [ClaimAct::Refuse(_, words)] => words.clone(),
        other => panic!("{other:?}"),
    };
    claims.ask(at(0), claim("big", 11));
    assert!(refused(claims.plan(at(0), |_| idle())).contains("'big' needs"));
    claims.ask(at(0), Claim { pinned: true, ..claim("a", 6) });
    claims.plan(at(0), |_| idle());
    claims.ask(at(1), claim("b", 6));
    assert!(refused(claims.plan(at(1), |_| idle())).contains("pinned"));
    claims.free(&id("a"));
    claims.ask(at(1), claim("a", 6));
    claims.plan(at(1), |_| idle());
    claims.ask(at(2), Claim { until: at(5), ..claim("b", 6) });
    let busy = |_: &ModelId| DoorFacts { inside: true, ..idle() };
    assert_eq!(claims.plan(at(4), busy), []);
    assert!(refused(claims.plan(at(5), busy)).contains("in use"));
}

/// Models that come, work, rest and go at random: nothing is ever set aside beyond the budget, nobody who works is told to
/// go, and whoever asked is granted or refused by its time.
fn random_life(seed: u64) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let names = ["a", "b", "c", "d", "e"];
    let budget = rng.random_range(5..20);
    let mut claims = Claims::new(budget, TURN);
    let mut doors: BTreeMap<ModelId, DoorFacts> = names.iter().map(|name| (id(name), idle())).collect();
    let mut asked: BTreeMap<ModelId, Moment> = BTreeMap::new();
    let mut holds: BTreeMap<ModelId, u64> = BTreeMap::new();
    let mut going: Vec<ModelId> = Vec::new();
    for second in 0..200 {
        let (now, model) = (at(second), id(names[rng.random_range(0..names.len())]));
        let door = doors.get_mut(&model).unwrap();
        match rng.random_range(0..6) {
            0 | 1 if !holds.contains_key(&model) && !asked.contains_key(&model) => {
                let until = now + Duration::from_secs(rng.random_range(1..60));
                let pinned = rng.random_bool(0.1);
                claims.ask(now, Claim { need: rng.random_range(1..12), pinned, until, ..claim(model.as_str(), 0) });
                asked.insert(model, until);
            }
            2 if door.open && !door.shut && holds.contains_key(&model) => door.inside = rng.random(),
            3 => (door.inside, door.idle_since) = (false, now),
            4 => {
                if let Some(gone) = going.pop() {
                    holds.remove(&gone);
                    assert!(claims.free(&gone));
                }
            }
            _ => door.waiting = rng.random(),
        }
        for act in claims.plan(now, |model| doors[model]) {
            match act {
                ClaimAct::Grant(model) => {
                    assert!(asked.remove(&model).is_some(), "seed {seed}: nobody asked for {model}");
                    holds.insert(model.clone(), claims.holders[&model].bytes);
                    doors.insert(model, DoorFacts { opened_at: now, ..idle() });
                }
                ClaimAct::Refuse(model, _) => assert!(asked.remove(&model).is_some()),
                ClaimAct::Shut(model) => doors.get_mut(&model).unwrap().shut = true,
                ClaimAct::Reopen(model) => doors.get_mut(&model).unwrap().shut = false,
                ClaimAct::Evict(model) => {
                    assert!(!doors[&model].inside, "seed {seed}: {model} works and is told to go");
                    assert!(!claims.holders[&model].claim.pinned, "seed {seed}: {model} is pinned");
                    doors.get_mut(&model).unwrap().open = false;
                    going.push(model);
                }
            }
        }
        let held: u64 = holds.values().sum();
        assert!(held == claims.used() && held <= budget, "seed {seed}: {held} of {budget}");
        let late = asked.iter().find(|(_, until)| now.since(**until) > Duration::ZERO);
        let waits_for_leaving = !going.is_empty();
        assert!(late.is_none() || waits_for_leaving, "seed {seed}: {late:?} waits on at {second}");
    }
}

proptest! {
    #[test]
    fn memory_is_never_overcommitted_and_nobody_waits_for_ever(seed: u64) {
        random_life(seed);
    }
}
