//! Ports that talk to each other and to an uplink that is a list of frames.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "describes frames by their addresses")]

use std::collections::VecDeque;
use std::os::fd::RawFd;

use super::*;
use crate::backend::Segments;
use crate::backend::net::bed::{Bed, all_sent, plain, received, transmit, until};
use crate::backend::net::tap::{TapBackend, TapSettings};
use crate::backend::net::{BURST, Checksum, Incoming, Missed, NetHeader, Octets, Outgoing, Sent};

const ALL: Octets = [0xff; 6];

const fn station(number: u8) -> Octets {
    [2, 0, 0, 0, 0, number]
}

fn frame(to: Octets, from: Octets, tag: Option<u16>, number: u32) -> Vec<u8> {
    let mut frame = [to, from].concat();
    if let Some(tag) = tag {
        frame.extend([0x81, 0]);
        frame.extend(tag.to_be_bytes());
    }
    frame.extend([0x88, 0xb5]);
    frame.extend((0..50 + number % 1400).map(|at| (at ^ number) as u8));
    frame
}

/// What an uplink was given and has.
#[derive(Default)]
struct Wire {
    enabled: bool,
    sent: Vec<Vec<u8>>,
    come: VecDeque<Vec<u8>>,
    /// Frames that it takes still.
    room: usize,
    /// Of those, so many are lost in each burst.
    lost: usize,
    /// What it has missed, and frames that it will say later that it lost.
    missed: Missed,
    lost_later: u64,
}

struct WireBackend {
    wire: Arc<Mutex<Wire>>,
    carrier: Arc<Carrier>,
}

impl WireBackend {
    fn new() -> Self {
        let wire = Wire { room: usize::MAX, ..Wire::default() };
        Self { wire: Arc::new(Mutex::new(wire)), carrier: Arc::new(Carrier::new(true)) }
    }

    fn sent(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.wire.lock().unwrap().sent)
    }
}

impl NetBackend for WireBackend {
    fn info(&self) -> NetInfo {
        NetInfo { mtu_max: 9000, transmit: Offloads::ALL, receive: Offloads::ALL, channels_max: 1, functions_max: 1 }
    }

    fn carrier(&self) -> &Arc<Carrier> {
        &self.carrier
    }

    fn open_channel(&self) -> Result<Box<dyn NetChannel>, BackendError> {
        Ok(Box::new(WireChannel { wire: Arc::clone(&self.wire), bytes: Vec::new(), handed: Vec::new() }))
    }
}

struct WireChannel {
    wire: Arc<Mutex<Wire>>,
    bytes: Vec<Vec<u8>>,
    handed: Vec<Incoming>,
}

// SAFETY: what is handed over is in `bytes`.
unsafe impl Send for WireChannel {}

fn bytes_of(frame: &Outgoing) -> Vec<u8> {
    let ranges = frame.segments.as_slice().iter();
    // SAFETY: the frame's memory is readable while `transmit` runs, and nobody writes it in these tests.
    let bytes =
        ranges.flat_map(|range| unsafe { std::slice::from_raw_parts(range.iov_base.cast::<u8>(), range.iov_len) });
    bytes.copied().collect()
}

impl NetChannel for WireChannel {
    fn enable(&mut self, enabled: bool) {
        self.wire.lock().unwrap().enabled = enabled;
    }
    fn leave_undone(&mut self, offloads: Offloads) {
        assert_eq!(offloads, Offloads::ALL);
    }
    fn transmit(&mut self, frames: &[Outgoing]) -> Sent {
        let mut wire = self.wire.lock().unwrap();
        let taken = frames.len().min(wire.room);
        wire.room -= taken;
        let sent = frames[..taken].iter().map(bytes_of);
        wire.sent.extend(sent);
        Sent { taken, lost: wire.lost.min(taken) }
    }
    fn receive(&mut self, most: usize) -> &[Incoming] {
        let mut wire = self.wire.lock().unwrap();
        let count = wire.come.len().min(most);
        self.bytes = wire.come.drain(..count).collect();
        // SAFETY: the bytes stay until the next call, which is after the release.
        let incoming = |bytes: &Vec<u8>| unsafe { Incoming::new(NetHeader::DONE, bytes.as_ptr(), bytes.len() as u32) };
        self.handed = self.bytes.iter().map(incoming).collect();
        &self.handed
    }
    fn release(&mut self, count: usize) {
        assert_eq!(count, self.bytes.len(), "the switch holds nothing back");
    }
    fn missed(&mut self) -> Missed {
        std::mem::take(&mut self.wire.lock().unwrap().missed)
    }
    fn lost_later(&mut self) -> u64 {
        std::mem::take(&mut self.wire.lock().unwrap().lost_later)
    }
    fn wake_fd(&self) -> Option<RawFd> {
        None
    }
    fn arm(&mut self) -> bool {
        self.wire.lock().unwrap().come.is_empty()
    }
}

