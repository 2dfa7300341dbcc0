//! The memory files of one front end, each mapped once.
//!
//! A front end names ranges, and behind a guest's IOMMU there are tens of thousands in one file. Descriptors that come with them
//! are told apart by device and inode, so the file is mapped whole with the first of them.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Weak};

use nix::sys::stat::{FileStat, SFlag, fstat};

use super::{Access, Mapping, MemoryError};

/// Mappings that one front end may have at once, and their bytes: the card's address space, and the table of all mappings, are shared
/// by all functions.
const MAPPINGS_MAX: usize = 512;
const MAPPED_BYTES_MAX: u64 = 16 << 40;

/// A file: device, inode, and whether it is mapped for writing too.
type Identity = (u64, u64, bool);

/// Files that are mapped. A mapping lives as long as somebody uses it.
#[derive(Clone, Debug, Default)]
pub struct MemoryFiles {
    mappings: HashMap<Identity, Weak<Mapping>>,
    /// Those too that are no file's last one any more.
    all: Vec<Weak<Mapping>>,
}

impl MemoryFiles {
    /// A mapping that holds `length` bytes of the file from `offset` (a multiple of the page size), and where they start in it.
    ///
    /// # Errors
    /// When the file is not mappable for this access, or is shorter than that.
    pub fn map(
        &mut self,
        file: impl AsFd,
        offset: u64,
        length: u64,
        access: Access,
    ) -> Result<(Arc<Mapping>, usize), MemoryError> {
        let bad = |why: String| MemoryError::BadFile(why);
        let file = file.as_fd();
        let stat = fstat(file).map_err(|error| bad(error.to_string()))?;
        let end = offset.checked_add(length).ok_or_else(|| bad("offset and length wrap".to_owned()))?;
        // What may be written is mapped as what may be both: processors have no memory that can only be written.
        let access = if access.allows(super::Direction::ToHost) { Access::Both } else { Access::Read };
        if !is_regular(&stat) {
            // A device's memory has no size that could be asked for, and two inodes may be one memory: mapped as it is named.
            return Ok((self.make(file, offset, length, access)?, 0));
        }
        let identity = (stat.st_dev, stat.st_ino, access == Access::Both);
        let inside = usize::try_from(offset).map_err(|_| bad("offset too large".to_owned()))?;
        let known = self.mappings.get(&identity).and_then(Weak::upgrade);
        if let Some(mapping) = known.filter(|mapping| end <= mapping.len() as u64 && !mapping.is_lost()) {
            return Ok((mapping, inside));
        }
        let has = stat.st_size as u64;
        if end > has {
            return Err(bad(format!("it has {has} bytes, the region needs {end}")));
        }
        let mapping = self.make(file, 0, has, access)?;
        self.mappings.retain(|_, mapping| mapping.strong_count() > 0);
        self.mappings.insert(identity, Arc::downgrade(&mapping));
        Ok((mapping, inside))
    }

    fn make(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        length: u64,
        access: Access,
    ) -> Result<Arc<Mapping>, MemoryError> {
        let mut mapped = 0;
        self.all.retain(|mapping| {
            let alive = mapping.upgrade();
            mapped += alive.as_ref().map_or(0, |mapping| mapping.len() as u64);
            alive.is_some()
        });
        if self.all.len() >= MAPPINGS_MAX {
            return Err(MemoryError::TooMany(MAPPINGS_MAX));
        }
        if length > MAPPED_BYTES_MAX.saturating_sub(mapped) {
            return Err(MemoryError::BadFile(format!("with it, {mapped} bytes and {length} more would be mapped")));
        }
        let mapping = Arc::new(Mapping::with_access(&file.as_raw_fd(), offset, length, access)?);
        self.all.push(Arc::downgrade(&mapping));
        Ok(mapping)
    }
}

const fn is_regular(stat: &FileStat) -> bool {
    stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits()
}

#[cfg(test)]
mod tests;
