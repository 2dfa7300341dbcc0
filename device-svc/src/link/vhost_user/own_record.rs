//! The record of requests in flight for a front end that keeps none: in a file of ours, which the keeper holds while no service is
//! there.
//!
//! ```text
//!   a ring starts ─► is what the record knows of this ring?  yes: the ring goes on by its record
//!                                                            no: the record is made anew
//! ```
//!
//! A ring that this session has stopped itself goes on if it starts where it stopped, and begins anew anywhere else. Of another nobody says
//! whether it is the one that was left, so that must be plain from what there is:
//!
//! - the file of its memory, its addresses, size and kind are those of the ring that was left; and
//! - the ring shows that a device has used something of it. A driver that begins anew clears its rings (virtio 1.3, 2.7.1 and 2.8.1), and
//!   nobody but this function writes there. A ring that was left before anything was used looks new as well: it starts anew, and everything
//!   in flight is fetched once more in its order, which is the same (but where `recovery = "fail"` would have ended it).
//!
//! Network functions need no record: they use chains in their order, so that a ring itself says where to go on (`resume.rs`).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::regions::FileIdentity;
use crate::address::{CardAddress, Iova};
use crate::dma::{CardMemory, CopyEngine, DmaEngine, HostMemory, Unmapped};
use crate::inflight::{AreaShape, QueueRecord, RecordArea};
use crate::link::QueueStart;
use crate::tether::{KeptFile, Tether};
use crate::virtqueue::PackedDescriptor;
use crate::virtqueue::packed::{AVAIL, USED};

/// Regions start on a page, which is what can be mapped.
const PAGE_BYTES: u64 = 4096;
/// Where the index is in both areas of a split ring (virtio 1.3, 2.7.6 and 2.7.8).
const INDEX_AT: u64 = 2;

/// Which ring a record is of. One that was never written is no ring's: it has no size.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct RingIdentity {
    device: u64,
    inode: u64,
    addresses: [u64; 3],
    size: u64,
}

/// The record of a function, and which rings it is of.
///
/// Both kinds of ring have an area of their own, so that what is left of one is never taken for the other's; memory that is not written
/// to is none.
#[derive(Debug)]
pub(super) struct OwnRecord {
    file: KeptFile,
    areas: [RecordArea; 2],
    queues: u16,
}

/// The areas, and where each is in the file; then the file's length.
fn layout(queues: u16, size: u16) -> ([(u64, AreaShape); 2], u64) {
    let identities = 2 * u64::from(queues) * size_of::<RingIdentity>() as u64;
    let shape = |packed| AreaShape { queues, size, packed };
    let split_at = identities.next_multiple_of(PAGE_BYTES);
    let packed_at = (split_at + shape(false).bytes()).next_multiple_of(PAGE_BYTES);
    ([(split_at, shape(false)), (packed_at, shape(true))], packed_at + shape(true).bytes())
}

impl OwnRecord {
    /// The record of `function`, which has so many queues of at most `size` entries: that which a service before has left, or a new one.
    ///
    /// # Errors
    /// When the keeper does not take it, or the system has no memory for it.
    pub(super) fn open(tether: &Arc<Tether>, function: &str, queues: u16, size: u16) -> std::io::Result<Self> {
        let (places, length) = layout(queues, size);
        let fits = |file: &File| file.metadata().is_ok_and(|metadata| metadata.len() == length);
        let make = || {
            let file = File::from(memfd_create(c"dray-inflight", MFdFlags::MFD_CLOEXEC)?);
            file.set_len(length)?;
            Ok(file)
        };
        let file = tether.file(function, fits, make).map_err(std::io::Error::other)?;
        let open = |(at, shape): (u64, AreaShape)| {
            RecordArea::open(file.file(), at, shape.bytes(), shape).map_err(std::io::Error::other)
        };
        let [split, packed] = places;
        let areas = [open(split)?, open(packed)?];
        Ok(Self { file, areas, queues })
    }

