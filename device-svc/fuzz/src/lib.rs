//! What the fuzz targets share: bytes taken apart into choices, and a lane of a block function driven turn by turn in one
//! thread, on a little memory that it shares with a guest.

pub mod function;

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use device_svc::address::Iova;
use device_svc::backend::null::{NullBackend, NullSettings};
use device_svc::backend::ram::{RamBackend, RamSettings};
use device_svc::backend::{BlockBackend, BlockChannel, Completion};
use device_svc::clock::Moment;
use device_svc::device::blk::{BlkLane, BlkSettings, BlkShared};
use device_svc::device::{BlockLane, FaultReport, Lane, QueueFault};
use device_svc::dma::{CopyEngine, HostMemory, Mapping, Region};
use device_svc::driver::GuestMemory;
use device_svc::link::{QueuePort, QueuePosition, QueueStart};
use device_svc::mirror::check_addresses;
use device_svc::virtqueue::{QueueAddresses, features};

/// Where the guest's memory starts.
pub const BASE: u64 = 0x1000;
/// Bytes of the guest's memory.
pub const MEMORY_BYTES: u64 = 0x40000;
/// Bytes of the disk.
pub const DISK_BYTES: u64 = 0x10000;
/// The disk's serial.
pub const SERIAL: [u8; 20] = *b"dray-fuzz-serial-123";
/// The largest queue.
pub const QUEUE_SIZE_MAX: u16 = 64;

/// Choices made of bytes; when they are used up, all choices are 0.
#[derive(Clone, Copy, Debug)]
pub struct Choices<'a>(pub &'a [u8]);

impl<'a> Choices<'a> {
    /// Whether there are more.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    /// The next two bytes.
    pub fn short(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// The next eight bytes.
    pub fn long(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// Up to `count` bytes.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, left) = self.0.split_at(count.min(self.0.len()));
        self.0 = left;
        taken
    }
}

/// A guest's memory, all zeroes.
#[must_use]
pub fn memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::new(BASE, MEMORY_BYTES).expect("there is memory"))
}

/// The table of that memory, and one of all but its last quarter; in two regions that touch, so that a buffer may cross.
#[must_use]
pub fn tables(memory: &GuestMemory) -> [Arc<HostMemory>; 2] {
    let mapping = Arc::new(Mapping::new(memory.file(), 0, MEMORY_BYTES).expect("it can be mapped"));
    let first = MEMORY_BYTES / 2;
    [first, first / 2].map(|second| {
        let region = |at: u64, bytes: u64| Region::new(Iova(BASE + at), bytes, Arc::clone(&mapping), at as usize);
        let regions = [region(0, first), region(first, second)].map(|region| region.expect("it lies in the mapping"));
        Arc::new(HostMemory::new(regions).expect("they do not overlap"))
    })
}

/// A port over which nobody is told anything.
pub struct Silent;

impl QueuePort for Silent {
    fn doorbell_fd(&self) -> Option<RawFd> {
        None
    }

    fn take_doorbell(&mut self) -> bool {
        false
    }

    fn raise_interrupt(&mut self) {}
}

/// Counts faults.
#[derive(Default)]
pub struct Faults(AtomicU32);

