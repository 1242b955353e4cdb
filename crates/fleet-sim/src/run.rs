//! One run: a seed in, a report out.

use std::panic::{AssertUnwindSafe, catch_unwind};

use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::context::{Context, Violation};
use crate::counters::Counters;
use crate::log::Log;
use crate::plan::Plan;
use crate::planted::Planted;
use crate::world::World;

/// How to run.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunOptions {
    /// Keep the whole log, and not only its end.
    pub whole_log: bool,
    /// A bug to be found; without the feature `planted` there is none.
    pub planted: Option<Planted>,
}

/// What came of a seed.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// The first invariant that did not hold.
    pub violation: Option<Violation>,
    /// How often each thing happened.
    pub counters: Counters,
    /// Things that happened.
    pub events: u64,
    /// The log; empty when all went well and nobody asked for it.
    pub log: String,
}

/// Runs a seed.
pub fn run(seed: u64, options: RunOptions) -> Report {
    let plan = Plan::draw(&mut SmallRng::seed_from_u64(seed ^ 0x9e37_79b9_7f4a_7c15));
    let context = Context::new(seed, plan, Log::new(options.whole_log), options.planted);
    let mut world = World::new(context);
    // An assertion of a machine is an invariant too.
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| world.run())) {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()));
        world.context.breach("PANIC", || text.unwrap_or_default());
    }
    let violation = world.context.violation.take();
    let log = if options.whole_log || violation.is_some() { world.context.render_log() } else { String::new() };
    Report { seed, violation, counters: world.context.counters.clone(), events: world.events(), log }
}
