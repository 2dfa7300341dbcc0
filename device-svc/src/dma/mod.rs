//! The seam to host memory: everything that crosses PCIe goes through a [`DmaEngine`], so that one place can count it,
//! delay it, fault it and, later, mark pages dirty when a copy has landed.
//!
//! ```text
//!   HostMemory (control half)            DmaEngine (hot half, one per lane)
//!   IOVA → bytes, changed by the link    read, write, lend; submit; landed
//!                     └── Arc; looked up without a lock ──┘
//! ```
//!
//! An engine is asynchronous: a copy is queued, submitted, and lands later; copies land in the order in which they were
//! queued. Where host memory is mapped into the card's address space ([`CopyEngine`]), they have landed when `submit` returns; where
//! a VMM shares none it is asked for every byte ([`DistantEngine`]).

mod arena;
mod cache;
mod card;
mod copy_engine;
#[cfg(test)]
mod delayed;
mod distant;
mod files;
mod guard;
mod mapping;
mod memory;
#[cfg(test)]
pub mod mortality;
mod page_table;

pub use cache::{full_barrier, prefetch_read, prefetch_read_range, prefetch_write, prefetch_write_range};
pub use card::CardMemory;
pub use copy_engine::CopyEngine;
pub(crate) use copy_engine::copy;
#[cfg(test)]
pub use delayed::DelayedEngine;
#[cfg(test)]
pub use distant::tests::{Peer, half_shared, peer};
pub use distant::{DistantEngine, DistantMemory, Question};
pub use files::MemoryFiles;
pub use guard::install as install_bus_fault_guard;
pub use mapping::Mapping;
pub use memory::{Found, HostMemory, PAGE_BYTES, RANGES_MAX, Region, Removed};

use std::sync::Arc;

use crate::address::{CardAddress, Iova};

/// Which way payload goes, seen from the host's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// The card reads host memory (a guest's write request).
    FromHost,
    /// The card writes host memory (a guest's read request).
    ToHost,
}

/// What the card may do with a range of host memory. The discriminants are two bits: may read, may write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Nothing.
    None = 0,
    /// Only read it.
    Read = 1,
    /// Only write it.
    Write = 2,
    /// Read and write it.
    Both = 3,
}

impl Access {
    /// From the two bits; others are ignored.
    #[inline]
    #[must_use]
    pub const fn from_bits(bits: usize) -> Self {
        match bits & 3 {
            0 => Self::None,
            1 => Self::Read,
            2 => Self::Write,
            _ => Self::Both,
        }
    }

    /// Whether payload may go that way.
    #[inline]
    #[must_use]
    pub const fn allows(self, direction: Direction) -> bool {
        let needed = match direction {
            Direction::FromHost => Self::Read,
            Direction::ToHost => Self::Write,
        };
        self as usize & needed as usize != 0
    }
}

/// Why host memory was refused: always the front end's fault.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The range is empty, wraps, or does not start with a page.
    #[error("memory region of {length:#x} bytes at {start} is empty, wraps or does not start with a page")]
    BadRange {
        /// Where it starts.
        start: Iova,
        /// Its length, bytes.
        length: u64,
    },
    /// Two regions overlap.
    #[error("memory region at {0} overlaps another")]
    Overlap(Iova),
    /// The descriptor is not a file that can be mapped, or is shorter than the region says.
    #[error("the memory file cannot be mapped: {0}")]
    BadFile(String),
    /// More regions than a table may have.
    #[error("more than {0} memory regions, or too scattered ones")]
    TooMany(usize),
    /// No such region to remove.
    #[error("no memory region of {length:#x} bytes at {start}")]
    Absent {
        /// Where it should start.
        start: Iova,
        /// Its length, bytes.
        length: u64,
    },
    /// What was added as one would be removed in part.
    #[error("{length:#x} bytes at {start} are a part of a memory region")]
    Cut {
        /// Where it starts.
        start: Iova,
        /// Its length, bytes.
        length: u64,
    },
}

/// A range of host memory that no region covers, or none that allows the access: the guest's fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{length} bytes at {address} are outside the VM's memory")]
pub struct Unmapped {
    /// Where the range starts.
    pub address: Iova,
    /// Its length, bytes.
    pub length: u64,
}

/// The engine reported a copy as failed: the function cannot go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a DMA copy failed")]
pub struct DmaFault;

/// A count of copies: a copy has landed when [`DmaEngine::landed`] has reached the ticket that [`DmaEngine::submit`] gave
/// after it was queued.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
pub struct Ticket(pub u64);

/// What crossed, per lane; read by other threads through [`crate::metrics`].
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct DmaCounters {
    /// Copies towards the card, those of polls that found nothing excepted.
    pub reads: u64,
    /// Copies towards the host.
    pub writes: u64,
    /// Bytes towards the card.
    pub read_bytes: u64,
    /// Bytes towards the host.
    pub write_bytes: u64,
    /// Reads of a ring's index or flags that found nothing new.
    pub empty_polls: u64,
    /// Ranges lent in place instead of copied.
    pub lent: u64,
    /// Bytes of them.
    pub lent_bytes: u64,
}

