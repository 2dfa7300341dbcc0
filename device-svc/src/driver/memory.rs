//! A guest's memory: one memory file, mapped once, from which rings and buffers are taken.
//!
//! Both sides write to it at any time, so bytes are copied in and out, and what orders them are atomics.
#![expect(unsafe_code, reason = "memory that a device shares")]

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::address::Iova;
use crate::dma::{Mapping, MemoryError};

/// A guest's memory. Guest-physical addresses start at `base`.
#[derive(Debug)]
pub struct GuestMemory {
    file: File,
    mapping: Mapping,
    base: u64,
    next: AtomicU64,
}

impl GuestMemory {
    /// `bytes` (a multiple of 4096) of zeroed memory that the guest sees from `base` on.
    ///
    /// # Errors
    /// When the system has no memory for us.
    pub fn new(base: u64, bytes: u64) -> Result<Self, MemoryError> {
        let bad = |error: nix::Error| MemoryError::BadFile(error.to_string());
        let fd: OwnedFd = memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).map_err(bad)?;
        let length = i64::try_from(bytes).map_err(|_| MemoryError::BadRange { start: Iova(base), length: bytes })?;
        nix::unistd::ftruncate(&fd, length).map_err(bad)?;
        let file = File::from(fd);
        let mapping = Mapping::new(&file, 0, bytes)?;
        Ok(Self { file, mapping, base, next: AtomicU64::new(0) })
    }

    /// The memory file.
    #[must_use]
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// The file's descriptor.
    #[must_use]
    pub fn fd(&self) -> i32 {
        self.file.as_raw_fd()
    }

    /// The first guest-physical address.
    #[must_use]
    pub const fn base(&self) -> Iova {
        Iova(self.base)
    }

    /// Size, bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// Never.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// Where it is mapped in this process: what vhost-user calls the user address.
    #[must_use]
    pub fn user_address(&self) -> u64 {
        self.mapping.as_ptr() as u64
    }

    /// Takes `bytes`, aligned. Memory is given back only as a whole.
    ///
    /// # Panics
    /// When the memory is used up: its size is the caller's choice.
    #[must_use]
    pub fn take(&self, bytes: u64, alignment: u64) -> Iova {
        let mut at = 0;
        let taken = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
            at = next.next_multiple_of(alignment);
            (at + bytes <= self.len()).then_some(at + bytes)
        });
        assert!(taken.is_ok(), "the guest's memory of {} bytes is used up", self.len());
        Iova(self.base + at)
    }

    /// The address in this process of a range of the guest's memory. Panics if it is outside.
    #[inline]
    #[must_use]
    pub fn pointer(&self, at: Iova, bytes: usize) -> *mut u8 {
        let offset = at.0.wrapping_sub(self.base);
        assert!(offset <= self.len() && bytes as u64 <= self.len() - offset, "{at} is outside the guest's memory");
        // SAFETY: the range is inside the mapping, as just checked.
        unsafe { self.mapping.as_ptr().add(offset as usize) }
    }

    /// Copies a value out.
    #[inline]
    #[must_use]
    pub fn get<T: FromBytes + Copy>(&self, at: Iova) -> T {
        // SAFETY: in range; every bit pattern is a `T`; alignment is not assumed.
        unsafe { self.pointer(at, size_of::<T>()).cast::<T>().read_unaligned() }
    }

    /// Copies a value in.
    #[inline]
    pub fn put<T: IntoBytes + Immutable + Copy>(&self, at: Iova, value: T) {
        // SAFETY: in range; nobody holds a reference to shared memory.
        unsafe { self.pointer(at, size_of::<T>()).cast::<T>().write_unaligned(value) }
    }

    /// Copies bytes out. A word at an even address is read at once: a ring's index must not be of two moments.
    pub fn copy_out(&self, at: Iova, to: &mut [u8]) {
        if let (true, Ok(word)) = (at.0.is_multiple_of(2), <&mut [u8; 2]>::try_from(&mut *to)) {
            *word = self.word(at).load(Ordering::Acquire).to_ne_bytes();
            return;
        }
        // SAFETY: the source is in range; the destination is a slice elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(self.pointer(at, to.len()), to.as_mut_ptr(), to.len()) }
    }

    /// Copies bytes in. A word at an even address is written at once.
    pub fn copy_in(&self, at: Iova, from: &[u8]) {
        if let (true, Ok(word)) = (at.0.is_multiple_of(2), <[u8; 2]>::try_from(from)) {
            self.word(at).store(u16::from_ne_bytes(word), Ordering::Release);
            return;
        }
        // SAFETY: as in `copy_out`, the other way.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.pointer(at, from.len()), from.len()) }
    }

    /// The 16-bit word at an even address, as an atomic.
    #[inline]
    #[must_use]
    pub fn word(&self, at: Iova) -> &AtomicU16 {
        let pointer = self.pointer(at, 2);
        assert!(pointer as usize & 1 == 0, "{at} is odd");
        // SAFETY: two mapped, aligned bytes, for as long as the memory lives.
        unsafe { AtomicU16::from_ptr(pointer.cast()) }
    }
}

/// Stores a register in a page that is shared with the device; what was written to memory before is seen by whoever sees it. Panics
/// if it is outside, or odd.
pub(super) fn store_register(pages: &Mapping, offset: usize, value: u16) {
    assert!(offset.is_multiple_of(2) && offset + 2 <= pages.len(), "a register outside its page");
    // SAFETY: two mapped, aligned bytes, for as long as the mapping lives, which are accessed as atomics only.
    unsafe { AtomicU16::from_ptr(pages.as_ptr().add(offset).cast()) }.store(value, Ordering::Release);
}
