//! One of the four rings of an AF_XDP socket: memory shared with the kernel, written by one side and read by the other.
//!
//! A count on each side runs freely; an entry's place is its number modulo the size. The side that writes an entry stores its count
//! behind it, with release; the other loads it with acquire.
#![expect(unsafe_code, reason = "maps memory that is shared with the kernel, and reads and writes it")]

use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Memory that was mapped.
pub(super) struct Mapping {
    start: NonNull<libc::c_void>,
    bytes: usize,
}

// SAFETY: it is memory, which any thread may use.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Fresh pages.
    pub(super) fn pages(bytes: usize) -> Result<Self, Errno> {
        let length = NonZeroUsize::new(bytes).ok_or(Errno::EINVAL)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: at a place of the kernel's choice.
        let start = unsafe { mmap_anonymous(None, length, protection, MapFlags::MAP_PRIVATE) }?;
        Ok(Self { start, bytes })
    }

    fn of(file: &OwnedFd, at: libc::off_t, bytes: usize) -> Result<Self, Errno> {
        let length = NonZeroUsize::new(bytes).ok_or(Errno::EINVAL)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: at a place of the kernel's choice.
        let start = unsafe { mmap(None, length, protection, flags, file, at) }?;
        Ok(Self { start, bytes })
    }

    #[inline]
    pub(super) const fn start(&self) -> *mut u8 {
        self.start.as_ptr().cast()
    }

    /// What is `at` so many bytes from the start; `None` if it would not end inside.
    fn at<T>(&self, at: u64, count: usize) -> Option<NonNull<T>> {
        let at = usize::try_from(at).ok()?;
        let end = at.checked_add(size_of::<T>().checked_mul(count)?)?;
        if end > self.bytes || !at.is_multiple_of(align_of::<T>()) {
            return None;
        }
        // SAFETY: it is inside.
        Some(unsafe { self.start.byte_add(at) }.cast())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped so, and whoever has it keeps no pointer for longer.
        let _ = unsafe { munmap(self.start, self.bytes) };
    }
}

/// A ring of entries that are plain data.
pub(super) struct Ring<T> {
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: NonNull<AtomicU32>,
    entries: NonNull<T>,
    size: u32,
    /// Our own count: ahead of what the kernel was told of.
    own: u32,
    _mapping: Mapping,
}

// SAFETY: one owner on our side; what is shared with the kernel is read and written as the head says.
unsafe impl<T: Send> Send for Ring<T> {}

impl<T: Copy> Ring<T> {
    /// Maps a ring of `size` entries, a power of two, of a socket.
    pub(super) fn map(
        file: &OwnedFd,
        page: libc::off_t,
        offsets: libc::xdp_ring_offset,
        size: u32,
    ) -> Result<Self, Errno> {
        let count = size as usize;
        let entries_bytes = count.checked_mul(size_of::<T>()).ok_or(Errno::EINVAL)?;
        let bytes = usize::try_from(offsets.desc).ok().and_then(|at| at.checked_add(entries_bytes));
        let mapping = Mapping::of(file, page, bytes.ok_or(Errno::EINVAL)?)?;
        let word = |at| mapping.at(at, 1).ok_or(Errno::EINVAL);
        Ok(Self {
            producer: word(offsets.producer)?,
            consumer: word(offsets.consumer)?,
            flags: word(offsets.flags)?,
            entries: mapping.at(offsets.desc, count).ok_or(Errno::EINVAL)?,
            size,
            own: 0,
            _mapping: mapping,
        })
    }

    #[inline]
    const fn place(&self, number: u32) -> NonNull<T> {
        // SAFETY: the size is a power of two, and there are so many entries.
        unsafe { self.entries.add((number & (self.size - 1)) as usize) }
    }

    #[inline]
    const fn word(word: &NonNull<AtomicU32>) -> &AtomicU32 {
        // SAFETY: it is in the mapping, which lives as long as the ring.
        unsafe { word.as_ref() }
    }

    /// Whether the kernel waits to be told that there is something.
    #[inline]
    pub(super) fn needs_wakeup(&self) -> bool {
        Self::word(&self.flags).load(Ordering::Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
    }

    /// For whom the kernel reads: so many entries may be pushed.
    #[inline]
    pub(super) fn room(&self) -> u32 {
        let used = self.own.wrapping_sub(Self::word(&self.consumer).load(Ordering::Acquire));
        self.size.saturating_sub(used)
    }

    /// Writes an entry where there is room; the kernel sees it after `publish`.
    #[inline]
    pub(super) fn push(&mut self, entry: T) {
        // SAFETY: the place is ours: the kernel reads only what it was told of.
        unsafe { self.place(self.own).write(entry) };
        self.own = self.own.wrapping_add(1);
    }

    /// Tells the kernel of what was pushed.
    #[inline]
    pub(super) fn publish(&self) {
        Self::word(&self.producer).store(self.own, Ordering::Release);
    }

    /// For whom the kernel writes: so many entries can be taken.
    #[inline]
    pub(super) fn waiting(&self) -> u32 {
        Self::word(&self.producer).load(Ordering::Acquire).wrapping_sub(self.own).min(self.size)
    }

    /// Takes an entry that waits; the kernel has its place back after `finish`.
    #[inline]
    pub(super) fn pop(&mut self) -> T {
        // SAFETY: the kernel has told of it, and does not write to it until it is told to.
        let entry = unsafe { self.place(self.own).read() };
        self.own = self.own.wrapping_add(1);
        entry
    }

    /// Gives the kernel the places of what was taken.
    #[inline]
    pub(super) fn finish(&self) {
        Self::word(&self.consumer).store(self.own, Ordering::Release);
    }
}