fn plugged(switch: &SwitchBackend, vlan: Option<u16>) -> Box<dyn NetChannel> {
    let port = switch.port(PortSettings { vlan }).unwrap().unwrap();
    let mut channel = port.open_channel().unwrap();
    channel.enable(true);
    channel
}

fn send_with(channel: &mut dyn NetChannel, header: NetHeader, bytes: &[u8]) -> Sent {
    let ranges: Vec<libc::iovec> = bytes
        .chunks(100)
        .map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() })
        .collect();
    // SAFETY: list and bytes outlive the call.
    let segments = unsafe { Segments::new(ranges.as_ptr(), ranges.len() as u32) };
    channel.transmit(&[Outgoing { header, segments, bytes: bytes.len() as u32 }])
}

fn send(channel: &mut dyn NetChannel, bytes: &[u8]) {
    assert_eq!(send_with(channel, NetHeader::DONE, bytes), Sent { taken: 1, lost: 0 });
}

fn readable(channel: &dyn NetChannel) -> bool {
    let mut poll = libc::pollfd { fd: channel.wake_fd().unwrap(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one descriptor that the channel has.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

fn come(channel: &mut dyn NetChannel) -> Vec<Vec<u8>> {
    let frames: Vec<_> = channel.receive(32).iter().map(|frame| frame.bytes().to_vec()).collect();
    channel.release(frames.len());
    frames
}

#[test]
fn what_is_for_a_known_station_goes_there_alone() {
    let switch = SwitchBackend::new(None).unwrap();
    let [mut a, mut b, mut c] = [(); 3].map(|()| plugged(&switch, None));
    let asked = frame(ALL, station(1), None, 1);
    send(a.as_mut(), &asked);
    assert_eq!(come(a.as_mut()), Vec::<Vec<u8>>::new(), "nothing comes back");
    assert_eq!((come(b.as_mut()), come(c.as_mut())), (vec![asked.clone()], vec![asked]));
    let answer = frame(station(1), station(2), None, 2);
    send(b.as_mut(), &answer);
    assert_eq!((come(a.as_mut()), come(c.as_mut())), (vec![answer], vec![]));
    let unknown = frame(station(9), station(1), None, 3);
    send(a.as_mut(), &unknown);
    assert_eq!((come(b.as_mut()), come(c.as_mut())), (vec![unknown.clone()], vec![unknown]));
    // To itself: to nobody.
    send(a.as_mut(), &frame(station(1), station(1), None, 4));
    assert_eq!((come(a.as_mut()), come(b.as_mut())), (vec![], vec![]));
    // It moves, and its old port is closed.
    send(c.as_mut(), &frame(ALL, station(1), None, 5));
    let after = frame(station(1), station(2), None, 6);
    come(a.as_mut());
    send(b.as_mut(), &after);
    assert_eq!((come(a.as_mut()), come(c.as_mut())), (vec![], vec![after]));
    drop(c);
    let flooded = frame(station(1), station(2), None, 7);
    send(b.as_mut(), &flooded);
    assert_eq!(come(a.as_mut()), vec![flooded], "a port that is gone is nowhere");
}

#[test]
fn vlans_are_apart_and_tags_are_for_trunks() {
    let wire = WireBackend::new();
    let switch = SwitchBackend::new(Some(&wire)).unwrap();
    let mut ten = plugged(&switch, Some(10));
    let mut ten_too = plugged(&switch, Some(10));
    let mut twenty = plugged(&switch, Some(20));
    let mut trunk = plugged(&switch, None);
    let plain = frame(ALL, station(1), None, 1);
    let with = |tag| frame(ALL, station(1), Some(tag), 1);
    for sent in [plain.clone(), with(10), with(0xe000)] {
        send(ten.as_mut(), &sent);
        let tagged = if sent == with(0xe000) { with(0xe000 | 10) } else { with(10) };
        assert_eq!(come(ten_too.as_mut()), vec![plain.clone()]);
        assert_eq!(come(twenty.as_mut()), Vec::<Vec<u8>>::new());
        assert_eq!(come(trunk.as_mut()), vec![tagged.clone()]);
        assert_eq!(wire.sent(), vec![tagged]);
    }
    // A tag of another VLAN is dropped where it comes in.
    assert_eq!(send_with(ten.as_mut(), NetHeader::DONE, &with(20)), Sent { taken: 1, lost: 1 });
    assert_eq!((come(twenty.as_mut()), wire.sent()), (vec![], vec![]));
    // Nor does a tag get by behind another, or as a provider's: no access port is brought one.
    let second = |from: Octets, tag: u16| {
        let first = frame(ALL, from, Some(tag), 1);
        [&first[..16], &[0x81, 0, 0, 20], &first[16..]].concat()
    };
    let providers = [&plain[..12], &[0x88, 0xa8, 0, 20], &plain[12..]].concat();
    for hidden in [second(station(1), 10), second(station(1), 0), providers] {
        assert_eq!(send_with(ten.as_mut(), NetHeader::DONE, &hidden), Sent { taken: 1, lost: 1 });
        assert_eq!((come(ten_too.as_mut()), come(trunk.as_mut()), wire.sent()), (vec![], vec![], vec![]));
    }
    let two = second(station(9), 10);
    send(trunk.as_mut(), &two);
    assert_eq!((come(ten.as_mut()), wire.sent()), (vec![], vec![two]));
    assert_eq!(ten.missed(), Missed { bad_header: 1, ..Missed::NONE });
    // From a trunk, by its tag; without one it is for trunks alone.
    send(trunk.as_mut(), &with(20));
    assert_eq!((come(ten.as_mut()), come(twenty.as_mut())), (vec![], vec![plain.clone()]));
    send(trunk.as_mut(), &plain);
    assert_eq!((come(ten.as_mut()), come(twenty.as_mut())), (vec![], vec![]));
    assert_eq!(wire.sent(), vec![with(20), plain.clone()]);
    // The same address in another VLAN is another station: this one was heard on the port of VLAN 10.
    wire.wire.lock().unwrap().come.push_back(frame(station(1), station(7), Some(10), 2));
    wire.wire.lock().unwrap().come.push_back(frame(station(1), station(7), Some(20), 3));
    assert!(ten_too.carry());
    assert!(come(ten_too.as_mut()).is_empty());
    assert_eq!(come(ten.as_mut()), vec![frame(station(1), station(7), None, 2)]);
    assert_eq!(come(trunk.as_mut()), vec![frame(station(1), station(7), Some(20), 3)]);
    assert!(come(twenty.as_mut()).is_empty(), "it was heard on the trunk");
}

#[test]
fn the_uplink_is_one_more_port() {
    let wire = WireBackend::new();
    let switch = SwitchBackend::new(Some(&wire)).unwrap();
    assert_eq!(switch.info().mtu_max, 9000);
    assert!(!wire.wire.lock().unwrap().enabled, "nobody carries frames");
    let (mut a, mut b) = (plugged(&switch, None), plugged(&switch, None));
    assert!(wire.wire.lock().unwrap().enabled);
    send(a.as_mut(), &frame(ALL, station(1), None, 1));
    come(b.as_mut());
    assert_eq!(wire.sent().len(), 1);
    let answer = frame(station(1), station(100), None, 2);
    wire.wire.lock().unwrap().come.push_back(answer.clone());
    assert!(!a.arm_carrying(), "something has come");
    // Whoever turns carries it.
    assert!(b.carry());
    assert!(!b.carry());
    assert!(a.arm_carrying());
    assert_eq!((come(a.as_mut()), come(b.as_mut())), (vec![answer], vec![]));
    let known = frame(station(100), station(1), None, 3);
    send(a.as_mut(), &known);
    assert_eq!((come(b.as_mut()), wire.sent()), (vec![], vec![known]));
    // What is for a station on the uplink's side is not sent back there.
    wire.wire.lock().unwrap().come.push_back(frame(station(100), station(101), None, 4));
    assert!(a.carry());
    assert_eq!((come(a.as_mut()), come(b.as_mut()), wire.sent()), (vec![], vec![], vec![]));
    a.enable(false);
    assert!(wire.wire.lock().unwrap().enabled);
    drop((a, b));
    assert!(!wire.wire.lock().unwrap().enabled);
}

#[test]
fn an_uplink_without_room_holds_up_its_own_frames_alone() {
    let wire = WireBackend::new();
    let switch = SwitchBackend::new(Some(&wire)).unwrap();
    let (mut a, mut b) = (plugged(&switch, None), plugged(&switch, None));
    send(b.as_mut(), &frame(ALL, station(2), None, 0));
    wire.wire.lock().unwrap().come.push_back(frame(ALL, station(100), None, 0));
    a.carry();
    come(a.as_mut());
    come(b.as_mut());
    wire.sent();
    wire.wire.lock().unwrap().room = 1;
    let out = |number| frame(station(100), station(1), None, number);
    // The first goes; the second waits here; with the third the queue is known to be full.
    send(a.as_mut(), &out(1));
    send(a.as_mut(), &out(2));
    assert_eq!(send_with(a.as_mut(), NetHeader::DONE, &out(3)), Sent { taken: 0, lost: 0 });
    let across = frame(station(2), station(1), None, 4);
    send(a.as_mut(), &across);
    assert_eq!(come(b.as_mut()), vec![across], "others are reached all the same");
    wire.wire.lock().unwrap().room = usize::MAX;
    b.carry();
    send(a.as_mut(), &out(3));
    assert_eq!(wire.sent(), vec![out(1), out(2), out(3)], "in order");
}

/// Two channels on an uplink that has no room, which one of them was told.
fn full() -> (WireBackend, Box<dyn NetChannel>, Box<dyn NetChannel>) {
    let wire = WireBackend::new();
    let switch = SwitchBackend::new(Some(&wire)).unwrap();
    let (mut a, mut b) = (plugged(&switch, None), plugged(&switch, None));
    wire.wire.lock().unwrap().come.push_back(frame(ALL, station(100), None, 0));
    a.carry();
    come(a.as_mut());
    come(b.as_mut());
    wire.wire.lock().unwrap().room = 0;
    let out = frame(station(100), station(1), None, 1);
    send(a.as_mut(), &out);
    assert_eq!(send_with(a.as_mut(), NetHeader::DONE, &out), Sent { taken: 0, lost: 0 });
    (wire, a, b)
}

#[test]
fn one_who_waits_for_the_uplink_is_woken_when_another_finds_room() {
    let (wire, mut a, mut b) = full();
    assert!(a.arm_carrying(), "there is nothing to do");
    assert!(!readable(a.as_ref()));
    wire.wire.lock().unwrap().room = usize::MAX;
    b.carry();
    assert_eq!(wire.sent().len(), 1);
    assert!(readable(a.as_ref()));
    // Room that has come before it sleeps keeps it awake, once.
    let (wire, mut a, mut b) = full();
    wire.wire.lock().unwrap().room = usize::MAX;
    b.carry();
    assert!(!a.arm_carrying(), "the frame that was not taken can be given again");
    assert!(a.arm_carrying());
}

#[test]
fn what_the_uplink_loses_is_counted() {
    let wire = WireBackend::new();
    let switch = SwitchBackend::new(Some(&wire)).unwrap();
    let mut a = plugged(&switch, None);
    let out = frame(ALL, station(1), None, 1);
    wire.wire.lock().unwrap().lost = 1;
    assert_eq!(send_with(a.as_mut(), NetHeader::DONE, &out), Sent { taken: 1, lost: 1 });
    // What is for all is kept for an uplink without room, as far as there is room for that.
    wire.wire.lock().unwrap().room = 0;
    let lost = (0..2000).map(|_| send_with(a.as_mut(), NetHeader::DONE, &out)).filter(|sent| sent.lost == 1).count();
    wire.wire.lock().unwrap().room = usize::MAX;
    wire.sent();
    a.carry();
    assert_eq!(lost + wire.sent().len(), 2000);
    assert!(lost > 1000, "{lost}");
}

/// What waited for the uplink is sent by whoever comes next, and counted with the port that it came from.
#[test]
fn what_the_uplink_loses_later_is_counted_where_it_comes_from() {
    let wire = WireBackend::new();
    let switch = SwitchBackend::new(Some(&wire)).unwrap();
    let [mut a, mut b, mut c] = [(); 3].map(|()| plugged(&switch, None));
    let from = |number| frame(ALL, station(number), None, number.into());
    wire.wire.lock().unwrap().room = 0;
    for from_a in [true, true, false, true] {
        send(if from_a { a.as_mut() } else { b.as_mut() }, &from(1));
    }
    // Three bursts: of two, one and one frame, of each of which one is lost.
    (wire.wire.lock().unwrap().room, wire.wire.lock().unwrap().lost) = (usize::MAX, 1);
    c.carry();
    assert_eq!(wire.sent().len(), 4);
    assert_eq!([&mut a, &mut b, &mut c].map(|channel| channel.lost_later()), [2, 1, 0]);
    assert_eq!(a.lost_later(), 0, "counted once");
    // So is what the uplink took and lost behind the call.
    (wire.wire.lock().unwrap().lost, wire.wire.lock().unwrap().lost_later) = (0, 3);
    send(b.as_mut(), &from(2));
    assert_eq!([&mut a, &mut b, &mut c].map(|channel| channel.lost_later()), [0, 3, 0]);
    // What it missed is counted once, with the channel that looked after it.
    let missed = Missed { no_buffers: 5, bad_header: 1, ..Missed::NONE };
    wire.wire.lock().unwrap().missed = missed;
    b.carry();
    c.carry();
    assert_eq!((b.missed(), c.missed()), (missed, Missed::NONE));
    // A port that goes leaves nothing to the next one at its place.
    (wire.wire.lock().unwrap().room, wire.wire.lock().unwrap().lost) = (0, 1);
    send(c.as_mut(), &from(3));
    wire.wire.lock().unwrap().room = usize::MAX;
    b.carry();
    drop(c);
    assert_eq!(plugged(&switch, None).lost_later(), 0);
}

#[test]
fn one_who_takes_nothing_loses_its_own_frames_alone() {
    let switch = SwitchBackend::new(None).unwrap();
    let [mut a, mut b, mut c] = [(); 3].map(|()| plugged(&switch, None));
    let mut got = 0;
    for number in 0..2000 {
        send(a.as_mut(), &frame(ALL, station(1), None, number));
        got += come(b.as_mut()).len();
    }
    assert_eq!((got, b.missed()), (2000, Missed::NONE));
    let mut waiting = 0;
    while let count @ 1.. = come(c.as_mut()).len() {
        waiting += count;
    }
    assert_eq!(c.missed(), Missed { no_buffers: 2000 - waiting as u64, ..Missed::NONE });
    assert!(waiting > 100, "{waiting}");
    c.enable(false);
    send(a.as_mut(), &frame(ALL, station(1), None, 1));
    assert_eq!((come(c.as_mut()), c.missed()), (vec![], Missed::NONE), "one that is not enabled is sent nothing");
}

#[test]
fn what_is_undone_stays_undone_and_moves_with_the_tag() {
    let switch = SwitchBackend::new(None).unwrap();
    let (mut access, mut trunk) = (plugged(&switch, Some(7)), plugged(&switch, None));
    let checksum = |start| NetHeader { checksum: Checksum::Needed { start, offset: 16 }, segmentation: None };
    send_with(access.as_mut(), checksum(34), &frame(ALL, station(1), None, 60));
    assert_eq!(trunk.receive(32)[0].header, checksum(38));
    trunk.release(1);
    send_with(trunk.as_mut(), checksum(38), &frame(ALL, station(2), Some(7), 60));
    assert_eq!(access.receive(32)[0].header, checksum(34));
}

#[test]
fn a_flow_keeps_to_one_channel_of_a_port_and_flows_use_all() {
    let switch = SwitchBackend::new(None).unwrap();
    let mut sender = plugged(&switch, None);
    let port = switch.port(PortSettings::default()).unwrap().unwrap();
    let mut channels: Vec<_> = (0..4).map(|_| port.open_channel().unwrap()).collect();
    drop(port);
    channels[..3].iter_mut().for_each(|channel| channel.enable(true));
    let mut counts = [0; 4];
    for source in 0..64_u16 {
        let mut packet = Vec::new();
        let builder =
            etherparse::PacketBuilder::ethernet2(station(1), station(2)).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 9);
        builder.udp(1000 + source, 7).write(&mut packet, b"a datagram").unwrap();
        for _ in 0..2 {
            send(sender.as_mut(), &packet);
        }
        let got: Vec<usize> = channels.iter_mut().map(|channel| come(channel.as_mut()).len()).collect();
        assert_eq!(got.iter().sum::<usize>(), 2);
        let to = got.iter().position(|count| *count == 2).expect("both by one channel");
        counts[to] += 1;
    }
    assert!(counts[..3].iter().all(|count| *count > 5) && counts[3] == 0, "{counts:?}");
}

#[test]
fn a_sleeper_is_woken_by_what_is_put_in() {
    let switch = SwitchBackend::new(None).unwrap();
    let (mut a, mut b) = (plugged(&switch, None), plugged(&switch, None));
    assert!(b.arm() && b.arm_carrying());
    assert!(!readable(b.as_ref()));
    send(a.as_mut(), &frame(ALL, station(1), None, 1));
    assert!(readable(b.as_ref()));
    b.woken();
    assert!(!readable(b.as_ref()));
    assert!(!b.arm(), "it has a frame");
    assert_eq!(come(b.as_mut()).len(), 1);
    send(a.as_mut(), &frame(ALL, station(1), None, 2));
    assert!(!readable(b.as_ref()), "nobody rings for one who is awake");
    assert_eq!(come(b.as_mut()).len(), 1);
    // One who was about to sleep, and was woken by something else, is awake as well.
    assert!(b.arm());
    b.carry();
    send(a.as_mut(), &frame(ALL, station(1), None, 3));
    assert!(!readable(b.as_ref()), "nobody rings for one who turns");
    assert_eq!(come(b.as_mut()).len(), 1);
    // One that leaves wakes the others: it may have been the one who looked after the uplink.
    assert!(b.arm());
    drop(a);
    assert!(readable(b.as_ref()));
}

#[test]
fn an_uplink_of_the_kernels_is_shared_by_threads() {
    let Some(bed) = Bed::new() else { return };
    let settings = TapSettings { name: "dray0".to_owned(), netns: Some(bed.name().to_owned()), mtu: None };
    let tap = TapBackend::new(settings).unwrap();
    let switch = SwitchBackend::new(Some(&tap)).unwrap();
    let packets = bed.packets("dray0", false);
    let mut channels = [plugged(&switch, None), plugged(&switch, None)];
    for round in 0..3 {
        for channel in &mut channels {
            let turn = || {
                channel.carry();
                assert_eq!(transmit(channel.as_mut(), &plain(0..BURST, 60)), all_sent(BURST), "round {round}");
                channel.arm_carrying();
            };
            std::thread::scope(|scope| scope.spawn(turn).join().unwrap());
        }
    }
    let mut count = 0;
    until(|| {
        count += received(&packets).len();
        count == 6 * BURST
    });
}
