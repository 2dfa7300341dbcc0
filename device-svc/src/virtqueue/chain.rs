//! The walk over one descriptor chain: from a table to a list of segments, the same for a split ring's table and for an
//! indirect table.
//!
//! A chain is checked completely before anything of it is used: numbers in range, no loop (a length limit), readable
//! buffers before writable ones, no table within a table.

use super::{DESCRIPTOR_INDIRECT, DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, Descriptor, PackedDescriptor, RingFault};
use crate::address::Iova;

/// The most buffers in one chain: the most data segments that a device of ours offers, and header and status.
///
/// The specification allows as many as the queue is large; but each must fit one system call's vector (1024), and a
/// hostile chain must not cost more to walk than this.
pub const SEGMENTS_MAX: u32 = 256 + 2;

/// One buffer of a chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Segment {
    /// Where it is.
    pub address: Iova,
    /// Its length, bytes.
    pub length: u32,
}

/// A whole, checked chain.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a> {
    /// What the driver calls it: the head's number (split) or the buffer id (packed).
    pub id: u16,
    /// How many ring slots it took (packed; 1 on a split ring).
    pub slots: u16,
    /// What the record of requests in flight calls it, where there is one.
    pub entry: u16,
    /// It was in flight already when the queue started.
    pub again: bool,
    /// The buffers, readable ones first; none is empty.
    pub segments: &'a [Segment],
    /// How many of them are readable.
    pub readable: usize,
    /// Sum of the readable lengths, bytes.
    pub readable_bytes: u32,
    /// Sum of the writable lengths, bytes.
    pub writable_bytes: u32,
}

/// How the walk over a chain's descriptors in the ring ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WalkEnd {
    /// With the chain's last descriptor.
    Chain,
    /// With one that leads to an indirect table, which is still to be walked: the chain ends there.
    Table,
}

/// What is known of a chain so far; small enough to stay in registers while it is walked.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    count: usize,
    readable: usize,
    readable_bytes: u32,
    writable_bytes: u32,
    steps: u32,
}

/// Collects the buffers of one chain. Reused from chain to chain.
#[derive(Debug)]
pub struct ChainWalk {
    segments: Box<[Segment; SEGMENTS_MAX as usize]>,
    sums: Sums,
    allow_indirect: bool,
    /// The flag that makes a buffer writable; none where the device writes no buffer anyway.
    write_flag: u16,
}

impl Sums {
    /// Takes a descriptor that is not an indirect one.
    #[inline(always)]
    fn take(
        &mut self,
        segments: &mut [Segment; SEGMENTS_MAX as usize],
        descriptor: Descriptor,
        write_flag: u16,
    ) -> Result<(), RingFault> {
        self.steps += 1;
        if self.steps > SEGMENTS_MAX {
            return Err(RingFault::ChainTooLong { limit: SEGMENTS_MAX });
        }
        let writable = descriptor.flags & write_flag != 0;
        if writable {
            self.writable_bytes = self.writable_bytes.checked_add(descriptor.length).ok_or(RingFault::ChainTooLarge)?;
        } else {
            self.readable_bytes = self.readable_bytes.checked_add(descriptor.length).ok_or(RingFault::ChainTooLarge)?;
            if self.readable < self.count {
                return Err(RingFault::ReadableAfterWritable);
            }
        }
        // An empty buffer is legal and says nothing: the next one takes its place.
        segments[self.count] = Segment { address: Iova(descriptor.address), length: descriptor.length };
        let says = usize::from(descriptor.length != 0);
        self.count += says;
        self.readable += says & usize::from(!writable);
        Ok(())
    }
}

impl ChainWalk {
    /// A walk for a queue where indirect tables are allowed or not.
    #[must_use]
    pub fn new(allow_indirect: bool) -> Self {
        let segments = Box::new([Segment::default(); SEGMENTS_MAX as usize]);
        Self { segments, sums: Sums::default(), allow_indirect, write_flag: DESCRIPTOR_WRITE }
    }

    /// All buffers are readable, whatever their flags say: for a queue that a device only reads from. DPDK's driver leaves a header
    /// marked as writable in its indirect tables.
    pub const fn only_reads(&mut self) {
        self.write_flag = 0;
    }

    /// Walks a chain of a split ring from its first descriptor, `head`, as far as its descriptors are here: `at` gives each of the `size` that
    /// the ring has by its number, or `None`, which ends the walk without a result.
    ///
    /// # Errors
    /// When the chain breaks a rule of virtio 1.3, 2.7.4 and 2.7.5.
    #[inline]
    pub fn walk(
        &mut self,
        head: u16,
        size: u16,
        at: impl Fn(u16) -> Option<Descriptor>,
    ) -> Result<Option<WalkEnd>, RingFault> {
        let mut sums = Sums::default();
        let mut number = head;
        loop {
            let Some(descriptor) = at(number) else { return Ok(None) };
            if descriptor.flags & DESCRIPTOR_INDIRECT != 0 {
                self.sums = sums;
                return self.enter_table(descriptor).map(Some);
            }
            sums.take(&mut self.segments, descriptor, self.write_flag)?;
            if descriptor.flags & DESCRIPTOR_NEXT == 0 {
                self.sums = sums;
                return Ok(Some(WalkEnd::Chain));
            }
            number = descriptor.next;
            if number >= size {
                return Err(RingFault::NoSuchDescriptor { number, size: u32::from(size) });
            }
        }
    }

