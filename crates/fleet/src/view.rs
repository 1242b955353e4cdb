//! What a gateway knows of its fleet: the last status of each configured neuron, and how fresh it is.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use words::{DrainPhase, Intent, Loading, ModelId, ModelState, ModelStatus, Moment, NodeState, NodeStatus};

use crate::catalogue::{self, Aliases};

/// A neuron that said nothing for this long gets no new routes.
pub const SILENT_AFTER: Duration = Duration::from_secs(2);
/// A model whose load failed on a neuron is not loaded there again for this long, but by an order.
pub const FAILED_PAUSE: Duration = Duration::from_secs(10);

/// A configured neuron's place in the view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub usize);

/// One configured neuron.
#[derive(Clone, Debug)]
pub struct NodeView {
    /// Its control address, as configured.
    pub control_address: String,
    /// Its last status, once it was heard from in this life of the gateway.
    pub status: Option<NodeStatus>,
    /// When that was.
    pub heard_at: Moment,
    /// Why it can't be heard, in words for operators; none while it is.
    pub problem: Option<String>,
    /// Another live neuron uses the same node id.
    pub conflicted: bool,
    /// The entry before it that is this very process, reached by another address: what is there twice counts once.
    pub same_as: Option<Slot>,
    /// When each model that it failed to load was first seen so.
    pub failed: BTreeMap<ModelId, Moment>,
}

/// What a status did to the view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observation {
    /// It is the newest of its neuron.
    Fresh {
        /// Something besides the load changed.
        changed: bool,
    },
    /// It is older than what is known; only its arrival counted for nothing.
    Stale,
}

/// The fleet as one gateway sees it. Readers get immutable snapshots of it.
#[derive(Clone, Debug, Default)]
pub struct FleetView {
    nodes: Vec<NodeView>,
    /// Made anew when a status changes.
    aliases: Arc<Aliases>,
}

impl FleetView {
    /// Makes the view of a fleet that nothing is known of.
    pub fn new(control_addresses: impl IntoIterator<Item = String>) -> Self {
        let node = |control_address| NodeView {
            control_address,
            status: None,
            heard_at: Moment::ZERO,
            problem: None,
            conflicted: false,
            same_as: None,
            failed: BTreeMap::new(),
        };
        FleetView { nodes: control_addresses.into_iter().map(node).collect(), aliases: Arc::default() }
    }

    /// Takes a status, pushed or polled. Generations never go back (GN1): a later life of the process wins over
    /// an earlier one, and within one life the higher generation.
    pub fn observe(&mut self, now: Moment, slot: Slot, mut status: NodeStatus) -> Observation {
        let Some(node) = self.nodes.get_mut(slot.0) else { return Observation::Stale };
        if let Some(address) = reached(&status.data_address, &node.control_address) {
            status.data_address = address;
        }
        let changed = match &node.status {
            Some(known) if known.incarnation == status.incarnation => {
                if status.generation < known.generation {
                    return Observation::Stale;
                }
                status.generation > known.generation
            }
            // Without a state directory the counter is 0 in every life; the newer word is then believed.
            Some(known) if status.incarnation.counter < known.incarnation.counter => return Observation::Stale,
            _ => true,
        };
        if changed {
            node.failed = failures(node, &status, now);
        }
        node.status = Some(status);
        node.heard_at = now;
        node.problem = None;
        self.mark_conflicts(now);
        if changed {
            let aliases = catalogue::aliases(self.nodes.iter().filter_map(|node| node.status.as_ref()));
            if aliases != *self.aliases {
                self.aliases = Arc::new(aliases);
            }
        }
        Observation::Fresh { changed }
    }

    /// Takes a sign of life without news.
    pub fn heard(&mut self, now: Moment, slot: Slot) {
        if let Some(node) = self.nodes.get_mut(slot.0).filter(|node| node.status.is_some()) {
            node.heard_at = now;
        }
    }

    /// Takes the loss of a neuron's connection: no new routes until it is heard from again.
    pub fn lost(&mut self, slot: Slot) {
        if let Some(node) = self.nodes.get_mut(slot.0) {
            node.heard_at = Moment::ZERO;
            if let Some(status) = &mut node.status {
                // What it was is still listed, but nothing can be sent to a port that is closed.
                status.data_address.clear();
            }
        }
    }

    /// Takes the loss of a neuron's connection, or that there is none, and why.
    pub fn unreachable(&mut self, slot: Slot, why: String) {
        self.lost(slot);
        if let Some(node) = self.nodes.get_mut(slot.0) {
            node.problem = Some(why);
        }
    }

    fn mark_conflicts(&mut self, now: Moment) {
        let live: Vec<_> = self
            .nodes
            .iter()
            .map(|node| node.status.as_ref().filter(|_| now.since(node.heard_at) <= SILENT_AFTER))
            .map(|status| status.map(|status| (status.node.clone(), status.incarnation)))
            .collect();
        for (i, node) in self.nodes.iter_mut().enumerate() {
            node.conflicted = live[i].as_ref().is_some_and(|(id, incarnation)| {
                live.iter().flatten().any(|(other, theirs)| other == id && theirs.random != incarnation.random)
            });
            let before = live[..i].iter().position(|other| live[i].is_some() && *other == live[i]);
            node.same_as = before.map(Slot);
        }
    }

    /// Returns the configured neurons in order.
    pub fn nodes(&self) -> impl Iterator<Item = (Slot, &NodeView)> {
        self.nodes.iter().enumerate().map(|(i, node)| (Slot(i), node))
    }

    /// Returns one neuron.
    pub fn node(&self, slot: Slot) -> Option<&NodeView> {
        self.nodes.get(slot.0)
    }

