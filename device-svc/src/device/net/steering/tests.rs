//! Two pairs whose channels bring frames for each other.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "describes frames by their addresses")]

use std::collections::VecDeque;
use std::sync::Mutex;

use super::super::hashing::TYPES;
use super::super::hashing::tests::{KEY, rss};
use super::super::{NetSettings, Octets};
use super::*;
use crate::backend::net::null::NullNet;
use crate::backend::net::{NetBackend, NetHeader};

type Come = Arc<Mutex<VecDeque<Vec<u8>>>>;

/// A channel that has what a test put there.
struct ListChannel {
    come: Come,
    bytes: Vec<Vec<u8>>,
    handed: Vec<Incoming>,
}

// SAFETY: what is handed over is in `bytes`.
unsafe impl Send for ListChannel {}

impl NetChannel for ListChannel {
    fn enable(&mut self, _enabled: bool) {}
    fn leave_undone(&mut self, _offloads: Offloads) {}
    fn transmit(&mut self, frames: &[Outgoing]) -> Sent {
        Sent { taken: frames.len(), lost: 0 }
    }
    fn receive(&mut self, most: usize) -> &[Incoming] {
        self.bytes = self.come.lock().unwrap().iter().take(most).cloned().collect();
        // SAFETY: the bytes stay until the next call.
        let incoming = |bytes: &Vec<u8>| unsafe { Incoming::new(NetHeader::DONE, bytes.as_ptr(), bytes.len() as u32) };
        self.handed = self.bytes.iter().map(incoming).collect();
        &self.handed
    }
    fn release(&mut self, count: usize) {
        self.come.lock().unwrap().drain(..count);
    }
    fn wake_fd(&self) -> Option<RawFd> {
        None
    }
    fn arm(&mut self) -> bool {
        self.come.lock().unwrap().is_empty()
    }
}

struct Bed {
    shared: Arc<NetShared>,
    channels: Vec<Box<dyn NetChannel>>,
    inboxes: Arc<[Arc<Inbox>]>,
    come: Vec<Come>,
    number: u32,
}

impl Bed {
    /// Two pairs; flows go to the pair that the lowest bit of their hash says.
    fn new() -> Self {
        const MAC: Octets = [0x52, 0x54, 0, 1, 2, 3];
        let settings = NetSettings {
            mac: MAC,
            mtu: 1500,
            pairs: 2,
            queue_size_max: 256,
            packed: true,
            control: true,
            copy_payload: false,
            rss: true,
            anti_spoofing: None,
            limits: Vec::new(),
        };
        let shared = Arc::new(NetShared::new(settings, NullNet::new().info(), true));
        let mut steering = Steering::new(&shared).unwrap();
        let come: Vec<Come> = (0..2).map(|_| Come::default()).collect();
        let mut channels: Vec<_> = (0..2_u16)
            .map(|pair| {
                let come = Arc::clone(&come[usize::from(pair)]);
                steering.channel(pair, Box::new(ListChannel { come, bytes: Vec::new(), handed: Vec::new() })).unwrap()
            })
            .collect();
        channels.iter_mut().for_each(|channel| channel.enable(true));
        Self { shared, channels, inboxes: Arc::clone(&steering.inboxes), come, number: 0 }
    }

    fn steer(&self, table: &[u16]) {
        let (hashing, pairs) = Hashing::parse_rss(&rss(TYPES, table, 0, 2, &KEY), 2).unwrap();
        self.shared
            .choose(|chosen| {
                (chosen.pairs, chosen.hashing) = (pairs, Some(Arc::new(hashing)));
                Ok::<(), std::convert::Infallible>(())
            })
            .unwrap();
    }

    /// A frame comes by a channel, of a flow whose hash is even or odd. Returns its number.
    fn comes(&mut self, by: usize, bit: u32) -> u32 {
        let hashing = Hashing::parse_rss(&rss(TYPES, &[0], 0, 1, &KEY), 2).unwrap().0;
        let mut frame = (0..).map(udp).find(|frame| hashing.of(frame).value & 1 == bit).unwrap();
        self.number += 1;
        frame.extend(self.number.to_be_bytes());
        self.come[by].lock().unwrap().push_back(frame);
        self.number
    }

    fn takes(&mut self, by: usize) -> Vec<u32> {
        let frames = self.channels[by].receive(32);
        let numbers = frames.iter().map(|frame| u32::from_be_bytes(*frame.bytes().last_chunk().unwrap()));
        let numbers: Vec<u32> = numbers.collect();
        self.channels[by].release(numbers.len());
        numbers
    }

    fn carry(&mut self) {
        for channel in &mut self.channels {
            channel.carry();
        }
    }
}

