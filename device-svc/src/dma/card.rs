//! The card's own memory of one lane: shadow descriptors, headers, status bytes, staged used entries, copied payload.
//!
//! One mapping per lane rather than many boxes, because a DMA engine wants registered memory and copies into it while the
//! lane runs: so nothing here hands out a reference, values are copied in and out, and a lane trusts a range only after
//! the engine said that its copy has landed. Pages are taken when first touched.
#![expect(unsafe_code, reason = "a DMA engine writes this memory behind the compiler's back")]

use std::ptr::NonNull;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::address::CardAddress;

/// Card memory of fixed size, zeroed.
#[derive(Debug)]
pub struct CardMemory {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping belongs to this value alone and stays at its address when the value moves.
unsafe impl Send for CardMemory {}

impl CardMemory {
    /// Maps `length` bytes.
    ///
    /// # Errors
    /// When the kernel has no memory for us.
    pub fn new(length: u32) -> std::io::Result<Self> {
        let length = (length as usize).next_multiple_of(4096).max(4096);
        // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(|| std::io::Error::other("mapped at address 0"))?;
        Ok(Self { start, length })
    }

    /// Size, bytes.
    #[inline]
    #[must_use]
    pub const fn len(&self) -> usize {
        self.length
    }

    /// Never: card memory has at least a page.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// The address of a range, for an engine to copy to or from. Panics if the range is outside: a broken invariant.
    #[inline]
    #[must_use]
    pub const fn pointer(&self, at: CardAddress, length: usize) -> *mut u8 {
        let offset = at.0 as usize;
        // Both are far below the size of the address space: the sum does not wrap.
        assert!(length <= u32::MAX as usize && offset + length <= self.length, "a range outside card memory");
        // SAFETY: the range is inside the mapping, as just checked.
        unsafe { self.start.as_ptr().add(offset) }
    }

    /// Copies a value out. Panics if it is outside.
    #[inline]
    #[must_use]
    pub const fn get<T: FromBytes + Copy>(&self, at: CardAddress) -> T {
        let from = self.pointer(at, size_of::<T>()).cast::<T>();
        // SAFETY: the range is inside the mapping and initialised; every bit pattern is a `T`; alignment is not assumed.
        unsafe { from.read_unaligned() }
    }

    /// Copies out, one by one, `count` values that lie one behind the other. Panics if they are not all inside.
    #[inline]
    pub fn values<T: FromBytes + Copy>(&self, at: CardAddress, count: u16) -> impl Iterator<Item = T> {
        let from = self.pointer(at, usize::from(count) * size_of::<T>()).cast::<T>();
        // SAFETY: as for `get`; the whole range was checked, and `self` is borrowed as long as the values are asked for.
        (0..usize::from(count)).map(move |index| unsafe { from.add(index).read_unaligned() })
    }

    /// Copies a value in. Panics if it is outside.
    #[inline]
    pub const fn put<T: IntoBytes + Immutable + Copy>(&self, at: CardAddress, value: T) {
        let to = self.pointer(at, size_of::<T>()).cast::<T>();
        // SAFETY: the range is inside the mapping; no reference to it exists, because none is ever handed out.
        unsafe { to.write_unaligned(value) }
    }

    /// Copies bytes out. Panics if the range is outside.
    #[inline]
    pub fn copy_out(&self, at: CardAddress, to: &mut [u8]) {
        let from = self.pointer(at, to.len());
        // SAFETY: the source is inside the mapping, the destination is a slice of the same length elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
    }

    /// Copies bytes in. Panics if the range is outside.
    #[inline]
    pub fn copy_in(&self, at: CardAddress, from: &[u8]) {
        let to = self.pointer(at, from.len());
        // SAFETY: as in `copy_out`, the other way.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }
}

impl Drop for CardMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this start and length, and nobody else knows it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}
