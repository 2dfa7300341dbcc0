//! From descriptors on the card to chains: the walk over what a packed ring's mirror has found, which notes each descriptor in the record of
//! requests in flight as it passes.

use crate::address::CardAddress;
use crate::dma::DmaEngine;
use crate::inflight::Note;
use crate::mirror::QueueFault;
use crate::virtqueue::packed::PackedRing;
use crate::virtqueue::{Chain, ChainWalk, Descriptor, PackedDescriptor, Step};

/// A chain that was found.
#[derive(Clone, Copy, Default)]
pub(super) struct Found {
    pub(super) first: u16,
    pub(super) slots: u16,
    /// What the record calls it.
    pub(super) entry: u16,
    pub(super) table: CardAddress,
    pub(super) table_count: u32,
}

/// What it takes to hand over chains.
pub(super) struct Delivery<'a> {
    pub(super) ring: &'a mut PackedRing,
    pub(super) walk: &'a mut ChainWalk,
    /// Where the ring's descriptors are on the card.
    pub(super) descriptors: CardAddress,
}

/// Nothing is noted: there is no record, or it has the chains already.
pub(super) struct Unrecorded;

impl Note for Unrecorded {
    #[inline(always)]
    fn begin(&mut self) {}

    #[inline(always)]
    fn descriptor(&mut self, _: PackedDescriptor) {}

    #[inline(always)]
    fn end(&mut self, _: u16) -> u16 {
        0
    }
}

impl Delivery<'_> {
    /// Hands over chains that were found; `again`: the ring has taken them long since, and the record knows them.
    #[inline(always)]
    pub(super) fn deliver<E: DmaEngine>(
        &mut self,
        engine: &mut E,
        found: &[Found],
        again: bool,
        note: &mut impl Note,
        sink: &mut impl FnMut(&mut E, Chain<'_>),
    ) -> Result<(), QueueFault> {
        let size = self.ring.size();
        for found in found {
            if !again {
                // Before it is noted: what does not fit into the ring does not fit into its record.
                self.ring.take(found.slots)?;
            }
            self.walk.begin();
            note.begin();
            let (mut slot, mut left, mut id) = (found.first, found.slots, 0);
            while left > 0 {
                let whole: PackedDescriptor = engine.card().get(self.descriptors.add(16 * u32::from(slot)));
                note.descriptor(whole);
                let PackedDescriptor { address, length, id: buffer, flags } = whole;
                id = buffer;
                if let Step::Indirect { .. } = self.walk.step(Descriptor { address, length, flags, next: 0 })? {
                    let card = engine.card();
                    // The table's entries have the ring's layout, flags last (virtio 1.3, 2.8.7).
                    self.walk.walk_list(found.table_count, |at| {
                        let entry: PackedDescriptor = card.get(found.table.add(16 * at));
                        Descriptor { address: entry.address, length: entry.length, flags: entry.flags, next: 0 }
                    })?;
                }
                slot = if slot + 1 == size { 0 } else { slot + 1 };
                left -= 1;
            }
            let noted = note.end(found.slots);
            let entry = if again { found.entry } else { noted };
            sink(engine, Chain { entry, again, ..self.walk.chain(id, found.slots) });
        }
        Ok(())
    }
}
