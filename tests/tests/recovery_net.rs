#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! The card's service is killed while a network function carries frames. Frames of the gap may be lost; no buffer is, none is used
//! twice, and what comes after passes as before.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use device_svc::driver::net::{FrameHeader, ReceiveQueue, TransmitQueue};
use device_svc::driver::vhost_user::{FrontEnd, InflightRecord};
use device_svc::driver::{GuestMemory, QueueEvents, QueueOptions};
use device_svc::virtqueue::features;
use nix::sys::signal::Signal;
use tests::{Card, CardSettings, GuestSettings, IperfServer, Namespace, Process, network_rig, rounds, wait_for};

const OWN: &str = "192.0.2.1";
const GUEST: &str = "192.0.2.2";
const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const MAC_TEXT: &str = "52:54:00:12:34:56";

const LOOP: &str = r#"
[[uplink]]
name = "u"
backend = { type = "loopback" }
[[function]]
name = "f"
type = "net"
link = { type = "vhost-user", socket = "@/f.sock" }
uplink = "u"
mac = "52:54:00:12:34:56"
"#;

const QUEUE_SIZE: u16 = 64;
const FRAMES: u32 = 40;
const BUFFERS: u32 = 48;
const FRAME_BYTES: u32 = 200;
/// Frames that the loop holds at most.
const LOOP_FRAMES: u64 = 512;
/// How long nothing may come.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// A driver that outlives its connections: it sends numbered frames, which come back.
struct Sender {
    memory: Arc<GuestMemory>,
    front_end: FrontEnd,
    record: InflightRecord,
    transmit: TransmitQueue,
    receive: ReceiveQueue,
    events: [QueueEvents; 2],
    /// Frames sent, and how many of them the card has given back.
    sent: u64,
    reaped: u64,
    /// Frames that came back, and the number of the last.
    came: u64,
    last: Option<u64>,
    random: u64,
}

impl Sender {
    fn connect(socket: &Path, wanted: u64) -> Self {
        let memory = Arc::new(GuestMemory::new(0, 1 << 20).unwrap());
        let mut front_end = FrontEnd::connect(socket, wanted, Arc::clone(&memory)).unwrap();
        let record = front_end.make_record(2, QUEUE_SIZE).unwrap();
        front_end.hand_over_record(&record).unwrap();
        let options = QueueOptions { size: QUEUE_SIZE, features: front_end.accepted(), indirect: false };
        let mut receive = ReceiveQueue::new(&memory, options, BUFFERS, 256);
        let mut transmit = TransmitQueue::new(&memory, options, FRAMES, FRAME_BYTES);
        receive.add_buffers(BUFFERS as usize, 1);
        receive.queue().publish();
        let events = [
            front_end.start_queue(0, QUEUE_SIZE, receive.queue()).unwrap(),
            front_end.start_queue(1, QUEUE_SIZE, transmit.queue()).unwrap(),
        ];
        let (sent, reaped, came, last, random) = (0, 0, 0, None, 0x9e37_79b9_7f4a_7c15);
        Self { memory, front_end, record, transmit, receive, events, sent, reaped, came, last, random }
    }

    /// Comes again after the card's end: same memory, same rings, same record.
    fn reconnect(&mut self, socket: &Path) {
        let wanted = self.front_end.accepted();
        self.front_end = FrontEnd::connect(socket, wanted, Arc::clone(&self.memory)).unwrap();
        self.front_end.hand_over_record(&self.record).unwrap();
        self.events = [
            self.front_end.start_queue(0, QUEUE_SIZE, self.receive.queue()).unwrap(),
            self.front_end.start_queue(1, QUEUE_SIZE, self.transmit.queue()).unwrap(),
        ];
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % limit
    }

