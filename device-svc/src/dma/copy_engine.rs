//! The engine for host memory that is mapped into the card's address space: a copy is a memory copy, made when it is
//! submitted.
//!
//! A VM's bytes lie in the caches of the core that wrote them, a hundred nanoseconds away. So a small read is only noted when
//! it is queued, and its line asked for; when it is submitted the lines of the whole batch are on their way together.
//!
//! Both sides of the memory are shared with a VM that may write at any time, so bytes are copied, never borrowed. Indices
//! are atomics with the ordering that virtio asks for; that matters on ARM, where a plain load may pass an earlier one.
#![expect(unsafe_code, reason = "copies between a VM's memory and the card's")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use super::{
    Access, CardMemory, Direction, DmaCounters, DmaEngine, DmaFault, HostMemory, Removed, Ticket, Unmapped,
    full_barrier, prefetch_read_range, prefetch_write_range,
};
use crate::address::{CardAddress, Iova};

/// Reads up to this long are noted, and made when they are submitted: headers, event words, short chains, the first bytes of frames.
const NOTED_BYTES_MAX: u32 = 256;
/// How many are noted at most; a batch's headers fit.
const NOTED_MAX: usize = 64;

/// A small read that was queued.
#[derive(Clone, Copy, Debug)]
struct Noted {
    host: *const u8,
    card: CardAddress,
    length: u32,
}

/// The run of host memory that was resolved last: nearly always the next address lies in it too.
#[derive(Clone, Copy, Debug)]
struct Window {
    start: Iova,
    length: u64,
    base: *mut u8,
    access: Access,
}

impl Window {
    const NONE: Self = Self { start: Iova(0), length: 0, base: std::ptr::null_mut(), access: Access::None };
}

/// A DMA engine that is a memory copy.
#[derive(Debug)]
pub struct CopyEngine {
    card: CardMemory,
    memory: Arc<HostMemory>,
    window: Window,
    noted: Vec<Noted>,
    counters: DmaCounters,
}

// SAFETY: the addresses in `window` and `noted` mean memory of `memory`, which stays mapped until the engine has let it go and may be
// used from any thread; only the engine's owner uses them.
unsafe impl Send for CopyEngine {}

impl CopyEngine {
    /// An engine between `card` and `memory`.
    #[must_use]
    pub fn new(card: CardMemory, memory: Arc<HostMemory>) -> Self {
        let noted = Vec::with_capacity(NOTED_MAX);
        Self { card, memory, window: Window::NONE, noted, counters: DmaCounters::default() }
    }

    /// Where the bytes at `address` are, and how many of `length` follow there in one run.
    #[inline]
    fn resolve(&mut self, address: Iova, length: u64, direction: Direction) -> Option<(*mut u8, u64)> {
        let inside = address.0.wrapping_sub(self.window.start.0);
        if inside < self.window.length && self.window.access.allows(direction) {
            return Some((self.window.base.wrapping_add(inside as usize), length.min(self.window.length - inside)));
        }
        self.look_up(address, length, direction)
    }

    /// Not inlined: behind a guest's IOMMU it is called often, but then it is not the call that costs.
    #[inline(never)]
    fn look_up(&mut self, address: Iova, length: u64, direction: Direction) -> Option<(*mut u8, u64)> {
        let found = self.memory.find(address)?;
        if found.base.is_null() || !found.access.allows(direction) {
            return None;
        }
        self.window = Window { start: found.start, length: found.length, base: found.base, access: found.access };
        let inside = address.0 - found.start.0;
        Some((found.base.wrapping_add(inside as usize), length.min(found.length - inside)))
    }

    /// Walks the runs of a host range and hands each with its offset to `copy`.
    #[inline]
    fn runs(
        &mut self,
        address: Iova,
        length: u64,
        direction: Direction,
        mut copy: impl FnMut(&CardMemory, *mut u8, usize, usize),
    ) -> Result<(), Unmapped> {
        let (mut at, mut done) = (address, 0);
        while done < length {
            let Some((pointer, run)) = self.resolve(at, length - done, direction) else {
                return Err(Unmapped { address, length });
            };
            copy(&self.card, pointer, done as usize, run as usize);
            done += run;
            at = Iova(at.0.wrapping_add(run));
        }
        Ok(())
    }

    /// A read that is long, or spans regions, or comes when enough have been noted.
    fn read_now(&mut self, from: Iova, to: CardAddress, length: u32) -> Result<(), Unmapped> {
        self.make_noted();
        self.runs(from, u64::from(length), Direction::FromHost, |card, host, offset, run| {
            let card = card.pointer(to.add(offset as u32), run);
            // SAFETY: `runs` yields mapped host ranges, and the card's range was checked just now; the two kinds of memory
            // never overlap.
            unsafe { std::ptr::copy_nonoverlapping(host.cast_const(), card, run) }
        })
    }

