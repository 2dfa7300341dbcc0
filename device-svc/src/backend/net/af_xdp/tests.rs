//! One end of a veth as uplink, in a namespace that the test makes; a packet socket on the other end is the network. Where the kernel
//! has no AF_XDP they say so and pass over.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::UdpSocket;
use std::os::fd::OwnedFd;

use super::super::bed::{
    Bed, FAR, OWN, PATIENCE, Sleeper, all_sent, frame, give, is_valid, number, plain, received, tagged, take, transmit,
    transport, until,
};
use super::super::offload::SoftwareOffload;
use super::super::packet_socket::bound_to;
use super::super::{BURST, NetBackend, NetChannel, NetHeader, Offloads, Segmentation, SegmentationKind, Sent};
use super::program::Mode;
use super::socket::{MTU_MAX, XdpSocket};
use super::{AfXdpBackend, AfXdpSettings};
use crate::backend::BackendError;

impl Bed {
    fn try_xdp(&self, interface: &str, queues: u16) -> Result<AfXdpBackend, BackendError> {
        let (interface, netns) = (interface.to_owned(), Some(self.name().to_owned()));
        AfXdpBackend::new(&AfXdpSettings { interface, netns, queues })
    }

    /// A wire, its near end as uplink, and the network at its far end. `None` where the test cannot run.
    fn xdp(&self) -> Option<(AfXdpBackend, OwnedFd)> {
        self.wire();
        match self.try_xdp(OWN, 1) {
            Err(BackendError::Refused(why)) if why.contains("has no AF_XDP") => {
                eprintln!("skipped: {why}");
                None
            }
            opened => Some((opened.unwrap(), self.packets(FAR, false))),
        }
    }
}

/// A test's bed with an uplink and the network behind it.
macro_rules! lab {
    () => {{
        let Some(bed) = Bed::new() else { return };
        let Some((uplink, packets)) = bed.xdp() else { return };
        (bed, uplink, packets)
    }};
}

fn enabled(uplink: &dyn NetBackend) -> Box<dyn NetChannel> {
    let mut channel = uplink.open_channel().unwrap();
    channel.enable(true);
    channel
}

#[test]
fn frames_go_both_ways_in_order() {
    let (bed, uplink, packets) = lab!();
    let info = uplink.info();
    assert_eq!((info.mtu_max, info.functions_max, info.channels_max), (1500, 1, 1));
    assert_eq!((info.transmit, info.receive), (Offloads::NONE, Offloads::NONE));
    assert!(uplink.carrier().is_up());
    let mut channel = enabled(&uplink);
    let mut next = 0;
    // More than there are chunks: they come back.
    for round in 0..60 {
        let count = [1, 3, 4, BURST, 2, BURST][round % 6];
        assert_eq!(transmit(&mut *channel, &plain(next..next + count, 60 + next % 1454)), all_sent(count));
        next += count;
    }
    assert_eq!(next, 740);
    for _ in 0..20 {
        assert_eq!(transmit(&mut *channel, &plain(next..next + BURST, 1514)), all_sent(BURST));
        next += BURST;
    }
    let mut seen = Vec::new();
    until(|| {
        seen.extend(received(&packets).iter().map(|frame| number(frame)));
        seen.len() >= next
    });
    assert_eq!(seen, (0..next).collect::<Vec<_>>());
    assert!(channel.receive(BURST).is_empty());
    // The stack of the card may send, but has none of what comes.
    let stack = bed.packets(OWN, false);
    for round in 0..30 {
        for number in 0..100 {
            give(&packets, &frame(round * 100 + number, 60 + number * 14));
        }
        // A frame that is not released is handed over again, and stays as it is while others come.
        until(|| channel.receive(1).len() == 1);
        assert_eq!(number(channel.receive(BURST)[0].bytes()), round * 100);
        for (at, (header, bytes)) in take(&mut *channel, 100).iter().enumerate() {
            assert_eq!((*header, bytes), (NetHeader::DONE, &frame(round * 100 + at, 60 + at * 14)));
        }
    }
    assert!(channel.receive(BURST).is_empty());
    assert_eq!(received(&stack).len(), 0);
    // What no chunk holds is lost, and those around it are not.
    let mut burst = plain(0..6, 60);
    burst[2].1 = frame(2, 4000);
    assert_eq!(transmit(&mut *channel, &burst), Sent { taken: 6, lost: 1 });
    let mut count = 0;
    until(|| {
        count += received(&packets).len();
        count == 5
    });
}

