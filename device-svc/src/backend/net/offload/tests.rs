#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "a channel's protocol is about addresses")]

pub(super) mod packets;

use std::collections::VecDeque;
use std::sync::Mutex;

use proptest::prelude::*;

use self::packets::{Packet, bytes, check_pieces, packets};
use super::*;
use crate::backend::Segments;
use crate::backend::net::loopback::LoopbackBackend;
use crate::backend::net::{BURST, Checksum, FRAME_BYTES_MAX, NetHeader, Segmentation};

type Frame = (NetHeader, Vec<u8>);

/// What a network sees, and what it has for us.
#[derive(Default)]
struct Wire {
    sent: Vec<Frame>,
    coming: VecDeque<Frame>,
    /// How much it takes of what it is given, call by call; in the end all.
    takes: Vec<usize>,
    calls: usize,
    wanted: Offloads,
}

struct WireChannel {
    wire: Arc<Mutex<Wire>>,
    handed: Vec<Incoming>,
}

impl NetChannel for WireChannel {
    fn enable(&mut self, _enabled: bool) {}

    fn leave_undone(&mut self, offloads: Offloads) {
        self.wire.lock().unwrap().wanted = offloads;
    }

    fn transmit(&mut self, frames: &[Outgoing]) -> Sent {
        assert!(frames.len() <= BURST);
        let mut wire = self.wire.lock().unwrap();
        wire.calls += 1;
        let taken = wire.takes.pop().unwrap_or(usize::MAX).min(frames.len());
        for Outgoing { header, segments, bytes } in &frames[..taken] {
            let mut frame = Vec::new();
            for range in segments.as_slice() {
                // SAFETY: what a channel is given is readable while `transmit` runs, and nobody writes it in a test.
                frame.extend_from_slice(unsafe { std::slice::from_raw_parts(range.iov_base.cast(), range.iov_len) });
            }
            assert_eq!(frame.len(), *bytes as usize);
            wire.sent.push((*header, frame));
        }
        Sent { taken, lost: 0 }
    }

    fn receive(&mut self, most: usize) -> &[Incoming] {
        let wire = self.wire.lock().unwrap();
        // SAFETY: the bytes stay where they are until the frame is released.
        let incoming = |(header, frame): &Frame| unsafe { Incoming::new(*header, frame.as_ptr(), frame.len() as u32) };
        self.handed = wire.coming.iter().take(most.min(BURST)).map(incoming).collect();
        &self.handed
    }

    fn release(&mut self, count: usize) {
        assert!(count <= self.handed.len(), "more is released than was handed over");
        self.wire.lock().unwrap().coming.drain(..count);
        self.handed.clear();
    }

    fn wake_fd(&self) -> Option<RawFd> {
        None
    }

    fn arm(&mut self) -> bool {
        self.wire.lock().unwrap().coming.is_empty()
    }
}

fn around(does: Offloads, wire: Wire) -> (SoftwareOffloadChannel, Arc<Mutex<Wire>>) {
    let wire = Arc::new(Mutex::new(wire));
    let inner = WireChannel { wire: Arc::clone(&wire), handed: Vec::new() };
    let info = NetInfo { transmit: does, receive: does, ..LoopbackBackend::new().info() };
    let mut channel = SoftwareOffloadChannel::new(Box::new(inner), info);
    channel.enable(true);
    (channel, wire)
}

/// Gives frames to a channel in one call.
fn transmit(channel: &mut dyn NetChannel, frames: &[Frame]) -> Sent {
    let range = |part: &[u8]| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
    let ranges: Vec<[libc::iovec; 2]> = frames
        .iter()
        .map(|(_, frame)| {
            let (first, second) = frame.split_at(frame.len() / 3);
            [range(first), range(second)]
        })
        .collect();
    let outgoing: Vec<Outgoing> = frames
        .iter()
        .zip(&ranges)
        .map(|((header, frame), ranges)| {
            // SAFETY: ranges and bytes outlive the call.
            let segments = unsafe { Segments::new(ranges.as_ptr(), 2) };
            Outgoing { header: *header, segments, bytes: frame.len() as u32 }
        })
        .collect();
    channel.transmit(&outgoing)
}

/// What a frame becomes for somebody who does as much as `does`, with this said of checksums; nothing if it cannot be cut.
fn made(does: Offloads, (header, frame): &Frame, done: Checksum) -> Vec<Frame> {
    let header_done = NetHeader { checksum: done, segmentation: None };
    if does.cover(header) {
        return vec![(*header, frame.clone())];
    }
    let mut frame = frame.clone();
    if let (None, Checksum::Needed { start, offset }) = (header.segmentation, header.checksum) {
        assert!(checksum::complete(&mut frame, start, offset));
        return vec![(header_done, frame)];
    }
    let Ok(cut) = Cut::new(&frame, header, u16::MAX) else { return Vec::new() };
    let mut headers = [0; segment::HEADERS_BYTES_MAX];
    let mut piece = |number| {
        let payload = cut.piece(number, &frame, &mut headers).unwrap();
        (header_done, [&headers[..cut.header_bytes()], &frame[payload]].concat())
    };
    (0..cut.pieces()).map(&mut piece).collect()
}

