//! How a frame lies in its place: behind a short virtio header, and, from a packet socket, with its VLAN tag told beside it.
//!
//! The tag is put back before the frame is handed over, where the header was.
#![expect(unsafe_code, reason = "moves bytes of a place that the kernel wrote")]

use crate::backend::net::slab::{PLACE_BYTES, Slab};
use crate::backend::net::{BURST, FRAME_BYTES_MAX, RawNetHeader, VLAN_TAG_BYTES};

/// Bytes of the header before each frame.
pub(in crate::backend::net) const HEADER_BYTES: u32 = std::mem::offset_of!(RawNetHeader, buffers) as u32;
/// Where in its place a frame begins. Before it is its header, or, when that has been read, room for a VLAN tag.
pub(super) const FRAME_AT: usize = 16;
const READ_AT: usize = FRAME_AT - HEADER_BYTES as usize;
/// Bytes of a read at most.
pub(super) const READ_BYTES: usize = PLACE_BYTES - READ_AT;
const _: () = assert!(PLACE_BYTES >= FRAME_AT + FRAME_BYTES_MAX as usize && FRAME_AT >= VLAN_TAG_BYTES as usize);
/// The two addresses of an Ethernet frame; a VLAN tag follows.
const ADDRESSES_BYTES: usize = 12;

/// Where a read begins, in the place of a frame.
#[inline]
pub(super) fn read_place(slab: &Slab, number: usize) -> *mut u8 {
    // Within the place, which is longer.
    slab.place(number).wrapping_add(READ_AT)
}

/// Puts a VLAN tag into the frame that was read to a place: the addresses before it move up, over the header.
#[cold]
pub(super) fn put_tag_back(slab: &Slab, number: usize, tag: [u8; VLAN_TAG_BYTES as usize]) {
    let start = FRAME_AT - VLAN_TAG_BYTES as usize;
    // SAFETY: the place has room for the addresses and the tag, and nobody else looks at it now.
    let bytes = unsafe {
        let length = ADDRESSES_BYTES + VLAN_TAG_BYTES as usize;
        std::slice::from_raw_parts_mut(slab.place(number).add(start), length)
    };
    bytes.copy_within(VLAN_TAG_BYTES as usize.., 0);
    bytes[ADDRESSES_BYTES..].copy_from_slice(&tag);
}

/// What the kernel says beside a frame: `struct cmsghdr` with `struct tpacket_auxdata`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Beside {
    /// Bytes of it that the kernel filled.
    pub(super) length: usize,
    level: libc::c_int,
    kind: libc::c_int,
    status: u32,
    bytes: u32,
    captured_bytes: u32,
    mac_at: u16,
    network_at: u16,
    tag: u16,
    tag_protocol: u16,
}
const BESIDE_BYTES: usize = std::mem::offset_of!(Beside, tag_protocol) + 2;

impl Beside {
    /// The VLAN tag as it stands in a frame, if there is one.
    pub(super) fn tag(&self) -> Option<[u8; VLAN_TAG_BYTES as usize]> {
        let there = self.length >= BESIDE_BYTES && (self.level, self.kind) == (libc::SOL_PACKET, libc::PACKET_AUXDATA);
        if !there || self.status & libc::TP_STATUS_VLAN_VALID == 0 {
            return None;
        }
        let is_known = self.status & libc::TP_STATUS_VLAN_TPID_VALID != 0;
        let protocol = if is_known { self.tag_protocol } else { libc::ETH_P_8021Q as u16 };
        let ([a, b], [c, d]) = (protocol.to_be_bytes(), self.tag.to_be_bytes());
        Some([a, b, c, d])
    }
}

/// A read of a message: its parts lead to each other, so they stay where they are.
pub(super) struct Message {
    pub(super) header: libc::msghdr,
    range: libc::iovec,
    pub(super) beside: Beside,
}

/// A read for each place of a burst.
pub(super) fn messages(slab: &Slab) -> Box<[Message]> {
    let message = |number| Message {
        // SAFETY: a message's header is plain data.
        header: unsafe { std::mem::zeroed() },
        range: libc::iovec { iov_base: read_place(slab, number).cast(), iov_len: READ_BYTES },
        beside: Beside::default(),
    };
    let mut messages: Box<[Message]> = (0..BURST).map(message).collect();
    for Message { header, range, beside } in &mut messages {
        header.msg_iov = range;
        header.msg_iovlen = 1;
        header.msg_control = std::ptr::from_mut(beside).cast();
    }
    messages
}

/// A header that speaks of a frame without its VLAN tag, made to speak of the frame with it.
pub(super) fn move_behind_tag(raw: &mut RawNetHeader) {
    for place in [&mut raw.checksum_start, &mut raw.header_bytes] {
        *place = u16::from_le(*place).saturating_add(VLAN_TAG_BYTES as u16).to_le();
    }
}
