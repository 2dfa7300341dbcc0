#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
//! The queues of a network function, driven turn by turn in one thread, with a driver on the other side of its memory.

mod allocations;
mod bad_input;
mod commands;
mod frames;

use std::sync::Mutex;

use super::*;
use crate::backend::net::loopback::LoopbackBackend;
use crate::backend::net::{NetBackend, NetChannel, Offloads};
use crate::device::{FaultReport, QueueFault};
use crate::dma::{CardMemory, DelayedEngine, HostMemory, Mapping, Region};
use crate::driver::net::{CommandQueue, FrameHeader, ReceiveQueue, TransmitQueue};
use crate::driver::{DriverQueue, GuestMemory, QueueOptions};
use crate::link::{QueuePort, QueuePosition};
use crate::virtqueue::features;

const MAC: Octets = [0x52, 0x54, 0, 1, 2, 3];
const ROWS: u32 = 48;

struct SilentPort;

impl QueuePort for SilentPort {
    fn doorbell_fd(&self) -> Option<std::os::fd::RawFd> {
        None
    }
    fn take_doorbell(&mut self) -> bool {
        false
    }
    fn raise_interrupt(&mut self) {}
}

#[derive(Default)]
struct Faults(Mutex<Vec<(u16, QueueFault)>>);

impl FaultReport for Faults {
    fn queue_failed(&self, queue: u16, fault: QueueFault) {
        self.0.lock().unwrap().push((queue, fault));
    }
}

/// What a bed is made of.
#[derive(Clone, Debug)]
struct Shape {
    settings: NetSettings,
    /// Feature bits that the driver accepts if they are offered, beside `VERSION_1`.
    wanted: u64,
    size: u16,
    indirect: bool,
    buffer_bytes: u32,
    frame_bytes: u32,
    /// Copies land late, after delays that follow from the seed.
    late: Option<u64>,
}

impl Shape {
    fn new() -> Self {
        let settings = NetSettings {
            mac: MAC,
            mtu: 9000,
            pairs: 1,
            queue_size_max: 256,
            packed: true,
            control: true,
            copy_payload: false,
            rss: false,
            anti_spoofing: None,
            limits: Vec::new(),
        };
        Self {
            settings,
            wanted: !features::RING_PACKED,
            size: 64,
            indirect: false,
            buffer_bytes: 2048,
            frame_bytes: 9018,
            late: None,
        }
    }

    /// Every combination of ring format, suppression, order, tables, merging, place of payload and speed of copies.
    fn all() -> impl Iterator<Item = Self> {
        (0..128_u32).map(|bits| {
            let switches = [
                features::RING_PACKED,
                features::EVENT_INDEX,
                features::IN_ORDER,
                features::INDIRECT,
                1 << spec::VIRTIO_NET_F_MRG_RXBUF,
            ];
            let mut shape = Self::new();
            for (bit, feature) in switches.into_iter().enumerate() {
                shape.wanted = if bits >> bit & 1 == 1 { shape.wanted | feature } else { shape.wanted & !feature };
            }
            shape.indirect = bits & 8 != 0;
            if bits & 16 == 0 {
                shape.buffer_bytes = 9100;
            }
            shape.settings.copy_payload = bits & 32 != 0;
            shape.late = (bits & 64 != 0).then_some(u64::from(bits));
            shape
        })
    }
}

struct Bed {
    shared: Arc<NetShared>,
    transmit: TransmitQueue,
    receive: ReceiveQueue,
    commands: CommandQueue,
    lanes: Vec<Box<dyn NetLane>>,
    channel: Box<dyn NetChannel>,
    counters: Vec<Arc<crate::metrics::QueueCounters>>,
    faults: Arc<Faults>,
    now: u64,
}

impl Bed {
    fn new(shape: &Shape) -> Self {
        Self::over(shape, &LoopbackBackend::new())
    }

