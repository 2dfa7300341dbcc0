//! Packets of any shape as `etherparse` builds them, and what `etherparse` says of the pieces that they were cut into.

use etherparse::{
    IpHeaders, IpNumber, Ipv4Header, Ipv6Extensions, Ipv6Header, Ipv6RawExtHeader, NetHeaders, PacketBuilder,
    PacketHeaders, TcpHeader, TransportHeader, VlanId,
};
use proptest::prelude::*;

use crate::backend::net::{Checksum, NetHeader, Segmentation, SegmentationKind};

/// A TCP or UDP packet.
#[derive(Clone, Debug)]
pub(in crate::backend::net::offload) struct Packet {
    pub(in crate::backend::net::offload) tags: u8,
    pub(in crate::backend::net::offload) six: bool,
    pub(in crate::backend::net::offload) udp: bool,
    /// Words of 4 bytes; for IPv6, how many extension headers.
    pub(in crate::backend::net::offload) ip_options: u8,
    pub(in crate::backend::net::offload) tcp_options: u8,
    pub(in crate::backend::net::offload) flags: u8,
    pub(in crate::backend::net::offload) sequence: u32,
    pub(in crate::backend::net::offload) identification: u16,
    pub(in crate::backend::net::offload) payload: Vec<u8>,
}

/// Bytes that look random.
pub(in crate::backend::net::offload) fn bytes(count: usize, mut seed: u64) -> Vec<u8> {
    let mut next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 56) as u8
    };
    (0..count).map(|_| next()).collect()
}

/// Packets with a payload of less than `payload_bytes`.
pub(in crate::backend::net::offload) fn packets(payload_bytes: usize) -> impl Strategy<Value = Packet> {
    let shape = (0..=2u8, any::<bool>(), any::<bool>(), 0..=10u8, 0..=10u8, any::<u8>());
    let content = (any::<u32>(), any::<u16>(), 0..payload_bytes, any::<u64>());
    (shape, content).prop_map(|((tags, six, udp, ip_options, tcp_options, flags), content)| {
        let (sequence, identification, count, seed) = content;
        let payload = bytes(count, seed);
        Packet { tags, six, udp, ip_options, tcp_options, flags, sequence, identification, payload }
    })
}

impl Packet {
    fn ip(&self) -> IpHeaders {
        if self.six {
            let extension = |bytes: usize| Ipv6RawExtHeader::new_raw(IpNumber::UDP, &vec![0; bytes]).unwrap();
            let extensions = Ipv6Extensions {
                hop_by_hop_options: (self.ip_options & 1 != 0).then(|| extension(6)),
                destination_options: (self.ip_options & 2 != 0).then(|| extension(14)),
                ..Ipv6Extensions::default()
            };
            let header = Ipv6Header {
                hop_limit: 64,
                source: std::array::from_fn(|index| index as u8),
                destination: std::array::from_fn(|index| 255 - index as u8),
                ..Ipv6Header::default()
            };
            return IpHeaders::Ipv6(header, extensions);
        }
        let mut header = Ipv4Header::new(0, 64, IpNumber::TCP, [10, 0, 0, 1], [10, 0, 255, 254]).unwrap();
        header.options = vec![1; usize::from(self.ip_options) * 4].as_slice().try_into().unwrap();
        header.identification = self.identification;
        IpHeaders::Ipv4(header, Default::default())
    }

    fn tcp(&self) -> TcpHeader {
        let mut header = TcpHeader::new(1000, 2000, self.sequence, 500);
        let flag = |bit: u8| self.flags >> bit & 1 == 1;
        (header.fin, header.psh, header.ack, header.ece, header.cwr) = (flag(0), flag(3), flag(4), flag(6), flag(7));
        header.set_options_raw(&vec![1; usize::from(self.tcp_options) * 4]).unwrap();
        header
    }

    /// The frame, all of it done.
    pub(in crate::backend::net::offload) fn done(&self) -> Vec<u8> {
        let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        let (outer, inner) = (VlanId::try_new(7).unwrap(), VlanId::try_new(8).unwrap());
        let ip = match self.tags {
            0 => ethernet.ip(self.ip()),
            1 => ethernet.single_vlan(outer).ip(self.ip()),
            _ => ethernet.double_vlan(outer, inner).ip(self.ip()),
        };
        let mut frame = Vec::new();
        if self.udp {
            ip.udp(1000, 2000).write_to_vec(&mut frame, &self.payload).unwrap();
        } else {
            ip.tcp_header(self.tcp()).write_to_vec(&mut frame, &self.payload).unwrap();
        }
        frame
    }

    /// Where the transport's header and the payload begin in the frame.
    pub(in crate::backend::net::offload) fn places(&self) -> (usize, usize) {
        let payload = self.done().len() - self.payload.len();
        (payload - if self.udp { 8 } else { 20 + usize::from(self.tcp_options) * 4 }, payload)
    }

