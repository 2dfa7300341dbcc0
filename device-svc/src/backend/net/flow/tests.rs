//! The hash against published vectors, and the flow of frames that `etherparse` made.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{Ipv4Addr, Ipv6Addr};

use etherparse::PacketBuilder;

use super::*;

/// The key that the vectors of receive-side scaling's first publication are for.
const KEY: [u8; KEY_BYTES] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0, 0xca, 0x2b,
    0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac,
    0x01, 0xfa,
];

fn v4(source: (&str, u16), destination: (&str, u16), tcp: bool) -> Vec<u8> {
    let address = |text: &str| text.parse::<Ipv4Addr>().unwrap().octets();
    let packet = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4(address(source.0), address(destination.0), 9);
    let mut frame = Vec::new();
    if tcp {
        packet.tcp(source.1, destination.1, 1, 2).write(&mut frame, b"").unwrap();
    } else {
        packet.udp(source.1, destination.1).write(&mut frame, b"").unwrap();
    }
    frame
}

fn v6(source: (&str, u16), destination: (&str, u16)) -> Vec<u8> {
    let address = |text: &str| text.parse::<Ipv6Addr>().unwrap().octets();
    let packet = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv6(address(source.0), address(destination.0), 9);
    let mut frame = Vec::new();
    packet.tcp(source.1, destination.1, 1, 2).write(&mut frame, b"").unwrap();
    frame
}

#[test]
fn hashes_are_the_published_ones() {
    let toeplitz = Toeplitz::new(&KEY);
    for (source, destination, with_ports, alone) in [
        (("66.9.149.187", 2794), ("161.142.100.80", 1766), 0x51cc_c178, 0x323e_8fc2),
        (("199.92.111.2", 14230), ("65.69.140.83", 4739), 0xc626_b0ea, 0xd718_262a),
        (("24.19.198.95", 12898), ("12.22.207.184", 38024), 0x5c2b_394a, 0xd2d0_a5de),
    ] {
        let flow = Flow::of(&v4(source, destination, true)).unwrap();
        assert_eq!((flow.protocol, flow.is_ipv6), (Protocol::Tcp, false));
        assert_eq!(toeplitz.hash(flow.text(true)), with_ports, "{source:?}");
        assert_eq!(toeplitz.hash(flow.text(false)), alone, "{source:?}");
    }
    let flow = Flow::of(&v6(("3ffe:2501:200:1fff::7", 2794), ("3ffe:2501:200:3::1", 1766))).unwrap();
    assert!(flow.is_ipv6);
    assert_eq!(toeplitz.hash(flow.text(true)), 0x4020_7d3d);
    assert_eq!(toeplitz.hash(flow.text(false)), 0x2cc1_8cd5);
}

#[test]
fn flows_are_read_behind_tags_and_options_and_not_out_of_fragments() {
    let plain = v4(("10.0.0.1", 1), ("10.0.0.2", 2), false);
    let flow = Flow::of(&plain).unwrap();
    assert_eq!(flow.protocol, Protocol::Udp);
    let tagged = [&plain[..12], &[0x88, 0xa8, 0, 7, 0x81, 0, 0, 9], &plain[12..]].concat();
    assert_eq!(Flow::of(&tagged), Some(flow));
    let mut options = plain.clone();
    options[14] = 0x46;
    options.splice(34..34, [1, 1, 1, 0]);
    assert_eq!(Flow::of(&options), Some(flow));
    for (at, bits) in [(20, 0x20), (21, 1)] {
        let mut fragment = plain.clone();
        fragment[at] |= bits;
        let flow = Flow::of(&fragment).unwrap();
        assert_eq!((flow.protocol, &flow.text(true)[8..]), (Protocol::Ip, &[0; 4][..]));
    }
    let mut extended = v6(("fd00::1", 1), ("fd00::2", 2));
    let direct = Flow::of(&extended);
    extended[20] = 60;
    extended.splice(54..54, [6, 0, 1, 4, 0, 0, 0, 0]);
    assert_eq!(Flow::of(&extended), direct);
    for bytes in 0..plain.len() - 8 {
        // Cut off anywhere, nothing is read that is not there.
        assert!(Flow::of(&plain[..bytes]).is_none_or(|flow| flow.protocol == Protocol::Ip));
    }
    assert_eq!(Flow::of(&[0; 60]), None);
}

#[test]
fn both_directions_spread_alike_and_flows_apart() {
    let mut seen = std::collections::HashSet::new();
    for port in 0..256 {
        let there = Flow::of(&v4(("10.0.0.1", 1000 + port), ("10.0.0.2", 80), true)).unwrap();
        let back = Flow::of(&v4(("10.0.0.2", 80), ("10.0.0.1", 1000 + port), true)).unwrap();
        assert_eq!(there.spread(), back.spread());
        seen.insert(there.spread() % 8);
    }
    assert_eq!(seen.len(), 8);
}
