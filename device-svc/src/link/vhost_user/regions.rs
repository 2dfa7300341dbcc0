//! The memory that a front end shares: a table that whole messages replace, or that grows and shrinks slot by slot.
//!
//! Each region has three names: where the guest sees it, where the front end has mapped it (rings are named by that), and where
//! it is in its file.

use std::fs::File;
use std::sync::Arc;

use crate::address::{FrontEndAddress, Iova};
use crate::dma::{HostMemory, Mapping, MemoryError, Region};

/// Slots that a front end may use: what QEMU's own back ends offer.
pub(super) const SLOTS_MAX: usize = 509;

/// One region as a message names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Slot {
    pub(super) guest: Iova,
    pub(super) front_end: FrontEndAddress,
    pub(super) length: u64,
    pub(super) file_offset: u64,
}

/// The table.
#[derive(Clone, Default, Debug)]
pub(super) struct Regions {
    slots: Vec<Slot>,
    memory: Arc<HostMemory>,
}

impl Regions {
    /// A table of exactly these regions.
    pub(super) fn new(regions: impl Iterator<Item = (Slot, File)>) -> Result<Self, MemoryError> {
        let mut all = Self::default();
        for (slot, file) in regions {
            all = all.with(slot, &file)?;
        }
        Ok(all)
    }

    /// This table and one region more.
    pub(super) fn with(&self, slot: Slot, file: &File) -> Result<Self, MemoryError> {
        if self.slots.len() >= SLOTS_MAX {
            return Err(MemoryError::TooMany(SLOTS_MAX));
        }
        let bad = MemoryError::BadRange { start: slot.guest, length: slot.length };
        if slot.front_end.0.checked_add(slot.length).is_none() {
            return Err(bad);
        }
        // The offset need not be a multiple of the page size (of a huge page, say): the mapping starts before it.
        let alignment = page_bytes_of(file);
        let skip = slot.file_offset % alignment;
        let start = slot.file_offset - skip;
        let Some(length) = slot.length.checked_add(skip) else { return Err(bad) };
        // Rounding up must not ask for more than the file has.
        let has = file.metadata().map_or(u64::MAX, |metadata| metadata.len());
        let whole = length.checked_next_multiple_of(alignment);
        let fits = |whole: &u64| start.checked_add(*whole).is_some_and(|end| end <= has);
        let length = whole.filter(fits).unwrap_or(length);
        let mapping = Arc::new(Mapping::new(file, start, length)?);
        let region = Region::new(slot.guest, slot.length, mapping, skip as usize)?;
        let memory = Arc::new(self.memory.with(region)?);
        let mut slots = self.slots.clone();
        slots.push(slot);
        Ok(Self { slots, memory })
    }

    /// This table less one region, which must be named as it was added (the file's part apart).
    pub(super) fn without(&self, slot: Slot) -> Result<Self, MemoryError> {
        let at = self
            .slots
            .iter()
            .position(|other| {
                other.guest == slot.guest && other.length == slot.length && other.front_end == slot.front_end
            })
            .ok_or(MemoryError::Absent { start: slot.guest, length: slot.length })?;
        let memory = Arc::new(self.memory.without(slot.guest, slot.length)?);
        let mut slots = self.slots.clone();
        slots.remove(at);
        Ok(Self { slots, memory })
    }

    /// The table of the function.
    pub(super) const fn memory(&self) -> &Arc<HostMemory> {
        &self.memory
    }

    /// Where the guest sees what the front end has at `address`.
    pub(super) fn translate(&self, address: FrontEndAddress) -> Option<Iova> {
        self.slots.iter().find_map(|slot| {
            let inside = address.0.checked_sub(slot.front_end.0)?;
            (inside < slot.length).then(|| Iova(slot.guest.0 + inside))
        })
    }
}

/// The page size of a file's memory: that of huge pages where it lies in them.
fn page_bytes_of(file: &File) -> u64 {
    const HUGETLBFS: i64 = 0x9584_58f6;
    match nix::sys::statfs::fstatfs(file) {
        Ok(stat) if stat.filesystem_type().0 == HUGETLBFS => stat.block_size() as u64,
        _ => 4096,
    }
}

#[cfg(test)]
mod tests;
