//! Tags put in, taken off and renamed, in frames that lie in pieces.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "describes frames by their addresses")]

use super::*;
use crate::backend::Segments;
use crate::backend::net::{Segmentation, SegmentationKind};

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| at as u8 ^ (at >> 8) as u8).collect()
}

fn tagged(frame: &[u8], tag: u16) -> Vec<u8> {
    [&frame[..12], &TAGGED, &tag.to_be_bytes(), &frame[12..]].concat()
}

/// Writes `bytes`, cut into pieces of `piece`, with its tag changed: as a whole and as head and rest.
fn changed(bytes: &[u8], piece: usize, header: NetHeader, tag: Tag) -> Option<(NetHeader, Vec<u8>)> {
    let ranges: Vec<libc::iovec> = bytes
        .chunks(piece)
        .map(|piece| libc::iovec { iov_base: piece.as_ptr().cast_mut().cast(), iov_len: piece.len() })
        .collect();
    // SAFETY: the list and the bytes outlive the frame.
    let segments = unsafe { Segments::new(ranges.as_ptr(), ranges.len() as u32) };
    let frame = Outgoing { header, segments, bytes: bytes.len() as u32 };
    let frame = Frame::sent(&frame);
    let (header, length) = frame.changed(tag)?;
    let mut whole = vec![0; length as usize];
    frame.write(tag, &mut whole);
    let mut head = [0; HEAD_BYTES + TAG_BYTES];
    let count = frame.changed_head(tag, &mut head);
    let mut rest = Vec::new();
    frame.rest(&mut rest);
    let mut pieces = head[..count].to_vec();
    let mut behind = vec![0; length as usize - count];
    assert_eq!(copy_from(&rest, 0, &mut behind), behind.len());
    pieces.extend(behind);
    assert_eq!(pieces, whole, "head and rest are the whole");
    Some((header, whole))
}

#[test]
fn tags_change_and_the_rest_stays() {
    let headers = [
        NetHeader::DONE,
        NetHeader {
            checksum: Checksum::Needed { start: 34, offset: 16 },
            segmentation: Some(Segmentation {
                kind: SegmentationKind::Tcp4,
                ecn: false,
                bytes: 1000,
                header_bytes: 54,
            }),
        },
    ];
    for bytes in [14, 16, 60, HEAD_BYTES - 2, HEAD_BYTES, HEAD_BYTES + 1, 1500, 60_000] {
        for piece in [1, 13, 100, 4096, 70_000] {
            for header in headers {
                let plain = pattern(bytes);
                let with = tagged(&plain, 0xe000 | 5);
                assert_eq!(changed(&plain, piece, header, Tag::Keep).unwrap(), (header, plain.clone()));
                let (shifted, inserted) = changed(&plain, piece, header, Tag::Insert(5)).unwrap();
                assert_eq!(inserted, tagged(&plain, 5));
                assert_eq!(changed(&with, piece, shifted, Tag::Remove).unwrap(), (header, plain.clone()));
                assert_eq!(changed(&with, piece, header, Tag::Rename(9)).unwrap().1, tagged(&plain, 0xe000 | 9));
                if let Checksum::Needed { start, .. } = shifted.checksum {
                    assert_eq!(start, 38);
                }
            }
        }
    }
}

#[test]
fn what_would_point_outside_is_not_changed() {
    let early = NetHeader { checksum: Checksum::Needed { start: 2, offset: 0 }, segmentation: None };
    assert_eq!(changed(&tagged(&pattern(60), 1), 64, early, Tag::Remove), None);
    let longest = pattern(FRAME_BYTES_MAX as usize);
    assert_eq!(changed(&longest, 70_000, NetHeader::DONE, Tag::Insert(1)), None);
    assert_eq!(changed(&pattern(15), 64, NetHeader::DONE, Tag::Remove), None);
}

#[test]
fn tags_and_addresses_are_read() {
    let bytes = tagged(&pattern(60), 0x2000 | 77);
    let range = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: the bytes outlive the frame.
    let frame = unsafe { Incoming::new(NetHeader::DONE, bytes.as_ptr(), bytes.len() as u32) };
    let frame = Frame::come(&frame, &range);
    assert_eq!(frame.tag(), Some(77));
    assert_eq!((frame.destination(), frame.source()), ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]));
}
