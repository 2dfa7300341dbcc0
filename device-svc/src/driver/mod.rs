//! What a guest does: the driver's side of a virtqueue, of virtio-blk and of vhost-user. The demo, the bench, the tests and the
//! simulation drive the card with it, so it is as fast as the card's own side: batches, no allocation, no lock.
//!
//! ```text
//!   memory.rs       what the guest shares: one memory file
//!   split.rs, packed.rs   the driver's halves of the rings
//!   queue.rs        one of the two, chosen by a negotiated feature
//!   block.rs        virtio-blk requests on a queue; net.rs: frames and commands
//!   vhost_user.rs   the front end that hands memory and queues to a card
//!   vfio_user.rs    the VMM that plugs a function in, and its guest's driver
//!   front_end.rs    what both have in common
//!   client.rs       one of them with one queue, kept full; latency.rs: how long its requests took
//!   hostile.rs      a front end that means harm
//! ```

pub mod block;
pub mod client;
mod front_end;
pub mod hostile;
pub mod latency;
mod memory;
pub mod net;
mod packed;
mod queue;
mod split;
pub mod vfio_user;
pub mod vhost_user;

pub use front_end::{FrontEndError, QueueEvents};
pub use memory::GuestMemory;
pub use queue::{DriverQueue, QueueOptions};

use crate::address::Iova;

/// One buffer of a chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Buffer {
    /// Where it is.
    pub address: Iova,
    /// Its length, bytes.
    pub length: u32,
    /// Whether the device writes it.
    pub writable: bool,
}
