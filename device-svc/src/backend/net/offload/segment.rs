//! Cuts a packet that is too long for the network into pieces that are not, as a network card does that offers it (virtio 1.3,
//! 5.1.6.2).
//!
//! The packet is untrusted. Its headers are read once, into [`Cut`], which has a copy of them and knows where each field that differs
//! from piece to piece is: from then on nothing of the packet is looked at but its payload, and each piece is a function of its number.

use std::ops::Range;

use super::checksum::Sum;
use crate::backend::net::{Checksum, NetHeader, Segmentation, SegmentationKind};

/// Bytes of all headers of a packet that can be cut at most: Ethernet with two VLAN tags, IPv4 and TCP with all options are 142; the
/// others are left to the extension headers of IPv6.
pub const HEADERS_BYTES_MAX: usize = 256;
/// Pieces of one packet at most. Linux sends none with less than 48 bytes of TCP's payload; more pieces would let a VM occupy the card
/// with a single descriptor.
pub const PIECES_MAX: u32 = 65535u32.div_ceil(48);

const VLAN_TAGS_MAX: usize = 2;
const ETHERTYPE_AT: usize = 12;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPES_VLAN: [u16; 2] = [0x8100, 0x88a8];

const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION_OPTIONS: u8 = 60;

const IPV4_BYTES_MIN: usize = 20;
const IPV6_BYTES: usize = 40;
const TCP_BYTES_MIN: usize = 20;
const UDP_BYTES: usize = 8;

const TCP_FLAGS: usize = 13;
const FIN: u8 = 1;
const PSH: u8 = 8;
const CWR: u8 = 0x80;

