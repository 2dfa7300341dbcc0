//! Mirrors a virtqueue into card memory: what has become available is fetched in batches, what is used is written back in
//! batches and in order, and everything crosses through the DMA seam.
//!
//! ```text
//!   fetch    index ─► entries ─► descriptors ─► indirect tables ─► chains, handed to the device
//!   publish  (payload, status: the device) ─► used elements ─► used index ─► event ─► interrupt?
//! ```
//!
//! Each arrow is a wait for copies to land. Where they land at once, the whole of `fetch` happens in one call; where they
//! take time, each call goes as far as it can. Chains are parsed from card memory only: a driver that changes a descriptor
//! after it was fetched changes nothing for us.

mod packed;
mod split;

use std::sync::Arc;

use crate::address::{CardAddress, Iova};
use crate::dma::{CardMemory, Direction, DmaEngine, DmaFault, HostMemory, Unmapped};
use crate::inflight::RecordFault;
use crate::link::{QueuePosition, QueueStart};
use crate::virtqueue::{Chain, QueueAddresses, RingFault, features};

/// The most chains fetched in one turn: large enough to share the cost of a batch's fixed copies, small enough that a
/// flooding queue does not hold up its neighbours on the reactor.
pub const FETCH_MAX: u16 = 32;
/// Up to this many chains are fetched whatever waits behind them.
const FETCH_WHOLE_MAX: u16 = 16;

/// How many chains to fetch when `waiting` wait: only half of more than a few, so that the driver has the first half back and
/// adds to the queue while the card has the second.
#[inline]
const fn batch_of(waiting: u16, budget: u16) -> u16 {
    let half = waiting.div_ceil(2);
    let wanted = if half > FETCH_WHOLE_MAX { half } else { FETCH_WHOLE_MAX };
    let most = if wanted < waiting { wanted } else { waiting };
    if most < budget { most } else { budget }
}

