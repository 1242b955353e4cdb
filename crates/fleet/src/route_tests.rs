#![allow(clippy::unwrap_used)]
use std::time::Duration;

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use words::{Capabilities, Fingerprint, Generation, Incarnation, Intent, ModelLoad, ModelStatus, NodeStatus};

use super::*;
use crate::view::Observation;

fn model(state: ModelState, running: u32) -> ModelStatus {
    ModelStatus {
        state,
        harness: "fake".into(),
        context_length: 100,
        capabilities: Capabilities { chat: true, continuation: true },
        load: ModelLoad { running, max_running: 8, ..ModelLoad::default() },
        ..ModelStatus::absent(ModelId::new("m").unwrap())
    }
}

fn status(name: &str, state: NodeState, models: Vec<ModelStatus>) -> NodeStatus {
    let incarnation = Incarnation { counter: 1, random: name.len() as u64 };
    let status = NodeStatus::new(NodeId::new(name).unwrap(), incarnation);
    NodeStatus { state, data_address: format!("{name}:1"), models, ..status }
}

fn at(ms: u64) -> Moment {
    Moment::after_start(Duration::from_millis(ms))
}

fn view(statuses: Vec<Option<NodeStatus>>) -> FleetView {
    let mut view = FleetView::new((0..statuses.len()).map(|i| format!("c{i}")));
    for (i, status) in statuses.into_iter().enumerate() {
        if let Some(status) = status {
            view.observe(at(1000), Slot(i), status);
        }
    }
    view
}

fn go(view: &FleetView, tried: &[Slot], now: Moment) -> Route {
    let id = ModelId::new("m").unwrap();
    let query =
        RouteQuery { model: &id, tried, wait_until: at(1500), successor: None, placements: &Placements::default() };
    route(view, &query, |_| 0, now, &mut SmallRng::seed_from_u64(1))
}

fn slot(route: Route) -> usize {
    match route {
        Route::Forward(target) => target.slot.0,
        other => panic!("not forwarded: {other:?}"),
    }
}

fn code(route: Route) -> Code {
    match route {
        Route::Reject(error) => error.code(),
        other => panic!("not rejected: {other:?}"),
    }
}

#[test]
fn the_least_loaded_by_its_own_report_is_taken() {
    let ready = |name, running| Some(status(name, NodeState::Ready, vec![model(ModelState::Ready, running)]));
    let fleet = view(vec![ready("n", 5), ready("nn", 2), ready("nnn", 7)]);
    assert_eq!(slot(go(&fleet, &[], at(1100))), 1);
    assert_eq!(slot(go(&fleet, &[Slot(1)], at(1100))), 0);
}

#[test]
fn a_burst_between_two_reports_is_spread() {
    let ready = |name| Some(status(name, NodeState::Ready, vec![model(ModelState::Ready, 0)]));
    let fleet = view(vec![ready("a"), ready("bb")]);
    let id = ModelId::new("m").unwrap();
    let (mut sent, mut rng) = ([0u32; 2], SmallRng::seed_from_u64(3));
    for _ in 0..40 {
        let query = RouteQuery {
            model: &id,
            tried: &[],
            wait_until: at(0),
            successor: None,
            placements: &Placements::default(),
        };
        sent[slot(route(&fleet, &query, |s| sent[s.0], at(1100), &mut rng))] += 1;
    }
    assert_eq!(sent, [20, 20]);
}

#[test]
fn nothing_goes_to_a_node_that_is_not_ready_and_open() {
    use words::DrainPhase::*;
    for state in [
        NodeState::Activating,
        NodeState::Held,
        NodeState::Draining(Closed),
        NodeState::Draining(Force),
        NodeState::Drained,
        NodeState::Unloading,
        NodeState::Stopped,
        NodeState::Unknown,
    ] {
        let fleet = view(vec![Some(status("n", state, vec![model(ModelState::Ready, 0)]))]);
        assert_eq!(code(go(&fleet, &[], at(1600))), Code::NoReplica, "{state:?}");
    }
    let settling = status("s", NodeState::Draining(Settle), vec![model(ModelState::Ready, 0)]);
    let busy = status("busy", NodeState::Ready, vec![model(ModelState::Ready, 8)]);
    assert_eq!(slot(go(&view(vec![Some(settling.clone()), Some(busy)]), &[], at(1100))), 1);
    assert_eq!(slot(go(&view(vec![Some(settling)]), &[], at(1100))), 0);
}

