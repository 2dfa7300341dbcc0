#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "plays a storage server that copies payload")]
//! Guest, card and server in one thread, all driven by one seed: delays at every seam, back-pressure, a server that goes away,
//! a queue that stops and goes on, memory tables that are replaced. Every request ends exactly once, every read sees what was
//! written, and at the end the disk is what the guest thinks it is.

use std::os::fd::RawFd;

use super::super::*;
use super::{CountingPort, Faults};
use crate::backend::{BlockInfo, BlockOperation, BlockRequest, Completion};
use crate::device::blk::BlkSettings;
use crate::dma::{CopyEngine, DelayedEngine, DistantEngine, Mapping, Region, half_shared};
use crate::driver::block::{BlockQueue, Range as DriverRange};
use crate::driver::{GuestMemory, QueueOptions};

const BLOCKS: u64 = 64;
const ROWS: u32 = 24;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

/// A storage server: answers late and in any order, refuses, and goes away from time to time.
struct Server {
    disk: Vec<u8>,
    pending: Vec<BlockRequest>,
    random: Random,
    capacity: usize,
    away: bool,
}

impl BlockChannel for Server {
    fn submit(&mut self, request: BlockRequest) -> Result<(), BlockRequest> {
        if self.pending.len() >= self.capacity || self.random.one_in(16) {
            return Err(request);
        }
        self.pending.push(request);
        Ok(())
    }

    fn poll(&mut self, _now: Moment, completions: &mut Vec<Completion>) {
        if self.random.one_in(50) {
            self.away = !self.away;
        }
        while !self.pending.is_empty() && !self.random.one_in(3) {
            let at = self.random.below(self.pending.len() as u64) as usize;
            let request = self.pending.swap_remove(at);
            let result = if self.away { Err(BlockFault::Away) } else { self.carry_out(&request) };
            completions.push(Completion { tag: request.tag, result });
        }
    }

    fn in_flight(&self) -> usize {
        self.pending.len()
    }

    fn wake_fd(&self) -> Option<RawFd> {
        None
    }
}

impl Server {
    fn carry_out(&mut self, request: &BlockRequest) -> Result<(), BlockFault> {
        let start = request.offset as usize;
        let range = &mut self.disk[start..start + request.length as usize];
        match request.operation {
            BlockOperation::Discard | BlockOperation::WriteZeroes { .. } => range.fill(0),
            BlockOperation::Flush => {}
            BlockOperation::Read | BlockOperation::Write => {
                let mut done = 0;
                for segment in request.segments.as_slice() {
                    let part = range[done..done + segment.iov_len].as_mut_ptr();
                    let memory = segment.iov_base.cast::<u8>();
                    // SAFETY: the lane keeps a request's segments valid until its completion; both ranges have the length.
                    unsafe {
                        match request.operation {
                            BlockOperation::Read => std::ptr::copy(part, memory, segment.iov_len),
                            _ => std::ptr::copy(memory, part, segment.iov_len),
                        }
                    }
                    done += segment.iov_len;
                }
                assert_eq!(done as u64, request.length);
            }
        }
        Ok(())
    }
}

/// What the guest waits for in a row.
#[derive(Clone, Debug)]
enum Awaited {
    Read(u64, Vec<u8>),
    Write(u64, u64, u8),
    Flush,
}

/// How the card reaches the guest's memory.
#[derive(Clone, Copy, Debug)]
enum Reached {
    /// At once.
    Now,
    /// Late.
    Late,
    /// Every other page by asking for it.
    Asked,
}

