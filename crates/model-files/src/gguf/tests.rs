#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;

fn sample(alignment: Option<u32>) -> Vec<u8> {
    let mut builder = Builder::new();
    builder.add("general.architecture", Value::String("qwen3".into()));
    builder.add("n", Value::U32(7));
    builder.add("words", Value::Strings(vec!["a".into(), "bc".into()]));
    builder.add("types", Value::Integers(vec![1, -3]));
    builder.add("scores", Value::Floats(vec![0.5, -1.0]));
    if let Some(alignment) = alignment {
        builder.add("general.alignment", Value::U32(alignment));
    }
    builder.tensor("x", &[4, 2], TensorType::F32, Box::new(|out| out.write_all(&[1; 32])));
    builder.tensor("y", &[32], TensorType::Q8_0, Box::new(|out| out.write_all(&[2; 34])));
    let mut out = Vec::new();
    builder.write_to(&mut out).unwrap();
    out
}

fn read(bytes: &[u8]) -> Result<Header, GgufError> {
    Header::read_from(bytes, bytes.len() as u64, &Limits::default())
}

#[test]
fn what_is_written_is_read() {
    let bytes = sample(None);
    let header = read(&bytes).unwrap();
    assert_eq!(header.str("general.architecture"), Some("qwen3"));
    assert_eq!((header.u32("n"), header.strings("words").unwrap().len()), (Some(7), 2));
    assert_eq!(header.get("types"), Some(&Value::Integers(vec![1, -3])));
    let y = header.tensor("y").unwrap();
    assert_eq!(&bytes[y.offset as usize..][..y.bytes as usize], [2; 34]);
}

#[test]
fn a_source_that_gives_too_little_is_found() {
    let mut builder = Builder::new();
    builder.tensor("x", &[4], TensorType::F32, Box::new(|out| out.write_all(&[0; 15])));
    assert!(builder.write_to(&mut Vec::new()).is_err());
}

#[test]
fn hostile_headers_are_refused_in_words() {
    let words = |bytes: &[u8]| read(bytes).unwrap_err().to_string();
    assert!(words(b"GGML....").contains("no GGUF file"));
    assert!(words(&sample(Some(0))).contains("alignment"));
    assert!(words(&sample(Some(24))).contains("power of two"));
    let with = |at: usize, number: u64| {
        let mut bytes = sample(None);
        bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        bytes
    };
    assert!(words(&with(8, u64::MAX)).contains("number of tensors"));
    assert!(words(&with(8, 60_000)).contains("truncated"));
    assert!(words(&with(16, u64::MAX)).contains("metadata entries"));
    assert!(words(&with(24, 1 << 62)).contains("limit"));
    let mut version = sample(None);
    version[4] = 1;
    assert!(words(&version).contains("version 1"));
    let whole = sample(None);
    assert!(words(&whole[..whole.len() - 40]).contains("past the end"));
    assert!(words(&whole[..60]).contains("truncated"));
}

fn extreme() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(u64::MAX),
        Just(1 << 63),
        Just(1 << 32),
        Just(u64::from(u32::MAX)),
        (0u32..64).prop_map(|bit| 1 << bit),
        any::<u64>()
    ]
}

// `PROPTEST_CASES` raises the budget of each property (256 by default).
proptest! {
    #[test]
    fn many_wounds_make_nobody_panic_and_cost_no_more_than_the_limits(
        numbers in proptest::collection::vec((any::<prop::sample::Index>(), extreme()), 0..4),
        bytes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        spliced in (any::<prop::sample::Index>(), proptest::collection::vec(any::<u8>(), 0..40)),
    ) {
        let mut file = sample(Some(32));
        for (at, number) in numbers {
            let at = at.index(file.len() - 8);
            file[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        for (at, byte) in bytes {
            let at = at.index(file.len());
            file[at] = byte;
        }
        let at = spliced.0.index(file.len());
        file.splice(at..at, spliced.1);
        if let Ok(header) = read(&file) {
            for tensor in &header.tensors {
                let end = tensor.offset.checked_add(tensor.bytes);
                prop_assert!(end.is_some_and(|end| end <= file.len() as u64));
            }
        }
    }

    #[test]
    fn no_damage_makes_the_reader_panic_or_lie(at in 0usize..400, byte: u8, cut in 0usize..500) {
        let mut bytes = sample(None);
        let length = bytes.len();
        bytes[at % length] = byte;
        bytes.truncate(cut.max(1).min(length));
        if let Ok(header) = read(&bytes) {
            for tensor in &header.tensors {
                prop_assert!(tensor.offset + tensor.bytes <= bytes.len() as u64);
            }
        }
    }
}
