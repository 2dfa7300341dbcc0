//! A volume in the card's memory: one mapping that all channels share, filled in as it is touched.
//!
//! Requests wait in `submit` and are copied in `poll`, because there the next request is known while one is copied: the
//! first lines of its range are prefetched, so that the memory's latency passes under the copy before. Measured at
//! random over 256 MiB, 4 KiB, on an EPYC core (ns per request, the copy alone; `measure` in `ram/tests.rs` repeats it):
//!
//! | pages | direction | plain | 4 lines ahead | 16 lines ahead | 64 lines ahead |
//! | --- | --- | --- | --- | --- | --- |
//! | 4 KiB | read | 330 | 260 | 252 | 254 |
//! | 2 MiB | read | 300 | 257 | 248 | 229 |
//! | 4 KiB | write | 192 | 171 | 171 | 183 |
//! | 2 MiB | write | 184 | 167 | 166 | 168 |
//!
//! So: 16 lines ahead (64 gain a little on reads but make short requests pay for lines that they never use), and huge
//! pages where the kernel gives them.
//!
//! Overlapping requests may tear as they may on a disk: bytes are copied raw, nothing here ever holds a reference to them,
//! and no decision hangs on what they are.
#![expect(unsafe_code, reason = "copies between a mapping and memory that a VM shares")]

use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{
    BackendError, BlockBackend, BlockChannel, BlockFault, BlockInfo, BlockOperation, BlockRequest, Completion,
    PayloadPlace,
};
use crate::clock::Moment;
use crate::dma::prefetch_read;

/// Requests a channel takes between two polls.
const DEPTH: usize = 512;

/// Logical block size, bytes.
const BLOCK_BYTES: u32 = 512;

/// What discard gives back at the least, bytes: a page of the largest size that the supported processors use as base.
const PAGE_BYTES: u64 = 65536;

/// A huge page, bytes: the mapping starts at a multiple of it, or its first part could not use one.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A volume may grow to this many times its first size: address space is reserved when it is made, because channels hold
/// pointers into it.
const GROWTH: u64 = 16;

/// Bytes that one poll copies before it lets the reactor turn its other lanes; the rest waits for the next turn.
const POLL_BYTES_MAX: u64 = 1 << 20;

/// Bytes that one poll gives back to the kernel at the most: freeing a page costs about a hundredth of clearing it.
const POLL_UNMAP_BYTES_MAX: u64 = 64 << 20;

/// Lines of the next request fetched ahead; see the head.
const LINES_AHEAD: u64 = 16;

/// Bytes in a cache line.
const LINE_BYTES: u64 = 64;

/// What a volume in memory is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RamSettings {
    /// Size, bytes: a multiple of 512, not 0. Memory is taken only as it is touched, two mebibytes at a time where the
    /// kernel gives huge pages.
    pub size_bytes: u64,
    /// Whether the volume must not be written.
    pub read_only: bool,
}

/// The control half.
#[derive(Debug)]
pub struct RamBackend {
    memory: Arc<Memory>,
    read_only: bool,
}

impl RamBackend {
    /// A volume of that size, all zeroes.
    ///
    /// # Errors
    /// `Refused` for a size of 0 or with a part of a block, `Unavailable` when the kernel gives no address space.
    pub fn new(settings: &RamSettings) -> Result<Self, BackendError> {
        check_size(settings.size_bytes)?;
        let memory = Memory::new(settings.size_bytes).map_err(|error| no_memory(settings.size_bytes, &error))?;
        Ok(Self { memory: Arc::new(memory), read_only: settings.read_only })
    }
}

fn check_size(size_bytes: u64) -> Result<(), BackendError> {
    if size_bytes == 0 || !size_bytes.is_multiple_of(u64::from(BLOCK_BYTES)) {
        return Err(BackendError::Refused(format!(
            "a volume in memory cannot have {size_bytes} bytes: give a multiple of {BLOCK_BYTES}, not 0"
        )));
    }
    Ok(())
}