    /// Walks a chain of a packed ring, whose descriptors these are, one behind the other; one that leads to a table ends it. Returns its buffer
    /// id, too.
    ///
    /// # Errors
    /// When the chain breaks a rule of virtio 1.3, 2.8.5 and 2.8.7.
    #[inline(always)]
    pub fn walk_slots(
        &mut self,
        descriptors: impl Iterator<Item = PackedDescriptor>,
    ) -> Result<(u16, WalkEnd), RingFault> {
        let (mut sums, mut id) = (Sums::default(), 0);
        for PackedDescriptor { address, length, id: buffer, flags } in descriptors {
            id = buffer;
            let descriptor = Descriptor { address, length, flags, next: 0 };
            if flags & DESCRIPTOR_INDIRECT != 0 {
                self.sums = sums;
                return Ok((id, self.enter_table(descriptor)?));
            }
            sums.take(&mut self.segments, descriptor, self.write_flag)?;
        }
        self.sums = sums;
        Ok((id, WalkEnd::Chain))
    }

    /// How many descriptors the chain had.
    #[inline]
    #[must_use]
    pub const fn steps(&self) -> u32 {
        self.sums.steps
    }

    /// Checks the descriptor that leads to an indirect table (virtio 1.3, 2.7.5.3 and 2.8.7).
    fn enter_table(&self, descriptor: Descriptor) -> Result<WalkEnd, RingFault> {
        if !self.allow_indirect || descriptor.flags & DESCRIPTOR_NEXT != 0 {
            return Err(RingFault::IndirectNotAllowed);
        }
        let count = descriptor.length / 16;
        if count == 0 || !descriptor.length.is_multiple_of(16) {
            return Err(RingFault::IndirectSize { length: descriptor.length });
        }
        if count > SEGMENTS_MAX {
            return Err(RingFault::ChainTooLong { limit: SEGMENTS_MAX });
        }
        Ok(WalkEnd::Table)
    }

    /// Goes on with a whole indirect table of `count` descriptors that `at` copies out, following its `next` links.
    ///
    /// # Errors
    /// As for [`walk`](Self::walk), and for a link out of the table, or to another one.
    #[inline]
    pub fn walk_table(&mut self, count: u32, at: impl Fn(u32) -> Descriptor) -> Result<(), RingFault> {
        let mut sums = self.sums;
        let mut number = 0u16;
        loop {
            if u32::from(number) >= count {
                return Err(RingFault::NoSuchDescriptor { number, size: count });
            }
            let descriptor = at(u32::from(number));
            if descriptor.flags & DESCRIPTOR_INDIRECT != 0 {
                return Err(RingFault::IndirectNotAllowed);
            }
            sums.take(&mut self.segments, descriptor, self.write_flag)?;
            if descriptor.flags & DESCRIPTOR_NEXT == 0 {
                self.sums = sums;
                return Ok(());
            }
            number = descriptor.next;
        }
    }

    /// Goes on with a whole indirect table of a packed ring: descriptors one after the other, whose `NEXT` flags mean nothing
    /// (virtio 1.3, 2.8.8).
    ///
    /// # Errors
    /// As for [`walk_slots`](Self::walk_slots), and for one that leads to another table.
    #[inline(always)]
    pub fn walk_list(&mut self, table: impl Iterator<Item = PackedDescriptor>) -> Result<(), RingFault> {
        let mut sums = self.sums;
        for PackedDescriptor { address, length, id: _, flags } in table {
            if flags & DESCRIPTOR_INDIRECT != 0 {
                return Err(RingFault::IndirectNotAllowed);
            }
            sums.take(&mut self.segments, Descriptor { address, length, flags, next: 0 }, self.write_flag)?;
        }
        self.sums = sums;
        Ok(())
    }

    /// The chain that was collected.
    #[inline]
    #[must_use]
    pub fn chain(&self, id: u16, slots: u16) -> Chain<'_> {
        Chain {
            id,
            slots,
            entry: id,
            again: false,
            segments: &self.segments[..self.sums.count],
            readable: self.sums.readable,
            readable_bytes: self.sums.readable_bytes,
            writable_bytes: self.sums.writable_bytes,
        }
    }
}

#[cfg(test)]
mod tests;
