//! What a request to the data port passes, in order: for those who look. `tests/tests/lifecycle.rs` holds it against the
//! port itself: each guard that has a code is provoked, and the one that comes first answers.

use words::{Code, LaneItem};

use crate::options::Options;

/// One thing that requests pass.
struct Layer {
    name: &'static str,
    description: &'static str,
    /// The key that sets it; empty for what nothing sets.
    source: &'static str,
    /// Whether it can refuse.
    guard: bool,
    /// What it answers then; a connection that is closed has no answer.
    refuses: &'static [Code],
    timeout_ms: Option<u64>,
}

fn layer(name: &'static str, source: &'static str, description: &'static str) -> Layer {
    Layer { name, description, source, guard: false, refuses: &[], timeout_ms: None }
}

fn guard(name: &'static str, source: &'static str, refuses: &'static [Code], description: &'static str) -> Layer {
    Layer { guard: true, refuses, ..layer(name, source, description) }
}

impl Layer {
    fn within(self, ms: u64) -> Self {
        Layer { timeout_ms: Some(ms), ..self }
    }
}

fn layers(options: &Options) -> Vec<Layer> {
    let (data, scheduler) = (&options.data, &options.scheduler);
    let server = &data.server;
    vec![
        guard("connections", "data.server.max_connections", &[], "connections at once, of all and of one address"),
        guard("first byte", "data.server.sniff_timeout_ms", &[], "a connection must begin")
            .within(server.sniff_timeout_ms),
        guard("headers", "data.server.header_timeout_ms", &[], "a request's head, in time and size")
            .within(server.header_timeout_ms),
        guard("streams", "data.server.h2_max_streams", &[], "requests at once on one HTTP/2 connection"),
        guard("routes", "", &[Code::RouteNotFound, Code::MethodNotAllowed], "paths and methods that there are"),
        guard("token", "control.token_file", &[Code::Unauthorized], "loading, unloading and cancelling are orders"),
        guard("gate", "", &[Code::Draining], "closed while the worker is cordoned, drained, held or leaving"),
        guard("media type", "", &[Code::UnsupportedMediaType], "bodies are JSON"),
        guard("body", "data.max_body_bytes", &[Code::BodyTooLarge, Code::RequestTimeout], "a body, in size and time")
            .within(data.body_timeout_ms),
        guard("fields", "", &[Code::InvalidRequest, Code::UnsupportedParameter], "what is asked must make sense"),
        layer("cancellation", "", "from here on it can be cancelled by its id"),
        guard("model", "", &[Code::ModelNotHere, Code::ModelLoading], "the model must serve here"),
        layer("text", "", "template and tokens, off the runtime"),
        guard("context", "harness", &[Code::ContextLengthExceeded], "prompt and answer must fit the model"),
        layer("format", "", "what the answer must be is compiled, within its own bounds"),
        guard("queue", "scheduler.max_waiting", &[Code::Overloaded], "requests that wait for the engine, and how long")
            .within(scheduler.max_wait_ms),
        guard("deadline", "scheduler.max_request_s", &[Code::DeadlinePassed], "the whole answer, queue included")
            .within(scheduler.max_request_s.saturating_mul(1000)),
        layer("commit", "data.commit_after_ms", "status 200 goes out with the first token, or after this")
            .within(data.commit_after_ms),
        layer("events", "data.event_queue", "tokens that wait for a slow reader; its sequence pauses then"),
        guard("write stall", "data.server.write_stall_ms", &[], "a client that takes nothing is cut off")
            .within(server.write_stall_ms),
    ]
}

/// Lists them.
pub(crate) fn stack(options: &Options) -> Vec<LaneItem> {
    let item = |layer: Layer| LaneItem {
        name: layer.name.to_string(),
        description: match layer.refuses {
            [] => layer.description.to_string(),
            codes => {
                let codes: Vec<&str> = codes.iter().map(|code| code.row().code).collect();
                format!("{} ({})", layer.description, codes.join(", "))
            }
        },
        source: if layer.source.is_empty() { "program".to_string() } else { format!("config {}", layer.source) },
        guard: layer.guard,
        timeout_ms: layer.timeout_ms,
        ..LaneItem::default()
    };
    layers(options).into_iter().map(item).collect()
}