impl Faults {
    /// How many there were.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

impl FaultReport for Faults {
    fn queue_failed(&self, _queue: u16, fault: QueueFault) {
        // People read it.
        let _ = fault.to_string();
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// What a lane is made of.
#[derive(Clone, Copy, Debug)]
pub struct LaneChoice {
    /// Accepted feature bits, beside VERSION_1.
    pub features: u64,
    /// Entries.
    pub size: u16,
    /// Payload goes through card memory.
    pub copy: bool,
    /// A volume that keeps nothing instead of one in memory.
    pub null: bool,
    /// Where the queue starts, if not on its first lap.
    pub position: Option<QueuePosition>,
}

/// A lane and its channel.
pub struct Bed {
    lane: BlkLane<CopyEngine>,
    channel: Box<dyn BlockChannel>,
    faults: Arc<Faults>,
    now: u64,
}

impl Bed {
    /// A running lane; `None` if its addresses and position are not a queue's.
    #[must_use]
    pub fn new(choice: LaneChoice, at: QueueAddresses, table: &Arc<HostMemory>) -> Option<Self> {
        let backend: Box<dyn BlockBackend> = if choice.null {
            Box::new(NullBackend::new(&NullSettings { size_bytes: DISK_BYTES, read_only: false }).ok()?)
        } else {
            Box::new(RamBackend::new(&RamSettings { size_bytes: DISK_BYTES, read_only: false }).ok()?)
        };
        let settings = BlkSettings {
            queues: 1,
            queue_size_max: QUEUE_SIZE_MAX,
            packed: true,
            segments_max: 126,
            block_bytes: None,
            write_back: true,
            copy_payload: choice.copy,
            read_only: false,
            serial: SERIAL,
            io_timeout: Duration::from_secs(1),
            reissue: true,
            limits: Vec::new(),
        };
        let shared = Arc::new(BlkShared::new(settings, &backend.info()));
        let first_lap = choice.features & features::RING_PACKED != 0;
        let fresh = QueuePosition { avail_wrap: first_lap, used_wrap: first_lap, ..QueuePosition::default() };
        let start = QueueStart {
            index: 0,
            size: choice.size,
            descriptors: at.descriptors,
            driver: at.driver,
            device: at.device,
            position: choice.position.unwrap_or(fresh),
            features: choice.features | features::VERSION_1,
            port: Box::new(Silent),
            inflight: None,
            is_resumed: false,
        };
        check_addresses(&start, table).ok()?;
        let faults = Arc::new(Faults::default());
        let report = Arc::clone(&faults) as Arc<dyn FaultReport>;
        let engine = |card| CopyEngine::new(card, Arc::clone(table));
        let lane = BlkLane::new(start, shared, Arc::default(), report, engine).expect("there is card memory");
        Some(Self { lane, channel: backend.open_channel().ok()?, faults, now: 1 })
    }

    /// One turn of the reactor that it is alone on.
    pub fn turn(&mut self) {
        self.now += 1_000_000;
        let now = Moment(self.now);
        self.lane.turn(now, device_svc::mirror::FETCH_MAX, self.channel.as_mut());
        let mut completions: Vec<Completion> = Vec::new();
        self.channel.poll(now, &mut completions);
        for completion in completions {
            self.lane.complete(now, completion.tag.row, completion.result);
        }
        self.lane.finish_turn(now);
    }

    /// Asks for a doorbell, as before sleep.
    pub fn arm(&mut self) {
        let _ = self.lane.arm();
    }

    /// Changes the table of memory; what is in flight goes on until it can be changed.
    pub fn change_memory(&mut self, table: &Arc<HostMemory>) {
        for _ in 0..100 {
            if self.lane.offer_memory(table) {
                return;
            }
            self.turn();
        }
        panic!("the memory cannot be changed");
    }

    /// Whether the lane has failed.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.faults.0.load(Ordering::Relaxed) > 0
    }

    /// Stops the lane, which must come to an end, and forgets it.
    pub fn end(mut self) {
        self.lane.stop(Moment(self.now));
        let mut turns = 0;
        while !self.lane.is_stopped(Moment(self.now)) {
            turns += 1;
            assert!(turns < 1000, "the lane does not stop");
            self.turn();
        }
        let _ = self.lane.position();
        self.lane.abandon();
        while !self.lane.is_drained() {
            turns += 1;
            assert!(turns < 2000, "the lane does not let go");
            self.turn();
        }
        assert!(self.faults.0.load(Ordering::Relaxed) <= 1, "a fault is reported once");
        // The channel first, as the reactor does it.
        drop(self.channel);
    }
}
