//! Commands that are not whole, and frames whose hash is known.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::Ipv4Addr;

use etherparse::PacketBuilder;

use super::*;

/// The key that published hashes are for.
pub(in super::super) const KEY: [u8; KEY_BYTES] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0, 0xca, 0x2b,
    0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac,
    0x01, 0xfa,
];

/// `struct virtio_net_rss_config`.
pub(in super::super) fn rss(types: u32, table: &[u16], unclassified: u16, transmitting: u16, key: &[u8]) -> Vec<u8> {
    let mut data = types.to_le_bytes().to_vec();
    data.extend((table.len() as u16).wrapping_sub(1).to_le_bytes());
    data.extend(unclassified.to_le_bytes());
    data.extend(table.iter().flat_map(|pair| pair.to_le_bytes()));
    data.extend(transmitting.to_le_bytes());
    data.push(key.len() as u8);
    data.extend(key);
    data
}

/// A packet whose hash with ports is 0x51ccc178, and with addresses alone 0x323e8fc2.
pub(in super::super) fn known(tcp: bool) -> Vec<u8> {
    let address = |text: &str| text.parse::<Ipv4Addr>().unwrap().octets();
    let packet = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4(address("66.9.149.187"), address("161.142.100.80"), 9);
    let mut frame = Vec::new();
    if tcp {
        packet.tcp(2794, 1766, 1, 2).write(&mut frame, b"what it says").unwrap();
    } else {
        packet.udp(2794, 1766).write(&mut frame, b"what it says").unwrap();
    }
    frame
}

#[test]
fn frames_are_hashed_as_far_as_was_asked_for() {
    let of = |types: u32, frame: &[u8]| Hashing::parse_rss(&rss(types, &[0], 0, 1, &KEY), 4).unwrap().0.of(frame);
    let hash = |value, report: u32| FrameHash { value, report: report as u16 };
    let (ports, alone) = (0x51cc_c178, 0x323e_8fc2);
    let tcp = spec::VIRTIO_NET_RSS_HASH_TYPE_TCPv4;
    let ip = spec::VIRTIO_NET_RSS_HASH_TYPE_IPv4;
    assert_eq!(of(TYPES, &known(true)), hash(ports, spec::VIRTIO_NET_HASH_REPORT_TCPv4));
    assert_eq!(of(TYPES, &known(false)), hash(ports, spec::VIRTIO_NET_HASH_REPORT_UDPv4));
    assert_eq!(of(tcp | ip, &known(false)), hash(alone, spec::VIRTIO_NET_HASH_REPORT_IPv4));
    assert_eq!(of(ip, &known(true)), hash(alone, spec::VIRTIO_NET_HASH_REPORT_IPv4));
    for (types, frame) in [(tcp, known(false)), (0, known(true)), (TYPES, vec![0; 60]), (TYPES & !0x7, known(true))] {
        assert_eq!(of(types, &frame), hash(0, spec::VIRTIO_NET_HASH_REPORT_NONE));
    }
}

#[test]
fn a_table_leads_by_the_low_bits() {
    let table: Vec<u16> = (0..128).map(|entry| entry % 3).collect();
    let (hashing, used) = Hashing::parse_rss(&rss(TYPES, &table, 3, 2, &KEY), 4).unwrap();
    assert_eq!(used, 4, "as many as are led to");
    assert_eq!(hashing.pair_of(&known(true)), Some((0x51cc_c178_u32 % 128 % 3) as u16));
    assert_eq!(hashing.pair_of(&[0; 60]), Some(3));
    assert_eq!(hashing.without_table().pair_of(&known(true)), None);
}

#[test]
fn what_is_not_whole_is_refused() {
    let good = rss(TYPES, &[0, 1, 2, 3], 0, 4, &KEY);
    assert!(Hashing::parse_rss(&good, 4).is_ok());
    for bytes in 0..good.len() {
        assert!(Hashing::parse_rss(&good[..bytes], 4).is_err(), "{bytes}");
    }
    assert_eq!(Hashing::parse_rss(&[&good[..], &[0]].concat(), 4), Hashing::parse_rss(&good, 4), "something behind it");
    for bad in [
        rss(TYPES | 1 << 6, &[0], 0, 1, &KEY),
        rss(TYPES, &[0, 1, 2], 0, 1, &KEY),
        rss(TYPES, &[], 0, 1, &KEY),
        rss(TYPES, &[0; 256], 0, 1, &KEY),
        rss(TYPES, &[4], 0, 1, &KEY),
        rss(TYPES, &[0], 4, 1, &KEY),
        rss(TYPES, &[0], 0, 0, &KEY),
        rss(TYPES, &[0], 0, 5, &KEY),
        rss(TYPES, &[0], 0, 1, &[7; 41]),
    ] {
        assert!(Hashing::parse_rss(&bad, 4).is_err());
    }
    assert!(Hashing::parse_rss(&rss(TYPES, &[0], 0, 1, &[7; 8]), 4).is_ok(), "a shorter key");
    let hash = [&TYPES.to_le_bytes()[..], &[0; 8], &[40], &KEY].concat();
    assert_eq!(Hashing::parse_hash(&hash).unwrap().of(&known(true)).value, 0x51cc_c178);
    assert_eq!(Hashing::parse_hash(&hash[..20]), Err(BadCommand));
}
