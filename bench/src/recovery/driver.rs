//! The driver of what is measured: it reads at random, always as many blocks at once, and its memory, rings and record outlive its
//! connections.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use device_svc::driver::block::BlockQueue;
use device_svc::driver::vfio_user::{Sharing, VfioUserDevice};
use device_svc::driver::vhost_user::{FrontEnd, InflightRecord};
use device_svc::driver::{GuestMemory, QueueEvents, QueueOptions};
use device_svc::virtqueue::features;

use crate::blk::Link;

const QUEUE_SIZE: u16 = 256;
const DEPTH: u32 = 32;
const REQUEST_BYTES: u32 = 4096;
/// Bytes of the disk that it reads from.
pub(super) const SPAN_BYTES: u64 = 64 << 20;
/// How long a service may take to come again.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// A driver whose memory, rings and record outlive its connections.
pub(super) struct Driver {
    memory: Arc<GuestMemory>,
    reached: Reached,
    queue: BlockQueue,
    events: QueueEvents,
    seed: u64,
}

/// How it reaches the service.
enum Reached {
    VhostUser(Box<FrontEnd>, InflightRecord),
    /// Held, not used any more: the connection goes on by itself.
    VfioUser {
        _device: Box<VfioUserDevice>,
    },
}

impl Driver {
    /// Connects, with its first requests on the way.
    pub(super) fn connect(socket: &Path, link: Link) -> Result<Self> {
        let memory = Arc::new(GuestMemory::new(0, 4 << 20)?);
        let again = Arc::clone(&memory);
        let block_queue = |features| {
            let options = QueueOptions { size: QUEUE_SIZE, features, indirect: false };
            BlockQueue::new(&memory, options, DEPTH, REQUEST_BYTES)
        };
        let (reached, queue, events) = match link {
            Link::VhostUser => {
                let mut front_end = FrontEnd::connect(socket, features::EVENT_INDEX, again)?;
                let record = front_end.make_record(1, QUEUE_SIZE)?;
                front_end.hand_over_record(&record)?;
                let mut queue = block_queue(front_end.accepted());
                let events = front_end.start_queue(0, QUEUE_SIZE, queue.queue())?;
                (Reached::VhostUser(Box::new(front_end), record), queue, events)
            }
            Link::VfioUser => {
                let mut device = VfioUserDevice::connect(socket, features::EVENT_INDEX, again, Sharing::Whole)?;
                let mut queue = block_queue(device.accepted());
                let events = device.start_queue(0, QUEUE_SIZE, queue.queue())?;
                (Reached::VfioUser { _device: Box::new(device) }, queue, events)
            }
        };
        let mut driver = Self { memory, reached, queue, events, seed: 1 };
        for row in 0..DEPTH {
            driver.read(row);
        }
        driver.publish();
        Ok(driver)
    }

    /// Comes again, as soon as somebody listens.
    pub(super) fn reconnect(&mut self, socket: &Path) -> Result<()> {
        let Reached::VhostUser(front_end, record) = &mut self.reached else { return Ok(()) };
        let start = Instant::now();
        let wanted = front_end.accepted();
        **front_end = loop {
            match FrontEnd::connect(socket, wanted, Arc::clone(&self.memory)) {
                Ok(front_end) => break front_end,
                Err(error) if start.elapsed() > PATIENCE => {
                    return Err(error).context("the service does not come again");
                }
                Err(_) => std::thread::sleep(Duration::from_micros(200)),
            }
        };
        front_end.hand_over_record(record)?;
        self.events = front_end.start_queue(0, QUEUE_SIZE, self.queue.queue())?;
        Ok(())
    }

    fn read(&mut self, row: u32) {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let places = SPAN_BYTES / u64::from(REQUEST_BYTES);
        let sector = (((self.seed >> 32) * places) >> 32) * u64::from(REQUEST_BYTES / 512);
        let added = self.queue.read(row, sector, REQUEST_BYTES);
        assert!(added, "the queue has room for {DEPTH} requests");
    }

    fn publish(&mut self) {
        if self.queue.publish() {
            self.events.ring();
        }
    }

    /// Replaces what has ended by new requests. Returns how many those are.
    pub(super) fn replace_ended(&mut self) -> Result<u32> {
        let mut ended_count = 0;
        while ended_count < DEPTH
            && let Some(ended) = self.queue.take_ended()
        {
            ensure!(ended.status == 0, "a read failed");
            self.read(ended.row);
            ended_count += 1;
        }
        if ended_count > 0 {
            self.publish();
        }
        Ok(ended_count)
    }
}
