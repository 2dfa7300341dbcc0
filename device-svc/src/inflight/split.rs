//! The record of a split ring (`QueueRegionSplit`): for each head whether its request is in flight, and since when.
//!
//! ```text
//!   fetched     counter of the head ─► its `inflight`
//!   published   elements in the ring ─► `next` of each head, `last_batch_head` ─► used index in the ring
//!                 ─► `inflight` of each cleared ─► `used_idx`
//! ```
//!
//! A process that dies in the second line leaves the used indices of ring and record different: exactly the batch that
//! `last_batch_head` starts has been published and may not have been cleared.

use super::memory::{Region, SplitEntry, SplitHeader};
use super::{QueueRecord, RecordFault, VERSION, check_header};

/// The record of one split ring.
#[derive(Debug)]
pub struct SplitRecord {
    region: Region<SplitHeader, SplitEntry>,
    /// The counter of the next request.
    counter: u64,
    last_batch_head: u16,
    /// The used index in the record.
    used_idx: u16,
}

impl SplitRecord {
    /// The record that is there; [`attach`](Self::attach) comes next.
    #[must_use]
    pub fn new(record: &QueueRecord) -> Self {
        Self { region: record.region(record.entries), counter: 1, last_batch_head: 0, used_idx: 0 }
    }

    /// Takes the record up for a ring of `size` entries whose used index is `ring_used`. Returns the heads of the requests in flight
    /// in the order in which they were fetched, or `None` of a record that nobody has written to: that one starts with the ring as
    /// it is.
    ///
    /// A record says where its ring's available index stands, too: everything before was either used or is in flight.
    ///
    /// # Errors
    /// When it cannot be this ring's record.
    pub fn attach(&mut self, ring_used: u16, size: u16) -> Result<Option<Vec<u16>>, RecordFault> {
        let header = self.region.header();
        let entries = self.region.count();
        let known = check_header(header.version.get(), header.features.get(), header.desc_num.get(), entries, size)?;
        self.used_idx = ring_used;
        if !known {
            for number in 0..entries {
                self.region.entry(number).inflight.set(0);
                self.region.entry(number).counter.set(0);
            }
            header.features.set(0);
            header.desc_num.set(entries);
            header.last_batch_head.set(0);
            // The ring's, not 0: after a migration they differ, and the difference would be taken for a batch.
            header.used_idx.set(ring_used);
            header.version.set(VERSION);
            return Ok(None);
        }
        self.last_batch_head = header.last_batch_head.get();
        let record_used = header.used_idx.get();
        let batch = ring_used.wrapping_sub(record_used);
        if batch > size {
            return Err(RecordFault::UsedIndex { record: record_used, ring: ring_used });
        }
        let mut head = self.last_batch_head;
        for _ in 0..batch {
            if head >= size {
                return Err(RecordFault::NoSuchEntry { number: head, size });
            }
            let entry = self.region.entry(head);
            entry.inflight.set(0);
            head = entry.next.get();
        }
        header.used_idx.set(ring_used);
        let mut in_flight = Vec::new();
        for number in 0..entries {
            let entry = self.region.entry(number);
            if entry.inflight.get() == 0 {
                continue;
            }
            if number >= size {
                return Err(RecordFault::NoSuchEntry { number, size });
            }
            in_flight.push((entry.counter.get(), number));
        }
        in_flight.sort_unstable();
        self.counter = in_flight.last().map_or(1, |(counter, _)| counter.wrapping_add(1));
        Ok(Some(in_flight.into_iter().map(|(_, head)| head).collect()))
    }

    /// The chains that start at these heads (below the ring's size) have been fetched, in this order.
    #[inline]
    pub fn mark(&mut self, heads: impl Iterator<Item = u16>) {
        let entries = self.region.entries();
        let mut counter = self.counter;
        heads.for_each(|head| {
            let entry = &entries[usize::from(head)];
            entry.counter.set(counter);
            entry.inflight.set(1);
            counter = counter.wrapping_add(1);
        });
        self.counter = counter;
    }

    /// The chains that start at these heads are the whole batch that is about to be published; the used index may follow.
    #[inline]
    pub fn link(&mut self, heads: impl Iterator<Item = u16>) {
        let entries = self.region.entries();
        let mut last = self.last_batch_head;
        heads.for_each(|head| {
            entries[usize::from(head)].next.set(last);
            last = head;
        });
        self.last_batch_head = last;
        self.region.header().last_batch_head.set(last);
    }

    /// The used index in the ring says `used` now: the batch that was linked last, which has these heads, is done. Does nothing if
    /// that is known already.
    #[inline]
    pub fn complete(&mut self, heads: impl Iterator<Item = u16>, used: u16) {
        if self.used_idx == used {
            return;
        }
        let entries = self.region.entries();
        heads.for_each(|head| entries[usize::from(head)].inflight.set(0));
        self.used_idx = used;
        self.region.header().used_idx.set(used);
    }
}
