//! The mirror of a packed ring (virtio 1.3, 2.8).
//!
//! There is no index to read: a descriptor's flags say whether it is available, so a poll fetches a few descriptors from the
//! next place on, as many as the batch before took. A batch of used descriptors becomes visible with the flags of its first
//! one, which are written last.

mod deliver;
mod record;
mod used;

use std::collections::VecDeque;

use self::deliver::Found;
use self::record::Recorded;
use self::used::Staged;
use super::{CardLayout, FETCH_MAX, FETCH_WHOLE_MAX, Fetched, QueueFault};
use crate::address::{CardAddress, Iova};
use crate::dma::{DmaEngine, Ticket};
use crate::inflight::{PackedRecord, RecordFault};
use crate::link::{QueuePosition, QueueStart};
use crate::virtqueue::packed::{PackedRing, Place};
use crate::virtqueue::{
    Chain, ChainWalk, DESCRIPTOR_INDIRECT, DESCRIPTOR_NEXT, PackedDescriptor, QueueAddresses, RingFault, SEGMENTS_MAX,
    features,
};

/// Card memory for the indirect tables of one batch.
const TABLES_BYTES: u32 = 32 << 10;
/// Descriptors that a poll fetches at least: one cache line of them.
const SLOTS_MIN: u16 = 4;
/// Descriptors that a poll fetches at most.
const SLOTS_MAX: u16 = 128;
/// Where a descriptor's flags are.
const FLAGS: u32 = 14;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fetching {
    Idle,
    /// Descriptors are on their way.
    Slots(Ticket),
    /// The indirect tables of the chains that were found are on their way.
    Tables(Ticket),
}

struct Places {
    event: CardAddress,
    device_event: CardAddress,
    first_flags: CardAddress,
    /// What was fetched, in its order: a chain lies in one piece also where the ring ends within it.
    descriptors: CardAddress,
    tables: CardAddress,
    used: CardAddress,
}

pub(super) struct PackedMirror {
    ring: PackedRing,
    places: Places,
    walk: ChainWalk,
    fetching: Fetching,
    found: [Found; FETCH_MAX as usize],
    found_count: u16,
    /// The batch before had as many chains as it might.
    was_full: bool,
    /// How many chains this batch may have.
    budget: u16,
    /// Slots of the chains that were found.
    found_slots: u16,
    /// Whether any of them may lead to an indirect table.
    has_tables: bool,
    /// Slots that were fetched, from the next available place on.
    fetched_slots: u16,
    /// How many slots the next poll fetches.
    guess: u16,
    staged: Vec<Staged>,
    /// What was staged, of a batch that is being published.
    published: Vec<Staged>,
    publishing: Option<(Ticket, u16)>,
    event_index: bool,
    arming: Option<Ticket>,
    recorded: Option<Box<Recorded>>,
}

impl PackedMirror {
    pub(super) fn new(start: &QueueStart, at: QueueAddresses, layout: &mut CardLayout) -> Result<Self, RecordFault> {
        let recorded = start.inflight.as_ref().map(|record| -> Result<_, RecordFault> {
            let record = PackedRecord::new(record, start.size)?;
            Ok(Box::new(Recorded { record, attaching: Some(None), again: VecDeque::new(), is_again: false }))
        });
        let size = u32::from(start.size);
        let places = Places {
            event: layout.take(4),
            device_event: layout.take(2),
            first_flags: layout.take(2),
            descriptors: layout.take(16 * size),
            tables: layout.take(TABLES_BYTES),
            used: layout.take(16 * size),
        };
        let position = start.position;
        let next_avail = Place { slot: position.next_avail, wrap: position.avail_wrap };
        let next_used = Place { slot: position.next_used, wrap: position.used_wrap };
        Ok(Self {
            ring: PackedRing::new(start.size, at, next_avail, next_used),
            places,
            walk: ChainWalk::new(start.features & features::INDIRECT != 0),
            fetching: Fetching::Idle,
            found: [Found::default(); FETCH_MAX as usize],
            found_count: 0,
            was_full: false,
            budget: 0,
            found_slots: 0,
            has_tables: false,
            fetched_slots: 0,
            guess: SLOTS_MIN,
            staged: Vec::with_capacity(usize::from(start.size)),
            published: Vec::with_capacity(usize::from(start.size)),
            publishing: None,
            event_index: start.features & features::EVENT_INDEX != 0,
            arming: None,
            recorded: recorded.transpose()?,
        })
    }

