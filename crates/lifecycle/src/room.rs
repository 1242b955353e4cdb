//! Room for a model: what has to go before it fits, decided by memory alone.

use words::{ModelId, Moment};

/// Models that are named where there is no room.
const NAMED_MAX: usize = 8;

/// A model that holds memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Which.
    pub model: ModelId,
    /// How much: as measured, or as set aside while it loads. In bytes.
    pub bytes: u64,
    /// It has work, or is on its way in.
    pub in_use: bool,
    /// It is on its way out: its memory comes back by itself.
    pub leaving: bool,
    /// It is never evicted.
    pub pinned: bool,
    /// Of two that could go the lower one does.
    pub priority: i32,
    /// When its last request ended.
    pub idle_since: Moment,
}

/// What is to be done for a model that needs memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Room {
    /// There is room now.
    Fits,
    /// There is room once these are gone.
    Evict(Vec<ModelId>),
    /// There will be room once models that are in use are idle, or those that leave are gone.
    Wait,
    /// There can't be room, whatever models do.
    Never,
}

/// Says how `need` bytes find room in `budget`, of which `held` hold a part; a budget of 0 is unknown, and everything
/// fits. `evict` says whether models may be evicted for it.
///
/// Only models without work and without a pin are evicted: those of the lowest priority first, and of these the least
/// recently used, of equals the smaller ones; and none that could stay.
pub fn room(held: &[Held], budget: u64, need: u64, evict: bool) -> Room {
    let sum = |which: &dyn Fn(&Held) -> bool| -> u64 {
        held.iter().filter(|model| which(model)).fold(0, |sum: u64, model| sum.saturating_add(model.bytes))
    };
    let free = budget.saturating_sub(sum(&|_| true));
    if budget == 0 || need <= free {
        return Room::Fits;
    }
    let stays = if evict { sum(&|model| model.pinned && !model.leaving) } else { sum(&|model| !model.leaving) };
    if need > budget.saturating_sub(stays) {
        return Room::Never;
    }
    // Memory may be held beyond the budget: what is missing counts from what is held.
    let missing = sum(&|_| true).saturating_add(need) - budget;
    if sum(&|model| model.leaving) >= missing {
        return Room::Wait;
    }
    let mut idle: Vec<&Held> =
        held.iter().filter(|model| !(model.in_use || model.leaving || model.pinned || model.bytes == 0)).collect();
    idle.sort_by_key(|model| (model.priority, model.idle_since, model.bytes, model.model.clone()));
    let mut going = sum(&|model| model.leaving);
    let mut chosen = Vec::new();
    for model in idle {
        if going >= missing {
            break;
        }
        going += model.bytes;
        chosen.push(model);
    }
    if going < missing {
        return Room::Wait;
    }
    // What came first may not be needed beside what came later; the most recently used of these stays.
    for i in (0..chosen.len()).rev() {
        if going - chosen[i].bytes >= missing {
            going -= chosen[i].bytes;
            chosen.remove(i);
        }
    }
    Room::Evict(chosen.into_iter().map(|model| model.model.clone()).collect())
}

