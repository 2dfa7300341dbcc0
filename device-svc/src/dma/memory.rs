//! The table of a function's host memory: IOVA → bytes.
//!
//! A table never changes; the link makes a new one and hands it to every lane, and what went away is unmapped when the
//! last lane has let go of the old table. So a lookup takes no lock.
#![expect(unsafe_code, reason = "maps memory that a VM shares with us")]

use std::fmt;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::guard;
use crate::address::Iova;

/// Why host memory was refused: always the front end's fault.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The range is empty, wraps, or is not aligned to pages.
    #[error("memory region of {length:#x} bytes at {start} is empty, wraps or is not page-aligned")]
    BadRange {
        /// Where it starts.
        start: Iova,
        /// Its length, bytes.
        length: u64,
    },
    /// Two regions overlap.
    #[error("memory region at {0} overlaps another")]
    Overlap(Iova),
    /// The descriptor is not a file that can be mapped, or is shorter than the region says.
    #[error("the memory file cannot be mapped: {0}")]
    BadFile(String),
    /// More regions than a table may have.
    #[error("more than {0} memory regions")]
    TooMany(usize),
    /// No such region to remove.
    #[error("no memory region of {length:#x} bytes at {start}")]
    Absent {
        /// Where it should start.
        start: Iova,
        /// Its length, bytes.
        length: u64,
    },
}

/// A shared mapping of a part of a file descriptor that a VMM gave us. Unmapped when dropped.
///
/// The file can be truncated under us; then [`is_lost`](Self::is_lost) turns true and the range reads as zeroes instead
/// of ending the process (see `guard.rs`).
pub struct Mapping {
    start: NonNull<u8>,
    length: usize,
    lost: &'static AtomicBool,
    slot: guard::Slot,
}

// SAFETY: the mapping is shared memory; everybody who touches it does so through raw copies and atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({:p}, {:#x} bytes)", self.start, self.length)
    }
}

impl Mapping {
    /// Maps `length` bytes of `file` from `offset` (both multiples of the page size), shared, readable and writable.
    ///
    /// # Errors
    /// When the file is not mappable, or is shorter than that.
    pub fn new(file: &impl AsRawFd, offset: u64, length: u64) -> Result<Self, MemoryError> {
        let fd = file.as_raw_fd();
        let bad = |what: String| MemoryError::BadFile(what);
        // SAFETY: `stat` is plain data that the kernel fills in.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: `stat` is a valid place for the result, `fd` is open for as long as `file` is borrowed.
        if unsafe { libc::fstat(fd, &raw mut stat) } != 0 {
            return Err(bad(std::io::Error::last_os_error().to_string()));
        }
        let end = offset.checked_add(length).ok_or_else(|| bad("offset and length wrap".to_owned()))?;
        // Only regular files (memfd, tmpfs, hugetlbfs) tell their size; a device (DAX) is taken at its word.
        match stat.st_mode & libc::S_IFMT {
            libc::S_IFREG if end > stat.st_size as u64 => {
                return Err(bad(format!("it has {} bytes, the region needs {end}", stat.st_size)));
            }
            libc::S_IFREG | libc::S_IFCHR => {}
            _ => return Err(bad("it is not a memory file".to_owned())),
        }
        let length_bytes = usize::try_from(length).map_err(|_| bad("too long".to_owned()))?;
        let file_offset = libc::off_t::try_from(offset).map_err(|_| bad("offset too large".to_owned()))?;
        // SAFETY: a new shared mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd,
                file_offset,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(bad(std::io::Error::last_os_error().to_string()));
        }
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(|| bad("mapped at address 0".to_owned()))?;
        let Some((slot, lost)) = guard::register(start.as_ptr() as usize, length_bytes) else {
            // SAFETY: the mapping was just made and nobody knows it.
            unsafe { libc::munmap(start.as_ptr().cast(), length_bytes) };
            return Err(MemoryError::TooMany(guard::SLOTS));
        };
        // A guest's memory has no business in our core dumps, and they would be huge.
        // SAFETY: advice about a mapping of ours.
        unsafe { libc::madvise(start.as_ptr().cast(), length_bytes, libc::MADV_DONTDUMP) };
        Ok(Self { start, length: length_bytes, lost, slot })
    }

    /// Where the mapping is in our address space.
    #[inline]
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Its length, bytes.
    #[inline]
    #[must_use]
    pub const fn len(&self) -> usize {
        self.length
    }

    /// Never: an empty mapping cannot be made.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// Whether the file was cut short under us, so that its content is gone.
    #[inline]
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        guard::release(self.slot);
        // SAFETY: the mapping was made by `new`; regions hold an `Arc` of it, so nobody uses it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// One run of host memory.
