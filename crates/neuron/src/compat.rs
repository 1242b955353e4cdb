//! A worker's metrics under the names that tools for vLLM know: `/metrics?compat=vllm`.
//!
//! Our own names come first; these are a second view of the same numbers, with vLLM's labels `model_name` and `engine`.

use service::metrics::prometheus::proto::{LabelPair, Metric, MetricFamily};
use service::metrics::{Registry, render};
use words::Code;

/// Our name, and what vLLM calls it; two rows where its versions differ.
const NAMES: [(&str, &str); 17] = [
    ("neuron_num_requests_running", "vllm:num_requests_running"),
    ("neuron_num_requests_waiting", "vllm:num_requests_waiting"),
    ("neuron_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc"),
    ("neuron_kv_cache_usage_ratio", "vllm:gpu_cache_usage_perc"),
    ("neuron_num_preemptions_total", "vllm:num_preemptions_total"),
    ("neuron_prompt_tokens_total", "vllm:prompt_tokens_total"),
    ("neuron_generation_tokens_total", "vllm:generation_tokens_total"),
    ("neuron_prefix_cache_queries_total", "vllm:prefix_cache_queries_total"),
    ("neuron_prefix_cache_hits_total", "vllm:prefix_cache_hits_total"),
    ("neuron_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"),
    ("neuron_inter_token_latency_seconds", "vllm:inter_token_latency_seconds"),
    ("neuron_inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    ("neuron_e2e_request_latency_seconds", "vllm:e2e_request_latency_seconds"),
    ("neuron_request_queue_time_seconds", "vllm:request_queue_time_seconds"),
    ("neuron_request_prefill_time_seconds", "vllm:request_prefill_time_seconds"),
    ("neuron_request_decode_time_seconds", "vllm:request_decode_time_seconds"),
    (REQUESTS, "vllm:request_success_total"),
];

const REQUESTS: &str = "neuron_requests_total";

/// How a request ended, in vLLM's words, which are fewer; it counts no failures.
fn finished_reason(outcome: &str) -> Option<&'static str> {
    match Code::from_text(outcome) {
        None if outcome == "length" => Some("length"),
        None => Some("stop"),
        Some(Code::ClientClosed | Code::Cancelled) => Some("abort"),
        Some(_) => None,
    }
}

fn pair(name: &str, value: &str) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.into());
    pair.set_value(value.into());
    pair
}

/// Returns the sample with vLLM's labels; `None` for a request that vLLM would not count.
fn relabelled(mut metric: Metric) -> Option<Metric> {
    let mut labels = vec![pair("engine", "0")];
    for label in metric.take_label() {
        labels.push(match label.name() {
            "model" => pair("model_name", label.value()),
            "outcome" => pair("finished_reason", finished_reason(label.value())?),
            _ => label,
        });
    }
    labels.sort_by(|a, b| a.name().cmp(b.name()));
    metric.set_label(labels);
    Some(metric)
}

/// Returns the worker's metrics as vLLM would name them, in Prometheus' text format.
pub(crate) fn vllm(registry: &Registry) -> String {
    let families = registry.gather();
    let theirs = NAMES.iter().filter_map(|(ours, theirs)| {
        let mut family = families.iter().find(|family| family.name() == *ours)?.clone();
        let metrics: Vec<Metric> = family.take_metric().into_iter().filter_map(relabelled).collect();
        family.set_name((*theirs).into());
        family.set_metric(metrics);
        (!family.get_metric().is_empty()).then_some(family)
    });
    render(&theirs.collect::<Vec<MetricFamily>>())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::metrics::Metrics;

    #[test]
    fn vllms_names_carry_our_numbers_and_its_labels() {
        let registry = Registry::new();
        let metrics = Metrics::new(&registry).unwrap();
        metrics.ended("m", "length", 0.5);
        metrics.ended("m", "overloaded", 0.5);
        metrics.ended("m", Code::ClientClosed.row().code, 0.5);
        metrics.model("m").generation_tokens.inc_by(7);
        let text = vllm(&registry);
        for line in [
            "vllm:generation_tokens_total{engine=\"0\",model_name=\"m\"} 7",
            "vllm:request_success_total{engine=\"0\",finished_reason=\"length\",model_name=\"m\"} 1",
            "vllm:request_success_total{engine=\"0\",finished_reason=\"abort\",model_name=\"m\"} 1",
            "vllm:e2e_request_latency_seconds_count{engine=\"0\",model_name=\"m\"} 3",
            "# TYPE vllm:inter_token_latency_seconds histogram",
        ] {
            assert!(text.lines().any(|known| known == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("overloaded") && !text.contains("neuron_"), "{text}");
    }

    #[test]
    fn every_name_of_ours_is_registered() {
        let registry = Registry::new();
        Metrics::new(&registry).unwrap();
        let reference = registry.reference();
        for (ours, _) in NAMES {
            assert!(reference.contains(&format!("| `{ours}` |")), "{ours}");
        }
    }
}
