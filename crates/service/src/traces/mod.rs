//! Traces over OTLP: the spans of a request, continued from and into W3C `traceparent`.
//!
//! Off unless the environment names a collector; then a span is an empty option, and nothing is done for it. A span that
//! ends goes into a bounded queue; when that is full it is dropped and counted.

mod export;
mod settings;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::SystemTime;

use http::HeaderMap;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Span as _, SpanBuilder, SpanContext, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, InstrumentationScope, StringValue};
use opentelemetry_http::{HeaderExtractor, HeaderInjector};
use opentelemetry_otlp::ExporterBuildError;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use prometheus::IntCounter;

pub use export::Exporting;
pub use opentelemetry::KeyValue;
pub use opentelemetry::trace::SpanKind;
pub use settings::{TraceSettings, TraceVariable};

use crate::metrics::{MetricsError, Registry};

/// Why traces can't start.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// A variable that can't be used.
    #[error(transparent)]
    Variable(#[from] TraceVariable),
    /// The exporter refuses its variables.
    #[error("traces: {0}")]
    Exporter(#[from] ExporterBuildError),
    /// The collector wants TLS, and the system has no certificates to check it by.
    #[error("traces: {0}")]
    Roots(String),
}

/// What Prometheus sees of spans.
#[derive(Clone, Debug)]
pub struct TraceMetrics {
    exported: IntCounter,
    dropped: IntCounter,
    failed: IntCounter,
}

impl TraceMetrics {
    /// Registers them under `prefix`.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn register(registry: &Registry, prefix: &str) -> Result<Self, MetricsError> {
        let spans = registry.counter_vec(
            &format!("{prefix}_trace_spans_total"),
            "Spans that ended: exported, dropped because the queue was full, or failed with the collector.",
            &["outcome"],
        )?;
        let [exported, dropped, failed] =
            ["exported", "dropped", "failed"].map(|outcome| spans.with_label_values(&[outcome]));
        Ok(TraceMetrics { exported, dropped, failed })
    }
}

/// Makes an attribute of several texts.
pub fn list(key: &'static str, texts: &[&'static str]) -> KeyValue {
    let texts: Vec<StringValue> = texts.iter().map(|text| StringValue::from(*text)).collect();
    KeyValue::new(key, opentelemetry::Value::Array(texts.into()))
}

/// Where spans come from; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Traces {
    tracer: Option<Arc<SdkTracer>>,
}

/// A program as its collector knows it.
#[derive(Clone, Copy, Debug)]
pub struct Program<'a> {
    /// The service's name, unless the environment has another.
    pub name: &'static str,
    /// Its version.
    pub version: &'static str,
    /// Which one of its kind.
    pub instance: &'a str,
}

impl Traces {
    /// Starts exporting if that is wanted. Must be called within the runtime.
    ///
    /// # Errors
    /// [`TraceError`] for an exporter that can't be.
    pub fn start(
        settings: &TraceSettings,
        program: Program<'_>,
        metrics: TraceMetrics,
    ) -> Result<(Self, Exporting), TraceError> {
        if !settings.enabled {
            return Ok((Traces::default(), Exporting::off()));
        }
        let about = [
            KeyValue::new("service.version", program.version),
            KeyValue::new("service.instance.id", program.instance.to_string()),
        ];
        let resource = Resource::builder().with_attributes(about);
        let resource = if settings.named { resource } else { resource.with_service_name(program.name) };
        let resource = resource.build();
        let (queue, exporting) = export::start(settings, &resource, metrics)?;
        let provider = SdkTracerProvider::builder().with_resource(resource).with_span_processor(queue).build();
        let scope = InstrumentationScope::builder(program.name).with_version(program.version).build();
        let tracer = provider.tracer_with_scope(scope);
        tracing::info!(queue = settings.queue, batch = settings.batch, "spans are exported over OTLP");
        Ok((Traces { tracer: Some(Arc::new(tracer)) }, exporting))
    }

