//! Memory files that a VM shares with us, mapped into the card's address space.
#![expect(unsafe_code, reason = "maps memory that a VM shares with us")]

use std::fmt;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Access, MemoryError, guard};

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
    /// Maps `length` bytes of `file` from `offset` (a multiple of the page size), shared, readable and writable.
    ///
    /// # Errors
    /// When the file is not mappable, or is shorter than that.
    pub fn new(file: &impl AsRawFd, offset: u64, length: u64) -> Result<Self, MemoryError> {
        Self::with_access(file, offset, length, Access::Both)
    }

    /// Maps a file as [`new`](Self::new) does, if need be for reading only.
    ///
    /// # Errors
    /// As for `new`; also when the descriptor does not allow that access.
    pub fn with_access(file: &impl AsRawFd, offset: u64, length: u64, access: Access) -> Result<Self, MemoryError> {
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
                if access == Access::Read { libc::PROT_READ } else { libc::PROT_READ | libc::PROT_WRITE },
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
