//! `harness = "process"`: an external engine.

use std::collections::BTreeMap;
use std::path::Path;

use service::clock::Clock;
use service::command::find_program;
use tokio::runtime::Handle;
use words::{Code, Error};

use super::{Harness, LoadFailure, LoadSpec, Loaded, Progress, Sizes};
use crate::options::{Options, PROCESS_HARNESS};
use crate::process::{self, Http, Plan};

pub(crate) struct ProcessHarness {
    http: Http,
    clock: Clock,
    state_dir: String,
    /// Those of hooks.
    macros: BTreeMap<String, String>,
}

impl ProcessHarness {
    pub(crate) fn new(options: &Options, clock: Clock) -> Self {
        let state_dir = options.node.state_dir.as_deref().map(Path::display).map(|path| path.to_string());
        let macros = options.hooks.macros.clone();
        ProcessHarness { http: Http::new(), clock, state_dir: state_dir.unwrap_or_default(), macros }
    }

    fn plan(&self, spec: &LoadSpec) -> Result<Plan, Error> {
        let Some(options) = spec.process.clone() else {
            let message = "an external engine is started as its entry says under 'process'; this model has none";
            return Err(Error::new(Code::InvalidRequest, message).at("process"));
        };
        Ok(Plan::new(spec.model_id.clone(), options, spec.path.as_deref(), &self.state_dir, &self.macros))
    }
}

impl Harness for ProcessHarness {
    fn name(&self) -> &'static str {
        PROCESS_HARNESS
    }

    fn check(&self, spec: &LoadSpec) -> Result<(), Error> {
        let program = self.plan(spec)?.program()?;
        if find_program(&program).is_none() {
            let message = format!("there is no program '{program}' that can be run");
            return Err(Error::new(Code::InvalidModelFile, message).at("process.argv"));
        }
        Ok(())
    }

    fn estimate(&self, spec: &LoadSpec, _sizes: Sizes) -> Result<u64, LoadFailure> {
        Ok(if spec.memory > 0 { spec.memory } else { self.plan(spec)?.files_bytes() })
    }

    fn load(&self, spec: &LoadSpec, _sizes: Sizes, progress: &dyn Progress) -> Result<Loaded, LoadFailure> {
        let (plan, log) = (self.plan(spec)?, progress.log());
        let wanted = |permille| progress.report(permille);
        let started = Handle::current().block_on(process::start(&plan, &self.http, &log, self.clock, wanted))?;
        Ok(Loaded::Process(Box::new(started)))
    }
}
