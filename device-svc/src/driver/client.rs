//! A client of a block device without a VM: a front end with one queue, and a load that keeps it full.
//!
//! The load is a closed loop: each request that ends is replaced at once, and a whole batch is published together, as a guest
//! under load does it. It makes no system call while the device keeps up and does not ask for its doorbell.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserFrontend;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::block::{BlockQueue, Ended};
use super::latency::Latencies;
use super::vfio_user::{Sharing, VfioUserDevice};
use super::vhost_user::FrontEnd;
use super::{DriverQueue, FrontEndError, GuestMemory, QueueEvents, QueueOptions};
use crate::virtqueue::features;

/// How often an empty ring is looked at before the client goes to sleep, where it may spin: about 50 µs.
const SPINS: u32 = 5_000;

/// Requests taken before what replaces them is published.
const BATCH: u32 = 32;

/// How long a device may stay silent.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// How a client reaches the device.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Through {
    /// vhost-user.
    #[default]
    VhostUser,
    /// vfio-user; it shares its memory so.
    VfioUser(Sharing),
}

/// How a client uses the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClientSettings {
    /// How it reaches the device.
    pub through: Through,
    /// Feature bits it accepts beside VERSION_1.
    pub features: u64,
    /// Entries of its queue.
    pub queue_size: u16,
    /// Whether chains go through indirect tables.
    pub indirect: bool,
    /// Requests in flight at most.
    pub depth: u32,
    /// Bytes of each request's buffer.
    pub request_bytes: u32,
    /// Whether it may keep a CPU busy while it waits; where the device has no other CPU it must not.
    pub spin: bool,
}

impl Default for ClientSettings {
    /// Event index and indirect descriptors offered, chains direct; 4 KiB at depth 1.
    fn default() -> Self {
        Self {
            through: Through::VhostUser,
            features: features::EVENT_INDEX | features::INDIRECT,
            queue_size: 256,
            indirect: false,
            depth: 1,
            request_bytes: 4096,
            spin: true,
        }
    }
}

/// What the requests of a load are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Random reads.
    Read,
    /// Random writes.
    Write,
}

/// A load's shape.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Load {
    /// Reads or writes.
    pub access: Access,
    /// How much of the disk's beginning is accessed, bytes; at least one request's.
    pub span_bytes: u64,
    /// How long.
    pub duration: Duration,
    /// Whether each request is timed, which costs a look at the clock for each batch.
    pub timed: bool,
}

/// What a load did.
#[derive(Clone, Debug)]
pub struct Done {
    /// Requests that ended.
    pub requests: u64,
    /// How many of them ended badly.
    pub errors: u64,
    /// From the first to the last, s.
    pub seconds: f64,
    /// How long each took, if they were timed.
    pub latencies: Latencies,
}

impl Done {
    /// Requests per second.
    #[must_use]
    pub fn iops(&self) -> f64 {
        self.requests as f64 / self.seconds
    }
}

/// A front end of either kind.
pub enum Attached {
    /// Over vhost-user.
    VhostUser(Box<FrontEnd>),
    /// Over vfio-user.
    VfioUser(Box<VfioUserDevice>),
}

impl Attached {
    fn connect(socket: &Path, settings: &ClientSettings, memory: Arc<GuestMemory>) -> Result<Self, FrontEndError> {
        Ok(match settings.through {
            Through::VhostUser => Self::VhostUser(Box::new(FrontEnd::connect(socket, settings.features, memory)?)),
            Through::VfioUser(sharing) => {
                Self::VfioUser(Box::new(VfioUserDevice::connect(socket, settings.features, memory, sharing)?))
            }
        })
    }

    const fn accepted(&self) -> u64 {
        match self {
            Self::VhostUser(front_end) => front_end.accepted(),
            Self::VfioUser(device) => device.accepted(),
        }
    }

    fn start_queue(&mut self, size: u16, queue: &DriverQueue) -> Result<QueueEvents, FrontEndError> {
        match self {
            Self::VhostUser(front_end) => front_end.start_queue(0, size, queue),
            Self::VfioUser(device) => device.start_queue(0, size, queue),
        }
    }

    fn stop(&mut self) -> Result<(), FrontEndError> {
        match self {
            Self::VhostUser(front_end) => front_end.stop_queue(0).map(drop),
            Self::VfioUser(device) => device.reset(),
        }
    }

    /// The disk's size, bytes (virtio 1.3, 5.2.4).
    ///
    /// # Errors
    /// When the back end refuses.
    pub fn capacity_bytes(&mut self) -> Result<u64, FrontEndError> {
        match self {
            Self::VhostUser(front_end) => front_end.capacity_bytes(),
            Self::VfioUser(device) => device.capacity_bytes(),
        }
    }

    /// Resets the device.
    ///
    /// # Errors
    /// When the back end refuses.
    pub fn reset(&mut self) -> Result<(), FrontEndError> {
        match self {
            Self::VhostUser(front_end) => Ok(front_end.messages().reset_device()?),
            Self::VfioUser(device) => device.reset(),
        }
    }
}

/// A connected client.
pub struct Client {
    front_end: Attached,
    queue: BlockQueue,
    events: QueueEvents,
    interrupts: Epoll,
    memory: Arc<GuestMemory>,
    settings: ClientSettings,
    seed: u64,
}

