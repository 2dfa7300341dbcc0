//! Frames on their way from a network that leaves more undone than the VM takes.
//!
//! Those that need nothing are handed over where they are. Of the others copies are made, completed or cut, and while there are any of
//! those the inner channel keeps the frames that they were made of, and is not asked for more. A frame of which nothing can be made is
//! handed over as it came: whoever gets it refuses it for what is undone, and counts it.
#![expect(unsafe_code, reason = "hands over addresses of its own memory, by the protocol of `Incoming`")]

use super::checksum;
use super::segment::{Cut, HEADERS_BYTES_MAX, PIECES_MAX};
use crate::backend::net::{BURST, Checksum, FRAME_BYTES_MAX, Incoming, NetChannel, NetHeader, Offloads};

/// Card memory for what is made: at least all pieces of one frame. What is not used is not touched.
const MADE_BYTES: usize = FRAME_BYTES_MAX as usize + PIECES_MAX as usize * HEADERS_BYTES_MAX;
const MADE_FRAMES: usize = PIECES_MAX as usize;

/// A frame that was made.
#[derive(Clone, Copy, Debug)]
struct Made {
    at: usize,
    bytes: usize,
}

/// What was made, oldest first, and what is accepted undone.
pub(super) struct Inbound {
    undone: Offloads,
    bytes: Box<[u8]>,
    filled: usize,
    made: Vec<Made>,
    /// How many of those are done with.
    released: usize,
    handed: Vec<Incoming>,
    /// How many of the inner channel's frames they were made of.
    held: usize,
}

impl Inbound {
    pub(super) fn new() -> Self {
        Self {
            undone: Offloads::NONE,
            bytes: vec![0; MADE_BYTES].into_boxed_slice(),
            filled: 0,
            made: Vec::with_capacity(MADE_FRAMES),
            released: 0,
            handed: Vec::with_capacity(BURST),
            held: 0,
        }
    }

    /// Nothing is on its way any more.
    pub(super) fn clear(&mut self) {
        self.made.clear();
        (self.filled, self.released, self.held) = (0, 0, 0);
    }

    pub(super) const fn leave_undone(&mut self, offloads: Offloads) {
        self.undone = offloads;
    }

    /// Whether nothing that was made waits.
    #[inline]
    pub(super) const fn is_empty(&self) -> bool {
        self.made.is_empty()
    }

    #[inline]
    pub(super) fn receive<'a>(&'a mut self, inner: &'a mut dyn NetChannel, most: usize) -> &'a [Incoming] {
        if self.made.is_empty() {
            let frames = inner.receive(most);
            let undone = self.undone;
            let untouched = frames.iter().take_while(|frame| undone.cover(&frame.header)).count();
            if untouched > 0 || frames.is_empty() {
                return &frames[..untouched];
            }
            self.held = self.make(frames);
            if self.held == 0 {
                return &frames[..1];
            }
        }
        self.hand_over(most)
    }

    #[inline]
    pub(super) fn release(&mut self, inner: &mut dyn NetChannel, count: usize) {
        if self.made.is_empty() {
            return inner.release(count);
        }
        self.released += count.min(self.handed.len()).min(self.made.len() - self.released);
        if self.released == self.made.len() {
            inner.release(self.held);
            self.clear();
        }
    }

    /// Makes what is accepted of the first of these frames. Returns of how many.
    fn make(&mut self, frames: &[Incoming]) -> usize {
        let undone = self.undone;
        let makes = |frame: &&Incoming| !undone.cover(&frame.header) && self.make_one(frame);
        frames.iter().take_while(makes).count()
    }

    fn make_one(&mut self, frame: &Incoming) -> bool {
        let bytes = frame.bytes();
        let NetHeader { checksum, segmentation } = frame.header;
        if segmentation.is_none() {
            let room = self.bytes.get_mut(self.filled..).and_then(|room| room.get_mut(..bytes.len()));
            let (Some(room), Checksum::Needed { start, offset }) = (room, checksum) else { return false };
            if self.made.len() == MADE_FRAMES {
                return false;
            }
            room.copy_from_slice(bytes);
            if !checksum::complete(room, start, offset) {
                return false;
            }
            self.push(bytes.len());
            return true;
        }
        let Ok(cut) = Cut::new(bytes, &frame.header, u16::MAX) else { return false };
        if cut.bytes() > self.bytes.len() - self.filled || cut.pieces() as usize > MADE_FRAMES - self.made.len() {
            return false;
        }
        let mut headers = [0; HEADERS_BYTES_MAX];
        for number in 0..cut.pieces() {
            let Some(payload) = cut.piece(number, bytes, &mut headers) else { break };
            let length = cut.header_bytes() + payload.len();
            let (to, rest) = self.bytes[self.filled..self.filled + length].split_at_mut(cut.header_bytes());
            to.copy_from_slice(&headers[..to.len()]);
            rest.copy_from_slice(&bytes[payload]);
            self.push(length);
        }
        true
    }

    fn push(&mut self, bytes: usize) {
        self.made.push(Made { at: self.filled, bytes });
        self.filled += bytes;
    }

    /// The oldest that were made, at most `most`.
    fn hand_over(&mut self, most: usize) -> &[Incoming] {
        self.handed.clear();
        // Where the VM lets a checksum stand undone, it may be told that this one is right (virtio 1.3, 5.1.6.4.1).
        let checksum = if self.undone.checksum { Checksum::Valid } else { Checksum::Unknown };
        let header = NetHeader { checksum, segmentation: None };
        for Made { at, bytes } in self.made[self.released..].iter().take(most.min(BURST)) {
            let made = &self.bytes[*at..*at + *bytes];
            // SAFETY: the bytes are ours, and stay as they are until the frame is released: nothing is made while anything waits.
            self.handed.push(unsafe { Incoming::new(header, made.as_ptr(), made.len() as u32) });
        }
        &self.handed
    }
}