/// Why a packet cannot be cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CannotCut {
    /// Its headers are not whole, too long, or not those of the kind that its virtio header names; or it is a fragment.
    #[error("the headers of a packet that is to be cut are not what it says")]
    Headers,
    /// Its checksum is not where its own protocol has it.
    #[error("the checksum of a packet that is to be cut is not where its protocol has it")]
    Checksum,
    /// The pieces would be too long for the network, or too many.
    #[error("a packet would be cut into pieces that are too long or too many")]
    Pieces,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Version {
    Four,
    Six,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Transport {
    Tcp,
    Udp,
}

impl Transport {
    const fn protocol(self) -> u8 {
        match self {
            Self::Tcp => PROTOCOL_TCP,
            Self::Udp => PROTOCOL_UDP,
        }
    }

    /// Where the checksum is in its header.
    const fn checksum_at(self) -> usize {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }
}

/// A packet that can be cut: its headers, and how long its pieces are.
#[derive(Clone, Debug)]
pub struct Cut {
    headers: [u8; HEADERS_BYTES_MAX],
    /// How much of `headers` there is; the payload begins there. What follows points inside.
    header_bytes: usize,
    version: Version,
    network_at: usize,
    transport: Transport,
    transport_at: usize,
    payload_bytes: usize,
    segment_bytes: usize,
}

fn short(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk::<2>().map(|bytes| u16::from_be_bytes(*bytes))
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Where the network's header begins, and what it is.
fn network(frame: &[u8]) -> Option<(Version, usize)> {
    let mut at = ETHERTYPE_AT;
    for _ in 0..=VLAN_TAGS_MAX {
        let ethertype = short(frame, at)?;
        if !ETHERTYPES_VLAN.contains(&ethertype) {
            return match ethertype {
                ETHERTYPE_IPV4 => Some((Version::Four, at + 2)),
                ETHERTYPE_IPV6 => Some((Version::Six, at + 2)),
                _ => None,
            };
        }
        at += 4;
    }
    None
}

/// Where the transport's header begins, and its protocol.
fn transport(frame: &[u8], version: Version, network_at: usize) -> Option<(u8, usize)> {
    let packet = frame.get(network_at..)?;
    match version {
        Version::Four => {
            let first = *packet.first()?;
            let bytes = usize::from(first & 15) * 4;
            // A fragment has no header of its transport, or not all of its payload.
            let is_fragment = short(packet, 6)? & 0x3fff != 0;
            let is_whole = first >> 4 == 4 && bytes >= IPV4_BYTES_MIN && !is_fragment;
            is_whole.then_some((*packet.get(9)?, network_at + bytes))
        }
        Version::Six => {
            let mut next = *packet.get(6)?;
            let mut at = IPV6_BYTES;
            // Each of them has 8 bytes at least, so this ends.
            while at < HEADERS_BYTES_MAX && matches!(next, HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS) {
                let &[following, length, _, segments_left] = packet.get(at..)?.first_chunk::<4>()?;
                // The checksum is over the address where it will arrive, which is then another one than in the header.
                if next == ROUTING && segments_left != 0 {
                    return None;
                }
                next = following;
                at += (usize::from(length) + 1) * 8;
            }
            (packet.first()? >> 4 == 6).then_some((next, network_at + at))
        }
    }
}

impl Cut {
    /// Reads the headers of a packet, `frame` from its Ethernet header on, that is to be cut as `header` says into pieces of at most
    /// `packet_bytes_max`, counted from the header of IP on.
    ///
    /// # Errors
    /// When it cannot be cut so.
    pub fn new(frame: &[u8], header: &NetHeader, packet_bytes_max: u16) -> Result<Self, CannotCut> {
        let NetHeader { checksum: Checksum::Needed { start, offset }, segmentation: Some(wanted) } = *header else {
            return Err(CannotCut::Headers);
        };
        let Segmentation { kind, bytes: segment_bytes, .. } = wanted;
        let (version, network_at) = network(frame).ok_or(CannotCut::Headers)?;
        let (protocol, transport_at) = transport(frame, version, network_at).ok_or(CannotCut::Headers)?;
        let transport = match (kind, version, protocol) {
            (SegmentationKind::Tcp4, Version::Four, PROTOCOL_TCP)
            | (SegmentationKind::Tcp6, Version::Six, PROTOCOL_TCP) => Transport::Tcp,
            (SegmentationKind::Udp, _, PROTOCOL_UDP) => Transport::Udp,
            _ => return Err(CannotCut::Headers),
        };
        let transport_bytes = match transport {
            Transport::Tcp => {
                let words = frame.get(transport_at + 12).ok_or(CannotCut::Headers)? >> 4;
                usize::from(words) * 4
            }
            Transport::Udp => UDP_BYTES,
        };
        let header_bytes = transport_at + transport_bytes;
        let is_short = transport == Transport::Tcp && transport_bytes < TCP_BYTES_MIN;
        let mut headers = [0; HEADERS_BYTES_MAX];
        let (Some(from), Some(to), false) = (frame.get(..header_bytes), headers.get_mut(..header_bytes), is_short)
        else {
            return Err(CannotCut::Headers);
        };
        to.copy_from_slice(from);
        if (usize::from(start), usize::from(offset)) != (transport_at, transport.checksum_at()) {
            return Err(CannotCut::Checksum);
        }
        let (payload_bytes, segment_bytes) = (frame.len() - header_bytes, usize::from(segment_bytes.max(1)));
        let cut =
            Self { headers, header_bytes, version, network_at, transport, transport_at, payload_bytes, segment_bytes };
        let packet_bytes = header_bytes - network_at + segment_bytes.min(payload_bytes);
        if packet_bytes > usize::from(packet_bytes_max) || payload_bytes.div_ceil(segment_bytes) > PIECES_MAX as usize {
            return Err(CannotCut::Pieces);
        }
        Ok(cut)
    }

    /// How many pieces there are: at least 1, at most [`PIECES_MAX`].
    #[inline]
    #[must_use]
    pub const fn pieces(&self) -> u32 {
        let pieces = self.payload_bytes.div_ceil(self.segment_bytes) as u32;
        if pieces == 0 { 1 } else { pieces }
    }

    /// Bytes of the headers of each piece.
    #[inline]
    #[must_use]
    pub const fn header_bytes(&self) -> usize {
        self.header_bytes
    }

    /// Bytes of all pieces.
    #[inline]
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.pieces() as usize * self.header_bytes + self.payload_bytes
    }

    /// Writes the headers of a piece, numbered from 0, of the packet that was read, into the first [`header_bytes`](Self::header_bytes)
    /// of `headers`. Returns where in the packet its payload is; `None` when there is no such piece, or the packet is a shorter one.
    #[inline]
    pub fn piece(&self, number: u32, frame: &[u8], headers: &mut [u8; HEADERS_BYTES_MAX]) -> Option<Range<usize>> {
        if number >= self.pieces() {
            return None;
        }
        let from = number as usize * self.segment_bytes;
        let bytes = self.segment_bytes.min(self.payload_bytes - from);
        let place = self.header_bytes + from..self.header_bytes + from + bytes;
        let payload = frame.get(place.clone())?;
        let headers = &mut headers[..self.header_bytes];
        headers.copy_from_slice(&self.headers[..self.header_bytes]);
        let (before, transport) = headers.split_at_mut(self.transport_at);
        let network = &mut before[self.network_at..];
        // `new` has seen that the longest piece is no longer than a packet can be.
        let transport_bytes = (transport.len() + bytes) as u16;
        self.finish_network(network, number, transport_bytes);
        match self.transport {
            Transport::Tcp => {
                let sequence = u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]);
                transport[4..8].copy_from_slice(&sequence.wrapping_add(from as u32).to_be_bytes());
                // What ends the stream, or wants to be read at once, is the last piece; that the window was reduced is said once.
                if number + 1 < self.pieces() {
                    transport[TCP_FLAGS] &= !(FIN | PSH);
                }
                if number > 0 {
                    transport[TCP_FLAGS] &= !CWR;
                }
            }
            Transport::Udp => put(transport, 4, transport_bytes),
        }
        let checksum_at = self.transport.checksum_at();
        put(transport, checksum_at, 0);
        let addresses = match self.version {
            Version::Four => &network[12..20],
            Version::Six => &network[8..40],
        };
        let [high, low] = transport_bytes.to_be_bytes();
        // Of the pseudo-headers of IPv4 and IPv6 all that is not 0: the sum is the same.
        let pseudo = Sum::default().over(addresses).over(&[0, self.transport.protocol(), high, low]);
        let sum = pseudo.over(transport).over(payload);
        let checksum = if self.transport == Transport::Udp { sum.checksum_not_zero() } else { sum.checksum() };
        transport[checksum_at..checksum_at + 2].copy_from_slice(&checksum);
        Some(place)
    }

    fn finish_network(&self, network: &mut [u8], number: u32, transport_bytes: u16) {
        match self.version {
            Version::Four => {
                put(network, 2, network.len() as u16 + transport_bytes);
                let identification = u16::from_be_bytes([network[4], network[5]]);
                put(network, 4, identification.wrapping_add(number as u16));
                put(network, 10, 0);
                let checksum = Sum::default().over(network).checksum();
                network[10..12].copy_from_slice(&checksum);
            }
            Version::Six => put(network, 4, (network.len() - IPV6_BYTES) as u16 + transport_bytes),
        }
    }
}

#[cfg(test)]
mod tests;
