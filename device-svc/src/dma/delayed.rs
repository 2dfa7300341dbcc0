//! An engine for tests: copies land late, a few at a time, in the order queued; and they can fail.
//!
//! It stands for a real DMA engine, whose copies take microseconds: everything above it must wait for tickets, and must not
//! read card memory, reuse it or let go of host memory before they have landed.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{
    CardMemory, CopyEngine, Direction, DmaCounters, DmaEngine, DmaFault, HostMemory, Removed, Ticket, Unmapped,
};
use crate::address::{CardAddress, Iova};

#[derive(Clone, Copy, Debug)]
enum Copy {
    Read(Iova, CardAddress, u32),
    Write(CardAddress, Iova, u32),
    ReadIndex(Iova, CardAddress),
    WriteIndex(CardAddress, Iova),
    ReadPacked(Iova, CardAddress, u32),
}

/// A DMA engine that is late; or one that is not, and differs from a [`CopyEngine`] only in what can be done to it.
#[derive(Debug)]
pub struct DelayedEngine<const LATE: bool = true> {
    inner: CopyEngine,
    queued: VecDeque<Copy>,
    submitted: u64,
    issued: u64,
    landed: u64,
    random: u64,
    /// One in so many copies fails; 0: none does.
    fails_one_in: u64,
    failed: bool,
}

impl Copy {
    /// Where in host memory.
    const fn range(&self) -> (Iova, u64) {
        match *self {
            Self::Read(at, _, length) | Self::Write(_, at, length) => (at, length as u64),
            Self::ReadIndex(at, _) | Self::WriteIndex(_, at) => (at, 2),
            Self::ReadPacked(at, _, count) => (at, count as u64 * 16),
        }
    }
}

impl DelayedEngine {
    /// An engine over `card` and `memory` whose delays follow from `seed`.
    #[must_use]
    pub fn new(card: CardMemory, memory: Arc<HostMemory>, seed: u64, fails_one_in: u64) -> Self {
        Self {
            inner: CopyEngine::new(card, memory),
            queued: VecDeque::new(),
            submitted: 0,
            issued: 0,
            landed: 0,
            random: seed | 1,
            fails_one_in,
            failed: false,
        }
    }
}

impl DelayedEngine<false> {
    /// An engine whose copies land as they are queued.
    #[must_use]
    pub fn prompt(card: CardMemory, memory: Arc<HostMemory>) -> Self {
        let DelayedEngine { inner, queued, .. } = DelayedEngine::new(card, memory, 1, 0);
        Self { inner, queued, submitted: 0, issued: 0, landed: 0, random: 1, fails_one_in: 0, failed: false }
    }
}

impl<const LATE: bool> DelayedEngine<LATE> {
    fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn queue(&mut self, copy: Copy, at: Iova, length: u64) -> Result<(), Unmapped> {
        if !self.inner.memory().covers(at, length) {
            return Err(Unmapped { address: at, length });
        }
        self.queued.push_back(copy);
        self.issued += 1;
        if !LATE {
            self.land_one();
        }
        Ok(())
    }

    /// Writes so that the process may die between any two words.
    fn write_by_words(&mut self, from: CardAddress, to: Iova, length: u32) -> Result<(), Unmapped> {
        for done in (0..length).step_by(8) {
            super::mortality::about_to_store();
            self.inner.write(from.add(done), Iova(to.0 + u64::from(done)), 8.min(length - done))?;
        }
        Ok(())
    }

    /// Lands what was submitted: what a dead process left under way may still come, up to any copy.
    pub fn land(&mut self, copies: usize) {
        for _ in 0..copies.min(self.submitted.saturating_sub(self.landed) as usize) {
            self.land_one();
        }
    }

    fn land_one(&mut self) {
        let Some(&copy) = self.queued.front() else { return };
        let done = match copy {
            Copy::Read(from, to, length) => self.inner.read(from, to, length),
            Copy::Write(from, to, length) => self.write_by_words(from, to, length),
            Copy::ReadIndex(from, to) => self.inner.read_index(from, to),
            Copy::WriteIndex(from, to) => {
                super::mortality::about_to_store();
                self.inner.write_index(from, to)
            }
            Copy::ReadPacked(from, to, count) => self.inner.read_packed(from, to, count),
        };
        assert!(done.is_ok(), "host memory went away under a copy that was on its way: {copy:?}");
        self.inner.submit();
        // Only now: a copy that was cut short by death lands as a whole, or not at all, before those behind it.
        self.queued.pop_front();
        self.landed += 1;
    }
}

impl<const LATE: bool> DmaEngine for DelayedEngine<LATE> {
    const LATE: bool = LATE;

    fn card(&self) -> &CardMemory {
        self.inner.card()
    }

    fn set_memory(&mut self, memory: Arc<HostMemory>) {
        assert!(self.queued.is_empty(), "host memory was changed while copies were on their way");
        self.inner.set_memory(memory);
    }

    fn let_go(&mut self, removed: &Removed) -> bool {
        let touches = |copy: &Copy| {
            let (at, length) = copy.range();
            removed.touches(at, length)
        };
        !self.queued.iter().any(touches) && self.inner.let_go(removed)
    }

    fn memory(&self) -> &Arc<HostMemory> {
        self.inner.memory()
    }

    fn read(&mut self, from: Iova, to: CardAddress, length: u32) -> Result<(), Unmapped> {
        self.queue(Copy::Read(from, to, length), from, length.into())
    }

    fn write(&mut self, from: CardAddress, to: Iova, length: u32) -> Result<(), Unmapped> {
        self.queue(Copy::Write(from, to, length), to, length.into())
    }

    fn read_index(&mut self, from: Iova, to: CardAddress) -> Result<(), Unmapped> {
        self.queue(Copy::ReadIndex(from, to), from, 2)
    }

    fn write_index(&mut self, from: CardAddress, to: Iova) -> Result<(), Unmapped> {
        self.queue(Copy::WriteIndex(from, to), to, 2)
    }

    fn read_packed(&mut self, from: Iova, to: CardAddress, count: u32) -> Result<(), Unmapped> {
        self.queue(Copy::ReadPacked(from, to, count), from, u64::from(count) * 16)
    }

    fn order(&mut self) {
        self.inner.order();
    }

    fn queued(&self) -> Ticket {
        Ticket(self.issued)
    }

    fn submit(&mut self) -> Ticket {
        self.submitted = self.issued;
        Ticket(self.submitted)
    }

    fn landed(&mut self) -> Result<Ticket, DmaFault> {
        let most = self.submitted.saturating_sub(self.landed);
        for _ in 0..self.next() % 4 % (most + 1) {
            self.land_one();
        }
        if self.fails_one_in > 0 && self.next().is_multiple_of(self.fails_one_in) {
            self.failed = true;
        }
        if self.failed { Err(DmaFault) } else { Ok(Ticket(self.landed)) }
    }

    fn is_idle(&mut self) -> bool {
        // A failed engine has been reset.
        self.landed().is_err() || self.queued.is_empty()
    }

    fn lend(
        &mut self,
        from: Iova,
        length: u32,
        direction: Direction,
        out: &mut Vec<libc::iovec>,
    ) -> Result<(), Unmapped> {
        self.inner.lend(from, length, direction, out)
    }

    fn give_back(&mut self, from: Iova, length: u32, written: bool) {
        self.inner.give_back(from, length, written);
    }

    fn forgive_empty_poll(&mut self, bytes: u32) {
        self.inner.forgive_empty_poll(bytes);
    }

    fn counters(&self) -> DmaCounters {
        self.inner.counters()
    }
}
