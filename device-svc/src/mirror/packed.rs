//! The mirror of a packed ring (virtio 1.3, 2.8).
//!
//! There is no index to read: a descriptor's flags say whether it is available, so a poll fetches a few descriptors from the
//! next place on, as many as the batch before took. A batch of used descriptors becomes visible with the flags of its first
//! one, which are written last.

mod deliver;

use std::collections::VecDeque;

use self::deliver::{Delivery, Found, Unrecorded};
use super::{CardLayout, FETCH_MAX, FETCH_WHOLE_MAX, Fetched, QueueFault};
use crate::address::{CardAddress, Iova};
use crate::dma::{DmaEngine, Ticket};
use crate::inflight::{PackedRecord, RecordFault, RecordedChain};
use crate::link::{QueuePosition, QueueStart};
use crate::virtqueue::packed::{EVENT_DESCRIPTOR, EVENT_DISABLE, EVENT_ENABLE, PackedRing, Place, mark};
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

/// A used descriptor that is staged: its slot and flags, and what the record calls its chain.
#[derive(Clone, Copy)]
struct Staged {
    slot: u16,
    flags: u16,
    entry: u16,
}

struct Places {
    event: CardAddress,
    device_event: CardAddress,
    first_flags: CardAddress,
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

/// What a queue has whose requests in flight are recorded.
struct Recorded {
    record: PackedRecord,
    /// The record is still to be taken up; the copy that it waits for is on its way, if it was asked for.
    attaching: Option<Option<Ticket>>,
    /// Requests that were in flight before, and are fetched again before anything new.
    again: VecDeque<RecordedChain>,
    /// The batch under way is of those.
    is_again: bool,
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

    /// Takes the record up before anything else is done. Returns whether that is done.
    #[cold]
    fn attach<E: DmaEngine>(&mut self, engine: &mut E) -> Result<bool, QueueFault> {
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
                self.ring.take(chain.descriptors.len() as u16)?;
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
    fn settle_record(&mut self, landed: Ticket) -> bool {
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

    pub(super) const fn is_attaching(&self) -> bool {
        match &self.recorded {
            Some(recorded) => recorded.attaching.is_some(),
            None => false,
        }
    }

    pub(super) fn is_resuming(&self) -> bool {
        self.is_attaching() || self.recorded.as_ref().is_some_and(|recorded| !recorded.again.is_empty())
    }

    /// Puts the descriptors of requests that were in flight before where slots are fetched to. Returns whether there are any.
    fn request_again<E: DmaEngine>(&mut self, engine: &E, budget: u16) -> bool {
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
            let to = self.places.descriptors.add(16 * u32::from(slot));
            engine.read_packed(self.ring.descriptor_at(slot), to, u32::from(count))?;
            self.fetched_slots += count;
        }
        Ok(engine.submit())
    }

    #[inline]
    fn descriptor<E: DmaEngine>(&self, engine: &E, slot: u16) -> PackedDescriptor {
        engine.card().get(self.places.descriptors.add(16 * u32::from(slot)))
    }

    /// Looks for whole chains in what was fetched. Returns whether a chain goes on beyond it.
    fn find_chains<E: DmaEngine>(&mut self, engine: &E) -> Result<bool, QueueFault> {
        let size = self.ring.size();
        let mut start = self.ring.next_avail().advance(self.found_slots, size);
        while self.found_count < self.budget && self.found_slots < self.fetched_slots {
            let mut descriptor = self.descriptor(engine, start.slot);
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
                descriptor = self.descriptor(engine, start.advance(slots, size).slot);
                slots += 1;
            }
            self.found[usize::from(self.found_count)] = Found { first: start.slot, slots, ..Found::default() };
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
            let last = Place { slot: found.first, wrap: true }.advance(found.slots - 1, self.ring.size());
            let descriptor = self.descriptor(engine, last.slot);
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
            found.table_count = bytes / 16;
            used += bytes;
            engine.read(Iova(descriptor.address), found.table, bytes)?;
        }
        Ok(())
    }

