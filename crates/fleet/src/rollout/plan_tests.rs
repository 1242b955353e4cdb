//! Rules of the plan, one by one.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use words::{Canary, Intent, ModelState, ModelStatus, NodeMemory, NodeState, UpgradeOutcome};

use super::kit::{Kit, TICK, gateway_id, model_id, node_id};
use super::{MaxUnavailable, Phase, Policy, Progress, Reason, Step, Wave, rehearse};

const M: &[&str] = &["m"];

fn three() -> Kit {
    Kit::new(&[("a", M), ("b", M), ("c", M)])
}

fn done(kit: &Kit) -> bool {
    kit.rollout.phase.over()
}

fn paused(kit: &Kit) -> bool {
    matches!(kit.rollout.phase, Phase::Paused { .. })
}

fn why(kit: &Kit) -> (Option<String>, &'static str) {
    match &kit.rollout.phase {
        Phase::Paused { node, why } => (node.as_ref().map(ToString::to_string), why.name()),
        other => panic!("not paused: {other:?}"),
    }
}

fn canary() -> Canary {
    Canary { model: model_id("m"), prompt: "which colour?".into(), answer: "blue".into() }
}

#[test]
fn a_plain_rollout_restarts_every_node_once_in_order_and_ends() {
    let mut kit = three();
    kit.until(120, done);
    assert_eq!(kit.rollout.phase, Phase::Done);
    assert_eq!(kit.restarted, [node_id("a"), node_id("b"), node_id("c")]);
}

#[test]
fn the_next_node_goes_only_after_the_last_was_healthy_for_ten_seconds() {
    let mut kit = three();
    kit.until(60, |kit| kit.progress("a") == "opened");
    let opened = kit.now;
    kit.until(60, |kit| kit.restarted.len() == 2);
    assert!(kit.now.since(opened) >= Duration::from_secs(10), "{:?}", kit.now.since(opened));
    assert!(kit.now.since(opened) <= Duration::from_secs(11));
}

#[test]
fn health_that_is_interrupted_is_counted_anew() {
    let mut kit = three();
    kit.until(60, |kit| kit.progress("a") == "opened");
    for _ in 0..32 {
        kit.tick();
    }
    kit.unseen.insert(0);
    for _ in 0..12 {
        kit.tick();
    }
    kit.unseen.clear();
    let seen_again = kit.now;
    kit.until(60, |kit| kit.progress("a") == "done");
    assert!(kit.now.since(seen_again) >= Duration::from_secs(10));
}

#[test]
fn a_rollout_that_would_take_the_last_replica_is_refused_and_names_the_models() {
    let kit = Kit::new(&[("a", &["m", "only"]), ("b", M)]);
    let error = rehearse(&kit.rollout.policy, &kit.world()).unwrap_err();
    assert!(error.message().contains("'only' would go dark"), "{error}");
    let kit = kit.policy(|policy| policy.allow_dark = [model_id("only")].into());
    let waves = rehearse(&kit.rollout.policy, &kit.world()).unwrap();
    assert_eq!(waves.len(), 2);
    assert_eq!(waves[0].left, [(model_id("m"), 1), (model_id("only"), 0)]);
}

#[test]
fn a_model_on_demand_is_not_taken_away_where_another_node_would_load_it() {
    let demand = |of: &[&str], loaded: &[&str]| three().on_demand("d", of, loaded);
    let mut kit = demand(&["a", "b"], &["a"]);
    let waves = rehearse(&kit.rollout.policy, &kit.world()).unwrap();
    assert_eq!(waves[0].left, [(model_id("d"), 1), (model_id("m"), 2)], "b would load it");
    kit.until(120, done);
    assert_eq!(kit.rollout.phase, Phase::Done, "and none waits for a model that nobody asks for");

    let refused = |kit: &Kit| rehearse(&kit.rollout.policy, &kit.world()).unwrap_err().message().to_string();
    assert!(refused(&demand(&["a"], &["a"])).contains("'d' would go dark"), "nobody else has it");
    let of_b = |change: &dyn Fn(&mut ModelStatus, &mut NodeMemory)| {
        let mut kit = demand(&["a", "b"], &["a"]);
        let status = &mut kit.worker("b").status;
        change(&mut status.models[1], &mut status.memory);
        kit.look();
        refused(&kit)
    };
    let full = of_b(&|model, memory| (model.card.memory_estimate, memory.budget) = (9, 5));
    assert!(full.contains("'d' would go dark"), "{full}");
    assert!(of_b(&|model, _| model.state = ModelState::Failed).contains("'d' would go dark"));
    let mut kit = demand(&["a", "b"], &["a"]);
    kit.worker("a").status.models[1].card.pinned = true;
    kit.look();
    assert!(refused(&kit).contains("'d' would go dark"), "what is pinned is meant to be there");
}

