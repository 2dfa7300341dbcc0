//! A ring of frames, filled and emptied at random.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
use super::*;
use crate::backend::Segments;
use crate::backend::net::NetHeader;

/// A frame of `bytes` bytes that all are `value`, in two ranges.
fn push(ring: &mut FrameRing, bytes: usize, value: u8) -> bool {
    let content = vec![value; bytes];
    let cut = bytes / 3;
    let range = |part: &[u8]| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
    let ranges = [range(&content[..cut]), range(&content[cut..])];
    // SAFETY: list and content outlive the call.
    let segments = unsafe { Segments::new(ranges.as_ptr(), 2) };
    ring.push(&Outgoing { header: NetHeader::DONE, segments, bytes: bytes as u32 }).is_some()
}

#[test]
fn frames_come_out_as_they_went_in() {
    let mut ring = FrameRing::new(64, 100_000).unwrap();
    let mut random = 7u64;
    let (mut put, mut taken) = (0u32, 0u32);
    let length = |number: u32| 14 + (number as usize * 7919) % 9000;
    let mut refused = 0;
    for _ in 0..20_000 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        if random >> 62 != 0 {
            if push(&mut ring, length(put), put as u8) {
                put += 1;
            } else {
                refused += 1;
            }
        } else {
            let count = ring.frames(1 + (random >> 40) as usize % 8).len();
            for index in 0..count {
                let frame = ring.frames(count)[index];
                let number = taken + index as u32;
                assert_eq!(frame.length() as usize, length(number));
                assert!(frame.bytes().iter().all(|byte| *byte == number as u8), "frame {number}");
            }
            // Not all that were handed over are taken.
            let done = count.saturating_sub((random >> 33) as usize % 2);
            ring.release(done);
            taken += done as u32;
        }
    }
    assert!(taken > 1000 && refused > 100 && put - taken <= 64, "{put} {taken} {refused}");
}

#[test]
fn there_is_always_room_for_the_longest_frame_in_an_empty_ring() {
    let mut ring = FrameRing::new(4, 0).unwrap();
    for _ in 0..3 {
        assert!(push(&mut ring, FRAME_BYTES_MAX as usize, 1));
        assert!(!push(&mut ring, 14, 2));
        ring.release(1);
    }
    assert!(!push(&mut ring, FRAME_BYTES_MAX as usize + 1, 3));
    assert!(push(&mut ring, 100, 4) && push(&mut ring, 100, 5));
    ring.clear();
    assert!(ring.frames(9).is_empty() && ring.is_empty());
}
