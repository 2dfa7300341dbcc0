//! The replay log: what the server has acknowledged but not yet made durable.
//!
//! NBD lets a server keep completed writes in a volatile cache until a flush. If it dies, they are lost, though the guest
//! has seen them complete, and a disk must not lose completed writes while it has power. So the channel keeps a copy of
//! each until a flush covers it, and after a reconnect writes it again, in the order of completion, before anything else.
//! That order is right: of two writes to one place, one completed before the other was submitted, or the guest has asked
//! for no order between them.

use std::collections::VecDeque;
use std::io;

use super::payload::{CardRanges, Place};
use crate::backend::{BlockOperation, Segments};
use crate::dma::CardMemory;

/// How many records are written again at a time.
pub(super) const REPLAY_DEPTH: usize = 32;

/// One completed write, discard or write zeroes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record {
    /// What was done.
    pub(super) operation: BlockOperation,
    /// Where on the volume, bytes.
    pub(super) offset: u64,
    /// How much, bytes.
    pub(super) length: u64,
    /// Where its data starts, as `tail` was; only a write has data.
    start: u64,
}

impl Record {
    const fn data_bytes(&self) -> u64 {
        data_bytes(self.operation, self.length)
    }
}

/// How much of the ring an operation takes.
pub(super) const fn data_bytes(operation: BlockOperation, length: u64) -> u64 {
    match operation {
        BlockOperation::Write => length,
        _ => 0,
    }
}

/// A bounded log; its memory is taken when first touched, so a volume that flushes often costs little.
#[derive(Debug)]
pub(super) struct ReplayLog {
    ring: CardMemory,
    ranges: CardRanges,
    /// Bytes freed and bytes written since the log was last empty; the difference is what the ring holds.
    head: u64,
    tail: u64,
    records: VecDeque<Record>,
    records_max: usize,
    /// The number of the first record in `records`; numbers never come again.
    first: u64,
    reserved_bytes: u64,
    reserved_records: usize,
}

impl ReplayLog {
    /// A log of `bytes` (rounded up to pages) and as many records as that has sectors.
    pub(super) fn new(bytes: u32) -> io::Result<Self> {
        let ring = CardMemory::new(bytes)?;
        let records_max = ring.len() / 512;
        Ok(Self {
            ranges: CardRanges::new(REPLAY_DEPTH),
            head: 0,
            tail: 0,
            records: VecDeque::with_capacity(records_max),
            records_max,
            first: 0,
            reserved_bytes: 0,
            reserved_records: 0,
            ring,
        })
    }

    /// The largest write that is logged, bytes: half the ring, so that one never waits for an empty one.
    pub(super) fn data_bytes_max(&self) -> u64 {
        self.ring.len() as u64 / 2
    }

    /// Sets room aside for an operation that is about to be sent. `false` when there is none until a flush.
    pub(super) fn reserve(&mut self, operation: BlockOperation, length: u64) -> bool {
        let bytes = data_bytes(operation, length);
        if self.tail - self.head + self.reserved_bytes + bytes > self.ring.len() as u64
            || self.records.len() + self.reserved_records == self.records_max
        {
            return false;
        }
        self.reserved_bytes += bytes;
        self.reserved_records += 1;
        true
    }

    /// Gives back what `reserve` set aside.
    pub(super) fn release(&mut self, operation: BlockOperation, length: u64) {
        self.reserved_bytes -= data_bytes(operation, length);
        self.reserved_records -= 1;
    }

    /// Records an operation that has completed and for which room was reserved; copies a write's data.
    pub(super) fn append(&mut self, operation: BlockOperation, offset: u64, length: u64, segments: Segments) {
        self.release(operation, length);
        let record = Record { operation, offset, length, start: self.tail };
        let mut place = Place::new(segments, 0);
        for (start, bytes) in self.ranges_of(&record) {
            place.take_to_card(&self.ring, start, bytes);
        }
        self.tail += record.data_bytes();
        self.records.push_back(record);
    }

    /// Where a record's data lies: at most two ranges, since it may go round the ring's end.
    fn ranges_of(&self, record: &Record) -> [(usize, usize); 2] {
        let size = self.ring.len();
        let start = (record.start % size as u64) as usize;
        let bytes = record.data_bytes() as usize;
        let first = bytes.min(size - start);
        [(start, first), (0, bytes - first)]
    }

    /// Names this moment: everything recorded so far is before it.
    pub(super) fn mark(&self) -> u64 {
        self.first + self.records.len() as u64
    }

    /// A flush that was submitted at `mark` has succeeded: what was recorded before is durable.
    pub(super) fn forget_before(&mut self, mark: u64) {
        while self.first < mark {
            let Some(record) = self.records.pop_front() else { return };
            self.head += record.data_bytes();
            self.first += 1;
        }
        if self.records.is_empty() {
            // From the start again, so that a log which never holds much never touches much memory.
            self.records.clear();
            self.head = 0;
            self.tail = 0;
        }
    }

    /// Whether so little room is left that a flush should be on its way.
    pub(super) fn is_filling(&self) -> bool {
        let held = self.tail - self.head;
        !self.records.is_empty()
            && (held + self.reserved_bytes > self.ring.len() as u64 / 4 * 3
                || self.records.len() + self.reserved_records > self.records_max / 4 * 3)
    }

    /// The number of the oldest record.
    pub(super) const fn first(&self) -> u64 {
        self.first
    }

    /// How many records there are.
    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    /// The record of that number.
    pub(super) fn get(&self, number: u64) -> Option<Record> {
        self.records.get(usize::try_from(number.checked_sub(self.first)?).ok()?).copied()
    }

    /// The data of a record, as segments; `index` is below [`REPLAY_DEPTH`] and names the list, which must be free.
    pub(super) fn segments(&mut self, index: usize, record: &Record) -> Segments {
        if record.data_bytes() == 0 {
            return Segments::NONE;
        }
        let ranges = self.ranges_of(record);
        self.ranges.set(index, &self.ring, ranges)
    }
}

#[cfg(test)]
mod tests;
