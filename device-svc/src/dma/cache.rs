//! What the processor must be told about its caches, on the card and in the driver: lines that will be needed, and stores that
//! must be seen.
//!
//! A line that another core wrote takes a hundred nanoseconds to come, and several come at once if they are asked for before the
//! first is needed.
#![expect(unsafe_code, reason = "instructions that have no safe form")]

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

/// Names each line that a range touches.
#[inline(always)]
fn lines(address: *const u8, length: usize, name: impl Fn(*const u8)) {
    let before = address as usize % LINE_BYTES;
    let mut line = address.wrapping_sub(before);
    let mut left = (before + length).div_ceil(LINE_BYTES);
    while left > 0 {
        name(line);
        line = line.wrapping_add(LINE_BYTES);
        left -= 1;
    }
}

/// Starts to load all lines of a range. Addresses where there is no memory do no harm.
#[inline(always)]
pub fn prefetch_read_range(address: *const u8, length: usize) {
    lines(address, length, prefetch_read);
}

/// Starts to take all lines of a range for writing. Harmless as well.
#[inline(always)]
pub fn prefetch_write_range(address: *const u8, length: usize) {
    lines(address, length, prefetch_write);
}

/// Starts to load the line at `address`. An address where there is no memory does no harm.
#[inline(always)]
pub fn prefetch_read(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

/// Starts to take the line at `address` for writing, away from the core that has it. Harmless as `prefetch_read` is.
#[inline(always)]
pub fn prefetch_write(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above; a processor that does not know the hint takes it for one that does nothing.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prfm pstl1keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

/// A barrier for every load and store, that of an earlier store and a later load included: the one order that even x86 does not
/// keep by itself.
///
/// A locked instruction does what `mfence` does to ordinary memory, in half the time.
#[inline(always)]
pub fn full_barrier() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: adds nothing to a word of this thread's stack; the compiler moves no memory access across it, because it is not
    // told that none is made.
    unsafe {
        std::arch::asm!("lock or dword ptr [rsp], 0", options());
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}