fn run(seed: u64, features_wanted: u64, indirect: bool, copy_payload: bool, reached: Reached, size: u16) {
    let mut random = Random(seed);
    let memory = Arc::new(GuestMemory::new(0x10_0000, 4 << 20).unwrap());
    let disk_bytes = BLOCKS * 512;
    let server = Server {
        disk: vec![0; disk_bytes as usize],
        pending: Vec::new(),
        random: Random(seed ^ 0xabcd),
        capacity: 1 + random.below(20) as usize,
        away: false,
    };
    let info = BlockInfo {
        size_bytes: disk_bytes,
        block_bytes: 512,
        physical_block_bytes: 512,
        read_only: false,
        volatile_cache: true,
        discard: true,
        write_zeroes: true,
        discard_alignment_bytes: 512,
        payload: PayloadPlace::InPlace,
        channels_max: 1,
    };
    let settings = BlkSettings {
        queues: 1,
        queue_size_max: 256,
        packed: true,
        segments_max: 126,
        block_bytes: None,
        write_back: random.one_in(2),
        copy_payload,
        read_only: false,
        serial: [0; 20],
        io_timeout: Duration::from_secs(3600),
        reissue: true,
        limits: Vec::new(),
    };
    let shared = Arc::new(BlkShared::new(settings, &info));
    let accepted = shared.offered_features() & (features_wanted | 0xffff | features::VERSION_1);
    let options = QueueOptions { size, features: accepted, indirect };
    let mut guest = BlockQueue::new(&memory, options, ROWS, 8 * 512);
    let table = |memory: &GuestMemory| {
        let mapping = Arc::new(Mapping::new(memory.file(), 0, memory.len()).unwrap());
        Arc::new(HostMemory::new(vec![Region::new(memory.base(), memory.len(), mapping, 0).unwrap()]).unwrap())
    };
    let at = guest.queue().addresses();
    let first_lap = accepted & features::RING_PACKED != 0;
    let start = QueueStart {
        index: 0,
        size,
        descriptors: at.descriptors,
        driver: at.driver,
        device: at.device,
        position: QueuePosition { avail_wrap: first_lap, used_wrap: first_lap, ..QueuePosition::default() },
        features: accepted,
        port: Box::new(CountingPort::default()),
        inflight: None,
        is_resumed: false,
    };
    let faults = Arc::new(Faults::default());
    let report = Arc::clone(&faults) as Arc<dyn FaultReport>;
    let first = table(&memory);
    let counters = Arc::default();
    match reached {
        Reached::Now => {
            let lane = BlkLane::new(start, shared, counters, report, |card| CopyEngine::new(card, first));
            go(&mut random, &memory, &mut guest, lane.unwrap(), server, &table);
        }
        Reached::Late => {
            let lane = BlkLane::new(start, shared, counters, report, |card| DelayedEngine::new(card, first, seed, 0));
            go(&mut random, &memory, &mut guest, lane.unwrap(), server, &table);
        }
        Reached::Asked => {
            let peer = crate::dma::peer(&memory, seed);
            let half = |memory: &GuestMemory| half_shared(memory, &peer);
            let engine = |card| DistantEngine::new(card, half(&memory), Arc::clone(&peer) as _);
            let lane = BlkLane::new(start, shared, counters, report, engine);
            go(&mut random, &memory, &mut guest, lane.unwrap(), server, &half);
        }
    }
    assert!(faults.0.lock().unwrap().is_empty(), "{:?}", faults.0.lock().unwrap());
}

