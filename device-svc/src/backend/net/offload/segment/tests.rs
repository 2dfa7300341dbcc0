#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
use proptest::prelude::*;

use super::*;
use crate::backend::net::Offloads;
use crate::backend::net::header::{HEADER_BYTES, RawNetHeader};
use crate::backend::net::offload::checksum::complete;
use crate::backend::net::offload::tests::packets::{Packet, bytes, check_pieces, packets, same};
use zerocopy::FromBytes;

fn pieces(cut: &Cut, frame: &[u8]) -> Vec<Vec<u8>> {
    let mut headers = [0; HEADERS_BYTES_MAX];
    let piece = |number| {
        let payload = cut.piece(number, frame, &mut headers).unwrap();
        [&headers[..cut.header_bytes()], &frame[payload]].concat()
    };
    (0..cut.pieces()).map(piece).collect()
}

fn packet(six: bool, udp: bool) -> Packet {
    Packet {
        tags: 1,
        six,
        udp,
        ip_options: 1,
        tcp_options: 3,
        flags: 0xff,
        sequence: u32::MAX - 100,
        identification: u16::MAX,
        payload: bytes(3000, 5),
    }
}

proptest! {
    #[test]
    fn pieces_are_right(packet in packets(60_000), segment_bytes in prop_oneof![48..1500u16, 48..=u16::MAX]) {
        let (header, frame) = packet.undone(Some(segment_bytes));
        let cut = Cut::new(&frame, &header, u16::MAX).unwrap();
        let pieces = pieces(&cut, &frame);
        prop_assert_eq!(pieces.iter().map(Vec::len).sum::<usize>(), cut.bytes());
        check_pieces(&packet, &pieces, usize::from(segment_bytes));
    }

    #[test]
    fn what_is_completed_is_what_another_would_have_sent(packet in packets(3000)) {
        let (header, mut frame) = packet.undone(None);
        let Checksum::Needed { start, offset } = header.checksum else { panic!("{header:?}") };
        prop_assert!(complete(&mut frame, start, offset));
        let mut done = packet.done();
        let at = usize::from(start + offset);
        prop_assert!(same(short(&frame, at).unwrap(), short(&done, at).unwrap()));
        done[at..at + 2].copy_from_slice(&frame[at..at + 2]);
        prop_assert_eq!(frame, done);
    }

    /// Nearly right, so that every check is reached.
    #[test]
    fn what_is_spoilt_is_refused_or_cut_whole(
        packet in packets(2000),
        segment_bytes in 1..3000u16,
        spoilt in proptest::collection::vec((0..160usize, any::<u8>()), 0..4),
        length in prop_oneof![Just(usize::MAX), 0..200usize],
        right in any::<bool>(),
        other in any::<(u16, u16)>(),
    ) {
        let (mut header, mut frame) = packet.undone(Some(segment_bytes));
        if !right {
            header.checksum = Checksum::Needed { start: other.0, offset: other.1 };
        }
        for (at, value) in spoilt {
            if let Some(byte) = frame.get_mut(at) {
                *byte = value;
            }
        }
        frame.truncate(length);
        if let Ok(cut) = Cut::new(&frame, &header, u16::MAX) {
            prop_assert!(cut.pieces() <= PIECES_MAX && cut.header_bytes() <= HEADERS_BYTES_MAX);
            let payload: Vec<u8> = pieces(&cut, &frame).iter().flat_map(|piece| &piece[cut.header_bytes()..]).copied().collect();
            prop_assert_eq!(payload, &frame[cut.header_bytes()..]);
        }
    }

    #[test]
    fn any_bytes_are_refused_or_cut(mut all in proptest::collection::vec(any::<u8>(), 12..400), shape in 0..6u8) {
        all[0] = 1;
        all[1] = [1, 4, 5, 0x81, 0x84, 0][usize::from(shape)];
        let (header, frame) = all.split_first_chunk::<{ HEADER_BYTES as usize }>().unwrap();
        let raw = RawNetHeader::read_from_bytes(header).unwrap();
        if let Ok(header) = NetHeader::parse(&raw, frame.len() as u32, Offloads::ALL)
            && let Ok(cut) = Cut::new(frame, &header, u16::MAX)
        {
            prop_assert_eq!(pieces(&cut, frame).len(), cut.pieces() as usize);
        }
    }
}