/// A frame of which nothing can be made.
fn spoilt(mut frame: Frame) -> Frame {
    frame.1[12] = 0x42;
    frame
}

/// Frames of all kinds: done, to be completed, to be cut, and spoilt.
fn frames() -> impl Strategy<Value = Vec<Frame>> {
    let frame = (packets(20_000), 0..10u8, 300..3000u16).prop_map(|(packet, kind, segment_bytes)| match kind {
        0..3 => (NetHeader::DONE, packet.done()),
        3..6 => packet.undone(None),
        6..9 => packet.undone(Some(segment_bytes)),
        _ => spoilt(packet.undone(Some(segment_bytes))),
    });
    proptest::collection::vec(frame, 1..40)
}

fn offloads() -> impl Strategy<Value = Offloads> {
    any::<[bool; 5]>().prop_map(|[checksum, tso4, tso6, ecn, uso]| Offloads { checksum, tso4, tso6, ecn, uso })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn all_is_sent_once_and_in_order(
        frames in frames(),
        does in offloads(),
        takes in proptest::collection::vec(0..=BURST, 0..60),
        choices in proptest::collection::vec((1..=BURST, 0..3u8), 1..40),
    ) {
        let (mut channel, wire) = around(does, Wire { takes, ..Wire::default() });
        let expected: Vec<Vec<Frame>> = frames.iter().map(|frame| made(does, frame, Checksum::Unknown)).collect();
        let (mut taken, mut lost) = (0, 0);
        for &(count, between) in choices.iter().cycle().take(400) {
            let burst = &frames[taken..frames.len().min(taken + count)];
            let sent = transmit(&mut channel, burst);
            prop_assert!(sent.taken <= burst.len() && sent.lost <= sent.taken);
            (taken, lost) = (taken + sent.taken, lost + sent.lost);
            match between {
                0 => channel.woken(),
                1 => assert!(channel.receive(BURST).is_empty()),
                _ => {}
            }
        }
        channel.woken();
        prop_assert_eq!(taken, frames.len());
        prop_assert_eq!(lost, expected.iter().filter(|made| made.is_empty()).count());
        let expected: Vec<Frame> = expected.into_iter().flatten().collect();
        let wire = wire.lock().unwrap();
        prop_assert_eq!(wire.sent.len(), expected.len());
        for (number, (sent, expected)) in wire.sent.iter().zip(&expected).enumerate() {
            prop_assert!(sent == expected, "frame {number}");
        }
    }

    #[test]
    fn all_is_received_once_and_in_order(
        frames in frames(),
        undone in offloads(),
        choices in proptest::collection::vec((1..=BURST, 0..=BURST), 1..40),
    ) {
        let wire = Wire { coming: frames.iter().cloned().collect(), ..Wire::default() };
        let (mut channel, wire) = around(Offloads::ALL, wire);
        channel.leave_undone(undone);
        prop_assert_eq!(wire.lock().unwrap().wanted, undone);
        let done = if undone.checksum { Checksum::Valid } else { Checksum::Unknown };
        // What cannot be made comes as it is, and is refused by whoever gets it.
        let made = |frame: &Frame| match made(undone, frame, done) {
            made if made.is_empty() => vec![frame.clone()],
            made => made,
        };
        let expected: Vec<Frame> = frames.iter().flat_map(made).collect();
        let mut next = 0;
        for &(most, done) in choices.iter().chain(std::iter::repeat_n(&(BURST, BURST), 5000)) {
            let untouched: Vec<*const u8> = wire.lock().unwrap().coming.iter().map(|(_, frame)| frame.as_ptr()).collect();
            let came = channel.receive(most);
            prop_assert!(came.len() <= most && came.len() <= BURST);
            prop_assert_eq!(came.is_empty(), next == expected.len());
            for (frame, (header, bytes)) in came.iter().zip(&expected[next..]) {
                prop_assert!(frame.header == *header && frame.bytes() == bytes, "frame {next}");
                if frame.header.segmentation.is_some() || matches!(frame.header.checksum, Checksum::Needed { .. }) {
                    prop_assert!(untouched.contains(&frame.bytes().as_ptr()), "what nothing is done to is copied");
                }
            }
            let count = came.len().min(done);
            channel.release(count);
            next += count;
            if next == expected.len() {
                break;
            }
            prop_assert!(!channel.arm());
        }
        prop_assert_eq!(next, expected.len());
        prop_assert!(channel.arm() && wire.lock().unwrap().coming.is_empty());
    }
}

