//! Tests of a model's life, as rules.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// An owner that does nothing but remember, and check.
#[derive(Default)]
struct Owner {
    life: ModelLife,
    waiting: BTreeSet<Caller>,
    told: Vec<(Caller, ModelAnswer)>,
    next: u64,
    in_hand: Option<ModelWork>,
    open: bool,
    engine: bool,
    held: bool,
    healthy: bool,
    cancelled: bool,
    emptied: bool,
}

impl Owner {
    fn caller(&mut self) -> Caller {
        self.next += 1;
        self.waiting.insert(Caller(self.next));
        Caller(self.next)
    }

    fn load(&mut self) {
        let caller = self.caller();
        self.take(ModelEvent::Load(caller));
    }

    fn leave(&mut self, how: Leaving) {
        // Only an open door can be closed on a condition.
        if how == Leaving::Idle && !self.open {
            return;
        }
        self.emptied = how == Leaving::Idle;
        let caller = self.caller();
        self.take(ModelEvent::Leave(caller, how));
    }

    fn done(&mut self, well: bool) {
        let Some(work) = self.in_hand.take() else { return };
        // A cancelled load may end well: its last step was over already.
        match work {
            ModelWork::Reserve => self.held |= well,
            ModelWork::Load => self.engine |= well,
            ModelWork::AfterHealthy => self.healthy = well && !self.cancelled,
            ModelWork::Stop => self.engine = false,
            ModelWork::Empty { .. } => self.emptied = true,
            _ => {}
        }
        self.take(ModelEvent::Done(well || !work.loads()));
    }

    fn take(&mut self, event: ModelEvent) {
        for act in self.life.take(event) {
            match act {
                ModelAct::Moved(_, to) => {
                    assert!(to != ModelState::Ready || self.healthy, "ready only when warmed, hooks and all");
                    self.cancelled &= to != ModelState::Absent;
                }
                ModelAct::Open => self.open = true,
                ModelAct::Close => (self.open, self.healthy) = (false, false),
                ModelAct::Begin(work) => {
                    assert_eq!(self.in_hand, None, "one thing at a time: {work:?}");
                    assert!(!(work.loads() && self.cancelled), "a cancelled load goes on with {work:?}");
                    assert!(work != ModelWork::Load || (!self.engine && self.held), "LC1");
                    let orderly = self.emptied || self.life.state() != ModelState::Unloading;
                    assert!(work != ModelWork::BeforeStop || orderly, "its requests had their time");
                    assert!(!work.loads() || !self.open);
                    self.in_hand = Some(work);
                }
                ModelAct::Cancel => {
                    assert!(self.in_hand.is_some(), "what is cancelled is in hand");
                    self.cancelled = true;
                }
                ModelAct::Hurry => assert!(matches!(self.in_hand, Some(ModelWork::Empty { .. }))),
                ModelAct::Free => {
                    assert!(self.held && !self.engine, "memory is freed once, and after its engine");
                    self.held = false;
                }
                ModelAct::Answer(caller, answer) => {
                    assert!(self.waiting.remove(&caller), "{caller:?} is told twice");
                    self.told.push((caller, answer));
                }
            }
        }
        assert_eq!(self.in_hand, self.life.work());
        assert_eq!(self.open, self.life.state() == ModelState::Ready);
    }

    fn settle(&mut self) {
        for _ in 0..20 {
            self.done(true);
        }
        assert_eq!(self.in_hand, None);
    }
}

#[test]
fn callers_join_the_load_that_runs_and_hear_its_end() {
    let mut owner = Owner::default();
    (0..3).for_each(|_| owner.load());
    assert_eq!(owner.in_hand, Some(ModelWork::Fetch));
    owner.settle();
    assert_eq!(owner.life.state(), ModelState::Ready);
    assert!(owner.told.iter().all(|(_, answer)| *answer == ModelAnswer::Ready) && owner.told.len() == 3);
}

#[test]
fn a_load_that_is_wanted_while_the_model_goes_begins_once_it_is_gone() {
    let mut owner = Owner::default();
    owner.load();
    owner.settle();
    owner.leave(Leaving::Idle);
    owner.load();
    assert_eq!((owner.life.state(), owner.told.len()), (ModelState::Unloading, 1));
    owner.settle();
    assert_eq!(owner.life.state(), ModelState::Ready);
    let told: Vec<_> = owner.told.iter().map(|(_, answer)| *answer).collect();
    assert_eq!(told, [ModelAnswer::Ready, ModelAnswer::Gone, ModelAnswer::Ready]);
}