#[test]
fn a_ready_node_with_an_intent_gets_nothing() {
    for intent in [Intent::Cordon, Intent::Drain, Intent::Restart] {
        let ready = status("n", NodeState::Ready, vec![model(ModelState::Ready, 0)]);
        let fleet = view(vec![Some(NodeStatus { intent, ..ready })]);
        assert_eq!(code(go(&fleet, &[], at(1600))), Code::NoReplica, "{intent:?}");
    }
}

#[test]
fn a_silent_or_lost_node_gets_no_new_route() {
    let mut fleet = view(vec![Some(status("n", NodeState::Ready, vec![model(ModelState::Ready, 0)]))]);
    assert_eq!(slot(go(&fleet, &[], at(3000))), 0);
    assert_eq!(code(go(&fleet, &[], at(3001))), Code::NoReplica);
    fleet.heard(at(3100), Slot(0));
    assert_eq!(slot(go(&fleet, &[], at(3200))), 0);
    fleet.lost(Slot(0));
    assert_eq!(code(go(&fleet, &[], at(3200))), Code::NoReplica);
}

#[test]
fn a_model_that_a_drained_or_starting_node_will_load_is_not_unknown() {
    for state in [NodeState::Drained, NodeState::Activating] {
        let fleet = view(vec![Some(status("n", state, vec![model(ModelState::Absent, 0)]))]);
        assert_eq!(code(go(&fleet, &[], at(1600))), Code::NoReplica);
        assert!(fleet.models().is_empty(), "nobody is told that it is there");
    }
}

#[test]
fn a_model_is_unknown_only_when_everyone_was_asked() {
    let other = || Some(status("n", NodeState::Ready, vec![]));
    assert_eq!(code(go(&view(vec![other(), other()]), &[], at(1100))), Code::ModelNotFound);
    let partial = view(vec![other(), None]);
    assert!(matches!(go(&partial, &[], at(1100)), Route::Wait(until) if until == at(1500)));
    assert_eq!(code(go(&partial, &[], at(1500))), Code::NoReplica);
}

#[test]
fn a_loading_model_is_waited_for_and_then_named() {
    let fleet = view(vec![Some(status("n", NodeState::Ready, vec![model(ModelState::Loading, 0)]))]);
    assert!(matches!(go(&fleet, &[], at(1100)), Route::Wait(_)));
    let Route::Reject(error) = go(&fleet, &[], at(1501)) else { panic!("not rejected") };
    assert_eq!(error.code(), Code::ModelLoading);
    assert_eq!(error.loading().map(|loading| loading.state), Some(ModelState::Loading));
}

fn on_demand(state: ModelState) -> ModelStatus {
    let card = words::ModelCard { on_demand: true, memory_estimate: 10, ..Default::default() };
    ModelStatus { card, ..model(state, 0) }
}

#[test]
fn a_request_brings_a_model_of_the_catalogue_and_follows_its_load() {
    let with = |name, model| Some(status(name, NodeState::Ready, vec![model]));
    let room = |route| match route {
        Route::Forward(target) => (target.slot.0, target.room),
        other => panic!("not forwarded: {other:?}"),
    };
    let fleet = view(vec![with("a", model(ModelState::Absent, 0)), with("bb", on_demand(ModelState::Absent))]);
    assert_eq!(room(go(&fleet, &[], at(1100))), (1, Some(Room::Free)));
    assert!(matches!(go(&fleet, &[Slot(1)], at(1100)), Route::Wait(_)), "it waits for a newer view");
    let fleet = view(vec![with("a", on_demand(ModelState::Absent)), with("bb", on_demand(ModelState::Warming))]);
    assert_eq!(room(go(&fleet, &[], at(1100))), (1, Some(Room::Coming)));
    assert!(matches!(go(&fleet, &[Slot(1)], at(1100)), Route::Wait(_)), "nor for a refusal of the one that loads it");
    let fleet = view(vec![with("a", on_demand(ModelState::Warming)), with("bb", on_demand(ModelState::Ready))]);
    assert_eq!(room(go(&fleet, &[], at(1100))), (1, None));
    assert!(matches!(go(&fleet, &[Slot(1)], at(1100)), Route::Wait(_)), "one that serves is not loaded again");
}

