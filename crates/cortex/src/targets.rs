//! The fleet as Prometheus' discovery reads it: a list of groups, for a file or over HTTP.

use serde_json::{Value, json};

/// Returns the workers' control addresses as one group of targets; no group for no workers.
pub(crate) fn targets<'a>(control_addresses: impl Iterator<Item = &'a str>) -> Value {
    let targets: Vec<&str> = control_addresses.collect();
    if targets.is_empty() { json!([]) } else { json!([{ "targets": targets, "labels": {} }]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_workers_are_one_group_and_none_are_none() {
        let two = targets(["a:13231", "b:13231"].into_iter());
        assert_eq!(two, json!([{ "targets": ["a:13231", "b:13231"], "labels": {} }]));
        assert_eq!(targets(std::iter::empty()), json!([]));
    }
}
