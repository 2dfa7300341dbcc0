#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "plays a storage server that copies payload")]
//! The process dies between any two stores to ring or record, and again while it recovers; the next one starts on the same memory
//! and the same record. Afterwards every request has ended exactly once towards the driver, every read saw what had been written,
//! and the disk holds the last write of each block.
//!
//! Small queues are walked through store by store, larger ones at random from a seed; on both kinds of ring, with copies that land at
//! once and late. Of what the dead process had under way some more may land and some more may reach the disk; then nothing does: that
//! is what a fence is for.

use std::os::fd::RawFd;

use super::super::*;
use super::{CountingPort, Faults};
use crate::backend::{BlockInfo, BlockOperation, BlockRequest, Completion};
use crate::device::blk::BlkSettings;
use crate::dma::mortality::live_for;
use crate::dma::{DelayedEngine, Mapping, Region};
use crate::driver::block::BlockQueue;
use crate::driver::{GuestMemory, QueueOptions};
use crate::inflight::{AreaShape, RecordArea};

pub(super) const BLOCK_BYTES: u32 = 512;
/// Turns after which a lane has done all it can.
const TURNS_MAX: u32 = 5_000;

/// A small generator (xorshift); never 0.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// A disk that outlives the process, with a queue of its own.
pub(super) struct Server {
    disk: Vec<u8>,
    pub(super) pending: Vec<BlockRequest>,
    /// Offsets of all requests, in the order in which they came.
    pub(super) order: Vec<u64>,
    random: Random,
}

impl Server {
    pub(super) fn carry_out(&mut self, request: &BlockRequest) {
        let start = request.offset as usize;
        let range = &mut self.disk[start..start + request.length as usize];
        let mut done = 0;
        for segment in request.segments.as_slice() {
            let part = range[done..].as_mut_ptr();
            let memory = segment.iov_base.cast::<u8>();
            // SAFETY: the segments are the guest's memory, which outlives every lane of a test, or card memory of a lane that
            // lives; both ranges have the length.
            unsafe {
                match request.operation {
                    BlockOperation::Read => std::ptr::copy(part, memory, segment.iov_len),
                    _ => std::ptr::copy(memory, part, segment.iov_len),
                }
            }
            done += segment.iov_len;
        }
    }

    /// The process has died: some of what it had submitted is carried out, the rest never.
    fn outlive(&mut self) {
        while !self.pending.is_empty() && self.random.below(3) > 0 {
            let at = self.random.below(self.pending.len() as u64) as usize;
            let request = self.pending.swap_remove(at);
            self.carry_out(&request);
        }
        self.pending.clear();
    }
}

impl BlockChannel for Server {
    fn submit(&mut self, request: BlockRequest) -> Result<(), BlockRequest> {
        self.order.push(request.offset);
        self.pending.push(request);
        Ok(())
    }

    fn poll(&mut self, _now: Moment, completions: &mut Vec<Completion>) {
        while !self.pending.is_empty() && self.random.below(4) > 0 {
            let at = self.random.below(self.pending.len() as u64) as usize;
            let request = self.pending.swap_remove(at);
            self.carry_out(&request);
            completions.push(Completion { tag: request.tag, result: Ok(()) });
        }
    }

    fn in_flight(&self) -> usize {
        self.pending.len()
    }

    fn wake_fd(&self) -> Option<RawFd> {
        None
    }
}

/// How a life goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mode {
    pub(super) packed: bool,
    /// Chains go through tables, so that each takes one slot.
    pub(super) indirect: bool,
    pub(super) event_index: bool,
    pub(super) in_order: bool,
    pub(super) size: u16,
    /// Requests that the guest makes.
    pub(super) requests: u32,
    pub(super) seed: u64,
    /// Where the ring stands when its record is first attached.
    pub(super) start: u16,
}

/// What outlives a process: the guest with its memory and rings, the disk, the record.
pub(super) struct World {
    pub(super) mode: Mode,
    pub(super) guest: BlockQueue,
    pub(super) memory: Arc<GuestMemory>,
    table: Arc<HostMemory>,
    pub(super) server: Server,
    pub(super) shared: Arc<BlkShared>,
    area: RecordArea,
    faults: Arc<Faults>,
    pub(super) interrupts: Arc<std::sync::atomic::AtomicU32>,
    features: u64,
    /// Of each row: the number that it waits for (a write's own, a read's expected), and whether it is a write.
    pub(super) rows: Vec<Option<(u64, bool)>>,
    /// The number in each row's block.
    blocks: Vec<u64>,
    pub(super) made: u32,
    pub(super) ended: u32,
    pub(super) now: u64,
    pub(super) random: Random,
    /// What the front end knows of where the ring stands: where the queue started first, if its cards died.
    pub(super) position: QueuePosition,
}

