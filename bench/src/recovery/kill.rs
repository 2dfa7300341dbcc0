//! From SIGKILL to the first request that completes: what a VM waits when the service dies under load.
//!
//! The moment that is measured begins before the signal is sent, and ends when the driver sees a used entry of the new process. What
//! the dead one had completed is taken off first.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use device_svc::driver::block::BlockQueue;
use device_svc::driver::vfio_user::{Sharing, VfioUserDevice};
use device_svc::driver::vhost_user::{FrontEnd, InflightRecord};
use device_svc::driver::{GuestMemory, QueueEvents, QueueOptions};
use device_svc::virtqueue::features;

use super::Run;
use crate::blk::Link;
use crate::peers::{DrayOptions, Server, dray};
use crate::points::Values;
use crate::report::{Goal, Row, Unit};

const QUEUE_SIZE: u16 = 256;
const DEPTH: u32 = 32;
const REQUEST_BYTES: u32 = 4096;
const SPAN_BYTES: u64 = 64 << 20;
/// How long the load runs before each kill.
const LOAD: Duration = Duration::from_millis(30);
/// How long a service may take to come again.
const PATIENCE: Duration = Duration::from_secs(20);
/// What the worst should stay below, ms.
const WORST_MS: f64 = 100.0;

/// How a driver comes through the death of its service: what waits for it, ms, each time that it is killed.
type Survive = fn(&Run, &mut Server, &mut Driver) -> Result<()>;

/// Ways to come through, each with the link that its function has, and whether there is a keeper.
const WAYS: [(&str, Link, bool, Survive); 2] = [
    ("vhost-user, the driver connects again", Link::VhostUser, false, reconnecting),
    ("vfio-user, the keeper has the connection", Link::VfioUser, true, kept),
];

/// Measures all ways.
pub(super) fn measure(run: &mut Run) -> Result<()> {
    for (number, (name, link, keeper, survive)) in WAYS.into_iter().enumerate() {
        run.say(&format!("SIGKILL to the first completion, {name}"));
        let disk = run.folder.path().join(format!("disk{number}"));
        let backend = format!("{{ type = \"file\", path = \"{}\", create = \"64M\" }}", disk.display());
        let options = DrayOptions { link, poll: "adaptive", payload: "in-place", backends: vec![backend], keeper };
        let mut server = dray(run.cpus, run.folder.path(), &format!("kill{number}"), &options)?;
        server.wake();
        let waits = Values(waits(run, &mut server, link, survive)?);
        let worst = Values(vec![waits.most()]);
        let row = |what: &str, values, goal| Row {
            name: format!("SIGKILL to the first completion, {name}{what}"),
            values,
            unit: Unit::Milliseconds,
            beside: None,
            goal,
        };
        run.rows.push(row(", median", waits, None));
        run.rows.push(row(", worst", worst, Some(Goal::AtMost(WORST_MS))));
    }
    Ok(())
}

/// A driver whose memory, rings and record outlive its connections.
struct Driver {
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
    fn connect(socket: &Path, link: Link) -> Result<Self> {
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
        Ok(Self { memory, reached, queue, events, seed: 1 })
    }

    /// Comes again, as soon as somebody listens.
    fn reconnect(&mut self, socket: &Path) -> Result<()> {
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
    fn replace_ended(&mut self) -> Result<u32> {
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

/// The service is started again at once, and the driver connects again and hands its record back.
fn reconnecting(run: &Run, server: &mut Server, driver: &mut Driver) -> Result<()> {
    server.kill_and_start(run.cpus)?;
    while driver.replace_ended()? > 0 {}
    driver.reconnect(&server.socket(0))
}

/// The keeper starts the service again, and the driver notices nothing but a pause.
fn kept(_run: &Run, server: &mut Server, driver: &mut Driver) -> Result<()> {
    server.kill_service()?;
    // What the dead one had completed: nothing of the next one can come as soon as this.
    while driver.replace_ended()? > 0 {}
    Ok(())
}

/// Kills the service again and again, under load. Returns what the driver waits for its next completion each time, ms.
fn waits(run: &Run, server: &mut Server, link: Link, survive: Survive) -> Result<Vec<f64>> {
    let mut driver = Driver::connect(&server.socket(0), link)?;
    for row in 0..DEPTH {
        driver.read(row);
    }
    driver.publish();
    let mut waits_ms = Vec::new();
    for _ in 0..run.kills {
        let (load, mut replaced) = (Instant::now(), 0);
        while load.elapsed() < LOAD {
            replaced += driver.replace_ended()?;
        }
        ensure!(replaced > 0, "nothing completes before the kill");
        let start = Instant::now();
        survive(run, server, &mut driver)?;
        while driver.replace_ended()? == 0 {
            ensure!(start.elapsed() < PATIENCE, "nothing completes after the kill");
            std::hint::spin_loop();
        }
        waits_ms.push(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(waits_ms)
}
