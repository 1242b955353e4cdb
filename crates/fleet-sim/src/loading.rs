//! A node's models: the pass over those it loads by default, loads and unloads on demand, retries.

use words::ModelState;

use crate::client::model_id;
use crate::clock::ms;
use crate::context::Context;
use crate::model::{Command, Given, Model};
use crate::node::Node;
use crate::planted::Planted;

impl Node {
    pub(crate) fn go_on_loading(&mut self, context: &mut Context) {
        let now = self.now(context);
        let Some(process) = &mut self.process else { return };
        let Some(pass) = &mut process.pass else { return };
        let busy = |model: &Model| !matches!(model.state, ModelState::Absent | ModelState::Failed | ModelState::Ready);
        if process.models.iter().any(busy) {
            return;
        }
        if !process.machine.loads_defaults() {
            // A drained node comes up empty.
            pass.clear();
        }
        while let Some(next) = pass.pop_front() {
            if let Some(model) = process.models.get_mut(next)
                && model.state != ModelState::Ready
                && model.begin_load(context)
            {
                return self.show_models(context);
            }
        }
        process.pass = None;
        let acts = process.machine.activated(now);
        self.act(context, acts, None);
        self.drive(context);
    }

    /// Loads a model on demand, where the node takes loads.
    pub(crate) fn load(&mut self, context: &mut Context, model: usize) {
        let Some(process) = &mut self.process else { return };
        if process.machine.takes_loads()
            && process.pass.is_none()
            && let Some(model) = process.models.get_mut(model)
            && model.begin_load(context)
        {
            self.show_models(context);
        }
    }

    /// Unloads a model on demand.
    pub(crate) fn unload(&mut self, context: &mut Context, model: usize) {
        let Some(process) = &mut self.process else { return };
        let by = context.now.after(ms(4_000));
        if process.pass.is_none()
            && let Some(known) = process.models.get_mut(model)
            && known.begin_unload(context, by)
        {
            self.run_model(context, model);
            self.show_models(context);
        }
    }

    pub(crate) fn look_at_models(&mut self, context: &mut Context) {
        let Some(process) = &mut self.process else { return };
        let takes_loads = process.machine.takes_loads() && process.pass.is_none();
        let (mut changed, mut given) = (false, Vec::new());
        for (place, model) in process.models.iter_mut().enumerate() {
            if takes_loads && model.again_at.is_some_and(|at| context.now >= at) {
                changed |= model.begin_load(context);
            }
            let mut of_model = Given::default();
            if model.go_on_unloading(context, &mut of_model) {
                changed = true;
                if model.on_demand && !model.in_memory() {
                    process.claims.free(&model_id(model.number));
                }
            }
            given.push((place, of_model));
        }
        let empty = process.models.iter().all(|model| matches!(model.state, ModelState::Absent | ModelState::Failed));
        let over = process.unloading && empty;
        for (place, given) in given {
            self.deliver(context, place, given);
        }
        if changed {
            self.show_models(context);
        }
        let now = self.now(context);
        if let Some(process) = self.process.as_mut().filter(|_| over) {
            process.unloading = false;
            let acts = process.machine.unloaded(now);
            self.act(context, acts, None);
            self.drive(context);
        }
    }

    /// Takes the end of a load.
    pub(crate) fn load_over(&mut self, context: &mut Context, number: usize, load: u64) {
        let Some(process) = &mut self.process else { return };
        let Some(place) = process.models.iter().position(|model| model.number == number) else { return };
        if process.models[place].load_over(context, load) {
            self.came_or_failed(context, place);
            self.show_models(context);
        }
        self.go_on_loading(context);
    }

    /// Hands queued work back.
    pub(crate) fn hand_back(&mut self, context: &mut Context) {
        if !context.planted(Planted::ForgetQueued) {
            return self.command_all(context, || Command::HandBack);
        }
        let now = self.now(context);
        for model in self.process.iter_mut().flat_map(|process| &mut process.models) {
            model.command(context, now, Command::HandBack, &mut Given::default());
        }
    }

    pub(crate) fn command_all(&mut self, context: &mut Context, command: impl Fn() -> Command) {
        let now = self.now(context);
        let count = self.process.as_ref().map_or(0, |process| process.models.len());
        for place in 0..count {
            let mut given = Given::default();
            if let Some(process) = &mut self.process {
                process.models[place].command(context, now, command(), &mut given);
            }
            self.deliver(context, place, given);
        }
    }
}
