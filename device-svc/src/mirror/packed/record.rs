//! A packed ring whose requests in flight are recorded: how a queue goes on where one before it has ended, and what its record is told.

use std::collections::VecDeque;

use super::deliver::Found;
use super::used::entries;
use super::{FLAGS, PackedMirror};
use crate::address::Iova;
use crate::dma::{DmaEngine, Ticket};
use crate::inflight::{PackedRecord, RecordedChain};
use crate::mirror::QueueFault;
use crate::virtqueue::packed::{PackedRing, Place};

/// What a queue has whose requests in flight are recorded.
pub(super) struct Recorded {
    pub(super) record: PackedRecord,
    /// The record is still to be taken up; the copy that it waits for is on its way, if it was asked for.
    pub(super) attaching: Option<Option<Ticket>>,
    /// Requests that were in flight before, and are fetched again before anything new.
    pub(super) again: VecDeque<RecordedChain>,
    /// The batch under way is of those.
    pub(super) is_again: bool,
}

impl PackedMirror {
    /// Takes the record up before anything else is done. Returns whether that is done.
    #[cold]
    pub(super) fn attach<E: DmaEngine>(&mut self, engine: &mut E) -> Result<bool, QueueFault> {
        let Some(recorded) = &mut self.recorded else { return Ok(true) };
        let Some(asked) = recorded.attaching else { return Ok(true) };
        let ticket = match asked {
            Some(ticket) => ticket,
            None => {
                let slot = self.ring.descriptor_at(recorded.record.doubtful_slot());
                engine.read_index(Iova(slot.0.wrapping_add(u64::from(FLAGS))), self.places.event)?;
                engine.submit()
            }
        };
        recorded.attaching = Some(Some(ticket));
        if engine.landed()? < ticket {
            return Ok(false);
        }
        let flags = engine.card().get::<u16>(self.places.event);
        if let Some((used, again)) = recorded.record.attach(self.ring.size(), self.ring.next_used(), flags)? {
            // The front end cannot know after we died; it says what it said when the queue started first.
            self.ring.go_on_at(used);
            for chain in &again {
                // No more than the ring has: the record has checked that.
                self.ring.take(chain.descriptors.len() as u16);
            }
            recorded.again = again.into();
            recorded.attaching = None;
            self.take_back_used(engine, used)?;
        }
        if let Some(recorded) = &mut self.recorded {
            recorded.attaching = None;
        }
        Ok(true)
    }

    /// Marks all slots in flight, from the next used place on, as available again. A batch that was not published may have left used
    /// descriptors behind its first slot, where the driver would find them as soon as it comes there.
    #[cold]
    fn take_back_used<E: DmaEngine>(&mut self, engine: &mut E, used: Place) -> Result<(), QueueFault> {
        let size = self.ring.size();
        let flags = |wrap: bool| self.places.used.add(2 * u32::from(wrap));
        for wrap in [false, true] {
            // Nothing is staged before these copies have landed: chains are fetched behind them.
            engine.card().put(flags(wrap), PackedRing::available_flags(wrap));
        }
        for ahead in 0..self.ring.taken_slots() {
            let place = used.advance(ahead, size);
            let to = Iova(self.ring.descriptor_at(place.slot).0.wrapping_add(u64::from(FLAGS)));
            engine.write_index(flags(place.wrap), to)?;
        }
        engine.submit();
        Ok(())
    }

    /// Whether the record is as far as the ring. A batch that is on its way to the driver comes first: its entries may be filled
    /// again only when it is there.
    #[inline]
    pub(super) fn settle_record(&mut self, landed: Ticket) -> bool {
        if let Some(recorded) = &mut self.recorded
            && let Some((ticket, _)) = self.publishing
        {
            if landed < ticket {
                return false;
            }
            recorded.record.complete(entries(&self.published));
        }
        true
    }

    pub(in crate::mirror) const fn is_attaching(&self) -> bool {
        match &self.recorded {
            Some(recorded) => recorded.attaching.is_some(),
            None => false,
        }
    }

    pub(in crate::mirror) fn is_resuming(&self) -> bool {
        self.is_attaching() || self.recorded.as_ref().is_some_and(|recorded| !recorded.again.is_empty())
    }

    /// Puts the descriptors of requests that were in flight before where slots are fetched to. Returns whether there are any.
    pub(super) fn request_again<E: DmaEngine>(&mut self, engine: &E, budget: u16) -> bool {
        let Some(recorded) = &mut self.recorded else { return false };
        recorded.is_again = !recorded.again.is_empty();
        // All were on the ring together, so they fit.
        let mut slot = 0;
        (self.found_count, self.found_slots, self.fetched_slots) = (0, 0, 0);
        self.has_tables = true;
        for chain in recorded.again.iter().take(budget.into()) {
            let found = Found { first: slot, slots: chain.descriptors.len() as u16, ..Found::default() };
            for descriptor in &chain.descriptors {
                engine.card().put(self.places.descriptors.add(16 * u32::from(slot)), *descriptor);
                slot += 1;
            }
            self.found[usize::from(self.found_count)] = found;
            self.found_count += 1;
        }
        recorded.is_again
    }
}
