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
#[path = "model_life_tests.rs"]
mod tests;
