//! The header that stands before each frame in a virtqueue (virtio 1.3, 5.1.6): what was left to be done to the frame.
//!
//! It comes from a VM or from the kernel of the card, and says where in the frame something is: parsed once, against the frame's
//! length and what was negotiated, into a type that cannot point outside.

use virtio_bindings::virtio_net as spec;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{ETHERNET_BYTES, Offloads};

/// Bytes of the header as every driver of virtio 1 has it.
pub const HEADER_BYTES: u32 = size_of::<RawNetHeader>() as u32;

/// Where what a checksum counts begins at least: behind the headers of Ethernet and IP. Whoever may have a checksum written must not
/// have it written over what a frame is judged by, its addresses and its VLAN.
const CHECKSUM_START_MIN: u16 = ETHERNET_BYTES as u16 + 20;
/// Where the headers of IP and TCP end at least, behind Ethernet's: nothing shorter can be cut.
const CUT_HEADER_BYTES_MIN: u32 = ETHERNET_BYTES + 20 + 8;

/// `struct virtio_net_hdr`, little-endian as virtio 1 has it, with the count of merged buffers.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RawNetHeader {
    /// `VIRTIO_NET_HDR_F_…`
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_…`
    pub gso_type: u8,
    /// Bytes of all headers of a frame that is to be cut: a hint.
    pub header_bytes: u16,
    /// Payload bytes of each piece.
    pub segment_bytes: u16,
    /// Where the checksum begins to count.
    pub checksum_start: u16,
    /// Where the checksum is, from there.
    pub checksum_offset: u16,
    /// Buffers that the frame takes (to the VM).
    pub buffers: u16,
}

impl RawNetHeader {
    /// Its bytes, put together before they are stored: a copy made just after several small stores would wait for all of them.
    #[inline]
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES as usize] {
        let field = |value: u16, place: u32| u64::from(u16::from_le(value)) << (16 * place);
        let kind = u64::from(self.flags) | u64::from(self.gso_type) << 8;
        let front = kind | field(self.header_bytes, 1) | field(self.segment_bytes, 2) | field(self.checksum_start, 3);
        let back = (field(self.checksum_offset, 0) | field(self.buffers, 1)) as u32;
        let mut bytes = [0; HEADER_BYTES as usize];
        bytes[..8].copy_from_slice(&front.to_le_bytes());
        bytes[8..].copy_from_slice(&back.to_le_bytes());
        bytes
    }
}

/// A frame's checksum.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Checksum {
    /// Nothing is known of it.
    #[default]
    Unknown,
    /// It has been checked, and is right.
    Valid,
    /// It is still to be computed, over all from `start` on, and stored `offset` behind that; both bytes are inside the frame, and
    /// behind the headers of Ethernet and IP.
    Needed {
        /// Where it begins to count.
        start: u16,
        /// Where it is, from there.
        offset: u16,
    },
}

/// What kind of packet is still to be cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SegmentationKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over either.
    Udp,
}

/// How a frame is still to be cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segmentation {
    /// What it is.
    pub kind: SegmentationKind,
    /// Whether it carries explicit congestion notification, which a cutter must treat.
    pub ecn: bool,
    /// Payload bytes of each piece; not 0.
    pub bytes: u16,
    /// Bytes of all its headers, as whoever left this undone believes: a hint, at most the frame's length.
    pub header_bytes: u16,
}

/// What was left undone of one frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NetHeader {
    /// Its checksum.
    pub checksum: Checksum,
    /// How it is to be cut, if it is.
    pub segmentation: Option<Segmentation>,
}

/// Why a header was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadHeader {
    /// It asks for what was not negotiated, or is not known.
    #[error("a frame asks for what was not negotiated")]
    NotNegotiated,
    /// The checksum would lie outside the frame, or in the headers of Ethernet or IP.
    #[error("a frame's checksum lies outside of its payload")]
    ChecksumOutside,
    /// It is to be cut into pieces of nothing, or has no headers that could be repeated, or no checksum to be computed.
    #[error("a frame cannot be cut as it asks")]
    BadSegmentation,
}

impl NetHeader {
    /// Nothing is left to be done.
    pub const DONE: Self = Self { checksum: Checksum::Unknown, segmentation: None };

    /// Reads the header of a frame of `frame_bytes`, from somebody who may leave `allowed` undone.
    ///
    /// # Errors
    /// When it asks for more, or points outside.
    #[inline]
    pub fn parse(raw: &RawNetHeader, frame_bytes: u32, allowed: Offloads) -> Result<Self, BadHeader> {
        if raw.flags == 0 && raw.gso_type == 0 {
            return Ok(Self::DONE);
        }
        Self::parse_undone(raw, frame_bytes, allowed)
    }

    fn parse_undone(raw: &RawNetHeader, frame_bytes: u32, allowed: Offloads) -> Result<Self, BadHeader> {
        let checksum = if u32::from(raw.flags) & spec::VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
            let (start, offset) = (u16::from_le(raw.checksum_start), u16::from_le(raw.checksum_offset));
            if start < CHECKSUM_START_MIN || u32::from(start) + u32::from(offset) + 2 > frame_bytes {
                return Err(BadHeader::ChecksumOutside);
            }
            Checksum::Needed { start, offset }
        } else if u32::from(raw.flags) & spec::VIRTIO_NET_HDR_F_DATA_VALID != 0 {
            Checksum::Valid
        } else {
            Checksum::Unknown
        };
        let ecn = u32::from(raw.gso_type) & spec::VIRTIO_NET_HDR_GSO_ECN != 0;
        let kind = match u32::from(raw.gso_type) & !spec::VIRTIO_NET_HDR_GSO_ECN {
            spec::VIRTIO_NET_HDR_GSO_NONE if !ecn => None,
            spec::VIRTIO_NET_HDR_GSO_TCPV4 => Some(SegmentationKind::Tcp4),
            spec::VIRTIO_NET_HDR_GSO_TCPV6 => Some(SegmentationKind::Tcp6),
            spec::VIRTIO_NET_HDR_GSO_UDP_L4 => Some(SegmentationKind::Udp),
            _ => return Err(BadHeader::NotNegotiated),
        };
        let segmentation = match kind {
            None => None,
            Some(kind) => {
                let bytes = u16::from_le(raw.segment_bytes);
                // Each piece has its own checksum, so there must be one to compute (virtio 1.3, 5.1.6.2.1).
                let has_checksum = matches!(checksum, Checksum::Needed { .. });
                if bytes == 0 || frame_bytes < CUT_HEADER_BYTES_MIN || !has_checksum {
                    return Err(BadHeader::BadSegmentation);
                }
                let header_bytes = u32::from(u16::from_le(raw.header_bytes)).min(frame_bytes) as u16;
                Some(Segmentation { kind, ecn, bytes, header_bytes })
            }
        };
        let header = Self { checksum, segmentation };
        if allowed.cover(&header) { Ok(header) } else { Err(BadHeader::NotNegotiated) }
    }

    /// The header as it is written, for a frame that takes this many buffers.
    #[inline]
    #[must_use]
    pub fn to_raw(&self, buffers: u16) -> RawNetHeader {
        let mut raw = RawNetHeader { buffers: buffers.to_le(), ..RawNetHeader::default() };
        match self.checksum {
            Checksum::Unknown => {}
            Checksum::Valid => raw.flags = spec::VIRTIO_NET_HDR_F_DATA_VALID as u8,
            Checksum::Needed { start, offset } => {
                raw.flags = spec::VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
                raw.checksum_start = start.to_le();
                raw.checksum_offset = offset.to_le();
            }
        }
        if let Some(Segmentation { kind, ecn, bytes, header_bytes }) = self.segmentation {
            raw.gso_type = match kind {
                SegmentationKind::Tcp4 => spec::VIRTIO_NET_HDR_GSO_TCPV4,
                SegmentationKind::Tcp6 => spec::VIRTIO_NET_HDR_GSO_TCPV6,
                SegmentationKind::Udp => spec::VIRTIO_NET_HDR_GSO_UDP_L4,
            } as u8;
            if ecn {
                raw.gso_type |= spec::VIRTIO_NET_HDR_GSO_ECN as u8;
            }
            raw.segment_bytes = bytes.to_le();
            raw.header_bytes = header_bytes.to_le();
        }
        raw
    }
}

#[cfg(test)]
mod tests;
