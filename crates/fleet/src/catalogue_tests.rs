#![allow(clippy::unwrap_used)]
use words::{Incarnation, Moment, NodeId};

use super::*;
use crate::view::{FleetView, Slot};

fn id(name: &str) -> ModelId {
    ModelId::new(name).unwrap()
}

fn model(name: &str, state: ModelState, aliases: &[&str]) -> ModelStatus {
    let aliases = aliases.iter().map(|alias| id(alias)).collect();
    let card = ModelCard { on_demand: true, aliases, ..ModelCard::default() };
    ModelStatus { state, card, ..ModelStatus::absent(id(name)) }
}

fn view(nodes: &[&[ModelStatus]]) -> FleetView {
    let mut view = FleetView::new((0..nodes.len()).map(|i| i.to_string()));
    for (i, models) in nodes.iter().enumerate() {
        let incarnation = Incarnation { counter: 1, random: i as u64 };
        let mut status = NodeStatus::new(NodeId::new(format!("n{i}")).unwrap(), incarnation);
        status.models = models.to_vec();
        view.observe(Moment::ZERO, Slot(i), status);
    }
    view
}

#[test]
fn an_alias_leads_to_its_model_and_an_id_to_itself() {
    let absent = ModelState::Absent;
    let fleet = view(&[
        &[model("org/a", absent, &["small", "org/b", "both"]), model("org/c", ModelState::Unknown, &["odd"])],
        &[model("org/b", absent, &["large", "both"])],
    ]);
    let alias = |name: &str| fleet.alias(&id(name)).map(ModelId::as_str);
    assert_eq!([alias("small"), alias("large")], [Some("org/a"), Some("org/b")]);
    assert_eq!([alias("org/b"), alias("org/a"), alias("odd"), alias("none")], [None; 4], "an id wins over an alias");
    assert_eq!(alias("both"), Some("org/a"), "the first in order of name");
    let ambiguous: Vec<_> = fleet.ambiguous().map(|(name, ids)| (name.as_str(), ids.len())).collect();
    assert_eq!(ambiguous, [("both", 2)]);
}

#[test]
fn a_model_is_listed_once_as_near_to_serving_as_it_is_anywhere() {
    let plain = |state| ModelStatus { card: ModelCard::default(), ..model("a", state, &[]) };
    let fleet = view(&[
        &[plain(ModelState::Ready), ModelStatus { card: ModelCard::default(), ..model("b", ModelState::Absent, &[]) }],
        &[model("a", ModelState::Absent, &["x"]), model("c", ModelState::Absent, &[])],
        &[model("c", ModelState::Loading, &[])],
    ]);
    let models = fleet.models();
    let told: Vec<_> = models.iter().map(|model| (model.id.as_str(), model.state)).collect();
    assert_eq!(told, [("a", ModelState::Ready), ("c", ModelState::Loading)], "nobody brings b");
    assert_eq!(models[0].card.aliases, [id("x")], "what any catalogue says of it");
}

#[test]
fn the_nearest_load_is_told_and_none_of_what_serves() {
    let loading = |state, permille| {
        let status = ModelStatus { progress_permille: permille, eta_ms: Some(9), ..model("a", state, &[]) };
        vec![status]
    };
    let far = loading(ModelState::Fetching, 900);
    let near = loading(ModelState::Loading, 200);
    let told = view(&[&far, &near]).loading(&id("a")).unwrap();
    assert_eq!((told.state, told.progress_permille, told.eta_ms), (ModelState::Loading, 200, Some(9)));
    assert_eq!(view(&[&far, &loading(ModelState::Ready, 1000)]).loading(&id("a")), None);
    let absent = view(&[&loading(ModelState::Absent, 300)]).loading(&id("a")).unwrap();
    assert_eq!((absent.state, absent.progress_permille, absent.eta_ms), (ModelState::Absent, 0, None));
    let plain = ModelStatus { card: ModelCard::default(), ..model("a", ModelState::Absent, &[]) };
    assert_eq!(view(&[&[plain]]).loading(&id("a")), None);
}

#[test]
fn a_request_waits_where_its_model_comes_or_makes_room_and_nowhere_else() {
    use ModelState as S;
    let at = |state, other| {
        let mut status = NodeStatus::new(NodeId::new("n").unwrap(), Incarnation::default());
        status.models = vec![model("a", state, &[]), model("b", other, &[])];
        coming(&status, &id("a"))
    };
    for state in [S::Absent, S::Fetching, S::Loading, S::Warming, S::Recovering, S::Draining, S::Unloading] {
        assert!(at(state, S::Ready), "{state:?}");
    }
    assert!(at(S::Ready, S::Fetching), "it may have closed its door for the other one");
    assert!(!at(S::Ready, S::Ready) && !at(S::Failed, S::Ready) && !at(S::Unknown, S::Ready));
}
