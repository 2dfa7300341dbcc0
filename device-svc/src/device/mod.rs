//! Devices: what the requests in a virtqueue mean.
//!
//! A [`Lane`] is one virtqueue's pipeline, owned by one reactor: it fetches chains through its mirror, keeps one row of a
//! fixed slab per request, submits to a channel and publishes what has ended. A [`Device`] is what the control side knows of a
//! function: what it offers, and how the lane of a queue is made.
//!
//! ```text
//!   blk   every lane: fetch, submit  ─► the channel: poll ─► lanes: complete       ─┐
//!   net   transmitting lanes: fetch, send ─► each channel: receive ─► its lane: fill ┴► every lane: publish, interrupt
//! ```

pub mod blk;
pub mod limit;
pub mod net;
mod pages;
mod queue;

use std::os::fd::RawFd;
use std::sync::Arc;

use crate::backend::net::{Incoming, NetChannel};
use crate::backend::{BlockChannel, BlockFault};
use crate::clock::Moment;
use crate::dma::{HostMemory, Removed};
use crate::link::{QueuePosition, QueueStart};
use crate::metrics::QueueCounters;
use crate::mirror::Reach;

pub use crate::mirror::QueueFault;
pub use pages::{PageRun, Pages};
pub use queue::LaneQueue;
pub(crate) use queue::STOP_PATIENCE;

/// One virtqueue's pipeline, as far as it is the same for every device. What a lane does not say is what its queue does.
pub trait Lane: Send {
    /// Its virtqueue.
    fn queue(&self) -> &dyn LaneQueue;

    /// Its virtqueue, to be changed.
    fn queue_mut(&mut self) -> &mut dyn LaneQueue;

    /// Publishes what has ended and interrupts the driver if it wants that. Returns whether there was something to do.
    fn finish_turn(&mut self, now: Moment) -> bool;

    /// Asks for doorbells, and looks once more. `Some(true)`: the lane has nothing to do until its doorbell, its channel or
    /// its [`deadline`](Self::deadline); `None`: ask again, copies are on their way.
    fn arm(&mut self) -> Option<bool>;

    /// The descriptor to wait on for doorbells.
    fn doorbell_fd(&self) -> Option<RawFd> {
        self.queue().doorbell_fd()
    }

    /// Takes the doorbell's rings off.
    fn take_doorbell(&mut self) {
        self.queue_mut().take_doorbell();
    }

    /// The next moment at which the lane wants a turn though nothing wakes it: a limit that refills, a retry.
    fn deadline(&self) -> Option<Moment> {
        None
    }

    /// Fetch nothing more. What is in flight goes on to its end.
    fn stop(&mut self, now: Moment) {
        self.queue_mut().stop(now);
    }

    /// Stop, and begin nothing more that is in the record of requests in flight: its next owner does. Only what has begun goes on to its
    /// end. Where the lane has nothing to leave it is as `stop`.
    fn hand_over(&mut self, now: Moment) {
        self.stop(now);
    }

    /// Whether a lane that was told to stop has: nothing of it touches the VM's memory, and what remains waits for a server
    /// that is away. Once it says so it is still: until it goes on, nothing of it touches the VM's memory or is given to its channel.
    fn is_stopped(&mut self, now: Moment) -> bool;

    /// Where the queue would go on.
    fn position(&self) -> QueuePosition;

    /// Whether requests remain in a stopped lane.
    fn has_parked(&self) -> bool {
        false
    }

    /// Goes on where it stopped, with a port of its own.
    fn resume(&mut self, start: QueueStart) {
        self.queue_mut().resume(start.port);
    }

    /// Whether it has stopped, and not gone on since.
    fn is_still(&self) -> bool {
        self.queue().is_still()
    }

    /// Forget every request; nobody will hear of it again.
    fn abandon(&mut self);

    /// Whether an abandoned lane has let go of the VM's memory.
    fn is_let_go(&mut self) -> bool {
        self.queue_mut().is_idle()
    }

    /// Whether nothing of the lane is in its channel any more, nor on its way to or from card memory.
    fn is_drained(&mut self) -> bool {
        self.queue_mut().is_idle()
    }

    /// Use this table as soon as nothing in flight depends on what is not in it. Returns whether it is in use; ask again
    /// after a turn if not.
    fn offer_memory(&mut self, memory: &Arc<HostMemory>) -> bool {
        self.queue_mut().use_memory(memory)
    }

