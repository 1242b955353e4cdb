//! The world: all actors, and the loop that lets one thing happen after the other.

use rand::Rng;
use words::{Code, NodeState};

use crate::client::{Client, Ended, model_id};
use crate::clock::{At, draw_ms, ms};
use crate::context::{ClientDue, Context, Due, Party};
use crate::faults::{Fault, schedule};
use crate::gateway::Gateway;
use crate::net::{ACCEPTOR, ConnId, Loss, Message};
use crate::node::Node;
use crate::operator::Operator;
use crate::rollouts::{KNOWLEDGE, KNOWLEDGE_ON_THE_WAY};
use crate::store::Store;

/// Events after which a run is taken to be endless.
const EVENTS_MAX: u64 = 2_000_000;
/// Longest time from the end of the faults until everything is as it was.
const REST_MAX: std::time::Duration = ms(900_000);
/// How long everything must have been over before the last look: longer than a gateway's lease.
const REST: std::time::Duration = ms(12_000);

/// Everything.
pub(crate) struct World {
    pub(crate) context: Context,
    pub(crate) nodes: Vec<Node>,
    pub(crate) gateways: Vec<Gateway>,
    pub(crate) clients: Vec<Client>,
    pub(crate) operator: Operator,
    pub(crate) store: Store,
    faults: Vec<Fault>,
    calmed: bool,
    /// Requests sent once the faults were over, which must all be answered.
    probes: Vec<usize>,
    rested_since: Option<At>,
    over: bool,
    events: u64,
}

impl World {
    pub(crate) fn new(mut context: Context) -> Self {
        let faults = schedule(&mut context);
        let nodes: Vec<Node> =
            context.plan.nodes.clone().into_iter().enumerate().map(|(i, plan)| Node::new(i, plan)).collect();
        let gateways: Vec<Gateway> =
            context.plan.gateways.clone().into_iter().enumerate().map(|(i, old)| Gateway::new(i, old)).collect();
        for node in &nodes {
            let span = draw_ms(&mut context.rng, 0, 500);
            context.after(span, Due::Start(node.party()));
        }
        for gateway in &gateways {
            let span = draw_ms(&mut context.rng, 0, 500);
            context.after(span, Due::Start(gateway.party()));
        }
        for _ in 0..context.plan.requests {
            let span = draw_ms(&mut context.rng, 2_500, 40_000);
            context.after(span, Due::Arrive);
        }
        context.at(At::default().after(ms(3_000)), Due::Operate);
        context.at(context.plan.faults_until, Due::Inspect);
        World {
            context,
            nodes,
            gateways,
            clients: Vec::new(),
            operator: Operator::default(),
            store: Store::default(),
            faults,
            calmed: false,
            probes: Vec::new(),
            rested_since: None,
            over: false,
            events: 0,
        }
    }

    /// Runs to the end, or to the first breach of an invariant.
    pub(crate) fn run(&mut self) {
        while !self.over && self.context.violation.is_none() {
            let Some(due) = self.context.next() else { break };
            self.events += 1;
            if self.events > EVENTS_MAX {
                return self.context.breach("LV1", || format!("the run does not end within {EVENTS_MAX} events"));
            }
            if let Some((until, due)) = self.deferred(due) {
                self.context.at(until, due);
            }
        }
    }

    /// Returns how many events there were.
    pub(crate) fn events(&self) -> u64 {
        self.events
    }

    /// Lets something happen, unless its process stands still: then it is due when that goes on.
    fn deferred(&mut self, due: Due) -> Option<(At, Due)> {
        let party = match &due {
            Due::Deliver { conn, to } | Due::Loose { conn, to, .. } => Some(self.context.net.end(*conn, *to)),
            Due::Tick { party, .. } => Some(*party),
            Due::StepOver { node, .. } | Due::LoadOver { node, .. } => Some(Party::Node(*node)),
            _ => None,
        };
        let until = match party {
            Some(Party::Node(node)) => self.nodes[node].paused_until,
            Some(Party::Gateway(gateway)) => self.gateways[gateway].paused_until,
            None => At::default(),
        };
        if until > self.context.now {
            return Some((until, due));
        }
        self.happen(due);
        None
    }

