//! The table of a function's host memory: IOVA → bytes.
//!
//! One table lives as long as its VMM is there. The link adds ranges and takes them away while lanes look addresses up, without a
//! lock: behind a guest's IOMMU every page is a range of its own, and there are tens of thousands that come and go. What is added
//! is there at once. What is taken away leaves the table at once, but a lane may have looked it up before: so its memory stays
//! mapped, and its places in the table stay unused, until the [`Removed`] that stands for it is dropped, when every lane has let
//! go of it.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zerocopy::{FromZeros, KnownLayout};

use super::arena::Arena;
use super::page_table::{PageTable, PageTableWriter};
use super::{Access, Direction, DistantMemory, Mapping, MemoryError, guard};
use crate::address::Iova;

/// Ranges that a table holds at most.
pub const RANGES_MAX: usize = 65535;
/// What the first addresses of ranges are multiples of; their lengths need not be.
pub const PAGE_BYTES: u64 = 4096;

/// One range of host memory.
#[derive(Clone, Debug)]
pub struct Region {
    start: Iova,
    length: u64,
    access: Access,
    /// Where its bytes are; `None` if only the VMM can reach them.
    place: Option<(Arc<Mapping>, usize)>,
}

impl Region {
    /// `length` bytes of host memory at `start` are the bytes of `mapping` from `offset`; they may be read and written.
    ///
    /// # Errors
    /// When the range is empty, wraps or does not start with a page, or the mapping does not hold it.
    pub fn new(start: Iova, length: u64, mapping: Arc<Mapping>, offset: usize) -> Result<Self, MemoryError> {
        let inside = (offset as u64).checked_add(length).is_some_and(|end| end <= mapping.len() as u64);
        let region = Self::distant(start, length)?;
        if !inside {
            return Err(MemoryError::BadRange { start, length });
        }
        Ok(Self { place: Some((mapping, offset)), ..region })
    }

    /// A range that belongs to the function, but whose bytes only the VMM can reach.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn distant(start: Iova, length: u64) -> Result<Self, MemoryError> {
        if length == 0 || !start.is_aligned(PAGE_BYTES) || start.checked_add(length).is_none() {
            return Err(MemoryError::BadRange { start, length });
        }
        Ok(Self { start, length, access: Access::Both, place: None })
    }

    /// The same range for this kind of access only.
    #[must_use]
    pub fn with_access(self, access: Access) -> Self {
        Self { access, ..self }
    }

    /// Where the region starts.
    #[must_use]
    pub const fn start(&self) -> Iova {
        self.start
    }

    /// Its length, bytes.
    #[must_use]
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// The mapping behind it, if there is one.
    #[must_use]
    pub fn mapping(&self) -> Option<&Arc<Mapping>> {
        self.place.as_ref().map(|(mapping, _)| mapping)
    }

    fn end(&self) -> u64 {
        // `distant` has checked that it does not wrap.
        self.start.0 + self.length
    }

    fn pages(&self) -> RangeInclusive<u64> {
        self.start.0 / PAGE_BYTES..=(self.end() - 1) / PAGE_BYTES
    }
}

/// A range as lanes look it up.
#[derive(Debug, FromZeros, KnownLayout)]
#[repr(C)]
struct Record {
    start: AtomicU64,
    length: AtomicU64,
    /// Where its first byte is in our address space; 0 if only the VMM can reach it.
    base: AtomicUsize,
    /// Bit 0: the card may read it; bit 1: it may write it.
    access: AtomicUsize,
}

/// A range that was found.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// Where it starts.
    pub start: Iova,
    /// Its length, bytes.
    pub length: u64,
    /// Where its first byte is in our address space; null if only the VMM can reach it.
    pub base: *mut u8,
    /// What the card may do with it.
    pub access: Access,
}

#[derive(Debug)]
struct Entry {
    region: Region,
    record: u32,
}

#[derive(Debug, Default)]
struct Writer {
    /// By their first addresses.
    entries: BTreeMap<u64, Entry>,
    pages: PageTableWriter,
    records: u32,
    free_records: Vec<u32>,
}

/// The table.
#[derive(Debug, Default)]
pub struct HostMemory {
    pages: PageTable,
    records: Arena<Record>,
    writer: Mutex<Writer>,
    /// Who can reach what is not mapped.
    distant: Option<Arc<dyn DistantMemory>>,
    lost: AtomicBool,
    /// How many files had been cut short, in the whole process, when it was last found out whether one of ours was.
    losses_seen: AtomicU64,
}

