#![allow(clippy::unwrap_used)]
use std::time::Duration;

use proptest::prelude::*;
use words::{Incarnation, ModelCard, ModelLoad, NodeMemory};

use super::*;
use crate::view::FAILED_PAUSE;

fn id(name: &str) -> ModelId {
    ModelId::new(name).unwrap()
}

fn at(ms: u64) -> Moment {
    Moment::after_start(Duration::from_millis(ms))
}

/// A catalogued model.
fn model(name: &str, state: ModelState, bytes: u64) -> ModelStatus {
    let card = ModelCard { on_demand: true, memory_estimate: bytes, ..ModelCard::default() };
    let memory_bytes = if state == ModelState::Ready { bytes } else { 0 };
    ModelStatus { state, card, memory_bytes, ..ModelStatus::absent(id(name)) }
}

fn busy(model: ModelStatus) -> ModelStatus {
    ModelStatus { load: ModelLoad { running: 1, ..ModelLoad::default() }, ..model }
}

fn idle(model: ModelStatus, idle_s: u32, priority: i32) -> ModelStatus {
    ModelStatus { idle_s, card: ModelCard { priority, ..model.card }, ..model }
}

fn pinned(model: ModelStatus) -> ModelStatus {
    ModelStatus { card: ModelCard { pinned: true, ..model.card }, ..model }
}

/// A node whose memory is what its loaded models take.
fn node(name: &str, budget: u64, models: Vec<ModelStatus>) -> NodeStatus {
    let incarnation = Incarnation { counter: 1, random: name.bytes().map(u64::from).sum() };
    let used = models.iter().map(|model| model.memory_bytes).sum();
    let status = NodeStatus::new(NodeId::new(name).unwrap(), incarnation);
    let memory = NodeMemory { budget, used };
    NodeStatus { state: NodeState::Ready, data_address: format!("{name}:1"), models, memory, ..status }
}

fn view(nodes: &[NodeStatus]) -> FleetView {
    let mut view = FleetView::new((0..nodes.len()).map(|i| format!("c{i}")));
    for (i, status) in nodes.iter().enumerate() {
        view.observe(at(1000), Slot(i), status.clone());
    }
    view
}

fn choose(nodes: &[NodeStatus], placements: &Placements) -> Option<(usize, Room)> {
    let query = PlaceQuery { model: &id("m"), tried: &[], placements, ordered: false };
    place(&view(nodes), &query, at(1000)).map(|place| (place.slot.0, place.room))
}

fn chosen(nodes: &[NodeStatus]) -> Option<(usize, Room)> {
    choose(nodes, &Placements::default())
}

fn absent() -> ModelStatus {
    model("m", ModelState::Absent, 10)
}

#[test]
fn a_load_that_runs_is_joined_and_the_furthest_one_first() {
    let loading = |permille| ModelStatus { progress_permille: permille, ..model("m", ModelState::Loading, 10) };
    let free = node("a", 100, vec![absent()]);
    let nodes = [free, node("b", 10, vec![loading(100)]), node("c", 10, vec![loading(700)])];
    assert_eq!(chosen(&nodes), Some((2, Room::Coming)));
    assert_eq!(chosen(&nodes[..2]), Some((1, Room::Coming)));
}

#[test]
fn free_memory_comes_before_eviction_and_the_most_of_it_first() {
    let old = || idle(model("x", ModelState::Ready, 10), 900, -5);
    let full = node("a", 10, vec![absent(), old()]);
    let some = node("b", 20, vec![absent()]);
    let more = node("c", 50, vec![absent()]);
    assert_eq!(chosen(&[full.clone(), some.clone(), more]), Some((2, Room::Free)));
    assert_eq!(chosen(&[full.clone(), some]), Some((1, Room::Free)));
    assert_eq!(chosen(&[full]), Some((0, Room::Evict)));
}

#[test]
fn what_goes_has_the_lowest_priority_and_then_the_longest_idleness() {
    let with = |name, idle_s, priority| {
        node(name, 10, vec![absent(), idle(model("x", ModelState::Ready, 10), idle_s, priority)])
    };
    assert_eq!(chosen(&[with("a", 50, 0), with("b", 500, 0)]), Some((1, Room::Evict)));
    assert_eq!(chosen(&[with("a", 50, -1), with("b", 500, 0)]), Some((0, Room::Evict)));
    let worked = node("c", 10, vec![absent(), busy(model("x", ModelState::Ready, 10))]);
    assert_eq!(chosen(&[worked.clone(), with("a", 1, 9)]), Some((1, Room::Evict)));
    assert_eq!(chosen(&[worked]), Some((0, Room::Wait)));
}

#[test]
fn a_node_that_can_never_hold_it_is_asked_last() {
    let small = node("a", 5, vec![absent()]);
    let stuck = node("b", 20, vec![absent(), pinned(model("x", ModelState::Ready, 15))]);
    let waits = node("c", 10, vec![absent(), busy(model("x", ModelState::Ready, 10))]);
    assert_eq!(chosen(&[small.clone(), stuck.clone(), waits]), Some((2, Room::Wait)));
    assert_eq!(chosen(&[small, stuck]).map(|(_, room)| room), Some(Room::Never));
}