impl World {
    pub(super) fn new(mode: Mode) -> Self {
        let rows = u32::from(mode.size);
        let info = BlockInfo {
            size_bytes: u64::from(rows) * u64::from(BLOCK_BYTES),
            block_bytes: BLOCK_BYTES,
            physical_block_bytes: BLOCK_BYTES,
            read_only: false,
            volatile_cache: false,
            discard: false,
            write_zeroes: false,
            discard_alignment_bytes: BLOCK_BYTES,
            payload: PayloadPlace::InPlace,
            channels_max: 1,
        };
        let settings = BlkSettings { queue_size_max: mode.size, ..super::settings() };
        let shared = Arc::new(BlkShared::new(settings, &info));
        let wanted = features::VERSION_1
            | if mode.packed { features::RING_PACKED } else { 0 }
            | if mode.indirect { features::INDIRECT } else { 0 }
            | if mode.event_index { features::EVENT_INDEX } else { 0 }
            | if mode.in_order { features::IN_ORDER } else { 0 };
        let accepted = shared.offered_features() & wanted;
        assert_eq!(accepted, wanted);
        let memory = Arc::new(GuestMemory::new(0x1_0000, 1 << 18).unwrap());
        let options = QueueOptions { size: mode.size, features: accepted, indirect: mode.indirect };
        let guest = BlockQueue::new(&memory, options, rows, BLOCK_BYTES);
        let mapping = Arc::new(Mapping::new(memory.file(), 0, memory.len()).unwrap());
        let region = Region::new(memory.base(), memory.len(), mapping, 0).unwrap();
        let shape = AreaShape { queues: 1, size: mode.size, packed: mode.packed };
        let file = shape.create().unwrap();
        Self {
            mode,
            guest,
            memory,
            table: Arc::new(HostMemory::new(vec![region]).unwrap()),
            server: Server {
                disk: vec![0; info.size_bytes as usize],
                pending: Vec::new(),
                order: Vec::new(),
                random: Random(mode.seed | 1),
            },
            shared,
            area: RecordArea::open(&file, 0, shape.bytes(), shape).unwrap(),
            faults: Arc::default(),
            interrupts: Arc::default(),
            features: accepted,
            rows: vec![None; rows as usize],
            blocks: vec![0; rows as usize],
            made: 0,
            ended: 0,
            now: 1,
            random: Random(mode.seed << 8 | 1),
            position: QueuePosition { next_avail: mode.start, ..QueuePosition::fresh(mode.packed) },
        }
    }

    /// How the queue starts: on the ring as it is, with the record as it is.
    pub(super) fn start(&mut self) -> QueueStart {
        let at = self.guest.queue().addresses();
        QueueStart {
            index: 0,
            size: self.mode.size,
            descriptors: at.descriptors,
            driver: at.driver,
            device: at.device,
            position: self.position,
            features: self.features,
            port: Box::new(CountingPort(Arc::clone(&self.interrupts))),
            inflight: Some(self.area.queue(0, self.mode.packed).unwrap()),
            is_resumed: true,
        }
    }

    /// A process starts.
    pub(super) fn lane<const LATE: bool>(
        &mut self,
        engine: impl FnOnce(crate::dma::CardMemory, Arc<HostMemory>) -> DelayedEngine<LATE>,
    ) -> BlkLane<DelayedEngine<LATE>> {
        let start = self.start();
        let report = Arc::clone(&self.faults) as Arc<dyn FaultReport>;
        let (shared, table) = (Arc::clone(&self.shared), Arc::clone(&self.table));
        BlkLane::new(start, shared, Arc::default(), report, |card| engine(card, table)).unwrap()
    }

