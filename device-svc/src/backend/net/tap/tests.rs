//! Taps in network namespaces that the tests make; a packet socket, or the kernel's own stack, is on the other side. They need root:
//! without it, or where there is no `/dev/net/tun` or io_uring (user-mode emulation), they say so and pass over.
#![expect(unsafe_code, reason = "sets options of sockets and taps")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::UdpSocket;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};

use super::super::bed::{
    Bed, EXPERIMENT, PATIENCE, Sleeper, all_sent, frame, is_valid, number, plain, received, take, transmit, transport,
    until,
};
use super::super::namespace::InterfaceName;
use super::super::{BURST, NetBackend, NetHeader, Offloads, Segmentation, SegmentationKind, Sent};
use super::{TapBackend, TapSettings};
use crate::backend::BackendError;

const TAP: &str = "dray0";

impl Bed {
    fn try_tap(&self, name: &str, mtu: Option<u16>) -> Result<TapBackend, BackendError> {
        TapBackend::new(TapSettings { name: name.to_owned(), netns: Some(self.name().to_owned()), mtu })
    }

    fn tap(&self) -> TapBackend {
        self.try_tap(TAP, None).unwrap()
    }
}

#[test]
fn frames_go_both_ways_in_order() {
    let Some(bed) = Bed::new() else { return };
    let tap = bed.tap();
    let info = tap.info();
    assert_eq!((info.mtu_max, info.functions_max, info.channels_max), (1500, 1, 128));
    assert_eq!(Offloads { uso: true, ..info.transmit }, Offloads::ALL);
    assert!(tap.carrier().is_up());
    let mut channel = tap.open_channel().unwrap();
    channel.enable(true);
    let packets = bed.packets(TAP, false);
    let mut next = 0;
    // Few go by plain calls, many through the ring.
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

    assert!(channel.receive(BURST).is_empty());
    for number in 0..100 {
        assert_eq!(
            send(packets.as_raw_fd(), &frame(number, 60 + number * 14), MsgFlags::empty()),
            Ok(60 + number * 14)
        );
    }
    // A frame that is not released is handed over again, and stays as it is while others come.
    until(|| channel.receive(1).len() == 1);
    assert_eq!(number(channel.receive(BURST)[0].bytes()), 0);
    let come = take(&mut *channel, 100);
    for (at, (header, bytes)) in come.iter().enumerate() {
        assert_eq!((*header, bytes), (NetHeader::DONE, &frame(at, 60 + at * 14)));
    }
    assert!(channel.receive(BURST).is_empty());
    // The kernel takes no frame without a whole Ethernet header: it is lost, and those around it are not.
    let mut burst = plain(0..6, 60);
    burst[2].1.truncate(10);
    assert_eq!(transmit(&mut *channel, &burst), Sent { taken: 6, lost: 1 });
    let mut count = 0;
    until(|| {
        count += received(&packets).len();
        count == 5
    });
}

#[test]
fn what_a_vm_left_undone_the_kernel_does() {
    let Some(bed) = Bed::new() else { return };
    let tap = bed.tap();
    bed.ip(&["address", "add", "10.9.8.1/24", "dev", TAP]);
    bed.ip(&["link", "set", TAP, "address", "02:00:00:00:00:09"]);
    let mut channel = tap.open_channel().unwrap();
    channel.enable(true);
    let server = bed.namespace.run(|| UdpSocket::bind("10.9.8.1:4000")).unwrap().unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let to = [2, 0, 0, 0, 0, 9];
    let (datagram, checksum) = transport(to, 17, (5000, 4000), 100);
    // Its checksum is not one yet: without saying so it would be thrown away.
    let header = NetHeader { checksum, segmentation: None };
    assert_eq!(transmit(&mut *channel, &[(NetHeader::DONE, datagram.clone()), (header, datagram)]), all_sent(2));
    let mut buffer = [0; 200];
    assert_eq!(server.recv(&mut buffer).unwrap(), 100);
    assert!(buffer[..100].iter().enumerate().all(|(at, byte)| *byte == at as u8));
    server.set_nonblocking(true).unwrap();
    assert!(server.recv(&mut buffer).is_err(), "a datagram without a checksum was taken");

    // What is to be cut comes out at the other side with a header that says how.
    let packets = bed.packets(TAP, true);
    let (segment, checksum) = transport(to, 6, (5000, 4001), 4000);
    let cut = Segmentation { kind: SegmentationKind::Tcp4, ecn: false, bytes: 1400, header_bytes: 54 };
    let header = NetHeader { checksum, segmentation: Some(cut) };
    assert_eq!(transmit(&mut *channel, &[(header, segment.clone())]), all_sent(1));
    let mut seen = Vec::new();
    until(|| {
        seen.extend(received(&packets));
        !seen.is_empty()
    });
    assert_eq!(seen[0].len(), 10 + segment.len());
    assert_eq!((seen[0][1], &seen[0][4..6]), (1, &1400u16.to_le_bytes()[..]));
}

