//! External engines: an OpenAI-compatible server of somebody else's, started, watched, asked and stopped by this worker.
//!
//! ```text
//! engine thread: supervisor -> process group        data plane: queue -> one task a request -> http -> process
//! ```
//! To everything else it is a model like any other: [`Queue`] stands where a scheduler would, and the supervisor's thread
//! where an engine's would.

mod engine;
mod memory;
mod queue;
mod upstream;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use lifecycle::{ExpandError, TurnstileLimits, expand};
use service::command::Order;
use wire::Endpoint;
use words::{Code, Error, ModelId};

use crate::options::ProcessOptions;
pub(crate) use engine::{Serving, Supervised, Watched, start};
pub(crate) use queue::{Queue, Seat};
pub(crate) use upstream::{Http, Incoming, Upstream, whole};

/// One external engine as it is to be started.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) id: ModelId,
    pub(crate) options: Arc<ProcessOptions>,
    /// All but the port.
    macros: BTreeMap<String, String>,
}

impl Plan {
    /// Makes a plan; `macros` are those of hooks.
    pub(crate) fn new(
        id: ModelId,
        options: Arc<ProcessOptions>,
        file: Option<&Path>,
        state_dir: &str,
        macros: &BTreeMap<String, String>,
    ) -> Self {
        let file = file.map(|file| file.display().to_string()).unwrap_or_default();
        let own = [("MODEL", id.to_string()), ("STATE_DIR", state_dir.to_string()), ("FILE", file)];
        let own = own.into_iter().map(|(name, value)| (name.to_string(), value));
        let macros = macros.clone().into_iter().chain(own).collect();
        Plan { id, options, macros }
    }

    /// Returns its program's name, as logs have it.
    pub(crate) fn name(&self) -> &str {
        let program = self.options.argv.first().map_or("", String::as_str);
        program.rsplit('/').next().unwrap_or(program)
    }

    /// Returns the program as it is run.
    ///
    /// # Errors
    /// `InvalidRequest` for a macro that there is not.
    pub(crate) fn program(&self) -> Result<String, Error> {
        let order = self.order(self.options.port).map_err(|error| Error::invalid("process.argv", error.to_string()))?;
        Ok(order.argv.into_iter().next().unwrap_or_default())
    }

    /// Guesses its memory by the files that its arguments name, in bytes.
    pub(crate) fn files_bytes(&self) -> u64 {
        let order = self.order(self.options.port).unwrap_or_default();
        let files = order.argv.iter().skip(1).filter_map(|text| std::fs::metadata(text).ok());
        files.filter(|file| file.is_file()).map(|file| file.len()).sum()
    }

    /// Returns what is run.
    fn order(&self, port: u16) -> Result<Order, ExpandError> {
        let known = |name: &str| match name {
            "PORT" => Some(port.to_string()),
            name => self.macros.get(name).cloned(),
        };
        let mut environment = Vec::with_capacity(self.options.env.len());
        for (name, text) in &self.options.env {
            environment.push((name.clone(), expand(text, known)?));
        }
        let directory = self.options.directory.as_ref().and_then(|directory| directory.to_str());
        Ok(Order {
            argv: self.options.argv.iter().map(|text| expand(text, known)).collect::<Result<_, _>>()?,
            environment,
            directory: directory.map(|text| expand(text, known)).transpose()?.map(Into::into),
            guarded: true,
            ..Order::default()
        })
    }

    /// Says who is let through to it.
    pub(crate) fn limits(&self) -> TurnstileLimits {
        let ProcessOptions { max_running, max_waiting, .. } = *self.options;
        TurnstileLimits { max_running, max_waiting }
    }

    /// Refuses what it does not answer.
    ///
    /// # Errors
    /// `UnsupportedParameter`, naming what it answers.
    pub(crate) fn answers(&self, endpoint: Endpoint) -> Result<(), Error> {
        let all = self.options.endpoints.iter().map(|name| Endpoint::from(*name));
        if all.clone().any(|known| known == endpoint) {
            return Ok(());
        }
        let all: Vec<&str> = all.map(Endpoint::path).collect();
        let message =
            format!("the model '{}' is not asked at {} here, but at {}", self.id, endpoint.path(), all.join(", "));
        Err(Error::new(Code::UnsupportedParameter, message).at("model"))
    }
}
