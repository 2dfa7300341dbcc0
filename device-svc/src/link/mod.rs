//! How the card reaches a host, and what a link and the function behind it say to each other.
//!
//! The link speaks the host's protocol on a thread of its own; the function behind it is a [`FunctionSide`], implemented
//! above in `control`. A queue's hot half is a [`QueuePort`], owned by the reactor that turns the queue.

mod event;
mod listening;
pub mod vfio_user;
pub mod vhost_user;

use std::fs::File;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::address::Iova;
use crate::dma::{HostMemory, Removed};
use crate::inflight::QueueRecord;

/// The hot half of a link: one queue's doorbell and interrupt.
pub trait QueuePort: Send {
    /// A descriptor that becomes readable when the driver rings the doorbell; `None` when it cannot.
    fn doorbell_fd(&self) -> Option<RawFd>;

    /// Takes the doorbell's rings off, so that the next one wakes a sleeper again. Returns whether there was one.
    fn take_doorbell(&mut self) -> bool;

    /// Tells the driver that used entries are there. Never blocks.
    fn raise_interrupt(&mut self);
}

/// Where a queue stands: what vhost-user carries in `VHOST_USER_SET_VRING_BASE` and `VHOST_USER_GET_VRING_BASE`.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct QueuePosition {
    /// Split: the next available index. Packed: the next available slot (15 bits).
    pub next_avail: u16,
    /// Packed only: the driver's wrap counter at `next_avail`.
    pub avail_wrap: bool,
    /// Packed only: the next used slot (15 bits). On a split ring the used index is read from the ring itself.
    pub next_used: u16,
    /// Packed only: the device's wrap counter at `next_used`.
    pub used_wrap: bool,
}

impl QueuePosition {
    /// Where a queue starts that nobody gave another position: a packed one on its first lap, where both wrap counters are 1
    /// (virtio 1.3, 2.8.1).
    #[must_use]
    pub const fn fresh(packed: bool) -> Self {
        Self { next_avail: 0, avail_wrap: packed, next_used: 0, used_wrap: packed }
    }
}

/// Everything needed to start one queue.
pub struct QueueStart {
    /// Which queue.
    pub index: u16,
    /// Entries; a power of two for a split ring, 1 to 32768.
    pub size: u16,
    /// The descriptor table or descriptor ring.
    pub descriptors: Iova,
    /// The available ring, or the packed ring's driver event suppression structure.
    pub driver: Iova,
    /// The used ring, or the packed ring's device event suppression structure.
    pub device: Iova,
    /// Where to go on.
    pub position: QueuePosition,
    /// The feature bits that were negotiated.
    pub features: u64,
    /// The queue's doorbell and interrupt.
    pub port: Box<dyn QueuePort>,
    /// The record of its requests in flight, where the front end keeps one. It knows better than `position` once it was written to.
    pub inflight: Option<QueueRecord>,
    /// A service before this one may have run it, and died before it came to an interrupt: so one is raised, whatever the ring says.
    pub is_resumed: bool,
}

/// Why the function refused what the link passed on: the guest's or the front end's fault, told to it as the link's
/// protocol can.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// A queue number, size, address, feature or configuration field that the function does not have.
    #[error("{0}")]
    Invalid(String),
    /// The function is being deleted or the service is stopping.
    #[error("the function is going away")]
    Gone,
}

/// What a function tells the host through its link. Implemented by the link; called from the control thread.
pub trait HostEvents: Send + Sync {
    /// The configuration space has changed (a resize): raise a configuration interrupt.
    fn config_changed(&self);

    /// The function has stopped on a fault of the guest (`DEVICE_NEEDS_RESET`), for the given queue if one is known. Must not call the
    /// function back.
    fn needs_reset(&self, queue: Option<u16>);
}

/// What a network function takes from its link beside what every function does: vhost-user has messages for it.
pub trait NetworkSide {
    /// Queue pairs.
    fn pairs(&self) -> u16;

    /// A file for the driver's commands, in which there are none.
    ///
    /// # Errors
    /// When the system has none for us.
    fn make_kept(&self) -> std::io::Result<File>;

