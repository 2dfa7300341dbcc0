//! The arithmetic of a packed ring (virtio 1.3, 2.8): what a descriptor's flags say, where used descriptors go, when to
//! interrupt.
//!
//! One ring serves both ways. Each side keeps a position and a wrap counter; a descriptor is available when its `AVAIL` bit
//! equals the driver's wrap counter and its `USED` bit does not.

mod left;

use super::{QueueAddresses, RingFault};
use crate::address::Iova;

pub use left::{Left, left_at, mark};

/// `VIRTQ_DESC_F_AVAIL`.
pub const AVAIL: u16 = 1 << 7;
/// `VIRTQ_DESC_F_USED`.
pub const USED: u16 = 1 << 15;

/// Event suppression: always notify (`RING_EVENT_FLAGS_ENABLE`).
pub const EVENT_ENABLE: u16 = 0;
/// Event suppression: never notify (`RING_EVENT_FLAGS_DISABLE`).
pub const EVENT_DISABLE: u16 = 1;
/// Event suppression: notify at a descriptor (`RING_EVENT_FLAGS_DESC`).
pub const EVENT_DESCRIPTOR: u16 = 2;

/// A place on a packed ring: slot and wrap counter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The slot, 0 to size − 1.
    pub slot: u16,
    /// The wrap counter; 1 on the first lap.
    pub wrap: bool,
}

impl Place {
    /// The place `slots` further on a ring of `size` slots (`slots` at most `size`).
    #[inline]
    #[must_use]
    pub const fn advance(self, slots: u16, size: u16) -> Self {
        let slot = self.slot as u32 + slots as u32;
        if slot >= size as u32 {
            Self { slot: (slot - size as u32) as u16, wrap: !self.wrap }
        } else {
            Self { slot: slot as u16, wrap: self.wrap }
        }
    }

    /// As the event suppression structure and vhost-user write it: slot in bits 0 to 14, wrap counter in bit 15.
    #[inline]
    #[must_use]
    pub const fn encode(self) -> u16 {
        self.slot | (self.wrap as u16) << 15
    }
}

/// One packed ring as the device sees it.
#[derive(Clone, Debug)]
pub struct PackedRing {
    size: u16,
    at: QueueAddresses,
    next_avail: Place,
    next_used: Place,
    /// Slots from the last published used place to `next_used`.
    staged_slots: u16,
    /// Slots that were taken and are not yet published as used, at most the ring's.
    taken_slots: u16,
}

impl PackedRing {
    /// A ring of `size` slots (1 to 32768) that goes on at these places, both inside the ring.
    #[must_use]
    pub const fn new(size: u16, at: QueueAddresses, next_avail: Place, next_used: Place) -> Self {
        assert!(size > 0 && size <= super::QUEUE_SIZE_MAX && next_avail.slot < size && next_used.slot < size);
        Self { size, at, next_avail, next_used, staged_slots: 0, taken_slots: 0 }
    }

    /// The next used descriptor goes to `place`, and nothing behind it was taken yet. Only before the first is taken.
    pub const fn go_on_at(&mut self, place: Place) {
        assert!(place.slot < self.size);
        self.next_avail = place;
        self.next_used = place;
    }

    /// Slots.
    #[inline]
    #[must_use]
    pub const fn size(&self) -> u16 {
        self.size
    }

    /// Where the next available descriptor will be.
    #[inline]
    #[must_use]
    pub const fn next_avail(&self) -> Place {
        self.next_avail
    }

    /// Where the next used descriptor will go.
    #[inline]
    #[must_use]
    pub const fn next_used(&self) -> Place {
        self.next_used
    }

    /// Whether a descriptor with these flags at `place` is available (virtio 1.3, 2.8.1).
    #[inline]
    #[must_use]
    pub const fn is_available(flags: u16, place: Place) -> bool {
        flags & (AVAIL | USED) == Self::available_flags(place.wrap)
    }

    /// The availability bits of a descriptor that is available at a place with this wrap counter.
    #[inline]
    #[must_use]
    pub const fn available_flags(wrap: bool) -> u16 {
        if wrap { AVAIL } else { USED }
    }

    /// Whether so many slots (at most the ring's) may be taken.
    ///
    /// # Errors
    /// When slots are available again before they were used: the driver owns them again only then (virtio 1.3, 2.8).
    #[inline]
    pub const fn has_room(&self, slots: u16) -> Result<(), RingFault> {
        if slots > self.size - self.taken_slots { Err(RingFault::AvailableTwice { size: self.size }) } else { Ok(()) }
    }

    /// Takes chains of so many slots off the ring, which [has room](Self::has_room) for them.
    #[inline]
    pub const fn take(&mut self, slots: u16) {
        self.taken_slots += slots;
        self.next_avail = self.next_avail.advance(slots, self.size);
    }

    /// Stages the used descriptor of a chain that took `slots`; returns where it goes.
    #[inline]
    pub const fn stage_used(&mut self, slots: u16) -> Place {
        let place = self.next_used;
        self.next_used = place.advance(slots, self.size);
        self.staged_slots += slots;
        place
    }

    /// The flags of a used descriptor at `place`.
    #[inline]
    #[must_use]
    pub const fn used_flags(place: Place, written: bool) -> u16 {
        let marks = if place.wrap { AVAIL | USED } else { 0 };
        marks | if written { super::DESCRIPTOR_WRITE } else { 0 }
    }

    /// Slots that were taken and are not yet published as used.
    #[inline]
    #[must_use]
    pub const fn taken_slots(&self) -> u16 {
        self.taken_slots
    }

    /// Slots that are staged and not yet published.
    #[inline]
    #[must_use]
    pub const fn staged_slots(&self) -> u16 {
        self.staged_slots
    }

    /// What is staged counts as published now; returns how many slots that were.
    #[inline]
    pub const fn publish(&mut self) -> u16 {
        let slots = self.staged_slots;
        self.staged_slots = 0;
        self.taken_slots -= slots;
        slots
    }

    /// Where a slot's descriptor is.
    #[inline]
    #[must_use]
    pub const fn descriptor_at(&self, slot: u16) -> Iova {
        Iova(self.at.descriptors.0.wrapping_add(slot as u64 * 16))
    }

    /// Where the driver's event suppression structure is: `off_wrap`, then flags.
    #[inline]
    #[must_use]
    pub const fn driver_event_at(&self) -> Iova {
        self.at.driver
    }

    /// Where ours is.
    #[inline]
    #[must_use]
    pub const fn device_event_at(&self) -> Iova {
        self.at.device
    }

    /// Whether a driver that asked for `event` (`off_wrap`) is to be interrupted, after the last `published` slots before
    /// `next_used` were published (virtio 1.3, 2.8.10.2).
    #[inline]
    #[must_use]
    pub const fn passes_event(&self, event: u16, published: u16) -> bool {
        let slot = event & 0x7fff;
        let wrap = event & 0x8000 != 0;
        // How far before `next_used` the wanted slot lies, counted in slots: on this lap, or on the lap before.
        let behind = if wrap == self.next_used.wrap {
            self.next_used.slot as i32 - slot as i32
        } else {
            self.next_used.slot as i32 + self.size as i32 - slot as i32
        };
        behind >= 1 && behind <= published as i32
    }
}

#[cfg(test)]
mod tests;