    /// Has the ring that is about to start recorded, whose memory is in `file`; `stopped_here`: of a ring that whoever starts it has stopped,
    /// whether it was at this position. Returns whether it goes on by the record.
    ///
    /// # Errors
    /// When the record cannot be read or written.
    pub(super) fn attach(
        &self,
        start: &mut QueueStart,
        packed: bool,
        stopped_here: Option<bool>,
        file: FileIdentity,
        memory: &Arc<HostMemory>,
    ) -> std::io::Result<bool> {
        let area = &self.areas[usize::from(packed)];
        let record = area.queue(start.index, packed).map_err(std::io::Error::other)?;
        let now = RingIdentity {
            device: file.device,
            inode: file.inode,
            addresses: [start.descriptors.0, start.driver.0, start.device.0],
            size: start.size.into(),
        };
        let at = (2 * u64::from(start.index) + u64::from(packed)) * size_of::<RingIdentity>() as u64;
        let mut left = [0; size_of::<RingIdentity>()];
        self.file.file().read_exact_at(&mut left, at)?;
        let is_same = left == now.as_bytes() && record.is_known();
        // A ring outside memory is refused when the queue starts.
        let looks_used = || match packed {
            true => packed_goes_on(start, &record, memory).unwrap_or(false),
            false => split_goes_on(start, &record, memory).unwrap_or(false),
        };
        let goes_on = is_same && stopped_here.unwrap_or_else(looks_used);
        if !goes_on {
            // In this order: one that dies in between leaves a record that nobody has written to.
            area.forget_queue(start.index, packed);
            self.file.file().write_all_at(now.as_bytes(), at)?;
        }
        start.inflight = Some(record);
        Ok(goes_on)
    }

    /// The device was reset: what was in flight is not any more.
    pub(super) fn forget(&self) {
        for (area, packed) in self.areas.iter().zip([false, true]) {
            (0..self.queues).for_each(|queue| area.forget_queue(queue, packed));
        }
    }
}

/// Whether the ring stands where the record says, and not before anything was used.
fn split_goes_on(start: &QueueStart, record: &QueueRecord, memory: &Arc<HostMemory>) -> Result<bool, Unmapped> {
    let Ok(card) = CardMemory::new(4) else { return Ok(false) };
    let mut engine = CopyEngine::new(card, Arc::clone(memory));
    for (ring, to) in [(start.device, 0), (start.driver, 2)] {
        engine.read(Iova(ring.0.wrapping_add(INDEX_AT)), CardAddress(to), 2)?;
    }
    engine.submit();
    let [used, available]: [u16; 2] = [engine.card().get(CardAddress(0)), engine.card().get(CardAddress(2))];
    // It is 0 again after 65536 requests, which is not the beginning.
    let was_used = used != 0 || record.has_completed(start.size);
    // One batch at most is published and not yet noted, and all else that is in flight was made available.
    let batch = used.wrapping_sub(record.used_index());
    let in_flight = record.in_flight().saturating_sub(batch.into());
    Ok(was_used && batch <= start.size && in_flight <= available.wrapping_sub(used).into())
}

/// Whether anything of the ring was used, or is written over to be so.
fn packed_goes_on(start: &QueueStart, record: &QueueRecord, memory: &Arc<HostMemory>) -> Result<bool, Unmapped> {
    let Ok(card) = CardMemory::new(16 * u32::from(start.size)) else { return Ok(false) };
    let mut engine = CopyEngine::new(card, Arc::clone(memory));
    engine.read(start.descriptors, CardAddress(0), 16 * u32::from(start.size))?;
    engine.submit();
    // The address of our used descriptors is how many slots they took: of one whose flags are yet to be written that is all there is to see.
    let is_marked = |address: u64| address != 0 && address <= u64::from(start.size);
    let ring = || engine.card().values::<PackedDescriptor>(CardAddress(0), start.size);
    let was_used = ring().any(|descriptor| descriptor.flags & USED != 0 || is_marked(descriptor.address));
    // Every second lap looks like the first, if the driver has filled all of it.
    let is_full = || ring().all(|descriptor| descriptor.flags & AVAIL != 0);
    Ok(was_used || record.begins_another_lap(start.size) && is_full())
}

#[cfg(test)]
mod tests;
