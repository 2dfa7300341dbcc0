//! Frames that wait in the card's memory, oldest first: a stretch of bytes that is filled around and around.
//!
//! A frame is never split, so what is left at the end is passed over where a frame does not fit. When nothing waits it starts from the
//! front again, so that a short queue stays within few cache lines.
#![expect(unsafe_code, reason = "copies frames from memory that a VM shares")]

use std::collections::VecDeque;

use super::{FRAME_BYTES_MAX, Incoming, Outgoing};
use crate::address::CardAddress;
use crate::dma::CardMemory;

/// The frames.
#[derive(Debug)]
pub(super) struct FrameRing {
    memory: CardMemory,
    bytes: u32,
    /// The frames as they are handed over.
    waiting: VecDeque<Incoming>,
    /// Where the oldest begins, and where the next goes.
    oldest: u32,
    next: u32,
}

impl FrameRing {
    /// Room for `frames` frames and `bytes` bytes; at least for the longest frame.
    ///
    /// # Errors
    /// When there is no memory.
    pub(super) fn new(frames: usize, bytes: u32) -> std::io::Result<Self> {
        let bytes = bytes.max(FRAME_BYTES_MAX);
        let memory = CardMemory::new(bytes)?;
        Ok(Self { memory, bytes, waiting: VecDeque::with_capacity(frames), oldest: 0, next: 0 })
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.waiting.clear();
        self.next = 0;
    }

    /// Where `bytes` can go.
    #[inline]
    fn place(&self, bytes: u32) -> Option<u32> {
        if self.waiting.is_empty() {
            return (bytes <= self.bytes).then_some(0);
        }
        if self.waiting.len() == self.waiting.capacity() {
            return None;
        }
        // Strictly less before the oldest: equal would look like an empty ring.
        if self.next > self.oldest {
            if bytes <= self.bytes - self.next { Some(self.next) } else { (bytes < self.oldest).then_some(0) }
        } else {
            (bytes < self.oldest - self.next).then_some(self.next)
        }
    }

    /// Copies a frame in. Returns the copy, to be changed, if there was room.
    #[inline]
    pub(super) fn push(&mut self, frame: &Outgoing) -> Option<&mut [u8]> {
        let at = self.place(frame.bytes)?;
        let length = frame.bytes as usize;
        let start = self.memory.pointer(CardAddress(at), length);
        let mut filled = 0;
        for range in frame.segments.as_slice() {
            let count = range.iov_len.min(length - filled);
            // SAFETY: the ranges of a frame that a channel is given are readable while `transmit` runs; a VM may write them meanwhile,
            // so they are copied, never borrowed. `count` bytes are left of the range at `start`, which nobody else looks at.
            unsafe {
                std::ptr::copy_nonoverlapping(range.iov_base.cast::<u8>().cast_const(), start.add(filled), count)
            };
            filled += count;
        }
        debug_assert_eq!(filled, length, "a frame is as long as its ranges");
        if self.waiting.is_empty() {
            self.oldest = at;
        }
        // SAFETY: the bytes are ours, initialised (zero at first), and stay as they are once the caller has changed them until the
        // frame is released: `push` writes only where none waits.
        self.waiting.push_back(unsafe { Incoming::new(frame.header, start, frame.bytes) });
        self.next = at + frame.bytes;
        // SAFETY: as above; nothing borrows the newest frame yet.
        Some(unsafe { std::slice::from_raw_parts_mut(start, length) })
    }

    /// The oldest frames, at most `most`, and fewer where the list of them begins anew.
    #[inline]
    pub(super) fn frames(&self, most: usize) -> &[Incoming] {
        let (frames, _) = self.waiting.as_slices();
        &frames[..most.min(frames.len())]
    }

    /// The `count` oldest are done with.
    #[inline]
    pub(super) fn release(&mut self, count: usize) {
        self.waiting.drain(..count.min(self.waiting.len()));
        match self.waiting.front() {
            Some(frame) => {
                let first = self.memory.pointer(CardAddress(0), 0);
                self.oldest = (frame.bytes().as_ptr() as usize - first as usize) as u32;
            }
            None => self.next = 0,
        }
    }
}

#[cfg(test)]
mod tests;