fn no_memory(size_bytes: u64, error: &std::io::Error) -> BackendError {
    BackendError::Unavailable(format!(
        "no memory for a volume of {size_bytes} bytes: {error}; make it smaller, or raise the process's limits \
         (RLIMIT_AS, vm.overcommit_memory)"
    ))
}

impl BlockBackend for RamBackend {
    fn info(&self) -> BlockInfo {
        BlockInfo {
            size_bytes: self.memory.size_bytes.load(Ordering::Acquire),
            block_bytes: BLOCK_BYTES,
            physical_block_bytes: 4096,
            read_only: self.read_only,
            volatile_cache: false,
            discard: true,
            write_zeroes: true,
            discard_alignment_bytes: PAGE_BYTES as u32,
            payload: PayloadPlace::InPlace,
            channels_max: usize::MAX,
        }
    }

    fn open_channel(&self) -> Result<Box<dyn BlockChannel>, BackendError> {
        Ok(Box::new(RamChannel {
            memory: Arc::clone(&self.memory),
            waiting: Vec::with_capacity(DEPTH),
            next: 0,
            zeroed_bytes: 0,
        }))
    }

    /// Grows to at most 16 times the first size. What a shrunk volume held beyond its end is gone.
    fn resize(&self, size_bytes: u64) -> Result<u64, BackendError> {
        check_size(size_bytes)?;
        if size_bytes > self.memory.reserved_bytes {
            return Err(BackendError::Refused(format!(
                "a volume in memory grows to at most {GROWTH} times the size it was made with: {size_bytes} bytes is more \
                 than {}",
                self.memory.reserved_bytes
            )));
        }
        self.memory.resize(size_bytes).map_err(|error| no_memory(size_bytes, &error))?;
        Ok(size_bytes)
    }
}

/// The bytes of the volume. Readable and writable up to the largest size there ever was, so that a request that races
/// with shrinking finds memory.
#[derive(Debug)]
struct Memory {
    /// What was mapped, for unmapping.
    mapping: NonNull<u8>,
    mapping_bytes: usize,
    /// Where the volume starts.
    start: NonNull<u8>,
    /// Address space from `start`.
    reserved_bytes: u64,
    /// How much of it may be touched; only grows.
    accessible_bytes: AtomicU64,
    /// Size of the volume; at most `accessible_bytes`.
    size_bytes: AtomicU64,
    resizing: std::sync::Mutex<()>,
}

