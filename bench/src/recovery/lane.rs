//! One lane of a block function on the null backend with its driver, in one thread and without a clock, so that two runs take the same
//! instructions: what `bench recovery` runs under callgrind, with the record of requests in flight and without.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use device_svc::backend::BlockBackend;
use device_svc::backend::null::{NullBackend, NullSettings};
use device_svc::clock::Moment;
use device_svc::device::blk::{BlkDevice, BlkSettings, BlkShared};
use device_svc::device::{AnyLane, Device, FaultReport, LanePlace, QueueFault};
use device_svc::dma::{HostMemory, Mapping, Region};
use device_svc::driver::block::BlockQueue;
use device_svc::driver::{GuestMemory, QueueOptions};
use device_svc::inflight::{AreaShape, RecordArea};
use device_svc::link::{QueuePort, QueuePosition, QueueStart};
use device_svc::mirror::{FETCH_MAX, check_addresses};
use device_svc::virtqueue::features;

use super::record::DEPTH;
use crate::load::REQUEST_BYTES;

const QUEUE_SIZE: u16 = 256;
const SPAN_BYTES: u64 = 1 << 30;

/// What is run.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Lane {
    /// The ring is packed
    #[arg(long)]
    pub(super) packed: bool,
    /// Requests lie in tables
    #[arg(long)]
    pub(super) indirect: bool,
    /// There is a record
    #[arg(long)]
    pub(super) recorded: bool,
    /// How many requests
    #[arg(long)]
    pub(super) requests: u64,
}

/// A driver that polls: it is told nothing, and rings nothing.
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

struct Faults;

impl FaultReport for Faults {
    fn queue_failed(&self, _queue: u16, fault: QueueFault) {
        eprintln!("bench: {fault}");
    }
}

fn settings() -> BlkSettings {
    BlkSettings {
        queues: 1,
        queue_size_max: QUEUE_SIZE,
        packed: true,
        segments_max: 126,
        block_bytes: None,
        write_back: true,
        copy_payload: false,
        read_only: false,
        serial: [b'0'; 20],
        io_timeout: Duration::from_secs(1),
        reissue: true,
        limits: Vec::new(),
    }
}

/// Keeps the queue at its depth until so many requests have ended.
pub(crate) fn run(what: Lane) -> Result<()> {
    let backend = NullBackend::new(&NullSettings { size_bytes: SPAN_BYTES, read_only: false })?;
    let shared = Arc::new(BlkShared::new(settings(), &backend.info()));
    let memory = Arc::new(GuestMemory::new(0x1_0000, 4 << 20)?);
    let ring = if what.packed { features::RING_PACKED } else { 0 };
    let accepted = features::VERSION_1 | features::EVENT_INDEX | features::INDIRECT | ring;
    let options = QueueOptions { size: QUEUE_SIZE, features: accepted, indirect: what.indirect };
    let mut queue = BlockQueue::new(&memory, options, DEPTH, REQUEST_BYTES);
    queue.queue().want_interrupts(false);
    let mapping = Arc::new(Mapping::new(memory.file(), 0, memory.len())?);
    let table = Arc::new(HostMemory::new([Region::new(memory.base(), memory.len(), mapping, 0)?])?);
    let shape = AreaShape { queues: 1, size: QUEUE_SIZE, packed: what.packed };
    let inflight = if what.recorded {
        Some(RecordArea::open(&shape.create()?, 0, shape.bytes(), shape)?.queue(0, what.packed)?)
    } else {
        None
    };
    let at = queue.queue().addresses();
    let start = QueueStart {
        index: 0,
        size: QUEUE_SIZE,
        descriptors: at.descriptors,
        driver: at.driver,
        device: at.device,
        position: QueuePosition::fresh(what.packed),
        features: accepted,
        port: Box::new(SilentPort),
        inflight,
        is_resumed: false,
    };
    let reach = check_addresses(&start, &table).map_err(anyhow::Error::msg)?;
    let place = LanePlace { memory: table, reach, counters: Arc::default(), report: Arc::new(Faults) };
    let AnyLane::Block(mut lane) = BlkDevice(shared).lane(start, place)? else { bail!("a block function's lane") };
    let mut channel = backend.open_channel()?;
    let mut completions = Vec::with_capacity(DEPTH as usize);
    for row in 0..DEPTH {
        queue.read(row, 0, REQUEST_BYTES);
    }
    queue.publish();
    let (mut now, mut ended_count) = (1, 0);
    while ended_count < what.requests {
        now += 1000;
        lane.turn(Moment(now), FETCH_MAX, channel.as_mut());
        channel.poll(Moment(now), &mut completions);
        for completion in completions.drain(..) {
            lane.complete(Moment(now), completion.tag.row, completion.result);
        }
        lane.finish_turn(Moment(now));
        let before = ended_count;
        while let Some(ended) = queue.take_ended() {
            ensure!(ended.status == 0, "a read failed");
            ended_count += 1;
            queue.read(ended.row, ended_count % 1000 * 8, REQUEST_BYTES);
        }
        // The first turn takes the record up.
        ensure!(ended_count > before || now < 10_000, "nothing ends");
        queue.publish();
    }
    Ok(())
}