#[test]
fn a_vlan_tag_stays_in_its_place() {
    let (_bed, uplink, packets) = lab!();
    let mut channel = enabled(&uplink);
    let frames = [tagged(frame(1, 60), [0x88, 0xa8, 0x0f, 0xff]), tagged(frame(2, 1514), [0x81, 0, 0x60, 0x2a])];
    for frame in &frames {
        give(&packets, frame);
    }
    let come: Vec<Vec<u8>> = take(&mut *channel, 2).into_iter().map(|(_, bytes)| bytes).collect();
    assert_eq!(come, frames);
    let burst: Vec<_> = frames.iter().map(|bytes| (NetHeader::DONE, bytes.clone())).collect();
    assert_eq!(transmit(&mut *channel, &burst), all_sent(2));
    // The reader over there gets tags beside the frames.
    let mut lengths = Vec::new();
    until(|| {
        lengths.extend(received(&packets).iter().map(Vec::len));
        lengths.len() == 2
    });
    assert_eq!(lengths, [60, 1514]);
}

#[test]
fn what_a_vm_left_undone_the_card_does() {
    let (bed, uplink, packets) = lab!();
    let uplink = SoftwareOffload::new(std::sync::Arc::new(uplink));
    let mut channel = enabled(&uplink);
    let (segment, checksum) = transport([2, 0, 0, 0, 0, 7], 6, (5000, 4001), 4000);
    let cut = Segmentation { kind: SegmentationKind::Tcp4, ecn: false, bytes: 1400, header_bytes: 54 };
    let header = NetHeader { checksum, segmentation: Some(cut) };
    assert_eq!(transmit(&mut *channel, &[(header, segment)]), all_sent(1));
    let mut pieces = Vec::new();
    until(|| {
        pieces.extend(received(&packets));
        pieces.len() >= 3
    });
    assert_eq!(pieces.iter().map(Vec::len).collect::<Vec<_>>(), [1454, 1454, 1254]);
    assert!(pieces.iter().all(|frame| is_valid(frame)));
    // The other way: a far end that leaves nothing undone.
    bed.leave_nothing_undone(FAR);
    bed.ip(&["address", "add", "10.9.8.2/24", "dev", FAR]);
    bed.ip(&["neighbour", "add", "10.9.8.1", "lladdr", "02:00:00:00:00:01", "dev", FAR]);
    let client = bed.namespace.run(|| UdpSocket::bind("10.9.8.2:5000")).unwrap().unwrap();
    client.set_write_timeout(Some(PATIENCE)).unwrap();
    client.send_to(&[7; 1000], "10.9.8.1:4000").unwrap();
    let (_, bytes) = take(&mut *channel, 1).remove(0);
    assert_eq!(bytes.len(), 1042);
    assert!(is_valid(&bytes));
}

