//! The arithmetic of a split ring (virtio 1.3, 2.7): where things lie, what an index says, when to interrupt.
//!
//! Indices run freely over 16 bits and are taken modulo the size, a power of two; `next_avail` and `next_used` are ours,
//! the driver's available index is untrusted.

use super::{QueueAddresses, RingFault};
use crate::address::Iova;

/// The available ring's flag by which a driver asks for no interrupts (`VIRTQ_AVAIL_F_NO_INTERRUPT`).
pub const NO_INTERRUPT: u16 = 1;
/// The used ring's flag by which a device asks for no doorbells (`VIRTQ_USED_F_NO_NOTIFY`).
pub const NO_NOTIFY: u16 = 1;

/// Bytes of a descriptor table of `size` entries.
#[must_use]
pub const fn table_bytes(size: u16) -> u64 {
    16 * size as u64
}

/// Bytes of an available ring of `size` entries, its event field included.
#[must_use]
pub const fn avail_bytes(size: u16) -> u64 {
    6 + 2 * size as u64
}

/// Bytes of a used ring of `size` entries, its event field included.
#[must_use]
pub const fn used_bytes(size: u16) -> u64 {
    6 + 8 * size as u64
}

/// A run of ring slots that does not wrap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// The first slot.
    pub slot: u16,
    /// How many.
    pub count: u16,
}

/// One split ring as the device sees it.
#[derive(Clone, Debug)]
pub struct SplitRing {
    size: u16,
    at: QueueAddresses,
    /// The available index up to which entries were taken.
    next_avail: u16,
    /// The available index as last read.
    seen_avail: u16,
    /// The used index up to which elements were staged.
    next_used: u16,
    /// The used index as last published.
    published_used: u16,
}

impl SplitRing {
    /// A ring of `size` entries (a power of two) that goes on at `next_avail`; `used` is the used index in the ring.
    #[must_use]
    pub const fn new(size: u16, at: QueueAddresses, next_avail: u16, used: u16) -> Self {
        assert!(size.is_power_of_two() && size <= super::QUEUE_SIZE_MAX);
        Self { size, at, next_avail, seen_avail: next_avail, next_used: used, published_used: used }
    }

    /// The used index in the ring was read as `used`: elements are staged from there. Only before the first is staged.
    pub fn start_used_at(&mut self, used: u16) {
        debug_assert_eq!(self.staged(), 0);
        self.next_used = used;
        self.published_used = used;
    }

    /// So many entries, from the used index on, were taken by somebody before and not used; the available index goes on behind
    /// them. Only before the first is taken.
    pub fn go_on_behind(&mut self, taken: u16) {
        self.next_avail = self.next_used.wrapping_add(taken);
        self.seen_avail = self.next_avail;
    }

    /// Entries.
    #[inline]
    #[must_use]
    pub const fn size(&self) -> u16 {
        self.size
    }

    /// The available index up to which entries were taken.
    #[inline]
    #[must_use]
    pub const fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Entries known to be available and not yet taken.
    #[inline]
    #[must_use]
    pub const fn known_available(&self) -> u16 {
        self.seen_avail.wrapping_sub(self.next_avail)
    }

    /// The driver's available index was read as `index`. Returns how many entries wait.
    ///
    /// # Errors
    /// When it is further ahead than the ring is large.
    #[inline]
    pub fn see_avail(&mut self, index: u16) -> Result<u16, RingFault> {
        let waiting = index.wrapping_sub(self.next_avail);
        if waiting > self.size {
            return Err(RingFault::IndexJump { from: self.next_avail, to: index, size: self.size });
        }
        self.seen_avail = index;
        Ok(waiting)
    }

    /// Takes `count` entries off the available ring.
    #[inline]
    pub fn take(&mut self, count: u16) {
        debug_assert!(count <= self.known_available());
        self.next_avail = self.next_avail.wrapping_add(count);
    }