impl DmaCounters {
    /// Copies both ways.
    #[must_use]
    pub const fn transactions(&self) -> u64 {
        self.reads + self.writes
    }
}

/// The hot half of host memory: one owner, one lane.
///
/// Host addresses are untrusted and are resolved when a copy is queued; card addresses are ours, and one outside the
/// card memory is a broken invariant (panic).
pub trait DmaEngine: Send {
    /// Whether host memory can be lent in place; if not, payload goes through card memory.
    const LENDS: bool = true;

    /// Whether copies land later than they are submitted.
    const LATE: bool = true;

    /// The card memory that this engine copies to and from.
    fn card(&self) -> &CardMemory;

    /// Uses `memory` from now on. The caller has made sure that nothing is in flight or lent in what goes away.
    fn set_memory(&mut self, memory: Arc<HostMemory>);

    /// Forgets where the removed range was. Returns false, for the caller to ask again, while a copy that was queued earlier
    /// touches it; what is lent of it is the caller's affair.
    fn let_go(&mut self, removed: &Removed) -> bool;

    /// The table of host memory in use.
    fn memory(&self) -> &Arc<HostMemory>;

    /// Queues a copy of `length` bytes from the host into card memory.
    ///
    /// # Errors
    /// A range that is not wholly covered by regions.
    fn read(&mut self, from: Iova, to: CardAddress, length: u32) -> Result<(), Unmapped>;

    /// Queues a copy of `length` bytes from card memory to the host.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    fn write(&mut self, from: CardAddress, to: Iova, length: u32) -> Result<(), Unmapped>;

    /// Queues the copy of a 16-bit ring index (or flags, or event) to the card; what the other side wrote before it
    /// stored this value is seen by every copy queued later (virtio 1.3, 2.7.13.3: the driver's barrier). `from` must be
    /// even.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    fn read_index(&mut self, from: Iova, to: CardAddress) -> Result<(), Unmapped>;

    /// Queues the copy of a 16-bit ring index (or flags, or event) to the host, visible there after every copy queued
    /// earlier. `to` must be even.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    fn write_index(&mut self, from: CardAddress, to: Iova) -> Result<(), Unmapped>;

    /// Queues the copy of `count` packed-ring descriptors (16 bytes each) such that a descriptor whose flags say available
    /// is whole: its flags are read before its other fields, and before those of the next (virtio 1.3, 2.8.21.1).
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    fn read_packed(&mut self, from: Iova, to: CardAddress, count: u32) -> Result<(), Unmapped>;

    /// Says that the few bytes at `from` will be read soon: an engine may make that cheaper, and may ignore it.
    #[inline]
    fn expect_read(&mut self, _from: Iova, _length: u32) {}

    /// Says that the few bytes at `to` will be written soon: an engine may make that cheaper, and may ignore it.
    #[inline]
    fn expect_write(&mut self, _to: Iova, _length: u32) {}

    /// A barrier both ways: copies queued later see and make memory as it is after all those queued before are visible to
    /// the host. For the races of notification suppression (store of our index against load of theirs).
    fn order(&mut self);

    /// What [`landed`](Self::landed) will have reached when everything queued so far has landed, submitted or not.
    fn queued(&self) -> Ticket;

    /// Starts everything queued so far.
    fn submit(&mut self) -> Ticket;

    /// How far copies have landed.
    ///
    /// # Errors
    /// When a copy failed: the function needs a reset.
    fn landed(&mut self) -> Result<Ticket, DmaFault>;

    /// Whether no copy is on its way: host memory and card memory may change hands.
    fn is_idle(&mut self) -> bool;

    /// Nobody will look at what is queued or on its way any more: it need not land, if the engine can do without.
    fn abandon(&mut self) {}

    /// Lends `length` bytes of host memory for payload in place: appends the ranges to `out` (several where the range
    /// spans maps).
    ///
    /// # Errors
    /// As for [`read`](Self::read); `out` may then hold a part.
    fn lend(
        &mut self,
        from: Iova,
        length: u32,
        direction: Direction,
        out: &mut Vec<libc::iovec>,
    ) -> Result<(), Unmapped>;

    /// Lends `length` bytes of host memory that are one range; `None` where they are not, or an engine does not look: then
    /// [`lend`](Self::lend) says more.
    #[inline]
    fn lend_whole(&mut self, _from: Iova, _length: u32, _direction: Direction) -> Option<*mut u8> {
        None
    }

    /// Takes back what was lent; `written` says that the card may have changed it.
    fn give_back(&mut self, from: Iova, length: u32, written: bool);

    /// The last read of an index or flags found nothing new: it does not count as a transaction.
    fn forgive_empty_poll(&mut self, bytes: u32);

    /// What crossed so far.
    fn counters(&self) -> DmaCounters;
}
