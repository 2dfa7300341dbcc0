//! One end of a veth as uplink, in a namespace that the test makes; a packet socket on the other end is the network.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;
use zerocopy::IntoBytes;

use super::super::bed::{
    Bed, EXPERIMENT, FAR, OWN, Sleeper, all_sent, frame, give, is_valid, number, plain, received, tagged, take,
    transmit, transport, until,
};
use super::super::kernel_queue::Port;
use super::super::{BURST, Missed, NetBackend, NetHeader, Offloads, Segmentation, SegmentationKind, Sent};
use super::{AfPacketBackend, AfPacketSettings, Member};
use crate::backend::BackendError;

impl Bed {
    fn try_packet(&self, interface: &str) -> Result<AfPacketBackend, BackendError> {
        AfPacketBackend::new(&AfPacketSettings { interface: interface.to_owned(), netns: Some(self.name().to_owned()) })
    }

    /// A wire, its near end as uplink, and the network at its far end.
    fn packet(&self) -> (AfPacketBackend, OwnedFd) {
        self.wire();
        (self.try_packet(OWN).unwrap(), self.packets(FAR, false))
    }

    /// Has the near end send so slowly that a sender which has hardly any processor still fills it. Says it if it cannot.
    fn slow_down(&self) -> bool {
        let slow = self.tc("qdisc add dev wire0 root tbf rate 20mbit burst 20kb limit 64mb");
        if !slow {
            eprintln!("skipped: no tc with tbf here");
        }
        slow
    }
}

/// 4000 bytes of TCP that are still to be cut, and their header.
fn to_be_cut() -> (NetHeader, Vec<u8>) {
    let (segment, checksum) = transport([2, 0, 0, 0, 0, 7], 6, (5000, 4001), 4000);
    let cut = Segmentation { kind: SegmentationKind::Tcp4, ecn: false, bytes: 1400, header_bytes: 54 };
    (NetHeader { checksum, segmentation: Some(cut) }, segment)
}

#[test]
fn frames_go_both_ways_in_order() {
    let Some(bed) = Bed::new() else { return };
    let (uplink, packets) = bed.packet();
    let info = uplink.info();
    assert_eq!((info.mtu_max, info.functions_max, info.channels_max), (1500, 1, 16));
    assert_eq!((info.transmit, info.receive), (Offloads::ALL, Offloads::ALL));
    assert!(uplink.carrier().is_up());
    let mut channel = uplink.open_channel().unwrap();
    channel.enable(true);
    let mut next = 0;
    for count in [1, 3, 4, BURST, 2, BURST] {
        assert_eq!(transmit(&mut *channel, &plain(next..next + count, 60 + next)), all_sent(count));
        next += count;
    }
    let mut seen = Vec::new();
    until(|| {
        seen.extend(received(&packets).iter().map(|frame| number(frame)));
        seen.len() >= next
    });
    assert_eq!(seen, (0..next).collect::<Vec<_>>());
    // What went out does not come back, and what the stack sends is not the VM's.
    give(&bed.packets(OWN, false), &frame(1000, 60));
    assert!(channel.receive(BURST).is_empty());
    for number in 0..100 {
        give(&packets, &frame(number, 60 + number * 14));
    }
    until(|| channel.receive(1).len() == 1);
    assert_eq!(number(channel.receive(BURST)[0].bytes()), 0);
    for (at, (header, bytes)) in take(&mut *channel, 100).iter().enumerate() {
        assert_eq!((*header, bytes), (NetHeader::DONE, &frame(at, 60 + at * 14)));
    }
    assert!(channel.receive(BURST).is_empty());
    // Longer than the interface carries: lost, and those around it are not.
    let mut burst = plain(0..6, 60);
    burst[2].1 = frame(2, 1515);
    assert_eq!(transmit(&mut *channel, &burst), Sent { taken: 6, lost: 1 });
    assert_eq!(transmit(&mut *channel, &burst[2..3]), Sent { taken: 1, lost: 1 });
}