    #[inline]
    pub(super) fn fetch<E: DmaEngine>(
        &mut self,
        engine: &mut E,
        budget: u16,
        mut sink: impl FnMut(&mut E, Chain<'_>),
    ) -> Result<Fetched, QueueFault> {
        if self.recorded.as_ref().is_some_and(|recorded| recorded.attaching.is_some()) {
            self.attach(engine)?;
            return Ok(Fetched::Waiting);
        }
        loop {
            match self.fetching {
                Fetching::Idle => {
                    if budget == 0 {
                        return Ok(Fetched::Nothing);
                    }
                    // A wish for a doorbell that was not seen through is made again.
                    self.arming = None;
                    if self.request_again(engine, budget) {
                        self.request_tables(engine)?;
                        self.fetching = Fetching::Tables(engine.submit());
                        continue;
                    }
                    // How much waits is not known before it is fetched: where the batch before was whole, probably more.
                    let most = if self.was_full { FETCH_MAX } else { FETCH_WHOLE_MAX };
                    (self.budget, self.found_count, self.found_slots, self.fetched_slots) = (budget.min(most), 0, 0, 0);
                    self.has_tables = false;
                    self.fetching = Fetching::Slots(self.request_slots(engine, self.guess)?);
                }
                Fetching::Slots(ticket) => {
                    if engine.landed()? < ticket {
                        return Ok(if self.found_count == 0 { Fetched::Looking } else { Fetched::Waiting });
                    }
                    if self.find_chains(engine)? {
                        self.fetching = Fetching::Slots(self.request_slots(engine, SLOTS_MIN)?);
                        continue;
                    }
                    if self.found_count == 0 {
                        self.fetching = Fetching::Idle;
                        self.guess = SLOTS_MIN;
                        engine.forgive_empty_poll(16 * u32::from(self.fetched_slots));
                        return Ok(Fetched::Nothing);
                    }
                    self.was_full = self.found_count >= FETCH_WHOLE_MAX;
                    // Where the budget ended the batch, more slots would only be fetched again.
                    let more = self.found_slots == self.fetched_slots && self.found_count < self.budget;
                    self.guess = if more { self.guess * 2 } else { self.found_slots }.clamp(SLOTS_MIN, SLOTS_MAX);
                    self.request_tables(engine)?;
                    self.fetching = Fetching::Tables(engine.submit());
                }
                Fetching::Tables(ticket) => {
                    let landed = engine.landed()?;
                    if landed < ticket || !self.settle_record(landed) {
                        return Ok(Fetched::Waiting);
                    }
                    self.fetching = Fetching::Idle;
                    self.deliver(engine, &mut sink)?;
                    if self.found_count == self.budget {
                        // As many more wait, probably; and where they are their used descriptors will be written.
                        let next = self.ring.next_avail().slot;
                        let slots = self.guess.min(self.ring.size() - next);
                        engine.expect_write(self.ring.descriptor_at(next), 16 * u32::from(slots));
                    }
                    return Ok(Fetched::Chains(self.found_count));
                }
            }
        }
    }

    /// Fetches up to `count` more slots, not beyond the ring's end in one go, nor around the ring onto those already here.
    fn request_slots<E: DmaEngine>(&mut self, engine: &mut E, count: u16) -> Result<Ticket, QueueFault> {
        let size = self.ring.size();
        let slot = self.ring.next_avail().advance(self.fetched_slots, size).slot;
        let count = count.min(size - slot).min(size - self.fetched_slots);
        if count > 0 {
            let to = self.places.descriptors.add(16 * u32::from(self.fetched_slots));
            engine.read_packed(self.ring.descriptor_at(slot), to, u32::from(count))?;
            self.fetched_slots += count;
        }
        Ok(engine.submit())
    }

    /// One of those that were fetched.
    #[inline]
    fn descriptor<E: DmaEngine>(&self, engine: &E, number: u16) -> PackedDescriptor {
        engine.card().get(self.places.descriptors.add(16 * u32::from(number)))
    }

    /// Looks for whole chains in what was fetched. Returns whether a chain goes on beyond it.
    fn find_chains<E: DmaEngine>(&mut self, engine: &E) -> Result<bool, QueueFault> {
        let size = self.ring.size();
        let mut start = self.ring.next_avail().advance(self.found_slots, size);
        while self.found_count < self.budget && self.found_slots < self.fetched_slots {
            let mut descriptor = self.descriptor(engine, self.found_slots);
            // Only the first descriptor's flags count: the driver makes a chain available with them, last
            // (virtio 1.3, 2.8.21.1).
            if !PackedRing::is_available(descriptor.flags, start) {
                break;
            }
            let mut slots = 1;
            while descriptor.flags & (DESCRIPTOR_NEXT | DESCRIPTOR_INDIRECT) == DESCRIPTOR_NEXT {
                if u32::from(slots) >= SEGMENTS_MAX || self.found_slots + slots >= size {
                    return Err(RingFault::ChainTooLong { limit: SEGMENTS_MAX.min(u32::from(size)) }.into());
                }
                if self.found_slots + slots >= self.fetched_slots {
                    return Ok(true);
                }
                descriptor = self.descriptor(engine, self.found_slots + slots);
                slots += 1;
            }
            self.found[usize::from(self.found_count)] = Found { first: self.found_slots, slots, ..Found::default() };
            self.has_tables |= descriptor.flags & DESCRIPTOR_INDIRECT != 0;
            self.found_count += 1;
            self.found_slots += slots;
            start = start.advance(slots, size);
        }
        Ok(false)
    }

    /// Fetches the indirect tables of the chains that were found.
    fn request_tables<E: DmaEngine>(&mut self, engine: &mut E) -> Result<(), QueueFault> {
        if !self.has_tables {
            return Ok(());
        }
        let mut used = 0;
        for index in 0..self.found_count {
            let found = self.found[usize::from(index)];
            let descriptor = self.descriptor(engine, found.first + found.slots - 1);
            let bytes = descriptor.length & !15;
            if descriptor.flags & DESCRIPTOR_INDIRECT == 0 || bytes == 0 || bytes / 16 > SEGMENTS_MAX {
                // None, or one of a forbidden size, which the walk names.
                continue;
            }
            if used + bytes > TABLES_BYTES {
                self.found_count = index;
                self.found_slots = self.found[..usize::from(index)].iter().map(|found| found.slots).sum();
                return Ok(());
            }
            let found = &mut self.found[usize::from(index)];
            found.table = self.places.tables.add(used);
            found.table_count = (bytes / 16) as u16;
            used += bytes;
            engine.read(Iova(descriptor.address), found.table, bytes)?;
        }
        Ok(())
    }

    pub(super) const fn only_reads(&mut self) {
        self.walk.only_reads();
    }

    pub(super) const fn is_fetching(&self) -> bool {
        !matches!(self.fetching, Fetching::Idle)
    }

    pub(super) const fn position(&self) -> QueuePosition {
        let (avail, used) = (self.ring.next_avail(), self.ring.next_used());
        QueuePosition { next_avail: avail.slot, avail_wrap: avail.wrap, next_used: used.slot, used_wrap: used.wrap }
    }
}

#[cfg(test)]
mod tests;