    /// The guest takes what has ended, and makes new requests: each row reads or writes the block of its own number.
    pub(super) fn guest(&mut self) {
        while let Some(one) = self.guest.take_ended() {
            let (number, write) = self.rows[one.row as usize].take().expect("a request ended twice");
            assert_eq!(one.status, 0);
            if write {
                self.blocks[one.row as usize] = number;
            } else {
                assert_eq!(self.memory.get::<u64>(self.guest.data_at(one.row)), number, "a read of row {}", one.row);
            }
            self.ended += 1;
        }
        for row in 0..self.rows.len() as u32 {
            if self.made == self.mode.requests {
                break;
            }
            if self.rows[row as usize].is_some() || self.random.below(3) == 0 {
                continue;
            }
            let write = self.random.below(3) > 0;
            let number = if write { u64::from(self.made) + 1 } else { self.blocks[row as usize] };
            let data = self.guest.data_at(row);
            let added = if write {
                self.memory.put(data, number);
                self.guest.write(row, row.into(), BLOCK_BYTES)
            } else {
                self.memory.put(data, u64::MAX);
                self.guest.read(row, row.into(), BLOCK_BYTES)
            };
            if added {
                self.rows[row as usize] = Some((number, write));
                self.made += 1;
            }
        }
        self.guest.publish();
    }

    /// One turn of the reactor.
    pub(super) fn turn<const LATE: bool>(&mut self, lane: &mut BlkLane<DelayedEngine<LATE>>) {
        self.now += 1000;
        let now = Moment(self.now);
        lane.turn(now, crate::mirror::FETCH_MAX, &mut self.server);
        let mut completions = Vec::new();
        self.server.poll(now, &mut completions);
        for Completion { tag, result } in completions {
            lane.complete(now, tag.row, result);
        }
        lane.finish_turn(now);
    }

    pub(super) const fn is_done(&self) -> bool {
        self.ended == self.mode.requests
    }

    /// One life of a process, which ends after so many stores. Returns whether all requests ended before.
    fn live<const LATE: bool>(
        &mut self,
        stores: u64,
        engine: impl FnOnce(crate::dma::CardMemory, Arc<HostMemory>) -> DelayedEngine<LATE>,
    ) -> bool {
        let before = self.interrupts.load(std::sync::atomic::Ordering::Relaxed);
        let mut lane = self.lane(engine);
        let now = self.interrupts.load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(now, before + 1, "the interrupt is raised once, whatever the ring says");
        let lived = live_for(stores, || {
            for _ in 0..TURNS_MAX {
                // The guest is another process; only the card's stores count.
                self.guest();
                if self.is_done() {
                    return;
                }
                self.turn(&mut lane);
            }
            panic!(
                "{} of {} requests ended; faults {:?}",
                self.ended,
                self.mode.requests,
                self.faults.0.lock().unwrap()
            );
        });
        if lived.is_err() {
            // What was under way may still land, up to any point, before the engine is reset.
            let more = self.random.below(5) as usize;
            if more < 4 {
                lane.queue.mirror.engine().land(more);
            }
            self.server.outlive();
        }
        lived.is_ok()
    }

    pub(super) fn check(&mut self) {
        assert!(self.faults.0.lock().unwrap().is_empty(), "{:?}", self.faults.0.lock().unwrap());
        assert!(self.rows.iter().all(Option::is_none));
        assert_eq!((self.ended, self.guest.in_flight()), (self.mode.requests, 0));
        for (row, number) in self.blocks.iter().enumerate() {
            let at = row * BLOCK_BYTES as usize;
            let on_disk = u64::from_ne_bytes(self.server.disk[at..at + 8].try_into().unwrap());
            assert_eq!(on_disk, *number, "the block of row {row}");
        }
    }
}

/// Lives of so many stores each, then one that goes on to the end. Returns how many of them died.
fn lives(mode: Mode, late: bool, stores: &[u64]) -> usize {
    println!("{mode:?}, late: {late}, dies after {stores:?} stores");
    let mut world = World::new(mode);
    let mut died = 0;
    for stores in stores.iter().chain(&[u64::MAX]) {
        let seed = mode.seed + died as u64;
        let done = if late {
            world.live(*stores, |card, memory| DelayedEngine::new(card, memory, seed * 2 + 1, 0))
        } else {
            world.live(*stores, DelayedEngine::prompt)
        };
        if done {
            break;
        }
        died += 1;
    }
    world.check();
    died
}

pub(super) fn modes() -> impl Iterator<Item = (bool, Mode)> {
    (0..16u64).map(|bits| {
        let bit = |number: u64| bits >> number & 1 == 1;
        let mode = Mode {
            packed: bit(0),
            indirect: bit(1),
            event_index: bit(2),
            in_order: false,
            size: 4,
            requests: 6,
            seed: bits + 1,
            start: 0,
        };
        (bit(3), mode)
    })
}

#[test]
fn a_death_at_any_store_loses_nothing_and_ends_nothing_twice() {
    for (late, mode) in modes() {
        let mut stores = 0;
        while lives(mode, late, &[stores]) == 1 {
            stores += 1;
        }
        assert!(stores > 6 * 5, "{mode:?} makes {stores} stores");
    }
}

