//! One model's life on a node: who wants what of it, what is done next, and who is told what.
//!
//! One thing is in hand at a time, and every caller gets exactly one answer. A wish that comes while something is in hand
//! is kept until that has ended: the latest word wins.

use words::ModelState;

use crate::model::{ModelInput, next_model_state};

/// Most callers that wait for one model.
pub const CALLERS_MAX: usize = 4096;

/// Who waits for an answer, in its owner's numbering.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Caller(pub u64);

/// How a model that serves is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaving {
    /// What runs has the drain's budget.
    Drained,
    /// What runs is cut.
    Cut,
    /// Nobody is in: its door was closed on that condition.
    Idle,
}

/// What is done for a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelWork {
    /// Its files are brought to this host.
    Fetch,
    /// The memory that it needs is set aside, once there is room.
    Reserve,
    /// Hooks before its load run.
    BeforeLoad,
    /// Its weights are read, or its process is started.
    Load,
    /// It answers its warm-up prompt.
    Warm,
    /// Hooks after its warm-up run; it serves once they have ended.
    AfterHealthy,
    /// Its running requests end: within the drain's budget, or at once.
    Empty {
        /// Whether they are cut.
        cut: bool,
    },
    /// Hooks before its end run.
    BeforeStop,
    /// Its engine ends, and its memory is freed.
    Stop,
    /// Hooks after its end run.
    AfterUnload,
    /// It rests before its engine is started again; failing this work means giving up.
    Pause,
}

impl ModelWork {
    /// Says whether it is part of a load, which may be cancelled and may fail.
    pub fn loads(self) -> bool {
        use ModelWork as W;
        matches!(self, W::Fetch | W::Reserve | W::BeforeLoad | W::Load | W::Warm | W::AfterHealthy | W::Pause)
    }
}

/// What happens to a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelEvent {
    /// Someone wants it loaded, and waits.
    Load(Caller),
    /// Someone wants it gone, and waits.
    Leave(Caller, Leaving),
    /// The work in hand has ended, well or not.
    Done(bool),
    /// The engine of a model that serves has ended by itself.
    EngineLost,
}

/// What a caller is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelAnswer {
    /// It serves.
    Ready,
    /// Its load has failed, or its engine could not be brought back.
    Failed,
    /// Its load was stopped by somebody who wants it gone.
    Cancelled,
    /// It can't be loaded while its requests are ended.
    Busy,
    /// There is nothing to unload.
    NotHere,
    /// It is gone.
    Gone,
    /// [`CALLERS_MAX`] wait already.
    TooMany,
}

/// What its owner does, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelAct {
    /// It has come from one state into another.
    Moved(ModelState, ModelState),
    /// It lets requests in.
    Open,
    /// It lets no further request in.
    Close,
    /// This is begun; its end is a [`ModelEvent::Done`].
    Begin(ModelWork),
    /// The load in hand stops at its next step.
    Cancel,
    /// What is being emptied is cut now.
    Hurry,
    /// The memory set aside for it is free.
    Free,
    /// A caller is told.
    Answer(Caller, ModelAnswer),
}

/// The machine.
#[derive(Clone, Debug)]
pub struct ModelLife {
    state: ModelState,
    work: Option<ModelWork>,
    loaders: Vec<Caller>,
    leavers: Vec<Caller>,
    /// Memory is set aside for it.
    held: bool,
    /// Hooks before its load began.
    prepared: bool,
    /// There is an engine.
    engine: bool,
    /// It served, and its engine is brought back.
    again: bool,
}

impl Default for ModelLife {
    fn default() -> Self {
        ModelLife {
            state: ModelState::Absent,
            work: None,
            loaders: Vec::new(),
            leavers: Vec::new(),
            held: false,
            prepared: false,
            engine: false,
            again: false,
        }
    }
}

impl ModelLife {
    /// Returns the state.
    pub fn state(&self) -> ModelState {
        self.state
    }

    /// Returns what is in hand.
    pub fn work(&self) -> Option<ModelWork> {
        self.work
    }

    /// Takes what happened; returns what is done about it.
    pub fn take(&mut self, event: ModelEvent) -> Vec<ModelAct> {
        let mut acts = Vec::new();
        match event {
            ModelEvent::Load(caller) => self.load(caller, &mut acts),
            ModelEvent::Leave(caller, how) => self.leave(caller, how, &mut acts),
            ModelEvent::Done(well) => {
                if let Some(work) = self.work.take() {
                    self.done(work, well, &mut acts);
                }
            }
            ModelEvent::EngineLost if self.state == ModelState::Ready && self.work.is_none() => {
                self.again = true;
                self.go(ModelInput::DeviceFault, &mut acts);
                acts.push(ModelAct::Close);
                self.begin(ModelWork::Stop, &mut acts);
            }
            // On its way in or out, the work in hand notices.
            ModelEvent::EngineLost => {}
        }
        acts
    }

    fn go(&mut self, input: ModelInput, acts: &mut Vec<ModelAct>) {
        let next = next_model_state(self.state, input);
        debug_assert!(next.is_ok(), "{next:?}");
        let Ok(next) = next else { return };
        let from = std::mem::replace(&mut self.state, next);
        acts.push(ModelAct::Moved(from, next));
    }

    fn begin(&mut self, work: ModelWork, acts: &mut Vec<ModelAct>) {
        self.prepared |= work == ModelWork::BeforeLoad;
        self.work = Some(work);
        acts.push(ModelAct::Begin(work));
    }