#[test]
fn who_would_load_a_model_does_not_leave_beside_who_had_it() {
    let two = |policy: &mut Policy| policy.max_unavailable = MaxUnavailable::Count(2);
    let kit = three().on_demand("d", &["a", "b"], &["a"]).policy(two);
    let waves = rehearse(&kit.rollout.policy, &kit.world()).unwrap();
    let names = |wave: &Wave| wave.nodes.iter().map(ToString::to_string).collect::<String>();
    assert_eq!(waves.iter().map(names).collect::<Vec<_>>(), ["ac", "b"]);
    let idle = three().on_demand("d", &["a", "b"], &[]).policy(two);
    let waves = rehearse(&idle.rollout.policy, &idle.world()).unwrap();
    assert_eq!(waves.iter().map(names).collect::<Vec<_>>(), ["ab", "c"], "nobody uses it");
}

#[test]
fn a_floor_of_two_wants_two_replicas_elsewhere() {
    let two = |policy: &mut Policy| policy.min_available.models = [(model_id("m"), 2)].into();
    let kit = Kit::new(&[("a", M), ("b", M)]).policy(two);
    let error = rehearse(&kit.rollout.policy, &kit.world()).unwrap_err();
    assert!(error.message().contains("1 replicas of 2"), "{error}");
    let mut kit = three().policy(two).policy(|policy| policy.max_unavailable = MaxUnavailable::Count(3));
    assert_eq!(rehearse(&kit.rollout.policy, &kit.world()).unwrap().len(), 3);
    kit.until(120, done);
}

#[test]
fn a_replica_counts_only_for_gateways_that_are_attached_to_it() {
    let mut kit = Kit::new(&[("a", M), ("b", M)]);
    kit.worker("b").status.gateways.remove(&gateway_id("g2"));
    kit.look();
    let error = rehearse(&kit.rollout.policy, &kit.world()).unwrap_err();
    assert!(error.message().contains("for gateway g2"), "{error}");
    for _ in 0..40 {
        assert_ne!(kit.tick().map(|step| step.node().clone()), Some(node_id("a")), "g2 has nobody else");
    }
    assert_eq!(kit.restarted, [node_id("b")], "g2 loses nothing by b, it has a");
}

#[test]
fn a_node_that_is_down_fills_the_place_of_those_that_may_be_out() {
    let mut kit = three();
    kit.unseen.insert(2);
    for _ in 0..12 {
        kit.tick();
    }
    let restarted = kit.restarted.len();
    let error = rehearse(&kit.rollout.policy, &kit.world()).unwrap_err();
    assert!(error.message().contains("these are: "), "{error}");
    for _ in 0..200 {
        kit.tick();
        assert!(kit.restarted.len() <= restarted.max(1));
    }
}

#[test]
fn a_rollout_waits_for_capacity_and_pauses_when_there_is_none_for_too_long() {
    let mut kit = three().policy(|policy| policy.blocked_max = Duration::from_secs(20));
    kit.cordon(1, Intent::Cordon);
    kit.cordon(2, Intent::Cordon);
    kit.until(30, paused);
    assert!(kit.restarted.is_empty());
    assert_eq!(why(&kit), (None, "blocked"));
    let Phase::Paused { why: Reason::Blocked { nodes }, .. } = &kit.rollout.phase else { panic!() };
    assert!(nodes[0].starts_with("a: ") && nodes[0].contains("'m' would go dark"), "{nodes:?}");
    kit.cordon(1, Intent::None);
    kit.cordon(2, Intent::None);
    kit.tick();
    let rollout = &mut kit.rollout.clone();
    rollout.resume(&kit.world()).unwrap();
    kit.rollout = rollout.clone();
    kit.until(120, done);
}