#[test]
fn a_vlan_tag_stays_in_its_place() {
    let Some(bed) = Bed::new() else { return };
    let (uplink, packets) = bed.packet();
    let mut channel = uplink.open_channel().unwrap();
    channel.enable(true);
    channel.leave_undone(Offloads::ALL);
    let inner = [0x81, 0x00, 0x60, 0x2a];
    let frames = [
        tagged(frame(1, 60), inner),
        tagged(frame(2, 1514), inner),
        // A tag of a provider before one of a customer; a tag of number and priority 0.
        tagged(tagged(frame(3, 60), inner), [0x88, 0xa8, 0x0f, 0xff]),
        tagged(frame(4, 60), [0x81, 0x00, 0, 0]),
        frame(5, 60),
    ];
    for frame in &frames {
        give(&packets, frame);
    }
    let come: Vec<Vec<u8>> = take(&mut *channel, 5).into_iter().map(|(_, bytes)| bytes).collect();
    assert_eq!(come, frames);
    let burst: Vec<_> = frames.iter().map(|bytes| (NetHeader::DONE, bytes.clone())).collect();
    assert_eq!(transmit(&mut *channel, &burst), all_sent(5));
    // The reader over there gets tags beside the frames.
    let mut lengths = Vec::new();
    until(|| {
        lengths.extend(received(&packets).iter().map(Vec::len));
        lengths.len() == 5
    });
    assert_eq!(lengths, [60, 1514, 64, 60, 60]);

    // What a header says of places in the frame counts the tag.
    let headed = bed.packets(FAR, true);
    let (mut header, segment) = to_be_cut();
    let segment = tagged(segment, inner);
    header.checksum = super::super::Checksum::Needed { start: 38, offset: 16 };
    let mut message = header.to_raw(0).as_bytes()[..10].to_vec();
    message.extend_from_slice(&segment);
    give(&headed, &message);
    let come = take(&mut *channel, 1);
    assert_eq!((come[0].0.checksum, &come[0].1), (header.checksum, &segment));
    channel.leave_undone(Offloads::NONE);
    give(&headed, &message);
    for (header, bytes) in take(&mut *channel, 3) {
        assert_eq!((header, &bytes[12..16]), (NetHeader::DONE, &inner[..]));
        assert!(is_valid(&[&bytes[..12], &bytes[16..]].concat()));
    }
}

#[test]
fn what_is_left_undone_is_done_by_whoever_can() {
    let Some(bed) = Bed::new() else { return };
    let (uplink, packets) = bed.packet();
    let mut channel = uplink.open_channel().unwrap();
    channel.enable(true);
    let headed = bed.packets(FAR, true);
    let (header, segment) = to_be_cut();
    // A veth hands over what is to be cut, where a driver at the other end takes it.
    assert_eq!(transmit(&mut *channel, &[(header, segment.clone())]), all_sent(1));
    let mut seen = Vec::new();
    until(|| {
        seen.extend(received(&headed));
        !seen.is_empty()
    });
    assert_eq!((seen[0].len(), seen[0][1], &seen[0][4..6]), (10 + segment.len(), 1, &1400u16.to_le_bytes()[..]));
    // A wire does not: the kernel cuts.
    drop(received(&packets));
    bed.leave_nothing_undone(OWN);
    assert_eq!(transmit(&mut *channel, &[(header, segment.clone())]), all_sent(1));
    let mut pieces = Vec::new();
    until(|| {
        pieces.extend(received(&packets));
        pieces.len() >= 3
    });
    assert_eq!(pieces.iter().map(Vec::len).collect::<Vec<_>>(), [1454, 1454, 1254]);
    assert!(pieces.iter().all(|frame| is_valid(frame)));

    let mut message = header.to_raw(0).as_bytes()[..10].to_vec();
    message.extend_from_slice(&segment);
    channel.leave_undone(Offloads::ALL);
    give(&headed, &message);
    let come = take(&mut *channel, 1);
    assert_eq!((come[0].0.checksum, come[0].1.len()), (header.checksum, segment.len()));
    assert_eq!(come[0].0.segmentation.map(|cut| (cut.kind, cut.bytes)), Some((SegmentationKind::Tcp4, 1400)));
    channel.leave_undone(Offloads::NONE);
    give(&headed, &message);
    let come = take(&mut *channel, 3);
    assert_eq!(come.iter().map(|(_, bytes)| bytes.len()).collect::<Vec<_>>(), [1454, 1454, 1254]);
    assert!(come.iter().all(|(header, bytes)| *header == NetHeader::DONE && is_valid(bytes)));
}

