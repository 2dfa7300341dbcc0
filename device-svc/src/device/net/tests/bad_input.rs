//! What a driver must not do, and what comes of it.

use super::*;
use crate::address::Iova;
use crate::backend::net::offload::SoftwareOffload;
use crate::driver::Buffer;
use crate::metrics::DropReason;

const PEER: Octets = [0x52, 0x54, 0, 9, 9, 9];

/// Turns until a queue has failed; returns which, and why.
fn failure(bed: &mut Bed) -> (u16, QueueFault) {
    bed.until("fault", |bed| bed.faults.0.lock().unwrap().first().copied())
}

#[test]
fn frames_that_ask_for_what_was_not_negotiated_are_dropped() {
    let mut bed = Bed::new(&Shape::new());
    bed.receive.add_buffers(8, 1);
    let needs_checksum = FrameHeader { flags: 1, checksum_start: 14, checksum_offset: 2, ..FrameHeader::default() };
    let cut = FrameHeader { gso_type: 1, segment_bytes: 1000, ..needs_checksum };
    for header in [needs_checksum, cut, FrameHeader { gso_type: 77, ..FrameHeader::default() }] {
        assert!(bed.transmit.send(header, &frame_to(PEER, 100, 1), &[]));
    }
    assert!(bed.transmit.send(FrameHeader::default(), &frame_to(PEER, 100, 1)[..13], &[]), "no Ethernet header");
    assert!(bed.transmit.send(FrameHeader::default(), &frame_to(PEER, 9018, 1), &[]));
    assert_eq!(bed.frame().1, looped(&frame_to(PEER, 9018, 1)), "those beside them are sent");
    assert_eq!(bed.drops(1, DropReason::BadHeader), 4);
    assert!(bed.faults.0.lock().unwrap().is_empty());
}

#[test]
fn frames_of_another_are_dropped_where_that_is_asked_for() {
    let mut shape = Shape::new();
    shape.settings.anti_spoofing = Some(AntiSpoofing { mac: true, vlans: None, addresses: None });
    let mut bed = Bed::new(&shape);
    bed.receive.add_buffers(8, 1);
    let from = |source: Octets| [&PEER[..], &source, &[8, 0], &[0; 46]].concat();
    let own = bed.shared.mac();
    bed.send(&from(PEER));
    bed.send(&from(own));
    bed.send(&from([0; 6]));
    assert_eq!(bed.frame().1, looped(&from(own)), "its own is sent");
    bed.until("drops", |bed| (bed.drops(1, DropReason::Spoofed) == 2).then_some(()));
    // Nor may the driver take another address, but its own it may.
    let (class, set) = (spec::VIRTIO_NET_CTRL_MAC, spec::VIRTIO_NET_CTRL_MAC_ADDR_SET);
    assert_eq!(bed.command(class, set, &PEER), spec::VIRTIO_NET_ERR as u8);
    assert_eq!(bed.shared.mac(), own);
    assert_eq!(bed.command(class, set, &own), spec::VIRTIO_NET_OK as u8);
    // Nor does the card announce another.
    bed.shared.announce_for(PEER);
    bed.send(&from(own));
    assert_eq!(bed.frame().1, looped(&from(own)), "nothing before it");
    assert!(bed.faults.0.lock().unwrap().is_empty());
}

/// A checksum is computed after the frame was judged: it must not come to stand where the frame says who sends it.
#[test]
fn a_checksum_cannot_change_what_a_frame_was_judged_by() {
    let mut shape = Shape::new();
    let address = "fd00::5".parse::<std::net::Ipv6Addr>().unwrap();
    shape.settings.anti_spoofing = Some(AntiSpoofing { mac: true, vlans: None, addresses: Some(vec![address.into()]) });
    let network = SoftwareOffload::new(Arc::new(LoopbackBackend::new()));
    let mut bed = Bed::over(&shape, &network);
    bed.receive.add_buffers(8, 1);
    let head = [&PEER[..], &MAC, &[0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, 6, 64]].concat();
    let frame = [&head[..], &address.octets(), &[0; 36]].concat();
    let header = |checksum_start, checksum_offset| FrameHeader {
        flags: 1,
        checksum_start,
        checksum_offset,
        ..FrameHeader::default()
    };
    // The last bytes of the source; the same from further in front; the Ethernet source. Then where TCP has it.
    for header in [header(34, 2), header(14, 22), header(0, 10), header(54, 16)] {
        assert!(bed.transmit.send(header, &frame, &[]));
    }
    bed.until("sent", |bed| (bed.counters[1].net.packets.get() == 1).then_some(()));
    assert_eq!((bed.drops(1, DropReason::Spoofed), bed.drops(1, DropReason::BadHeader)), (1, 2));
}

#[test]
fn a_frame_over_the_mtu_is_dropped() {
    let mut shape = Shape::new();
    shape.settings.mtu = 1500;
    let mut bed = Bed::new(&shape);
    bed.receive.add_buffers(4, 1);
    bed.send(&frame_to(PEER, 1519, 1));
    bed.send(&frame_to(PEER, 1518, 2));
    assert_eq!(bed.frame().1, looped(&frame_to(PEER, 1518, 2)));
    assert_eq!(bed.drops(1, DropReason::TooLong), 1);
    // The operator changes it while it runs.
    bed.shared.set_mtu(1000);
    assert_eq!(bed.shared.config_space()[10..12], 1000_u16.to_le_bytes());
    bed.send(&frame_to(PEER, 1019, 3));
    assert_eq!(bed.drops(1, DropReason::TooLong), 2);
}

