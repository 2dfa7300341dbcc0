//! One frame on its way through the switch: its first bytes as a copy, which decide, and the rest where it is.
//!
//! A VM may change its memory at any time. Where a frame goes and what VLAN it is in is read from the copy, and the copy is what is
//! sent on, so that no frame arrives with another tag than it was judged by.
#![expect(unsafe_code, reason = "copies frames from memory that a VM shares")]

use crate::backend::net::{
    Checksum, ETHERNET_BYTES, FRAME_BYTES_MAX, Incoming, NetHeader, Octets, Outgoing, VLAN_TAG_BYTES,
};

/// First bytes that are copied: enough for a tag and for what tells flows apart.
pub(super) const HEAD_BYTES: usize = 128;
/// The Ethernet type of a VLAN tag (IEEE 802.1Q).
const TAGGED: [u8; 2] = [0x81, 0x00];
/// That of a provider's (IEEE 802.1ad).
const PROVIDER_TAGGED: [u8; 2] = [0x88, 0xa8];
/// Where a tag is.
const TAG_AT: usize = ETHERNET_BYTES as usize - 2;
const TAG_BYTES: usize = VLAN_TAG_BYTES as usize;

/// What is done to the tag of a frame on its way out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Tag {
    /// It is as it should be.
    Keep,
    /// It is taken off.
    Remove,
    /// One of this VLAN is put in front.
    Insert(u16),
    /// It names this VLAN from now on.
    Rename(u16),
}

/// A frame.
pub(super) struct Frame<'a> {
    header: NetHeader,
    head: [u8; HEAD_BYTES],
    head_bytes: usize,
    bytes: u32,
    /// All of it, the head as well.
    ranges: &'a [libc::iovec],
}

impl<'a> Frame<'a> {
    /// A frame that a channel was given.
    #[inline]
    pub(super) fn sent(frame: &'a Outgoing) -> Self {
        let mut head = [0; HEAD_BYTES];
        let head_bytes = copy_from(frame.segments.as_slice(), 0, &mut head);
        Self { header: frame.header, head, head_bytes, bytes: frame.bytes, ranges: frame.segments.as_slice() }
    }

    /// A frame that a channel hands over, as `range` describes it; see [`range_of`].
    #[inline]
    pub(super) fn come(frame: &Incoming, range: &'a libc::iovec) -> Self {
        let mut head = [0; HEAD_BYTES];
        let head_bytes = frame.bytes().len().min(HEAD_BYTES);
        head[..head_bytes].copy_from_slice(&frame.bytes()[..head_bytes]);
        Self { header: frame.header, head, head_bytes, bytes: frame.length(), ranges: std::slice::from_ref(range) }
    }

    /// The first bytes.
    #[inline]
    pub(super) fn head(&self) -> &[u8] {
        &self.head[..self.head_bytes]
    }

    /// Whom it is for.
    #[inline]
    pub(super) fn destination(&self) -> Octets {
        let [a, b, c, d, e, f, ..] = self.head;
        [a, b, c, d, e, f]
    }

    /// Who sent it.
    #[inline]
    pub(super) fn source(&self) -> Octets {
        let [_, _, _, _, _, _, a, b, c, d, e, f, ..] = self.head;
        [a, b, c, d, e, f]
    }

    /// The VLAN that its tag names, if it has one; 0 is none, and the tag is there for its priority.
    #[inline]
    pub(super) fn tag(&self) -> Option<u16> {
        let tag = self.head().get(TAG_AT..TAG_AT + TAG_BYTES)?;
        (tag[..2] == TAGGED).then(|| u16::from_be_bytes([tag[2], tag[3]]) & 0xfff)
    }

    /// Whether there is a tag that [`tag`](Self::tag) does not read: a second one, one of a provider (802.1ad), or half of one.
    #[inline]
    pub(super) fn has_hidden_tag(&self) -> bool {
        let at = TAG_AT + if self.tag().is_some() { TAG_BYTES } else { 0 };
        self.head().get(at..at + 2).is_some_and(|kind| *kind == TAGGED || *kind == PROVIDER_TAGGED)
    }