    fn happen(&mut self, due: Due) {
        match due {
            Due::Deliver { conn, to } => {
                if let Some(message) = self.context.net.take(conn, to) {
                    self.message(conn, to, message);
                }
            }
            Due::Loose { conn, to, message } => {
                if self.context.net.is_open(conn, to) {
                    self.message(conn, to, message);
                }
            }
            Due::Tick { party: Party::Node(node), life } if self.nodes[node].life == life => {
                self.nodes[node].tick(&mut self.context);
            }
            Due::Tick { party: Party::Gateway(place), life } if self.gateways[place].life == life => {
                let World { context, gateways, clients, nodes, store, .. } = self;
                gateways[place].tick(context);
                gateways[place].coordinate(context, store);
                let sent = gateways[place].process.as_mut().and_then(|process| {
                    let node = process.coordinator.sent.take()?;
                    // An order to an earlier life takes nothing away.
                    let life = nodes[node].process.as_ref().map(|process| process.status.incarnation);
                    Some(node).filter(|node| life == Some(process.newest[*node].0))
                });
                gateways[place].look(context, clients, nodes);
                let sure = gateways[place].troubled_until < context.now && context.plan.odd_control == 0.0;
                if let Some(node) = sent.filter(|_| sure) {
                    let served = self.nodes[node].served(self.context.now);
                    self.check_floor(node, &served, KNOWLEDGE);
                }
            }
            Due::Tick { .. } => {}
            Due::StepOver { node, life, model } => {
                if self.nodes[node].life == life {
                    self.nodes[node].step_over(&mut self.context, model);
                }
            }
            Due::LoadOver { node, life, model, load } => {
                if self.nodes[node].life == life {
                    self.nodes[node].load_over(&mut self.context, model, load);
                }
            }
            Due::Start(Party::Node(node)) => self.nodes[node].start(&mut self.context),
            Due::Start(Party::Gateway(gateway)) => self.gateways[gateway].start(&mut self.context),
            Due::Arrive => _ = self.arrive(None),
            Due::Client { request, what } => self.client(request, what),
            Due::Fault(index) => self.fault(self.faults[index]),
            Due::Heal { from, to } => self.context.heal(from, to),
            Due::Operate => self.operate(),
            Due::Inspect => self.inspect(),
        }
    }

    fn message(&mut self, conn: ConnId, to: usize, message: Message) {
        let World { context, nodes, gateways, clients, .. } = self;
        if matches!(message, Message::Closed) {
            context.net.mark_closed(conn, to);
        }
        match context.net.end(conn, to) {
            Party::Node(place) => {
                let node = &mut nodes[place];
                let state = node.process.as_ref().map(|process| process.machine.state());
                match (state, message) {
                    (None, _) => context.close(conn, ACCEPTOR, Loss::Reset),
                    // The data port is bound only once the activation is over.
                    (Some(NodeState::Activating), Message::Ask(_)) => context.close(conn, ACCEPTOR, Loss::Reset),
                    (_, Message::Closed) => {
                        node.detach(context, conn);
                        node.unread(context, conn);
                    }
                    (_, Message::Ask(ask)) => node.ask(context, conn, *ask),
                    (_, Message::Order(order)) if order.rollout.is_some() => {
                        let (before, served) = (node.record.restart.clone(), node.served(context.now));
                        node.control(context, conn, Message::Order(order));
                        if node.record.restart.is_some() && node.record.restart != before {
                            self.check_floor(place, &served, KNOWLEDGE_ON_THE_WAY);
                        }
                    }
                    (_, message) => node.control(context, conn, message),
                }
            }
            Party::Gateway(place) => {
                let gateway = &mut gateways[place];
                let changed = match message {
                    Message::Closed if gateway.is_step(conn) => {
                        gateway.step_answer(context, conn, None);
                        false
                    }
                    message if gateway.is_step(conn) => {
                        gateway.step_answer(context, conn, Some(message));
                        false
                    }
                    Message::Closed => {
                        gateway.answer(context, clients, nodes, conn, None);
                        gateway.session_lost(context, conn)
                    }
                    Message::Said(said) => {
                        gateway.answer(context, clients, nodes, conn, Some(said));
                        false
                    }
                    Message::Ordered(..) => {
                        context.close(conn, to, Loss::Clean);
                        false
                    }
                    message => gateway.control(context, conn, message),
                };
                if changed {
                    gateway.view_changed(context, clients, nodes);
                }
            }
        }
    }

