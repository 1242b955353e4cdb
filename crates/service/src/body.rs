//! Reading a request's body within its bound and deadline.

use std::pin::pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::Body;
use http_body_util::BodyExt;
use words::{Code, Error};

/// How much of a body that is too large is read and dropped, so that the client has sent it all before it is refused:
/// one that is cut off while it sends sees a broken connection and never the reason.
const DISCARD_MAX: usize = 64 << 20;

/// Most bytes that a client has reserved for it by saying how much it is going to send.
const RESERVED_MAX: usize = 64 << 10;

/// A body that comes whole in a frame of so many bytes is not copied. A shorter one is: it would keep all of its
/// connection's buffer for as long as the request runs.
const UNCOPIED_MIN: usize = 4 << 10;

/// Reads a whole body of at most `limit` bytes that arrives within `deadline`.
///
/// # Errors
/// `BodyTooLarge`, `RequestTimeout`, or `InvalidRequest` for a body that broke off.
pub async fn read<B>(body: B, limit: usize, deadline: Duration) -> Result<Bytes, Error>
where
    B: Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let too_large = || Error::new(Code::BodyTooLarge, format!("the request body is over {limit} bytes"));
    let mut body = pin!(body);
    let told = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    let (mut alone, mut joined) = (Bytes::new(), BytesMut::new());
    let mut length = 0usize;
    let reading = async {
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                Error::new(Code::InvalidRequest, "the request body ended before it was complete").because(error)
            })?;
            let Some(data) = frame.into_data().ok().filter(|data| !data.is_empty()) else { continue };
            length = length.saturating_add(data.len());
            if length <= limit {
                if length == data.len() && length >= UNCOPIED_MIN {
                    alone = data;
                    continue;
                }
                if joined.is_empty() {
                    joined.reserve(told.min(limit).min(RESERVED_MAX).max(length));
                    joined.extend_from_slice(&std::mem::take(&mut alone));
                }
                joined.extend_from_slice(&data);
            } else if length > limit.saturating_add(DISCARD_MAX) {
                return Err(too_large());
            }
        }
        if length > limit { Err(too_large()) } else { Ok(()) }
    };
    match tokio::time::timeout(deadline, reading).await {
        Ok(result) => result.map(|()| if joined.is_empty() { alone } else { joined.freeze() }),
        Err(_) if length > limit => Err(too_large()),
        Err(_) => Err(Error::new(Code::RequestTimeout, "the request body did not arrive in time")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::convert::Infallible;

    use futures_util::stream;
    use http_body::Frame;
    use http_body_util::StreamBody;

    use super::*;

    async fn code(chunks: usize, limit: usize) -> Result<usize, Code> {
        let frames = (0..chunks).map(|_| Ok::<_, Infallible>(Frame::data(Bytes::from_static(&[b'x'; 1024]))));
        let body = StreamBody::new(stream::iter(frames));
        read(body, limit, Duration::from_secs(5)).await.map(|bytes| bytes.len()).map_err(|error| error.code())
    }

    #[tokio::test]
    async fn a_body_is_taken_up_to_its_limit_and_an_endless_one_is_left() {
        assert_eq!(code(4, 4096).await, Ok(4096));
        assert_eq!(code(5, 4096).await, Err(Code::BodyTooLarge));
        assert_eq!(code(usize::MAX, 4096).await, Err(Code::BodyTooLarge));
    }

    #[tokio::test]
    async fn a_large_frame_that_comes_alone_is_not_copied_and_all_others_are_joined_in_turn() {
        let text: Bytes = (0..3 * UNCOPIED_MIN).map(|i| (i % 251) as u8).collect();
        let large = UNCOPIED_MIN;
        for lengths in
            [&[large][..], &[0, large, 0], &[large - 1], &[large, 1], &[1, large], &[large, large], &[], &[0]]
        {
            let mut rest = text.clone();
            let frames: Vec<_> = lengths.iter().map(|length| rest.split_to(*length)).collect();
            let frames = frames.into_iter().map(|frame| Ok::<_, Infallible>(Frame::data(frame)));
            let got = read(StreamBody::new(stream::iter(frames)), text.len(), Duration::from_secs(5)).await.unwrap();
            assert_eq!(got, text[..lengths.iter().sum()], "{lengths:?}");
            assert_eq!(got.as_ptr() == text.as_ptr(), [large] == *lengths || [0, large, 0] == *lengths, "{lengths:?}");
        }
    }

    #[tokio::test]
    async fn a_body_that_trickles_is_given_up() {
        let frames = stream::pending::<Result<Frame<Bytes>, Infallible>>();
        let result = read(StreamBody::new(frames), 10, Duration::from_millis(20)).await;
        assert_eq!(result.unwrap_err().code(), Code::RequestTimeout);
    }
}