#[test]
fn the_kernel_leaves_undone_what_is_asked_for() {
    let Some(bed) = Bed::new() else { return };
    let tap = bed.tap();
    let mut channel = tap.open_channel().unwrap();
    channel.enable(true);
    let packets = bed.packets(TAP, true);
    let (segment, checksum) = transport([2, 0, 0, 0, 0, 7], 6, (5000, 4001), 4000);
    let cut = Segmentation { kind: SegmentationKind::Tcp4, ecn: false, bytes: 1400, header_bytes: 54 };
    let header = NetHeader { checksum, segmentation: Some(cut) };
    let mut message = zerocopy::IntoBytes::as_bytes(&header.to_raw(0))[..10].to_vec();
    message.extend_from_slice(&segment);

    channel.leave_undone(Offloads::ALL);
    assert_eq!(send(packets.as_raw_fd(), &message, MsgFlags::empty()), Ok(message.len()));
    let come = take(&mut *channel, 1);
    assert_eq!(
        (come[0].0.segmentation.map(|cut| (cut.kind, cut.bytes)), come[0].0.checksum),
        (Some((SegmentationKind::Tcp4, 1400)), checksum)
    );
    assert_eq!(come[0].1.len(), segment.len());

    channel.leave_undone(Offloads::NONE);
    assert_eq!(send(packets.as_raw_fd(), &message, MsgFlags::empty()), Ok(message.len()));
    let come = take(&mut *channel, 3);
    let lengths: Vec<usize> = come.iter().map(|(_, bytes)| bytes.len()).collect();
    assert_eq!(lengths, [1454, 1454, 1254]);
    assert!(come.iter().all(|(header, bytes)| *header == NetHeader::DONE && is_valid(bytes)));
}

#[test]
fn a_channel_that_is_not_enabled_drops_and_brings_nothing() {
    let Some(bed) = Bed::new() else { return };
    let tap = bed.tap();
    let mut channel = tap.open_channel().unwrap();
    let packets = bed.packets(TAP, false);
    assert_eq!(transmit(&mut *channel, &plain(0..5, 60)), Sent { taken: 5, lost: 5 });
    channel.enable(true);
    for number in 10..15 {
        send(packets.as_raw_fd(), &frame(number, 60), MsgFlags::empty()).unwrap();
    }
    until(|| channel.receive(1).len() == 1);
    // One is handed over, four wait: all are thrown away.
    channel.enable(false);
    assert!(channel.receive(BURST).is_empty());
    assert!(channel.arm());
    let _ = send(packets.as_raw_fd(), &frame(20, 60), MsgFlags::empty());
    channel.enable(true);
    send(packets.as_raw_fd(), &frame(21, 60), MsgFlags::empty()).unwrap();
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
    let tap = bed.tap();
    let mut channel = tap.open_channel().unwrap();
    channel.enable(true);
    let packets = bed.packets(TAP, false);
    let sleeper = Sleeper::new(&*channel);
    for round in 0..20 {
        until(|| channel.receive(BURST).is_empty() && channel.arm());
        while sleeper.is_woken(0) {}
        for number in 0..=round % 3 {
            send(packets.as_raw_fd(), &frame(round * 3 + number, 60), MsgFlags::empty()).unwrap();
        }
        assert!(sleeper.is_woken(30_000), "round {round}");
        channel.woken();
        assert!(!channel.arm(), "there is a frame");
        let come = take(&mut *channel, round % 3 + 1);
        assert_eq!(number(&come[0].1), round * 3);
    }
}