#[test]
fn a_model_that_failed_to_load_everywhere_is_refused_until_its_pause_is_over() {
    let failed = || Some(status("a", NodeState::Ready, vec![on_demand(ModelState::Failed)]));
    let fleet = view(vec![failed()]);
    let Route::Reject(error) = go(&fleet, &[], at(1100)) else { panic!("not rejected") };
    assert_eq!((error.code(), error.retry_after_seconds()), (Code::NoReplica, Some(10)));
    let other = Some(status("bb", NodeState::Ready, vec![on_demand(ModelState::Absent)]));
    assert_eq!(slot(go(&view(vec![failed(), other]), &[], at(1100))), 1);
}

#[test]
fn two_live_processes_under_one_name_get_nothing() {
    let mut one = status("n", NodeState::Ready, vec![model(ModelState::Ready, 0)]);
    let two = one.clone();
    one.incarnation.random = 99;
    let fleet = view(vec![Some(one), Some(two)]);
    assert!(fleet.nodes().all(|(_, node)| node.conflicted));
    assert_eq!(code(go(&fleet, &[], at(1600))), Code::NoReplica);
}

#[test]
fn a_worker_that_is_listed_twice_counts_once() {
    let same = || Some(status("n", NodeState::Ready, vec![model(ModelState::Ready, 0)]));
    let mut fleet = view(vec![same(), same(), same()]);
    let same_as = |fleet: &FleetView| fleet.nodes().map(|(_, node)| node.same_as).collect::<Vec<_>>();
    assert_eq!(same_as(&fleet), [None, Some(Slot(0)), Some(Slot(0))]);
    assert_eq!(fleet.replicas(at(1100)).into_values().collect::<Vec<_>>(), [1]);
    assert_eq!(slot(go(&fleet, &[], at(1100))), 0);
    assert!(fleet.nodes().all(|(_, node)| !node.conflicted));
    // Where the first address is not heard from any more, the next one is the worker's.
    fleet.lost(Slot(0));
    fleet.observe(at(5000), Slot(1), same().unwrap());
    assert_eq!(slot(go(&fleet, &[], at(5100))), 1);
}

#[test]
fn an_older_word_changes_nothing() {
    let mut fleet = view(vec![None]);
    let mut new = status("n", NodeState::Draining(DrainPhase::Closed), vec![]);
    new.generation = Generation(5);
    let old = status("n", NodeState::Ready, vec![]);
    assert_eq!(fleet.observe(at(1), Slot(0), new.clone()), Observation::Fresh { changed: true });
    assert_eq!(fleet.observe(at(2), Slot(0), old.clone()), Observation::Stale);
    assert_eq!(fleet.observe(at(3), Slot(0), new.clone()), Observation::Fresh { changed: false });
    let mut reborn = old;
    reborn.incarnation = Incarnation { counter: 2, random: 7 };
    assert_eq!(fleet.observe(at(4), Slot(0), reborn), Observation::Fresh { changed: true });
    assert_eq!(fleet.observe(at(5), Slot(0), new), Observation::Stale);
}