    /// Returns whether every configured neuron was heard from in this life of the gateway.
    pub fn all_heard(&self) -> bool {
        self.nodes.iter().all(|node| node.status.is_some())
    }

    /// Returns the models that the fleet has or that a request brings, one entry a name, in order of name: the replica
    /// that is nearest to serving, with what a catalogue says of it.
    pub fn models(&self) -> Vec<ModelStatus> {
        catalogue::merged(self.nodes.iter().filter_map(|node| node.status.as_ref()))
    }

    /// Returns the id of the model that a name means which is no id itself; of several the first in order of name.
    pub fn alias(&self, name: &ModelId) -> Option<&ModelId> {
        if self.aliases.is_empty() {
            return None;
        }
        self.aliases.get(name)?.first()
    }

    /// Returns names that mean different models on different neurons, each with the ids.
    pub fn ambiguous(&self) -> impl Iterator<Item = (&ModelId, Vec<&ModelId>)> {
        let several = self.aliases.iter().filter(|(_, ids)| ids.len() > 1);
        several.map(|(alias, ids)| (alias, ids.iter().collect()))
    }

    /// Returns how far the model's nearest load is; `None` where it serves, or none is to be waited for.
    pub fn loading(&self, model: &ModelId) -> Option<Loading> {
        catalogue::loading(self.nodes.iter().filter_map(|node| node.status.as_ref()?.model(model)))
    }

    /// Returns every model that some neuron has or is configured with, and how many may get new requests for it.
    pub fn replicas(&self, now: Moment) -> BTreeMap<ModelId, usize> {
        let mut replicas = BTreeMap::new();
        for node in &self.nodes {
            let routable = node.routable(now).is_some();
            for model in node.status.iter().flat_map(|status| &status.models) {
                let ready = routable && model.state == ModelState::Ready;
                *replicas.entry(model.id.clone()).or_default() += usize::from(ready);
            }
        }
        replicas
    }

    /// Returns whether any neuron knows the model, be it absent just now: a drained node names what it will load again.
    pub fn lists(&self, model: &ModelId) -> bool {
        let statuses = self.nodes.iter().filter_map(|node| node.status.as_ref());
        let mut known = statuses.flat_map(|status| &status.models);
        known.any(|status| status.id == *model && status.state != ModelState::Unknown)
    }
}

/// Returns since when each failed model is known to have failed: a status that says so once more is no new failure.
fn failures(known: &NodeView, status: &NodeStatus, now: Moment) -> BTreeMap<ModelId, Moment> {
    let before = known.status.as_ref().filter(|before| before.incarnation == status.incarnation);
    let failed = status.models.iter().filter(|model| model.state == ModelState::Failed);
    let since = |model: &ModelStatus| {
        let same = before
            .and_then(|before| before.model(&model.id))
            .is_some_and(|before| before.state == ModelState::Failed && before.since_unix_ms == model.since_unix_ms);
        known.failed.get(&model.id).copied().filter(|_| same).unwrap_or(now)
    };
    failed.map(|model| (model.id.clone(), since(model))).collect()
}

/// Returns where a data port is reached that is published as one on every address: where the control port is. To dial
/// 0.0.0.0 is to dial oneself.
fn reached(data_address: &str, control_address: &str) -> Option<String> {
    let (host, port) = data_address.rsplit_once(':')?;
    let everywhere = host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|host| host.is_unspecified());
    let (control, _) = control_address.rsplit_once(':').filter(|_| everywhere)?;
    Some(format!("{control}:{port}"))
}

impl NodeView {
    /// Returns whether a load of the model failed here less than [`FAILED_PAUSE`] ago.
    pub fn failed_lately(&self, model: &ModelId, now: Moment) -> bool {
        self.failed.get(model).is_some_and(|since| now.since(*since) < FAILED_PAUSE)
    }

    /// Returns whether new work may go there (RT1): fresh, unambiguous, not there twice, open, and its data port known. A
    /// cordoned node is ready and not open; one that settles still is.
    pub fn routable(&self, now: Moment) -> Option<&NodeStatus> {
        let status = self.status.as_ref()?;
        let open = match status.state {
            NodeState::Ready => status.intent == Intent::None,
            NodeState::Draining(phase) => phase == DrainPhase::Settle,
            _ => false,
        };
        let fresh = now.since(self.heard_at) <= SILENT_AFTER;
        let unique = !self.conflicted && self.same_as.is_none();
        (open && fresh && unique && !status.data_address.is_empty()).then_some(status)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use words::{Incarnation, NodeId};

    use super::*;

    #[test]
    fn a_neuron_that_listens_on_every_address_is_reached_where_its_control_port_is() {
        let published = |control: &str, data: &str| {
            let mut view = FleetView::new([control.to_string()]);
            let status = NodeStatus::new(NodeId::new("a").unwrap(), Incarnation::default());
            view.observe(Moment::ZERO, Slot(0), NodeStatus { data_address: data.into(), ..status });
            view.node(Slot(0)).unwrap().status.as_ref().unwrap().data_address.clone()
        };
        for (control, data, wanted) in [
            ("gpu1.lan:13231", "0.0.0.0:13131", "gpu1.lan:13131"),
            ("10.0.0.7:13231", "[::]:13131", "10.0.0.7:13131"),
            ("[fd00::7]:13231", "[::]:13131", "[fd00::7]:13131"),
            ("gpu1.lan:13231", "10.1.0.7:13131", "10.1.0.7:13131"),
            ("gpu1.lan:13231", "data.gpu1.lan:1", "data.gpu1.lan:1"),
            ("gpu1.lan:13231", "", ""),
        ] {
            assert_eq!(published(control, data), wanted, "{control} {data}");
        }
    }
}
