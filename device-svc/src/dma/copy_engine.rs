//! The engine for host memory that is mapped into the card's address space: a copy is a memory copy and lands at once.
//!
//! Both sides of the memory are shared with a VM that may write at any time, so bytes are copied, never borrowed. Indices
//! are atomics with the ordering that virtio asks for; that matters on ARM, where a plain load may pass an earlier one.
#![expect(unsafe_code, reason = "copies between a VM's memory and the card's")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::{CardMemory, Direction, DmaCounters, DmaEngine, DmaFault, HostMemory, Ticket, Unmapped};
use crate::address::{CardAddress, Iova};

/// A DMA engine that is a memory copy.
#[derive(Debug)]
pub struct CopyEngine {
    card: CardMemory,
    memory: Arc<HostMemory>,
    counters: DmaCounters,
}

impl CopyEngine {
    /// An engine between `card` and `memory`.
    #[must_use]
    pub fn new(card: CardMemory, memory: Arc<HostMemory>) -> Self {
        Self { card, memory, counters: DmaCounters::default() }
    }

    /// Walks the runs of a host range and hands each with its offset to `copy`.
    #[inline]
    fn runs(&self, address: Iova, length: u64, mut copy: impl FnMut(*mut u8, usize, usize)) -> Result<(), Unmapped> {
        let (mut at, mut done) = (address, 0);
        while done < length {
            let Some((pointer, run)) = self.memory.resolve(at, length - done) else {
                return Err(Unmapped { address, length });
            };
            copy(pointer, done as usize, run as usize);
            done += run;
            at = Iova(at.0.wrapping_add(run));
        }
        Ok(())
    }

    /// The aligned 16-bit word at `address`.
    #[inline]
    fn word(&self, address: Iova) -> Result<&AtomicU16, Unmapped> {
        match self.memory.resolve(address, 2) {
            Some((pointer, 2)) if pointer as usize & 1 == 0 => {
                // SAFETY: two mapped, aligned bytes that stay mapped while `self.memory` holds the region; every access
                // to a ring index goes through an atomic.
                Ok(unsafe { AtomicU16::from_ptr(pointer.cast::<u16>()) })
            }
            _ => Err(Unmapped { address, length: 2 }),
        }
    }
}

impl DmaEngine for CopyEngine {
    #[inline]
    fn card(&self) -> &CardMemory {
        &self.card
    }

    fn set_memory(&mut self, memory: Arc<HostMemory>) {
        self.memory = memory;
    }

    fn memory(&self) -> &Arc<HostMemory> {
        &self.memory
    }

    #[inline]
    fn read(&mut self, from: Iova, to: CardAddress, length: u32) -> Result<(), Unmapped> {
        let card = self.card.pointer(to, length as usize);
        self.runs(from, u64::from(length), |host, offset, run| {
            // SAFETY: `runs` yields mapped host ranges, whose offsets add up to `length`, which fits the card range; the
            // two kinds of memory never overlap.
            unsafe { std::ptr::copy_nonoverlapping(host.cast_const(), card.add(offset), run) }
        })?;
        self.counters.reads += 1;
        self.counters.read_bytes += u64::from(length);
        Ok(())
    }

    #[inline]
    fn write(&mut self, from: CardAddress, to: Iova, length: u32) -> Result<(), Unmapped> {
        let card = self.card.pointer(from, length as usize);
        self.runs(to, u64::from(length), |host, offset, run| {
            // SAFETY: as in `read`, the other way.
            unsafe { std::ptr::copy_nonoverlapping(card.cast_const().add(offset), host, run) }
        })?;
        self.counters.writes += 1;
        self.counters.write_bytes += u64::from(length);
        Ok(())
    }

    #[inline]
    fn read_index(&mut self, from: Iova, to: CardAddress) -> Result<(), Unmapped> {
        // Acquire: what the driver wrote before it stored the index is seen by every copy after this one.
        let value = self.word(from)?.load(Ordering::Acquire);
        self.card.put(to, value);
        self.counters.reads += 1;
        self.counters.read_bytes += 2;
        Ok(())
    }

    #[inline]
    fn write_index(&mut self, from: CardAddress, to: Iova) -> Result<(), Unmapped> {
        let value = self.card.get::<u16>(from);
        // Release: whoever sees the index sees everything copied before it.
        self.word(to)?.store(value, Ordering::Release);
        self.counters.writes += 1;
        self.counters.write_bytes += 2;
        Ok(())
    }

    #[inline]
    fn read_packed(&mut self, from: Iova, to: CardAddress, count: u32) -> Result<(), Unmapped> {
        const FLAGS: u64 = 14;
        for entry in 0..count {
            let at = Iova(from.0.wrapping_add(u64::from(entry) * 16));
            // Acquire before the body is copied: flags that say available vouch for the fields that were stored before.
            let flags = self.word(Iova(at.0.wrapping_add(FLAGS)))?.load(Ordering::Acquire);
            let slot = to.add(entry * 16);
            let card = self.card.pointer(slot, 16);
            self.runs(at, FLAGS, |host, offset, run| {
                // SAFETY: as in `read`.
                unsafe { std::ptr::copy_nonoverlapping(host.cast_const(), card.add(offset), run) }
            })?;
            self.card.put(slot.add(FLAGS as u32), flags);
        }
        self.counters.reads += 1;
        self.counters.read_bytes += u64::from(count) * 16;
        Ok(())
    }

    #[inline]
    fn order(&mut self) {
        // Store of ours against load of theirs: only a full fence keeps these two apart, on x86 too.
        fence(Ordering::SeqCst);
    }

    #[inline]
    fn submit(&mut self) -> Ticket {
        Ticket(0)
    }

    #[inline]
    fn landed(&mut self) -> Result<Ticket, DmaFault> {
        Ok(Ticket(0))
    }

    #[inline]
    fn is_idle(&mut self) -> bool {
        true
    }

    #[inline]
    fn lend(
        &mut self,
        from: Iova,
        length: u32,
        _direction: Direction,
        out: &mut Vec<libc::iovec>,
    ) -> Result<(), Unmapped> {
        self.runs(from, u64::from(length), |host, _, run| {
            out.push(libc::iovec { iov_base: host.cast(), iov_len: run });
        })?;
        self.counters.lent += 1;
        self.counters.lent_bytes += u64::from(length);
        Ok(())
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