#[test]
fn a_second_death_at_any_store_of_the_recovery_does_not_either() {
    for (late, mode) in modes().filter(|(_, mode)| mode.event_index) {
        let mode = Mode { requests: 4, ..mode };
        let mut first = 0;
        loop {
            let mut second = 0;
            let died = loop {
                let died = lives(mode, late, &[first, second]);
                if died < 2 {
                    break died;
                }
                second += 1;
            };
            if died == 0 {
                break;
            }
            first += 1;
        }
        assert!(first > 4 * 5, "{mode:?} makes {first} stores");
    }
}

#[test]
fn many_deaths_at_random_stores_of_larger_queues_do_not_either() {
    let rounds = if std::env::var_os("DRAY_TEST_LONG").is_some() { 2000 } else { 40 };
    let mut deaths = 0;
    for round in 0..rounds {
        for (late, mode) in modes() {
            let seed = round * 16 + mode.seed;
            let mode = Mode { size: 64, requests: 400, seed, ..mode };
            let mut random = Random(seed * 77 + 1);
            let stores: Vec<u64> = (0..12).map(|_| random.below(800)).collect();
            deaths += lives(mode, late, &stores);
        }
    }
    assert!(deaths > rounds as usize * 16 * 5, "{deaths} deaths");
}

#[test]
fn requests_in_flight_are_issued_again_in_their_order_before_anything_new() {
    for (_, mode) in modes() {
        let mode = Mode { size: 64, ..mode };
        let mut world = World::new(mode);
        let engine = |card, memory| DelayedEngine::<true>::new(card, memory, mode.seed, 0);
        let mut lane = world.lane(engine);
        // Rows in no order of their own.
        for row in [5, 1, 9, 3] {
            assert!(world.guest.write(row, row.into(), BLOCK_BYTES));
        }
        world.guest.publish();
        for _ in 0..100 {
            world.now += 1000;
            lane.turn(Moment(world.now), 32, &mut world.server);
        }
        let order = [5, 1, 9, 3].map(|row| row * u64::from(BLOCK_BYTES));
        assert_eq!(world.server.order, order);
        drop(lane);
        world.server.pending.clear();
        world.server.order.clear();
        assert!(world.guest.write(0, 0, BLOCK_BYTES));
        world.guest.publish();
        let mut lane = world.lane(engine);
        for _ in 0..100 {
            world.now += 1000;
            lane.turn(Moment(world.now), 2, &mut world.server);
        }
        assert_eq!(world.server.order[..4], order, "as they came");
        assert_eq!(world.server.order[4..], [0], "and then the new one");
    }
}

#[test]
fn requests_in_flight_fail_where_the_volume_says_so_and_are_not_issued_again() {
    for (_, mode) in modes() {
        let mode = Mode { size: 64, ..mode };
        let mut world = World::new(mode);
        let engine = |card, memory| DelayedEngine::<true>::new(card, memory, mode.seed, 0);
        let mut lane = world.lane(engine);
        for row in [5, 1, 9] {
            assert!(world.guest.write(row, row.into(), BLOCK_BYTES));
        }
        world.guest.publish();
        for _ in 0..100 {
            world.now += 1000;
            lane.turn(Moment(world.now), 32, &mut world.server);
        }
        assert_eq!(world.server.order.len(), 3);
        drop(lane);
        world.server.pending.clear();
        world.server.order.clear();
        world.shared = Arc::new(BlkShared { reissue: false, ..Arc::into_inner(world.shared).unwrap() });
        assert!(world.guest.write(0, 0, BLOCK_BYTES));
        world.guest.publish();
        let mut lane = world.lane(engine);
        let mut ended = Vec::new();
        for _ in 0..1000 {
            world.now += 1000;
            lane.turn(Moment(world.now), 2, &mut world.server);
            let mut completions = Vec::new();
            world.server.poll(Moment(world.now), &mut completions);
            for completion in completions {
                lane.complete(Moment(world.now), completion.tag.row, completion.result);
            }
            lane.finish_turn(Moment(world.now));
            while let Some(one) = world.guest.take_ended() {
                ended.push((one.row, one.status));
            }
        }
        ended.sort_unstable();
        // VIRTIO_BLK_S_IOERR for those that were under way, once each.
        assert_eq!(ended, [(0, 0), (1, 1), (5, 1), (9, 1)], "{mode:?}");
        assert_eq!(world.server.order, [0], "nothing but the new one was issued");
        assert!(!lane.queue.mirror.is_resuming());
    }
}
