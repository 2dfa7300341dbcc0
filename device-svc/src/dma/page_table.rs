//! From page numbers to records: a tree of nodes with 64 slots each, which readers walk without a lock while one writer changes it.
//!
//! A slot is empty, or names a record that covers all its pages, or names a node one level below; so a range of any size takes
//! few slots, and a page alone is found in as many steps as the highest address needs levels. The tree grows at its root.
//!
//! ```text
//!   root ── 64 slots ─┬─ record                     (a range that covers the whole slot)
//!                     └─ node ── 64 slots ─┬─ …
//! ```
//!
//! Nodes that have become empty leave the tree at once, but a reader may still be in one: the writer is handed their numbers, and
//! gives them back when no reader can be.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use zerocopy::{FromZeros, KnownLayout};

use super::arena::Arena;

/// Bits of a page number that one level resolves.
const LEVEL_BITS: u32 = 6;
const SLOTS: usize = 1 << LEVEL_BITS;
/// A slot's mark of a record; without it, a slot that is not 0 names a node.
const RECORD: u32 = 1 << 31;

#[derive(Debug, FromZeros, KnownLayout)]
#[repr(C, align(64))]
struct Node {
    slots: [AtomicU32; SLOTS],
}

/// There is no node left: the ranges are scattered too widely.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Full;

/// The tree, as readers see it.
#[derive(Debug, Default)]
pub(super) struct PageTable {
    nodes: Arena<Node>,
    /// The root's number, and above it how many bits of a page number the tree resolves; 0 while there is no tree.
    root: AtomicU64,
}

impl PageTable {
    /// The record of the range that `page` lies in.
    #[inline]
    pub(super) fn find(&self, page: u64) -> Option<u32> {
        // Acquire, here and below: a node's slots are seen as they were when it was named.
        let (mut node, mut bits) = split(self.root.load(Ordering::Acquire));
        if page >> bits != 0 {
            return None;
        }
        while bits > 0 {
            bits -= LEVEL_BITS;
            let slot = self.nodes.get(node)?.slots[(page >> bits) as usize % SLOTS].load(Ordering::Acquire);
            if slot & RECORD != 0 {
                return Some(slot & !RECORD);
            }
            if slot == 0 {
                return None;
            }
            node = slot;
        }
        None
    }
}

const fn split(root: u64) -> (u32, u32) {
    (root as u32, (root >> 32) as u32)
}

/// The one who changes the tree. It belongs to one [`PageTable`], which every call names.
#[derive(Debug, Default)]
pub(super) struct PageTableWriter {
    /// How many slots of each node are taken; the node's number is the place. 0 is no node's number.
    taken: Vec<u8>,
    free: Vec<u32>,
}

impl PageTableWriter {
    /// Lets the pages, which no other range has, lead to `record` (less than 2³¹).
    ///
    /// # Errors
    /// When nodes have run out; then nothing leads there.
    pub(super) fn insert(&mut self, table: &PageTable, pages: RangeInclusive<u64>, record: u32) -> Result<(), Full> {
        self.grow(table, *pages.end())?;
        let (root, bits) = split(table.root.load(Ordering::Relaxed));
        let done = self.fill(table, root, bits, &pages, record);
        if done.is_err() {
            let mut emptied = Vec::new();
            self.remove(table, pages, &mut emptied);
            self.give_back(emptied);
        }
        done
    }

    /// Lets the pages of one range lead nowhere. The numbers of nodes that have left the tree are appended to `emptied`, for
    /// [`give_back`](Self::give_back).
    pub(super) fn remove(&mut self, table: &PageTable, pages: RangeInclusive<u64>, emptied: &mut Vec<u32>) {
        let (root, bits) = split(table.root.load(Ordering::Relaxed));
        if bits > 0 && *pages.end() >> bits == 0 {
            self.clear(table, root, bits, &pages, emptied);
        }
    }