proptest! {
    #[test]
    fn a_route_never_goes_where_it_must_not(
        nodes in proptest::collection::vec((0u8..4, 0u32..9, 0u64..4000), 0..6), now in 0u64..6000, seed: u64
    ) {
        let mut fleet = FleetView::new((0..nodes.len()).map(|i| i.to_string()));
        for (i, (state, running, heard)) in nodes.iter().enumerate() {
            let state = [NodeState::Ready, NodeState::Activating, NodeState::Unloading, NodeState::Unknown][*state as usize];
            let name = "n".repeat(i + 1);
            fleet.observe(at(*heard), Slot(i), status(&name, state, vec![model(ModelState::Ready, *running)]));
        }
        let id = ModelId::new("m").unwrap();
        let query = RouteQuery { model: &id, tried: &[Slot(0)], wait_until: at(0), successor: None, placements: &Placements::default() };
        if let Route::Forward(target) = route(&fleet, &query, |_| 0, at(now), &mut SmallRng::seed_from_u64(seed)) {
            let (state, running, heard) = nodes[target.slot.0];
            prop_assert!(state == 0 && now.saturating_sub(heard) <= 2000 && target.slot != Slot(0), "RT1");
            let fresher = |(i, n): (usize, &(u8, u32, u64))| i > 0 && n.0 == 0 && now.saturating_sub(n.2) <= 2000 && n.1 < running;
            prop_assert!(!nodes.iter().enumerate().any(fresher), "a less loaded node was passed over");
        }
    }
}

#[test]
fn a_continuation_goes_to_an_equal_worker_best_to_an_exact_one_that_was_restarted_already() {
    let id = ModelId::new("m").unwrap();
    let print = |byte| Fingerprint([byte; 32]);
    let node = |name: &str, like: u8, exact: u8, running: u32, rollout: Option<&str>| {
        let fingerprints = ModelStatus {
            continue_fingerprint: print(like),
            exact_fingerprint: print(exact),
            ..model(ModelState::Ready, running)
        };
        let status = status(name, NodeState::Ready, vec![fingerprints]);
        Some(NodeStatus { rollout: rollout.map(|id| words::RolloutId::new(id).unwrap()), ..status })
    };
    let all = [
        node("other", 9, 9, 0, Some("r")),
        node("like", 1, 3, 0, None),
        node("like-new", 1, 3, 6, Some("r")),
        node("exact", 1, 2, 0, None),
        node("exact-new", 1, 2, 6, Some("r")),
    ];
    let successor = Successor {
        continue_fingerprint: print(1),
        exact_fingerprint: print(2),
        rollout: Some(words::RolloutId::new("r").unwrap()),
    };
    let go = |count: usize| {
        let query = RouteQuery {
            model: &id,
            tried: &[],
            wait_until: at(0),
            successor: Some(&successor),
            placements: &Placements::default(),
        };
        let view = view(all[..count].to_vec());
        match route(&view, &query, |_| 0, at(1000), &mut SmallRng::seed_from_u64(1)) {
            Route::Forward(target) => target.node.to_string(),
            Route::Reject(error) => error.code().row().code.to_string(),
            Route::Wait(_) => "wait".to_string(),
        }
    };
    let chosen: Vec<String> = (1..=5).map(go).collect();
    assert_eq!(chosen, ["no_replica_available", "like", "like-new", "exact", "exact-new"]);
}

#[test]
fn a_model_that_is_known_has_as_many_replicas_as_take_requests_for_it() {
    let on = |name, state, model_state| Some(status(name, state, vec![model(model_state, 0)]));
    let id = ModelId::new("m").unwrap();
    let ready = on("a", NodeState::Ready, ModelState::Ready);
    for (other, count) in [
        (on("bb", NodeState::Ready, ModelState::Ready), 2),
        (on("bb", NodeState::Ready, ModelState::Loading), 1),
        (on("bb", NodeState::Drained, ModelState::Ready), 1),
        (None, 1),
    ] {
        assert_eq!(view(vec![ready.clone(), other]).replicas(at(1100)).get(&id), Some(&count));
    }
    let absent = view(vec![on("a", NodeState::Drained, ModelState::Absent)]);
    assert_eq!(absent.replicas(at(1100)).get(&id), Some(&0), "none, and still known");
    assert_eq!(view(vec![ready]).replicas(at(9000)).get(&id), Some(&0), "a silent worker takes nothing");
    assert_eq!(view(vec![None]).replicas(at(1100)).get(&id), None);
}