// SAFETY: the mapping stays until the last owner is gone; its bytes are touched by raw copies only.
unsafe impl Send for Memory {}
// SAFETY: as above; everything else is atomic or under the lock.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(size_bytes: u64) -> std::io::Result<Self> {
        let reserve = |bytes: u64| {
            let length = usize::try_from(bytes).ok()?.checked_next_multiple_of(HUGE_PAGE_BYTES)?;
            let length = length.checked_add(HUGE_PAGE_BYTES)?;
            // SAFETY: an inaccessible private mapping at an address of the kernel's choice touches no existing memory.
            let start = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    length,
                    libc::PROT_NONE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                    -1,
                    0,
                )
            };
            if start == libc::MAP_FAILED { None } else { Some((NonNull::new(start.cast::<u8>())?, length, bytes)) }
        };
        let failed = std::io::Error::last_os_error;
        // Where address space is scarce (RLIMIT_AS), a volume that cannot grow is better than none.
        let (mapping, mapping_bytes, reserved_bytes) =
            size_bytes.checked_mul(GROWTH).and_then(reserve).or_else(|| reserve(size_bytes)).ok_or_else(failed)?;
        let slack = mapping.as_ptr().align_offset(HUGE_PAGE_BYTES);
        // SAFETY: `slack` is less than a huge page, and the mapping has one more than the volume needs.
        let start = unsafe { mapping.add(slack) };
        let memory = Self {
            mapping,
            mapping_bytes,
            start,
            reserved_bytes,
            accessible_bytes: AtomicU64::new(0),
            size_bytes: AtomicU64::new(0),
            resizing: std::sync::Mutex::new(()),
        };
        // Both are advice: without huge pages the volume is a little slower, and a core dump a lot larger.
        for advice in [libc::MADV_HUGEPAGE, libc::MADV_DONTDUMP] {
            // SAFETY: advice about a mapping of ours, which changes no content.
            unsafe { libc::madvise(mapping.as_ptr().cast(), mapping_bytes, advice) };
        }
        memory.resize(size_bytes)?;
        Ok(memory)
    }

    /// `size_bytes` is at most `reserved_bytes`.
    fn resize(&self, size_bytes: u64) -> std::io::Result<()> {
        let _only_one = self.resizing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let old_bytes = self.size_bytes.load(Ordering::Relaxed);
        if size_bytes > self.accessible_bytes.load(Ordering::Relaxed) {
            let length = (size_bytes as usize).next_multiple_of(HUGE_PAGE_BYTES);
            // SAFETY: the range lies in the mapping (`reserved_bytes` rounded up to huge pages does), is ours alone, and
            // only gains access.
            let result =
                unsafe { libc::mprotect(self.start.as_ptr().cast(), length, libc::PROT_READ | libc::PROT_WRITE) };
            if result != 0 {
                return Err(std::io::Error::last_os_error());
            }
            // Release: whoever sees the length may touch the memory.
            self.accessible_bytes.store(size_bytes, Ordering::Release);
        }
        self.size_bytes.store(size_bytes, Ordering::Release);
        if size_bytes < old_bytes {
            self.zero(size_bytes, old_bytes - size_bytes, true);
        }
        Ok(())
    }

    /// The range's address, or `None` if a part of it was never in the volume.
    #[inline]
    fn range(&self, offset: u64, length: u64) -> Option<*mut u8> {
        let end = offset.checked_add(length)?;
        // Acquire: pairs with the release in `resize`.
        (end <= self.accessible_bytes.load(Ordering::Acquire))
            .then(|| self.start.as_ptr().wrapping_add(offset as usize))
    }

    /// Clears a range that `range` allows; with `unmap`, whole pages go back to the kernel.
    fn zero(&self, offset: u64, length: u64, unmap: bool) {
        let end = offset + length;
        let (first_page, last_page) = (offset.next_multiple_of(PAGE_BYTES), end / PAGE_BYTES * PAGE_BYTES);
        let fill = |from: u64, to: u64| {
            // SAFETY: inside the range, which is accessible; no reference to the bytes exists.
            unsafe { std::ptr::write_bytes(self.start.as_ptr().add(from as usize), 0, (to - from) as usize) };
        };
        if !unmap || first_page >= last_page {
            return fill(offset, end);
        }
        fill(offset, first_page);
        // SAFETY: whole pages inside the accessible part of our own private anonymous mapping, which read as zeroes when
        // they are touched again.
        let result = unsafe {
            libc::madvise(
                self.start.as_ptr().add(first_page as usize).cast(),
                (last_page - first_page) as usize,
                libc::MADV_DONTNEED,
            )
        };
        if result != 0 {
            fill(first_page, last_page);
        }
        fill(last_page, end);
    }

    /// Starts loading the first lines of a range, and does nothing else: an address outside the volume does no harm.
    #[inline]
    fn prefetch(&self, request: &BlockRequest) {
        if !matches!(request.operation, BlockOperation::Read | BlockOperation::Write) {
            return;
        }
        let start = self.start.as_ptr().wrapping_add(request.offset as usize);
        for line in 0..LINES_AHEAD.min(request.length.div_ceil(LINE_BYTES)) {
            prefetch_read(start.wrapping_add((line * LINE_BYTES) as usize));
        }
    }

    /// Copies between the volume and the request's segments.
    #[inline]
    fn copy(&self, request: &BlockRequest) -> Result<(), BlockFault> {
        let mut at = self.range(request.offset, request.length).ok_or(BlockFault::Io)?;
        let mut left = request.length as usize;
        for segment in request.segments.as_slice() {
            let length = segment.iov_len.min(left);
            let memory = segment.iov_base.cast::<u8>();
            // SAFETY: `at` and the `left` bytes after it are in the accessible range that `range` checked. The segment is
            // valid until this request completes (`Segments::new`), and is a VM's or the card's memory, which never
            // overlaps this private mapping.
            unsafe {
                if request.operation == BlockOperation::Read {
                    std::ptr::copy_nonoverlapping(at.cast_const(), memory, length);
                } else {
                    std::ptr::copy_nonoverlapping(memory.cast_const(), at, length);
                }
                at = at.add(length);
            }
            left -= length;
        }
        debug_assert_eq!(left, 0, "the segments hold less than the request says");
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: made by `new` with this start and length; the last owner is going.
        unsafe { libc::munmap(self.mapping.as_ptr().cast(), self.mapping_bytes) };
    }
}

