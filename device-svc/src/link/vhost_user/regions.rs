//! The memory that a front end shares: a table that whole messages replace, or that grows and shrinks slot by slot.
//!
//! Each region has three names: where the guest sees it, where the front end has mapped it (rings are named by that), and where
//! it is in its file.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use crate::address::{FrontEndAddress, Iova};
use crate::dma::{Access, HostMemory, MemoryError, MemoryFiles, Region};

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

/// Which file a region is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct FileIdentity {
    pub(super) device: u64,
    pub(super) inode: u64,
}

/// The table.
#[derive(Clone, Default, Debug)]
pub(super) struct Regions {
    /// A table that replaces another shares its mappings: what is in flight in memory that both have need not end.
    files: MemoryFiles,
    slots: Vec<(Slot, FileIdentity)>,
    memory: Arc<HostMemory>,
}

impl Regions {
    /// A table of exactly these regions, instead of this one.
    pub(super) fn replaced_by(&self, regions: impl Iterator<Item = (Slot, File)>) -> Result<Self, MemoryError> {
        let mut all = Self { files: self.files.clone(), ..Self::default() };
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
        let metadata = file.metadata().map_err(|error| MemoryError::BadFile(error.to_string()))?;
        let identity = FileIdentity { device: metadata.dev(), inode: metadata.ino() };
        let mut files = self.files.clone();
        let (mapping, offset) = files.map(file, slot.file_offset, slot.length, Access::Both)?;
        let region = Region::new(slot.guest, slot.length, mapping, offset)?;
        let memory = Arc::new(HostMemory::new(self.memory.regions().into_iter().chain([region]))?);
        let mut slots = self.slots.clone();
        slots.push((slot, identity));
        Ok(Self { files, slots, memory })
    }

    /// This table less one region, which must be named as it was added (the file's part apart).
    pub(super) fn without(&self, slot: Slot) -> Result<Self, MemoryError> {
        let at = self
            .slots
            .iter()
            .position(|(other, _)| {
                other.guest == slot.guest && other.length == slot.length && other.front_end == slot.front_end
            })
            .ok_or(MemoryError::Absent { start: slot.guest, length: slot.length })?;
        let regions = self.memory.regions().into_iter().filter(|region| region.start() != slot.guest);
        let memory = Arc::new(HostMemory::new(regions)?);
        let mut slots = self.slots.clone();
        slots.remove(at);
        Ok(Self { files: self.files.clone(), slots, memory })
    }

    /// The table of the function.
    pub(super) const fn memory(&self) -> &Arc<HostMemory> {
        &self.memory
    }

    /// Where the guest sees what the front end has at `address`.
    pub(super) fn translate(&self, address: FrontEndAddress) -> Option<Iova> {
        self.find(address).map(|(at, _)| at)
    }

    /// Which file the front end has at `address`.
    pub(super) fn file_of(&self, address: FrontEndAddress) -> Option<FileIdentity> {
        self.find(address).map(|(_, identity)| identity)
    }

    fn find(&self, address: FrontEndAddress) -> Option<(Iova, FileIdentity)> {
        self.slots.iter().find_map(|(slot, identity)| {
            let inside = address.0.checked_sub(slot.front_end.0)?;
            (inside < slot.length).then_some((Iova(slot.guest.0 + inside), *identity))
        })
    }
}

#[cfg(test)]
mod tests;
