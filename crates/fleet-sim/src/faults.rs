//! The weather: a seeded schedule of crashes, pauses, partitions, broken connections, clock jumps and full disks.

use rand::Rng;

use crate::clock::{At, draw_ms, ms};
use crate::context::{Context, Due, Party};
use crate::counters::Count;
use crate::net::Loss;
use crate::world::World;

/// What happens at one point of the schedule; the victim is drawn when it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    NodeCrash,
    NodeVanish,
    NodePause,
    GatewayCrash,
    GatewayVanish,
    GatewayPause,
    ClockJump,
    OneWay,
    TwoWay,
    Drop,
    Hang,
    DiskFull,
    StoreDown,
}

const ALL: [Fault; 14] = [
    Fault::NodeCrash,
    Fault::NodeVanish,
    Fault::NodePause,
    Fault::GatewayCrash,
    Fault::GatewayVanish,
    Fault::GatewayPause,
    Fault::ClockJump,
    Fault::OneWay,
    Fault::TwoWay,
    Fault::TwoWay,
    Fault::Drop,
    Fault::Hang,
    Fault::DiskFull,
    Fault::StoreDown,
];

/// Draws the schedule.
pub(crate) fn schedule(context: &mut Context) -> Vec<Fault> {
    if context.plan.calm {
        return Vec::new();
    }
    let faults: Vec<Fault> =
        (0..context.rng.random_range(2..=16)).map(|_| ALL[context.rng.random_range(0..ALL.len())]).collect();
    for i in 0..faults.len() {
        let at = At::default().after(draw_ms(&mut context.rng, 1_000, 44_000));
        context.at(at, Due::Fault(i));
    }
    faults
}

impl World {
    /// Lets a fault happen.
    pub(crate) fn fault(&mut self, fault: Fault) {
        let rolling = self.rolling();
        let context = &mut self.context;
        let node = context.rng.random_range(0..self.nodes.len());
        let gateway = context.rng.random_range(0..self.gateways.len());
        let (n, g) = (Party::Node(node), Party::Gateway(gateway));
        // Some partitions outlast a gateway's lease.
        let long = matches!(fault, Fault::OneWay | Fault::TwoWay) && context.rng.random_bool(0.4);
        let span = if long { draw_ms(&mut context.rng, 9_500, 15_000) } else { draw_ms(&mut context.rng, 200, 7_000) };
        context.note(
            "fault # (node #, gateway #, ms #)",
            &[fault as u64, node as u64, gateway as u64, span.as_millis() as u64],
        );
        if matches!(fault, Fault::GatewayPause | Fault::ClockJump | Fault::OneWay | Fault::TwoWay) {
            self.gateways[gateway].troubled_until = context.now.after(span + ms(5_000));
        }
        // The worst time for a long absence is that of a rollout.
        if matches!(fault, Fault::NodeCrash | Fault::NodeVanish) {
            self.nodes[node].stays_away = context.rng.random_bool(if rolling { 0.5 } else { 0.15 });
        }
        match fault {
            Fault::NodeCrash => {
                context.count(Count::NodeCrash);
                let loss = if context.rng.random_bool(0.5) { Loss::Reset } else { Loss::Clean };
                self.nodes[node].crash(context, loss);
            }
            Fault::NodeVanish => {
                context.count(Count::NodeVanish);
                self.nodes[node].crash(context, Loss::Silent);
            }
            Fault::NodePause => {
                context.count(Count::NodePause);
                self.nodes[node].paused_until = context.now.after(span);
                self.nodes[node].note_serving(context.now);
            }
            Fault::GatewayCrash => {
                context.count(Count::GatewayCrash);
                self.gateway_crash(gateway, Loss::Reset);
            }
            Fault::GatewayVanish => {
                context.count(Count::GatewayVanish);
                self.gateway_crash(gateway, Loss::Silent);
            }
            Fault::GatewayPause => {
                context.count(Count::GatewayPause);
                self.gateways[gateway].paused_until = context.now.after(span);
            }
            Fault::ClockJump => {
                context.count(Count::ClockJump);
                let wall = context.rng.random_range(-3_600_000..=3_600_000);
                let clock = if context.rng.random_bool(0.5) {
                    &mut self.nodes[node].clock
                } else {
                    &mut self.gateways[gateway].clock
                };
                clock.jump(span);
                clock.set_wall_ahead(wall);
            }
            Fault::OneWay => {
                context.count(Count::OneWayPartition);
                let (from, to) = if context.rng.random_bool(0.5) { (n, g) } else { (g, n) };
                context.deafen(from, to, span);
            }
            Fault::TwoWay => {
                context.count(Count::TwoWayPartition);
                context.deafen(n, g, span);
                context.deafen(g, n, span);
            }
            Fault::Drop => {
                let all = context.net.all();
                if !all.is_empty() {
                    context.count(Count::ConnectionDrop);
                    let conn = all[context.rng.random_range(0..all.len())];
                    context.drop_connection(conn);
                }
            }
            Fault::Hang => {
                context.count(Count::EngineHang);
                let until = context.now.after(span + ms(2_000));
                for model in self.nodes[node].process.iter_mut().flat_map(|process| &mut process.models) {
                    model.hang_until = until;
                }
            }
            Fault::DiskFull => {
                context.count(Count::DiskFull);
                self.nodes[node].disk_full = true;
            }
            Fault::StoreDown => {
                context.count(Count::StoreDown);
                self.store.down_until = context.now.after(span);
            }
        }
    }

    /// Ends all faults that last.
    pub(crate) fn calm_down(&mut self) {
        self.context.note("faults are over", &[]);
        let nodes = (0..self.nodes.len()).map(Party::Node);
        for node in nodes {
            for gateway in (0..self.gateways.len()).map(Party::Gateway) {
                self.context.heal(node, gateway);
                self.context.heal(gateway, node);
            }
        }
        for gateway in &mut self.gateways {
            gateway.paused_until = self.context.now;
        }
        for node in &mut self.nodes {
            (node.disk_full, node.paused_until) = (false, self.context.now);
            for model in node.process.iter_mut().flat_map(|process| &mut process.models) {
                model.hang_until = At::default();
            }
        }
    }
}
