//! A node's models on demand: requests that wait for them, loads for these, and who makes room. `lifecycle::Claims` decides
//! over the memory.

use std::time::Duration;

use lifecycle::{Claim, ClaimAct, Claims, DoorFacts};
use words::{Code, ModelState, Moment};

use crate::client::model_id;
use crate::clock::ms;
use crate::context::Context;
use crate::counters::Count;
use crate::model::Model;
use crate::net::ConnId;
use crate::node::Node;
use crate::plan::memory_of;
use crate::planted::Planted;
use crate::talk::Ask;

/// How long a model serves while others wait for its memory.
const TURN: Duration = ms(2_000);
/// A model that nobody asked for goes after this long.
const TTL: Duration = ms(8_000);
/// A model whose load failed is not loaded for a request again before this.
const FAILED: Duration = ms(5_000);
/// Most requests that wait for one model: its scheduler takes as many at once.
const WAITING_MAX: usize = 9;
/// How late a timer may be looked at.
const LATE: Duration = ms(1_500);

/// A request that waits for its model.
pub(crate) struct Waiting {
    pub(crate) conn: ConnId,
    pub(crate) ask: Ask,
    /// The place of its model on this node.
    model: usize,
    /// When it is told that it waited in vain.
    until: Moment,
}

impl Node {
    /// Sets aside what is loaded by default.
    pub(crate) fn claims(&self) -> Claims {
        let mut claims = Claims::new(self.plan.budget, TURN);
        for (number, _) in &self.plan.models {
            let (model, need) = (model_id(*number), memory_of(*number));
            let (evict, pinned, priority, until) = (false, true, 0, Moment::ZERO);
            claims.ask(Moment::ZERO, Claim { model, need, evict, pinned, priority, until });
        }
        claims.plan(Moment::ZERO, |_| DoorFacts::CLOSED);
        claims
    }

    /// Lets a request wait for its model, and sees to it that this comes.
    pub(crate) fn wait(&mut self, context: &mut Context, conn: ConnId, place: usize, ask: Ask) -> Result<(), Code> {
        let (now, wait) = (self.now(context), context.plan.load_wait);
        let process = self.process.as_mut().ok_or(Code::UpstreamFailed)?;
        let model = &process.models[place];
        let failed = model.state == ModelState::Failed && context.now.since(model.since) < FAILED;
        match model.state {
            _ if !process.machine.takes_loads() => return Err(Code::Draining),
            ModelState::Draining => return Err(Code::Draining),
            ModelState::Failed if failed => return Err(Code::ModelNotHere),
            _ if process.waiting.iter().filter(|waiting| waiting.model == place).count() >= WAITING_MAX => {
                return Err(Code::Overloaded);
            }
            _ => {}
        }
        context.count(Count::WaitedForLoad);
        process.waiting.push(Waiting { conn, ask, model: place, until: now + wait });
        self.want(context, place);
        Ok(())
    }

    /// Takes out the first request that waits and that is meant.
    pub(crate) fn leave_waiting(&mut self, meant: impl Fn(&Waiting) -> bool) -> Option<Waiting> {
        let process = self.process.as_mut()?;
        let place = process.waiting.iter().position(meant)?;
        Some(process.waiting.remove(place))
    }

    /// Asks for the memory of a model that is not here, unless that is asked for already.
    fn want(&mut self, context: &mut Context, place: usize) {
        let (now, wait) = (self.now(context), context.plan.load_wait);
        let Some(process) = &mut self.process else { return };
        let model = &process.models[place];
        let id = model_id(model.number);
        if !model.in_memory() && !process.claims.knows(&id) {
            let (need, evict, pinned, priority) = (memory_of(model.number), true, false, 0);
            process.claims.ask(now, Claim { model: id, need, evict, pinned, priority, until: now + wait });
        }
        self.plan_memory(context);
    }

