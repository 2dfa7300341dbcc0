#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::*;

const REPLY_BYTES_MAX: usize = 32;

fn chunk(flags: u16, kind: u16, cookie: u64, body: &[u8]) -> Vec<u8> {
    let header = ChunkHeader {
        magic: CHUNK_MAGIC.into(),
        flags: flags.into(),
        kind: kind.into(),
        cookie: cookie.into(),
        length: (body.len() as u32).into(),
    };
    [header.as_bytes(), body].concat()
}

#[test]
fn layouts_have_the_sizes_of_the_protocol() {
    assert_eq!(size_of::<RequestHeader>(), 28);
    assert_eq!(size_of::<SimpleHeader>(), 16);
    assert_eq!(size_of::<ChunkHeader>(), 20);
    assert_eq!(size_of::<ChunkHeader>() + size_of::<HoleBody>(), REPLY_BYTES_MAX);
}

#[test]
fn wrong_chunks_are_refused() {
    for bytes in [
        chunk(1, CHUNK_NONE, 1, &[0]),
        chunk(0, CHUNK_NONE, 1, &[]),
        chunk(1, CHUNK_OFFSET_DATA, 1, &[0; 8]),
        chunk(1, CHUNK_OFFSET_HOLE, 1, &[0; 12]),
        chunk(1, CHUNK_OFFSET_HOLE, 1, &[1; 13]),
        chunk(1, CHUNK_ERROR_BIT | 1, 1, &[0, 0, 0, 0, 0, 0]),
        chunk(1, CHUNK_ERROR_BIT | 1, 1, &[0, 0, 0, 5, 0, 1]),
        chunk(1, CHUNK_ERROR_BIT | 1, 1, &[0, 0, 0, 5, 0]),
        chunk(1, CHUNK_ERROR_BIT | 1, 1, &vec![1; 5000]),
        chunk(1, 5, 1, &[0; 12]),
        b"garbage!".to_vec(),
    ] {
        assert!(parse_reply(&bytes).is_err(), "{bytes:?}");
    }
}

proptest! {
    #[test]
    fn data_and_hole_come_back(cookie: u64, offset: u64, length in 1u32..=u32::MAX - 8, done: bool) {
        let header = ChunkHeader {
            magic: CHUNK_MAGIC.into(),
            flags: u16::from(done).into(),
            kind: CHUNK_OFFSET_DATA.into(),
            cookie: cookie.into(),
            length: (length + 8).into(),
        };
        let bytes = [header.as_bytes(), &offset.to_be_bytes()].concat();
        let expected = Reply::Chunk { cookie, done, body: ChunkBody::Data { offset, length } };
        prop_assert_eq!(parse_reply(&bytes).unwrap(), Some((expected, 28)));

        let body = [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat();
        let bytes = chunk(u16::from(done), CHUNK_OFFSET_HOLE, cookie, &body);
        let expected = Reply::Chunk { cookie, done, body: ChunkBody::Hole { offset, length } };
        prop_assert_eq!(parse_reply(&bytes).unwrap(), Some((expected, 32)));
        for shorter in 0..bytes.len() {
            prop_assert_eq!(parse_reply(&bytes[..shorter]).unwrap(), None);
        }
    }

    #[test]
    fn any_bytes_are_answered_within_the_bound(
        start in prop_oneof![Just(SIMPLE_REPLY_MAGIC), Just(CHUNK_MAGIC), any::<u32>()],
        rest in proptest::collection::vec(any::<u8>(), 60),
    ) {
        let bytes = [&start.to_be_bytes()[..], &rest].concat();
        if let Ok(answer) = parse_reply(&bytes) {
            let (_, taken) = answer.unwrap();
            prop_assert!(taken <= REPLY_BYTES_MAX);
        }
    }
}
