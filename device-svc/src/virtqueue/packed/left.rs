//! Where a device that uses chains in the order in which they became available left a packed ring: what a front end cannot say of a
//! card that died, because on a packed ring only the device knows.
//!
//! ```text
//!   the driver's next place: where the availability bits change from one lap to the lap before
//!     └► from there, one lap behind: used ─► used ─► … ─► the first that is available: the device's next place
//! ```
//!
//! The address of a used descriptor means nothing to a driver (virtio 1.3, 2.8.5), so ours carry [how many slots](mark) their chain
//! took. A descriptor that is available and has such an address is the first of a batch that was written and not yet published: only
//! its flags are missing, which come last.
//!
//! One thing cannot be seen. Where the driver has begun to write over the last chain that was used, a chain of several slots, the
//! rest of that chain looks as if it were available; it is known for what it is by any used chain behind it. Only a ring in which all
//! else is under way has none.

use super::{AVAIL, Place, USED};
use crate::virtqueue::PackedDescriptor;

/// The address of a used descriptor whose chain took so many slots.
#[inline]
#[must_use]
pub const fn mark(slots: u16) -> u64 {
    slots as u64
}

/// Where a ring was left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Left {
    /// The next available descriptor, where the next used one goes too.
    pub next: Place,
    /// The first used descriptor of a batch before it that still wants its flags.
    pub unpublished: Option<Place>,
}

/// Looks for the place in a copy of the whole ring, of 1 to 32768 descriptors; a driver may have added to it while it was copied.
/// What the driver wrote against the rules makes a wrong place of it, which is inside the ring.
#[must_use]
pub fn left_at(ring: &[PackedDescriptor]) -> Left {
    let size = ring.len() as u16;
    let lap_of = |descriptor: &PackedDescriptor| descriptor.flags & AVAIL != 0;
    let Some(slot) = driver_slot(size, |slot| lap_of(&ring[usize::from(slot)])) else {
        return Left { next: Place { slot: 0, wrap: true }, unpublished: None };
    };
    let driver = Place { slot, wrap: !lap_of(&ring[usize::from(slot)]) };
    let (mut place, mut slots_left) = (Place { wrap: !driver.wrap, ..driver }, size);
    let mut unpublished = None;
    // Whether `place` is where a chain starts; as long as not, the first one that is available may be where the device stands.
    let (mut is_known, mut perhaps) = (false, None);
    while slots_left > 0 {
        let descriptor = &ring[usize::from(place.slot)];
        let marked = u16::try_from(descriptor.address).ok().filter(|slots| *slots > 0 && *slots <= size);
        let slots = if lap_of(descriptor) != place.wrap {
            // The driver writes here just now, perhaps over the first of several.
            is_known = false;
            1
        } else if (descriptor.flags & USED != 0) == place.wrap {
            (is_known, perhaps) = (true, None);
            // Somebody else's used descriptors say nothing of slots.
            marked.unwrap_or(1)
        } else if let Some(slots) = marked {
            (is_known, perhaps, unpublished) = (true, None, Some(place));
            slots
        } else if is_known {
            return Left { next: place, unpublished };
        } else {
            perhaps = perhaps.or(Some(place));
            1
        };
        let slots = slots.min(slots_left);
        place = place.advance(slots, size);
        slots_left -= slots;
    }
    // Once around: either nothing is under way, or everything from there on.
    Left { next: perhaps.unwrap_or(driver), unpublished }
}

/// The slot that the driver makes available next, which is still of the lap before; `lap_of` tells the availability bit of a slot.
/// `None` of a ring without slots.
fn driver_slot(size: u16, lap_of: impl Fn(u16) -> bool) -> Option<u16> {
    // Where a lap ends: the bit changes from one slot to the next, but it changes at the ring's end while the lap goes on.
    let ends = |slot: &u16| if *slot == 0 { lap_of(0) == lap_of(size - 1) } else { lap_of(*slot) != lap_of(*slot - 1) };
    let ends: Vec<u16> = (0..size).filter(ends).collect();
    let apart = |from: u16, to: u16| (u32::from(to) + u32::from(size) - u32::from(from)) % u32::from(size);
    // A driver that is adding a chain has written what follows its first descriptor, and that one's flags not yet: there are two ends
    // more, and the place is where one slot alone is of the lap before. Seen the other way round, nearly all would be being added.
    let alone = (0..ends.len()).filter_map(|number| {
        let [at, next, then] = [0, 1, 2].map(|ahead| ends[(number + ahead) % ends.len()]);
        (apart(at, next) == 1).then_some((apart(next, then), at))
    });
    alone.min().map(|(_, slot)| slot).filter(|_| ends.len() > 1).or_else(|| ends.first().copied())
}

#[cfg(test)]
mod tests;
