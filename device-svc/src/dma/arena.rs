//! Storage that grows and never moves: whoever has an element's number finds it without a lock while others are added.
//!
//! Chunks double in size, so that few elements take little memory and the number of chunks stays small.

use std::sync::OnceLock;

use zerocopy::{FromZeros, KnownLayout};

/// Elements of the first chunk; a power of two.
const FIRST: u32 = 64;
const CHUNKS: usize = 12;

/// Elements that an arena holds at most.
#[cfg(test)]
pub(super) const ELEMENTS_MAX: u32 = FIRST * ((1 << CHUNKS) - 1);

/// Elements by their numbers, all zeroes at first.
#[derive(Debug)]
pub(super) struct Arena<T> {
    chunks: [OnceLock<Box<[T]>>; CHUNKS],
}

impl<T> Default for Arena<T> {
    fn default() -> Self {
        Self { chunks: [const { OnceLock::new() }; CHUNKS] }
    }
}

impl<T: FromZeros + KnownLayout<PointerMetadata = ()>> Arena<T> {
    /// The element of a number; `None` if there is no memory for it yet.
    #[inline]
    pub(super) fn get(&self, number: u32) -> Option<&T> {
        let (chunk, inside) = Self::place(number);
        self.chunks.get(chunk)?.get()?.get(inside)
    }

    /// The element of a number, with memory for it. `None` if the number is too large, or the system has no memory.
    pub(super) fn make(&self, number: u32) -> Option<&T> {
        let (chunk, inside) = Self::place(number);
        let place = self.chunks.get(chunk)?;
        if place.get().is_none() {
            // Fresh pages, which become resident when they are first touched.
            let elements = <[T]>::new_box_zeroed_with_elems((FIRST as usize) << chunk).ok()?;
            // Made by another in the meantime: then that one stays.
            let _ = place.set(elements);
        }
        place.get()?.get(inside)
    }

    #[inline]
    const fn place(number: u32) -> (usize, usize) {
        let shifted = number as u64 + FIRST as u64;
        let chunk = shifted.ilog2() - FIRST.ilog2();
        (chunk as usize, (shifted - ((FIRST as u64) << chunk)) as usize)
    }
}

#[cfg(test)]
mod tests;