    /// Where the next used element goes, a slot.
    #[inline]
    #[must_use]
    pub const fn next_used(&self) -> u16 {
        self.next_used & (self.size - 1)
    }

    /// Stages one used element; returns its slot.
    #[inline]
    pub fn stage_used(&mut self) -> u16 {
        let slot = self.next_used & (self.size - 1);
        self.next_used = self.next_used.wrapping_add(1);
        slot
    }

    /// Elements staged and not yet published.
    #[inline]
    #[must_use]
    pub const fn staged(&self) -> u16 {
        self.next_used.wrapping_sub(self.published_used)
    }

    /// The slots to be copied to publish what is staged: one run, or two where they wrap.
    #[inline]
    #[must_use]
    pub const fn staged_runs(&self) -> [Run; 2] {
        runs(self.published_used, self.staged(), self.size)
    }

    /// The slots of the elements from one used index to another.
    #[inline]
    #[must_use]
    pub const fn used_runs(&self, from: u16, to: u16) -> [Run; 2] {
        runs(from, to.wrapping_sub(from), self.size)
    }

    /// What is staged counts as published now. Returns the used index before and after.
    #[inline]
    pub fn publish(&mut self) -> (u16, u16) {
        let old = self.published_used;
        self.published_used = self.next_used;
        (old, self.next_used)
    }

    /// The slots of the next `count` available entries: one run, or two where they wrap.
    #[inline]
    #[must_use]
    pub const fn avail_runs(&self, count: u16) -> [Run; 2] {
        runs(self.next_avail, count, self.size)
    }

    /// Where a descriptor is.
    #[inline]
    #[must_use]
    pub const fn descriptor_at(&self, number: u16) -> Iova {
        Iova(self.at.descriptors.0.wrapping_add(number as u64 * 16))
    }

    /// Where the available ring's flags are.
    #[inline]
    #[must_use]
    pub const fn avail_flags_at(&self) -> Iova {
        self.at.driver
    }

    /// Where the available index is.
    #[inline]
    #[must_use]
    pub const fn avail_index_at(&self) -> Iova {
        Iova(self.at.driver.0.wrapping_add(2))
    }

    /// Where an entry of the available ring is.
    #[inline]
    #[must_use]
    pub const fn avail_entry_at(&self, slot: u16) -> Iova {
        Iova(self.at.driver.0.wrapping_add(4 + 2 * slot as u64))
    }

    /// Where the driver says when it wants an interrupt (`used_event`).
    #[inline]
    #[must_use]
    pub const fn used_event_at(&self) -> Iova {
        self.avail_entry_at(self.size)
    }

    /// Where the used ring's flags are.
    #[inline]
    #[must_use]
    pub const fn used_flags_at(&self) -> Iova {
        self.at.device
    }

    /// Where the used index is.
    #[inline]
    #[must_use]
    pub const fn used_index_at(&self) -> Iova {
        Iova(self.at.device.0.wrapping_add(2))
    }

    /// Where an element of the used ring is.
    #[inline]
    #[must_use]
    pub const fn used_element_at(&self, slot: u16) -> Iova {
        Iova(self.at.device.0.wrapping_add(4 + 8 * slot as u64))
    }

    /// Where the device says when it wants a doorbell (`avail_event`).
    #[inline]
    #[must_use]
    pub const fn avail_event_at(&self) -> Iova {
        self.used_element_at(self.size)
    }
}

/// The runs of `count` slots from index `from` on a ring of `size`.
#[inline]
const fn runs(from: u16, count: u16, size: u16) -> [Run; 2] {
    let slot = from & (size - 1);
    let until_end = size - slot;
    if count <= until_end {
        [Run { slot, count }, Run { slot: 0, count: 0 }]
    } else {
        [Run { slot, count: until_end }, Run { slot: 0, count: count - until_end }]
    }
}

/// Whether publishing indices `old` to `new` passes `event` (virtio 1.3, 2.7.10: `vring_need_event`).
#[inline]
#[must_use]
pub const fn passes_event(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests;