impl HostMemory {
    /// A table of these regions, in any order.
    ///
    /// # Errors
    /// When two overlap.
    pub fn new(regions: impl IntoIterator<Item = Region>) -> Result<Self, MemoryError> {
        let table = Self::default();
        for region in regions {
            table.insert(region)?;
        }
        Ok(table)
    }

    /// A table without regions; those that are not mapped are reached through `distant`.
    #[must_use]
    pub fn with_distant(distant: Arc<dyn DistantMemory>) -> Self {
        Self { distant: Some(distant), ..Self::default() }
    }

    /// Who can reach what is not mapped, if somebody can.
    #[must_use]
    pub const fn distant(&self) -> Option<&Arc<dyn DistantMemory>> {
        self.distant.as_ref()
    }

    /// Adds a region. Whoever looks it up from now on finds it.
    ///
    /// # Errors
    /// When it overlaps another, or there are too many.
    pub fn insert(&self, region: Region) -> Result<(), MemoryError> {
        let mut writer = self.writer();
        let writer = &mut *writer;
        let before = writer.entries.range(..region.end()).next_back();
        if before.is_some_and(|(_, entry)| entry.region.end() > region.start.0) {
            return Err(MemoryError::Overlap(region.start));
        }
        let full = MemoryError::TooMany(RANGES_MAX);
        if writer.entries.len() >= RANGES_MAX {
            return Err(full);
        }
        let number = writer.free_records.pop().unwrap_or(writer.records);
        let Some(record) = self.records.make(number) else { return Err(full) };
        writer.records = writer.records.max(number + 1);
        record.start.store(region.start.0, Ordering::Relaxed);
        record.length.store(region.length, Ordering::Relaxed);
        let base = region.place.as_ref().map_or(0, |(mapping, offset)| mapping.as_ptr().expose_provenance() + offset);
        record.base.store(base, Ordering::Relaxed);
        record.access.store(region.access as usize, Ordering::Relaxed);
        // What readers follow to the record is stored after it.
        if writer.pages.insert(&self.pages, region.pages(), number).is_err() {
            writer.free_records.push(number);
            return Err(full);
        }
        if region.mapping().is_some_and(|mapping| mapping.is_lost()) {
            self.lost.store(true, Ordering::Relaxed);
        }
        writer.entries.insert(region.start.0, Entry { region, record: number });
        Ok(())
    }

    /// Takes away every region inside this range; there may be none. Whoever looks one up from now on finds nothing. The range
    /// may end with the address space: a VMM that sweeps it names its last byte too.
    ///
    /// # Errors
    /// When the range is empty or wraps, or would cut a region.
    pub fn remove(self: &Arc<Self>, start: Iova, length: u64) -> Result<Removed, MemoryError> {
        let bad = MemoryError::BadRange { start, length };
        let last = length.checked_sub(1).and_then(|more| start.checked_add(more)).ok_or(bad)?.0;
        let mut writer = self.writer();
        let writer = &mut *writer;
        let before = writer.entries.range(..start.0).next_back();
        let highest = writer.entries.range(start.0..=last).next_back();
        if before.is_some_and(|(_, entry)| entry.region.end() > start.0)
            || highest.is_some_and(|(_, entry)| entry.region.end() - 1 > last)
        {
            return Err(MemoryError::Cut { start, length });
        }
        if self.lost.load(Ordering::Relaxed) {
            // Perhaps it is the lost one that goes: then the rest can be used again.
            self.lost.store(false, Ordering::Relaxed);
            self.losses_seen.store(u64::MAX, Ordering::Relaxed);
        }
        let mut removed = Removed { memory: Arc::clone(self), start, length, entries: Vec::new(), nodes: Vec::new() };
        while let Some((&at, _)) = writer.entries.range(start.0..=last).next()
            && let Some(entry) = writer.entries.remove(&at)
        {
            writer.pages.remove(&self.pages, entry.region.pages(), &mut removed.nodes);
            removed.entries.push(entry);
        }
        Ok(removed)
    }