#[test]
fn a_lost_engine_is_started_again_in_its_memory_or_given_up() {
    let mut owner = Owner::default();
    owner.load();
    owner.settle();
    owner.take(ModelEvent::EngineLost);
    assert_eq!(owner.life.state(), ModelState::Recovering);
    owner.load();
    owner.done(true);
    assert_eq!((owner.in_hand, owner.held), (Some(ModelWork::Pause), true));
    owner.settle();
    assert_eq!((owner.life.state(), owner.waiting.len()), (ModelState::Ready, 0));
    owner.take(ModelEvent::EngineLost);
    for (work, well) in [(ModelWork::Stop, true), (ModelWork::Pause, true), (ModelWork::Load, false)] {
        assert_eq!(owner.in_hand, Some(work));
        owner.done(well);
    }
    assert_eq!((owner.life.state(), owner.in_hand), (ModelState::Recovering, Some(ModelWork::Pause)));
    owner.done(true);
    owner.done(true);
    owner.done(false);
    assert_eq!(owner.in_hand, Some(ModelWork::Stop), "what did not warm up is ended before the next pause");
    owner.done(true);
    owner.done(false);
    assert_eq!(owner.life.state(), ModelState::Failed);
    owner.settle();
    assert!(!owner.held, "what failed holds nothing");
}

#[test]
fn a_second_caller_of_an_unload_joins_it_and_may_hurry_it() {
    let mut owner = Owner::default();
    owner.load();
    owner.settle();
    owner.leave(Leaving::Drained);
    owner.load();
    assert_eq!(owner.told.last().unwrap().1, ModelAnswer::Busy);
    owner.leave(Leaving::Cut);
    owner.settle();
    assert_eq!((owner.life.state(), owner.waiting.len()), (ModelState::Absent, 0));
    owner.leave(Leaving::Cut);
    assert_eq!(owner.told.last().unwrap().1, ModelAnswer::NotHere);
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Load,
    Leave(Leaving),
    Done(bool),
    Lost,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let how = proptest::sample::select(vec![Leaving::Drained, Leaving::Cut, Leaving::Idle]);
    let step = prop_oneof![
        3 => Just(Step::Load),
        2 => how.prop_map(Step::Leave),
        8 => proptest::bool::weighted(0.85).prop_map(Step::Done),
        1 => Just(Step::Lost),
    ];
    proptest::collection::vec(step, 0..80)
}

proptest! {
    #[test]
    fn every_caller_gets_one_answer_and_one_thing_is_in_hand_at_a_time(steps in steps()) {
        let mut owner = Owner::default();
        for step in steps {
            match step {
                Step::Load => owner.load(),
                Step::Leave(how) => owner.leave(how),
                Step::Done(well) => owner.done(well),
                Step::Lost => owner.take(ModelEvent::EngineLost),
            }
        }
        owner.settle();
        prop_assert!(owner.waiting.is_empty(), "{:?} wait for ever", owner.waiting);
        let rests = matches!(owner.life.state(), ModelState::Absent | ModelState::Ready | ModelState::Failed);
        prop_assert!(rests, "{:?}", owner.life.state());
        prop_assert_eq!(owner.held, owner.life.state() == ModelState::Ready);
        prop_assert_eq!(owner.engine, owner.life.state() == ModelState::Ready);
    }

    #[test]
    fn a_cancelled_load_ends_absent_and_tells_its_callers(at in 0usize..6, well in proptest::bool::ANY) {
        let mut owner = Owner::default();
        owner.load();
        owner.load();
        (0..at).for_each(|_| owner.done(true));
        prop_assume!(!owner.open);
        owner.leave(Leaving::Drained);
        prop_assert_eq!(owner.told.clone(), [(Caller(1), ModelAnswer::Cancelled), (Caller(2), ModelAnswer::Cancelled)]);
        owner.done(well);
        owner.settle();
        prop_assert_eq!(owner.life.state(), ModelState::Absent);
        prop_assert_eq!(owner.told.last().copied(), Some((Caller(3), ModelAnswer::Gone)));
    }
}
