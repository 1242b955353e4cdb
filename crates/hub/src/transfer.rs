//! One blob over the network: in ranges, however often the connection breaks.

use std::path::PathBuf;

use ::http::header::{CONTENT_LENGTH, CONTENT_RANGE};
use ::http::{HeaderMap, Method, StatusCode};

use crate::blob::{Blob, Writer};
use crate::cache::length;
use crate::http::{Asked, Follow, Http};
use crate::{HubError, Limits, lock};

/// Bytes that make a try worth its while: after so many the failures are counted anew.
const WORTH: u64 = 1 << 20;

/// What is fetched, from where.
pub(crate) struct Order<'a> {
    pub(crate) repo: &'a str,
    /// The file's path below the endpoint.
    pub(crate) url_path: String,
    pub(crate) blob: Blob,
    pub(crate) lock: PathBuf,
}

/// How far a blob is, and how many bytes of that have just come over the network.
pub(crate) type Watch<'a> = &'a (dyn Fn(u64, u64) + Send + Sync);

/// Fetches a blob, unless it is here or another process fetches it meanwhile.
///
/// # Errors
/// [`HubError`]; what came so far is kept, but for a content with another hash than its name.
pub(crate) async fn transfer(
    http: &Http,
    order: &Order<'_>,
    limits: &Limits,
    watch: Watch<'_>,
) -> Result<(), HubError> {
    match once(http, order, limits, watch).await {
        // What was there before may have been damaged long ago; from its beginning it is another download.
        Err(error @ HubError::Checksum { .. }) => {
            tracing::warn!(%error, "fetching it once more");
            once(http, order, limits, watch).await
        }
        outcome => outcome,
    }
}

async fn once(http: &Http, order: &Order<'_>, limits: &Limits, watch: Watch<'_>) -> Result<(), HubError> {
    let Order { blob, .. } = order;
    let incomplete = blob.incomplete();
    let others = || {
        let done = length(&incomplete).unwrap_or_default();
        watch(done.min(blob.size), 0);
        done
    };
    let lock = lock::take(order.lock.clone(), limits.lock, others).await?;
    if blob.is_here() {
        return Ok(());
    }
    let mut writer = Writer::open(blob, lock).await?;
    watch(writer.offset, 0);
    let mut failed = 0;
    while writer.offset < blob.size {
        let before = writer.offset;
        match attempt(http, order, &mut writer, watch).await {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) if error.is_transient() => {
                failed = if writer.offset >= before + WORTH { 1 } else { failed + 1 };
                if failed >= limits.tries {
                    return Err(error);
                }
                http.pause(failed, &error).await;
            }
            Err(error) => return Err(error),
        }
    }
    writer.finish().await
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Reads `bytes START-END/TOTAL`.
fn content_range(headers: &HeaderMap) -> Option<(u64, u64)> {
    let text = headers.get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?;
    let (range, total) = text.split_once('/')?;
    Some((range.split_once('-')?.0.trim().parse().ok()?, total.trim().parse().ok()?))
}

/// Takes what one answer brings; false when the writer has failed. The content belongs to one commit and is known by its
/// hash, so a range needs no `If-Range`, which the other hosts that the bytes come from would not know.
async fn attempt(http: &Http, order: &Order<'_>, writer: &mut Writer, watch: Watch<'_>) -> Result<bool, HubError> {
    let Order { blob, .. } = order;
    let what = blob.what.as_str();
    let asked = Asked { what, repo: order.repo };
    let answer = http.ask(&asked, Method::GET, &order.url_path, writer.offset, Follow::All).await?;
    let (head, mut body) = answer.into_parts();
    let strange = |problem: String| HubError::Strange { what: what.into(), problem };
    let total = match head.status {
        StatusCode::PARTIAL_CONTENT => {
            let range = content_range(&head.headers).ok_or_else(|| strange("a part without its place".into()))?;
            if range.0 != writer.offset {
                return Err(strange(format!("a part from byte {}, not {}", range.0, writer.offset)));
            }
            range.1
        }
        StatusCode::OK => {
            if writer.offset > 0 && !writer.restart().await {
                return Ok(false);
            }
            content_length(&head.headers).unwrap_or(blob.size)
        }
        status => return Err(strange(format!("its status is {status}"))),
    };
    let size = |sent: u64| HubError::Size { what: what.into(), announced: blob.size, sent };
    if total != blob.size {
        return Err(size(total));
    }
    while let Some(bytes) = http.piece(what, &mut body).await? {
        let fresh = bytes.len() as u64;
        if writer.offset + fresh > blob.size {
            return Err(size(writer.offset + fresh));
        }
        if !writer.put(bytes).await {
            return Ok(false);
        }
        watch(writer.offset, fresh);
    }
    if writer.offset < blob.size {
        let problem = format!("the connection broke off after {} of {} bytes", writer.offset, blob.size);
        return Err(HubError::Unreachable { what: what.into(), problem });
    }
    Ok(true)
}
