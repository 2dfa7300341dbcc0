//! Survives a memory file that is cut short under us.
//!
//! A VMM can truncate the file behind a VM's memory at any moment; the next load from the pages that are gone raises
//! SIGBUS, which would end the service and with it every other function. The fault's address tells the mapping: the
//! handler puts zero pages in place of it and raises the mapping's `lost` flag; the load then goes on. Whoever owns the
//! function looks at the flag and ends that function alone.
//!
//! A signal handler may take no lock, so the mappings stand in a fixed table of atomics.
#![expect(unsafe_code, reason = "a signal handler that replaces a mapping")]

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// How many mappings there can be at once, over all functions.
pub(super) const SLOTS: usize = 4096;

/// A mapping's place in the table.
pub(super) type Slot = usize;

struct Entry {
    /// Start of the mapping; 0: free, 1: being filled in.
    start: AtomicUsize,
    length: AtomicUsize,
    lost: AtomicBool,
}

static ENTRIES: [Entry; SLOTS] =
    [const { Entry { start: AtomicUsize::new(0), length: AtomicUsize::new(0), lost: AtomicBool::new(false) } }; SLOTS];

/// Mappings that were ever lost.
static LOSSES: AtomicU64 = AtomicU64::new(0);

/// How many mappings were ever lost: as long as it stays the same, no `lost` flag has turned true.
#[inline]
pub(super) fn losses() -> u64 {
    LOSSES.load(Ordering::Acquire)
}

/// Enters a mapping. `None` when the table is full.
pub(super) fn register(start: usize, length: usize) -> Option<(Slot, &'static AtomicBool)> {
    for (slot, entry) in ENTRIES.iter().enumerate() {
        // A cheap look first: most slots in front are taken for long.
        if entry.start.load(Ordering::Relaxed) == 0
            && entry.start.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok()
        {
            entry.length.store(length, Ordering::Relaxed);
            entry.lost.store(false, Ordering::Relaxed);
            // Release: a handler that sees the start sees the length.
            entry.start.store(start, Ordering::Release);
            return Some((slot, &entry.lost));
        }
    }
    None
}

/// Takes a mapping off the table, before it is unmapped.
pub(super) fn release(slot: Slot) {
    ENTRIES[slot].start.store(0, Ordering::Release);
}

/// Installs the handler for SIGBUS, once per process. Faults outside the table end the process as before.
///
/// # Errors
/// When the kernel refuses the handler.
pub fn install() -> std::io::Result<()> {
    // SAFETY: `sigaction` is plain data, filled in below.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_bus_fault as extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
    // SAFETY: the handler does only what is safe in a signal handler: atomics, mmap, sigaction.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn on_bus_fault(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid siginfo to an SA_SIGINFO handler; SIGBUS carries an address.
    let address = unsafe { (*info).si_addr() } as usize;
    for entry in &ENTRIES {
        let start = entry.start.load(Ordering::Acquire);
        let length = entry.length.load(Ordering::Relaxed);
        if start > 1 && address.wrapping_sub(start) < length {
            entry.lost.store(true, Ordering::Relaxed);
            // Release: whoever sees the new count sees the flag.
            LOSSES.fetch_add(1, Ordering::Release);
            // SAFETY: replaces exactly the mapping that the entry names, which its owner keeps mapped while it stands in
            // the table; readers of it copy bytes and hold no reference.
            let zeroes = unsafe {
                libc::mmap(
                    start as *mut libc::c_void,
                    length,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
                    -1,
                    0,
                )
            };
            if zeroes != libc::MAP_FAILED {
                return;
            }
        }
    }
    // Not ours: let the fault happen again with the default action, which ends the process and leaves a core.
    // SAFETY: plain data; SIG_DFL is a valid action.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
    }
}