    fn answer(callers: &mut Vec<Caller>, answer: ModelAnswer, acts: &mut Vec<ModelAct>) {
        acts.extend(callers.drain(..).map(|caller| ModelAct::Answer(caller, answer)));
    }

    fn has_room_for(&self, caller: Caller, acts: &mut Vec<ModelAct>) -> bool {
        let room = self.loaders.len() + self.leavers.len() < CALLERS_MAX;
        if !room {
            acts.push(ModelAct::Answer(caller, ModelAnswer::TooMany));
        }
        room
    }

    fn load(&mut self, caller: Caller, acts: &mut Vec<ModelAct>) {
        match self.state {
            ModelState::Ready => acts.push(ModelAct::Answer(caller, ModelAnswer::Ready)),
            ModelState::Draining => acts.push(ModelAct::Answer(caller, ModelAnswer::Busy)),
            _ if self.has_room_for(caller, acts) => {
                self.loaders.push(caller);
                self.rest(acts);
            }
            _ => {}
        }
    }

    fn leave(&mut self, caller: Caller, how: Leaving, acts: &mut Vec<ModelAct>) {
        let idle = self.work.is_none();
        match self.state {
            ModelState::Absent | ModelState::Unknown if idle => {
                return acts.push(ModelAct::Answer(caller, ModelAnswer::NotHere));
            }
            _ if !self.has_room_for(caller, acts) => return,
            _ => {}
        }
        self.leavers.push(caller);
        Self::answer(&mut self.loaders, ModelAnswer::Cancelled, acts);
        match self.state {
            ModelState::Ready => {
                acts.push(ModelAct::Close);
                if how == Leaving::Idle {
                    self.go(ModelInput::Close, acts);
                    self.begin(ModelWork::BeforeStop, acts);
                } else {
                    self.go(ModelInput::Unload, acts);
                    self.begin(ModelWork::Empty { cut: how == Leaving::Cut }, acts);
                }
            }
            ModelState::Draining if how == Leaving::Cut => acts.push(ModelAct::Hurry),
            ModelState::Fetching | ModelState::Loading | ModelState::Warming | ModelState::Recovering => {
                self.go(ModelInput::Unload, acts);
                acts.push(ModelAct::Cancel);
            }
            ModelState::Failed if idle => self.rest(acts),
            _ => {}
        }
    }

    fn done(&mut self, work: ModelWork, well: bool, acts: &mut Vec<ModelAct>) {
        use ModelWork as W;
        self.held |= work == W::Reserve && well;
        self.engine |= work == W::Load && well;
        if work.loads() {
            if self.state == ModelState::Unloading {
                return self.take_down(acts);
            }
            if !well && self.again && work != W::Pause {
                // It rests once more; whether it is given up is decided then.
                self.go(ModelInput::DeviceFault, acts);
                return self.begin(if self.engine { W::Stop } else { W::Pause }, acts);
            }
            if !well {
                self.go(ModelInput::Fail, acts);
                Self::answer(&mut self.loaders, ModelAnswer::Failed, acts);
                return self.take_down(acts);
            }
        }
        match work {
            W::Fetch => {
                self.go(ModelInput::Fetched, acts);
                self.begin(W::Reserve, acts);
            }
            W::Reserve => self.begin(W::BeforeLoad, acts),
            W::BeforeLoad => self.begin(W::Load, acts),
            W::Load => {
                self.go(ModelInput::Loaded, acts);
                self.begin(W::Warm, acts);
            }
            W::Warm => self.begin(W::AfterHealthy, acts),
            W::AfterHealthy => {
                self.again = false;
                self.go(ModelInput::Warmed, acts);
                acts.push(ModelAct::Open);
                Self::answer(&mut self.loaders, ModelAnswer::Ready, acts);
            }
            W::Empty { .. } => {
                self.go(ModelInput::Emptied, acts);
                self.begin(W::BeforeStop, acts);
            }
            W::BeforeStop => self.begin(W::Stop, acts),
            W::Stop => {
                self.engine = false;
                if self.state == ModelState::Recovering {
                    return self.begin(W::Pause, acts);
                }
                self.take_down(acts);
            }
            W::Pause => {
                self.go(ModelInput::Load, acts);
                self.begin(W::Load, acts);
            }
            W::AfterUnload => {
                self.prepared = false;
                self.rest(acts);
            }
        }
    }

    /// Ends the engine, frees its memory, runs the hooks of its end: whatever there is of these.
    fn take_down(&mut self, acts: &mut Vec<ModelAct>) {
        self.again = false;
        if self.engine {
            return self.begin(ModelWork::Stop, acts);
        }
        if std::mem::take(&mut self.held) {
            acts.push(ModelAct::Free);
        }
        if self.state == ModelState::Unloading {
            self.go(ModelInput::Unloaded, acts);
        }
        if self.prepared {
            return self.begin(ModelWork::AfterUnload, acts);
        }
        self.rest(acts);
    }

    /// Answers those who wanted it gone, and begins a load for those who want it.
    fn rest(&mut self, acts: &mut Vec<ModelAct>) {
        if self.work.is_some() || !matches!(self.state, ModelState::Absent | ModelState::Failed) {
            return;
        }
        if self.state == ModelState::Failed && !self.leavers.is_empty() {
            self.go(ModelInput::Unload, acts);
        }
        Self::answer(&mut self.leavers, ModelAnswer::Gone, acts);
        if !self.loaders.is_empty() {
            self.go(ModelInput::Load, acts);
            self.begin(ModelWork::Fetch, acts);
        }
    }
}

#[cfg(test)]
mod tests {
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
}
