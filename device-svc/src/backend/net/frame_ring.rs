//! Frames that wait in the card's memory, oldest first: a stretch of bytes that is filled around and around.
//!
//! A frame is never split, so what is left at the end is passed over where a frame does not fit. When nothing waits it starts from the
//! front again, so that a short queue stays within few cache lines.
#![expect(unsafe_code, reason = "copies frames from memory that a VM shares")]

use std::collections::VecDeque;

use super::{BURST, FRAME_BYTES_MAX, Incoming, NetHeader, Outgoing};

#[derive(Clone, Copy, Debug)]
struct Entry {
    header: NetHeader,
    at: u32,
    bytes: u32,
}

/// The frames.
#[derive(Debug)]
pub(super) struct FrameRing {
    bytes: Box<[u8]>,
    waiting: VecDeque<Entry>,
    /// Where the next frame goes.
    next: u32,
    handed: Vec<Incoming>,
}

impl FrameRing {
    /// Room for `frames` frames and `bytes` bytes; at least for the longest frame.
    pub(super) fn new(frames: usize, bytes: u32) -> Self {
        Self {
            bytes: vec![0; bytes.max(FRAME_BYTES_MAX) as usize].into_boxed_slice(),
            waiting: VecDeque::with_capacity(frames),
            next: 0,
            handed: Vec::with_capacity(BURST),
        }
    }

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
        let end = self.bytes.len() as u32;
        let (Some(first), true) = (self.waiting.front(), self.waiting.len() < self.waiting.capacity()) else {
            return self.waiting.is_empty().then_some(0);
        };
        // Strictly less before the first one: equal would look like an empty ring.
        if self.next > first.at {
            if bytes <= end - self.next { Some(self.next) } else { (bytes < first.at).then_some(0) }
        } else {
            (bytes < first.at - self.next).then_some(self.next)
        }
    }

    /// Copies a frame in. Returns whether there was room.
    #[inline]
    pub(super) fn push(&mut self, frame: &Outgoing) -> bool {
        let Some(at) = self.place(frame.bytes).filter(|_| frame.bytes <= self.bytes.len() as u32) else { return false };
        let room = &mut self.bytes[at as usize..(at + frame.bytes) as usize];
        let mut filled = 0;
        for range in frame.segments.as_slice() {
            let to = &mut room[filled..filled + range.iov_len];
            // SAFETY: the ranges of a frame that a channel is given are readable while `transmit` runs; a VM may write them meanwhile,
            // so they are copied, never borrowed. They do not overlap our own memory.
            unsafe {
                std::ptr::copy_nonoverlapping(range.iov_base.cast::<u8>().cast_const(), to.as_mut_ptr(), to.len())
            };
            filled += range.iov_len;
        }
        debug_assert_eq!(filled, frame.bytes as usize, "a frame is as long as its ranges");
        self.waiting.push_back(Entry { header: frame.header, at, bytes: frame.bytes });
        self.next = at + frame.bytes;
        true
    }

    /// The newest frame, to be changed.
    #[inline]
    pub(super) fn newest(&mut self) -> Option<&mut [u8]> {
        let Entry { at, bytes, .. } = *self.waiting.back()?;
        Some(&mut self.bytes[at as usize..(at + bytes) as usize])
    }

    /// The oldest frames, at most `most`.
    #[inline]
    pub(super) fn frames(&mut self, most: usize) -> &[Incoming] {
        self.handed.clear();
        for Entry { header, at, bytes } in self.waiting.iter().take(most.min(BURST)) {
            let start = self.bytes[*at as usize..].as_ptr();
            // SAFETY: the bytes are ours, and stay as they are until the frame is released: `push` writes only where none waits.
            self.handed.push(unsafe { Incoming::new(*header, start, *bytes) });
        }
        &self.handed
    }

    /// The `count` oldest are done with.
    #[inline]
    pub(super) fn release(&mut self, count: usize) {
        self.waiting.drain(..count.min(self.waiting.len()));
        if self.waiting.is_empty() {
            self.next = 0;
        }
    }
}

#[cfg(test)]
mod tests;