    /// What the driver commands is kept in this file from now on, until the function is detached; `None`: nowhere. What is in there
    /// already, of a driver that accepted these features, holds again.
    ///
    /// # Errors
    /// When it is not of this function.
    fn keep_commands(&self, file: Option<File>, accepted: u64) -> Result<(), Refusal>;

    /// The driver was told this MTU, bytes (`VHOST_USER_NET_SET_MTU`).
    ///
    /// # Errors
    /// When the function cannot carry it.
    fn use_mtu(&self, mtu: u64) -> Result<(), Refusal>;

    /// The VM is here now: the network shall learn where this address is (`VHOST_USER_SEND_RARP`).
    fn announce(&self, address: [u8; 6]);
}

/// The function as its link sees it. Every call may block for a short time, never for a storage server.
pub trait FunctionSide: Send + Sync {
    /// The device's feature bits (virtio 1.3, 6), without those of the transport.
    fn offered_features(&self) -> u64;

    /// How many queues there are.
    fn queue_count(&self) -> u16;

    /// The largest size of a queue.
    fn queue_size_max(&self) -> u16;

    /// What it takes as a network function, if it is one.
    fn network(&self) -> Option<&dyn NetworkSide> {
        None
    }

    /// The device configuration space as it is now (virtio 1.3, 5.1.4, 5.2.4).
    fn config_space(&self) -> Vec<u8>;

    /// The driver writes `data` at `offset` of the configuration space.
    ///
    /// # Errors
    /// When no field there is writable.
    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), Refusal>;

    /// The driver accepted these feature bits.
    ///
    /// # Errors
    /// When a bit was not offered.
    fn accept_features(&self, features: u64) -> Result<(), Refusal>;

    /// Somebody is attached: from now on `events` reaches the host. Replaces an earlier one.
    fn attach(&self, events: Arc<dyn HostEvents>);

    /// The host's memory is `memory` from now on. Returns when no queue touches anything that is not in it any more, so
    /// that the caller may unmap. A queue whose rings are gone stops as if by a guest's fault.
    fn set_memory(&self, memory: Arc<HostMemory>);

    /// Memory has left the table in use. Returns when no queue touches it any more, and waits only for what is in flight in it.
    fn release_memory(&self, removed: Removed);

    /// Starts a queue, or starts it anew with other parameters if it runs.
    ///
    /// # Errors
    /// When the parameters are not a queue's.
    fn start_queue(&self, start: QueueStart) -> Result<(), Refusal>;

    /// Stops a queue: nothing is fetched any more, what is in flight in the VM's memory has ended. Requests that wait for
    /// a server that is away stay on the card; they go on if the queue is started again at this position. `None` if it
    /// did not run.
    fn stop_queue(&self, index: u16) -> Option<QueuePosition>;

    /// Whether its queues can hand over.
    fn hands_over(&self) -> bool {
        false
    }

    /// Stops a queue whose requests in flight are recorded, as [`stop_queue`](Self::stop_queue), but begins nothing any more: what has
    /// not begun stays in the record for whoever starts the queue next, here or elsewhere, and nothing of it stays on the card. `None`
    /// if it did not run.
    fn hand_queue_over(&self, index: u16) -> Option<QueuePosition> {
        self.stop_queue(index)
    }

    /// A queue that was stopped starts afresh if it starts again: what was held of it is dropped.
    fn forget_queue(&self, index: u16);

    /// Device reset: every queue stops, what was held is dropped, the accepted features are forgotten.
    fn reset(&self);

    /// Reset, and nobody is attached any more.
    fn detach(&self);
}

/// How long queues may take to stop, all together, before what is left of them is abandoned.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(1);

/// Stops queues, each when what it has in flight has completed.
fn drain(function: &dyn FunctionSide, queues: impl Iterator<Item = u16>) {
    let start = Instant::now();
    for queue in queues {
        // A server that does not answer costs each queue some patience; together they must not keep the service.
        if start.elapsed() > DRAIN_TIME_MAX {
            return;
        }
        function.stop_queue(queue);
    }
}

/// Why a link could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Somebody serves that socket.
    #[error("socket {0} is in use: another process listens on it")]
    InUse(PathBuf),
    /// Something that is not a socket is there.
    #[error("{0} exists and is not a socket; remove it or choose another path")]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("socket {path}: {error}")]
    System {
        /// The socket.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
}
