//! Frames arrive whole, in order and once, however memory is used.

use super::*;
use crate::backend::net::{Incoming, Missed, Outgoing, Sent};
use crate::metrics::DropReason;

const PEER: Octets = [0x52, 0x54, 0, 9, 9, 9];

/// Bursts of frames of all lengths, in buffers cut anywhere, come back as they were sent, while buffers are scarce at times.
#[test]
fn frames_come_back_as_they_were_sent_in_every_mode() {
    for shape in Shape::all() {
        let mut bed = Bed::new(&shape);
        let lengths = [14, 60, 64, 65, 243, 244, 245, 256, 257, 1500, 1514, 2035, 2036, 2037, 4096, 9000, 9014, 9018];
        let (mut sent, mut come, mut random) = (0_u32, 0_u32, 1_u32);
        let mut next = |below: u32| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (random >> 8) % below
        };
        let total = if shape.late.is_some() { 150 } else { 400 };
        for _ in 0..200_000 {
            if come == total {
                break;
            }
            for _ in 0..next(6) {
                let bytes = lengths[sent as usize % lengths.len()];
                let cuts = [next(40), 40 + next(200), 240 + next(2000)];
                let cuts = &cuts[..next(4) as usize];
                if sent < total && bed.transmit.send(FrameHeader::default(), &frame_to(PEER, bytes, sent), cuts) {
                    sent += 1;
                }
            }
            bed.receive.add_buffers(next(5) as usize, 1 + next(3));
            bed.publish();
            bed.turn();
            bed.transmit.reap();
            while let Some((header, frame)) = bed.receive.take() {
                assert!(
                    frame == looped(&frame_to(PEER, lengths[come as usize % lengths.len()], come)),
                    "frame {come} of {shape:?}"
                );
                assert_eq!((header.flags, header.gso_type), (0, 0));
                come += 1;
            }
        }
        assert_eq!((sent, come), (total, total), "{shape:?}; {:?}", bed.faults.0.lock().unwrap());
        assert_eq!(bed.drops_in_all(), 0, "{shape:?}");
        for queue in [0, 1] {
            assert_eq!(bed.counters[queue].net.packets.get(), u64::from(total));
        }
        assert_eq!(bed.counters[0].net.bytes.get(), bed.counters[1].net.bytes.get());
    }
}

/// Without merging a frame that is longer than its buffer is dropped, and the buffer stays for the next.
#[test]
fn a_frame_that_does_not_fit_is_dropped_and_counted() {
    let mut shape = Shape::new();
    shape.wanted &= !(1 << spec::VIRTIO_NET_F_MRG_RXBUF);
    shape.buffer_bytes = 1526;
    let mut bed = Bed::new(&shape);
    bed.receive.add_buffers(4, 1);
    bed.send(&frame_to(PEER, 1515, 1));
    bed.send(&frame_to(PEER, 1514, 2));
    assert_eq!(bed.frame().1, looped(&frame_to(PEER, 1514, 2)));
    assert_eq!(bed.drops(0, DropReason::TooLong), 1);
}

/// With merging it is dropped only if all buffers that the driver can add are too few.
#[test]
fn a_frame_waits_for_buffers_that_may_still_come() {
    let mut shape = Shape::new();
    (shape.size, shape.buffer_bytes) = (8, 1024);
    let mut bed = Bed::new(&shape);
    bed.receive.add_buffers(3, 1);
    bed.send(&frame_to(PEER, 4000, 1));
    for _ in 0..100 {
        bed.turn();
    }
    assert!(bed.receive.take().is_none() && bed.drops_in_all() == 0);
    bed.receive.add_buffers(1, 1);
    let (header, frame) = bed.frame();
    assert_eq!((header.buffers, frame), (4, looped(&frame_to(PEER, 4000, 1))));
    bed.receive.add_buffers(8, 1);
    bed.send(&frame_to(PEER, 9000, 2));
    bed.send(&frame_to(PEER, 60, 3));
    assert_eq!(bed.frame().1, looped(&frame_to(PEER, 60, 3)));
    assert_eq!(bed.drops(0, DropReason::TooLong), 1);
}