impl Client {
    /// Connects to the function at `socket` and starts its queue 0.
    ///
    /// # Errors
    /// When nobody serves the socket, the back end refuses, or there is no memory.
    pub fn connect(socket: &Path, settings: ClientSettings) -> Result<Self, FrontEndError> {
        let ClientSettings { depth, request_bytes, queue_size, indirect, .. } = settings;
        // Buffers, and room for rings, tables and headers.
        let rings = (u64::from(queue_size) * 512 + u64::from(depth) * 64).next_multiple_of(4096) + (1 << 20);
        let bytes = (u64::from(depth) * u64::from(request_bytes)).next_multiple_of(4096) + rings;
        let memory = GuestMemory::new(0, bytes).map_err(|error| FrontEndError::Protocol(error.to_string()))?;
        let memory = Arc::new(memory);
        let mut front_end = Attached::connect(socket, &settings, Arc::clone(&memory))?;
        let options = QueueOptions { size: queue_size, features: front_end.accepted(), indirect };
        let mut queue = BlockQueue::new(&memory, options, depth, request_bytes);
        queue.queue().want_interrupts(false);
        let events = front_end.start_queue(queue_size, queue.queue())?;
        let interrupts = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, 0);
        interrupts.ctl(ControlOperation::Add, events.interrupt_fd(), event)?;
        Ok(Self { front_end, queue, events, interrupts, memory, settings, seed: 1 })
    }

    /// The front end, for what is asked beside the queue.
    pub const fn front_end(&mut self) -> &mut Attached {
        &mut self.front_end
    }

    /// The queue, for requests of other kinds.
    pub const fn queue(&mut self) -> &mut BlockQueue {
        &mut self.queue
    }

    /// Its queue's doorbell and interrupt.
    #[must_use]
    pub const fn events(&self) -> &QueueEvents {
        &self.events
    }

    /// The memory that it shares.
    #[must_use]
    pub const fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Publishes what was added.
    #[inline]
    pub fn publish(&mut self) {
        if self.queue.publish() {
            self.events.ring();
        }
    }

    /// Waits for a request to end.
    ///
    /// # Errors
    /// When the device stays silent for a minute.
    #[inline]
    pub fn wait(&mut self) -> Result<Ended, FrontEndError> {
        if self.settings.spin {
            for _ in 0..SPINS {
                if let Some(ended) = self.queue.take_ended() {
                    return Ok(ended);
                }
                std::hint::spin_loop();
            }
        } else if let Some(ended) = self.queue.take_ended() {
            return Ok(ended);
        }
        self.sleep()
    }

    #[cold]
    fn sleep(&mut self) -> Result<Ended, FrontEndError> {
        let start = Instant::now();
        self.queue.queue().want_interrupts(true);
        let ended = loop {
            if let Some(ended) = self.queue.take_ended() {
                break Ok(ended);
            }
            if start.elapsed() > SILENCE_MAX {
                break Err(FrontEndError::Protocol("the device stays silent".to_owned()));
            }
            // Interrupted by a signal or out of time: look again.
            let _ = self.interrupts.wait(1000, &mut [EpollEvent::default()]);
            let _ = self.events.take_interrupts();
            // With an event index, interrupts are asked for one at a time.
            self.queue.queue().want_interrupts(true);
        };
        self.queue.queue().want_interrupts(false);
        ended
    }

    #[inline]
    fn add(&mut self, load: &Load, row: u32) {
        // A linear congruential generator (Knuth's constants): its high bits are random enough for addresses.
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let bytes = self.settings.request_bytes;
        let sectors_each = u64::from(bytes / 512);
        let places = load.span_bytes / u64::from(bytes);
        let sector = (((self.seed >> 32) * places) >> 32) * sectors_each;
        let added = match load.access {
            Access::Read => self.queue.read(row, sector, bytes),
            Access::Write => self.queue.write(row, sector, bytes),
        };
        assert!(added, "the queue has room for {} requests", self.settings.depth);
    }

    /// Keeps the queue full for a while, then lets it drain. The drain counts neither as time nor as requests.
    ///
    /// # Errors
    /// When the device stays silent.
    pub fn run(&mut self, load: &Load) -> Result<Done, FrontEndError> {
        let mut done = Done { requests: 0, errors: 0, seconds: 0.0, latencies: Latencies::default() };
        let start = Instant::now();
        let mut started_ns = vec![0u64; self.settings.depth as usize];
        let depth = self.settings.depth;
        for row in 0..depth {
            self.add(load, row);
        }
        self.publish();
        let duration_ns = load.duration.as_nanos() as u64;
        let mut until_clock = 0;
        loop {
            let first = self.wait()?;
            let now_ns = if load.timed || until_clock == 0 {
                until_clock = 64;
                start.elapsed().as_nanos() as u64
            } else {
                until_clock -= 1;
                0
            };
            let mut next = Some(first);
            let mut taken = 0;
            let is_over = now_ns >= duration_ns;
            while let Some(ended) = next {
                done.requests += 1;
                done.errors += u64::from(ended.status != 0);
                if load.timed {
                    let started_ns = &mut started_ns[ended.row as usize];
                    done.latencies.record(now_ns - std::mem::replace(started_ns, now_ns));
                }
                if is_over {
                    break;
                }
                self.add(load, ended.row);
                taken += 1;
                next = if taken < BATCH { self.queue.take_ended() } else { None };
            }
            if is_over {
                done.seconds = now_ns as f64 / 1e9;
                break;
            }
            self.publish();
        }
        while self.queue.in_flight() > 0 {
            self.wait()?;
        }
        Ok(done)
    }

    /// Stops the queue and leaves.
    ///
    /// # Errors
    /// When the back end refuses.
    pub fn leave(mut self) -> Result<(), FrontEndError> {
        self.front_end.stop()
    }
}