#[derive(Clone, Debug)]
pub struct Region {
    start: Iova,
    length: u64,
    mapping: Arc<Mapping>,
    offset: usize,
}

impl Region {
    /// `length` bytes of host memory at `start` are the bytes of `mapping` from `offset`.
    ///
    /// # Errors
    /// When the range is empty or wraps, or the mapping does not hold it.
    pub fn new(start: Iova, length: u64, mapping: Arc<Mapping>, offset: usize) -> Result<Self, MemoryError> {
        let bad = MemoryError::BadRange { start, length };
        if length == 0 || start.checked_add(length).is_none() {
            return Err(bad);
        }
        match (offset as u64).checked_add(length) {
            Some(end) if end <= mapping.len() as u64 => Ok(Self { start, length, mapping, offset }),
            _ => Err(bad),
        }
    }

    /// Where the region starts.
    #[must_use]
    pub const fn start(&self) -> Iova {
        self.start
    }

    /// Its length, bytes.
    #[must_use]
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// The mapping behind it.
    #[must_use]
    pub const fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }
}

/// The table: regions sorted by address, none overlapping.
#[derive(Clone, Debug, Default)]
pub struct HostMemory {
    regions: Vec<Region>,
}

impl HostMemory {
    /// A table of these regions, in any order.
    ///
    /// # Errors
    /// When two overlap.
    pub fn new(mut regions: Vec<Region>) -> Result<Self, MemoryError> {
        regions.sort_by_key(|region| region.start);
        for pair in regions.windows(2) {
            if pair[0].start.0 + pair[0].length > pair[1].start.0 {
                return Err(MemoryError::Overlap(pair[1].start));
            }
        }
        Ok(Self { regions })
    }

    /// This table and one region more.
    ///
    /// # Errors
    /// When it overlaps another.
    pub fn with(&self, region: Region) -> Result<Self, MemoryError> {
        let mut regions = self.regions.clone();
        regions.push(region);
        Self::new(regions)
    }

    /// This table less the region of exactly this range.
    ///
    /// # Errors
    /// When there is none.
    pub fn without(&self, start: Iova, length: u64) -> Result<Self, MemoryError> {
        let at = self
            .regions
            .iter()
            .position(|region| region.start == start && region.length == length)
            .ok_or(MemoryError::Absent { start, length })?;
        let mut regions = self.regions.clone();
        regions.remove(at);
        Ok(Self { regions })
    }

    /// The regions, sorted by address.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Whether any memory file was cut short under us.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.regions.iter().any(|region| region.mapping.is_lost())
    }

    /// Whether every byte of the range lies in a region.
    #[must_use]
    pub fn covers(&self, start: Iova, length: u64) -> bool {
        let (mut at, mut left) = (start, length);
        while left > 0 {
            match self.resolve(at, left) {
                Some((_, run)) => {
                    left -= run;
                    at = Iova(at.0.wrapping_add(run));
                }
                None => return false,
            }
        }
        true
    }

    /// The runs of our address space that a range is made of, up to the first hole.
    pub fn runs(&self, address: Iova, length: u32) -> impl Iterator<Item = (*mut u8, u64)> + '_ {
        let (mut at, mut left) = (address, u64::from(length));
        std::iter::from_fn(move || {
            if left == 0 {
                return None;
            }
            let (pointer, run) = self.resolve(at, left)?;
            left -= run;
            at = Iova(at.0.wrapping_add(run));
            Some((pointer, run))
        })
    }

    /// Where the bytes at `address` are in our address space, and how many of `length` follow there in one run (regions
    /// that touch in IOVA space need not touch in ours).
    #[inline]
    #[must_use]
    pub fn resolve(&self, address: Iova, length: u64) -> Option<(*mut u8, u64)> {
        let (start, bytes, base) = self.region_at(address)?;
        let inside = address.0 - start.0;
        Some((base.wrapping_add(inside as usize), (bytes - inside).min(length)))
    }

    /// The region that `address` lies in: its start, its length, and where it is in our address space.
    #[inline]
    #[must_use]
    pub fn region_at(&self, address: Iova) -> Option<(Iova, u64, *mut u8)> {
        // A VM has one to three regions over vhost-user; a linear look at that many beats a search.
        let region = if self.regions.len() <= 4 {
            self.regions.iter().find(|region| address.0.wrapping_sub(region.start.0) < region.length)?
        } else {
            let after = self.regions.partition_point(|region| region.start <= address);
            let region = &self.regions[after.checked_sub(1)?];
            (address.0 - region.start.0 < region.length).then_some(region)?
        };
        // `Region::new` checked that `offset + length` lies in the mapping.
        Some((region.start, region.length, region.mapping.as_ptr().wrapping_add(region.offset)))
    }
}
