//! The mirror of a split ring (virtio 1.3, 2.7).
//!
//! Descriptors are fetched by speculation: chains that a driver takes from its free list mostly lie one behind the other,
//! so the run from the first head to the last is fetched in one copy, as long as the chain before was for each. What was
//! guessed wrong is fetched in further rounds.

mod record;
mod used;

use std::collections::VecDeque;

use self::record::Recorded;
use super::{Fetched, QueueFault};
use crate::address::{CardAddress, Iova};
use crate::dma::{DmaEngine, Ticket};
use crate::inflight::SplitRecord;
use crate::link::{QueuePosition, QueueStart};
use crate::mirror::{CardLayout, FETCH_MAX, batch_of};
use crate::virtqueue::split::{Run, SplitRing};
use crate::virtqueue::{
    Chain, ChainWalk, DESCRIPTOR_INDIRECT, DESCRIPTOR_NEXT, Descriptor, QueueAddresses, RingFault, SEGMENTS_MAX,
    WalkEnd, features,
};

/// Card memory for the indirect tables of one batch: room for two thousand descriptors, and for at least one table.
const TABLES_BYTES: u32 = 32 << 10;
/// How many descriptors a guess fetches at most for one chain.
const GUESS_MAX: u16 = 8;
/// Two runs less than this many descriptors apart are fetched as one: 4 descriptors are a cache line.
const GAP_MAX: u16 = 4;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fetching {
    /// Nothing under way.
    Idle,
    /// The available index is on its way.
    Index(Ticket),
    /// `count` available entries are on their way.
    Entries(Ticket, u16),
    /// Descriptors and tables of `count` chains are on their way.
    Descriptors(Ticket, u16),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Publishing {
    Idle,
    /// Used elements and the index are on their way, which takes the used index from one value to the next.
    Waiting {
        ticket: Ticket,
        old: u16,
        new: u16,
    },
}

/// How far the search for a chain's descriptors has come.
#[derive(Clone, Copy, Default)]
struct Cursor {
    /// The descriptor to look at next.
    at: u16,
    /// How many were looked at.
    steps: u16,
    /// All are here.
    done: bool,
    /// The chain's indirect table in card memory, and how many descriptors were fetched.
    table: CardAddress,
    table_count: u32,
}

/// Where the parts are in card memory.
struct Places {
    avail_index: CardAddress,
    used_index: CardAddress,
    driver_event: CardAddress,
    device_event: CardAddress,
    entries: CardAddress,
    descriptors: CardAddress,
    tables: CardAddress,
    used: CardAddress,
}

pub(super) struct SplitMirror {
    ring: SplitRing,
    places: Places,
    walk: ChainWalk,
    fetching: Fetching,
    publishing: Publishing,
    cursors: [Cursor; FETCH_MAX as usize],
    /// For each descriptor, the round in which it was last asked for. It is here when that round is of this batch and over.
    asked_in: Box<[u32]>,
    /// Rounds of fetching descriptors: a batch has one, and one more for each time that a guess was wrong.
    round: u32,
    /// The batch's first round.
    first_round: u32,
    /// Chains of the batch that were handed over.
    delivered: u16,
    /// How long the last chain was.
    guess: u16,
    tables_used: u32,
    event_index: bool,
    arming: Option<Ticket>,
    /// The used index must be read from the ring first.
    used_unknown: bool,
    recorded: Option<Box<Recorded>>,
}

impl SplitMirror {
    pub(super) fn new(start: &QueueStart, at: QueueAddresses, layout: &mut CardLayout) -> Self {
        let size = u32::from(start.size);
        let places = Places {
            avail_index: layout.take(2),
            used_index: layout.take(2),
            driver_event: layout.take(2),
            device_event: layout.take(2),
            entries: layout.take(2 * u32::from(FETCH_MAX)),
            descriptors: layout.take(16 * size),
            tables: layout.take(TABLES_BYTES),
            used: layout.take(8 * size),
        };
        Self {
            ring: SplitRing::new(start.size, at, start.position.next_avail, 0),
            places,
            walk: ChainWalk::new(start.features & features::INDIRECT != 0),
            fetching: Fetching::Idle,
            publishing: Publishing::Idle,
            cursors: [Cursor::default(); FETCH_MAX as usize],
            asked_in: vec![0; size as usize].into_boxed_slice(),
            round: 0,
            first_round: 0,
            delivered: 0,
            guess: 3,
            tables_used: 0,
            event_index: start.features & features::EVENT_INDEX != 0,
            arming: None,
            used_unknown: true,
            recorded: start.inflight.as_ref().map(|record| {
                Box::new(Recorded { record: SplitRecord::new(record), again: VecDeque::new(), is_again: false })
            }),
        }
    }

    #[inline]
    pub(super) fn fetch<E: DmaEngine>(
        &mut self,
        engine: &mut E,
        budget: u16,
        mut sink: impl FnMut(&mut E, Chain<'_>),
    ) -> Result<Fetched, QueueFault> {
        if self.used_unknown && (!self.learn_used_index(engine)? || self.recorded.is_some()) {
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
                    if let Some(count) = self.request_again(engine, budget) {
                        self.fetching = Fetching::Entries(Ticket::default(), count);
                        continue;
                    }
                    // What is known to wait is taken first; the index is read again only when that is used up, which also
                    // keeps the line of the driver's index with the driver.
                    if self.ring.known_available() > 0 {
                        let count = batch_of(self.ring.known_available(), budget);
                        self.fetching = Fetching::Entries(self.request_entries(engine, count)?, count);
                    } else {
                        engine.read_index(self.ring.avail_index_at(), self.places.avail_index)?;
                        self.fetching = Fetching::Index(engine.submit());
                    }
                }
                Fetching::Index(ticket) => {
                    if engine.landed()? < ticket {
                        return Ok(Fetched::Looking);
                    }
                    self.fetching = Fetching::Idle;
                    if self.ring.see_avail(engine.card().get(self.places.avail_index))? == 0 {
                        engine.forgive_empty_poll(2);
                        return Ok(Fetched::Nothing);
                    }
                }
                Fetching::Entries(ticket, count) => {
                    if engine.landed()? < ticket {
                        return Ok(Fetched::Waiting);
                    }
                    self.begin_batch(engine, count)?;
                    self.fetching = Fetching::Descriptors(engine.submit(), count);
                }
                Fetching::Descriptors(ticket, count) => {
                    let landed = engine.landed()?;
                    if landed < ticket || !self.settle_record(engine, landed) {
                        return Ok(Fetched::Waiting);
                    }
                    self.deliver(engine, count, &mut sink)?;
                    if self.delivered < count {
                        let (ready, asked) = self.follow_chains(engine, count)?;
                        if !asked && ready > self.delivered {
                            // All that the chain named when it was followed is here, and yet something is missing.
                            return Err(RingFault::Changed.into());
                        }
                        self.fetching = Fetching::Descriptors(engine.submit(), ready);
                        continue;
                    }
                    self.fetching = Fetching::Idle;
                    self.expect_next(engine, count);
                    return Ok(Fetched::Chains(count));
                }
            }
        }
    }

    fn request_entries<E: DmaEngine>(&self, engine: &mut E, count: u16) -> Result<Ticket, QueueFault> {
        let mut to = self.places.entries;
        for Run { slot, count } in self.ring.avail_runs(count) {
            if count > 0 {
                engine.read(self.ring.avail_entry_at(slot), to, 2 * u32::from(count))?;
                to = to.add(2 * u32::from(count));
            }
        }
        Ok(engine.submit())
    }

    /// Guesses where the descriptors of the heads are, and fetches them.
    #[inline]
    fn begin_batch<E: DmaEngine>(&mut self, engine: &mut E, count: u16) -> Result<(), QueueFault> {
        // Rounds are numbered over the queue's life; long before the number wraps, old marks are cleared.
        if self.round > u32::MAX / 2 {
            self.asked_in.fill(0);
            self.round = 0;
        }
        self.round += 1;
        self.first_round = self.round;
        self.tables_used = 0;
        self.delivered = 0;
        let size = self.ring.size();
        let mut run: Option<(u16, u16)> = None;
        for index in 0..count {
            let head = engine.card().get::<u16>(self.places.entries.add(2 * u32::from(index)));
            if head >= size {
                return Err(RingFault::NoSuchDescriptor { number: head, size: u32::from(size) }.into());
            }
            self.cursors[usize::from(index)] = Cursor { at: head, ..Cursor::default() };
            let end = head.saturating_add(self.guess).min(size);
            run = match run {
                Some((first, last)) if head >= first && head <= last.saturating_add(GAP_MAX) => {
                    Some((first, last.max(end)))
                }
                // A free list that runs backwards.
                Some((first, last)) if head < first && end >= first => Some((head, last)),
                Some((first, last)) => {
                    self.request_descriptors(engine, first, last)?;
                    Some((head, end))
                }
                None => Some((head, end)),
            };
        }
        if let Some((first, last)) = run {
            self.request_descriptors(engine, first, last)?;
        }
        Ok(())
    }

    /// Says what comes after a batch of `count`: its used elements, and what is known to wait behind it.
    #[inline]
    fn expect_next<E: DmaEngine>(&self, engine: &mut E, count: u16) {
        let size = self.ring.size();
        let used = self.ring.next_used();
        engine.expect_write(self.ring.used_element_at(used), 8 * u32::from(count.min(size - used)));
        let waiting = self.ring.known_available().min(FETCH_MAX);
        if waiting > 0 {
            let [first, _] = self.ring.avail_runs(waiting);
            engine.expect_read(self.ring.avail_entry_at(first.slot), 2 * u32::from(first.count));
            // Chains mostly lie one behind the other.
            let head = self.cursors[usize::from(count) - 1].at.saturating_add(self.guess);
            let head = if head < size { head } else { 0 };
            let descriptors = (waiting * self.guess).min(size - head);
            engine.expect_read(self.ring.descriptor_at(head), 16 * u32::from(descriptors));
        }
    }

    /// Fetches descriptors `first` to `end`.
    #[inline]
    fn request_descriptors<E: DmaEngine>(&mut self, engine: &mut E, first: u16, end: u16) -> Result<(), QueueFault> {
        let to = self.places.descriptors.add(16 * u32::from(first));
        engine.read(self.ring.descriptor_at(first), to, 16 * u32::from(end - first))?;
        self.asked_in[usize::from(first)..usize::from(end)].fill(self.round);
        Ok(())
    }

    /// Follows each chain that was not handed over as far as its descriptors are here, and fetches what is missing: further
    /// descriptors, and indirect tables. Returns how many chains this batch shall have, and whether anything was missing.
    fn follow_chains<E: DmaEngine>(&mut self, engine: &mut E, count: u16) -> Result<(u16, bool), QueueFault> {
        let mut asked = false;
        // What is asked for from here on is not here yet.
        self.round += 1;
        for index in self.delivered..count {
            let mut cursor = self.cursors[usize::from(index)];
            while !cursor.done {
                let asked_in = self.asked_in[usize::from(cursor.at)];
                if asked_in == self.round {
                    // Asked for on behalf of a chain before.
                    asked = true;
                    break;
                }
                if asked_in < self.first_round {
                    let end = cursor.at.saturating_add(self.guess).min(self.ring.size());
                    self.request_descriptors(engine, cursor.at, end)?;
                    asked = true;
                    break;
                }
                let descriptor = engine.card().get::<Descriptor>(self.descriptor_place(cursor.at));
                cursor.steps += 1;
                if descriptor.flags & DESCRIPTOR_INDIRECT != 0 {
                    cursor.done = true;
                    // A table of a forbidden size is not fetched; the walk names the fault.
                    let bytes = descriptor.length;
                    if bytes / 16 <= SEGMENTS_MAX && bytes >= 16 {
                        if self.tables_used + bytes > TABLES_BYTES {
                            // No room in this batch: it ends before this chain.
                            return Ok((index, asked));
                        }
                        cursor.table = self.places.tables.add(self.tables_used);
                        cursor.table_count = bytes / 16;
                        self.tables_used += (bytes / 16) * 16;
                        engine.read(Iova(descriptor.address), cursor.table, (bytes / 16) * 16)?;
                        asked = true;
                    }
                } else if descriptor.flags & DESCRIPTOR_NEXT == 0
                    || descriptor.next >= self.ring.size()
                    || u32::from(cursor.steps) > SEGMENTS_MAX
                {
                    // The end, or a fault that the walk will name.
                    cursor.done = true;
                } else {
                    cursor.at = descriptor.next;
                }
            }
            self.cursors[usize::from(index)] = cursor;
        }
        Ok((count, asked))
    }

    #[inline]
    fn descriptor_place(&self, number: u16) -> CardAddress {
        self.places.descriptors.add(16 * u32::from(number))
    }

    /// Walks the chains of a batch and hands them over, up to the first that is not wholly in card memory. What was handed over is off
    /// the ring, and in the record: nothing of it has begun.
    #[inline]
    fn deliver<E: DmaEngine>(
        &mut self,
        engine: &mut E,
        count: u16,
        sink: &mut impl FnMut(&mut E, Chain<'_>),
    ) -> Result<(), QueueFault> {
        let before = self.delivered;
        let delivered = self.hand_over(engine, count, sink);
        let taken = self.delivered - before;
        match &mut self.recorded {
            Some(recorded) if recorded.is_again => drop(recorded.again.drain(..usize::from(taken))),
            Some(recorded) => {
                recorded.record.mark(engine.card().values(self.places.entries.add(2 * u32::from(before)), taken));
                self.ring.take(taken);
            }
            None => self.ring.take(taken),
        }
        delivered
    }

    #[inline]
    fn hand_over<E: DmaEngine>(
        &mut self,
        engine: &mut E,
        count: u16,
        sink: &mut impl FnMut(&mut E, Chain<'_>),
    ) -> Result<(), QueueFault> {
        let size = self.ring.size();
        let again = self.recorded.as_ref().is_some_and(|recorded| recorded.is_again);
        for index in self.delivered..count {
            let head = engine.card().get::<u16>(self.places.entries.add(2 * u32::from(index)));
            let (card, places, asked_in, first_round) = (engine.card(), &self.places, &self.asked_in, self.first_round);
            let walked = self.walk.walk(head, size, |number| {
                let is_here = asked_in[usize::from(number)] >= first_round;
                is_here.then(|| card.get(places.descriptors.add(16 * u32::from(number))))
            })?;
            match walked {
                Some(WalkEnd::Chain) => self.guess = (self.walk.steps() as u16).min(GUESS_MAX),
                Some(_) => {
                    let Cursor { table, table_count, .. } = self.cursors[usize::from(index)];
                    if table_count == 0 {
                        return Ok(());
                    }
                    self.guess = (self.walk.steps() as u16 + 1).min(GUESS_MAX);
                    self.walk.walk_table(table_count, |at| card.get(table.add(16 * at)))?;
                }
                None => return Ok(()),
            }
            self.delivered += 1;
            sink(engine, Chain { again, ..self.walk.chain(head, 1) });
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
        QueuePosition { next_avail: self.ring.next_avail(), avail_wrap: false, next_used: 0, used_wrap: false }
    }
}
