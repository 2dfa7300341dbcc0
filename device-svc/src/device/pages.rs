//! Pages of card memory for payload that is copied: a bitmap over one range of a lane's card memory.
//!
//! A request gets one contiguous run, so that its payload is one range for the backend. The search starts at the front, so
//! that a lightly used lane touches few pages, and the rest never become resident.

use crate::address::CardAddress;

/// Bytes of a page.
pub(super) const PAGE_BYTES: u32 = 4096;

/// A run of pages that one request holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageRun {
    /// Where it starts.
    pub at: CardAddress,
    first: u32,
    count: u32,
}

/// The bitmap: one bit per page, set when taken.
#[derive(Debug)]
pub struct Pages {
    start: CardAddress,
    count: u32,
    taken: Box<[u64]>,
    free: u32,
}

impl Pages {
    /// `count` pages of card memory from `start`.
    #[must_use]
    pub fn new(start: CardAddress, count: u32) -> Self {
        let mut taken = vec![0u64; count.div_ceil(64) as usize].into_boxed_slice();
        // The bits behind the end are never free.
        if !count.is_multiple_of(64)
            && let Some(last) = taken.last_mut()
        {
            *last = u64::MAX << (count % 64);
        }
        Self { start, count, taken, free: count }
    }

    /// Pages in all.
    #[must_use]
    pub const fn count(&self) -> u32 {
        self.count
    }

    /// Takes a run that holds `bytes`. `None` when there is no such run now.
    #[must_use]
    pub fn take(&mut self, bytes: u32) -> Option<PageRun> {
        let count = bytes.div_ceil(PAGE_BYTES).max(1);
        if count > self.free {
            return None;
        }
        let first = if count == 1 { self.find_one()? } else { self.find_run(count)? };
        for page in first..first + count {
            self.taken[(page / 64) as usize] |= 1 << (page % 64);
        }
        self.free -= count;
        Some(PageRun { at: self.start.add(first * PAGE_BYTES), first, count })
    }

    #[inline]
    fn find_one(&self) -> Option<u32> {
        let word = self.taken.iter().position(|word| *word != u64::MAX)?;
        Some(word as u32 * 64 + self.taken[word].trailing_ones())
    }

    fn find_run(&self, count: u32) -> Option<u32> {
        let mut first = 0;
        let mut page = 0;
        while page < self.count {
            let word = self.taken[(page / 64) as usize] >> (page % 64);
            if word & 1 != 0 {
                page += word.trailing_ones();
                first = page;
            } else {
                page += word.trailing_zeros().min(64 - page % 64);
                if page.min(self.count) - first >= count {
                    return Some(first);
                }
            }
        }
        None
    }

    /// Gives a run back.
    pub fn give_back(&mut self, run: PageRun) {
        for page in run.first..run.first + run.count {
            debug_assert!(self.taken[(page / 64) as usize] >> (page % 64) & 1 == 1, "a page given back twice");
            self.taken[(page / 64) as usize] &= !(1 << (page % 64));
        }
        self.free += run.count;
    }
}

#[cfg(test)]
mod tests;