#[test]
fn a_channel_that_is_not_enabled_drops_and_brings_nothing() {
    let Some(bed) = Bed::new() else { return };
    let (uplink, packets) = bed.packet();
    let mut channel = uplink.open_channel().unwrap();
    give(&packets, &frame(1, 60));
    assert_eq!(transmit(&mut *channel, &plain(0..5, 60)), Sent { taken: 5, lost: 5 });
    channel.enable(true);
    assert!(channel.receive(BURST).is_empty());
    for number in 10..15 {
        give(&packets, &frame(number, 60));
    }
    until(|| channel.receive(1).len() == 1);
    channel.enable(false);
    assert!(channel.receive(BURST).is_empty());
    assert!(channel.arm());
    give(&packets, &frame(20, 60));
    channel.enable(true);
    give(&packets, &frame(21, 60));
    assert_eq!(number(&take(&mut *channel, 1)[0].1), 21);
    assert_eq!(transmit(&mut *channel, &plain(30..31, 60)), all_sent(1));
    let mut seen = Vec::new();
    until(|| {
        seen.extend(received(&packets));
        !seen.is_empty()
    });
    assert_eq!(number(&seen[0]), 30);
}

#[test]
fn a_frame_wakes_whoever_sleeps() {
    let Some(bed) = Bed::new() else { return };
    let (uplink, packets) = bed.packet();
    let mut channel = uplink.open_channel().unwrap();
    channel.enable(true);
    let sleeper = Sleeper::new(&*channel);
    for round in 0..20 {
        until(|| channel.receive(BURST).is_empty() && channel.arm());
        while sleeper.is_woken(0) {}
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
fn an_interface_that_is_taken_down_or_deleted_comes_back() {
    let Some(bed) = Bed::new() else { return };
    let (uplink, packets) = bed.packet();
    let carrier = uplink.carrier();
    let mut channel = uplink.open_channel().unwrap();
    channel.enable(true);

    for interface in [OWN, FAR] {
        // The far end takes the carrier with it.
        bed.ip(&["link", "set", interface, "down"]);
        until(|| !carrier.is_up());
        drop(received(&packets));
        let sent = transmit(&mut *channel, &plain(0..8, 60));
        assert_eq!(sent.taken, 8);
        if interface == OWN {
            assert_eq!(sent.lost, 8);
        }
        bed.ip(&["link", "set", interface, "up"]);
        until(|| carrier.is_up());
        bed.settle();
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

    for round in 0..2 {
        let sleeper = Sleeper::new(&*channel);
        bed.ip(&["link", "delete", OWN]);
        until(|| !carrier.is_up());
        assert_eq!(transmit(&mut *channel, &plain(0..8, 60)), Sent { taken: 8, lost: 8 });
        assert!(channel.receive(BURST).is_empty());
        assert!(uplink.open_channel().is_err_and(|error| matches!(error, BackendError::Unavailable(_))));
        until(|| channel.receive(BURST).is_empty() && channel.arm());
        while sleeper.is_woken(0) {}
        bed.wire();
        until(|| carrier.is_up());
        let packets = bed.packets(FAR, false);
        give(&packets, &frame(77 + round, 60));
        assert!(sleeper.is_woken(30_000), "nobody told of a frame");
        channel.woken();
        assert_eq!(number(&take(&mut *channel, 1)[0].1), 77 + round);
        assert_eq!(transmit(&mut *channel, &plain(0..8, 60)), all_sent(8));
        let mut count = 0;
        until(|| {
            count += received(&packets).len();
            count == 8
        });
    }
}

/// Frames of all kinds that several channels share: each comes once, those of a flow to one channel, and flows are spread.
#[test]
fn channels_share_what_comes() {
    let Some(bed) = Bed::new() else { return };
    let (uplink, packets) = bed.packet();
    let mut channels: Vec<_> = (0..3).map(|_| uplink.open_channel().unwrap()).collect();
    let datagram = |port: u16| transport([2, 0, 0, 0, 0, 9], 17, (5000 + port, 4000), 20).0;
    let six = |port: u16| {
        let mut frame = datagram(port);
        frame[12..14].copy_from_slice(&[0x86, 0xdd]);
        let header = [&[0x60, 0, 0, 0, 0, 28, 17, 64][..], &[0x20; 32]].concat();
        frame.splice(14..34, header);
        frame
    };
    let fragment = |port: u16| {
        let mut frame = datagram(port);
        frame[20] = 0x20;
        frame
    };
    // Those that are not in use have no share.
    for in_use in [vec![1], vec![0, 2], vec![0, 1, 2]] {
        for (number, channel) in channels.iter_mut().enumerate() {
            channel.enable(in_use.contains(&number));
        }
        for port in 0..64 {
            for frame in [datagram(port), six(port), tagged(datagram(port), [0x81, 0, 0, 7]), datagram(port)] {
                give(&packets, &frame);
            }
            give(&packets, &fragment(port));
            give(&packets, &frame(port.into(), 60));
            // Cut off in the middle of what the filter looks at.
            for bytes in [14, 20, 33, 36] {
                give(&packets, &datagram(port)[..bytes]);
                give(&packets, &six(port)[..bytes]);
            }
        }
        let total = 64 * 14;
        let mut come: Vec<Vec<Vec<u8>>> = vec![Vec::new(); 3];
        until(|| {
            for (channel, all) in channels.iter_mut().zip(&mut come) {
                let frames = channel.receive(BURST);
                all.extend(frames.iter().map(|frame| frame.bytes().to_vec()));
                let count = frames.len();
                channel.release(count);
            }
            come.iter().map(Vec::len).sum::<usize>() >= total
        });
        assert_eq!(come.iter().map(Vec::len).sum::<usize>(), total, "a frame came twice");
        let first = in_use[0];
        for (number, all) in come.iter().enumerate() {
            let has = |wanted: &[u8]| all.iter().filter(|frame| *frame == wanted).count();
            let (mut own, mut own6) = (0, 0);
            for port in 0..64 {
                assert!([0, 2].contains(&has(&datagram(port))), "a flow is in two channels");
                own += has(&datagram(port));
                own6 += has(&six(port));
            }
            let spread = in_use.contains(&number);
            assert_eq!(own > 10 && own6 > 5, spread, "channel {number} of {in_use:?} has {own} and {own6}");
            let others = all.iter().filter(|frame| frame[12..14] == EXPERIMENT.to_be_bytes()).count();
            assert_eq!(others, if number == first { 64 } else { 0 });
            let fragments = all.iter().filter(|frame| frame[12] == 8 && frame.get(20) == Some(&0x20)).count();
            assert!([0, 64].contains(&fragments), "fragments of one packet go together");
        }
    }
    // A channel that goes leaves its share to the others.
    drop(channels.remove(0));
    for port in 0..64 {
        give(&packets, &datagram(port));
    }
    let mut count = 0;
    until(|| {
        for channel in &mut channels {
            let taken = channel.receive(BURST).len();
            channel.release(taken);
            count += taken;
        }
        count == 64
    });
}

/// One that cannot have its share is not counted with: the others have all.
#[test]
fn a_channel_that_cannot_be_attached_takes_nothing_from_the_others() {
    let Some(bed) = Bed::new() else { return };
    let (uplink, packets) = bed.packet();
    let mut channel = uplink.open_channel().unwrap();
    channel.enable(true);
    // No socket: it cannot have a filter.
    let other: Arc<OwnedFd> = Arc::new(std::fs::File::open("/dev/null").unwrap().into());
    let member = Member { file: Arc::downgrade(&other), attached: false };
    uplink.device.state().members.push(member);
    assert_eq!(uplink.device.attach(&other, true), Err(Errno::ENOTSOCK));
    let attached: Vec<bool> = uplink.device.state().members.iter().map(|member| member.attached).collect();
    assert_eq!(attached, [true, false]);
    drop(other);
    // The next one that comes or goes puts right what could not be put right while it was there.
    let mut second = uplink.open_channel().unwrap();
    second.enable(true);
    second.enable(false);
    for number in 0..64 {
        give(&packets, &frame(number, 60));
    }
    assert_eq!(take(&mut *channel, 64).len(), 64);
}

#[test]
fn frames_that_find_no_room_are_given_again() {
    let Some(bed) = Bed::new() else { return };
    let (uplink, packets) = bed.packet();
    if !bed.slow_down() {
        return;
    }
    let mut channel = uplink.open_channel().unwrap();
    channel.enable(true);
    let sleeper = Sleeper::new(&*channel);
    let total = 4000;
    let (mut next, mut refused) = (0, 0);
    let mut seen = Vec::new();
    while next < total {
        let count = BURST.min(total - next);
        let sent = transmit(&mut *channel, &plain(next..next + count, 1000));
        assert_eq!(sent.lost, 0, "nobody else takes room");
        next += sent.taken;
        seen.extend(received(&packets).iter().map(|frame| number(frame)));
        if sent.taken < count {
            refused += 1;
            assert!(sleeper.is_woken(30_000), "nobody told of room");
            channel.woken();
        }
    }
    assert!(refused > 0, "there was always room");
    until(|| {
        seen.extend(received(&packets).iter().map(|frame| number(frame)));
        seen.len() >= total
    });
    assert_eq!(seen, (0..total).collect::<Vec<_>>());
}

/// That there is room again may be noted while frames are looked for: then whoever was refused has a turn before the reactor sleeps.
#[test]
fn room_that_comes_meanwhile_is_not_missed() {
    let Some(bed) = Bed::new() else { return };
    let (uplink, _packets) = bed.packet();
    if !bed.slow_down() {
        return;
    }
    let mut channel = uplink.open_channel().unwrap();
    channel.enable(true);
    let sleeper = Sleeper::new(&*channel);
    let refused = (0..1000).any(|_| transmit(&mut *channel, &plain(0..BURST, 1000)).taken < BURST);
    assert!(refused, "there was always room");
    assert!(sleeper.is_woken(30_000), "nobody told of room");
    assert!(channel.receive(BURST).is_empty());
    assert!(!channel.arm(), "the refused has not been given again");
    until(|| channel.arm());
}

#[test]
fn what_the_kernel_has_no_memory_for_is_counted() {
    let Some(bed) = Bed::new() else { return };
    let (uplink, packets) = bed.packet();
    let mut channel = uplink.open_channel().unwrap();
    channel.enable(true);
    assert_eq!(channel.missed(), Missed::NONE);
    let total = 20_000;
    for number in 0..total {
        give(&packets, &frame(number, 1500));
    }
    let (mut come, mut missed) = (Vec::new(), 0);
    until(|| {
        let frames = channel.receive(BURST);
        come.extend(frames.iter().map(|frame| number(frame.bytes())));
        let count = frames.len();
        channel.release(count);
        missed += channel.missed().no_buffers as usize;
        count == 0 && missed > 0
    });
    assert!(come.is_sorted() && come.len() > BURST && come.len() + missed <= total, "{} and {missed}", come.len());
    assert_eq!(channel.missed(), Missed::NONE);
}

#[test]
fn what_cannot_be_used_is_refused_with_the_next_step() {
    let Some(bed) = Bed::new() else { return };
    let missing = bed.try_packet("eth9").unwrap_err();
    assert!(matches!(missing, BackendError::Unavailable(_)), "{missing}");
    let words = format!("there is no interface eth9 in the network namespace {}", bed.name());
    assert!(missing.to_string().contains(&words), "{missing}");
    bed.ip(&["tuntap", "add", "dev", "tun0", "mode", "tun"]);
    let refused = bed.try_packet("tun0").unwrap_err();
    assert!(
        matches!(&refused, BackendError::Refused(why) if why.contains("tun0") && why.contains("Ethernet")),
        "{refused}"
    );
    let bad = bed.try_packet("a-name-that-is-too-long").unwrap_err();
    assert!(matches!(bad, BackendError::Refused(_)), "{bad}");
    let settings = AfPacketSettings { interface: OWN.to_owned(), netns: Some("dray-not-there".to_owned()) };
    let outside = AfPacketBackend::new(&settings).unwrap_err();
    assert!(outside.to_string().contains("ip netns add dray-not-there"), "{outside}");
}