#[test]
fn an_interface_that_is_deleted_or_taken_down_comes_back() {
    let Some(bed) = Bed::new() else { return };
    bed.ip(&["tuntap", "add", "dev", TAP, "mode", "tap", "multi_queue"]);
    let tap = bed.tap();
    let carrier = tap.carrier();
    let mut channel = tap.open_channel().unwrap();
    channel.enable(true);
    let packets = bed.packets(TAP, false);

    bed.ip(&["link", "set", TAP, "down"]);
    until(|| !carrier.is_up());
    assert_eq!(transmit(&mut *channel, &plain(0..8, 60)), Sent { taken: 8, lost: 8 });
    assert_eq!(transmit(&mut *channel, &plain(0..1, 60)), Sent { taken: 1, lost: 1 });
    bed.ip(&["link", "set", TAP, "up"]);
    until(|| carrier.is_up());
    assert_eq!(transmit(&mut *channel, &plain(0..8, 60)), all_sent(8));
    let mut count = 0;
    until(|| {
        count += received(&packets).len();
        count == 8
    });

    let sleeper = Sleeper::new(&*channel);
    until(|| channel.receive(BURST).is_empty() && channel.arm());
    while sleeper.is_woken(0) {}
    bed.ip(&["link", "delete", TAP]);
    until(|| !carrier.is_up());
    assert_eq!(transmit(&mut *channel, &plain(0..8, 60)), Sent { taken: 8, lost: 8 });
    assert!(channel.receive(BURST).is_empty());
    assert!(tap.open_channel().is_err_and(|error| matches!(error, BackendError::Unavailable(_))));
    assert!(!bed.has(TAP), "nobody made it");
    bed.ip(&["tuntap", "add", "dev", TAP, "mode", "tap", "multi_queue"]);
    until(|| carrier.is_up());
    assert!(sleeper.is_woken(30_000), "nobody told of the new descriptor");
    let packets = bed.packets(TAP, false);
    assert_eq!(transmit(&mut *channel, &plain(0..8, 60)), all_sent(8));
    let mut seen = Vec::new();
    until(|| {
        seen.extend(received(&packets));
        seen.len() == 8
    });
    assert_eq!(seen[7], frame(7, 60));
    send(packets.as_raw_fd(), &frame(77, 60), MsgFlags::empty()).unwrap();
    assert_eq!(number(&take(&mut *channel, 1)[0].1), 77);
}

#[test]
fn a_tap_of_ours_is_made_again_and_goes_with_its_last_user() {
    let Some(bed) = Bed::new() else { return };
    let tap = bed.try_tap(TAP, Some(9000)).unwrap();
    assert_eq!(tap.info().mtu_max, 9000);
    let mut channel = tap.open_channel().unwrap();
    channel.enable(true);
    let index = || bed.namespace.index(&InterfaceName::new(TAP).unwrap());
    let first = index();
    bed.ip(&["link", "delete", TAP]);
    // It may be there again before this thread has seen that it was gone.
    until(|| index().is_some_and(|now| Some(now) != first) && tap.carrier().is_up());
    let packets = bed.packets(TAP, false);
    assert_eq!(transmit(&mut *channel, &plain(0..1, 9014)), all_sent(1));
    until(|| received(&packets).len() == 1);
    drop(tap);
    assert!(bed.has(TAP));
    drop(channel);
    until(|| !bed.has(TAP));
}

