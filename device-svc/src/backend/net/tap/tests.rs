//! Taps in network namespaces that the tests make; a packet socket, or the kernel's own stack, is on the other side. They need root:
//! without it, or where there is no `/dev/net/tun` or io_uring (user-mode emulation), they say so and pass over.
#![expect(unsafe_code, reason = "lends frames to a channel, and sets options of sockets")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::UdpSocket;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socket};

use super::super::namespace::{InterfaceName, Namespace};
use super::super::{
    BURST, Checksum, NetBackend, NetChannel, NetHeader, Offloads, Outgoing, Segmentation, SegmentationKind, Sent,
};
use super::{TapBackend, TapSettings};
use crate::backend::{BackendError, Segments};

const TAP: &str = "dray0";
/// An EtherType for experiments: nobody in the kernel answers.
const EXPERIMENT: u16 = 0x88b5;
const PATIENCE: Duration = Duration::from_secs(30);

/// A network namespace that goes with it.
struct Bed {
    name: String,
    namespace: Namespace,
}

impl Bed {
    /// `None` where the test cannot run.
    fn new() -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let usable = nix::unistd::geteuid().is_root()
            && std::fs::File::open("/dev/net/tun").is_ok()
            && io_uring::IoUring::new(2).is_ok();
        if !usable {
            eprintln!("skipped: taps need root, /dev/net/tun and io_uring");
            return None;
        }
        let name = format!("dray-tap-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name]);
        // Nobody but the test speaks: no router solicitation.
        ip(&["netns", "exec", &name, "sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1"]);
        Some(Self { namespace: Namespace::open(Some(&name)).unwrap(), name })
    }

    fn ip(&self, arguments: &[&str]) {
        ip(&[&["-n", &self.name], arguments].concat());
    }

    fn try_tap(&self, name: &str, mtu: Option<u16>) -> Result<TapBackend, BackendError> {
        TapBackend::new(TapSettings { name: name.to_owned(), netns: Some(self.name.clone()), mtu })
    }

    fn tap(&self) -> TapBackend {
        self.try_tap(TAP, None).unwrap()
    }

    fn there(&self) -> bool {
        self.namespace.index(&InterfaceName::new(TAP).unwrap()).is_some()
    }

    /// A packet socket on an interface; with virtio-net headers or without.
    fn packets(&self, interface: &str, headers: bool) -> OwnedFd {
        let index = self.namespace.index(&InterfaceName::new(interface).unwrap()).unwrap();
        let open =
            || socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None);
        let packets = self.namespace.run(open).unwrap().unwrap();
        let set = |option: libc::c_int, value: libc::c_int| {
            // SAFETY: the option is an `int`.
            Errno::result(unsafe {
                libc::setsockopt(packets.as_raw_fd(), libc::SOL_PACKET, option, (&raw const value).cast(), 4)
            })
            .unwrap();
        };
        set(libc::PACKET_IGNORE_OUTGOING, 1);
        if headers {
            set(libc::PACKET_VNET_HDR, 1);
        }
        // SAFETY: an address is plain data, and as long as said.
        unsafe {
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
            address.sll_ifindex = index;
            let length = size_of_val(&address) as libc::socklen_t;
            Errno::result(libc::bind(packets.as_raw_fd(), (&raw const address).cast(), length)).unwrap();
        }
        packets
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

fn ip(arguments: &[&str]) {
    let done = Command::new("ip").args(arguments).output().unwrap();
    assert!(done.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
}

#[track_caller]
fn until(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited in vain");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A frame with a number in it.
fn frame(number: usize, bytes: usize) -> Vec<u8> {
    let mut frame = vec![0x5a; bytes];
    frame[..12].copy_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1]);
    frame[12..14].copy_from_slice(&EXPERIMENT.to_be_bytes());
    frame[14..18].copy_from_slice(&(number as u32).to_le_bytes());
    frame
}

fn number(frame: &[u8]) -> usize {
    u32::from_le_bytes(frame[14..18].try_into().unwrap()) as usize
}

/// Gives frames to a channel, each in two ranges.
fn transmit(channel: &mut dyn NetChannel, frames: &[(NetHeader, Vec<u8>)]) -> Sent {
    let ranges: Vec<[libc::iovec; 2]> = frames
        .iter()
        .map(|(_, bytes)| {
            let (first, rest) = bytes.split_at(bytes.len() / 2);
            [first, rest].map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() })
        })
        .collect();
    let outgoing: Vec<Outgoing> = frames
        .iter()
        .zip(&ranges)
        .map(|((header, bytes), ranges)| Outgoing {
            header: *header,
            // SAFETY: the ranges outlive the call.
            segments: unsafe { Segments::new(ranges.as_ptr(), 2) },
            bytes: bytes.len() as u32,
        })
        .collect();
    channel.transmit(&outgoing)
}