#[test]
fn a_buffer_outside_memory_stops_the_queue() {
    let nowhere = |writable| Buffer { address: Iova(1 << 40), length: 2048, writable };
    for late in [None, Some(5)] {
        let shape = Shape { late, ..Shape::new() };
        let mut bed = Bed::new(&shape);
        assert!(bed.transmit.queue().add(&[nowhere(false)], 0));
        assert!(matches!(failure(&mut bed), (1, QueueFault::Unmapped(_))));
        let mut bed = Bed::new(&shape);
        assert!(bed.receive.queue().add(&[nowhere(true)], 0));
        bed.send(&frame_to(PEER, 60, 1));
        assert!(matches!(failure(&mut bed), (0, QueueFault::Unmapped(_))));
        let mut bed = Bed::new(&shape);
        assert!(bed.commands.queue().add(&[nowhere(false), nowhere(true)], 0));
        assert!(matches!(failure(&mut bed), (2, QueueFault::Unmapped(_))));
    }
}

/// Buffers may say that they are nearly 4 GiB long; what is not written to is not looked at.
#[test]
fn lengths_that_add_up_to_more_than_there_is_are_room_enough() {
    let mut bed = Bed::new(&Shape::new());
    let base = 0x1_0000 + (4 << 20);
    for (at, length) in [(base, 20), (base + 4096, u32::MAX - 10)] {
        assert!(bed.receive.queue().add(&[Buffer { address: Iova(at), length, writable: true }], 0));
    }
    bed.send(&frame_to(PEER, 100, 1));
    bed.until("packet", |bed| (bed.counters[0].net.packets.get() == 1).then_some(()));
    assert_eq!(bed.drops_in_all(), 0);
    assert!(bed.faults.0.lock().unwrap().is_empty());
}

#[test]
fn a_chain_of_the_wrong_kind_stops_the_queue() {
    let buffer = |length, writable| Buffer { address: Iova(0x1_0000), length, writable };
    let cases: [(usize, &[Buffer]); 4] =
        [(0, &[buffer(2048, false)]), (0, &[buffer(11, true)]), (1, &[buffer(11, false)]), (2, &[buffer(64, false)])];
    for (queue, chain) in cases {
        let mut bed = Bed::new(&Shape::new());
        let driver = [bed.receive.queue(), bed.transmit.queue(), bed.commands.queue()].into_iter().nth(queue).unwrap();
        assert!(driver.add(chain, 0));
        let (failed, fault) = failure(&mut bed);
        assert_eq!((usize::from(failed), matches!(fault, QueueFault::Request(_))), (queue, true), "{chain:?}");
        // It is over for that queue, and for none of the others.
        bed.turn();
        assert_eq!(bed.faults.0.lock().unwrap().len(), 1);
        if queue != 2 {
            assert_eq!(bed.command(spec::VIRTIO_NET_CTRL_RX, spec::VIRTIO_NET_CTRL_RX_PROMISC, &[0]), 0);
        }
    }
}

/// A reset in the middle of everything: lanes let go of the memory, and nothing of them is published any more.
#[test]
fn an_abandoned_queue_lets_go() {
    for late in [None, Some(9)] {
        let mut bed = Bed::new(&Shape { late, ..Shape::new() });
        bed.receive.add_buffers(30, 1);
        for number in 0..30 {
            bed.transmit.send(FrameHeader::default(), &frame_to(PEER, 500 * (1 + number as usize % 9), number), &[]);
        }
        bed.publish();
        bed.turn();
        bed.turn();
        for lane in &mut bed.lanes {
            lane.abandon();
        }
        for _ in 0..1000 {
            bed.turn();
            if bed.lanes.iter_mut().all(|lane| lane.is_let_go() && lane.is_drained()) {
                break;
            }
        }
        assert!(bed.lanes.iter_mut().all(|lane| lane.is_let_go() && lane.is_drained()));
        bed.transmit.reap();
        while bed.receive.take().is_some() {}
        for _ in 0..100 {
            bed.turn();
        }
        assert_eq!(bed.transmit.reap(), 0, "nothing more is published");
        assert!(bed.receive.take().is_none());
    }
}

/// DPDK's driver marks headers as writable in its indirect tables; nothing is ever written there.
#[test]
fn what_a_driver_sends_is_only_read() {
    for shape in [Shape::new(), Shape { wanted: u64::MAX, indirect: true, ..Shape::new() }] {
        let mut bed = Bed::new(&shape);
        bed.receive.add_buffers(1, 1);
        assert!(bed.transmit.send(FrameHeader::default(), &frame_to(PEER, 100, 1), &[12]));
        // Memory that nobody has written: a header that asks for nothing.
        let part = |at: u64, length| Buffer { address: Iova((7 << 20) + at), length, writable: length == 12 };
        assert!(bed.transmit.queue().add(&[part(0, 12), part(4096, 100)], 40));
        bed.until("both frames sent", |bed| (bed.counters[1].net.packets.get() == 2).then_some(()));
    }
}