    /// Let go of memory that has left the table. Returns false, to be asked again after a turn, while something in flight is
    /// in it.
    fn let_go(&mut self, removed: &Removed) -> bool {
        self.queue_mut().let_go(removed)
    }
}

/// A queue of a block device.
pub trait BlockLane: Lane {
    /// Its number among those that share its channel: what the tags of its requests carry from now on.
    fn set_number(&mut self, number: u32);

    /// Fetches at most `chains_max` chains, decodes and submits. Returns whether there was something to do.
    fn turn(&mut self, now: Moment, chains_max: u16, channel: &mut dyn BlockChannel) -> bool;

    /// One request of this lane has ended in the channel.
    fn complete(&mut self, now: Moment, row: u32, result: Result<(), BlockFault>);
}

/// What a queue of a network device is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NetRole {
    /// It brings frames to the VM, for this pair.
    Receive(u16),
    /// It takes frames from the VM, for this pair.
    Transmit(u16),
    /// It takes the driver's commands.
    Control,
}

/// A queue of a network device.
pub trait NetLane: Lane {
    /// What it is for.
    fn role(&self) -> NetRole;

    /// Fetches at most `chains_max` chains; sends their frames, or carries out their commands, or keeps their buffers for what
    /// comes. `channel` is its pair's, but for the control queue. Returns whether there was something to do.
    fn turn(&mut self, now: Moment, chains_max: u16, channel: Option<&mut (dyn NetChannel + 'static)>) -> bool;

    /// Whether frames can be handed to it: it is a receiving one with buffers, or drops what comes.
    fn takes_frames(&self) -> bool;

    /// Takes frames from the network, in order. Returns how many it is done with; the rest shall be handed to it again.
    fn deliver(&mut self, now: Moment, frames: &[Incoming]) -> usize;
}

/// A queue of either; the set of device types is closed.
pub enum AnyLane {
    /// Of a block device.
    Block(Box<dyn BlockLane>),
    /// Of a network device.
    Net(Box<dyn NetLane>),
}

impl std::ops::Deref for AnyLane {
    type Target = dyn Lane;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::Block(lane) => lane.as_ref() as &dyn Lane,
            Self::Net(lane) => lane.as_ref() as &dyn Lane,
        }
    }
}

impl std::ops::DerefMut for AnyLane {
    fn deref_mut(&mut self) -> &mut Self::Target {
        match self {
            Self::Block(lane) => lane.as_mut() as &mut dyn Lane,
            Self::Net(lane) => lane.as_mut() as &mut dyn Lane,
        }
    }
}

/// Where what a function's lanes on one reactor do leads to.
pub enum Outlet {
    /// A volume's channel, which they share.
    Block(Box<dyn BlockChannel>),
    /// Channels of an uplink, by the number of the pair. A pair that lives on another reactor has none here.
    Net(Vec<Option<Box<dyn NetChannel>>>),
}

/// A function's device, as the control side sees it: shared with its lanes, and changed while they run.
pub trait Device: Send + Sync {
    /// The device's feature bits, without those of the transport.
    fn offered_features(&self) -> u64;

    /// How many queues it has.
    fn queue_count(&self) -> u16;

    /// The largest size of a queue.
    fn queue_size_max(&self) -> u16;

    /// The configuration space.
    fn config_space(&self) -> Vec<u8>;

    /// The driver writes to the configuration space. Returns whether there is such a writable field.
    #[must_use]
    fn write_config(&self, offset: u32, data: &[u8]) -> bool;

    /// Device reset: what the driver chose is forgotten.
    fn reset(&self);

    /// The lane of a queue whose addresses have been checked.
    ///
    /// # Errors
    /// When there is no card memory.
    fn lane(&self, start: QueueStart, place: LanePlace) -> std::io::Result<AnyLane>;
}

/// What a lane is made of beside its queue.
pub struct LanePlace {
    /// The VM's memory.
    pub memory: Arc<HostMemory>,
    /// How the queue's rings are reached in it.
    pub reach: Reach,
    /// What the queue counts.
    pub counters: Arc<QueueCounters>,
    /// Told when the queue cannot go on.
    pub report: Arc<dyn FaultReport>,
}

/// Told once, when a lane stops on a fault; called on the reactor, so it must not block.
pub trait FaultReport: Send + Sync {
    /// The queue cannot go on until the device is reset.
    fn queue_failed(&self, queue: u16, fault: QueueFault);
}
