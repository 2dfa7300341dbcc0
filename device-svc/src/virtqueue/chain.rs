//! The walk over one descriptor chain: from a table to a list of segments, the same for a split ring's table and for an
//! indirect table.
//!
//! A chain is checked completely before anything of it is used: numbers in range, no loop (a length limit), readable
//! buffers before writable ones, no table within a table.

use super::{DESCRIPTOR_INDIRECT, DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, Descriptor, RingFault};
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

/// What one descriptor means for the walk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Go on with descriptor `next` of the same table (split) or with the next slot (packed).
    Next(u16),
    /// The chain goes on in a table of `count` descriptors at `table`, and ends there.
    Indirect {
        /// Where the table is.
        table: Iova,
        /// How many descriptors it has.
        count: u32,
    },
    /// That was the last one.
    End,
}

/// What is known of a chain so far; small enough to stay in registers while it is walked.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    count: usize,
    readable: usize,
    readable_bytes: u32,
    writable_bytes: u32,
    steps: u32,
    in_table: bool,
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

    /// Starts with a new chain.
    #[inline]
    pub fn begin(&mut self) {
        self.sums = Sums::default();
    }

    /// Walks a chain from its first descriptor, `head`, as far as its descriptors are here: `at` gives each by its number, or
    /// `None`.
    ///
    /// # Errors
    /// As for [`step`](Self::step), and for a link out of a table of `size` descriptors.
    #[inline]
    pub fn walk(
        &mut self,
        head: u16,
        size: u16,
        at: impl Fn(u16) -> Option<Descriptor>,
    ) -> Result<Option<Step>, RingFault> {
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
                return Ok(Some(Step::End));
            }
            number = descriptor.next;
            if number >= size {
                return Err(RingFault::NoSuchDescriptor { number, size: u32::from(size) });
            }
        }
    }

    /// How many descriptors the chain had.
    #[inline]
    #[must_use]
    pub const fn steps(&self) -> u32 {
        self.sums.steps
    }

    /// Takes the chain's next descriptor.
    ///
    /// # Errors
    /// When the chain breaks a rule of virtio 1.3, 2.7.4 and 2.7.5.
    #[inline]
    pub fn step(&mut self, descriptor: Descriptor) -> Result<Step, RingFault> {
        if descriptor.flags & DESCRIPTOR_INDIRECT != 0 {
            return self.enter_table(descriptor);
        }
        self.sums.take(&mut self.segments, descriptor, self.write_flag)?;
        Ok(if descriptor.flags & DESCRIPTOR_NEXT != 0 { Step::Next(descriptor.next) } else { Step::End })
    }

    fn enter_table(&mut self, descriptor: Descriptor) -> Result<Step, RingFault> {
        if !self.allow_indirect || self.sums.in_table || descriptor.flags & DESCRIPTOR_NEXT != 0 {
            return Err(RingFault::IndirectNotAllowed);
        }
        let count = descriptor.length / 16;
        if count == 0 || !descriptor.length.is_multiple_of(16) {
            return Err(RingFault::IndirectSize { length: descriptor.length });
        }
        if count > SEGMENTS_MAX {
            return Err(RingFault::ChainTooLong { limit: SEGMENTS_MAX });
        }
        self.sums.in_table = true;
        Ok(Step::Indirect { table: Iova(descriptor.address), count })
    }

    /// Walks a whole indirect table of `count` descriptors that `at` copies out, following its `next` links.
    ///
    /// # Errors
    /// As for [`step`](Self::step), and for a link out of the table.
    #[inline]
    pub fn walk_table(&mut self, count: u32, at: impl Fn(u32) -> Descriptor) -> Result<(), RingFault> {
        let mut number = 0u16;
        loop {
            if u32::from(number) >= count {
                return Err(RingFault::NoSuchDescriptor { number, size: count });
            }
            match self.step(at(u32::from(number)))? {
                Step::Next(next) => number = next,
                Step::End => return Ok(()),
                Step::Indirect { .. } => return Err(RingFault::IndirectNotAllowed),
            }
        }
    }

    /// Walks a whole indirect table of a packed ring: `count` descriptors one after the other, whose `NEXT` flags mean nothing
    /// (virtio 1.3, 2.8.8).
    ///
    /// # Errors
    /// As for [`step`](Self::step).
    #[inline]
    pub fn walk_list(&mut self, count: u32, at: impl Fn(u32) -> Descriptor) -> Result<(), RingFault> {
        for number in 0..count {
            let mut descriptor = at(number);
            descriptor.flags &= !DESCRIPTOR_NEXT;
            if let Step::Indirect { .. } = self.step(descriptor)? {
                return Err(RingFault::IndirectNotAllowed);
            }
        }
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
