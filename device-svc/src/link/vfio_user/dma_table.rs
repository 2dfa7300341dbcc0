//! The memory that a VMM maps for the function's DMA, range by range.
//!
//! Ranges without a descriptor (a guest's ROMs, or all of its memory where the VMM shares none) are entered too: the VMM can be asked
//! for their bytes.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;

use crate::address::Iova;
use crate::dma::{Access, DistantMemory, HostMemory, MemoryError, MemoryFiles, PAGE_BYTES, Region, Removed};

/// The ranges, and the files that they are parts of.
#[derive(Debug)]
#[cfg_attr(test, derive(Default))]
pub(super) struct DmaTable {
    memory: Arc<HostMemory>,
    files: MemoryFiles,
}

/// Why a map or unmap was refused.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(super) struct DmaRefusal(#[from] MemoryError);

impl DmaRefusal {
    /// The reply's error number.
    pub(super) const fn errno(&self) -> Errno {
        match self.0 {
            MemoryError::BadRange { .. } | MemoryError::Cut { .. } | MemoryError::BadFile(_) => Errno::EINVAL,
            MemoryError::Absent { .. } => Errno::ENOENT,
            MemoryError::Overlap(_) => Errno::EEXIST,
            MemoryError::TooMany(_) => Errno::ENOSPC,
        }
    }
}

impl DmaTable {
    /// A table without ranges; those that come without a descriptor are reached through `distant`.
    pub(super) fn new(distant: Arc<dyn DistantMemory>) -> Self {
        Self { memory: Arc::new(HostMemory::with_distant(distant)), files: MemoryFiles::default() }
    }

    /// The function's memory.
    pub(super) const fn memory(&self) -> &Arc<HostMemory> {
        &self.memory
    }

    /// Adds a range: with a descriptor, `length` bytes of its file from `offset`.
    pub(super) fn map(
        &mut self,
        start: Iova,
        length: u64,
        access: Access,
        offset: u64,
        fd: Option<&OwnedFd>,
    ) -> Result<(), DmaRefusal> {
        if !length.is_multiple_of(PAGE_BYTES) || !offset.is_multiple_of(PAGE_BYTES) {
            return Err(MemoryError::BadRange { start, length }.into());
        }
        // Checked before anything is mapped for it.
        let mut region = Region::distant(start, length)?;
        if let Some(fd) = fd {
            let (mapping, inside) = self.files.map(fd, offset, length, access)?;
            region = Region::new(start, length, mapping, inside)?;
        }
        Ok(self.memory.insert(region.with_access(access))?)
    }

    /// Takes away every range inside this one. A VMM that sweeps an address space names pieces of it, whatever is mapped there;
    /// a piece that would cut a range is refused.
    pub(super) fn unmap(&mut self, start: Iova, length: u64) -> Result<Removed, DmaRefusal> {
        Ok(self.memory.remove(start, length)?)
    }
}

#[cfg(test)]
mod tests;
