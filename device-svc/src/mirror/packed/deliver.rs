//! From descriptors on the card to chains: what a packed ring's mirror has found is taken off the ring, marked in the record of requests
//! in flight, walked and handed over.
//!
//! The record has a pass of its own before the walk: in one loop the two need more registers than there are.

use super::PackedMirror;
use super::record::Recorded;
use crate::address::CardAddress;
use crate::dma::{CardMemory, DmaEngine};
use crate::mirror::QueueFault;
use crate::virtqueue::{Chain, ChainWalk, PackedDescriptor, RingFault, WalkEnd};

/// A chain that was found.
#[derive(Clone, Copy, Default)]
pub(super) struct Found {
    /// Which of the slots that were fetched is its first.
    pub(super) first: u16,
    pub(super) slots: u16,
    /// What the record calls it.
    pub(super) entry: u16,
    pub(super) table: CardAddress,
    pub(super) table_count: u16,
}

impl Found {
    /// Its descriptors; those that were fetched are at `fetched` on the card.
    #[inline(always)]
    fn descriptors(self, card: &CardMemory, fetched: CardAddress) -> impl Iterator<Item = PackedDescriptor> {
        card.values(fetched.add(16 * u32::from(self.first)), self.slots)
    }

    /// Walks it, with its table. Returns its buffer id.
    #[inline(always)]
    fn walk(self, walk: &mut ChainWalk, card: &CardMemory, fetched: CardAddress) -> Result<u16, RingFault> {
        let (id, end) = walk.walk_slots(self.descriptors(card, fetched))?;
        if end == WalkEnd::Table {
            walk.walk_list(card.values(self.table, self.table_count))?;
        }
        Ok(id)
    }
}

impl PackedMirror {
    /// Walks the chains that were found and hands them over. Those before a bad one are off the ring and in the record when this returns, and
    /// the bad one is not: whoever goes on here meets it again.
    #[inline]
    pub(super) fn deliver<E: DmaEngine>(
        &mut self,
        engine: &mut E,
        sink: &mut impl FnMut(&mut E, Chain<'_>),
    ) -> Result<(), QueueFault> {
        let found = &mut self.found[..usize::from(self.found_count)];
        let fetched = self.places.descriptors;
        let (mut is_again, mut end) = (false, 0);
        match self.recorded.as_deref_mut() {
            // The ring has taken them long since, and the record knows them.
            Some(Recorded { is_again: true, again, .. }) => {
                is_again = true;
                found.iter_mut().zip(again).for_each(|(found, chain)| found.entry = chain.entry);
            }
            recorded => {
                // First: what does not fit into the ring does not fit into its record.
                self.ring.has_room(self.found_slots)?;
                if let Some(Recorded { record, .. }) = recorded {
                    end = record.fill(|filling| {
                        for found in &mut *found {
                            found.entry = filling.chain(found.descriptors(engine.card(), fetched));
                        }
                    });
                }
            }
        }
        for (index, found) in found.iter().enumerate() {
            match found.walk(&mut self.walk, engine.card(), fetched) {
                Ok(id) => {
                    let chain = self.walk.chain(id, found.slots);
                    sink(engine, Chain { entry: found.entry, again: is_again, ..chain });
                }
                Err(fault) => {
                    self.leave(index);
                    return Err(fault.into());
                }
            }
        }
        self.take_found(self.found_count, self.found_slots, end);
        Ok(())
    }

    /// The first `count` chains that were found, which have so many slots, have been handed over. `end` is the record's first entry behind
    /// theirs.
    #[inline(always)]
    fn take_found(&mut self, count: u16, slots: u16, end: u16) {
        match self.recorded.as_deref_mut() {
            Some(Recorded { is_again: true, again, .. }) => drop(again.drain(..usize::from(count))),
            recorded => {
                self.ring.take(slots);
                if let Some(Recorded { record, .. }) = recorded {
                    record.mark(count, end);
                }
            }
        }
    }

    /// The chains from this one on are left on the ring, as the first of them is a bad one.
    #[cold]
    fn leave(&mut self, first: usize) {
        let slots = self.found[..first].iter().map(|found| found.slots).sum();
        self.take_found(first as u16, slots, self.found[first].entry);
        if let Some(Recorded { is_again: false, record, .. }) = self.recorded.as_deref_mut() {
            record.forget(self.found[first..usize::from(self.found_count)].iter().map(|found| found.entry));
        }
    }
}