#[test]
fn a_cordoned_node_is_restarted_and_comes_back_cordoned() {
    let mut kit = three().policy(|policy| {
        policy.max_unavailable = MaxUnavailable::Count(2);
        policy.canary = Some(canary());
    });
    kit.cordon(1, Intent::Cordon);
    kit.until(180, done);
    assert_eq!(kit.rollout.phase, Phase::Done);
    assert_eq!(kit.restarted.len(), 3);
    let status = &kit.worker("b").status;
    assert_eq!((status.intent, status.state, status.incarnation.counter), (Intent::Cordon, NodeState::Ready, 2));
}

#[test]
fn a_percentage_is_of_the_fleet_and_never_less_than_one() {
    assert_eq!(MaxUnavailable::Percent(25).of(3), 1);
    assert_eq!(MaxUnavailable::Percent(50).of(6), 3);
    let names = ["a", "b", "c", "d", "e", "f"];
    let nodes: Vec<(&str, &[&str])> = names.iter().map(|name| (*name, M)).collect();
    let kit = Kit::new(&nodes).policy(|policy| policy.max_unavailable = MaxUnavailable::Percent(50));
    let waves = rehearse(&kit.rollout.policy, &kit.world()).unwrap();
    assert_eq!(waves.iter().map(|wave| wave.nodes.len()).collect::<Vec<_>>(), [3, 3]);
}

#[test]
fn a_wrong_canary_pauses_and_the_node_stays_held_until_it_is_right() {
    let mut kit = three().policy(|policy| policy.canary = Some(canary()));
    kit.worker("a").answer = "green".into();
    kit.until(60, paused);
    assert_eq!(why(&kit), (Some("a".into()), "canary_wrong"));
    for _ in 0..100 {
        assert_eq!(kit.tick(), None, "a paused rollout touches nothing");
    }
    assert_eq!(kit.worker("a").status.state, NodeState::Held);
    kit.worker("a").answer = "it is blue".into();
    let mut rollout = kit.rollout.clone();
    rollout.resume(&kit.world()).unwrap();
    kit.rollout = rollout;
    kit.until(120, done);
    assert_eq!(kit.restarted.len(), 3, "a was not restarted again");
}

#[test]
fn a_node_that_does_not_come_back_pauses_the_rollout_by_name() {
    let mut kit = three().policy(|policy| policy.back_within = Duration::from_secs(30));
    kit.worker("b").away = Duration::from_secs(100_000);
    kit.until(120, paused);
    assert_eq!(why(&kit), (Some("b".into()), "not_back"));
    assert_eq!(kit.restarted, [node_id("a"), node_id("b")], "c is not touched");
    // It comes back, late.
    let now = kit.now;
    kit.worker("b").back_at = Some(now);
    kit.tick();
    let mut rollout = kit.rollout.clone();
    rollout.resume(&kit.world()).unwrap();
    kit.rollout = rollout;
    kit.until(120, done);
    assert_eq!(kit.restarted.len(), 3);
}

#[test]
fn a_new_life_that_crashes_pauses_the_rollout() {
    let mut kit = three();
    kit.until(60, |kit| kit.progress("a") == "opened");
    let now = kit.now;
    kit.worker("a").crash(now, Duration::from_secs(3), true);
    kit.until(60, paused);
    assert_eq!(why(&kit), (Some("a".into()), "crashed"));
}

#[test]
fn a_model_that_fails_after_the_restart_pauses_the_rollout() {
    let mut kit = three();
    kit.until(60, |kit| kit.progress("a") == "back" || kit.progress("a") == "answered");
    let worker = kit.worker("a");
    worker.status.models[0].state = ModelState::Failed;
    worker.status.models[0].failure = Some("no memory".into());
    kit.until(60, paused);
    assert_eq!(why(&kit), (Some("a".into()), "model_failed"));
}

