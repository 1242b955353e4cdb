//! The rules of a node's life, one by one.
#![allow(clippy::unwrap_used)]
use words::{Code, HandoffPolicy, IntentOrder, ModelId, NodeId, NodeState, NodeStatus};

use super::*;

pub(super) fn rules() -> NodeRules {
    let seconds = Duration::from_secs;
    let drain = DrainBudget {
        settle_max: seconds(2),
        handoff: Some(seconds(120)),
        deadline: seconds(600),
        cut_max: seconds(2),
    };
    NodeRules { drain, unload_max: seconds(30), upgrade_max: seconds(60), durable: true }
}

pub(super) fn at(seconds: u64) -> Moment {
    Moment::after_start(Duration::from_secs(seconds))
}

pub(super) const LIFE: Incarnation = Incarnation { counter: 1, random: 11 };

pub(super) fn rollout() -> RolloutId {
    RolloutId::new("r").unwrap()
}

pub(super) fn claim(lease_revision: u64, canary: bool) -> RolloutClaim {
    let canary = canary.then(|| Canary { model: ModelId::new("m").unwrap(), prompt: "2+2".into(), answer: "4".into() });
    RolloutClaim { id: rollout(), lease_revision, hold_ttl_ms: 60_000, canary }
}

fn ready(record: Record) -> NodeLife {
    let mut life = NodeLife::start(LIFE, record, rules());
    life.activated(at(0));
    life
}

fn order(life: &NodeLife, intent: Intent) -> IntentOrder {
    IntentOrder { seen: life.epoch(), intent, incarnation: Some(LIFE), ..IntentOrder::default() }
}

/// Orders and then advances until nothing more happens.
fn give(life: &mut NodeLife, now: Moment, intent: Intent, facts: NodeFacts) -> Vec<Act> {
    let order = order(life, intent);
    let mut acts = life.order(now, &order).unwrap();
    acts.extend(run(life, now, facts));
    acts
}

fn run(life: &mut NodeLife, now: Moment, facts: NodeFacts) -> Vec<Act> {
    let mut acts = Vec::new();
    for _ in 0..20 {
        let more = life.advance(now, &facts);
        if more.is_empty() {
            return acts;
        }
        acts.extend(more);
    }
    panic!("it never comes to rest: {acts:?}");
}

fn busy(in_flight: usize) -> NodeFacts {
    NodeFacts { in_flight, ..NodeFacts::default() }
}

fn status(life: &NodeLife, now: Moment) -> NodeStatus {
    let mut status = NodeStatus::new(NodeId::new("n").unwrap(), LIFE);
    life.show(now, &mut status);
    status
}

#[test]
fn a_drained_node_is_empty_and_alive_and_comes_back_when_undrained() {
    let mut life = ready(Record::default());
    let settling = NodeFacts { in_flight: 1, unaware_gateways: 2, offers_open: 0 };
    let acts = give(&mut life, at(1), Intent::Drain, settling);
    assert!(matches!(&acts[..], [Act::Persist(record), Act::Publish] if record.intent == Intent::Drain));
    assert!(life.admits(None), "it still accepts while gateways learn");
    let shown = status(&life, at(2));
    assert_eq!(
        (shown.state, shown.intent, shown.epoch),
        (NodeState::Draining(DrainPhase::Settle), Intent::Drain, Epoch(1))
    );
    assert_eq!(shown.drain.unwrap().waiting_for, "2 gateways to know");
    assert_eq!(run(&mut life, at(2), busy(1)), [Act::Admit(Door::Nobody), Act::HandBack, Act::Publish]);
    assert!(!life.admits(None) && !life.takes_loads());
    assert_eq!(run(&mut life, at(3), busy(0)), [Act::Publish, Act::Unload]);
    assert_eq!(life.unloaded(at(4)), [Act::Publish]);
    assert_eq!(life.state(), NodeState::Drained);
    assert!(!life.takes_loads(), "on-demand loads are refused too");
    let acts = give(&mut life, at(9), Intent::None, busy(0));
    assert!(matches!(&acts[..], [Act::Persist(_), Act::Withdraw, Act::Reopen, Act::Publish, Act::Load]), "{acts:?}");
    assert_eq!(life.state(), NodeState::Activating);
    assert_eq!(life.activated(at(12)), [Act::Admit(Door::All), Act::Publish]);
    assert!(life.state() == NodeState::Ready && life.takes_loads());
}