#[test]
fn two_queues_share_what_comes() {
    let Some(bed) = Bed::new() else { return };
    let tap = bed.tap();
    let mut channels: Vec<_> = (0..2).map(|_| tap.open_channel().unwrap()).collect();
    let packets = bed.packets(TAP, false);
    channels[1].enable(true);
    // The kernel learns from what a queue sends where to put the answers; what belongs to no flow it spreads by a hash.
    for number in 0..16 {
        send(packets.as_raw_fd(), &frame(number, 60), MsgFlags::empty()).unwrap();
    }
    assert_eq!(take(&mut *channels[1], 16).len(), 16);
    channels[0].enable(true);
    for port in 0..64 {
        let (datagram, _) = transport([2, 0, 0, 0, 0, 9], 17, (5000 + port, 4000), 20);
        send(packets.as_raw_fd(), &datagram, MsgFlags::empty()).unwrap();
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
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
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
fn frames_that_find_no_room_are_given_again() {
    let Some(bed) = Bed::new() else { return };
    let tap = bed.tap();
    // A bridge to a slow link: what waits there still counts as the queue's (but a broadcast would be copied).
    for line in [
        "link add slow0 type veth peer name slow1",
        "link add bridge0 type bridge forward_delay 0",
        "link set slow0 master bridge0",
        "link set dray0 master bridge0",
        "link set slow1 up",
        "link set slow0 up",
        "link set bridge0 up",
    ] {
        bed.ip(&line.split(' ').collect::<Vec<_>>());
    }
    if !bed.tc("qdisc add dev slow0 root tbf rate 400kbit burst 2kb limit 1mb") {
        eprintln!("skipped: no tc with tbf here");
        return;
    }
    let mut channel = tap.open_channel().unwrap();
    channel.enable(true);
    bed.settle_all([TAP, "slow0", "slow1", "bridge0"]);
    let sndbuf: libc::c_int = 20_000;
    let holder = tap.device.state().made.holder.file.as_raw_fd();
    // SAFETY: this one reads an `int`.
    Errno::result(unsafe { libc::ioctl(holder, libc::TUNSETSNDBUF as _, &raw const sndbuf) }).unwrap();
    let packets = bed.packets("slow1", false);
    let sleeper = Sleeper::new(&*channel);
    let total = 100;
    let (mut next, mut refused, mut lost, mut holes) = (0, 0, 0, 0);
    while next < total {
        let count = BURST.min(total - next);
        let sent = transmit(&mut *channel, &plain(next..next + count, 500));
        // Room that comes in the middle of a burst comes too late for the frames before it.
        lost += sent.lost;
        holes += usize::from(sent.lost > 0);
        next += sent.taken;
        if sent.taken < count {
            refused += 1;
            assert!(sleeper.is_woken(30_000), "nobody told of room");
            channel.woken();
        }
    }
    assert!(refused > 0, "there was always room");
    let mut seen = Vec::new();
    until(|| {
        seen.extend(
            received(&packets)
                .iter()
                .filter(|frame| frame[12..14] == EXPERIMENT.to_be_bytes())
                .map(|frame| number(frame)),
        );
        seen.len() >= total - lost
    });
    assert_eq!(seen.len(), total - lost);
    assert!(seen.is_sorted_by(|one, next| one < next), "once and in order: {seen:?}");
    assert!(holes <= refused, "room is rare: {holes} of {refused}");
}

#[test]
fn what_cannot_be_used_is_refused_with_the_next_step() {
    let Some(bed) = Bed::new() else { return };
    let refused = |name: &str, mtu: Option<u16>, words: &str| {
        let error = bed.try_tap(name, mtu).unwrap_err();
        assert!(matches!(error, BackendError::Refused(_)) && error.to_string().contains(words), "{error}");
    };
    bed.ip(&["tuntap", "add", "dev", "single0", "mode", "tap"]);
    refused("single0", None, "multi_queue");
    // Whoever has a tap open without headers keeps us from having them.
    let other = bed.namespace.run(|| {
        let file = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
        let mut request = InterfaceName::new("other0").unwrap().request();
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE) as libc::c_short;
        // SAFETY: the call reads and writes an `ifreq`.
        Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) }).unwrap();
        file
    });
    assert!(bed.try_tap("other0", None).unwrap_err().to_string().contains("without headers"));
    drop(other);
    bed.ip(&["link", "add", "veth0", "type", "veth", "peer", "name", "veth1"]);
    refused("veth0", None, "choose another name");
    refused("dray%d", None, "is no name of an interface");
    refused("a-name-that-is-too-long", None, "is no name of an interface");
    refused("dray1", Some(65535), "65521");
    let missing =
        TapBackend::new(TapSettings { name: TAP.to_owned(), netns: Some("dray-not-there".to_owned()), mtu: None });
    assert!(missing.is_err_and(|error| error.to_string().contains("ip netns add dray-not-there")));
    let outside = TapBackend::new(TapSettings { name: TAP.to_owned(), netns: Some("../x".to_owned()), mtu: None });
    assert!(outside.is_err_and(|error| matches!(error, BackendError::Refused(_))));
}