    /// Begins the span of a request, as a child of the one that its headers name.
    pub fn request(&self, headers: &HeaderMap, name: &'static str) -> Span {
        let Some(tracer) = &self.tracer else { return Span::default() };
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &HeaderExtractor(headers));
        Span::begin(tracer, SpanBuilder::from_name(name).with_kind(SpanKind::Server), &parent)
    }
}

/// A span, or nothing where traces are off. It ends when it is dropped.
#[derive(Debug, Default)]
pub struct Span {
    on: Option<Box<On>>,
}

#[derive(Debug)]
struct On {
    tracer: Arc<SdkTracer>,
    span: opentelemetry_sdk::trace::Span,
}

impl Span {
    fn begin(tracer: &Arc<SdkTracer>, builder: SpanBuilder, parent: &Context) -> Self {
        let span = tracer.build_with_context(builder, parent);
        Span { on: Some(Box::new(On { tracer: tracer.clone(), span })) }
    }

    fn context(&self) -> Option<&SpanContext> {
        self.on.as_ref().map(|on| on.span.span_context())
    }

    /// Begins a span below this one.
    pub fn child(&self, name: &'static str, kind: SpanKind) -> Span {
        self.below(SpanBuilder::from_name(name).with_kind(kind))
    }

    /// Adds a span below this one that is over already.
    pub fn past(&self, name: &'static str, from: SystemTime, to: SystemTime) {
        let mut span = self.below(SpanBuilder::from_name(name).with_start_time(from));
        if let Some(on) = &mut span.on {
            on.span.end_with_timestamp(to);
        }
    }

    fn below(&self, builder: SpanBuilder) -> Span {
        let Some(on) = &self.on else { return Span::default() };
        Span::begin(&on.tracer, builder, &Context::new().with_remote_span_context(on.span.span_context().clone()))
    }

    /// Returns whether anything is kept of it.
    pub fn recording(&self) -> bool {
        self.on.as_ref().is_some_and(|on| on.span.is_recording())
    }

    /// Gives it the name that was not known when it began.
    pub fn rename(&mut self, name: impl FnOnce() -> Cow<'static, str>) {
        if let Some(on) = self.on.as_mut().filter(|on| on.span.is_recording()) {
            on.span.update_name(name());
        }
    }

    /// Adds attributes, which are made only for a span that is kept.
    pub fn note<const N: usize>(&mut self, attributes: impl FnOnce() -> [KeyValue; N]) {
        if let Some(on) = self.on.as_mut().filter(|on| on.span.is_recording()) {
            on.span.set_attributes(attributes());
        }
    }

    /// Marks it as failed, with an error's code.
    pub fn fail(&mut self, code: &'static str) {
        if let Some(on) = &mut self.on {
            on.span.set_attribute(KeyValue::new("error.type", code));
            on.span.set_status(Status::error(code));
        }
    }

    /// Writes `traceparent` and `tracestate` of this span over those that are there; leaves them when traces are off.
    pub fn write(&self, headers: &mut HeaderMap) {
        if let Some(context) = self.context() {
            let context = Context::new().with_remote_span_context(context.clone());
            TraceContextPropagator::new().inject_context(&context, &mut HeaderInjector(headers));
        }
    }

    /// Returns its trace's id as logs show it.
    pub fn trace_id(&self) -> Option<String> {
        self.context().map(|context| context.trace_id().to_string())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn where_traces_are_off_nothing_is_made_and_headers_stay() {
        let mut headers = HeaderMap::new();
        headers.insert("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".parse().unwrap());
        let before = headers.clone();
        let mut span = Traces::default().request(&headers, "chat");
        span.rename(|| unreachable!("no name is made"));
        span.note::<1>(|| unreachable!("no attribute is made"));
        let child = span.child("proxy", SpanKind::Client);
        child.write(&mut headers);
        assert_eq!((headers, child.trace_id(), child.recording()), (before, None, false));
    }
}