struct RamChannel {
    memory: Arc<Memory>,
    /// Taken over, in order; those before `next` are done.
    waiting: Vec<BlockRequest>,
    next: usize,
    /// How much of the request at `next` has been cleared, if it is a large one.
    zeroed_bytes: u64,
}

impl RamChannel {
    /// Clears a slice of a range that may be huge. `None`: there is more to do.
    #[cold]
    fn zero_slice(&mut self, request: &BlockRequest, unmap: bool) -> Option<Result<(), BlockFault>> {
        if self.memory.range(request.offset, request.length).is_none() {
            return Some(Err(BlockFault::Io));
        }
        let slice_bytes = if unmap { POLL_UNMAP_BYTES_MAX } else { POLL_BYTES_MAX };
        let length = (request.length - self.zeroed_bytes).min(slice_bytes);
        self.memory.zero(request.offset + self.zeroed_bytes, length, unmap);
        self.zeroed_bytes += length;
        if self.zeroed_bytes < request.length {
            return None;
        }
        self.zeroed_bytes = 0;
        Some(Ok(()))
    }
}

impl BlockChannel for RamChannel {
    #[inline]
    fn submit(&mut self, request: BlockRequest) -> Result<(), BlockRequest> {
        if self.waiting.len() == self.waiting.capacity() {
            return Err(request);
        }
        if self.waiting.is_empty() {
            // Nothing comes before it in `poll`; what the lane does until then covers a part of the latency.
            self.memory.prefetch(&request);
        }
        self.waiting.push(request);
        Ok(())
    }

    fn poll(&mut self, _now: Moment, completions: &mut Vec<Completion>) {
        let mut bytes = 0;
        while bytes < POLL_BYTES_MAX && self.next < self.waiting.len() {
            if let Some(following) = self.waiting.get(self.next + 1) {
                self.memory.prefetch(following);
            }
            let request = self.waiting[self.next];
            let result = match request.operation {
                BlockOperation::Read | BlockOperation::Write => {
                    bytes += request.length;
                    self.memory.copy(&request)
                }
                BlockOperation::Flush => Ok(()),
                operation @ (BlockOperation::Discard | BlockOperation::WriteZeroes { .. }) => {
                    // A discarded range may read as anything, so zeroes do, and the space is freed alike.
                    let unmap = operation != BlockOperation::WriteZeroes { unmap: false };
                    bytes += request.length.min(POLL_BYTES_MAX);
                    match self.zero_slice(&request, unmap) {
                        Some(result) => result,
                        None => return,
                    }
                }
            };
            self.next += 1;
            completions.push(Completion { tag: request.tag, result });
        }
        if self.next == self.waiting.len() {
            self.waiting.clear();
            self.next = 0;
        }
    }

    #[inline]
    fn in_flight(&self) -> usize {
        self.waiting.len() - self.next
    }

    fn wake_fd(&self) -> Option<RawFd> {
        None
    }

    /// What one poll left over (large copies, large ranges of zeroes) is due at once.
    #[inline]
    fn deadline(&self) -> Option<Moment> {
        (!self.waiting.is_empty()).then_some(Moment(0))
    }
}

#[cfg(test)]
mod tests;
