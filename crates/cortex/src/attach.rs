//! One loop a neuron: keeps the control stream, acknowledges generations, polls slowly beside it.

use std::time::Duration;

use control::proto::{self, gateway_message, node_message};
use control::{STREAM_FORMAT, incarnation_to_proto, node_status_from_proto};
use fleet::{SILENT_AFTER, Slot};
use service::token::Token;
use tokio::sync::mpsc;
use tonic::Status;
use words::{GatewayId, NodeStatus};

use crate::command::{dial, with_token};
use crate::fleet_task::Report;
use crate::metrics::Metrics;

/// Longest time to connect.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// Pause before a lost neuron is dialled again; doubles up to [`REDIAL_MAX`].
const REDIAL_FIRST: Duration = Duration::from_millis(50);
/// Longest such pause.
const REDIAL_MAX: Duration = Duration::from_secs(2);
/// The gateway's own sign of life.
const PING_EVERY: Duration = Duration::from_secs(1);
/// A neuron that says nothing for this long is dialled anew; it gets no routes long before.
const SILENT_MAX: Duration = SILENT_AFTER.saturating_mul(2);
/// Messages that wait to be sent.
const OUTBOX: usize = 16;

/// What a loop needs.
pub(crate) struct Attach {
    pub(crate) slot: Slot,
    pub(crate) control_address: String,
    pub(crate) gateway: GatewayId,
    pub(crate) token: Option<Token>,
    pub(crate) poll: Duration,
    pub(crate) reports: mpsc::Sender<Report>,
    pub(crate) metrics: Metrics,
}

impl Attach {
    /// Runs until the fleet task is gone.
    pub(crate) async fn run(self) {
        let mut pause = REDIAL_FIRST;
        let mut told = None;
        while !self.reports.is_closed() {
            let begun = tokio::time::Instant::now();
            let ended = self.session(&mut told).await;
            self.metrics.attached.with_label_values(&[&self.control_address]).set(0);
            let why = reason(&ended);
            // Once for as long as it stays the same: the worker is dialled again and again.
            if told.as_ref() != Some(&why) {
                tracing::warn!(control = self.control_address, why, "the worker can't be heard");
                told = Some(why.clone());
            }
            if self.reports.send(Report::Lost(self.slot, why)).await.is_err() {
                return;
            }
            pause = if begun.elapsed() > REDIAL_MAX { REDIAL_FIRST } else { (pause * 2).min(REDIAL_MAX) };
            tokio::time::sleep(pause).await;
        }
    }

    /// One session: from the dialling to its end, which it returns the reason of. `told` is what the log says of the
    /// worker: nothing once it is attached.
    async fn session(&self, told: &mut Option<String>) -> Status {
        match self.attached(told).await {
            Ok(()) => Status::ok("the worker ended the session"),
            Err(status) => status,
        }
    }

    async fn attached(&self, told: &mut Option<String>) -> Result<(), Status> {
        let mut client = dial(&self.control_address).await?;
        let (outbox, messages) = mpsc::channel(OUTBOX);
        let hello = proto::Hello {
            gateway_id: self.gateway.to_string(),
            version: env!("CARGO_PKG_VERSION").into(),
            stream_format: STREAM_FORMAT,
        };
        send(&outbox, gateway_message::Message::Hello(hello))?;
        let stream = tokio_stream::wrappers::ReceiverStream::new(messages);
        let answer = tokio::time::timeout(CONNECT_MAX, client.attach(with_token(self.token.as_ref(), stream))).await;
        let mut inbound =
            answer.map_err(|_| Status::deadline_exceeded("the worker's control port takes no session"))??.into_inner();
        self.metrics.attached.with_label_values(&[&self.control_address]).set(1);
        if told.take().is_some() {
            tracing::info!(control = self.control_address, "the worker is heard again");
        }
        let mut ping = tokio::time::interval(PING_EVERY);
        let mut poll = tokio::time::interval_at(tokio::time::Instant::now() + self.poll, self.poll);
        let mut sequence = 0;
        let mut silent_at = tokio::time::Instant::now() + SILENT_MAX;
        loop {
            tokio::select! {
                message = inbound.message() => {
                    silent_at = tokio::time::Instant::now() + SILENT_MAX;
                    let Some(message) = message? else { return Ok(()) };
                    self.take(message, &outbox).await?;
                }
                () = tokio::time::sleep_until(silent_at) => {
                    return Err(Status::deadline_exceeded("the worker is silent"));
                }
                _ = ping.tick() => {
                    sequence += 1;
                    send(&outbox, gateway_message::Message::Ping(proto::Ping { sequence }))?;
                }
                _ = poll.tick() => {
                    let request = with_token(self.token.as_ref(), proto::ListModelsRequest {});
                    let polled = tokio::time::timeout(CONNECT_MAX, client.list_models(request)).await;
                    let polled = polled.map_err(|_| Status::deadline_exceeded("the worker's control port does not answer"))??.into_inner();
                    if let Some(status) = polled.status {
                        self.report(read(status)?).await?;
                    }
                }
            }
        }
    }

    async fn take(
        &self,
        message: proto::NodeMessage,
        outbox: &mpsc::Sender<proto::GatewayMessage>,
    ) -> Result<(), Status> {
        match message.message {
            Some(node_message::Message::Status(status)) => {
                let status = read(status)?;
                let ack = proto::Ack {
                    incarnation: Some(incarnation_to_proto(status.incarnation)),
                    generation: status.generation.0,
                };
                // The view has it before the neuron hears so: that is what an acknowledgement means.
                self.report(status).await?;
                send(outbox, gateway_message::Message::Ack(ack))
            }
            Some(node_message::Message::Pong(_)) | None => {
                let heard = self.reports.send(Report::Heard(self.slot)).await;
                heard.map_err(|_| Status::cancelled("the gateway is leaving"))
            }
        }
    }

    async fn report(&self, status: NodeStatus) -> Result<(), Status> {
        let report = Report::Status(self.slot, Box::new(status));
        self.reports.send(report).await.map_err(|_| Status::cancelled("the gateway is leaving"))
    }
}

/// Says in words why a session ended, or why there was none.
fn reason(ended: &Status) -> String {
    match (ended.message(), ended.code()) {
        ("", code) => code.to_string(),
        (words, _) => words.to_string(),
    }
}

fn read(status: proto::NodeStatus) -> Result<NodeStatus, Status> {
    node_status_from_proto(status).map_err(|error| Status::invalid_argument(error.to_string()))
}

fn send(outbox: &mpsc::Sender<proto::GatewayMessage>, message: gateway_message::Message) -> Result<(), Status> {
    let message = proto::GatewayMessage { message: Some(message) };
    outbox.try_send(message).map_err(|_| Status::resource_exhausted("the worker does not read"))
}
