//! Aligned memory for requests whose own memory is not aligned enough for direct I/O.
//!
//! Rare (a guest's file system uses whole pages), so it is made only when the first such request comes, and it is little:
//! a longer request goes through its part of it piece by piece.
#![expect(unsafe_code, reason = "copies between the kernel's side of a request and the VM's")]

/// Alignment, bytes: more than any direct I/O wants.
pub(super) const ALIGNMENT_BYTES: u32 = 4096;

/// Bytes in one part.
pub(super) const PART_BYTES: usize = 64 << 10;

/// Requests that can be under way through it.
const PARTS: usize = 4;

/// A few parts of aligned memory.
pub(super) struct Bounce {
    /// Never touched but through `start`: the kernel writes to it.
    _memory: Vec<u8>,
    start: *mut u8,
    free: Vec<u8>,
}

// SAFETY: the pointer is into memory that this value owns.
unsafe impl Send for Bounce {}

impl Bounce {
    pub(super) fn new() -> Self {
        let mut memory = vec![0_u8; PARTS * PART_BYTES + ALIGNMENT_BYTES as usize];
        let slack = memory.as_mut_ptr().align_offset(ALIGNMENT_BYTES as usize);
        // SAFETY: `slack` is less than the alignment, by which the memory is longer than its parts.
        let start = unsafe { memory.as_mut_ptr().add(slack) };
        Self { _memory: memory, start, free: (0..PARTS as u8).collect() }
    }

    /// A part for one request.
    pub(super) fn take(&mut self) -> Option<u8> {
        self.free.pop()
    }

    /// Gives a part back, when its request has ended.
    pub(super) fn give_back(&mut self, part: u8) {
        self.free.push(part);
    }

    /// Where a part is: `PART_BYTES` bytes.
    pub(super) const fn pointer(&self, part: u8) -> *mut u8 {
        assert!((part as usize) < PARTS, "no such part");
        // SAFETY: inside the memory, as just checked.
        unsafe { self.start.add(part as usize * PART_BYTES) }
    }
}

/// Copies `length` bytes that start `from` bytes into the segments to `to`.
///
/// # Safety
/// The segments are those of a request under way, and `to` has room for `length` bytes.
pub(super) unsafe fn gather(segments: &[libc::iovec], from: u64, length: usize, to: *mut u8) {
    pieces(segments, from, length, |memory, offset, bytes| {
        // SAFETY: `pieces` yields ranges of valid segments, whose offsets add up to at most `length`.
        unsafe { std::ptr::copy_nonoverlapping(memory.cast_const(), to.add(offset), bytes) }
    });
}

/// Copies `length` bytes from `from` into the segments, `to` bytes after their start.
///
/// # Safety
/// As for [`gather`], the other way.
pub(super) unsafe fn scatter(from: *const u8, segments: &[libc::iovec], to: u64, length: usize) {
    pieces(segments, to, length, |memory, offset, bytes| {
        // SAFETY: as in `gather`.
        unsafe { std::ptr::copy_nonoverlapping(from.add(offset), memory, bytes) }
    });
}

/// Clears the segments' bytes from `from` on.
///
/// # Safety
/// The segments are those of a request under way.
pub(super) unsafe fn clear(segments: &[libc::iovec], from: u64) {
    pieces(segments, from, usize::MAX, |memory, _, bytes| {
        // SAFETY: a range of a valid segment.
        unsafe { std::ptr::write_bytes(memory, 0, bytes) }
    });
}

/// Yields the ranges of memory in which `length` bytes from `from` on lie: address, offset from `from`, length.
fn pieces(segments: &[libc::iovec], from: u64, length: usize, mut take: impl FnMut(*mut u8, usize, usize)) {
    let (mut skip, mut offset) = (from, 0);
    for segment in segments {
        if skip >= segment.iov_len as u64 {
            skip -= segment.iov_len as u64;
            continue;
        }
        let bytes = (segment.iov_len - skip as usize).min(length - offset);
        if bytes == 0 {
            return;
        }
        take(segment.iov_base.cast::<u8>().wrapping_add(skip as usize), offset, bytes);
        offset += bytes;
        skip = 0;
    }
}