    /// The header and the length that it has with its tag changed; `None` if it cannot be so.
    #[inline]
    pub(super) fn changed(&self, tag: Tag) -> Option<(NetHeader, u32)> {
        let shift: i32 = match tag {
            Tag::Keep | Tag::Rename(_) => return Some((self.header, self.bytes)),
            Tag::Remove => -(VLAN_TAG_BYTES as i32),
            Tag::Insert(_) => VLAN_TAG_BYTES as i32,
        };
        let bytes = self.bytes.checked_add_signed(shift)?;
        if !(ETHERNET_BYTES..=FRAME_BYTES_MAX).contains(&bytes) {
            return None;
        }
        let mut header = self.header;
        if let Checksum::Needed { start, .. } = &mut header.checksum {
            *start = u16::try_from(i32::from(*start) + shift).ok()?;
        }
        if let Some(segmentation) = &mut header.segmentation {
            // A hint that nobody relies on.
            segmentation.header_bytes = segmentation.header_bytes.saturating_add_signed(shift as i16);
        }
        Some((header, bytes))
    }

    /// The first bytes with the tag changed. Returns how many there are in `room`.
    #[inline]
    pub(super) fn changed_head(&self, tag: Tag, room: &mut [u8; HEAD_BYTES + TAG_BYTES]) -> usize {
        let head = self.head();
        let (behind, inserted): (usize, Option<u16>) = match tag {
            Tag::Keep => {
                room[..head.len()].copy_from_slice(head);
                return head.len();
            }
            Tag::Rename(vlan) => {
                room[..head.len()].copy_from_slice(head);
                let [high, low] = vlan.to_be_bytes();
                room[TAG_AT + 2] = room[TAG_AT + 2] & 0xf0 | high;
                room[TAG_AT + 3] = low;
                return head.len();
            }
            Tag::Remove => (TAG_AT + TAG_BYTES, None),
            Tag::Insert(vlan) => (TAG_AT, Some(vlan)),
        };
        room[..TAG_AT].copy_from_slice(&head[..TAG_AT]);
        let mut at = TAG_AT;
        if let Some(vlan) = inserted {
            let [high, low] = vlan.to_be_bytes();
            room[at..at + TAG_BYTES].copy_from_slice(&[TAGGED[0], TAGGED[1], high, low]);
            at += TAG_BYTES;
        }
        let rest = &head[behind..];
        room[at..at + rest.len()].copy_from_slice(rest);
        at + rest.len()
    }

    /// Writes the frame with its tag changed to `room`, which is as long as [`changed`](Self::changed) says.
    #[inline]
    pub(super) fn write(&self, tag: Tag, room: &mut [u8]) {
        let mut head = [0; HEAD_BYTES + TAG_BYTES];
        let count = self.changed_head(tag, &mut head);
        let (start, rest) = room.split_at_mut(count);
        start.copy_from_slice(&head[..count]);
        let copied = copy_from(self.ranges, self.head_bytes, rest);
        debug_assert_eq!(copied, rest.len(), "a frame is as long as its ranges");
    }

    /// Appends the ranges behind the head.
    #[inline]
    pub(super) fn rest(&self, ranges: &mut Vec<libc::iovec>) {
        let mut skip = self.head_bytes;
        for range in self.ranges {
            let skipped = skip.min(range.iov_len);
            skip -= skipped;
            if skipped < range.iov_len {
                let start = range.iov_base.cast::<u8>().wrapping_add(skipped);
                ranges.push(libc::iovec { iov_base: start.cast(), iov_len: range.iov_len - skipped });
            }
        }
    }
}

/// The bytes of a frame that was handed over, as a range.
pub(super) const fn range_of(frame: &Incoming) -> libc::iovec {
    let bytes = frame.bytes();
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

/// Copies what is behind the first `skip` bytes of some ranges, as far as there is room. Returns how much that was.
#[inline]
fn copy_from(ranges: &[libc::iovec], mut skip: usize, room: &mut [u8]) -> usize {
    let mut filled = 0;
    for range in ranges {
        let skipped = skip.min(range.iov_len);
        skip -= skipped;
        let count = (range.iov_len - skipped).min(room.len() - filled);
        let to = &mut room[filled..filled + count];
        // SAFETY: the ranges of a frame are readable while a channel has it: while `transmit` runs, or until the frame is released. A VM
        // may write them meanwhile, so they are copied, never borrowed. They do not overlap memory of ours.
        unsafe {
            let from = range.iov_base.cast::<u8>().cast_const().add(skipped);
            std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), count);
        }
        filled += count;
        if filled == room.len() {
            break;
        }
    }
    filled
}

#[cfg(test)]
mod tests;
