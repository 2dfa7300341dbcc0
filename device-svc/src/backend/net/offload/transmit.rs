//! Frames on their way to a network that does less than the VM has left undone.
//!
//! They are made into a list for the inner channel, in order with those that need nothing: a frame whose checksum is completed is one
//! entry, one that is cut as many as it has pieces. What is made is made of a copy in card memory, because the VM may change its own
//! while it is added up. Of what the channel does not take, a frame that was not begun stays with the VM, and is made again; one that
//! was begun is taken, and its remaining pieces are the *rest*, which goes before all others as soon as there is room.
#![expect(
    unsafe_code,
    reason = "copies frames from memory that a VM shares, and hands addresses of copies to a channel"
)]

use super::checksum;
use super::segment::{Cut, HEADERS_BYTES_MAX};
use crate::backend::Segments;
use crate::backend::net::{BURST, Checksum, FRAME_BYTES_MAX, NetChannel, NetHeader, Offloads, Outgoing, Sent};

/// Card memory for copies: two of the longest frames, or a burst of the usual ones.
const COPIES_BYTES: usize = 2 * FRAME_BYTES_MAX as usize;

/// A copy of a VM's frame.
#[derive(Clone, Copy, Debug)]
struct Copy {
    at: usize,
    bytes: usize,
    /// What is to be done to it.
    header: NetHeader,
}

/// An entry of the list: what of which frame it is.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// The VM's frame, counted from the first of the list.
    frame: usize,
    /// For a piece: what it is cut of, and its number.
    piece: Option<(Copy, u32)>,
}

/// The pieces that remain of a frame, from this number on.
#[derive(Clone, Copy, Debug)]
struct Rest {
    of: Copy,
    next: u32,
}

/// What is on its way.
pub(super) struct Outbound {
    packet_bytes_max: u16,
    copies: Box<[u8]>,
    filled: usize,
    /// Headers of pieces, and the ranges that make up what was made: one for each entry.
    headers: Box<[[u8; HEADERS_BYTES_MAX]; BURST]>,
    ranges: Box<[[libc::iovec; 2]; BURST]>,
    list: Vec<Outgoing>,
    entries: Vec<Entry>,
    rest: Option<Rest>,
    /// Frames that were taken, and lost later.
    lost_later: u64,
}

// SAFETY: the addresses in `ranges` and `list` are used only within one call.
unsafe impl Send for Outbound {}

impl Outbound {
    /// Nothing is on its way to a network that carries packets of at most so many bytes.
    pub(super) fn new(packet_bytes_max: u16) -> Self {
        let nowhere = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        Self {
            packet_bytes_max,
            copies: vec![0; COPIES_BYTES].into_boxed_slice(),
            filled: 0,
            headers: Box::new([[0; HEADERS_BYTES_MAX]; BURST]),
            ranges: Box::new([[nowhere; 2]; BURST]),
            list: Vec::with_capacity(BURST),
            entries: Vec::with_capacity(BURST),
            rest: None,
            lost_later: 0,
        }
    }

    /// Nothing is on its way any more.
    pub(super) fn clear(&mut self) {
        self.lost_later += u64::from(self.rest.take().is_some());
    }

    /// Frames that were taken and lost later, since this was last asked.
    #[inline]
    pub(super) const fn lost_later(&mut self) -> u64 {
        std::mem::replace(&mut self.lost_later, 0)
    }

    /// Whether a frame is sent in part.
    #[inline]
    pub(super) const fn has_rest(&self) -> bool {
        self.rest.is_some()
    }

    /// Sends what remains of a frame, as far as the channel takes it. Returns whether nothing remains.
    #[inline]
    pub(super) fn go_on(&mut self, inner: &mut dyn NetChannel) -> bool {
        self.rest.is_none() || self.send_rest(inner)
    }

    fn send_rest(&mut self, inner: &mut dyn NetChannel) -> bool {
        let mut lost = false;
        while let Some(Rest { of, next }) = self.rest {
            self.list.clear();
            self.entries.clear();
            self.rest = None;
            // It could be cut before, and its copy has not changed since.
            if let Ok(cut) = self.cut(of) {
                self.list_pieces(0, of, &cut, next);
            }
            let sent = inner.transmit(&self.list);
            lost |= sent.lost > 0;
            if sent.taken < self.list.len() {
                self.rest = Some(Rest { of, next: next + sent.taken as u32 });
                break;
            }
        }
        self.lost_later += u64::from(lost);
        self.rest.is_none()
    }

    /// Sends frames of a VM to a channel that does as much as `covered`.
    pub(super) fn transmit(&mut self, inner: &mut dyn NetChannel, covered: Offloads, frames: &[Outgoing]) -> Sent {
        let mut sent = Sent::default();
        let mut full = !self.go_on(inner);
        while !full && sent.taken < frames.len() {
            let (made, bad) = self.make(covered, &frames[sent.taken..]);
            let done = if self.list.is_empty() { Sent::default() } else { inner.transmit(&self.list) };
            sent.lost += bad + done.lost.min(made);
            full = done.taken < self.list.len();
            if full {
                // One that is half sent is taken.
                let Entry { frame, piece } = self.entries[done.taken];
                let half = piece.filter(|_| done.taken > 0 && self.entries[done.taken - 1].frame == frame);
                self.rest = half.map(|(of, next)| Rest { of, next });
                sent.taken += frame + usize::from(half.is_some());
            } else {
                sent.taken += made;
                full = !self.go_on(inner);
            }
        }
        sent
    }

