//! Where a packed ring goes on, when what the front end says cannot be right: on a packed ring only the device knows, and the device
//! that knew may have died.
//!
//! A split ring needs nothing of this. Its used index is in the ring, and that is what front ends give as the base of a ring whose
//! card is gone; where chains are used in order, that is where to go on.

use std::sync::Arc;

use crate::address::{CardAddress, Iova};
use crate::dma::{CardMemory, CopyEngine, DmaEngine, HostMemory, Unmapped};
use crate::link::{QueuePosition, QueueStart};
use crate::virtqueue::PackedDescriptor;
use crate::virtqueue::packed::{Left, PackedRing, USED, left_at};

/// Where a descriptor's flags are.
const FLAGS_AT: u64 = 14;

/// Puts the position of a packed ring right. `in_order`: its function uses chains in their order, and nobody here has run the ring
/// before, so the ring itself is asked.
pub(super) fn correct(start: &mut QueueStart, in_order: bool, memory: &Arc<HostMemory>) {
    // Without memory for a copy the front end must be right.
    let Ok(card) = CardMemory::new(16 * u32::from(start.size) + 2) else { return };
    let mut engine = CopyEngine::new(card, Arc::clone(memory));
    if in_order {
        // A ring outside memory is refused when the queue starts.
        if let Ok(position) = look(start, &mut engine) {
            start.position = position;
        }
    } else if start.position == QueuePosition::default() && was_used(start, &mut engine) == Ok(false) {
        start.position = QueuePosition::fresh(true);
    }
}

/// Whether the first slot was ever used.
///
/// Some front ends (libblkio) give every fresh ring the base 0, packed ones too. Taken at its word that is the start of a second
/// lap; but then the first slot was used in the lap before, and its used flag stays set until that slot's next use (virtio 1.3,
/// 2.8.1). In a fresh ring it is clear, whether or not something is available there.
fn was_used(start: &QueueStart, engine: &mut CopyEngine) -> Result<bool, Unmapped> {
    engine.read(Iova(start.descriptors.0.wrapping_add(FLAGS_AT)), CardAddress(0), 2)?;
    engine.submit();
    Ok(engine.card().get::<u16>(CardAddress(0)) & USED != 0)
}

/// Finds the place in the ring, and publishes a batch to which only that was left to be done.
///
/// QEMU gives a ring whose card has died the base that it had when it was started first.
fn look(start: &QueueStart, engine: &mut CopyEngine) -> Result<QueuePosition, Unmapped> {
    let bytes = 16 * u32::from(start.size);
    engine.read(start.descriptors, CardAddress(0), bytes)?;
    engine.submit();
    let ring: Vec<PackedDescriptor> = engine.card().values(CardAddress(0), start.size).collect();
    let Left { next, unpublished } = left_at(&ring);
    if let Some(place) = unpublished {
        let written = ring[usize::from(place.slot)].length > 0;
        engine.card().put(CardAddress(bytes), PackedRing::used_flags(place, written));
        let flags_at = start.descriptors.0.wrapping_add(16 * u64::from(place.slot) + FLAGS_AT);
        engine.write_index(CardAddress(bytes), Iova(flags_at))?;
        engine.submit();
    }
    Ok(QueuePosition { next_avail: next.slot, avail_wrap: next.wrap, next_used: next.slot, used_wrap: next.wrap })
}

#[cfg(test)]
mod tests;
