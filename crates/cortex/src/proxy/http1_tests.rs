#![allow(clippy::unwrap_used)]
use proptest::prelude::*;

use super::*;

/// Reads a whole answer that comes in these pieces: status, body, and whether its end was seen.
fn read(pieces: &[&[u8]]) -> Result<(u16, Vec<u8>, bool), Malformed> {
    let (mut buffer, mut head, mut body) = (BytesMut::new(), None, Vec::new());
    for piece in pieces {
        buffer.extend_from_slice(piece);
        if head.is_none() {
            head = take_head(&mut buffer)?;
        }
        let Some(head) = &mut head else { continue };
        loop {
            match head.framing.take(&mut buffer)? {
                Taken::Data(data) => body.extend_from_slice(&data),
                Taken::Nothing => break,
                Taken::End => return Ok((head.response.status().as_u16(), body, true)),
            }
        }
    }
    Ok((head.map_or(0, |head| head.response.status().as_u16()), body, false))
}

#[test]
fn a_head_goes_out_as_it_was_put_together_and_no_value_adds_to_it() {
    let head = RequestHead::post("/v1/x", "h:1").field("a", b"b c").field("x", b"y\r\nz: 1").number("n", 0);
    let head = head.number("most", u64::MAX).end(20);
    let wanted = "POST /v1/x HTTP/1.1\r\nhost: h:1\r\na: b c\r\nx: -\r\nn: 0\r\nmost: 18446744073709551615\r\n\
        content-length: 20\r\n\r\n";
    assert_eq!(String::from_utf8(head).unwrap(), wanted);
}

const CHUNKED: &[u8] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nx-a: b\r\n\r\n\
    5\r\nhello\r\n1;x=\"y\"\r\n \r\n0A\r\n0123456789\r\n0\r\nx-t: 1\r\n\r\n";
const SIZED: &[u8] = b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\nretry-after: 1\r\n\r\nwait";

#[test]
fn an_answer_cut_anywhere_is_the_whole_answer() {
    for (answer, wanted) in
        [(CHUNKED, (200, b"hello 0123456789".to_vec(), true)), (SIZED, (503, b"wait".to_vec(), true))]
    {
        for i in 0..=answer.len() {
            for k in i..=answer.len() {
                assert_eq!(read(&[&answer[..i], &answer[i..k], &answer[k..]]).as_ref(), Ok(&wanted));
            }
        }
        let bytes: Vec<&[u8]> = answer.chunks(1).collect();
        assert_eq!(read(&bytes).as_ref(), Ok(&wanted));
    }
}

#[test]
fn what_came_too_early_to_be_whole_has_no_end() {
    for answer in [CHUNKED, SIZED] {
        for end in 0..answer.len() {
            assert!(!read(&[&answer[..end]]).unwrap().2, "{end}");
        }
    }
    let endless = b"HTTP/1.1 200 OK\r\n\r\nsome";
    assert_eq!(read(&[endless]), Ok((200, b"some".to_vec(), false)), "only the connection's end is its end");
}

#[test]
fn chunks_pass_uncopied() {
    let mut buffer = BytesMut::from(&b"3\r\nabc\r\n2\r\nde\r\n"[..]);
    let (start, mut framing) = (buffer.as_ptr(), Framing::Size);
    let Ok(Taken::Data(first)) = framing.take(&mut buffer) else { panic!("no data") };
    let Ok(Taken::Data(second)) = framing.take(&mut buffer) else { panic!("no data") };
    assert_eq!((first.as_ptr(), second.as_ptr()), (start.wrapping_add(3), start.wrapping_add(11)));
    assert_eq!(framing.take(&mut buffer), Ok(Taken::Nothing));
}

#[test]
fn a_connection_is_used_again_only_where_both_sides_know_the_end() {
    let reusable = |head: &str| take_head(&mut BytesMut::from(head)).unwrap().unwrap().reusable;
    assert!(reusable("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"));
    assert!(reusable("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"));
    assert!(!reusable("HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: x, Close\r\n\r\n"));
    assert!(!reusable("HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n"));
    assert!(!reusable("HTTP/1.1 200 OK\r\n\r\n"));
}

#[test]
fn what_is_no_answer_is_refused() {
    for answer in [
        "HTTP/2 200\r\n\r\n",
        "hello\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx",
        "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\nx",
        "HTTP/1.1 200 OK\r\ncontent-length: +1\r\n\r\nx",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nx",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nx\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-1\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nxy\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n11111111111111111\r\n",
    ] {
        assert!(read(&[answer.as_bytes()]).is_err(), "{answer:?}");
    }
    let long = format!("HTTP/1.1 200 OK\r\nx: {}", "y".repeat(HEAD_BYTES_MAX));
    assert!(read(&[long.as_bytes()]).is_err());
    let long = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;{}", "y".repeat(LINE_BYTES_MAX));
    assert!(read(&[long.as_bytes()]).is_err());
    let many =
        format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n{}", "t: 1\r\n".repeat(TRAILERS_MAX + 1));
    assert!(read(&[many.as_bytes()]).is_err());
}

// `PROPTEST_CASES` raises the budget (256 by default).
proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..4),
    ) {
        let mut answer = CHUNKED.to_vec();
        for (at, byte) in edits {
            let at = at.index(answer.len());
            answer[at] = byte;
        }
        let mut cuts: Vec<usize> = cuts.into_iter().map(|at| at.index(answer.len())).collect();
        cuts.sort_unstable();
        let ends = cuts.iter().copied().chain([answer.len()]);
        let pieces: Vec<&[u8]> = [0].into_iter().chain(cuts.iter().copied()).zip(ends).map(|(a, b)| &answer[a..b]).collect();
        // In one piece and in many it says the same.
        prop_assert_eq!(read(&pieces).ok(), read(&[&answer]).ok());
    }
}