    /// Makes a list of the first of these frames. Returns of how many, with those before them to which nothing can be done, and how
    /// many those are. What of the last one is not in the list is the rest.
    fn make(&mut self, covered: Offloads, frames: &[Outgoing]) -> (usize, usize) {
        self.list.clear();
        self.entries.clear();
        self.filled = 0;
        self.rest = None;
        let mut bad = 0;
        for (number, frame) in frames.iter().enumerate() {
            if self.list.len() == BURST || self.rest.is_some() {
                return (number, bad);
            }
            if covered.cover(&frame.header) {
                self.list.push(*frame);
                self.entries.push(Entry { frame: number, piece: None });
                continue;
            }
            if frame.bytes as usize > self.copies.len() - self.filled && self.filled > 0 {
                return (number, bad);
            }
            if !self.copy(frame).is_some_and(|copy| self.list_made(number, copy)) {
                // At the front it is taken and lost; otherwise the list ends before it, and may be taken in part.
                if !self.list.is_empty() {
                    return (number, bad);
                }
                bad += 1;
            }
        }
        (frames.len(), bad)
    }

    /// Copies a frame, behind the others.
    fn copy(&mut self, frame: &Outgoing) -> Option<Copy> {
        let (at, bytes) = (self.filled, frame.bytes as usize);
        let room = self.copies.get_mut(at..)?.get_mut(..bytes)?;
        let mut filled = 0;
        for range in frame.segments.as_slice() {
            let to = room.get_mut(filled..)?.get_mut(..range.iov_len)?;
            // SAFETY: the ranges of a frame that a channel is given are readable while `transmit` runs; a VM may write them meanwhile,
            // so they are copied, never borrowed. They do not overlap our own memory.
            unsafe {
                std::ptr::copy_nonoverlapping(range.iov_base.cast::<u8>().cast_const(), to.as_mut_ptr(), to.len())
            };
            filled += range.iov_len;
        }
        debug_assert_eq!(filled, bytes, "a frame is as long as its ranges");
        self.filled += bytes;
        Some(Copy { at, bytes, header: frame.header })
    }

    /// Appends what is made of a copy to the list. Returns whether it could be made.
    fn list_made(&mut self, frame: usize, copy: Copy) -> bool {
        let Copy { at, bytes, header } = copy;
        if header.segmentation.is_some() {
            let cut = self.cut(copy);
            if let Ok(cut) = &cut {
                self.list_pieces(frame, copy, cut, 0);
            }
            return cut.is_ok();
        }
        let Checksum::Needed { start, offset } = header.checksum else { return false };
        let whole = &mut self.copies[at..at + bytes];
        let complete = checksum::complete(whole, start, offset);
        if complete {
            let range = libc::iovec { iov_base: whole.as_mut_ptr().cast(), iov_len: bytes };
            self.push(Entry { frame, piece: None }, &[range]);
        }
        complete
    }

    fn cut(&self, copy: Copy) -> Result<Cut, super::CannotCut> {
        Cut::new(&self.copies[copy.at..copy.at + copy.bytes], &copy.header, self.packet_bytes_max)
    }

    /// Appends pieces from this number on to the list; those for which there is no room are the rest.
    fn list_pieces(&mut self, frame: usize, of: Copy, cut: &Cut, first: u32) {
        for number in first..cut.pieces() {
            if self.list.len() == BURST {
                self.rest = Some(Rest { of, next: number });
                return;
            }
            let whole = &mut self.copies[of.at..of.at + of.bytes];
            let headers = &mut self.headers[self.list.len()];
            let Some(payload) = cut.piece(number, whole, headers) else { return };
            let payload = &mut whole[payload];
            let ranges = [
                libc::iovec { iov_base: headers.as_mut_ptr().cast(), iov_len: cut.header_bytes() },
                libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: payload.len() },
            ];
            self.push(Entry { frame, piece: Some((of, number)) }, &ranges);
        }
    }

    /// Appends an entry, which has one or two ranges.
    fn push(&mut self, entry: Entry, ranges: &[libc::iovec]) {
        let place = &mut self.ranges[self.list.len()];
        place[..ranges.len()].copy_from_slice(ranges);
        let bytes = ranges.iter().map(|range| range.iov_len).sum::<usize>() as u32;
        // SAFETY: the list of ranges and the bytes in them are ours, stay where they are, and are not touched until the inner channel
        // has been given this entry and has returned, which is as long as it looks at them.
        let segments = unsafe { Segments::new(place.as_ptr(), ranges.len() as u32) };
        self.list.push(Outgoing { header: NetHeader::DONE, segments, bytes });
        self.entries.push(entry);
    }
}