    /// Sends as many of `count` frames as there is room for. Half of them lie in two buffers.
    fn send(&mut self, count: u64) -> u64 {
        let mut sent = 0;
        while sent < count {
            let mut frame = vec![self.sent as u8; FRAME_BYTES as usize];
            frame[..6].copy_from_slice(&[0x52, 0x54, 0, 9, 9, 9]);
            frame[6..12].copy_from_slice(&MAC);
            frame[12..14].copy_from_slice(&[0x88, 0xb5]);
            frame[14..22].copy_from_slice(&self.sent.to_be_bytes());
            let cuts: &[u32] = if self.sent.is_multiple_of(2) { &[] } else { &[100] };
            if !self.transmit.send(FrameHeader::default(), &frame, cuts) {
                break;
            }
            self.sent += 1;
            sent += 1;
        }
        if sent > 0 && self.transmit.queue().publish() {
            self.events[1].ring();
        }
        sent
    }

    /// Takes what came back. Frames come in their order; after a kill it may be one that came before, but none that the card had
    /// given back by then.
    fn take(&mut self) {
        while let Some((_, frame)) = self.receive.take() {
            let number = u64::from_be_bytes(frame[14..22].try_into().unwrap());
            assert!(self.last.is_none_or(|last| number > last), "{number} after {:?}", self.last);
            assert!(frame[22..].iter().all(|byte| *byte == number as u8), "frame {number}");
            self.last = Some(number);
            self.came += 1;
        }
        self.reaped += self.transmit.reap() as u64;
    }

    fn give_buffers(&mut self) {
        if self.receive.add_buffers(BUFFERS as usize, 1) > 0 && self.receive.queue().publish() {
            self.events[0].ring();
        }
    }

