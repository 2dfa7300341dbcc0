//! A split ring whose requests in flight are recorded: how a queue goes on where one before it has ended, and what its record is told.

use std::collections::VecDeque;

use super::{Fetching, Publishing, SplitMirror};
use crate::address::CardAddress;
use crate::dma::{CardMemory, DmaEngine, Ticket};
use crate::inflight::SplitRecord;
use crate::mirror::QueueFault;
use crate::virtqueue::UsedElement;
use crate::virtqueue::split::Run;

/// What a queue has whose requests in flight are recorded.
pub(super) struct Recorded {
    pub(super) record: SplitRecord,
    /// Heads of requests that were in flight before, and are fetched again before anything new.
    pub(super) again: VecDeque<u16>,
    /// The batch under way is of those.
    pub(super) is_again: bool,
}

impl SplitMirror {
    /// The used index is the ring's own: read before the first element is staged, so that a queue that starts anywhere goes
    /// on where its ring stands.
    #[cold]
    pub(super) fn learn_used_index<E: DmaEngine>(&mut self, engine: &mut E) -> Result<bool, QueueFault> {
        let ticket = match self.fetching {
            Fetching::Index(ticket) => ticket,
            _ => {
                engine.read_index(self.ring.used_index_at(), self.places.used_index)?;
                engine.submit()
            }
        };
        if engine.landed()? < ticket {
            self.fetching = Fetching::Index(ticket);
            return Ok(false);
        }
        self.fetching = Fetching::Idle;
        let used = engine.card().get::<u16>(self.places.used_index);
        self.ring.start_used_at(used);
        if let Some(recorded) = &mut self.recorded
            && let Some(again) = recorded.record.attach(used, self.ring.size())?
        {
            // What a front end says of the available index after we died is the used index, or older than that.
            self.ring.go_on_behind(again.len() as u16);
            recorded.again = again.into();
        }
        self.used_unknown = false;
        Ok(true)
    }

    /// Whether the record is as far as the ring. A batch that is on its way to the driver comes first: its heads are the driver's
    /// again once it is there, and one of them may be fetched anew.
    #[inline]
    pub(super) fn settle_record<E: DmaEngine>(&mut self, engine: &E, landed: Ticket) -> bool {
        if let Some(recorded) = &mut self.recorded
            && let Publishing::Waiting { ticket, old, new } = self.publishing
        {
            if landed < ticket {
                return false;
            }
            let batch = heads_used(engine.card(), self.places.used, self.ring.used_runs(old, new));
            recorded.record.complete(batch, new);
        }
        true
    }

    /// Puts heads of requests that were in flight before where available entries are fetched to. Returns how many.
    pub(super) fn request_again<E: DmaEngine>(&mut self, engine: &E, budget: u16) -> Option<u16> {
        let recorded = self.recorded.as_mut()?;
        recorded.is_again = !recorded.again.is_empty();
        let count = recorded.again.len().min(budget.into());
        for (index, head) in recorded.again.iter().take(count).enumerate() {
            engine.card().put(self.places.entries.add(2 * index as u32), *head);
        }
        recorded.is_again.then_some(count as u16)
    }

    pub(in crate::mirror) const fn is_attaching(&self) -> bool {
        self.recorded.is_some() && self.used_unknown
    }

    pub(in crate::mirror) fn is_resuming(&self) -> bool {
        self.is_attaching() || self.left_again() > 0
    }

    /// How many requests that were in flight before are still to be fetched again.
    pub(in crate::mirror) fn left_again(&self) -> u16 {
        self.recorded.as_ref().map_or(0, |recorded| recorded.again.len() as u16)
    }
}

/// The heads of the used elements in these slots; the elements begin at `at`. They stay there until their chains' successors are used.
#[inline]
pub(super) fn heads_used(card: &CardMemory, at: CardAddress, runs: [Run; 2]) -> impl Iterator<Item = u16> {
    let [first, second] = runs.map(|Run { slot, count }| {
        card.values::<UsedElement>(at.add(8 * u32::from(slot)), count).map(|element| element.id as u16)
    });
    first.chain(second)
}
