#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
//! One lane, driven turn by turn in one thread, with a guest on the other side of its memory.

mod allocations;
mod death;
mod simulation;
mod stop;

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::address::Iova;
use crate::backend::ram::{RamBackend, RamSettings};
use crate::backend::{BlockBackend, Completion};
use crate::device::blk::BlkSettings;
use crate::dma::{CopyEngine, Region};
use crate::driver::block::{BlockQueue, Ended, Range as DriverRange};
use crate::driver::{GuestMemory, QueueOptions};
use crate::link::QueuePort;

const VOLUME_BYTES: u64 = 1 << 20;
const DATA_BYTES: u32 = 8192;

/// A port without descriptors that counts interrupts.
#[derive(Default)]
pub(super) struct CountingPort(Arc<AtomicU32>);

impl QueuePort for CountingPort {
    fn doorbell_fd(&self) -> Option<RawFd> {
        None
    }
    fn take_doorbell(&mut self) -> bool {
        true
    }
    fn raise_interrupt(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[derive(Default)]
pub(super) struct Faults(pub(super) std::sync::Mutex<Vec<QueueFault>>);

impl FaultReport for Faults {
    fn queue_failed(&self, _queue: u16, fault: QueueFault) {
        self.0.lock().unwrap().push(fault);
    }
}

struct Bed {
    guest: BlockQueue,
    memory: Arc<GuestMemory>,
    lane: BlkLane<CopyEngine>,
    channel: Box<dyn BlockChannel>,
    faults: Arc<Faults>,
    interrupts: Arc<AtomicU32>,
    now: u64,
}

fn settings() -> BlkSettings {
    BlkSettings {
        queues: 1,
        queue_size_max: 1024,
        packed: true,
        segments_max: 126,
        block_bytes: None,
        write_back: true,
        copy_payload: false,
        read_only: false,
        serial: *b"dray-test-serial-123",
        io_timeout: Duration::from_secs(1),
        reissue: true,
        limits: Vec::new(),
    }
}

impl Bed {
    fn new(settings: BlkSettings, wanted: u64, size: u16, indirect: bool) -> Self {
        let backend = RamBackend::new(&RamSettings { size_bytes: VOLUME_BYTES, read_only: false }).unwrap();
        let shared = Arc::new(BlkShared::new(settings, &backend.info()));
        Self::over(shared, backend.open_channel().unwrap(), wanted, size, indirect)
    }

    fn over(shared: Arc<BlkShared>, channel: Box<dyn BlockChannel>, wanted: u64, size: u16, indirect: bool) -> Self {
        let memory = Arc::new(GuestMemory::new(0x1_0000, 8 << 20).unwrap());
        let accepted = shared.offered_features() & (wanted | features::VERSION_1);
        let options = QueueOptions { size, features: accepted, indirect };
        let mut guest = BlockQueue::new(&memory, options, 64, DATA_BYTES);
        let at = guest.queue().addresses();
        let mapping = Arc::new(crate::dma::Mapping::new(memory.file(), 0, memory.len()).unwrap());
        let region = Region::new(memory.base(), memory.len(), mapping, 0).unwrap();
        let table = Arc::new(HostMemory::new(vec![region]).unwrap());
        let first_lap = accepted & features::RING_PACKED != 0;
        let interrupts = Arc::new(AtomicU32::new(0));
        let start = QueueStart {
            index: 0,
            size,
            descriptors: at.descriptors,
            driver: at.driver,
            device: at.device,
            position: QueuePosition { avail_wrap: first_lap, used_wrap: first_lap, ..QueuePosition::default() },
            features: accepted,
            port: Box::new(CountingPort(Arc::clone(&interrupts))),
            inflight: None,
            is_resumed: false,
        };
        crate::mirror::check_addresses(&start, &table).unwrap();
        let faults = Arc::new(Faults::default());
        let report = Arc::clone(&faults) as Arc<dyn FaultReport>;
        let lane = BlkLane::new(start, shared, Arc::default(), report, |card| CopyEngine::new(card, table)).unwrap();
        Self { guest, memory, lane, channel, faults, interrupts, now: 1 }
    }

    fn turn(&mut self) {
        self.now += 1000;
        let now = Moment(self.now);
        self.lane.turn(now, crate::mirror::FETCH_MAX, self.channel.as_mut());
        let mut completions: Vec<Completion> = Vec::with_capacity(1024);
        self.channel.poll(now, &mut completions);
        for completion in completions {
            self.lane.complete(now, completion.tag.row, completion.result);
        }
        self.lane.finish_turn(now);
    }

    /// Publishes what was added, turns until `count` requests have ended, and returns them.
    fn end(&mut self, count: usize) -> Vec<Ended> {
        self.guest.publish();
        let mut ended = Vec::new();
        for _ in 0..1000 {
            self.turn();
            while let Some(one) = self.guest.take_ended() {
                ended.push(one);
            }
            if ended.len() >= count {
                return ended;
            }
        }
        panic!("{} of {count} requests ended; faults {:?}", ended.len(), self.faults.0.lock().unwrap());
    }

    fn fill(&self, row: u32, byte: u8, bytes: u32) {
        self.memory.copy_in(self.guest.data_at(row), &vec![byte; bytes as usize]);
    }

    fn data(&self, row: u32, bytes: u32) -> Vec<u8> {
        let mut data = vec![0; bytes as usize];
        self.memory.copy_out(self.guest.data_at(row), &mut data);
        data
    }
}

/// All combinations of ring format, suppression, order, tables and payload place.
fn beds() -> impl Iterator<Item = Bed> {
    (0..32u32).map(|bits| {
        let wanted = [features::RING_PACKED, features::EVENT_INDEX, features::IN_ORDER, features::INDIRECT]
            .iter()
            .enumerate()
            .filter(|(bit, _)| bits >> bit & 1 == 1)
            .fold(!0 << 40, |all, (_, feature)| all | feature)
            | 0xffff;
        let settings = BlkSettings { copy_payload: bits & 16 != 0, ..settings() };
        Bed::new(settings, wanted, 64, bits & 8 != 0)
    })
}

#[test]
fn what_is_written_is_read_back_in_every_mode() {
    for mut bed in beds() {
        // More requests than the ring has entries, so that it wraps.
        for round in 0..40u32 {
            let count = 1 + round % 16;
            for row in 0..count {
                bed.fill(row, (round * 16 + row) as u8, DATA_BYTES);
                assert!(bed.guest.write(row, u64::from(row) * 16, DATA_BYTES));
            }
            for ended in bed.end(count as usize) {
                assert_eq!((ended.status, ended.written), (0, 1));
            }
            for row in 0..count {
                bed.fill(row, 0xee, DATA_BYTES);
                assert!(bed.guest.read(row, u64::from(row) * 16, DATA_BYTES));
            }
            for ended in bed.end(count as usize) {
                assert_eq!((ended.status, ended.written), (0, DATA_BYTES + 1));
                let expected = (round * 16 + ended.row) as u8;
                assert!(bed.data(ended.row, DATA_BYTES).iter().all(|byte| *byte == expected));
            }
        }
        assert!(bed.interrupts.load(Ordering::Relaxed) > 0);
        assert!(bed.faults.0.lock().unwrap().is_empty());
        assert_eq!(bed.lane.rows.in_use(), 0, "every row is free again");
    }
}

#[test]
fn the_other_requests_do_what_the_specification_says() {
    for mut bed in beds() {
        bed.fill(0, 7, DATA_BYTES);
        bed.guest.write(0, 0, DATA_BYTES);
        bed.end(1);
        bed.guest.flush(0);
        assert_eq!(bed.end(1)[0].status, 0);
        bed.guest.get_id(1);
        assert_eq!(bed.end(1)[0], Ended { row: 1, status: 0, written: 21 });
        assert_eq!(bed.data(1, 20), b"dray-test-serial-123");
        let two = [DriverRange { sector: 0, sectors: 1, flags: 0 }, DriverRange { sector: 8, sectors: 2, flags: 1 }];
        bed.guest.ranges(0, true, &two);
        assert_eq!(bed.end(1)[0].status, 0);
        bed.guest.read(0, 0, DATA_BYTES);
        bed.end(1);
        let data = bed.data(0, DATA_BYTES);
        for (sector, expected) in [(0, 0), (1, 7), (7, 7), (8, 0), (9, 0), (10, 7)] {
            assert!(data[sector * 512..(sector + 1) * 512].iter().all(|byte| *byte == expected), "sector {sector}");
        }
        bed.guest.ranges(0, false, &two[..1]);
        assert_eq!(bed.end(1)[0].status, 0);
    }
}

#[test]
fn what_cannot_be_done_is_refused_with_a_status() {
    let io_error = 1;
    let unsupported = 2;
    for mut bed in beds() {
        let end = VOLUME_BYTES / 512;
        let cases = [
            (0, end, Some((512, true)), io_error),
            (0, u64::MAX, Some((512, true)), io_error),
            (1, end - 1, Some((1024, false)), io_error),
            (0, 0, Some((511, true)), io_error),
            (0, 0, None, io_error),
            (1, 0, Some((512, true)), io_error),
            (8, 0, Some((19, true)), io_error),
            (99, 0, None, unsupported),
            (11, 0, Some((17, false)), io_error),
        ];
        for (kind, sector, data, status) in cases {
            bed.guest.raw(0, kind, sector, data);
            assert_eq!(bed.end(1)[0].status, status, "kind {kind} at {sector} with {data:?}");
        }
        let bad = |sector, sectors, flags| [DriverRange { sector, sectors, flags }];
        for (zero, range, status) in [
            (true, bad(0, 1, 2), unsupported),
            (false, bad(0, 1, 1), unsupported),
            (true, bad(end, 1, 0), io_error),
            (true, bad(u64::MAX, u32::MAX, 0), io_error),
        ] {
            bed.guest.ranges(0, zero, &range);
            assert_eq!(bed.end(1)[0].status, status, "{range:?}");
        }
        assert!(bed.faults.0.lock().unwrap().is_empty(), "a refused request is not a fault of the ring");
    }
}

#[test]
fn a_buffer_outside_memory_stops_the_queue_and_says_so_once() {
    for mut bed in beds() {
        let outside = crate::driver::Buffer { address: Iova(1 << 60), length: 512, writable: true };
        let line = bed.guest.data_at(63);
        bed.memory.put(line, [0u8; 16]);
        let header = crate::driver::Buffer { address: line, length: 16, writable: false };
        let status = crate::driver::Buffer { address: Iova(line.0 + 32), length: 1, writable: true };
        bed.guest.queue().add(&[header, outside, status], 63);
        bed.guest.publish();
        for _ in 0..50 {
            bed.turn();
        }
        let faults = bed.faults.0.lock().unwrap().clone();
        // Payload in place and copied payload find it at different moments; ram copies late.
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert!(matches!(faults[0], QueueFault::Unmapped(_)), "{faults:?}");
    }
}

#[test]
fn a_queue_goes_on_where_it_stopped() {
    for mut bed in beds() {
        bed.guest.write(0, 0, 512);
        bed.end(1);
        bed.lane.stop(Moment(bed.now));
        assert!(bed.lane.is_stopped(Moment(bed.now)));
        bed.guest.write(0, 0, 512);
        bed.guest.publish();
        for _ in 0..10 {
            bed.turn();
        }
        assert_eq!(bed.guest.take_ended(), None, "a stopped queue fetches nothing");
        assert!(!bed.lane.has_parked());
    }
}

#[test]
fn reads_cost_as_few_copies_as_promised() {
    for (indirect, most) in [(false, 3.5), (true, 4.5)] {
        let wanted = if indirect { features::INDIRECT } else { 0 } | features::EVENT_INDEX;
        let mut bed = Bed::new(BlkSettings { copy_payload: true, ..settings() }, wanted, 256, indirect);
        let before = bed.lane.queue.mirror.engine_ref().counters();
        let requests = 32 * 200;
        for _ in 0..200 {
            for row in 0..32 {
                bed.guest.read(row, u64::from(row) * 8, 4096);
            }
            bed.end(32);
        }
        let after = bed.lane.queue.mirror.engine_ref().counters();
        let each = (after.transactions() - before.transactions()) as f64 / f64::from(requests);
        assert!(each <= most, "{each} copies per read, indirect: {indirect}");
    }
}

#[test]
fn lost_memory_is_noticed_before_the_lane_sleeps_and_named_as_what_it_is() {
    crate::dma::install_bus_fault_guard().unwrap();
    for (wanted, used_before) in [(0, false), (0, true), (features::RING_PACKED, false), (features::RING_PACKED, true)]
    {
        let mut bed = Bed::new(settings(), wanted, 16, false);
        if used_before {
            assert!(bed.guest.get_id(0));
            bed.end(1);
        }
        bed.memory.file().set_len(0).unwrap();
        bed.turn();
        // Either found at once, or the lane must not go to sleep over it.
        if bed.faults.0.lock().unwrap().is_empty() {
            assert_eq!(bed.lane.arm(), Some(false), "{wanted:#x}, used before: {used_before}");
            bed.turn();
        }
        bed.turn();
        assert_eq!(*bed.faults.0.lock().unwrap(), [QueueFault::MemoryLost], "{wanted:#x}, used before: {used_before}");
    }
}

#[test]
fn get_id_writes_no_buffer_that_the_driver_made_readable() {
    let mut bed = Bed::new(settings(), 0, 16, false);
    let (line, readable, writable) = (bed.memory.take(32, 16), bed.memory.take(64, 16), bed.memory.take(64, 16));
    bed.memory.put(line, 8u32);
    bed.memory.put(Iova(line.0 + 16), 255u8);
    bed.memory.copy_in(readable, &[7; 64]);
    let buffer = |address, length, writable| crate::driver::Buffer { address, length, writable };
    let status = Iova(line.0 + 16);
    let chain =
        [buffer(line, 16, false), buffer(readable, 64, false), buffer(writable, 20, true), buffer(status, 1, true)];
    assert!(bed.guest.queue().add(&chain, 0));
    bed.guest.publish();
    bed.turn();
    assert_eq!(bed.memory.get::<u8>(status), 1, "refused");
    let mut kept = [0; 64];
    bed.memory.copy_out(readable, &mut kept);
    assert_eq!(kept, [7; 64]);
}