    /// The frame with its checksum, and if `segment_bytes` are given its cutting, left undone.
    pub(in crate::backend::net::offload) fn undone(&self, segment_bytes: Option<u16>) -> (NetHeader, Vec<u8>) {
        let mut frame = self.done();
        let (start, _) = self.places();
        let offset = if self.udp { 6 } else { 16 };
        let network = 14 + usize::from(self.tags) * 4;
        let addresses = if self.six { network + 8..network + 40 } else { network + 12..network + 20 };
        let words =
            |bytes: &[u8]| bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum::<u32>();
        let mut sum = words(&frame[addresses]) + if self.udp { 17 } else { 6 } + (frame.len() - start) as u32;
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        frame[start + offset..start + offset + 2].copy_from_slice(&(sum as u16).to_be_bytes());
        let kind = match (self.udp, self.six) {
            (true, _) => SegmentationKind::Udp,
            (false, false) => SegmentationKind::Tcp4,
            (false, true) => SegmentationKind::Tcp6,
        };
        let segmentation = segment_bytes.map(|bytes| Segmentation { kind, ecn: false, bytes, header_bytes: 0 });
        let checksum = Checksum::Needed { start: start as u16, offset: offset as u16 };
        (NetHeader { checksum, segmentation }, frame)
    }
}

/// A checksum of all ones is one of 0.
pub(in crate::backend::net::offload) fn same(one: u16, other: u16) -> bool {
    one == other || (one.wrapping_add(1) < 2 && other.wrapping_add(1) < 2)
}

/// The pieces are what a packet is cut into at this many bytes of payload each.
pub(in crate::backend::net::offload) fn check_pieces(packet: &Packet, pieces: &[Vec<u8>], segment_bytes: usize) {
    let whole = packet.done();
    let (start, payload_at) = packet.places();
    let network_at = 14 + usize::from(packet.tags) * 4;
    let original = PacketHeaders::from_ethernet_slice(&whole).unwrap();
    assert_eq!(pieces.len(), packet.payload.len().div_ceil(segment_bytes).max(1));
    let mut payload = Vec::new();
    for (number, piece) in pieces.iter().enumerate() {
        let is_last = number + 1 == pieces.len();
        let parsed = PacketHeaders::from_ethernet_slice(piece).unwrap();
        let here = parsed.payload.slice();
        // All that is in the frame is the packet's.
        assert_eq!(here.len(), piece.len() - payload_at);
        assert!(here.len() == segment_bytes || (is_last && here.len() <= segment_bytes));
        assert_eq!((&parsed.link, &parsed.link_exts), (&original.link, &original.link_exts));
        let checksum = match (parsed.net.unwrap(), original.net.clone().unwrap(), parsed.transport.clone().unwrap()) {
            (NetHeaders::Ipv4(header, _), NetHeaders::Ipv4(first, _), transport) => {
                assert_eq!(header.header_checksum, header.calc_header_checksum());
                let identification = first.identification.wrapping_add(number as u16);
                let total_len = (piece.len() - network_at) as u16;
                let header_checksum = header.header_checksum;
                assert_eq!(header, Ipv4Header { identification, total_len, header_checksum, ..first });
                match transport {
                    TransportHeader::Tcp(tcp) => tcp.calc_checksum_ipv4(&header, here),
                    TransportHeader::Udp(udp) => udp.calc_checksum_ipv4(&header, here),
                    other => panic!("{other:?}"),
                }
            }
            (NetHeaders::Ipv6(header, extensions), NetHeaders::Ipv6(first, first_extensions), transport) => {
                let payload_length = (piece.len() - network_at - 40) as u16;
                assert_eq!(header, Ipv6Header { payload_length, ..first });
                assert_eq!(extensions, first_extensions);
                match transport {
                    TransportHeader::Tcp(tcp) => tcp.calc_checksum_ipv6(&header, here),
                    TransportHeader::Udp(udp) => udp.calc_checksum_ipv6(&header, here),
                    other => panic!("{other:?}"),
                }
            }
            other => panic!("{other:?}"),
        };
        let checksum = checksum.unwrap();
        match (parsed.transport.unwrap(), original.transport.clone().unwrap()) {
            (TransportHeader::Tcp(tcp), TransportHeader::Tcp(first)) => {
                assert!(same(tcp.checksum, checksum), "{:x} is {checksum:x}", tcp.checksum);
                let expected = TcpHeader {
                    sequence_number: first.sequence_number.wrapping_add(payload.len() as u32),
                    fin: first.fin && is_last,
                    psh: first.psh && is_last,
                    cwr: first.cwr && number == 0,
                    checksum: tcp.checksum,
                    ..first
                };
                assert_eq!(tcp, expected);
            }
            (TransportHeader::Udp(udp), TransportHeader::Udp(first)) => {
                assert_eq!((udp.checksum, usize::from(udp.length)), (checksum, piece.len() - start));
                assert_ne!(udp.checksum, 0);
                assert_eq!((udp.source_port, udp.destination_port), (first.source_port, first.destination_port));
            }
            other => panic!("{other:?}"),
        }
        payload.extend_from_slice(here);
    }
    assert_eq!(payload, packet.payload);
}