fn udp(port: u16) -> Vec<u8> {
    let mut frame = Vec::new();
    let builder = etherparse::PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 9);
    builder.udp(port, 7).write(&mut frame, b"").unwrap();
    frame
}

#[test]
fn frames_reach_the_pair_that_the_table_says_in_their_order() {
    let mut bed = Bed::new();
    // Nothing is said yet: each pair has what comes by its channel.
    let first = bed.comes(0, 1);
    bed.carry();
    assert_eq!((bed.takes(0), bed.takes(1)), (vec![first], vec![]));
    bed.steer(&[0, 1]);
    let own = bed.comes(0, 0);
    let for_other = [bed.comes(0, 1), bed.comes(0, 1)];
    let after = bed.comes(0, 0);
    bed.carry();
    assert_eq!((bed.takes(0), bed.takes(1)), (vec![own], vec![]), "what is behind it has to wait for it");
    bed.carry();
    assert_eq!((bed.takes(0), bed.takes(1)), (vec![after], for_other.to_vec()));
    // The other way round, and all to one.
    bed.steer(&[1, 1]);
    let numbers: Vec<u32> = (0..20).map(|number| bed.comes(number % 2, number as u32 & 1)).collect();
    let (even, odd): (Vec<u32>, Vec<u32>) =
        numbers.iter().partition(|number| (**number - numbers[0]).is_multiple_of(2));
    bed.carry();
    assert_eq!(bed.takes(0), Vec::<u32>::new());
    assert_eq!([bed.takes(1), bed.takes(1)].concat(), [even, odd].concat());
}

#[test]
fn a_pair_that_takes_nothing_holds_up_no_other() {
    let mut bed = Bed::new();
    bed.steer(&[0, 1]);
    let own: Vec<u32> = (0..3).map(|_| bed.comes(0, 0)).collect();
    let other = bed.comes(0, 1);
    bed.carry();
    assert_eq!(bed.takes(1), Vec::<u32>::new());
    bed.carry();
    assert_eq!(bed.takes(1), vec![other]);
    let later = bed.comes(0, 0);
    bed.carry();
    assert_eq!([bed.takes(0), bed.takes(0)].concat(), [own, vec![later]].concat(), "in order all the same");
    // One that is closed is sent nothing.
    bed.channels[1].enable(false);
    bed.comes(0, 1);
    bed.carry();
    bed.channels[1].enable(true);
    bed.carry();
    assert_eq!((bed.takes(0), bed.takes(1)), (vec![], vec![]));
    assert_eq!(bed.channels[0].missed(), Missed::NONE);
    assert_eq!(bed.channels[1].missed(), Missed { no_buffers: 1, ..Missed::NONE });
}

#[test]
fn a_sleeper_is_woken_for_its_frames() {
    let mut bed = Bed::new();
    bed.steer(&[0, 1]);
    bed.carry();
    let readable = |channel: &dyn NetChannel| {
        let mut poll = libc::pollfd { fd: channel.wake_fd().unwrap(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one descriptor that the channel has.
        unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
    };
    assert!(bed.channels[1].arm() && bed.channels[1].arm_carrying());
    let number = bed.comes(0, 1);
    assert!(!bed.channels[0].arm_carrying(), "there is something to carry");
    assert!(!readable(bed.channels[1].as_ref()));
    bed.channels[0].carry();
    assert!(readable(bed.channels[1].as_ref()));
    bed.channels[1].woken();
    assert!(!readable(bed.channels[1].as_ref()));
    assert_eq!(bed.takes(1), vec![number]);
    assert!(bed.channels[0].arm_carrying());
}

#[test]
fn without_a_table_frames_that_nobody_takes_keep_nobody_awake() {
    let mut bed = Bed::new();
    bed.comes(0, 0);
    bed.carry();
    // Its pair has no buffers, or no driver: it is not asked for more.
    assert!(bed.channels[0].arm_carrying());
    assert!(!bed.channels[0].arm(), "one that takes frames has something to do");
    bed.steer(&[0, 1]);
    bed.carry();
    assert!(!bed.channels[0].arm_carrying(), "it may be for another");
}

#[test]
fn what_is_being_put_in_comes_before_what_comes_now() {
    let mut bed = Bed::new();
    bed.steer(&[0, 1]);
    bed.carry();
    let inboxes = Arc::clone(&bed.inboxes);
    let frame = udp(1);
    let put = inboxes[0].put(NetHeader::DONE, frame.len() as u32, |room| {
        room.copy_from_slice(&frame);
        bed.comes(0, 0);
        assert!(bed.takes(0).is_empty(), "a frame of this pair may be behind the one that is not complete");
    });
    assert!(put);
    assert_eq!(bed.channels[0].receive(32).len(), 1);
    bed.channels[0].release(1);
    assert_eq!(bed.takes(0), [1]);
}
