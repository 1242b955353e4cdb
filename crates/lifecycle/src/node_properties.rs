//! Whatever comes in, and in whatever order, the rules of a node's life hold.
#![allow(clippy::unwrap_used)]
use proptest::prelude::*;
use words::{HandoffPolicy, IntentOrder, NodeState};

use super::tests::{LIFE, at, claim, rollout, rules};
use super::*;

#[derive(Clone, Debug)]
enum Input {
    Order { intent: usize, epoch_off: u64, life: bool, deadline: Option<u64>, handoff: usize, lease: Option<u64> },
    Release { lease: u64, ours: bool, prolong: bool },
    Activated,
    Unloaded,
    Upgraded,
    Canary(bool),
    Terminate,
    Crash,
    Time(u64),
}

fn input() -> impl Strategy<Value = Input> {
    let order = (0usize..4, 0u64..8, 0u8..8, proptest::option::of(0u64..900), 0usize..3, proptest::option::of(1u64..4));
    let order = order.prop_map(|(intent, off, life, deadline, handoff, lease)| Input::Order {
        intent,
        epoch_off: u64::from(off == 0),
        life: life > 0,
        deadline,
        handoff,
        lease,
    });
    prop_oneof![
        6 => order,
        2 => (1u64..4, any::<bool>(), any::<bool>())
            .prop_map(|(lease, ours, prolong)| Input::Release { lease, ours, prolong }),
        4 => Just(Input::Activated),
        3 => Just(Input::Unloaded),
        2 => Just(Input::Upgraded),
        2 => any::<bool>().prop_map(Input::Canary),
        1 => Just(Input::Terminate),
        1 => Just(Input::Crash),
        8 => (0u64..300).prop_map(Input::Time),
    ]
}

/// What an observer of the acts believes, to compare the machine with.
struct Witness {
    life: NodeLife,
    now: u64,
    disk: Record,
    door: Door,
    lives: u64,
    draining_since: Option<u64>,
    left: bool,
    lifted: bool,
}

const INTENTS: [Intent; 4] = [Intent::None, Intent::Cordon, Intent::Drain, Intent::Restart];
const HANDOFFS: [HandoffPolicy; 3] = [HandoffPolicy::Now, HandoffPolicy::Soft, HandoffPolicy::Never];

impl Witness {
    fn act(&mut self, acts: &[Act]) -> Result<(), TestCaseError> {
        for act in acts {
            match act {
                Act::Persist(record) => {
                    prop_assert!(record.epoch >= self.disk.epoch, "epochs never go back");
                    self.disk = (**record).clone();
                }
                Act::Admit(door) => self.door = door.clone(),
                Act::Publish => {
                    let durable = (&self.disk.intent, &self.disk.restart, self.disk.epoch);
                    let said = (&self.life.record.intent, &self.life.record.restart, self.life.record.epoch);
                    prop_assert_eq!(durable, said, "what is published is on disk");
                    let phase = match self.life.state() {
                        NodeState::Draining(phase) => Some(phase),
                        _ => None,
                    };
                    if phase.is_some_and(|phase| phase >= DrainPhase::Closed) {
                        prop_assert_eq!(&self.door, &Door::Nobody, "DR1: closed before it is published");
                    }
                }
                Act::Exit(_) => self.left = true,
                _ => {}
            }
        }
        prop_assert_eq!(&self.door, &self.life.door);
        Ok(())
    }