#[test]
fn a_failed_upgrade_pauses_and_resume_runs_it_again() {
    let mut kit = three().policy(|policy| policy.upgrade = Some("new".into()));
    let outcome = |ok, at| Some(UpgradeOutcome { name: "new".into(), ok, detail: "exit 1".into(), at });
    for name in ["a", "b", "c"] {
        kit.worker(name).status.upgrade = outcome(true, 5);
    }
    kit.until(60, paused);
    assert_eq!(why(&kit), (Some("a".into()), "upgrade_failed"), "an old outcome is none");
    kit.worker("a").status.upgrade = outcome(false, 6);
    kit.tick();
    let mut rollout = kit.rollout.clone();
    rollout.resume(&kit.world()).unwrap();
    kit.rollout = rollout;
    kit.until(5, |kit| kit.restarted.len() == 2);
    assert_eq!(kit.restarted, [node_id("a"), node_id("a")]);
}

#[test]
fn an_order_that_somebody_took_back_pauses_the_rollout() {
    let mut kit = three();
    kit.until(5, |kit| kit.progress("a") == "ordered");
    let worker = kit.worker("a");
    worker.status.intent = Intent::None;
    worker.status.state = NodeState::Ready;
    worker.status.epoch.0 += 1;
    kit.until(1, paused);
    assert_eq!(why(&kit), (Some("a".into()), "order_undone"));
}

#[test]
fn a_successor_goes_on_from_any_step_without_doing_one_twice() {
    for step in (0..240).step_by(3) {
        let mut kit = three().policy(|policy| policy.canary = Some(canary()));
        for _ in 0..step {
            kit.tick();
        }
        // The outcome of the last step is lost with the coordinator.
        kit.lose_next = true;
        kit.tick();
        kit.lose_next = false;
        kit.successor();
        kit.until(200, |kit| done(kit) || paused(kit));
        assert_eq!(kit.rollout.phase, Phase::Done, "took over at {step}");
        assert_eq!(kit.restarted.len(), 3, "took over at {step}");
        assert!(kit.workers.iter().all(|worker| worker.status.incarnation.counter == 2));
    }
}

#[test]
fn a_late_order_of_an_old_coordinator_is_refused_after_an_abort() {
    let mut kit = three();
    // The permit is stored; the coordinator stops before it sends the order.
    let plan = kit.plan();
    kit.rollout = plan.rollout;
    let late = plan.steps[0].clone();
    assert!(matches!(late, Step::Restart { .. }));
    kit.successor();
    kit.look();
    kit.rollout.abort().unwrap();
    kit.until(10, done);
    assert_eq!(kit.rollout.phase, Phase::Aborted);
    kit.perform(&late);
    assert!(kit.restarted.is_empty(), "the abort made it void");
}

#[test]
fn an_abort_lets_what_is_under_way_come_back_and_opens_it() {
    let mut kit = three().policy(|policy| policy.canary = Some(canary()));
    kit.worker("a").answer = "green".into();
    kit.until(60, paused);
    kit.rollout.abort().unwrap();
    kit.until(10, done);
    assert_eq!(kit.worker("a").status.state, NodeState::Ready, "its hold is opened");
    assert_eq!((kit.progress("b"), kit.progress("c")), ("skipped", "skipped"));
    let mut kit = three();
    kit.until(5, |kit| kit.progress("a") == "ordered");
    kit.rollout.abort().unwrap();
    kit.until(30, done);
    assert_eq!(kit.progress("a"), "done");
    assert_eq!(kit.worker("a").status.state, NodeState::Ready);
    assert_eq!(kit.restarted.len(), 1);
}

#[test]
fn an_abort_opens_what_is_held_and_was_to_be_restarted_once_more() {
    for permitted in [false, true] {
        let mut kit = three().policy(|policy| policy.upgrade = Some("new".into()));
        let failed = UpgradeOutcome { name: "new".into(), ok: false, detail: "no".into(), at: 6 };
        kit.worker("a").status.upgrade = Some(failed);
        kit.until(60, paused);
        let mut rollout = kit.rollout.clone();
        rollout.resume(&kit.world()).unwrap();
        kit.rollout = rollout;
        assert_eq!((kit.progress("a"), kit.worker("a").status.state), ("pending", NodeState::Held));
        if permitted {
            // The permit is stored, and the coordinator stops before it sends the order.
            kit.rollout = kit.plan().rollout;
            kit.successor();
        }
        kit.look();
        kit.rollout.abort().unwrap();
        kit.until(70, done);
        assert_eq!((kit.progress("a"), kit.worker("a").status.state), ("skipped", NodeState::Ready));
    }
}