    fn arrive(&mut self, gateway: Option<usize>) -> usize {
        let World { context, nodes, gateways, clients, .. } = self;
        let number = clients.len();
        // A load balancer sends nobody to a gateway that is gone.
        let alive: Vec<usize> = (0..gateways.len()).filter(|place| gateways[*place].process.is_some()).collect();
        let drawn = context.rng.random_range(0..alive.len().max(1));
        let place = gateway.or(alive.get(drawn).copied()).unwrap_or(0);
        let client = Client::draw(context, number, place);
        context.note("client #: comes to gateway #", &[number as u64, place as u64]);
        clients.push(client);
        if gateway.is_none() {
            let mut draw = |share: f64, what: ClientDue| {
                if context.rng.random_bool(share) {
                    let after = draw_ms(&mut context.rng, 10, 3_000);
                    context.after(after, Due::Client { request: number, what });
                }
            };
            draw(0.06, ClientDue::Leave);
            draw(0.08, ClientDue::StopReading);
            draw(0.08, ClientDue::Cancel);
        }
        gateways[place].take(context, clients, nodes, number);
        number
    }

    fn client(&mut self, request: usize, what: ClientDue) {
        let World { context, nodes, gateways, clients, .. } = self;
        if clients[request].ended.is_some() {
            return;
        }
        let gateway = &mut gateways[clients[request].gateway];
        match what {
            ClientDue::Leave => {
                clients[request].end(context, Ended::Left);
                gateway.left(context, request);
            }
            ClientDue::Cancel => gateway.cancel(context, clients, nodes, request),
            ClientDue::StopReading => {
                clients[request].reading = false;
                let span = draw_ms(&mut context.rng, 100, 8_000);
                context.after(span, Due::Client { request, what: ClientDue::Read });
            }
            ClientDue::Read => {
                clients[request].reading = true;
                gateway.read_on(context, clients, nodes, request);
            }
        }
    }

    /// Crashes a gateway.
    pub(crate) fn gateway_crash(&mut self, place: usize, loss: Loss) {
        for client in self.gateways[place].crash(&mut self.context, loss) {
            self.clients[client].end(&mut self.context, Ended::Broken);
        }
    }

    /// Looks whether everything is over and as it was; the last look is long after that.
    fn inspect(&mut self) {
        if !std::mem::replace(&mut self.calmed, true) {
            self.calm_down();
        }
        self.context.after(ms(1_000), Due::Inspect);
        let late = self.context.now.since(self.context.plan.faults_until) > REST_MAX;
        let ended = self.clients.iter().all(|client| client.ended.is_some());
        let whole = self.whole() && !self.rolling();
        if late {
            let open: Vec<usize> = self.clients.iter().filter(|c| c.ended.is_none()).map(|c| c.number).collect();
            self.context.check(open.is_empty(), "ST1", || format!("requests {open:?} never end"));
            let states: Vec<_> = self.nodes.iter().map(|n| n.process.as_ref().map(|p| p.status.state)).collect();
            self.check_rollout_over();
            return self.context.breach("LV1", || format!("the fleet did not come back: {states:?}"));
        }
        // Long enough for a load that failed to be tried again.
        let settled = self.context.now.since(self.context.plan.faults_until) > ms(16_000);
        if whole && ended && settled && self.probes.len() < self.gateways.len() {
            // One after another: two models that fit one at a time may be asked for.
            let probe = self.arrive(Some(self.probes.len()));
            self.probes.push(probe);
            return;
        }
        if !(whole && ended) {
            self.rested_since = None;
            return;
        }
        for &probe in &self.probes {
            let ended = self.clients[probe].ended;
            self.context.check(ended == Some(Ended::Done), "LV1", || {
                format!("request {probe}, sent to a whole fleet, ended as {ended:?}")
            });
        }
        let since = *self.rested_since.get_or_insert(self.context.now);
        if self.context.now.since(since) >= REST {
            for node in &self.nodes {
                node.check_rest(&mut self.context);
            }
            self.check_calm();
            self.over = true;
        }
    }

    /// Whether every process runs, every node serves all its models, and every gateway knows.
    fn whole(&self) -> bool {
        let now = self.context.now;
        let serves = |node: &Node| node.plan.models.iter().all(|(number, _)| node.serves(*number, now));
        self.nodes.iter().all(serves) && (0..self.nodes.len()).all(|node| self.known_open(node))
    }

    /// DR3: where nothing failed by itself, no client was failed.
    fn check_calm(&mut self) {
        if !self.context.plan.calm {
            return;
        }
        let on_demand = model_id(self.context.plan.models);
        for client in &self.clients {
            let Some(Ended::Failed(code)) = client.ended else { continue };
            // Who finds as many before a model that comes as it takes at once was not failed by the fleet.
            let full = code == Code::Overloaded && client.order.model >= on_demand;
            if !(full || client.cancelled && code == Code::Cancelled) {
                let number = client.number;
                self.context
                    .breach("DR3", || format!("request {number} failed ({code:?}), though a replica was spare"));
            }
        }
    }
}