    /// A write that spans regions, or follows reads that were noted.
    #[cold]
    fn write_runs(&mut self, from: CardAddress, to: Iova, length: u32) -> Result<(), Unmapped> {
        self.make_noted();
        self.runs(to, u64::from(length), Direction::ToHost, |card, host, offset, run| {
            let card = card.pointer(from.add(offset as u32), run);
            // SAFETY: as in `read_now`, the other way.
            unsafe { std::ptr::copy_nonoverlapping(card.cast_const(), host, run) }
        })
    }

    /// The aligned 16-bit word at `address`.
    #[inline]
    fn word(&mut self, address: Iova, direction: Direction) -> Result<&AtomicU16, Unmapped> {
        match self.resolve(address, 2, direction) {
            Some((pointer, 2)) if pointer as usize & 1 == 0 => {
                // SAFETY: two mapped, aligned bytes that stay mapped until this engine has let the region go; every access
                // to a ring index goes through an atomic.
                Ok(unsafe { AtomicU16::from_ptr(pointer.cast::<u16>()) })
            }
            _ => Err(Unmapped { address, length: 2 }),
        }
    }

    /// Makes the reads that were noted.
    #[inline]
    fn make_noted(&mut self) {
        for &Noted { host, card, length } in &self.noted {
            let card = self.card.pointer(card, length as usize);
            // SAFETY: `read` resolved `length` mapped bytes at `host`, which stay mapped until this engine has let them go,
            // which it does only when nothing is noted; the card's range was checked just now, and the two never overlap.
            unsafe { copy(host, card, length as usize) };
        }
        self.noted.clear();
    }
}

/// Copies a few bytes; the lengths that nearly all are take no call: a descriptor, the header of a frame, a status.
///
/// # Safety
/// As for `copy_nonoverlapping`.
#[inline(always)]
pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, length: usize) {
    // SAFETY: the caller's promise covers `length` bytes, whichever way they are copied.
    unsafe {
        match length {
            16 => to.cast::<u128>().write_unaligned(from.cast::<u128>().read_unaligned()),
            12 => {
                to.cast::<u64>().write_unaligned(from.cast::<u64>().read_unaligned());
                to.add(8).cast::<u32>().write_unaligned(from.add(8).cast::<u32>().read_unaligned());
            }
            1 => to.write(from.read()),
            _ => std::ptr::copy_nonoverlapping(from, to, length),
        }
    }
}

impl DmaEngine for CopyEngine {
    const LATE: bool = false;

    #[inline]
    fn card(&self) -> &CardMemory {
        &self.card
    }

    fn set_memory(&mut self, memory: Arc<HostMemory>) {
        debug_assert!(self.noted.is_empty(), "the memory changes under copies that are queued");
        self.noted.clear();
        self.window = Window::NONE;
        self.memory = memory;
    }

    fn let_go(&mut self, removed: &Removed) -> bool {
        if removed.touches(self.window.start, self.window.length) {
            self.window = Window::NONE;
        }
        // Between turns there are none.
        self.noted.is_empty()
    }

    fn memory(&self) -> &Arc<HostMemory> {
        &self.memory
    }

    #[inline]
    fn read(&mut self, from: Iova, to: CardAddress, length: u32) -> Result<(), Unmapped> {
        self.counters.reads += 1;
        self.counters.read_bytes += u64::from(length);
        match self.resolve(from, u64::from(length), Direction::FromHost) {
            Some((host, run))
                if run == u64::from(length) && length <= NOTED_BYTES_MAX && self.noted.len() < NOTED_MAX =>
            {
                prefetch_read_range(host, length as usize);
                self.noted.push(Noted { host, card: to, length });
                Ok(())
            }
            _ => self.read_now(from, to, length),
        }
    }

    #[inline]
    fn write(&mut self, from: CardAddress, to: Iova, length: u32) -> Result<(), Unmapped> {
        self.counters.writes += 1;
        self.counters.write_bytes += u64::from(length);
        match self.resolve(to, u64::from(length), Direction::ToHost) {
            Some((host, run)) if run == u64::from(length) && self.noted.is_empty() => {
                let card = self.card.pointer(from, length as usize);
                // SAFETY: `resolve` found `length` mapped bytes, and the card's range was checked just now; the two kinds of
                // memory never overlap.
                unsafe { copy(card.cast_const(), host, length as usize) };
                Ok(())
            }
            _ => self.write_runs(from, to, length),
        }
    }

    #[inline]
    fn read_index(&mut self, from: Iova, to: CardAddress) -> Result<(), Unmapped> {
        self.make_noted();
        // Acquire: what the driver wrote before it stored the index is seen by every copy after this one.
        let value = self.word(from, Direction::FromHost)?.load(Ordering::Acquire);
        self.card.put(to, value);
        self.counters.reads += 1;
        self.counters.read_bytes += 2;
        Ok(())
    }