#[test]
fn headers_that_are_not_whole_are_refused() {
    for (six, udp) in [(false, false), (false, true), (true, false), (true, true)] {
        let packet = packet(six, udp);
        let (header, frame) = packet.undone(Some(1000));
        let (_, payload_at) = packet.places();
        for length in 0..payload_at {
            assert_eq!(Cut::new(&frame[..length], &header, u16::MAX).unwrap_err(), CannotCut::Headers, "{length}");
        }
        let empty = Cut::new(&frame[..payload_at], &header, u16::MAX).unwrap();
        assert_eq!((empty.pieces(), empty.bytes()), (1, payload_at));
        // Another packet than was read, a shorter one.
        let cut = Cut::new(&frame, &header, u16::MAX).unwrap();
        assert_eq!(cut.piece(2, &frame[..frame.len() - 1], &mut [0; HEADERS_BYTES_MAX]), None);
        assert_eq!(cut.piece(3, &frame, &mut [0; HEADERS_BYTES_MAX]), None);
    }
}

/// Cuts a packet after a change to its bytes and its virtio header.
fn changed(packet: &Packet, change: impl FnOnce(&mut NetHeader, &mut Vec<u8>, usize)) -> Result<u32, CannotCut> {
    let (mut header, mut frame) = packet.undone(Some(1000));
    change(&mut header, &mut frame, 14 + usize::from(packet.tags) * 4);
    Cut::new(&frame, &header, u16::MAX).map(|cut| cut.pieces())
}

#[test]
fn what_is_not_as_it_says_is_refused() {
    use CannotCut::{Headers, Pieces};
    let (four, six, udp) = (packet(false, false), packet(true, false), packet(false, true));
    let kind =
        |kind| move |header: &mut NetHeader, _: &mut Vec<u8>, _| header.segmentation.as_mut().unwrap().kind = kind;
    let byte = |at: usize, value: u8| {
        move |_: &mut NetHeader, frame: &mut Vec<u8>, network: usize| frame[network + at] = value
    };
    for good in [&four, &six, &udp] {
        assert_eq!(changed(good, |_, _, _| ()), Ok(3));
        let off = |header: &mut NetHeader, _: &mut Vec<u8>, _| {
            let Checksum::Needed { offset, .. } = &mut header.checksum else { panic!("{header:?}") };
            *offset += 2;
        };
        assert_eq!(changed(good, off), Err(CannotCut::Checksum));
        assert_eq!(changed(good, |header, _, _| header.checksum = Checksum::Valid), Err(Headers));
        assert_eq!(changed(good, |header, _, _| header.segmentation = None), Err(Headers));
        // Neither IPv4 nor IPv6; a third VLAN tag.
        assert_eq!(changed(good, |_, frame, network| frame[network - 1] = 6), Err(Headers));
        assert_eq!(changed(good, byte(0, 0x55)), Err(Headers));
        let tagged = Packet { tags: 2, ..good.clone() };
        let third = |_: &mut NetHeader, frame: &mut Vec<u8>, _| {
            frame.splice(12..12, [0x81, 0, 0, 1]);
        };
        assert_eq!(changed(&tagged, third), Err(Headers));
        let many = |header: &mut NetHeader, frame: &mut Vec<u8>, _| {
            header.segmentation.as_mut().unwrap().bytes = 1;
            frame.truncate(1600);
        };
        assert_eq!(changed(good, many), Err(Pieces));
    }
    assert_eq!(changed(&four, kind(SegmentationKind::Tcp6)), Err(Headers));
    assert_eq!(changed(&six, kind(SegmentationKind::Tcp4)), Err(Headers));
    assert_eq!(changed(&four, kind(SegmentationKind::Udp)), Err(Headers));
    assert_eq!(changed(&udp, kind(SegmentationKind::Tcp4)), Err(Headers));
    // A fragment; more to come; a header of IPv4 that is too short; one of TCP.
    assert_eq!(changed(&four, byte(7, 1)), Err(Headers));
    assert_eq!(changed(&four, byte(6, 0x20)), Err(Headers));
    assert_eq!(changed(&four, byte(6, 0x40)), Ok(3));
    assert_eq!(changed(&four, byte(0, 0x44)), Err(Headers));
    assert_eq!(changed(&four, byte(24 + 12, 0x4f)), Err(Headers));
    // A routing header that has led all the way, and one that has not; a fragment header; extension headers without end.
    assert_eq!(changed(&six, byte(6, ROUTING)), Ok(3));
    let on_its_way = |_: &mut NetHeader, frame: &mut Vec<u8>, network: usize| {
        (frame[network + 6], frame[network + 43]) = (ROUTING, 1);
    };
    assert_eq!(changed(&six, on_its_way), Err(Headers));
    assert_eq!(changed(&six, byte(6, 44)), Err(Headers));
    assert_eq!(changed(&six, |_, frame, network| frame[network + 40..].fill(0)), Err(Headers));
}

#[test]
fn pieces_must_fit_the_network() {
    let packet = packet(false, false);
    let (header, frame) = packet.undone(Some(1000));
    // 24 of IPv4, 32 of TCP.
    assert!(Cut::new(&frame, &header, 1056).is_ok());
    assert_eq!(Cut::new(&frame, &header, 1055).unwrap_err(), CannotCut::Pieces);
}