/// Says in numbers why there is no room, for whoever asked.
pub fn no_room(model: &ModelId, held: &[Held], budget: u64, need: u64) -> String {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let used = held.iter().fold(0, |sum: u64, model| sum.saturating_add(model.bytes));
    let mut text = format!(
        "'{model}' needs {} MiB; models may take {} MiB on this worker, and {} MiB are taken",
        mib(need),
        mib(budget),
        mib(used)
    );
    let mut largest: Vec<&Held> = held.iter().filter(|model| model.bytes > 0).collect();
    largest.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.model.cmp(&b.model)));
    for (i, held) in largest.iter().take(NAMED_MAX).enumerate() {
        let how = match held {
            Held { leaving: true, .. } => "leaving",
            Held { pinned: true, .. } => "pinned",
            Held { in_use: true, .. } => "in use",
            _ => "idle",
        };
        text += &format!("{} '{}' {} MiB, {how}", if i == 0 { ":" } else { "," }, held.model, mib(held.bytes));
    }
    if largest.len() > NAMED_MAX {
        text += &format!(" and {} more", largest.len() - NAMED_MAX);
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn model(name: &str, bytes: u64, idle_since: u64) -> Held {
        Held {
            model: ModelId::new(name).unwrap(),
            bytes,
            in_use: false,
            leaving: false,
            pinned: false,
            priority: 0,
            idle_since: Moment::after_start(Duration::from_secs(idle_since)),
        }
    }

    fn names(room: Room) -> String {
        match room {
            Room::Evict(models) => models.iter().map(ModelId::as_str).collect(),
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn the_least_recently_used_goes_first_and_lower_priority_before_it() {
        let mut held = vec![model("a", 4, 3), model("b", 4, 1), model("c", 4, 2)];
        assert_eq!(names(room(&held, 12, 4, true)), "b");
        assert_eq!(names(room(&held, 12, 8, true)), "bc");
        held[0].priority = -1;
        assert_eq!(names(room(&held, 12, 4, true)), "a");
        held[0].priority = 1;
        assert_eq!(names(room(&held, 12, 12, true)), "bca");
    }

    #[test]
    fn what_need_not_go_stays_though_it_was_used_longer_ago() {
        let held = [model("small", 1, 1), model("large", 8, 2)];
        assert_eq!(names(room(&held, 10, 9, true)), "large");
    }

    #[test]
    fn work_and_pins_keep_a_model_and_what_can_never_fit_is_said_at_once() {
        let busy = Held { in_use: true, ..model("a", 6, 1) };
        let pinned = Held { pinned: true, ..model("b", 4, 1) };
        assert_eq!(room(std::slice::from_ref(&busy), 10, 6, true), Room::Wait);
        assert_eq!(room(std::slice::from_ref(&busy), 10, 6, false), Room::Never);
        assert_eq!(room(&[busy.clone(), pinned.clone()], 10, 6, true), Room::Wait);
        assert_eq!(room(std::slice::from_ref(&pinned), 10, 7, true), Room::Never);
        assert_eq!(room(&[], 10, 11, true), Room::Never);
        assert_eq!(room(&[pinned, model("c", 100, 1)], 0, 1 << 40, true), Room::Fits, "an unknown budget");
        let leaving = Held { leaving: true, ..model("a", 6, 1) };
        assert_eq!(room(&[leaving, model("b", 4, 1)], 10, 6, true), Room::Wait, "enough comes back by itself");
        let words = no_room(&ModelId::new("big").unwrap(), &[Held { bytes: 6 << 20, ..busy }], 10 << 20, 11 << 20);
        assert_eq!(
            words,
            "'big' needs 11 MiB; models may take 10 MiB on this worker, and 6 MiB are taken: 'a' 6 MiB, in use"
        );
    }

    fn fleets() -> impl Strategy<Value = Vec<Held>> {
        let one = (0u64..12, 0u64..5, 0u8..8, -1i32..2);
        proptest::collection::vec(one, 0..8).prop_map(|models| {
            let make = |(i, (bytes, since, flags, priority)): (usize, (u64, u64, u8, i32))| Held {
                in_use: flags == 1 || flags == 2,
                leaving: flags == 3,
                pinned: flags == 4,
                priority,
                ..model(&format!("m{i}"), bytes, since)
            };
            models.into_iter().enumerate().map(make).collect()
        })
    }

    proptest! {
        #[test]
        fn what_goes_makes_room_and_nothing_goes_that_is_in_use_pinned_or_not_needed(
            held in fleets(), budget in 1u64..40, need in 0u64..40
        ) {
            let total: u64 = held.iter().map(|model| model.bytes).sum();
            let leaving: u64 = held.iter().filter(|model| model.leaving).map(|model| model.bytes).sum();
            match room(&held, budget, need, true) {
                Room::Fits => prop_assert!(need == 0 || total + need <= budget, "what needs nothing fits anyway"),
                Room::Evict(ids) => {
                    let going: Vec<&Held> = held.iter().filter(|model| ids.contains(&model.model)).collect();
                    prop_assert!(!going.is_empty() && going.len() == ids.len());
                    prop_assert!(going.iter().all(|model| !(model.in_use || model.pinned || model.leaving)));
                    let freed: u64 = going.iter().map(|model| model.bytes).sum();
                    let left = total - leaving - freed;
                    prop_assert!(left + need <= budget, "it fits then");
                    for stays in &going {
                        prop_assert!(left + stays.bytes + need > budget, "{stays:?} could stay");
                    }
                }
                Room::Wait => {
                    prop_assert!(total + need > budget);
                    let pinned: u64 = held.iter().filter(|model| model.pinned && !model.leaving).map(|m| m.bytes).sum();
                    prop_assert!(pinned + need <= budget, "some day it fits");
                }
                Room::Never => {
                    let pinned: u64 = held.iter().filter(|model| model.pinned && !model.leaving).map(|m| m.bytes).sum();
                    prop_assert!(pinned + need > budget);
                }
            }
        }

        #[test]
        fn of_equal_size_the_older_goes(since in proptest::collection::vec(0u64..100, 2..8), need in 1u64..4) {
            let held: Vec<Held> = since.iter().enumerate().map(|(i, at)| model(&format!("m{i}"), 1, *at)).collect();
            let Room::Evict(going) = room(&held, held.len() as u64, need.min(held.len() as u64), true) else {
                return Err(TestCaseError::fail("there is no other room"));
            };
            let (gone, kept): (Vec<&Held>, Vec<&Held>) = held.iter().partition(|held| going.contains(&held.model));
            let latest_gone = gone.iter().map(|held| held.idle_since).max();
            let oldest_kept = kept.iter().map(|held| held.idle_since).min();
            prop_assert!(oldest_kept.is_none() || latest_gone <= oldest_kept);
        }
    }
}
