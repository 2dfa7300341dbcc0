//! From descriptors on the card to chains: what a packed ring's mirror has found is taken off the ring, marked in the record of requests
//! in flight, walked and handed over.
//!
//! The record has a pass of its own before the walk: in one loop the two need more registers than there are.

use super::PackedMirror;
use super::record::Recorded;
use crate::address::CardAddress;
use crate::dma::{CardMemory, DmaEngine};
use crate::mirror::QueueFault;
use crate::virtqueue::{Chain, PackedDescriptor, WalkEnd};

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
}

impl PackedMirror {
    /// Takes the chains that were found off the ring, walks them and hands them over; with a record they are in it before.
    #[inline]
    pub(super) fn deliver<E: DmaEngine>(
        &mut self,
        engine: &mut E,
        sink: &mut impl FnMut(&mut E, Chain<'_>),
    ) -> Result<(), QueueFault> {
        let found = &mut self.found[..usize::from(self.found_count)];
        let fetched = self.places.descriptors;
        let mut is_again = false;
        match self.recorded.as_deref_mut() {
            // The ring has taken them long since, and the record knows them.
            Some(Recorded { is_again: true, again, .. }) => {
                is_again = true;
                for (found, chain) in found.iter_mut().zip(again.drain(..usize::from(self.found_count))) {
                    found.entry = chain.entry;
                }
            }
            recorded => {
                // First: what does not fit into the ring does not fit into its record.
                self.ring.take(self.found_slots)?;
                if let Some(Recorded { record, .. }) = recorded {
                    record.mark(|marking| {
                        for found in &mut *found {
                            found.entry = marking.chain(found.descriptors(engine.card(), fetched));
                        }
                    });
                }
            }
        }
        for found in found {
            let (id, end) = self.walk.walk_slots(found.descriptors(engine.card(), fetched))?;
            if end == WalkEnd::Table {
                self.walk.walk_list(engine.card().values(found.table, found.table_count))?;
            }
            sink(engine, Chain { entry: found.entry, again: is_again, ..self.walk.chain(id, found.slots) });
        }
        Ok(())
    }
}