#[test]
fn an_abort_ends_even_when_nobody_answers() {
    let mut kit = three();
    kit.until(5, |kit| kit.progress("a") == "ordered");
    kit.unseen = [0, 1, 2].into();
    kit.rollout.abort().unwrap();
    kit.until(2000, done);
    assert_eq!(kit.progress("a"), "failed");
}

#[test]
fn a_coordinator_that_slept_counts_all_its_waits_anew() {
    let mut kit = three().policy(|policy| policy.back_within = Duration::from_secs(30));
    kit.worker("a").away = Duration::from_secs(200);
    kit.until(10, |kit| kit.workers[0].back_at.is_some());
    for _ in 0..80 {
        kit.tick();
    }
    kit.now = kit.now + Duration::from_secs(60);
    kit.tick();
    assert_eq!(kit.rollout.phase, Phase::Running, "it knows nothing of that minute");
    kit.until(40, paused);
}

#[test]
fn pause_and_resume_keep_what_is_stored_consistent() {
    let mut kit = three();
    assert!(kit.rollout.clone().resume(&kit.world()).is_err());
    kit.until(5, |kit| kit.progress("a") == "ordered");
    kit.rollout.pause().unwrap();
    assert!(kit.rollout.pause().is_err());
    for _ in 0..200 {
        assert_eq!(kit.tick(), None);
    }
    assert_eq!(kit.restarted.len(), 1);
    let mut rollout = kit.rollout.clone();
    rollout.resume(&kit.world()).unwrap();
    kit.rollout = rollout;
    kit.until(200, done);
    assert_eq!(kit.restarted.len(), 3);
    assert!(kit.rollout.abort().is_err(), "what is done can't be aborted");
}

#[test]
fn a_rollout_survives_its_text() {
    let mut kit = three().policy(|policy| policy.canary = Some(canary()));
    kit.worker("a").answer = "green".into();
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..200 {
        let text = serde_json::to_string(&kit.rollout).unwrap();
        assert_eq!(serde_json::from_str::<super::Rollout>(&text).unwrap(), kit.rollout, "{text}");
        seen.insert(kit.progress("a"));
        kit.tick();
    }
    assert!(seen.contains("failed") && seen.contains("permitted") | seen.contains("ordered"), "{seen:?}");
    assert!(Progress::NAMES.contains(&kit.progress("b")));
    let _ = TICK;
}

#[test]
fn a_policy_without_sense_is_refused() {
    let kit = three();
    let refused = |change: &dyn Fn(&mut Policy)| {
        let mut policy = kit.rollout.policy.clone();
        change(&mut policy);
        rehearse(&policy, &kit.world()).unwrap_err().message().to_string()
    };
    assert!(refused(&|policy| policy.targets.clear()).contains("no node"));
    assert!(refused(&|policy| policy.targets.push(node_id("a"))).contains("twice"));
    assert!(refused(&|policy| policy.max_unavailable = MaxUnavailable::Count(0)).contains("nothing"));
    assert!(refused(&|policy| policy.max_unavailable = MaxUnavailable::Percent(101)).contains("100%"));
    assert!(refused(&|policy| policy.targets.push(node_id("z"))).contains("z: it is not heard from"));
}

#[test]
fn a_plan_for_two_hundred_nodes_takes_less_than_a_second_unoptimised() {
    let names: Vec<String> = (0..200).map(|i| format!("node-{i}")).collect();
    let models: Vec<String> = (0..10).map(|i| format!("model-{i}")).collect();
    let models: Vec<&str> = models.iter().map(String::as_str).collect();
    let nodes: Vec<(&str, &[&str])> = names.iter().map(|name| (name.as_str(), models.as_slice())).collect();
    let mut kit = Kit::new(&nodes).policy(|policy| policy.max_unavailable = MaxUnavailable::Percent(10));
    let begun = std::time::Instant::now();
    for _ in 0..10 {
        kit.rollout = kit.plan().rollout;
    }
    let each = begun.elapsed() / 10;
    assert!(each < Duration::from_secs(1), "a plan takes {each:?}");
}