    /// The regions, sorted by address.
    #[must_use]
    pub fn regions(&self) -> Vec<Region> {
        self.writer().entries.values().map(|entry| entry.region.clone()).collect()
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether any memory file was cut short under us.
    #[inline]
    #[must_use]
    pub fn is_lost(&self) -> bool {
        let losses = guard::losses();
        if self.losses_seen.load(Ordering::Relaxed) != losses {
            self.look_for_losses(losses);
        }
        self.lost.load(Ordering::Relaxed)
    }

    /// Once for every file that was cut short, whoever's it was.
    #[cold]
    fn look_for_losses(&self, losses: u64) {
        let writer = self.writer();
        if writer.entries.values().any(|entry| entry.region.mapping().is_some_and(|mapping| mapping.is_lost())) {
            self.lost.store(true, Ordering::Relaxed);
        }
        self.losses_seen.store(losses, Ordering::Relaxed);
    }

    /// The region that `address` lies in.
    #[inline]
    #[must_use]
    pub fn find(&self, address: Iova) -> Option<Found> {
        let record = self.records.get(self.pages.find(address.0 / PAGE_BYTES)?)?;
        let found = Found {
            start: Iova(record.start.load(Ordering::Relaxed)),
            length: record.length.load(Ordering::Relaxed),
            // `Region::new` has checked that the whole range lies in the mapping.
            base: std::ptr::with_exposed_provenance_mut(record.base.load(Ordering::Relaxed)),
            access: Access::from_bits(record.access.load(Ordering::Relaxed)),
        };
        // The last page of a range need not be whole.
        (address.0.wrapping_sub(found.start.0) < found.length).then_some(found)
    }

    /// Where the bytes at `address` are in our address space, and how many of `length` follow there in one run (regions
    /// that touch in IOVA space need not touch in ours).
    #[inline]
    #[must_use]
    pub fn resolve(&self, address: Iova, length: u64, direction: Direction) -> Option<(*mut u8, u64)> {
        let found = self.find(address)?;
        if found.base.is_null() || !found.access.allows(direction) {
            return None;
        }
        let inside = address.0 - found.start.0;
        Some((found.base.wrapping_add(inside as usize), (found.length - inside).min(length)))
    }

    /// Whether every byte of the range lies in a region that suits.
    fn spans(&self, start: Iova, length: u64, suits: impl Fn(&Found) -> bool) -> bool {
        let (mut at, mut left) = (start, length);
        while left > 0 {
            let Some(found) = self.find(at).filter(&suits) else { return false };
            let run = (found.length - (at.0 - found.start.0)).min(left);
            left -= run;
            at = Iova(at.0.wrapping_add(run));
        }
        true
    }

    /// Whether every byte of the range lies in a region that is mapped into our address space.
    #[must_use]
    pub fn covers(&self, start: Iova, length: u64) -> bool {
        self.spans(start, length, |found| !found.base.is_null())
    }

    /// Whether every byte of the range lies in a region that allows this direction, and is mapped or can be asked for.
    #[must_use]
    pub fn reaches(&self, start: Iova, length: u64, direction: Direction) -> bool {
        let there = |found: &Found| !found.base.is_null() || self.distant.is_some();
        self.spans(start, length, |found| there(found) && found.access.allows(direction))
    }

    /// The runs of our address space that a range is made of, up to the first hole.
    pub fn runs(&self, address: Iova, length: u32, direction: Direction) -> impl Iterator<Item = (*mut u8, u64)> + '_ {
        let (mut at, mut left) = (address, u64::from(length));
        std::iter::from_fn(move || {
            if left == 0 {
                return None;
            }
            let (pointer, run) = self.resolve(at, left, direction)?;
            left -= run;
            at = Iova(at.0.wrapping_add(run));
            Some((pointer, run))
        })
    }
}

/// Regions that have left a table. Nobody finds them any more, but who has found them before may go on using them until this is
/// dropped.
#[derive(Debug)]
pub struct Removed {
    memory: Arc<HostMemory>,
    start: Iova,
    length: u64,
    entries: Vec<Entry>,
    nodes: Vec<u32>,
}

impl Removed {
    /// Whether the range from `start` shares a byte with what was removed.
    #[must_use]
    pub const fn touches(&self, start: Iova, length: u64) -> bool {
        start.0 < self.start.0.saturating_add(self.length) && self.start.0 < start.0.saturating_add(length)
    }

    /// Whether there was nothing in the range.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

impl Drop for Removed {
    fn drop(&mut self) {
        let mut writer = self.memory.writer();
        writer.free_records.extend(self.entries.iter().map(|entry| entry.record));
        writer.pages.give_back(std::mem::take(&mut self.nodes));
    }
}

#[cfg(test)]
mod tests;
