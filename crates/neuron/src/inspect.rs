//! The inspector: the lanes, the past and the health of this node, put together for whoever looks.

use std::sync::Arc;
use std::time::Duration;

use hooks::HookReport;
use kv_store::KvStore;
use lifecycle::{EngineFacts, HealthFacts, HookEvent, KvFacts, health};
use service::clock::Clock;
use service::server::ServerMetrics;
use words::{Inspection, ItemRun, LaneItem, ModelState, NodeState};

use crate::data::stack;
use crate::models::Models;
use crate::options::Options;
use crate::publisher::Publisher;
use crate::sessions::Sessions;
use crate::state_dir::StateDir;
use crate::turns::Turns;

/// Longest wait for the disk to say whether it can be written.
const DISK_MAX: Duration = Duration::from_secs(2);

/// What the inspector looks at; cheap to clone.
#[derive(Clone)]
pub(crate) struct Inspector {
    pub(crate) clock: Clock,
    pub(crate) options: Arc<Options>,
    pub(crate) publisher: Publisher,
    pub(crate) models: Models,
    pub(crate) sessions: Sessions,
    pub(crate) turns: Turns,
    pub(crate) kv: KvStore,
    pub(crate) state_dir: Option<StateDir>,
    pub(crate) control: ServerMetrics,
    pub(crate) data: ServerMetrics,
}

fn item(report: &HookReport) -> LaneItem {
    LaneItem {
        name: report.name.clone(),
        description: report.description.clone(),
        source: report.source.clone(),
        event: report.event.to_string(),
        guard: false,
        timeout_ms: Some((report.timeout_s * 1000.0) as u64),
        runs: report.runs,
        failures: report.failures,
        last: report.last.as_ref().map(|last| ItemRun {
            failure: last.failure.clone(),
            seconds: last.seconds,
            at_unix_s: last.at,
            model: last.model.clone(),
        }),
    }
}

impl Inspector {
    /// Looks.
    pub(crate) async fn look(&self) -> Inspection {
        let status = self.publisher.snapshot();
        let (states, models) = self.publisher.history();
        let reports = self.turns.reports();
        let (way_in, way_out): (Vec<&HookReport>, Vec<&HookReport>) = reports
            .iter()
            .partition(|report| HookEvent::parse(report.event).is_some_and(|event| event <= HookEvent::Ready));
        let facts = self.facts(&reports).await;
        Inspection {
            node: status.node,
            incarnation: status.incarnation,
            at_unix_ms: self.clock.unix_ms(),
            startup: way_in.into_iter().map(item).collect(),
            middleware: stack(&self.options),
            shutdown: way_out.into_iter().map(item).collect(),
            states,
            models,
            health: health(&facts),
        }
    }

    async fn facts(&self, reports: &[HookReport]) -> HealthFacts {
        let (now, status) = (self.clock.now(), self.publisher.snapshot());
        let engine = |(id, engine): (words::ModelId, crate::engine_thread::EngineHandle)| {
            let load = engine.load();
            EngineFacts {
                model: id.to_string(),
                alive: engine.alive(),
                running: load.running,
                waiting: load.waiting,
                step_age: now.since(engine.stepped()),
            }
        };
        let counts = self.kv.counts();
        let options = &self.options.kv_store;
        let fetching = status.models.iter().filter(|model| model.state == ModelState::Fetching);
        let failing = reports.iter().filter_map(|report| {
            let failure = report.last.as_ref()?.failure.clone()?;
            Some((format!("{} of {}", report.name, report.event), failure))
        });
        let bound = (!status.data_address.is_empty()).then(|| (status.data_address.clone(), self.data.open()));
        HealthFacts {
            control_connections: self.control.open(),
            data: bound,
            serves: matches!(status.state, NodeState::Ready | NodeState::Held),
            engines: self.models.engines().into_iter().map(engine).collect(),
            kv: KvFacts {
                wanted: options.ram_mib > 0 || options.folder.is_some(),
                ram: (counts.ram_blocks, counts.ram_bytes),
                disk: self.kv.has_disk().then_some((counts.disk_blocks, counts.disk_bytes)),
                disk_wanted: options.folder.is_some(),
                damaged: counts.damaged,
            },
            state_dir: match &self.state_dir {
                None => None,
                Some(dir) => Some((dir.path().display().to_string(), dir.unwritable(DISK_MAX).await)),
            },
            downloads: fetching.map(|model| format!("{} {}%", model.id, model.progress_permille / 10)).collect(),
            sessions: self.sessions.silences(now),
            failing_hooks: failing.collect(),
        }
    }
}