    /// Takes the chains that were found off the ring, walks them and hands them over; with a record they are in it when this returns.
    #[inline]
    fn deliver<E: DmaEngine>(
        &mut self,
        engine: &mut E,
        sink: &mut impl FnMut(&mut E, Chain<'_>),
    ) -> Result<(), QueueFault> {
        let found = &mut self.found[..usize::from(self.found_count)];
        let mut delivery =
            Delivery { ring: &mut self.ring, walk: &mut self.walk, descriptors: self.places.descriptors };
        match self.recorded.as_deref_mut() {
            None => delivery.deliver(engine, found, false, &mut Unrecorded, sink),
            Some(Recorded { is_again: true, again, .. }) => {
                for (found, chain) in found.iter_mut().zip(again.drain(..usize::from(self.found_count))) {
                    found.entry = chain.entry;
                }
                delivery.deliver(engine, found, true, &mut Unrecorded, sink)
            }
            Some(Recorded { record, .. }) => {
                record.mark(|marking| delivery.deliver(engine, found, false, marking, sink))
            }
        }
    }

    #[inline]
    pub(super) fn stage_used<E: DmaEngine>(&mut self, engine: &E, id: u16, slots: u16, written: u32, entry: u16) {
        let place = self.ring.stage_used(slots);
        let flags = PackedRing::used_flags(place, written > 0);
        let used = PackedDescriptor { address: mark(slots), length: written, id, flags };
        engine.card().put(self.places.used.add(16 * u32::from(place.slot)), used);
        self.staged.push(Staged { slot: place.slot, flags, entry });
    }

    #[inline]
    pub(super) fn publish<E: DmaEngine>(&mut self, engine: &mut E) -> Result<Option<bool>, QueueFault> {
        if self.publishing.is_none() {
            let Some(&first) = self.staged.first() else { return Ok(None) };
            // The first one's mark before all others: see `left_at`.
            let from = self.places.used.add(16 * u32::from(first.slot));
            engine.write(from, self.ring.descriptor_at(first.slot), FLAGS)?;
            self.write_behind_first(engine)?;
            if let Some(recorded) = &mut self.recorded {
                // The flags are queued behind this, so they land behind it.
                recorded.record.link(entries(&self.staged), self.ring.next_used());
            }
            engine.card().put(self.places.first_flags, first.flags);
            let flags_at = Iova(self.ring.descriptor_at(first.slot).0.wrapping_add(u64::from(FLAGS)));
            engine.write_index(self.places.first_flags, flags_at)?;
            std::mem::swap(&mut self.staged, &mut self.published);
            self.staged.clear();
            let slots = self.ring.publish();
            // Our used flags against the driver's event: a full barrier on both sides (virtio 1.3, 2.8.10).
            engine.order();
            let event = self.ring.driver_event_at();
            // Flags before the place they speak of: the driver writes them in the other order.
            engine.read_index(Iova(event.0.wrapping_add(2)), self.places.event.add(2))?;
            if self.event_index {
                engine.read_index(event, self.places.event)?;
            }
            self.publishing = Some((engine.submit(), slots));
        }
        let Some((ticket, slots)) = self.publishing else { return Ok(None) };
        if engine.landed()? < ticket {
            return Ok(None);
        }
        if let Some(recorded) = &mut self.recorded {
            recorded.record.complete(entries(&self.published));
        }
        self.publishing = None;
        // Slots that were staged in the meantime lie behind those published.
        let wanted = match engine.card().get::<u16>(self.places.event.add(2)) {
            EVENT_DISABLE => false,
            EVENT_DESCRIPTOR if self.event_index => {
                let event = engine.card().get::<u16>(self.places.event);
                let staged = self.ring.staged_slots();
                self.ring.passes_event(event, slots + staged) && !(staged > 0 && self.ring.passes_event(event, staged))
            }
            _ => true,
        };
        Ok(Some(wanted))
    }

    /// Writes all staged used descriptors but the first, neighbours in one copy.
    fn write_behind_first<E: DmaEngine>(&mut self, engine: &mut E) -> Result<(), QueueFault> {
        let mut index = 1;
        while index < self.staged.len() {
            let first = self.staged[index].slot;
            let mut count = 1;
            while self.staged.get(index + usize::from(count)).is_some_and(|next| next.slot == first + count) {
                count += 1;
            }
            let from = self.places.used.add(16 * u32::from(first));
            engine.write(from, self.ring.descriptor_at(first), 16 * u32::from(count))?;
            index += usize::from(count);
        }
        Ok(())
    }

    pub(super) const fn is_publishing(&self) -> bool {
        self.ring.staged_slots() > 0 || self.publishing.is_some()
    }

    pub(super) const fn only_reads(&mut self) {
        self.walk.only_reads();
    }

    pub(super) const fn is_fetching(&self) -> bool {
        !matches!(self.fetching, Fetching::Idle)
    }

    pub(super) fn arm_doorbell<E: DmaEngine>(&mut self, engine: &mut E) -> Result<Option<bool>, QueueFault> {
        if self.is_fetching() || self.is_resuming() {
            return Ok(Some(false));
        }
        let next = self.ring.next_avail();
        let ticket = match self.arming.take() {
            Some(ticket) => ticket,
            None => {
                self.say(engine, EVENT_ENABLE)?;
                engine.order();
                let flags_at = Iova(self.ring.descriptor_at(next.slot).0.wrapping_add(u64::from(FLAGS)));
                engine.read_index(flags_at, self.places.event)?;
                engine.submit()
            }
        };
        if engine.landed()? < ticket {
            self.arming = Some(ticket);
            return Ok(None);
        }
        let empty = !PackedRing::is_available(engine.card().get(self.places.event), next);
        if empty {
            engine.forgive_empty_poll(2);
        }
        Ok(Some(empty))
    }

    pub(super) fn disarm_doorbell<E: DmaEngine>(&mut self, engine: &mut E) -> Result<(), QueueFault> {
        self.say(engine, EVENT_DISABLE)?;
        engine.submit();
        Ok(())
    }

    fn say<E: DmaEngine>(&self, engine: &mut E, flags: u16) -> Result<(), QueueFault> {
        engine.card().put(self.places.device_event, flags);
        engine.write_index(self.places.device_event, Iova(self.ring.device_event_at().0.wrapping_add(2)))?;
        Ok(())
    }

    pub(super) const fn position(&self) -> QueuePosition {
        let (avail, used) = (self.ring.next_avail(), self.ring.next_used());
        QueuePosition { next_avail: avail.slot, avail_wrap: avail.wrap, next_used: used.slot, used_wrap: used.wrap }
    }
}

/// What the record calls the chains of these.
#[inline]
fn entries(staged: &[Staged]) -> impl Iterator<Item = u16> {
    staged.iter().map(|staged| staged.entry)
}