#[test]
fn a_channel_that_is_not_enabled_leaves_frames_to_the_stack() {
    let (bed, uplink, packets) = lab!();
    let mut channel = uplink.open_channel().unwrap();
    let stack = bed.packets(OWN, false);
    let stack_has = |wanted: &[usize]| {
        let mut seen = Vec::new();
        until(|| {
            seen.extend(received(&stack).iter().map(|frame| number(frame)));
            seen.len() >= wanted.len()
        });
        assert_eq!(seen, wanted);
    };
    give(&packets, &frame(1, 60));
    stack_has(&[1]);
    assert_eq!(transmit(&mut *channel, &plain(0..5, 60)), Sent { taken: 5, lost: 5 });
    for round in 0..3 {
        channel.enable(true);
        assert!(channel.receive(BURST).is_empty());
        for number in 10..15 {
            give(&packets, &frame(number, 60));
        }
        until(|| channel.receive(1).len() == 1);
        // One is handed over, four wait: all are thrown away.
        channel.enable(false);
        assert!(channel.receive(BURST).is_empty());
        assert!(channel.arm());
        give(&packets, &frame(20 + round, 60));
        stack_has(&[20 + round]);
        channel.enable(true);
        give(&packets, &frame(30, 60));
        assert_eq!(number(&take(&mut *channel, 1)[0].1), 30);
        assert_eq!(transmit(&mut *channel, &plain(40..41, 60)), all_sent(1));
        let mut seen = Vec::new();
        until(|| {
            seen.extend(received(&packets));
            !seen.is_empty()
        });
        assert_eq!(number(&seen[0]), 40);
        channel.enable(false);
    }
    // With its channel a queue is free, and with the last user the program goes.
    drop(channel);
    give(&packets, &frame(50, 60));
    stack_has(&[50]);
    drop(enabled(&uplink));
    drop(uplink);
    assert!(bed.try_xdp(OWN, 1).is_ok());
}

#[test]
fn a_frame_wakes_whoever_sleeps() {
    let (_bed, uplink, packets) = lab!();
    let mut channel = enabled(&uplink);
    let sleeper = Sleeper::new(&*channel);
    for round in 0..20 {
        until(|| {
            channel.woken();
            channel.receive(BURST).is_empty() && channel.arm()
        });
        while sleeper.is_woken(0) {
            channel.woken();
        }
        for number in 0..=round % 3 {
            give(&packets, &frame(round * 3 + number, 60));
        }
        assert!(sleeper.is_woken(30_000), "round {round}");
        channel.woken();
        assert!(!channel.arm(), "there is a frame");
        let come = take(&mut *channel, round % 3 + 1);
        assert_eq!(number(&come[0].1), round * 3);
    }
}

#[test]
fn more_than_there_is_room_for_is_lost_and_the_rest_comes() {
    let (_bed, uplink, packets) = lab!();
    let mut channel = enabled(&uplink);
    for round in 0..3 {
        let total = 6000;
        for number in 0..total {
            give(&packets, &frame(number, 60));
        }
        // As many as there are chunks at most, and none of them late.
        let (mut come, mut missed) = (Vec::new(), 0);
        until(|| {
            let frames = channel.receive(BURST);
            come.extend(frames.iter().map(|frame| number(frame.bytes())));
            let count = frames.len();
            channel.release(count);
            missed += channel.missed().no_buffers as usize;
            count == 0 && come.len() > BURST && missed > 0
        });
        let counts = (come.len(), missed);
        assert!(come.len() < total && come.is_sorted() && come.len() + missed <= total, "round {round}: {counts:?}");
        give(&packets, &frame(total, 60));
        assert_eq!(take(&mut *channel, 1)[0].1, frame(total, 60));
    }
}