#[test]
fn only_an_open_node_whose_catalogue_has_it_loads_it_for_a_request() {
    let uncatalogued = ModelStatus { card: ModelCard::default(), ..absent() };
    assert_eq!(chosen(&[node("a", 100, vec![uncatalogued.clone()])]), None);
    let draining = NodeState::Draining(words::DrainPhase::Settle);
    assert_eq!(chosen(&[NodeStatus { state: draining, ..node("a", 100, vec![absent()]) }]), None);
    let ordered = PlaceQuery { model: &id("m"), tried: &[], placements: &Placements::default(), ordered: true };
    assert!(place(&view(&[node("a", 100, vec![uncatalogued])]), &ordered, at(1000)).is_some());
}

#[test]
fn a_load_that_failed_a_moment_ago_is_not_tried_again_at_once() {
    let failed = node("a", 100, vec![model("m", ModelState::Failed, 10)]);
    let mut view = view(std::slice::from_ref(&failed));
    let placements = Placements::default();
    let query = PlaceQuery { model: &id("m"), tried: &[], placements: &placements, ordered: false };
    assert_eq!(place(&view, &query, at(1500)), None);
    assert!(place(&view, &PlaceQuery { ordered: true, ..query }, at(1500)).is_some());
    // The same failure, said once more, is no new one.
    let later = at(1000) + FAILED_PAUSE;
    view.observe(later, Slot(0), NodeStatus { generation: failed.generation.next(), ..failed });
    assert!(place(&view, &query, later).is_some());
}

#[test]
fn requests_follow_the_one_that_waits_and_others_go_round_what_it_will_take() {
    let nodes = [node("a", 20, vec![absent(), model("n", ModelState::Absent, 15)]), node("b", 12, vec![absent()])];
    assert_eq!(chosen(&nodes), Some((0, Room::Free)));
    let mut placements = Placements::default();
    placements.enter(&id("n"), Slot(0));
    assert_eq!(choose(&nodes, &placements), Some((1, Room::Free)), "the other one takes the room");
    placements.enter(&id("m"), Slot(0));
    placements.enter(&id("m"), Slot(0));
    assert_eq!(choose(&nodes, &placements), Some((0, Room::Coming)));
    placements.leave(&id("m"), Slot(0));
    assert_eq!(choose(&nodes, &placements), Some((0, Room::Coming)));
    placements.leave(&id("m"), Slot(0));
    assert_eq!(choose(&nodes, &placements), Some((1, Room::Free)));
    placements.leave(&id("n"), Slot(0));
    assert!(placements.waiting.is_empty());
}

/// A node of chance: its budget, what the model needs there, and others with bytes, work, pin and idleness.
type Chance = (u64, u64, Vec<(u64, bool, bool, u32)>);

fn by_chance(i: usize, (budget, need, others): &Chance) -> NodeStatus {
    let mut models = vec![model("m", ModelState::Absent, *need)];
    for (j, (bytes, works, pins, idle_s)) in others.iter().enumerate() {
        let other = idle(model(&format!("x{j}"), ModelState::Ready, *bytes), *idle_s, 0);
        let other = if *works { busy(other) } else { other };
        models.push(if *pins { pinned(other) } else { other });
    }
    node(&format!("n{i}"), *budget, models)
}

proptest! {
    #[test]
    fn the_best_room_there_is_gets_it_wherever_nodes_stand_in_the_configuration(
        fleet in proptest::collection::vec(
            (1u64..60, 1u64..40, proptest::collection::vec((1u64..20, any::<bool>(), any::<bool>(), 0u32..99), 0..4)),
            1..6,
        ),
        turn in 0usize..6,
    ) {
        let nodes: Vec<NodeStatus> = fleet.iter().enumerate().map(|(i, chance)| by_chance(i, chance)).collect();
        let best = |(budget, need, others): &Chance| {
            let used: u64 = others.iter().map(|other| other.0).sum();
            let idle: u64 = others.iter().filter(|other| !other.1 && !other.2).map(|other| other.0).sum();
            let pins: u64 = others.iter().filter(|other| other.2).map(|other| other.0).sum();
            match budget.saturating_sub(used) {
                free if *need <= free => Room::Free,
                _ if used + need <= budget + idle => Room::Evict,
                _ if need + pins <= *budget => Room::Wait,
                _ => Room::Never,
            }
        };
        let (slot, room) = chosen(&nodes).unwrap();
        prop_assert_eq!(room, best(&fleet[slot]));
        prop_assert_eq!(Some(room), fleet.iter().map(best).min());
        let mut turned = nodes.clone();
        turned.rotate_left(turn % nodes.len());
        let (again, _) = chosen(&turned).unwrap();
        prop_assert_eq!(&turned[again].node, &nodes[slot].node, "two gateways choose one node");
    }
}
