//! The way out of spans: a bounded queue that never waits, one task, OTLP over HTTP.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::Connect;
use hyper_util::rt::TokioExecutor;
use opentelemetry::Context;
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{SpanExporter, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Span, SpanData, SpanExporter as _, SpanProcessor};
use prometheus::IntCounter;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::{TraceError, TraceMetrics, TraceSettings};

/// Most bytes of a collector's answer.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// Takes spans as they end.
#[derive(Debug)]
pub(super) struct Queue {
    spans: mpsc::Sender<SpanData>,
    dropped: IntCounter,
}

impl SpanProcessor for Queue {
    fn on_start(&self, _span: &mut Span, _context: &Context) {}

    fn on_end(&self, span: SpanData) {
        // Whoever ends a span is answering a request: it never waits for a collector.
        if span.span_context.is_sampled() && self.spans.try_send(span).is_err() {
            self.dropped.inc();
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _timeout: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// The task that exports; dropping it ends the task after what it has.
#[derive(Debug)]
pub struct Exporting {
    running: Option<(oneshot::Sender<()>, tokio::task::JoinHandle<()>)>,
}

impl Exporting {
    /// Nothing is exported.
    pub(super) fn off() -> Self {
        Exporting { running: None }
    }

    /// Exports what has ended, until `deadline` at most. Spans that end later are dropped.
    pub async fn close(self, deadline: Instant) {
        let Some((stop, mut task)) = self.running else { return };
        drop(stop);
        if tokio::time::timeout_at(deadline, &mut task).await.is_err() {
            task.abort();
            tracing::warn!("the collector did not take the last spans in time");
        }
    }
}

/// Starts the task; returns it and what spans go into.
pub(super) fn start(
    settings: &TraceSettings,
    resource: &Resource,
    metrics: TraceMetrics,
) -> Result<(Queue, Exporting), TraceError> {
    let builder = SpanExporter::builder().with_http();
    let patience = settings.timeout;
    let connector = crate::https::connector(patience, settings.tls).map_err(TraceError::Roots)?;
    let client = Client::builder(TokioExecutor::new()).build(connector);
    let built = builder.with_http_client(Collector { client, patience });
    let mut exporter = built.build()?;
    exporter.set_resource(resource);
    let (sender, spans) = mpsc::channel(settings.queue);
    let (stop, stopped) = oneshot::channel();
    let queue = Queue { spans: sender, dropped: metrics.dropped.clone() };
    let task = tokio::spawn(export(spans, exporter, settings.clone(), metrics, stopped));
    Ok((queue, Exporting { running: Some((stop, task)) }))
}

/// Exports batches until it is stopped and has nothing left.
async fn export(
    mut spans: mpsc::Receiver<SpanData>,
    exporter: SpanExporter,
    settings: TraceSettings,
    metrics: TraceMetrics,
    mut stopped: oneshot::Receiver<()>,
) {
    let (mut batch, mut due) = (Vec::new(), Instant::now());
    let (mut stopping, mut failing) = (false, false);
    loop {
        let room = settings.batch - batch.len();
        let over = tokio::select! {
            count = spans.recv_many(&mut batch, room) => {
                if count == batch.len() {
                    due = Instant::now() + settings.delay;
                }
                count == 0
            }
            () = tokio::time::sleep_until(due), if !batch.is_empty() => true,
            _ = &mut stopped, if !stopping => {
                stopping = true;
                spans.close();
                false
            }
        };
        if !batch.is_empty() && (over || batch.len() == settings.batch) {
            let count = batch.len() as u64;
            let exported = exporter.export(std::mem::take(&mut batch)).await;
            // Said when it begins and when it is over: a collector that is away for long is one piece of news.
            match exported {
                Ok(()) => {
                    metrics.exported.inc_by(count);
                    if std::mem::take(&mut failing) {
                        tracing::info!("spans are exported again");
                    }
                }
                Err(error) => {
                    metrics.failed.inc_by(count);
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(%error, "spans can't be exported");
                    }
                }
            }
        } else if over && batch.is_empty() {
            return;
        }
    }
}

/// A collector, asked within `patience`.
#[derive(Clone, Debug)]
struct Collector<C> {
    client: Client<C, Full<Bytes>>,
    patience: Duration,
}

impl<C> Collector<C>
where
    C: Connect + Clone + Send + Sync + 'static,
{
    async fn ask(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (head, body) = request.into_parts();
        let response = self.client.request(Request::from_parts(head, Full::new(body))).await?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await?.to_bytes();
        Ok(Response::from_parts(head, body))
    }
}

impl<C> HttpClient for Collector<C>
where
    C: Connect + Clone + std::fmt::Debug + Send + Sync + 'static,
{
    fn send_bytes<'a, 'b>(
        &'a self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async move {
            let asked = async { tokio::time::timeout(self.patience, self.ask(request)).await? };
            // The exporter keeps the cause to itself.
            asked.await.inspect_err(|error: &HttpError| tracing::debug!(?error, "the collector could not be asked"))
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use opentelemetry::trace::{Tracer, TracerProvider};
    use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};

    use super::*;
    use crate::metrics::Registry;

    #[test]
    fn a_full_queue_drops_and_counts_and_what_is_not_sampled_does_neither() {
        let metrics = TraceMetrics::register(&Registry::new(), "x").unwrap();
        for (sampler, queued, dropped) in [(Sampler::AlwaysOff, 0, 0), (Sampler::AlwaysOn, 2, 3)] {
            let (sender, mut spans) = mpsc::channel(2);
            let queue = Queue { spans: sender, dropped: metrics.dropped.clone() };
            let provider = SdkTracerProvider::builder().with_sampler(sampler).with_span_processor(queue).build();
            (0..5).for_each(|_| drop(provider.tracer("x").start("y")));
            let waiting = std::iter::from_fn(|| spans.try_recv().ok()).count();
            assert_eq!((waiting, metrics.dropped.get()), (queued, dropped));
        }
    }
}