#[test]
fn an_interface_that_is_taken_down_or_deleted_comes_back() {
    let (bed, uplink, packets) = lab!();
    let carrier = uplink.carrier();
    let mut channel = enabled(&uplink);
    for interface in [OWN, FAR] {
        bed.ip(&["link", "set", interface, "down"]);
        until(|| !carrier.is_up());
        assert_eq!(transmit(&mut *channel, &plain(0..8, 60)), Sent { taken: 8, lost: 8 });
        bed.ip(&["link", "set", interface, "up"]);
        until(|| carrier.is_up());
        bed.settle();
        drop(received(&packets));
        assert_eq!(transmit(&mut *channel, &plain(10..18, 60)), all_sent(8));
        let mut seen = Vec::new();
        until(|| {
            seen.extend(received(&packets));
            seen.len() == 8
        });
        assert_eq!(number(&seen[7]), 17);
        give(&packets, &frame(50, 60));
        assert_eq!(number(&take(&mut *channel, 1)[0].1), 50);
    }
    drop(packets);
    let sleeper = Sleeper::new(&*channel);
    for round in 0..3 {
        bed.ip(&["link", "delete", OWN]);
        until(|| !carrier.is_up());
        assert_eq!(transmit(&mut *channel, &plain(0..8, 60)), Sent { taken: 8, lost: 8 });
        assert!(channel.receive(BURST).is_empty());
        assert!(uplink.open_channel().is_err_and(|error| matches!(error, BackendError::Unavailable(_))));
        assert!(channel.arm());
        while sleeper.is_woken(0) {
            channel.woken();
        }
        bed.wire();
        until(|| carrier.is_up());
        assert!(sleeper.is_woken(30_000), "nobody told of the new socket");
        channel.woken();
        assert!(channel.receive(BURST).is_empty());
        let packets = bed.packets(FAR, false);
        give(&packets, &frame(77 + round, 60));
        assert_eq!(number(&take(&mut *channel, 1)[0].1), 77 + round);
        assert_eq!(transmit(&mut *channel, &plain(0..8, 60)), all_sent(8));
        let mut count = 0;
        until(|| {
            count += received(&packets).len();
            count == 8
        });
    }
}

#[test]
fn a_long_frame_takes_a_longer_chunk() {
    let Some(bed) = Bed::new() else { return };
    bed.wire();
    for end in [OWN, FAR] {
        bed.ip(&["link", "set", end, "mtu", "9000"]);
    }
    let uplink = match bed.try_xdp(OWN, 1) {
        Err(BackendError::Refused(why)) if why.contains("has no AF_XDP") => return eprintln!("skipped: {why}"),
        opened => opened.unwrap(),
    };
    assert_eq!(uplink.info().mtu_max, MTU_MAX);
    let packets = bed.packets(FAR, false);
    let mut channel = enabled(&uplink);
    let longest = usize::from(MTU_MAX) + 18;
    for number in 0..40 {
        give(&packets, &frame(number, longest));
        // Longer than that the kernel has no place for.
        give(&packets, &frame(1000, longest + 1));
    }
    for (at, (_, bytes)) in take(&mut *channel, 40).iter().enumerate() {
        assert_eq!(bytes, &frame(at, longest));
    }
    assert_eq!(transmit(&mut *channel, &plain(0..8, longest)), all_sent(8));
    assert_eq!(transmit(&mut *channel, &plain(0..1, longest + 1)), Sent { taken: 1, lost: 1 });
    let mut seen = Vec::new();
    until(|| {
        seen.extend(received(&packets));
        seen.len() == 8
    });
    assert_eq!(seen[7], frame(7, longest));
}

