//! `cortex pull`: a worker fetches a model's files.

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::de::DeserializeOwned;
use service::exit;
use service::progress::Bar;

use super::admin::{Admin, AdminArgs, segment};
use crate::pull::{Line, SILENCE_MAX, Wanted};

/// Most bytes of one line.
const LINE_BYTES_MAX: usize = 64 << 10;

#[derive(Debug, Args)]
pub(super) struct PullArgs {
    /// A model's id in the worker's configuration, or org/repo[:QUANT][@REVISION].
    model: String,
    /// The worker: its name, or its control address.
    #[arg(long)]
    node: String,
    #[command(flatten)]
    admin: AdminArgs,
}

/// Takes whole lines off the front of what came.
pub(super) fn lines<T: DeserializeOwned>(buffer: &mut Vec<u8>) -> Result<Vec<T>> {
    let whole = buffer.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let rest = buffer.split_off(whole);
    let taken = std::mem::replace(buffer, rest);
    ensure!(buffer.len() <= LINE_BYTES_MAX, "the gateway sends lines without an end");
    let lines = taken.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_slice(line).context("the gateway says what this version can't read")).collect()
}

pub(super) async fn pull(args: PullArgs) -> Result<u8> {
    let admin = Admin::new(&args.admin)?;
    let wanted = Wanted { model: args.model.clone() };
    let mut answer = admin.post_stream(&format!("/api/nodes/{}/pull", segment(&args.node)), &wanted).await?;
    let bar = Bar::or_lines(format!("{} on {}", args.model, args.node));
    let mut buffer = Vec::new();
    loop {
        let chunk = tokio::time::timeout(SILENCE_MAX * 2, answer.chunk()).await;
        let Some(chunk) = chunk.context("the gateway has fallen silent")?? else {
            bail!("the gateway ended the answer before the files were there");
        };
        buffer.extend_from_slice(&chunk);
        for line in lines::<Line>(&mut buffer)? {
            bar.show(line.bytes_done, line.bytes_total);
            if let Some(error) = line.error {
                bail!("{error}");
            }
            if let Some(path) = line.path {
                drop(bar);
                service::say!("{path}");
                return Ok(exit::CLEAN);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn lines_are_read_whole_however_they_arrive() {
        let text = "{\"bytes_done\":1,\"bytes_total\":2}\n{\"path\":\"/m\"}\n";
        for cut in 0..text.len() {
            let mut buffer = text.as_bytes()[..cut].to_vec();
            let mut read: Vec<Line> = lines(&mut buffer).unwrap();
            buffer.extend_from_slice(&text.as_bytes()[cut..]);
            read.extend(lines::<Line>(&mut buffer).unwrap());
            assert_eq!((read.len(), read[0].bytes_total, read[1].path.as_deref()), (2, 2, Some("/m")), "cut at {cut}");
        }
        assert!(lines::<Line>(&mut b"nonsense\n".to_vec()).is_err());
        assert!(lines::<Line>(&mut vec![b'x'; LINE_BYTES_MAX + 1]).is_err());
    }
}
