#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
//! Echo requests and what answers them.

use super::*;

/// The sum of all words, carries added, of a packet that is right.
fn sum(packet: &[u8]) -> u32 {
    let sum: u32 = packet.as_chunks::<2>().0.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    (sum & WORD_MAX) + (sum >> 16)
}

#[test]
fn requests_have_right_checksums() {
    for (identifier, number) in [(0, 0), (1, 2), (0xffff, 0xffff), (0x8000, 0x8001)] {
        assert_eq!(sum(&request(identifier, number)), WORD_MAX, "{identifier} {number}");
    }
}

#[test]
fn only_the_answer_to_a_request_answers_it() {
    let mut packet = vec![0x45; 20];
    packet.extend(request(7, 300));
    assert!(!answers(&packet, 7, 300), "the request itself");
    packet[20] = ECHO_REPLY;
    assert!(answers(&packet, 7, 300));
    assert!(!answers(&packet, 8, 300) && !answers(&packet, 7, 301));
    for length in 0..28 {
        assert!(!answers(&packet[..length], 7, 300), "{length} bytes of it");
    }
    packet[0] = 0x4f;
    assert!(!answers(&packet, 7, 300), "a longer header puts it elsewhere");
}
