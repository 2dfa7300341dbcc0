//! The formats and the arithmetic of virtqueues: pure, without I/O, threads or a clock.
//!
//! The mirror copies parts of a ring into card memory and asks this module what they mean; nothing here reads a ring by
//! itself. Everything from a ring is untrusted, and what is wrong with it is a [`RingFault`].
//!
//! Split and packed ring are a closed set, so the mirror keeps them in an enum; what they share is the walk over a
//! descriptor chain ([`ChainWalk`]) and its result, a list of [`Segment`]s, readable ones first.

mod chain;
pub mod packed;
pub mod split;

pub use chain::{Chain, ChainWalk, SEGMENTS_MAX, Segment, WalkEnd};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::address::Iova;

/// Feature bits that concern virtqueues (virtio 1.3, 6).
pub mod features {
    /// `VIRTIO_F_INDIRECT_DESC`.
    pub const INDIRECT: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX`.
    pub const EVENT_INDEX: u64 = 1 << 29;
    /// `VIRTIO_F_VERSION_1`.
    pub const VERSION_1: u64 = 1 << 32;
    /// `VIRTIO_F_ACCESS_PLATFORM`.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// `VIRTIO_F_RING_PACKED`.
    pub const RING_PACKED: u64 = 1 << 34;
    /// `VIRTIO_F_IN_ORDER`.
    pub const IN_ORDER: u64 = 1 << 35;
    /// `VIRTIO_F_ORDER_PLATFORM`.
    pub const ORDER_PLATFORM: u64 = 1 << 36;
    /// `VIRTIO_F_NOTIFICATION_DATA`.
    pub const NOTIFICATION_DATA: u64 = 1 << 38;
    /// `VIRTIO_F_RING_RESET`.
    pub const RING_RESET: u64 = 1 << 40;
}

/// The largest queue (virtio 1.3, 2.7).
pub const QUEUE_SIZE_MAX: u16 = 32768;

/// `VIRTQ_DESC_F_NEXT`: the chain goes on.
pub const DESCRIPTOR_NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: the device writes this buffer.
pub const DESCRIPTOR_WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`: the buffer holds a table of descriptors.
pub const DESCRIPTOR_INDIRECT: u16 = 4;

/// A descriptor of a split ring or of an indirect table (virtio 1.3, 2.7.5).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Descriptor {
    /// Where the buffer is.
    pub address: u64,
    /// Its length, bytes.
    pub length: u32,
    /// `DESCRIPTOR_…` bits.
    pub flags: u16,
    /// Split: the next descriptor's number, if `DESCRIPTOR_NEXT`. Packed: the buffer id.
    pub next: u16,
}

/// A descriptor of a packed ring (virtio 1.3, 2.8.13), also its used form.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PackedDescriptor {
    /// Where the buffer is.
    pub address: u64,
    /// Its length, bytes; in a used descriptor, how much was written.
    pub length: u32,
    /// The buffer id.
    pub id: u16,
    /// `DESCRIPTOR_…` bits and the two availability bits.
    pub flags: u16,
}

/// An element of a split ring's used ring (virtio 1.3, 2.7.8).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct UsedElement {
    /// The head of the chain.
    pub id: u32,
    /// How many bytes were written to it.
    pub length: u32,
}

/// What a driver did wrong with a ring. The function stops fetching and needs a reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RingFault {
    /// The available index ran ahead of the ring (virtio 1.3, 2.7.13.3.1).
    #[error("the available index went from {from} to {to} on a ring of {size} entries")]
    IndexJump {
        /// What was known.
        from: u16,
        /// What was found.
        to: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// Slots of a packed ring were made available again before they were used.
    #[error("more than the {size} descriptors of the ring are available")]
    AvailableTwice {
        /// Slots of the ring.
        size: u16,
    },
    /// A descriptor number that the table does not have.
    #[error("descriptor {number} does not exist in a table of {size}")]
    NoSuchDescriptor {
        /// The number.
        number: u16,
        /// Entries of the table.
        size: u32,
    },
    /// More descriptors than a chain may have, or a loop.
    #[error("a descriptor chain is longer than {limit} or loops")]
    ChainTooLong {
        /// The limit.
        limit: u32,
    },
    /// A device-readable buffer after a device-writable one (virtio 1.3, 2.7.4.2).
    #[error("a readable buffer follows a writable one in a descriptor chain")]
    ReadableAfterWritable,
    /// An indirect table within an indirect table, together with `NEXT`, writable, or not negotiated.
    #[error("an indirect descriptor where none is allowed")]
    IndirectNotAllowed,
    /// An indirect table whose size is 0, too large, or not a multiple of 16.
    #[error("an indirect table of {length} bytes")]
    IndirectSize {
        /// The length in the descriptor, bytes.
        length: u32,
    },
    /// All lengths of a chain add up to more than 32 bits (virtio 1.3, 2.7.5.2).
    #[error("a descriptor chain of more than 4 GiB")]
    ChainTooLarge,
    /// A descriptor that the device had was changed (virtio 1.3, 2.7.13: it is the device's until it is used).
    #[error("a descriptor was changed while the device had it")]
    Changed,
}

/// Where the parts of a queue are in the host's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueAddresses {
    /// Descriptor table or descriptor ring.
    pub descriptors: Iova,
    /// Available ring, or driver event suppression.
    pub driver: Iova,
    /// Used ring, or device event suppression.
    pub device: Iova,
}
