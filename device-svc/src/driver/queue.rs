//! A queue from the driver's side: a split or a packed ring.

use std::sync::Arc;

use super::packed::PackedDriver;
use super::split::SplitDriver;
use super::{Buffer, GuestMemory};
use crate::virtqueue::{QueueAddresses, features};

/// What was negotiated for a queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueOptions {
    /// Entries.
    pub size: u16,
    /// The accepted feature bits; those of virtqueues count here.
    pub features: u64,
    /// Whether chains go through indirect tables, where that was negotiated.
    pub indirect: bool,
}

/// The most buffers of a chain that goes through an indirect table; longer ones go into the ring.
pub(super) const TABLE_MAX: usize = 16;

/// The driver's half of a virtqueue.
#[derive(Debug)]
pub enum DriverQueue {
    /// A split ring.
    Split(SplitDriver),
    /// A packed ring.
    Packed(PackedDriver),
}

impl DriverQueue {
    /// A fresh queue in `memory`.
    #[must_use]
    pub fn new(memory: &Arc<GuestMemory>, options: QueueOptions) -> Self {
        let indirect = options.indirect && options.features & features::INDIRECT != 0;
        let event_index = options.features & features::EVENT_INDEX != 0;
        if options.features & features::RING_PACKED != 0 {
            Self::Packed(PackedDriver::new(memory, options.size, indirect))
        } else {
            Self::Split(SplitDriver::new(memory, options.size, indirect, event_index))
        }
    }

    /// Where its parts are.
    #[must_use]
    pub const fn addresses(&self) -> QueueAddresses {
        match self {
            Self::Split(queue) => queue.addresses(),
            Self::Packed(queue) => queue.addresses(),
        }
    }

    /// Adds a chain, readable buffers first; the device sees it with the next [`publish`](Self::publish). Returns whether
    /// there was room.
    #[inline]
    pub fn add(&mut self, buffers: &[Buffer], token: u32) -> bool {
        match self {
            Self::Split(queue) => queue.add(buffers, token),
            Self::Packed(queue) => queue.add(buffers, token),
        }
    }

    /// Makes what was added available. Returns whether the device wants its doorbell rung.
    #[inline]
    pub fn publish(&mut self) -> bool {
        match self {
            Self::Split(queue) => queue.publish(),
            Self::Packed(queue) => queue.publish(),
        }
    }

    /// Takes one used chain: its token, and how many bytes the device says it wrote.
    #[inline]
    pub fn take_used(&mut self) -> Option<(u32, u32)> {
        match self {
            Self::Split(queue) => queue.take_used(),
            Self::Packed(queue) => queue.take_used(),
        }
    }

    /// Asks for interrupts or not. Turning them on looks once more: returns whether something is there already.
    pub fn want_interrupts(&mut self, want: bool) -> bool {
        match self {
            Self::Split(queue) => queue.want_interrupts(want),
            Self::Packed(queue) => queue.want_interrupts(want),
        }
    }
}

#[cfg(test)]
mod tests;