fn plain(numbers: std::ops::Range<usize>, bytes: usize) -> Vec<(NetHeader, Vec<u8>)> {
    numbers.map(|number| (NetHeader::DONE, frame(number, bytes))).collect()
}

/// What a packet socket has.
fn received(packets: &OwnedFd) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let mut buffer = vec![0; 70000];
    while let Ok(bytes) = recv(packets.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
        all.push(buffer[..bytes].to_vec());
    }
    all
}

/// Takes the next `count` frames from a channel.
#[track_caller]
fn take(channel: &mut dyn NetChannel, count: usize) -> Vec<(NetHeader, Vec<u8>)> {
    let mut all = Vec::new();
    until(|| {
        let frames = channel.receive(count - all.len());
        all.extend(frames.iter().map(|frame| (frame.header, frame.bytes().to_vec())));
        let taken = frames.len();
        channel.release(taken);
        all.len() >= count
    });
    all
}

fn all_sent(count: usize) -> Sent {
    Sent { taken: count, lost: 0 }
}

/// A packet of IPv4 from 10.9.8.2 to 10.9.8.1 with a checksum that is still to be computed, in a frame for `to`.
fn transport(to: [u8; 6], protocol: u8, ports: (u16, u16), payload: usize) -> (Vec<u8>, Checksum) {
    let (header_bytes, offset) = if protocol == 6 { (20, 16) } else { (8, 6) };
    let length = header_bytes + payload;
    let mut frame = vec![0; 34];
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14] = 0x45;
    frame[16..18].copy_from_slice(&((20 + length) as u16).to_be_bytes());
    frame[22] = 64;
    frame[23] = protocol;
    frame[26..34].copy_from_slice(&[10, 9, 8, 2, 10, 9, 8, 1]);
    let checksum = !sum(0, &frame[14..34]);
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    let pseudo = sum(u32::from(protocol) + length as u32, &frame[26..34]);
    frame.extend(ports.0.to_be_bytes());
    frame.extend(ports.1.to_be_bytes());
    if protocol == 6 {
        frame.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff]);
    } else {
        frame.extend((length as u16).to_be_bytes());
    }
    frame.extend([0; 4]);
    frame.truncate(34 + header_bytes);
    frame[34 + offset..36 + offset].copy_from_slice(&pseudo.to_be_bytes());
    frame.extend((0..payload).map(|byte| byte as u8));
    (frame, Checksum::Needed { start: 34, offset: offset as u16 })
}