    /// No reader is in these nodes any more.
    pub(super) fn give_back(&mut self, emptied: Vec<u32>) {
        self.free.extend(emptied);
    }

    /// Adds levels until the tree resolves `page`.
    fn grow(&mut self, table: &PageTable, page: u64) -> Result<(), Full> {
        let (mut root, mut bits) = split(table.root.load(Ordering::Relaxed));
        while bits == 0 || page >> bits != 0 {
            // A root without slots taken is one for any number of levels.
            if bits == 0 || self.taken[root as usize] > 0 {
                let above = self.new_node(table)?;
                if bits > 0 {
                    self.put(table, above, 0, root);
                }
                root = above;
            }
            bits += LEVEL_BITS;
            // Release: whoever comes by this root sees its slot.
            table.root.store(u64::from(bits) << 32 | u64::from(root), Ordering::Release);
        }
        Ok(())
    }

    /// A node with empty slots that is in no tree.
    fn new_node(&mut self, table: &PageTable) -> Result<u32, Full> {
        if let Some(node) = self.free.pop() {
            return Ok(node);
        }
        if self.taken.is_empty() {
            self.taken.push(0);
        }
        let node = self.taken.len() as u32;
        table.nodes.make(node).ok_or(Full)?;
        self.taken.push(0);
        Ok(node)
    }

    fn put(&mut self, table: &PageTable, node: u32, slot: usize, value: u32) {
        if let Some(node) = table.nodes.get(node) {
            // Release: whoever follows it sees what it leads to.
            node.slots[slot].store(value, Ordering::Release);
        }
        let taken = &mut self.taken[node as usize];
        if value == 0 { *taken -= 1 } else { *taken += 1 }
    }

    fn slot(table: &PageTable, node: u32, slot: usize) -> u32 {
        table.nodes.get(node).map_or(0, |node| node.slots[slot].load(Ordering::Relaxed))
    }

    /// `pages` lie in `node`, which resolves the lowest `bits` bits.
    fn fill(
        &mut self,
        table: &PageTable,
        node: u32,
        bits: u32,
        pages: &RangeInclusive<u64>,
        record: u32,
    ) -> Result<(), Full> {
        for part in parts(bits, pages) {
            if part.whole {
                self.put(table, node, part.slot, RECORD | record);
                continue;
            }
            let mut below = Self::slot(table, node, part.slot);
            if below == 0 {
                below = self.new_node(table)?;
                self.put(table, node, part.slot, below);
            }
            self.fill(table, below, bits - LEVEL_BITS, &part.pages, record)?;
        }
        Ok(())
    }

    fn clear(&mut self, table: &PageTable, node: u32, bits: u32, pages: &RangeInclusive<u64>, emptied: &mut Vec<u32>) {
        for part in parts(bits, pages) {
            let value = Self::slot(table, node, part.slot);
            if value == 0 {
                continue;
            }
            if value & RECORD == 0 {
                self.clear(table, value, bits - LEVEL_BITS, &part.pages, emptied);
                if self.taken[value as usize] > 0 {
                    continue;
                }
                emptied.push(value);
            }
            self.put(table, node, part.slot, 0);
        }
    }
}

/// What of a range lies in one slot.
struct Part {
    slot: usize,
    /// All pages of the slot.
    whole: bool,
    pages: RangeInclusive<u64>,
}

/// The parts of `pages`, which lie in one node that resolves the lowest `bits` bits.
fn parts(bits: u32, pages: &RangeInclusive<u64>) -> impl Iterator<Item = Part> + use<> {
    let below = bits - LEVEL_BITS;
    let (first, last) = (*pages.start(), *pages.end());
    (first >> below..=last >> below).map(move |number| {
        let (start, end) = (number << below, (number << below) + ((1 << below) - 1));
        let whole = first <= start && end <= last;
        Part { slot: number as usize % SLOTS, whole, pages: first.max(start)..=last.min(end) }
    })
}

#[cfg(test)]
mod tests;