    #[inline]
    fn write_index(&mut self, from: CardAddress, to: Iova) -> Result<(), Unmapped> {
        self.make_noted();
        let value = self.card.get::<u16>(from);
        // Release: whoever sees the index sees everything copied before it.
        self.word(to, Direction::ToHost)?.store(value, Ordering::Release);
        self.counters.writes += 1;
        self.counters.write_bytes += 2;
        Ok(())
    }

    #[inline]
    fn read_packed(&mut self, from: Iova, to: CardAddress, count: u32) -> Result<(), Unmapped> {
        /// Where a descriptor's flags are, and in the upper half of its 16 bytes.
        const FLAGS: usize = 14;
        const FLAGS_SHIFT: u32 = 48;
        self.make_noted();
        self.counters.reads += 1;
        self.counters.read_bytes += u64::from(count) * 16;
        let mut done = 0;
        while done < count {
            let at = Iova(from.0.wrapping_add(u64::from(done) * 16));
            let Some((host, run)) = self.resolve(at, u64::from(count - done) * 16, Direction::FromHost) else {
                return Err(Unmapped { address: from, length: u64::from(count) * 16 });
            };
            // A ring is aligned to 16 and memory comes in pages; a region that ends within a descriptor is no memory for one.
            let here = (run / 16) as u32;
            if here == 0 || host as usize & 15 != 0 {
                return Err(Unmapped { address: at, length: 16 });
            }
            let card = self.card.pointer(to.add(done * 16), here as usize * 16);
            for entry in 0..here as usize {
                // SAFETY: `here` whole descriptors at `host` are mapped, aligned to 16, and stay mapped until this engine has let
                // them go; as many were checked to be inside the card memory. Flags are accessed as atomics only.
                unsafe {
                    let host = host.add(entry * 16);
                    // Acquire before the body is copied: flags that say available vouch for the fields that were stored before.
                    let flags = AtomicU16::from_ptr(host.add(FLAGS).cast()).load(Ordering::Acquire);
                    let (address, rest) = (host.cast::<u64>().read(), host.add(8).cast::<u64>().read());
                    let rest = (rest & !(0xffff << FLAGS_SHIFT)) | u64::from(flags) << FLAGS_SHIFT;
                    let card = card.add(entry * 16);
                    card.cast::<u64>().write_unaligned(address);
                    card.add(8).cast::<u64>().write_unaligned(rest);
                }
            }
            done += here;
        }
        Ok(())
    }

    #[inline]
    fn expect_read(&mut self, from: Iova, length: u32) {
        if let Some((host, _)) = self.resolve(from, 1, Direction::FromHost) {
            prefetch_read_range(host, length as usize);
        }
    }

    #[inline]
    fn expect_write(&mut self, to: Iova, length: u32) {
        if let Some((host, _)) = self.resolve(to, 1, Direction::ToHost) {
            // The bytes may go on in another run, which is not what is asked for then.
            prefetch_write_range(host, length as usize);
        }
    }

    #[inline]
    fn order(&mut self) {
        // Store of ours against load of theirs: only a full fence keeps these two apart, on x86 too.
        full_barrier();
    }

    #[inline]
    fn queued(&self) -> Ticket {
        Ticket(0)
    }

    #[inline]
    fn submit(&mut self) -> Ticket {
        self.make_noted();
        Ticket(0)
    }

    #[inline]
    fn landed(&mut self) -> Result<Ticket, DmaFault> {
        Ok(Ticket(0))
    }

    #[inline]
    fn is_idle(&mut self) -> bool {
        self.noted.is_empty()
    }

    #[inline]
    fn lend_whole(&mut self, from: Iova, length: u32, direction: Direction) -> Option<*mut u8> {
        let (host, run) = self.resolve(from, u64::from(length), direction)?;
        if run < u64::from(length) {
            return None;
        }
        self.counters.lent += 1;
        self.counters.lent_bytes += u64::from(length);
        Some(host)
    }

    #[inline]
    fn lend(
        &mut self,
        from: Iova,
        length: u32,
        direction: Direction,
        out: &mut Vec<libc::iovec>,
    ) -> Result<(), Unmapped> {
        self.counters.lent += 1;
        self.counters.lent_bytes += u64::from(length);
        match self.resolve(from, u64::from(length), direction) {
            Some((host, run)) if run == u64::from(length) => {
                out.push(libc::iovec { iov_base: host.cast(), iov_len: length as usize });
                Ok(())
            }
            _ => self.runs(from, u64::from(length), direction, |_, host, _, run| {
                out.push(libc::iovec { iov_base: host.cast(), iov_len: run });
            }),
        }
    }

    #[inline]
    fn give_back(&mut self, _from: Iova, _length: u32, _written: bool) {}

    #[inline]
    fn forgive_empty_poll(&mut self, bytes: u32) {
        self.counters.reads -= 1;
        self.counters.read_bytes -= u64::from(bytes);
        self.counters.empty_polls += 1;
    }

    fn counters(&self) -> DmaCounters {
        self.counters
    }
}
