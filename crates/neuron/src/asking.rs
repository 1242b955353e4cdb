//! The command line's questions to a running worker, over its control port.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use control::proto::control_client::ControlClient;
use control::{error_from_status, inspection_from_proto, proto};
use service::exit;
use service::program::first_cause;
use service::telemetry::time_text;
use service::token::Token;
use tonic::Request;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use words::{Code, Error, Inspection};

/// Longest wait for a first answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Lines that are told when nobody says how many.
const LINES_DEFAULT: u32 = 100;

/// Which worker is asked.
#[derive(Clone, Debug, Args)]
pub(crate) struct WorkerArgs {
    /// The worker's control address.
    #[arg(long, env = "NEURON_CONTROL_ADDRESS", default_value = "127.0.0.1:13231")]
    address: String,
    /// A file with the token of its control port.
    #[arg(long, env = "NEURON_TOKEN_FILE")]
    token_file: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct LifecycleArgs {
    #[command(flatten)]
    worker: WorkerArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct LogsArgs {
    /// The model; the worker's own log when absent.
    model: Option<String>,
    /// Go on with lines that come.
    #[arg(long, short)]
    follow: bool,
    /// Most lines of those that are there.
    #[arg(long, short = 'n', default_value_t = LINES_DEFAULT)]
    lines: u32,
    /// Begin each line with its time.
    #[arg(long, short)]
    times: bool,
    #[command(flatten)]
    worker: WorkerArgs,
}

impl WorkerArgs {
    async fn dial(&self) -> Result<ControlClient<Channel>, Error> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address))
            .map_err(|error| Error::invalid("address", error.to_string()))?;
        let unreachable = |error: tonic::transport::Error| {
            let (address, why) = (&self.address, first_cause(&error));
            let message = format!(
                "no answer of a worker's control port at {address}: {why}; --address or NEURON_CONTROL_ADDRESS says where it is"
            );
            Error::new(Code::UpstreamFailed, message).because(error)
        };
        let channel = endpoint.connect_timeout(ANSWER_MAX).connect().await.map_err(unreachable)?;
        Ok(ControlClient::new(channel))
    }

    fn request<T>(&self, message: T) -> Result<Request<T>, Error> {
        let mut request = Request::new(message);
        if let Some(path) = &self.token_file {
            let token = Token::read(path).map_err(|error| Error::invalid("token_file", error.to_string()))?;
            let bearer = MetadataValue::try_from(token.bearer()).map_err(Error::internal)?;
            request.metadata_mut().insert("authorization", bearer);
        }
        Ok(request)
    }
}

/// Waits for an answer, but not for ever.
async fn soon<T>(answer: impl Future<Output = Result<T, tonic::Status>>) -> Result<T, Error> {
    match tokio::time::timeout(ANSWER_MAX, answer).await {
        Ok(answer) => answer.map_err(|status| error_from_status(&status)),
        Err(_) => Err(Error::new(Code::UpstreamTimeout, "the worker did not answer in time")),
    }
}

pub(crate) async fn lifecycle(args: LifecycleArgs) -> Result<u8, Error> {
    let request = args.worker.request(proto::GetLifecycleRequest {})?;
    let mut worker = args.worker.dial().await?;
    let answer = soon(worker.get_lifecycle(request)).await?;
    let inspection: Inspection = inspection_from_proto(answer.into_inner()).map_err(Error::internal)?;
    if args.json {
        service::say!("{}", serde_json::to_string_pretty(&inspection).map_err(Error::internal)?);
    } else {
        service::terminal::write(format_args!("{inspection}"));
    }
    Ok(exit::CLEAN)
}

pub(crate) async fn logs(args: LogsArgs) -> Result<u8, Error> {
    let model_id = args.model.clone().unwrap_or_default();
    let message = proto::ModelLogsRequest { model_id, follow: args.follow, lines: args.lines };
    let request = args.worker.request(message)?;
    let mut worker = args.worker.dial().await?;
    let mut batches = soon(worker.model_logs(request)).await?.into_inner();
    while let Some(batch) = batches.message().await.map_err(|status| error_from_status(&status))? {
        if batch.missed > 0 {
            eprintln!("{} lines were missed", batch.missed);
        }
        for line in batch.lines {
            let time = if args.times { time_text(line.at_unix_ms) + " " } else { String::new() };
            service::say!("{time}{}: {}", line.source, line.text);
        }
    }
    Ok(exit::CLEAN)
}