/// Why a queue cannot go on. All are the guest's or its memory's fault, but for a failed copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum QueueFault {
    /// The ring breaks the specification's rules.
    #[error(transparent)]
    Ring(#[from] RingFault),
    /// The ring or a buffer lies outside the VM's memory.
    #[error(transparent)]
    Unmapped(#[from] Unmapped),
    /// The DMA engine failed.
    #[error(transparent)]
    Dma(#[from] DmaFault),
    /// The request in a chain breaks the device's rules.
    #[error("{0}")]
    Request(&'static str),
    /// The record of requests in flight is not this queue's.
    #[error(transparent)]
    Record(#[from] RecordFault),
    /// The VM's memory file was cut short.
    #[error("the VM's memory file was truncated")]
    MemoryLost,
}

/// How far `fetch` came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fetched {
    /// The ring is empty.
    Nothing,
    /// Whether it is empty is on its way; call again.
    Looking,
    /// Copies are on their way; call again.
    Waiting,
    /// This many chains were handed over.
    Chains(u16),
}

/// Hands out parts of a card memory, in order, before it is made.
#[derive(Default, Debug)]
pub struct CardLayout(u32);

impl CardLayout {
    /// The next `bytes`, aligned to a cache line so that no two parts share one.
    pub const fn take(&mut self, bytes: u32) -> CardAddress {
        let at = self.0;
        self.0 = (at + bytes).next_multiple_of(64);
        CardAddress(at)
    }

    /// The next `bytes`, aligned to a page.
    pub const fn take_pages(&mut self, bytes: u32) -> CardAddress {
        self.0 = self.0.next_multiple_of(4096);
        self.take(bytes)
    }

    /// What was handed out, bytes.
    #[must_use]
    pub const fn bytes(&self) -> u32 {
        self.0
    }
}

enum Ring {
    Split(split::SplitMirror),
    Packed(packed::PackedMirror),
}

/// One virtqueue's mirror.
pub struct Mirror<E> {
    engine: E,
    ring: Ring,
}

/// How a queue's parts are reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// All are mapped.
    Mapped,
    /// The VMM has to be asked for some.
    Distant,
}

/// Checks that a queue's parts are aligned and inside the VM's memory (virtio 1.3, 2.7 and 2.8).
///
/// # Errors
/// A text for the front end that says what is wrong.
pub fn check_addresses(start: &QueueStart, memory: &HostMemory) -> Result<Reach, String> {
    let size = start.size;
    let packed = start.features & features::RING_PACKED != 0;
    if size == 0 || size > crate::virtqueue::QUEUE_SIZE_MAX || (!packed && !size.is_power_of_two()) {
        return Err(format!("queue {}: {size} is not a queue size", start.index));
    }
    let (driver, device) = if packed {
        ((4, 4), (4, 4))
    } else {
        use crate::virtqueue::split::{avail_bytes, used_bytes};
        ((2, avail_bytes(size)), (4, used_bytes(size)))
    };
    let parts: [(&str, Iova, (u64, u64)); 3] = [
        ("descriptor area", start.descriptors, (16, 16 * u64::from(size))),
        ("driver area", start.driver, driver),
        ("device area", start.device, device),
    ];
    let mut reach = Reach::Mapped;
    for (name, at, (alignment, bytes)) in parts {
        if !at.is_aligned(alignment) {
            return Err(format!("queue {}: the {name} at {at} is not aligned to {alignment}", start.index));
        }
        if memory.covers(at, bytes) {
            continue;
        }
        reach = Reach::Distant;
        if !memory.reaches(at, bytes, Direction::FromHost) {
            return Err(format!("queue {}: the {name} at {at} is outside the VM's memory", start.index));
        }
    }
    if packed && (start.position.next_avail >= size || start.position.next_used >= size) {
        return Err(format!("queue {}: it cannot go on outside its {size} slots", start.index));
    }
    Ok(reach)
}

impl<E: DmaEngine> Mirror<E> {
    /// A mirror for the queue of `start`, whose addresses have been checked. `layout` already holds the device's parts of
    /// the card memory; the mirror takes its own behind them, and `engine` makes the engine with all of it.
    ///
    /// # Errors
    /// When there is no card memory, or the used index cannot be read.
    pub fn new(
        start: &QueueStart,
        mut layout: CardLayout,
        engine: impl FnOnce(CardMemory) -> E,
    ) -> std::io::Result<Self> {
        let at = QueueAddresses { descriptors: start.descriptors, driver: start.driver, device: start.device };
        if start.features & features::RING_PACKED != 0 {
            let parts = packed::PackedMirror::new(start, at, &mut layout).map_err(std::io::Error::other)?;
            Ok(Self { engine: engine(CardMemory::new(layout.bytes())?), ring: Ring::Packed(parts) })
        } else {
            let parts = split::SplitMirror::new(start, at, &mut layout);
            Ok(Self { engine: engine(CardMemory::new(layout.bytes())?), ring: Ring::Split(parts) })
        }
    }

    /// The device reads all buffers of this queue and writes none: see [`ChainWalk::only_reads`](crate::virtqueue::ChainWalk::only_reads).
    pub const fn only_reads(&mut self) {
        match &mut self.ring {
            Ring::Split(ring) => ring.only_reads(),
            Ring::Packed(ring) => ring.only_reads(),
        }
    }

    /// The DMA engine, for headers, payload and status.
    #[inline]
    pub const fn engine(&mut self) -> &mut E {
        &mut self.engine
    }

    /// The DMA engine, to look at.
    #[inline]
    pub const fn engine_ref(&self) -> &E {
        &self.engine
    }

    /// Uses another table of host memory.
    pub fn set_memory(&mut self, memory: Arc<HostMemory>) {
        self.engine.set_memory(memory);
    }

    /// Takes up to `budget` chains (at most [`FETCH_MAX`]) off the ring and hands each to `sink`.
    ///
    /// # Errors
    /// When the ring or a chain is broken; chains handed over before stay valid, and the broken one is still on the ring.
    #[inline]
    pub fn fetch(&mut self, budget: u16, sink: impl FnMut(&mut E, Chain<'_>)) -> Result<Fetched, QueueFault> {
        let budget = budget.min(FETCH_MAX);
        match &mut self.ring {
            Ring::Split(ring) => ring.fetch(&mut self.engine, budget, sink),
            Ring::Packed(ring) => ring.fetch(&mut self.engine, budget, sink),
        }
    }

    /// Stages the used entry of a chain; `written` bytes of it were written. `entry` is what the record of what is in flight calls it,
    /// where there is one.
    #[inline]
    pub fn stage_used(&mut self, id: u16, slots: u16, written: u32, entry: u16) {
        match &mut self.ring {
            Ring::Split(ring) => ring.stage_used(&self.engine, id, written),
            Ring::Packed(ring) => ring.stage_used(&self.engine, id, slots, written, entry),
        }
    }

    /// Publishes what is staged, and finds out whether the driver wants an interrupt. `None` while copies are on their way
    /// or when there is nothing; `Some(interrupt)` once a batch has become visible to the driver.
    ///
    /// # Errors
    /// When the ring's memory is gone or a copy failed.
    #[inline]
    pub fn publish(&mut self) -> Result<Option<bool>, QueueFault> {
        match &mut self.ring {
            Ring::Split(ring) => ring.publish(&mut self.engine),
            Ring::Packed(ring) => ring.publish(&mut self.engine),
        }
    }

    /// Whether used entries are staged or on their way.
    #[inline]
    #[must_use]
    pub const fn is_publishing(&self) -> bool {
        match &self.ring {
            Ring::Split(ring) => ring.is_publishing(),
            Ring::Packed(ring) => ring.is_publishing(),
        }
    }

    /// Whether `fetch` waits for copies.
    #[inline]
    #[must_use]
    pub const fn is_fetching(&self) -> bool {
        match &self.ring {
            Ring::Split(ring) => ring.is_fetching(),
            Ring::Packed(ring) => ring.is_fetching(),
        }
    }

    /// Whether there are requests in flight from before the queue started that were not fetched yet, or this is not known yet.
    #[inline]
    #[must_use]
    pub fn is_resuming(&self) -> bool {
        match &self.ring {
            Ring::Split(ring) => ring.is_resuming(),
            Ring::Packed(ring) => ring.is_resuming(),
        }
    }

    /// Whether the record of what was in flight before the queue started is still to be taken up: the queue's position is not known
    /// before.
    #[inline]
    #[must_use]
    pub const fn is_attaching(&self) -> bool {
        match &self.ring {
            Ring::Split(ring) => ring.is_attaching(),
            Ring::Packed(ring) => ring.is_attaching(),
        }
    }

    /// Asks the driver to ring the doorbell for what comes next, then looks once more (virtio 1.3, 2.7.10 and 2.8.10).
    /// `Some(true)`: asked, and the ring is empty: one may sleep. `Some(false)`: there is something. `None`: copies are on
    /// their way; call again.
    ///
    /// # Errors
    /// When the ring's memory is gone or a copy failed.
    pub fn arm_doorbell(&mut self) -> Result<Option<bool>, QueueFault> {
        match &mut self.ring {
            Ring::Split(ring) => ring.arm_doorbell(&mut self.engine),
            Ring::Packed(ring) => ring.arm_doorbell(&mut self.engine),
        }
    }

    /// Tells the driver that the doorbell is not needed: the ring is polled.
    ///
    /// # Errors
    /// When the ring's memory is gone.
    pub fn disarm_doorbell(&mut self) -> Result<(), QueueFault> {
        match &mut self.ring {
            Ring::Split(ring) => ring.disarm_doorbell(&mut self.engine),
            Ring::Packed(ring) => ring.disarm_doorbell(&mut self.engine),
        }
    }

    /// Where the queue would go on if the last `chains` that were fetched were fetched again, of a device that uses chains in the
    /// order in which it fetched them, and has published what it used.
    #[must_use]
    pub fn position_before(&self, chains: u16) -> QueuePosition {
        let position = self.position();
        match &self.ring {
            Ring::Split(ring) => {
                let chains = chains.wrapping_add(ring.left_again());
                QueuePosition { next_avail: position.next_avail.wrapping_sub(chains), ..position }
            }
            // What was not used starts where the next used slot is.
            Ring::Packed(_) => {
                QueuePosition { next_avail: position.next_used, avail_wrap: position.used_wrap, ..position }
            }
        }
    }

    /// Where the queue would go on.
    #[must_use]
    pub fn position(&self) -> QueuePosition {
        match &self.ring {
            Ring::Split(ring) => ring.position(),
            Ring::Packed(ring) => ring.position(),
        }
    }
}

#[cfg(test)]
mod tests;