#[test]
fn streams_are_offered_at_the_soft_deadline_and_cut_at_the_hard_one() {
    let mut life = ready(Record::default());
    give(&mut life, at(0), Intent::Drain, busy(9));
    assert_eq!(run(&mut life, at(119), busy(9)), []);
    let offer = Act::Offer { open_at_most: OFFERS_MAX };
    assert_eq!(run(&mut life, at(120), busy(9)), [Act::Publish, offer.clone()]);
    assert_eq!(life.wake_at(), Some(at(121)));
    assert_eq!(run(&mut life, at(120), busy(8)), std::slice::from_ref(&offer), "a stream that ends makes room");
    assert_eq!(run(&mut life, at(121), busy(8)), [offer]);
    assert_eq!(run(&mut life, at(600), busy(8)), [Act::Cut, Act::Publish]);
    assert_eq!(run(&mut life, at(602), busy(8)), [Act::Publish, Act::Unload], "the flush is bounded");
}

#[test]
fn a_shorter_deadline_moves_the_hand_over_with_it() {
    for (handoff, first) in
        [(HandoffPolicy::Soft, Some(6)), (HandoffPolicy::Now, Some(0)), (HandoffPolicy::Never, None)]
    {
        let mut life = ready(Record::default());
        let order = IntentOrder { deadline: Some(Duration::from_secs(30)), handoff, ..order(&life, Intent::Drain) };
        life.order(at(0), &order).unwrap();
        let mut offered = |now| run(&mut life, at(now), busy(1)).iter().any(|act| matches!(act, Act::Offer { .. }));
        assert_eq!((0..30).find(|now| offered(*now)), first, "{handoff:?}");
        assert!(run(&mut life, at(30), busy(1)).contains(&Act::Cut));
    }
}