    fn rest(&mut self, facts: NodeFacts) -> Result<(), TestCaseError> {
        for round in 0.. {
            let acts = self.life.advance(at(self.now), &facts);
            if acts.is_empty() {
                break;
            }
            prop_assert!(round < 20, "it comes to rest");
            self.act(&acts)?;
        }
        prop_assert!(self.life.wake_at().is_none_or(|wake| wake > at(self.now)), "nothing is overdue at rest");
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn whatever_comes_in_the_rules_of_a_life_hold(
        inputs in proptest::collection::vec((input(), 0usize..3, 0usize..2), 1..120)
    ) {
        let life = NodeLife::start(LIFE, Record::default(), rules());
        let mut w = Witness {
            life, now: 0, disk: Record::default(), door: Door::Nobody, lives: 1,
            draining_since: None, left: false, lifted: false,
        };
        for (input, in_flight, unaware_gateways) in inputs {
            let facts = NodeFacts { in_flight, unaware_gateways, offers_open: 0 };
            let (before, was) = (w.life.clone(), w.life.state());
            w.lifted = false;
            match input {
                Input::Order { intent, epoch_off, life, deadline, handoff, lease } => {
                    let incarnation = life.then_some(w.life.incarnation);
                    let order = IntentOrder {
                        seen: Epoch(w.life.epoch().0.wrapping_sub(epoch_off)),
                        intent: INTENTS[intent],
                        incarnation,
                        deadline: deadline.map(Duration::from_secs),
                        handoff: HANDOFFS[handoff],
                        rollout: lease.map(|lease| claim(lease, lease == 2)),
                        upgrade: (intent == 3 && handoff == 1).then(|| "u".to_string()),
                    };
                    let newest = w.life.record.lease.as_ref().map(|(_, newest)| *newest);
                    match w.life.order(at(w.now), &order) {
                        Ok(acts) => {
                            prop_assert_eq!(epoch_off, 0, "a stale order changes nothing");
                            prop_assert!(lease.is_none_or(|lease| newest.is_none_or(|newest| lease >= newest)));
                            prop_assert!(intent != 3 || life, "a restart names its life");
                            prop_assert_eq!(w.life.epoch(), Epoch(before.epoch().0 + 1));
                            prop_assert!(matches!(before.leaving, None | Some(Leaving::Restart)));
                            prop_assert!(matches!(acts.first(), Some(Act::Persist(_))));
                            w.lifted = intent == 0;
                            w.act(&acts)?;
                        }
                        Err(_) => {
                            let changed = format!("{:?}", w.life) != format!("{before:?}");
                            prop_assert!(!changed, "a refused order changes nothing");
                        }
                    }
                }
                Input::Release { lease, ours, prolong } => {
                    let id = if ours { rollout() } else { RolloutId::new("x").unwrap() };
                    let prolong = prolong.then(|| Duration::from_secs(30));
                    if let Ok(acts) = w.life.release_hold(at(w.now), &id, lease, prolong) {
                        w.act(&acts)?;
                    }
                }
                Input::Activated => {
                    let acts = w.life.activated(at(w.now));
                    w.act(&acts)?;
                }
                Input::Unloaded => {
                    let acts = w.life.unloaded(at(w.now));
                    w.act(&acts)?;
                }
                Input::Upgraded => {
                    let outcome = UpgradeOutcome { name: "u".into(), ok: true, detail: String::new(), at: 0 };
                    let acts = w.life.upgraded(outcome);
                    w.act(&acts)?;
                }
                Input::Canary(right) => {
                    let answer = if right { Ok(()) } else { Err("wrong".to_string()) };
                    let acts = w.life.canary_answered(at(w.now), answer);
                    w.act(&acts)?;
                }
                Input::Terminate => {
                    let acts = w.life.terminate(at(w.now));
                    w.act(&acts)?;
                }
                Input::Crash => w.left = true,
                Input::Time(seconds) => {
                    // The shell never sleeps past the machine's own wake-up.
                    let wake = w.life.wake_at().map_or(u64::MAX, |wake| wake.elapsed().as_secs_f64().ceil() as u64);
                    w.now = (w.now + seconds).min(wake.max(w.now));
                }
            }
            w.rest(facts)?;
            let state = w.life.state();
            if let (NodeState::Draining(was), NodeState::Draining(now)) = (was, state) {
                prop_assert!(now >= was || w.lifted, "phases never go back");
            }
            if matches!(before.leaving, Some(Leaving::Signal { .. })) && !w.left {
                prop_assert!(w.life.is_leaving(), "nothing calls a signal off");
            }
            let open = w.life.admits(None);
            let shut = matches!(state, NodeState::Unloading | NodeState::Drained | NodeState::Stopped | NodeState::Held);
            prop_assert!(!open || !shut, "nothing is admitted there");
            prop_assert!(!w.life.takes_loads() || w.life.record.intent == Intent::None);
            // DR2: from its beginning to its end a drain takes its budget at most.
            let draining = matches!(state, NodeState::Draining(_) | NodeState::Unloading);
            w.draining_since = if draining { w.draining_since.or(Some(w.now)) } else { None };
            let longest = 900 + 2 + 30 + 60;
            prop_assert!(w.draining_since.is_none_or(|since| w.now - since <= longest), "DR2");
            if w.left {
                // The next life knows exactly what was on disk.
                w.lives += 1;
                let restarted = w.disk.restart.clone();
                let held = restarted.map_or(w.disk.hold.clone(), |restart| restart.claim);
                let incarnation = Incarnation { counter: w.lives, random: w.lives };
                w.life = NodeLife::start(incarnation, w.disk.clone(), rules());
                // What the restart became is written down at the next order; until then it reads the same again.
                w.disk = w.life.record.clone();
                prop_assert_eq!(w.life.hold.as_ref().map(|hold| &hold.claim), held.as_ref());
                (w.door, w.left, w.now, w.draining_since) = (Door::Nobody, false, 0, None);
            }
        }
    }
}