/// A macvlan's driver has no AF_XDP, and takes no program: the kernel does it all.
#[test]
fn what_a_driver_cannot_do_the_kernel_does() {
    let (bed, wire, _packets) = lab!();
    drop(wire);
    bed.ip(&["link", "add", "mac0", "link", OWN, "address", "02:00:00:00:00:77", "type", "macvlan", "mode", "bridge"]);
    bed.ip(&["link", "set", "mac0", "up"]);
    let uplink = bed.try_xdp("mac0", 1).unwrap();
    assert_eq!(uplink.device.state().attached.as_ref().map(|attached| attached.mode), Some(Mode::Generic));
    until(|| uplink.carrier().is_up());
    let (stack, packets) = (bed.packets("mac0", false), bed.packets(FAR, false));
    let mut channel = enabled(&uplink);
    for round in 0..3 {
        for number in 0..100 {
            give(&packets, &frame(number, 60 + number * 14));
        }
        for (at, (header, bytes)) in take(&mut *channel, 100).iter().enumerate() {
            assert_eq!((*header, bytes), (NetHeader::DONE, &frame(at, 60 + at * 14)), "round {round}");
        }
        let mut burst = plain(0..BURST, 1514);
        // What is for the macvlan itself would not go out.
        burst.iter_mut().for_each(|(_, bytes)| bytes[5] = 0x78);
        assert_eq!(transmit(&mut *channel, &burst), all_sent(BURST));
        let mut seen = Vec::new();
        until(|| {
            seen.extend(received(&packets).iter().map(|frame| number(frame)));
            seen.len() >= BURST
        });
        assert_eq!(seen, (0..BURST).collect::<Vec<_>>());
    }
    assert_eq!(received(&stack).len(), 0);
    channel.enable(false);
    give(&packets, &frame(200, 60));
    let mut seen = Vec::new();
    until(|| {
        seen.extend(received(&stack).iter().map(|frame| number(frame)));
        !seen.is_empty()
    });
    assert_eq!(seen, [200]);
}

#[test]
fn each_queue_has_its_channel() {
    let Some(bed) = Bed::new() else { return };
    let queues = ["numrxqueues", "2", "numtxqueues", "2"];
    bed.ip(&[&["link", "add", OWN][..], &queues, &["type", "veth", "peer", "name", FAR], &queues].concat());
    for end in [OWN, FAR] {
        bed.ip(&["link", "set", end, "up"]);
    }
    bed.settle();
    let uplink = match bed.try_xdp(OWN, 2) {
        Err(BackendError::Refused(why)) if why.contains("has no AF_XDP") => return eprintln!("skipped: {why}"),
        opened => opened.unwrap(),
    };
    assert_eq!(uplink.info().channels_max, 2);
    let packets = bed.packets(FAR, false);
    let mut channels = [enabled(&uplink), enabled(&uplink)];
    assert!(uplink.open_channel().is_err(), "a third one");
    for port in 0..64 {
        give(&packets, &transport([2, 0, 0, 0, 0, 9], 17, (5000 + port, 4000), 20).0);
    }
    let mut counts = [0, 0];
    until(|| {
        for (channel, count) in channels.iter_mut().zip(&mut counts) {
            let taken = channel.receive(BURST).len();
            channel.release(taken);
            *count += taken;
        }
        counts.iter().sum::<usize>() == 64
    });
    for channel in &mut channels {
        assert_eq!(transmit(&mut **channel, &plain(0..BURST, 60)), all_sent(BURST));
    }
    let mut count = 0;
    until(|| {
        count += received(&packets).len();
        count == 2 * BURST
    });
}

#[test]
fn what_cannot_be_used_is_refused_with_the_next_step() {
    let (bed, uplink, _packets) = lab!();
    let index = bound_to(&uplink.device.state().keeper).unwrap();
    let missing = bed.try_xdp("eth9", 1).unwrap_err();
    let words = format!("there is no interface eth9 in the network namespace {}", bed.name());
    assert!(matches!(&missing, BackendError::Unavailable(why) if why.contains(&words)), "{missing}");
    let refused = |error: BackendError, words: &str| {
        assert!(matches!(&error, BackendError::Refused(why) if why.contains(words)), "{error}");
    };
    refused(bed.try_xdp(FAR, 9).unwrap_err(), "ethtool -L far0 combined 9");
    refused(bed.try_xdp(OWN, 1).unwrap_err(), "xdp off");
    bed.ip(&["tuntap", "add", "dev", "tun0", "mode", "tun"]);
    refused(bed.try_xdp("tun0", 1).unwrap_err(), "Ethernet");
    // One that another has the queue of.
    let other = bed.namespace.run(|| XdpSocket::open(index, 0, 1500, Mode::Driver).map(drop)).unwrap();
    assert_eq!(other, Ok(()));
}