fn sum(start: u32, bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum = start + words.sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Whether the checksum of a TCP packet is right.
fn is_valid(frame: &[u8]) -> bool {
    let length = u16::from_be_bytes(frame[16..18].try_into().unwrap()) - 20;
    let pseudo = sum(u32::from(frame[23]) + u32::from(length), &frame[26..34]);
    sum(pseudo.into(), &frame[34..34 + usize::from(length)]) == 0xffff
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
    until(|| received(&packets).len() == 5);
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

/// Waits for edges as a reactor does.
struct Sleeper(Epoll);

impl Sleeper {
    fn new(channel: &dyn NetChannel) -> Self {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        // SAFETY: the channel outlives the sleeper.
        let fd = unsafe { BorrowedFd::borrow_raw(channel.wake_fd().unwrap()) };
        epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0)).unwrap();
        Self(epoll)
    }

    fn is_woken(&self, wait_ms: u16) -> bool {
        self.0.wait(&mut [EpollEvent::empty()], wait_ms).unwrap() == 1
    }
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
    until(|| received(&packets).len() == 8);

    let sleeper = Sleeper::new(&*channel);
    until(|| channel.receive(BURST).is_empty() && channel.arm());
    while sleeper.is_woken(0) {}
    for round in 0..2 {
        bed.ip(&["link", "delete", TAP]);
        until(|| !carrier.is_up());
        assert_eq!(transmit(&mut *channel, &plain(0..8, 60)), Sent { taken: 8, lost: 8 });
        assert!(channel.receive(BURST).is_empty());
        assert!(tap.open_channel().is_err_and(|error| matches!(error, BackendError::Unavailable(_))));
        // The first one was ours and may be there again; the second one is not.
        if round == 1 {
            assert!(!bed.there(), "nobody made it");
        }
        bed.ip(&["tuntap", "add", "dev", TAP, "mode", "tap", "multi_queue"]);
        until(|| carrier.is_up());
        assert!(sleeper.is_woken(30_000), "nobody told of the new descriptor");
        let packets = bed.packets(TAP, false);
        assert_eq!(transmit(&mut *channel, &plain(0..8, 60)), all_sent(8));
        until(|| received(&packets).len() == 8);
        send(packets.as_raw_fd(), &frame(77, 60), MsgFlags::empty()).unwrap();
        assert_eq!(number(&take(&mut *channel, 1)[0].1), 77);
        until(|| channel.receive(BURST).is_empty() && channel.arm());
        while sleeper.is_woken(0) {}
    }
}

#[test]
fn a_tap_of_ours_is_made_again_and_goes_with_its_last_user() {
    let Some(bed) = Bed::new() else { return };
    let tap = bed.try_tap(TAP, Some(9000)).unwrap();
    assert_eq!(tap.info().mtu_max, 9000);
    let mut channel = tap.open_channel().unwrap();
    channel.enable(true);
    bed.ip(&["link", "delete", TAP]);
    until(|| !tap.carrier().is_up());
    until(|| tap.carrier().is_up());
    let packets = bed.packets(TAP, false);
    assert_eq!(transmit(&mut *channel, &plain(0..1, 9014)), all_sent(1));
    until(|| received(&packets).len() == 1);
    drop(tap);
    assert!(bed.there());
    drop(channel);
    until(|| !bed.there());
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
    until(|| received(&packets).len() == 2 * BURST);
}

#[test]
fn frames_that_find_no_room_are_given_again() {
    let Some(bed) = Bed::new() else { return };
    let tap = bed.tap();
    // A bridge to a slow link: what waits there is still the queue's.
    for line in [
        "link add slow0 type veth peer name slow1",
        "link add bridge0 type bridge",
        "link set slow0 master bridge0",
        "link set dray0 master bridge0",
        "link set slow1 up",
        "link set slow0 up",
        "link set bridge0 up",
    ] {
        bed.ip(&line.split(' ').collect::<Vec<_>>());
    }
    let shaped = Command::new("tc")
        .args(["-n", &bed.name])
        .args("qdisc add dev slow0 root tbf rate 400kbit burst 2kb limit 1mb".split(' '))
        .status();
    if !shaped.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no tc with tbf here");
        return;
    }
    let mut channel = tap.open_channel().unwrap();
    channel.enable(true);
    let sndbuf: libc::c_int = 20_000;
    let holder = tap.device.state().made.holder.file.as_raw_fd();
    // SAFETY: this one reads an `int`.
    Errno::result(unsafe { libc::ioctl(holder, libc::TUNSETSNDBUF as _, &raw const sndbuf) }).unwrap();
    let packets = bed.packets("slow1", false);
    let sleeper = Sleeper::new(&*channel);
    let total = 100;
    let (mut next, mut refused) = (0, 0);
    while next < total {
        let count = BURST.min(total - next);
        let sent = transmit(&mut *channel, &plain(next..next + count, 500));
        assert_eq!(sent.lost, 0, "nobody else takes room");
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
        seen.len() >= total
    });
    assert_eq!(seen, (0..total).collect::<Vec<_>>());
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