fn long(payload_bytes: usize) -> Packet {
    Packet {
        tags: 0,
        six: false,
        udp: false,
        ip_options: 0,
        tcp_options: 0,
        flags: 0x19,
        sequence: 7,
        identification: 9,
        payload: bytes(payload_bytes, 3),
    }
}

#[test]
fn frames_that_need_nothing_go_through_in_one_call() {
    let (mut channel, wire) = around(Offloads { tso4: true, checksum: true, ..Offloads::NONE }, Wire::default());
    let frames: Vec<Frame> =
        (0..BURST).map(|number| long(number * 99).undone((number % 2 == 0).then_some(100))).collect();
    assert_eq!(transmit(&mut channel, &frames), Sent { taken: BURST, lost: 0 });
    let wire = wire.lock().unwrap();
    assert_eq!((wire.calls, &wire.sent), (1, &frames));
}

#[test]
fn checksums_of_a_burst_are_completed_in_one_call() {
    let (mut channel, wire) = around(Offloads::NONE, Wire::default());
    let frames: Vec<Frame> = (0..BURST)
        .map(|number| if number % 4 == 0 { (NetHeader::DONE, long(9).done()) } else { long(1400).undone(None) })
        .collect();
    assert_eq!(transmit(&mut channel, &frames), Sent { taken: BURST, lost: 0 });
    let wire = wire.lock().unwrap();
    assert_eq!((wire.calls, wire.sent.len()), (1, BURST));
}

#[test]
fn a_loop_takes_everything_that_can_be_left_undone() {
    let network = SoftwareOffload::new(Arc::new(LoopbackBackend::new()));
    assert_eq!((network.info().transmit, network.info().receive), (Offloads::ALL, Offloads::ALL));
    let mut channel = network.open_channel().unwrap();
    channel.enable(true);
    // More pieces than a loop takes at once: what comes back makes room.
    let packet = long(60_000);
    let frames = [packet.undone(Some(100)), (NetHeader::DONE, long(10).done())];
    assert_eq!(transmit(channel.as_mut(), &frames), Sent { taken: 1, lost: 0 });
    let mut came: Vec<Vec<u8>> = Vec::new();
    while came.len() < 600 {
        let frames = channel.receive(BURST);
        assert!(!frames.is_empty(), "{} came", came.len());
        for frame in frames {
            let mut bytes = frame.bytes().to_vec();
            let (destination, source) = bytes.split_at_mut(6);
            destination.swap_with_slice(&mut source[..6]);
            came.push(bytes);
        }
        let count = frames.len();
        channel.release(count);
    }
    check_pieces(&packet, &came, 100);
    assert!(channel.arm() && channel.receive(BURST).is_empty());
    assert_eq!(transmit(channel.as_mut(), &frames[1..]), Sent { taken: 1, lost: 0 });
    assert_eq!(channel.receive(BURST).len(), 1);
}

#[test]
fn what_is_half_sent_is_dropped_when_the_channel_is_disabled() {
    let (mut channel, wire) = around(Offloads::NONE, Wire { takes: vec![0, 5], ..Wire::default() });
    let frames = [long(3000).undone(Some(100)), (NetHeader::DONE, long(1).done())];
    assert_eq!(transmit(&mut channel, &frames), Sent { taken: 1, lost: 0 });
    assert_eq!(transmit(&mut channel, &frames[1..]), Sent { taken: 0, lost: 0 });
    channel.enable(false);
    assert_eq!((channel.lost_later(), channel.lost_later()), (1, 0), "it was taken");
    channel.enable(true);
    assert_eq!(transmit(&mut channel, &frames[1..]), Sent { taken: 1, lost: 0 });
    let wire = wire.lock().unwrap();
    assert_eq!((wire.sent.len(), &wire.sent[5]), (6, &frames[1]));
}

#[test]
fn a_frame_that_is_too_long_for_its_copy_is_lost() {
    let (mut channel, wire) = around(Offloads::NONE, Wire::default());
    let mut frame = long(1000).undone(None);
    frame.1.resize(3 * FRAME_BYTES_MAX as usize, 0);
    let after = (NetHeader::DONE, long(1).done());
    assert_eq!(transmit(&mut channel, &[frame.clone(), after.clone()]), Sent { taken: 2, lost: 1 });
    assert_eq!(wire.lock().unwrap().sent, [after]);
    // The other way it comes as it is.
    let header = NetHeader {
        segmentation: Some(Segmentation {
            kind: crate::backend::net::SegmentationKind::Tcp4,
            ecn: false,
            bytes: 100,
            header_bytes: 0,
        }),
        ..frame.0
    };
    let (mut channel, _) = around(Offloads::NONE, Wire { coming: [(header, frame.1)].into(), ..Wire::default() });
    assert_eq!(channel.receive(BURST)[0].header, header);
}