    /// Goes on until `done`.
    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let mut since = Instant::now();
        let mut before = (0, 0);
        while !done(self) {
            self.take();
            if before != (self.came, self.reaped) {
                (before, since) = ((self.came, self.reaped), Instant::now());
            }
            let (sent, reaped, came) = (self.sent, self.reaped, self.came);
            assert!(since.elapsed() < SILENCE_MAX, "{what}: {sent} sent, {reaped} given back, {came} came");
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    /// Sends so many frames.
    fn carry(&mut self, frames: u64) {
        let until = self.sent + frames;
        self.until("carry", |sender| {
            sender.give_buffers();
            sender.send(until - sender.sent);
            sender.sent == until
        });
    }
}

fn survive(wanted: u64) {
    let mut card = Card::start(&CardSettings { parts: LOOP.to_owned(), ..CardSettings::default() });
    let socket = card.path("f.sock");
    let mut sender = Sender::connect(&socket, wanted);
    let kills = rounds(5, 50, 500);
    let mut under_way = 0;
    for _ in 0..kills {
        let frames = 50 + sender.below(300);
        sender.carry(frames);
        // Somewhere in the frames that are published just now, or before the card has woken up.
        sender.send(FRAMES.into());
        std::thread::sleep(Duration::from_micros(sender.below(3) * 20));
        card.process().signal(Signal::SIGKILL);
        card.process().end();
        sender.take();
        under_way += sender.sent - sender.reaped;
        // Frames are given back in their order: what is sent again is not older than this.
        sender.last = sender.reaped.checked_sub(1);
        card.restart(Signal::SIGKILL);
        sender.reconnect(&socket);
    }
    assert!(under_way > 0, "the card was never killed with a frame under way");
    sender.until("the last frames", |sender| {
        sender.give_buffers();
        sender.reaped == sender.sent
    });
    let lost = (sender.sent).saturating_sub(sender.came);
    assert!(lost <= u64::from(kills) * (LOOP_FRAMES + u64::from(BUFFERS)), "{lost} frames of {} lost", sender.sent);
    // Whatever the loop still had has come when the next frames do; from here on not one is lost.
    let mark = sender.sent;
    sender.carry(1);
    sender.until("one frame", |sender| sender.last == Some(mark));
    let before = sender.came;
    sender.carry(500);
    sender.until("all frames", |sender| {
        sender.give_buffers();
        sender.came == before + 500
    });
    // Every buffer is still there: without one more, so many frames come.
    sender.give_buffers();
    let before = sender.came;
    for number in 1..=u64::from(BUFFERS) {
        assert_eq!(sender.send(1), 1);
        sender.until("a frame for each buffer", |sender| sender.came == before + number);
    }
}

#[test]
fn a_card_that_is_killed_loses_no_buffer_of_a_split_ring() {
    survive(features::EVENT_INDEX);
}

#[test]
fn a_card_that_is_killed_loses_no_buffer_of_a_packed_ring() {
    survive(features::EVENT_INDEX | features::RING_PACKED);
}

/// QEMU keeps no record for a network function; it says where the rings are, which of a packed ring it does not know.
fn guest_goes_on(is_kept: bool, packed: bool) {
    let Some(rig) = network_rig() else { return };
    let namespace = Namespace::new(&rig, "recovery");
    // It outlives the card.
    namespace.tap("dray0", &["multi_queue"]);
    namespace.address("dray0", &format!("{OWN}/24"));
    // Over vfio-user the driver has a control queue, and what it chose there must hold after a kill: it uses two pairs.
    let (link, pairs) = if is_kept { ("vfio-user", 2) } else { ("vhost-user", 1) };
    let parts = format!(
        r#"
[[uplink]]
name = "u"
backend = {{ type = "tap", name = "dray0", netns = "{}" }}
[[function]]
name = "f"
type = "net"
link = {{ type = "{link}", socket = "@/f.sock" }}
uplink = "u"
mac = "{MAC_TEXT}"
packed = {packed}
queue-pairs = {pairs}
"#,
        namespace.name()
    );
    let mut card = Card::start(&CardSettings { parts, keeper: is_kept, ..CardSettings::default() });
    let _server = IperfServer::start(&namespace);
    let job = format!(
        "set -e
        ip.iproute2 address add {GUEST}/24 dev eth0
        [ {pairs} = 1 ] || ethtool -L eth0 combined {pairs}
        ip.iproute2 link set eth0 up
        ping -c 2 {OWN}
        echo OUT
        measure -b 40M -n 50M --client {OWN} >/dev/null
        echo IN
        measure -b 40M -n 50M --reverse --client {OWN} >/dev/null
        ping -c 30 -i 0.1 {OWN}
        echo ALL"
    );
    let path = card.path("f.sock").display().to_string();
    let chardev = format!("socket,id=c0,path={path},reconnect-ms=100");
    let ring = if packed { ",packed=on" } else { "" };
    let device = format!("virtio-net-pci,netdev=n0,mac={MAC_TEXT}{ring}");
    let whole = format!(r#"{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{path}"}}}}"#);
    let arguments: &[&str] = if is_kept {
        &["-smp", "2", "-device", &whole]
    } else {
        &["-chardev", &chardev, "-netdev", "vhost-user,id=n0,chardev=c0", "-device", &device]
    };
    let mut guest: Process = GuestSettings::new(card.folder(), &job, arguments).boot();
    for (word, way) in [("OUT\r", "transmit"), ("IN\r", "receive")] {
        guest.wait_for_output(word);
        for _ in 0..3 {
            wait_for("the transfer to go on", || {
                card.stats()["functions"][0][way]["bytes"].as_u64().unwrap() > 1 << 20
            });
            if is_kept {
                let served = card.output().matches("ready:").count();
                card.kill_service(Signal::SIGKILL);
                wait_for("another service", || card.output().matches("ready:").count() > served);
            } else {
                card.restart(Signal::SIGKILL);
            }
        }
    }
    let output = guest.succeed();
    assert!(output.contains("ALL\r"), "{output}");
    assert!(output.contains("30 packets transmitted, 30 packets received"), "{output}");
}

#[test]
fn a_guest_goes_on_over_kills_with_split_rings() {
    guest_goes_on(false, false);
}

#[test]
fn a_guest_goes_on_over_kills_with_packed_rings() {
    guest_goes_on(false, true);
}

#[test]
fn a_guest_on_vfio_user_goes_on_over_kills_with_split_rings() {
    guest_goes_on(true, false);
}

#[test]
fn a_guest_on_vfio_user_goes_on_over_kills_with_packed_rings() {
    guest_goes_on(true, true);
}