    fn plan_memory(&mut self, context: &mut Context) {
        let now = self.now(context);
        let clock = self.clock;
        let Some(process) = &mut self.process else { return };
        let (models, waiting) = (&process.models, &process.waiting);
        let acts = process.claims.plan(now, |id| {
            let found = models.iter().position(|model| model_id(model.number) == *id);
            let Some(place) = found else { return DoorFacts::CLOSED };
            let model = &models[place];
            DoorFacts {
                open: model.state == ModelState::Ready,
                shut: model.shut,
                inside: !model.is_idle(),
                waiting: waiting.iter().any(|waiting| waiting.model == place),
                idle_since: clock.moment(model.idle_since),
                opened_at: clock.moment(model.since),
            }
        });
        let mut changed = false;
        for act in acts {
            let Some(process) = &mut self.process else { return };
            let (ClaimAct::Grant(id)
            | ClaimAct::Refuse(id, _)
            | ClaimAct::Shut(id)
            | ClaimAct::Reopen(id)
            | ClaimAct::Evict(id)) = &act;
            let Some(place) = process.models.iter().position(|model| model_id(model.number) == *id) else { continue };
            let model = &mut process.models[place];
            match &act {
                ClaimAct::Grant(_) => {
                    changed = true;
                    if !model.begin_load(context) {
                        process.claims.free(id);
                    }
                }
                ClaimAct::Refuse(..) => self.send_away(context, Code::InsufficientMemory, |of| of == place),
                ClaimAct::Shut(_) => {
                    context.count(Count::Shut);
                    model.shut = true;
                }
                ClaimAct::Reopen(_) => {
                    model.shut = false;
                    self.let_in(context, place);
                }
                ClaimAct::Evict(_) => {
                    changed = true;
                    context.count(Count::Evicted);
                    if !model.begin_unload(context, context.now) {
                        process.claims.stays(id);
                    } else if context.planted(Planted::Overcommit) {
                        process.claims.free(id);
                    }
                }
            }
        }
        if changed {
            self.show_models(context);
        }
        self.check_memory(context);
    }

    /// MB1: what is in memory fits it, judged by the models themselves.
    fn check_memory(&self, context: &mut Context) {
        let Some(process) = &self.process else { return };
        let held: u64 = process.models.iter().filter(|m| m.in_memory()).map(|m| memory_of(m.number)).sum();
        let (place, budget) = (self.place, self.plan.budget);
        context.check(held <= budget, "MB1", || format!("node {place} has models of {held} bytes in {budget}"));
    }

    /// Refuses those who wait for some models.
    fn send_away(&mut self, context: &mut Context, code: Code, of: impl Fn(usize) -> bool) {
        while let Some(waiting) = self.leave_waiting(|waiting| of(waiting.model)) {
            self.refuse(context, waiting.conn, code);
        }
    }

    /// Lets those in who wait for a model that serves.
    fn let_in(&mut self, context: &mut Context, place: usize) {
        let open = |model: &Model| model.state == ModelState::Ready && !model.shut;
        while self.process.as_ref().is_some_and(|process| open(&process.models[place])) {
            let Some(waiting) = self.leave_waiting(|waiting| waiting.model == place) else { return };
            if let Err(code) = self.submit(context, waiting.conn, place, &waiting.ask) {
                self.refuse(context, waiting.conn, code);
            }
        }
    }

    /// Takes the end of a load, good or bad.
    pub(crate) fn came_or_failed(&mut self, context: &mut Context, place: usize) {
        let Some(process) = &mut self.process else { return };
        let model = &process.models[place];
        let state = model.state;
        if !model.on_demand {
            return;
        }
        if state == ModelState::Failed {
            process.claims.free(&model_id(model.number));
            self.send_away(context, Code::ModelNotHere, |of| of == place);
        }
        self.let_in(context, place);
        self.plan_memory(context);
    }

    /// Looks at those who wait, at models that nobody asks for, and at the memory.
    pub(crate) fn look_at_waiting(&mut self, context: &mut Context) {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return };
        if !process.machine.takes_loads() {
            for model in process.models.iter().filter(|model| model.on_demand && !model.in_memory()) {
                process.claims.free(&model_id(model.number));
            }
            self.send_away(context, Code::Draining, |_| true);
            return self.check_memory(context);
        }
        if !context.planted(Planted::WaitForEver) {
            while let Some(late) = self.leave_waiting(|waiting| now >= waiting.until) {
                context.count(Count::LoadTooLate);
                self.refuse(context, late.conn, Code::ModelLoading);
            }
        }
        let Some(process) = &mut self.process else { return };
        // A process whose clock has jumped, or that stood still, looks as soon as it can.
        let late = process.waiting.iter().any(|waiting| now.since(waiting.until) > LATE);
        let place = self.place;
        context.check(!late, "LW1", || format!("a request waits at node {place} past its time"));
        let mut idle = Vec::new();
        for (place, model) in process.models.iter_mut().enumerate().filter(|(_, model)| model.on_demand) {
            let used = !model.is_idle() || process.waiting.iter().any(|waiting| waiting.model == place);
            if used {
                model.idle_since = context.now;
            } else if model.state == ModelState::Ready && context.now.since(model.idle_since) >= TTL {
                idle.push(place);
            }
        }
        for place in idle {
            let Some(process) = &mut self.process else { return };
            context.count(Count::TtlOver);
            process.claims.leaving(&model_id(process.models[place].number));
            process.models[place].begin_unload(context, context.now);
        }
        let Some(process) = &self.process else { return };
        let wanted: Vec<usize> = process.waiting.iter().map(|waiting| waiting.model).collect();
        for place in wanted {
            self.let_in(context, place);
            self.want(context, place);
        }
        self.plan_memory(context);
    }
}