fn go<E: DmaEngine>(
    random: &mut Random,
    memory: &Arc<GuestMemory>,
    guest: &mut BlockQueue,
    mut lane: BlkLane<E>,
    mut server: Server,
    table: &dyn Fn(&GuestMemory) -> Arc<HostMemory>,
) {
    let mut model = vec![0u8; (BLOCKS * 512) as usize];
    let mut busy_blocks = vec![false; BLOCKS as usize];
    let mut rows: Vec<Option<Awaited>> = vec![None; ROWS as usize];
    let mut stamp = 0u8;
    let (mut issued, mut ended) = (0u32, 0u32);
    let target = 400;
    let mut offered: Option<Arc<HostMemory>> = None;
    let mut stopping = false;
    let mut now = 0u64;
    for step in 0.. {
        assert!(step < 2_000_000, "{ended} of {issued} requests ended");
        now += 10_000_000;
        // The guest.
        if issued < target && random.one_in(2) {
            for _ in 0..=random.below(6) {
                let Some(row) = rows.iter().position(Option::is_none) else { break };
                let block = random.below(BLOCKS);
                let count = 1 + random.below(8.min(BLOCKS - block));
                let range = block as usize..(block + count) as usize;
                // Requests that overlap have no order among themselves, so the guest waits for one before it sends the other.
                if busy_blocks[range.clone()].iter().any(|busy| *busy) {
                    continue;
                }
                let bytes = range.start * 512..range.end * 512;
                let number = row as u32;
                let (added, awaited) = match random.below(8) {
                    0 => (guest.flush(number), Awaited::Flush),
                    1 => {
                        let half = count / 2;
                        let two = [
                            DriverRange { sector: block, sectors: half as u32, flags: 1 },
                            DriverRange { sector: block + half, sectors: (count - half) as u32, flags: 0 },
                        ];
                        (guest.ranges(number, true, &two), Awaited::Write(block, count, 0))
                    }
                    2..=4 => {
                        let expected = model[bytes].to_vec();
                        (guest.read(number, block, count as u32 * 512), Awaited::Read(block, expected))
                    }
                    _ => {
                        stamp = stamp.wrapping_add(1).max(1);
                        memory.copy_in(guest.data_at(number), &vec![stamp; (count * 512) as usize]);
                        (guest.write(number, block, count as u32 * 512), Awaited::Write(block, count, stamp))
                    }
                };
                if added {
                    if !matches!(awaited, Awaited::Flush) {
                        busy_blocks[range].fill(true);
                    }
                    rows[row] = Some(awaited);
                    issued += 1;
                }
            }
            if guest.publish() {
                lane.take_doorbell();
            }
        }
        while let Some(one) = guest.take_ended() {
            let awaited = rows[one.row as usize].take();
            assert_eq!(one.status, 0, "{awaited:?}");
            match awaited {
                None => panic!("row {} ended twice", one.row),
                Some(Awaited::Flush) => {}
                Some(Awaited::Read(block, expected)) => {
                    let mut data = vec![0; expected.len()];
                    memory.copy_out(guest.data_at(one.row), &mut data);
                    let differs = data.iter().zip(&expected).position(|(is, was)| is != was);
                    assert!(
                        differs.is_none(),
                        "read of block {block} differs at byte {differs:?}, after {ended} requests"
                    );
                    busy_blocks[block as usize..block as usize + data.len() / 512].fill(false);
                }
                Some(Awaited::Write(block, count, stamp)) => {
                    let range = block as usize..(block + count) as usize;
                    model[range.start * 512..range.end * 512].fill(stamp);
                    busy_blocks[range].fill(false);
                }
            }
            ended += 1;
        }
        if issued >= target && ended == issued {
            break;
        }
        // The card's control thread.
        if offered.is_none() && random.one_in(200) {
            offered = Some(table(memory));
        }
        if let Some(memory) = &offered
            && lane.offer_memory(memory)
        {
            offered = None;
        }
        if !stopping && random.one_in(300) {
            lane.stop(Moment(now));
            stopping = true;
        }
        // The reactor.
        let moment = Moment(now);
        lane.turn(moment, 1 + random.below(32) as u16, &mut server);
        let mut completions = Vec::with_capacity(64);
        server.poll(moment, &mut completions);
        for Completion { tag, result } in completions {
            lane.complete(moment, tag.row, result);
        }
        lane.finish_turn(moment);
        if random.one_in(20) {
            let _ = lane.arm();
        }
        if stopping && lane.is_stopped(moment) {
            let at = guest.queue().addresses();
            lane.resume(QueueStart {
                index: 0,
                size: 0,
                descriptors: at.descriptors,
                driver: at.driver,
                device: at.device,
                position: lane.position(),
                features: 0,
                port: Box::new(CountingPort::default()),
                inflight: None,
                is_resumed: false,
            });
            stopping = false;
        }
    }
    assert!(server.disk == model, "the disk is what the guest thinks it is");
    assert_eq!(server.in_flight(), 0);
}

#[test]
fn every_request_ends_once_and_no_byte_is_lost() {
    let rounds = if std::env::var_os("DRAY_TEST_LONG").is_some() { 200 } else { 4 };
    for seed in 0..rounds {
        for mode in 0..64u64 {
            let bit = |bit: u64| mode >> bit & 1 == 1;
            let wanted = if bit(0) { features::RING_PACKED } else { 0 }
                | if bit(1) { features::EVENT_INDEX } else { 0 }
                | if bit(2) { features::IN_ORDER } else { 0 }
                | features::INDIRECT;
            let size = if bit(5) { 16 } else { 128 };
            println!("seed {seed}, mode {mode:06b}");
            let reached = [Reached::Late, Reached::Now, Reached::Asked][seed as usize % 3];
            run(seed * 64 + mode, wanted, bit(3), bit(4), reached, size);
        }
    }
}
