//! The memory that a VMM maps for the function's DMA, range by range.
//!
//! Ranges without a descriptor (a guest's ROMs) are remembered, so that what overlaps them is refused and what takes them away
//! finds them; nothing resolves to them.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;

use crate::address::Iova;
use crate::dma::{HostMemory, Mapping, MemoryError, Region};

/// Ranges at once; the default of the protocol's `max_dma_maps`.
pub(super) const MAPS_MAX: usize = 65535;
/// What addresses, lengths and offsets are multiples of.
pub(super) const PAGE_BYTES: u64 = 4096;

/// The ranges.
#[derive(Debug, Default)]
pub(super) struct DmaTable {
    /// Start and length of all.
    ranges: BTreeMap<u64, u64>,
    memory: Arc<HostMemory>,
}

/// Why a map or unmap was refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum DmaRefusal {
    #[error("{length:#x} bytes at {start} are empty, wrap, or are no whole pages")]
    BadRange { start: Iova, length: u64 },
    #[error("{length:#x} bytes at {start} overlap what is mapped")]
    Overlap { start: Iova, length: u64 },
    #[error("{length:#x} bytes at {start} are a part of what was mapped as one")]
    Cut { start: Iova, length: u64 },
    #[error("more than {MAPS_MAX} ranges")]
    TooMany,
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl DmaRefusal {
    /// The reply's error number.
    pub(super) const fn errno(&self) -> Errno {
        match self {
            Self::BadRange { .. } | Self::Cut { .. } | Self::Memory(_) => Errno::EINVAL,
            Self::Overlap { .. } => Errno::EEXIST,
            Self::TooMany => Errno::ENOSPC,
        }
    }
}

impl DmaTable {
    /// The function's memory.
    pub(super) const fn memory(&self) -> &Arc<HostMemory> {
        &self.memory
    }

    /// Adds a range: with a descriptor, `length` bytes of its file from `offset`. Returns whether the function's memory is
    /// another now.
    pub(super) fn map(
        &mut self,
        start: Iova,
        length: u64,
        offset: u64,
        fd: Option<&OwnedFd>,
    ) -> Result<bool, DmaRefusal> {
        let is_whole = start.0.is_multiple_of(PAGE_BYTES) && length.is_multiple_of(PAGE_BYTES);
        let end = start.0.checked_add(length).filter(|_| length > 0 && is_whole);
        let end = end.ok_or(DmaRefusal::BadRange { start, length })?;
        let before = self.ranges.range(..end).next_back();
        if before.is_some_and(|(other, bytes)| other + bytes > start.0) {
            return Err(DmaRefusal::Overlap { start, length });
        }
        if self.ranges.len() >= MAPS_MAX {
            return Err(DmaRefusal::TooMany);
        }
        if let Some(fd) = fd {
            let mapping = Arc::new(Mapping::new(fd, offset, length)?);
            self.memory = Arc::new(self.memory.with(Region::new(start, length, mapping, 0)?)?);
        }
        self.ranges.insert(start.0, length);
        Ok(fd.is_some())
    }

    /// Takes away every range inside this one. A VMM that sweeps an address space names pieces of it, whatever is mapped there;
    /// a piece that would cut a range is refused. Returns whether the function's memory is another now.
    pub(super) fn unmap(&mut self, start: Iova, length: u64) -> Result<bool, DmaRefusal> {
        let end = start.0.checked_add(length).filter(|_| length > 0).ok_or(DmaRefusal::BadRange { start, length })?;
        let inside: Vec<(u64, u64)> = self.ranges.range(start.0..end).map(|(at, bytes)| (*at, *bytes)).collect();
        let before = self.ranges.range(..start.0).next_back();
        let is_cut = before.is_some_and(|(at, bytes)| at + bytes > start.0);
        if is_cut || inside.last().is_some_and(|(at, bytes)| at + bytes > end) {
            return Err(DmaRefusal::Cut { start, length });
        }
        let mut changed = false;
        for (at, bytes) in inside {
            self.ranges.remove(&at);
            // One without a descriptor is not in there.
            if let Ok(memory) = self.memory.without(Iova(at), bytes) {
                self.memory = Arc::new(memory);
                changed = true;
            }
        }
        Ok(changed)
    }
}

#[cfg(test)]
mod tests;