#[test]
fn a_cordon_lets_running_work_and_models_alone_and_outlives_the_process() {
    let mut life = ready(Record::default());
    let acts = give(&mut life, at(1), Intent::Cordon, NodeFacts { in_flight: 3, unaware_gateways: 1, offers_open: 0 });
    let record = match &acts[..] {
        [Act::Persist(record), Act::Publish] => (**record).clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(run(&mut life, at(3), busy(3)), [Act::Admit(Door::Nobody), Act::Publish]);
    assert_eq!(run(&mut life, at(100_000), busy(3)), [], "there is no deadline");
    assert_eq!((life.state(), life.intent(), life.takes_loads()), (NodeState::Ready, Intent::Cordon, false));
    let mut next = NodeLife::start(Incarnation { counter: 2, random: 5 }, record, rules());
    assert!(next.loads_defaults(), "a cordon keeps its models");
    assert_eq!(next.activated(at(0)), [Act::Publish]);
    assert!(!next.admits(None));
    let lift = IntentOrder { seen: next.epoch(), ..IntentOrder::default() };
    assert!(next.order(at(1), &lift).unwrap().contains(&Act::Admit(Door::All)));
}

#[test]
fn a_drain_outlives_the_process_and_the_next_life_loads_nothing() {
    let record = Record { epoch: Epoch(4), intent: Intent::Drain, ..Record::default() };
    let mut life = NodeLife::start(LIFE, record, rules());
    assert!(!life.loads_defaults());
    assert_eq!(life.activated(at(0)), [Act::Publish]);
    assert_eq!(life.state(), NodeState::Drained);
    assert_eq!(give(&mut life, at(1), Intent::Restart, busy(0))[1..], [Act::Publish, Act::Unload]);
    assert_eq!(life.unloaded(at(2)), [Act::Publish, Act::Exit(ExitKind::Clean)]);
}

#[test]
fn a_restart_ends_the_process_and_dies_with_its_life() {
    let mut life = ready(Record::default());
    let foreign =
        IntentOrder { incarnation: Some(Incarnation { counter: 0, random: 1 }), ..order(&life, Intent::Restart) };
    assert_eq!(life.order(at(0), &foreign).unwrap_err().code(), Code::Conflict);
    assert_eq!(life.order(at(0), &IntentOrder { incarnation: None, ..foreign }).unwrap_err().code(), Code::Conflict);
    let acts = give(&mut life, at(1), Intent::Restart, busy(0));
    assert_eq!(acts.last(), Some(&Act::Unload));
    assert!(life.exit_by().is_some());
    assert_eq!(life.unloaded(at(2)), [Act::Publish, Act::Exit(ExitKind::Clean)]);
    let mut next = NodeLife::start(Incarnation { counter: 2, random: 1 }, life.record().clone(), rules());
    next.activated(at(0));
    assert_eq!((next.state(), next.intent()), (NodeState::Ready, Intent::None));
}

#[test]
fn an_upgrade_runs_once_unloaded_and_its_failure_does_not_stop_the_restart() {
    let mut life = ready(Record::default());
    let with = |intent| IntentOrder { upgrade: Some("rpm".into()), ..order(&life, intent) };
    let (wrong, right) = (with(Intent::Drain), with(Intent::Restart));
    assert_eq!(life.order(at(0), &wrong).unwrap_err().code(), Code::InvalidRequest);
    life.order(at(0), &right).unwrap();
    run(&mut life, at(0), busy(0));
    assert_eq!(life.unloaded(at(1)), [Act::Publish, Act::Upgrade("rpm".into())]);
    let outcome = UpgradeOutcome { name: "rpm".into(), ok: false, detail: "exit 1".into(), at: 7 };
    let acts = life.upgraded(outcome.clone());
    assert!(matches!(&acts[..], [Act::Persist(_), Act::Publish, Act::Exit(ExitKind::Clean)]));
    let next = ready(life.record().clone());
    assert_eq!(status(&next, at(0)).upgrade, Some(outcome));
}

fn held(canary: bool) -> NodeLife {
    let mut life = ready(Record::default());
    let order = IntentOrder { rollout: Some(claim(3, canary)), ..order(&life, Intent::Restart) };
    life.order(at(0), &order).unwrap();
    // A crash before the exit: the record is all that is left.
    let mut next = NodeLife::start(Incarnation { counter: 2, random: 2 }, life.record().clone(), rules());
    assert_eq!(next.activated(at(10)), [Act::Admit(Door::Canary(rollout())), Act::Publish]);
    next
}

#[test]
fn the_life_after_a_rollouts_restart_is_held_until_its_coordinator_opens_it() {
    let mut life = held(true);
    assert_eq!(life.state(), NodeState::Held);
    let other = RolloutId::new("other").unwrap();
    assert!(!life.admits(None) && !life.admits(Some(&other)) && life.admits(Some(&rollout())));
    assert_eq!(status(&life, at(20)).hold.unwrap().ttl_ms, 50_000);
    assert_eq!(life.release_hold(at(20), &rollout(), 2, None).unwrap_err().code(), Code::Conflict);
    assert_eq!(life.release_hold(at(20), &other, 9, None).unwrap_err().code(), Code::Conflict);
    assert!(!life.release_hold(at(60), &rollout(), 4, Some(Duration::from_secs(60))).unwrap().is_empty());
    assert_eq!(run(&mut life, at(119), busy(0)), [], "a prolonged hold waits longer");
    let acts = life.release_hold(at(119), &rollout(), 4, None).unwrap();
    assert!(matches!(&acts[..], [Act::Persist(record), Act::Admit(Door::All), Act::Publish] if record.hold.is_none()));
    assert_eq!(life.state(), NodeState::Ready);
    assert_eq!(life.release_hold(at(120), &rollout(), 5, None).unwrap(), [], "it is open already");
    assert_eq!(status(&life, at(120)).rollout, Some(rollout()), "it still says who started it");
}

#[test]
fn a_hold_that_nobody_looks_after_opens_by_a_right_answer_only() {
    let mut life = held(true);
    let mut now = 70;
    let mut pauses = Vec::new();
    for _ in 0..12 {
        let acts = run(&mut life, at(now), busy(0));
        assert!(matches!(&acts[..], [Act::Publish, Act::RunCanary(_)]), "{acts:?}");
        assert_eq!(life.canary_answered(at(now), Err("it says 5".into())), [Act::Publish]);
        assert!(status(&life, at(now)).drain.unwrap().waiting_for.contains("it says 5"));
        assert!(!life.admits(None));
        let again = life.wake_at().unwrap().since(at(now)).as_secs();
        pauses.push(again);
        now += again;
    }
    assert_eq!((pauses[0], pauses[1], pauses[11]), (5, 10, CANARY_AGAIN_MAX.as_secs()), "the back-off is bounded");
    run(&mut life, at(now), busy(0));
    assert_eq!(run(&mut life, at(now) + CANARY_MAX, busy(0)), [Act::Publish], "no answer is no right answer");
    let now = life.wake_at().unwrap();
    run(&mut life, now, busy(0));
    assert!(life.canary_answered(now, Ok(())).contains(&Act::Admit(Door::All)));
    let mut life = held(false);
    assert!(run(&mut life, at(70), busy(0)).contains(&Act::Admit(Door::All)), "without a canary it opens at its time");
}

#[test]
fn a_held_life_that_is_restarted_is_held_again() {
    let mut life = held(true);
    let this = Incarnation { counter: 2, random: 2 };
    let order = IntentOrder { incarnation: Some(this), ..order(&life, Intent::Restart) };
    life.order(at(20), &order).unwrap();
    let next = NodeLife::start(Incarnation { counter: 3, random: 3 }, life.record().clone(), rules());
    assert!(next.hold.is_some());
    life.release_hold(at(21), &rollout(), 9, None).unwrap();
    let next = NodeLife::start(Incarnation { counter: 3, random: 3 }, life.record().clone(), rules());
    assert!(next.hold.is_none(), "an abort takes the claim on the next life back");
}

#[test]
fn a_node_that_is_held_and_cordoned_is_cordoned_once_opened() {
    let mut life = held(true);
    let order = IntentOrder { seen: life.epoch(), intent: Intent::Cordon, ..IntentOrder::default() };
    life.order(at(11), &order).unwrap();
    run(&mut life, at(11), busy(0));
    assert!(life.admits(Some(&rollout())) && !life.admits(None));
    life.release_hold(at(12), &rollout(), 3, None).unwrap();
    assert!(!life.admits(Some(&rollout())) && !life.admits(None));
    assert_eq!((life.state(), life.intent()), (NodeState::Ready, Intent::Cordon));
}

#[test]
fn a_signal_always_wins_and_the_second_one_cuts() {
    let mut life = ready(Record::default());
    give(&mut life, at(0), Intent::Drain, busy(2));
    assert_eq!(life.terminate(at(500)), [Act::Publish]);
    assert!(life.exit_by().unwrap() <= at(632), "a signal never puts a drain's end off");
    let lift = order(&life, Intent::None);
    assert_eq!(life.order(at(501), &lift).unwrap_err().code(), Code::Conflict, "nothing lifts it");
    assert_eq!(life.terminate(at(501)), []);
    assert_eq!(run(&mut life, at(501), busy(2)), [Act::Cut, Act::Publish]);
    assert_eq!(run(&mut life, at(501), busy(0)), [Act::Publish, Act::Unload]);
    assert_eq!(life.unloaded(at(502)), [Act::Publish, Act::Exit(ExitKind::StreamsCut)]);
    assert_eq!(life.record().intent, Intent::Drain, "the drain stays recorded");
}

#[test]
fn a_drain_during_the_activation_empties_and_an_undrain_begins_it_again() {
    let mut life = NodeLife::start(LIFE, Record::default(), rules());
    let acts = give(&mut life, at(1), Intent::Drain, busy(0));
    assert_eq!(acts.last(), Some(&Act::Unload));
    assert_eq!(life.activated(at(1)), [], "an activation that was called off says nothing");
    let lift = order(&life, Intent::None);
    assert_eq!(life.order(at(2), &lift).unwrap_err().code(), Code::Conflict, "not while it unloads");
    life.unloaded(at(2));
    assert_eq!(life.order(at(3), &lift).unwrap().last(), Some(&Act::Load));
}

#[test]
fn what_could_not_be_remembered_is_refused() {
    let mut life = NodeLife::start(LIFE, Record::default(), NodeRules { durable: false, ..rules() });
    life.activated(at(0));
    for intent in [Intent::Cordon, Intent::Drain] {
        let order = order(&life, intent);
        assert_eq!(life.order(at(1), &order).unwrap_err().code(), Code::InvalidRequest);
    }
    let held = IntentOrder { rollout: Some(claim(1, false)), ..order(&life, Intent::Restart) };
    assert_eq!(life.order(at(1), &held).unwrap_err().code(), Code::InvalidRequest);
    let plain = order(&life, Intent::Restart);
    assert_eq!(life.order(at(1), &plain).unwrap(), [Act::Publish], "a plain restart needs no memory");
}

#[test]
fn a_record_survives_its_text_and_an_older_one_is_read() {
    let record = held(true).record().clone();
    let text = serde_json::to_string(&record).unwrap();
    assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record);
    assert_eq!(serde_json::from_str::<Record>("{\"epoch\":3,\"of_tomorrow\":1}").unwrap().epoch, Epoch(3));
    assert!(serde_json::from_str::<Record>("{\"intent\":\"of_tomorrow\"}").is_err(), "nothing is guessed");
}