/// A queue that stops gives back what it fetched ahead: the next lane goes on with exactly that.
#[test]
fn a_queue_stops_where_it_used_its_chains_up() {
    for packed in [false, true] {
        let mut shape = Shape::new();
        if packed {
            shape.wanted |= features::RING_PACKED;
        }
        let mut bed = Bed::new(&shape);
        bed.receive.add_buffers(20, 1);
        bed.send(&frame_to(PEER, 100, 1));
        bed.send(&frame_to(PEER, 5000, 2));
        bed.frame();
        bed.frame();
        for (lane, used) in [(0, 4), (1, 2)] {
            bed.lanes[lane].stop(Moment(bed.now));
            bed.turn();
            assert!(bed.lanes[lane].is_stopped(Moment(bed.now)));
            let position = bed.lanes[lane].position();
            assert_eq!(position.next_avail, used, "lane {lane}, packed {packed}");
            if packed {
                assert_eq!((position.next_used, position.avail_wrap), (used, true));
            }
        }
    }
}

/// A link that is down brings nothing and takes everything.
#[test]
fn a_link_that_is_down_drops_both_ways() {
    let mut bed = Bed::new(&Shape::new());
    bed.receive.add_buffers(8, 1);
    bed.send(&frame_to(PEER, 60, 1));
    bed.frame();
    assert!(bed.shared.set_carrier_up(false) && !bed.shared.set_wanted_up(false));
    assert_eq!(bed.shared.config_space()[6] & 1, 0);
    bed.send(&frame_to(PEER, 60, 2));
    assert_eq!(bed.drops(1, DropReason::LinkDown), 1);
    assert!(!bed.shared.set_carrier_up(true) && bed.shared.set_wanted_up(true));
    bed.send(&frame_to(PEER, 60, 3));
    assert_eq!(bed.frame().1, looped(&frame_to(PEER, 60, 3)));
}

/// What a limit does not let pass waits, in order, and passes when its time has come.
#[test]
fn a_limit_delays_and_loses_nothing() {
    let limit = Limit::new(&crate::device::limit::Rates {
        iops: 1000,
        burst: std::time::Duration::from_millis(1),
        ..crate::device::limit::Rates::default()
    });
    let mut shape = Shape::new();
    shape.settings.limits = vec![Arc::new(limit)];
    let mut bed = Bed::new(&shape);
    bed.receive.add_buffers(40, 1);
    for number in 0..20 {
        assert!(bed.transmit.send(FrameHeader::default(), &frame_to(PEER, 60, number), &[]));
    }
    let start = bed.now;
    for number in 0..20 {
        assert_eq!(bed.frame().1, looped(&frame_to(PEER, 60, number)));
    }
    // Each passes twice, out and in: 40 frames at 1,000 a second.
    assert!(bed.now - start > 30_000_000, "{} ns", bed.now - start);
    assert!(bed.counters[1].throttled.get() > 0);
}

/// A channel that has lost frames, which it says once.
struct Losing {
    missed: Missed,
    lost_later: u64,
}

impl NetChannel for Losing {
    fn enable(&mut self, _enabled: bool) {}
    fn leave_undone(&mut self, _offloads: Offloads) {}
    fn transmit(&mut self, frames: &[Outgoing]) -> Sent {
        Sent { taken: frames.len(), lost: 0 }
    }
    fn receive(&mut self, _most: usize) -> &[Incoming] {
        &[]
    }
    fn release(&mut self, _count: usize) {}
    fn missed(&mut self) -> Missed {
        std::mem::take(&mut self.missed)
    }
    fn lost_later(&mut self) -> u64 {
        std::mem::take(&mut self.lost_later)
    }
    fn wake_fd(&self) -> Option<std::os::fd::RawFd> {
        None
    }
    fn arm(&mut self) -> bool {
        true
    }
}

#[test]
fn what_a_channel_lost_is_counted_with_its_queue() {
    let mut bed = Bed::new(&Shape::new());
    let missed = Missed { no_buffers: 1, bad_header: 2, not_for_us: 3, spoofed: 4 };
    bed.channel = Box::new(Losing { missed, lost_later: 5 });
    for _ in 0..3 {
        bed.turn();
    }
    let reasons = [DropReason::NoBuffers, DropReason::BadHeader, DropReason::NotForUs, DropReason::Spoofed];
    assert_eq!(reasons.map(|reason| bed.drops(0, reason)), [1, 2, 3, 4]);
    assert_eq!(bed.drops(1, DropReason::UplinkFull), 5);
    assert_eq!(bed.drops_in_all(), 15);
}
