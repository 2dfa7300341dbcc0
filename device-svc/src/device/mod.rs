//! Devices: what the requests in a virtqueue mean.
//!
//! A [`Lane`] is one virtqueue's pipeline, owned by one reactor: it fetches chains through its mirror, keeps one row of a
//! fixed slab per request, submits to a channel and publishes what has ended. A reactor turns lanes without knowing the
//! device behind them.

pub mod blk;
pub mod limit;
mod pages;

use std::os::fd::RawFd;
use std::sync::Arc;

use crate::backend::{BlockChannel, BlockFault};
use crate::clock::Moment;
use crate::dma::{HostMemory, Removed};
use crate::link::{QueuePosition, QueueStart};

pub use crate::mirror::QueueFault;
pub use pages::{PageRun, Pages};

/// One virtqueue's pipeline, as a reactor sees it.
///
/// A function's turn has three parts: the [`turn`](Self::turn) of each of its lanes, then a poll of its channel, whose
/// completions go to [`complete`](Self::complete), then [`finish_turn`](Self::finish_turn).
pub trait Lane: Send {
    /// Its number among those that share its channel: what the tags of its requests carry from now on.
    fn set_number(&mut self, number: u32);

    /// Fetches at most `chains_max` chains, decodes and submits. Returns whether there was something to do.
    fn turn(&mut self, now: Moment, chains_max: u16, channel: &mut dyn BlockChannel) -> bool;

    /// One request of this lane has ended in the channel.
    fn complete(&mut self, now: Moment, row: u32, result: Result<(), BlockFault>);

    /// Publishes what has ended and interrupts the driver if it wants that. Returns whether there was something to do.
    fn finish_turn(&mut self, now: Moment) -> bool;

    /// Asks for doorbells, and looks once more. `Some(true)`: the lane has nothing to do until its doorbell, its channel or
    /// its [`deadline`](Self::deadline); `None`: ask again, copies are on their way.
    fn arm(&mut self) -> Option<bool>;

    /// The descriptor to wait on for doorbells.
    fn doorbell_fd(&self) -> Option<RawFd>;

    /// Takes the doorbell's rings off.
    fn take_doorbell(&mut self);

    /// The next moment at which the lane wants a turn though nothing wakes it: a limit that refills, a retry.
    fn deadline(&self) -> Option<Moment>;

    /// Fetch nothing more. What is in flight goes on to its end.
    fn stop(&mut self, now: Moment);

    /// Whether a lane that was told to stop has: nothing of it touches the VM's memory, and what remains waits for a server
    /// that is away.
    fn is_stopped(&mut self, now: Moment) -> bool;

    /// Where the queue would go on.
    fn position(&self) -> QueuePosition;

    /// Whether requests remain in a stopped lane.
    fn has_parked(&self) -> bool;

    /// Goes on where it stopped, with a port of its own.
    fn resume(&mut self, start: QueueStart);

    /// Forget every request; nobody will hear of it again.
    fn abandon(&mut self);

    /// Whether an abandoned lane has let go of the VM's memory.
    fn is_let_go(&mut self) -> bool;

    /// Whether nothing of the lane is in its channel any more, nor on its way to or from card memory.
    fn is_drained(&mut self) -> bool;

    /// Use this table as soon as nothing in flight depends on what is not in it. Returns whether it is in use; ask again
    /// after a turn if not.
    fn offer_memory(&mut self, memory: &Arc<HostMemory>) -> bool;

    /// Let go of memory that has left the table. Returns false, to be asked again after a turn, while something in flight is
    /// in it.
    fn let_go(&mut self, removed: &Removed) -> bool;
}

/// Told once, when a lane stops on a fault; called on the reactor, so it must not block.
pub trait FaultReport: Send + Sync {
    /// The queue cannot go on until the device is reset.
    fn queue_failed(&self, queue: u16, fault: QueueFault);
}