    fn over(shape: &Shape, backend: &dyn NetBackend) -> Self {
        let shared = Arc::new(NetShared::new(shape.settings.clone(), backend.info(), true));
        let accepted = shared.offered_features() & (shape.wanted | features::VERSION_1);
        let options = QueueOptions { size: shape.size, features: accepted, indirect: shape.indirect };
        let memory = Arc::new(GuestMemory::new(0x1_0000, 8 << 20).unwrap());
        let mut receive = ReceiveQueue::new(&memory, options, ROWS, shape.buffer_bytes);
        let mut transmit = TransmitQueue::new(&memory, options, ROWS, shape.frame_bytes);
        let mut commands = CommandQueue::new(&memory, options);
        let mapping = Arc::new(Mapping::new(memory.file(), 0, memory.len()).unwrap());
        let region = Region::new(memory.base(), memory.len(), mapping, 0).unwrap();
        let table = Arc::new(HostMemory::new(vec![region]).unwrap());
        let faults = Arc::new(Faults::default());
        let device = NetDevice(Arc::clone(&shared));
        let counters: Vec<Arc<crate::metrics::QueueCounters>> = (0..3).map(|_| Arc::default()).collect();
        let queues: [&mut DriverQueue; 3] = [receive.queue(), transmit.queue(), commands.queue()];
        let lanes = queues.into_iter().zip(0..).map(|(queue, index)| {
            let at = queue.addresses();
            let start = QueueStart {
                index,
                size: shape.size,
                descriptors: at.descriptors,
                driver: at.driver,
                device: at.device,
                position: QueuePosition::fresh(accepted & features::RING_PACKED != 0),
                features: accepted,
                port: Box::new(SilentPort),
                inflight: None,
                is_resumed: false,
            };
            crate::mirror::check_addresses(&start, &table).unwrap();
            let place = LanePlace {
                memory: Arc::clone(&table),
                reach: Reach::Mapped,
                counters: Arc::clone(&counters[usize::from(index)]),
                report: Arc::clone(&faults) as Arc<dyn FaultReport>,
            };
            match shape.late {
                None => device.lane_over(start, place, CopyEngine::new).unwrap(),
                Some(seed) => {
                    let engine = |card: CardMemory, memory| DelayedEngine::new(card, memory, seed + 1, 0);
                    device.lane_over(start, place, engine).unwrap()
                }
            }
        });
        let lanes = lanes.collect();
        let channel = backend.open_channel().unwrap();
        Self { shared, transmit, receive, commands, lanes, channel, counters, faults, now: 1 }
    }

    /// One turn, as a reactor makes it.
    fn turn(&mut self) {
        self.now += 1000;
        let now = Moment(self.now);
        let [receive, transmit, commands] = &mut self.lanes[..] else { unreachable!("three lanes") };
        receive.turn(now, 32, Some(self.channel.as_mut()));
        transmit.turn(now, 32, Some(self.channel.as_mut()));
        commands.turn(now, 32, None);
        if receive.takes_frames() {
            let taken = receive.deliver(now, self.channel.receive(32));
            self.channel.release(taken);
        }
        for lane in &mut self.lanes {
            lane.finish_turn(now);
        }
    }

    fn publish(&mut self) {
        self.receive.queue().publish();
        self.transmit.queue().publish();
        self.commands.queue().publish();
    }

    /// Turns until `done` gives something.
    #[track_caller]
    fn until<T>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        self.publish();
        for _ in 0..20_000 {
            self.turn();
            if let Some(result) = done(self) {
                return result;
            }
        }
        panic!("no {what}; faults {:?}", self.faults.0.lock().unwrap());
    }

    /// The next frame that the driver is brought.
    #[track_caller]
    fn frame(&mut self) -> (FrameHeader, Vec<u8>) {
        self.until("frame", |bed| bed.receive.take())
    }

    /// Sends a frame, and waits until its row is back.
    #[track_caller]
    fn send(&mut self, frame: &[u8]) {
        assert!(self.transmit.send(FrameHeader::default(), frame, &[]));
        self.until("sent frame", |bed| (bed.transmit.reap() > 0).then_some(()));
    }

    /// Gives a command; returns the answer.
    #[track_caller]
    fn command(&mut self, class: u32, command: u32, data: &[u8]) -> u8 {
        assert!(self.commands.command(class as u8, command as u8, data));
        self.until("answer", |bed| bed.commands.answer())
    }

    fn drops(&self, queue: usize, reason: crate::metrics::DropReason) -> u64 {
        self.counters[queue].net.drops.get(reason)
    }

    fn drops_in_all(&self) -> u64 {
        let all = |drops: &crate::metrics::Drops| {
            crate::metrics::DropReason::ALL.map(|reason| drops.get(reason)).iter().sum::<u64>()
        };
        self.counters.iter().map(|queue| all(&queue.net.drops)).sum()
    }
}

/// A frame of that length to that address, with a pattern of its own behind the addresses.
fn frame_to(destination: Octets, bytes: usize, number: u32) -> Vec<u8> {
    let pattern = (0..bytes as u32).map(|at| (at.wrapping_mul(31) ^ at >> 8 ^ number.wrapping_mul(97)) as u8);
    let mut frame: Vec<u8> = pattern.collect();
    frame[..6].copy_from_slice(&destination);
    frame[6..12].copy_from_slice(&MAC);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

/// What a loop makes of a frame.
fn looped(frame: &[u8]) -> Vec<u8> {
    [&frame[6..12], &frame[..6], &frame[12..]].concat()
}

/// That a lane can be a trait object that moves between threads.
const fn moves<T: Send>() {}
const _: () = moves::<Box<dyn NetLane>>();
