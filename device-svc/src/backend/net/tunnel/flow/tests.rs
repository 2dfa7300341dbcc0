#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;

use etherparse::{PacketBuilder, VlanId};
use proptest::prelude::*;

use super::*;

/// A frame of UDP: which stations, tags, version of IP, and ports.
fn udp(six: bool, tags: u8, host: u8, ports: (u16, u16)) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let id = VlanId::try_new(7).unwrap();
    let addresses = |tail: u8| ([10, 0, 0, 1], [10, 0, 0, tail]);
    let ((from4, to4), from6, to6) = (addresses(host), [1; 16], [host; 16]);
    let ip = match (tags, six) {
        (0, false) => ethernet.ipv4(from4, to4, 64),
        (0, true) => ethernet.ipv6(from6, to6, 64),
        (1, false) => ethernet.single_vlan(id).ipv4(from4, to4, 64),
        (1, true) => ethernet.single_vlan(id).ipv6(from6, to6, 64),
        (_, false) => ethernet.double_vlan(id, id).ipv4(from4, to4, 64),
        (_, true) => ethernet.double_vlan(id, id).ipv6(from6, to6, 64),
    };
    let mut frame = Vec::new();
    ip.udp(ports.0, ports.1).write(&mut frame, &[1, 2, 3, 4]).unwrap();
    frame
}

fn port(frame: &[u8]) -> u16 {
    source_port(&frame[..frame.len().min(HEAD_BYTES)])
}

#[test]
fn flows_spread_over_the_ports() {
    for (six, tags) in [(false, 0), (false, 1), (false, 2), (true, 0), (true, 1), (true, 2)] {
        let ports = |of: &dyn Fn(u16) -> Vec<u8>| (0..1000).map(|number| port(&of(number))).collect::<Vec<_>>();
        let by_source = ports(&|number| udp(six, tags, 2, (1024 + number, 80)));
        let by_destination = ports(&|number| udp(six, tags, 2, (1024, number)));
        let by_host = (0..=255).map(|host| port(&udp(six, tags, host, (1024, 80)))).collect::<BTreeSet<_>>();
        for ports in [&by_source, &by_destination] {
            // Of 1000 throws at 16384 places 30 meet others by chance.
            assert!(ports.iter().collect::<BTreeSet<_>>().len() > 900, "{six}, {tags}");
            // Whoever takes the remainder, or the upper bits, gets equal shares.
            for way in [|port: &u16| port % 4, |port: &u16| (port >> 12) & 3] {
                for share in 0..4 {
                    let count = ports.iter().filter(|port| way(port) == share).count();
                    assert!((180..320).contains(&count), "{six}, {tags}: {count} of 1000");
                }
            }
        }
        assert!(by_host.len() > 240, "{six}, {tags}");
    }
}

#[test]
fn a_flow_keeps_its_port_whatever_its_packets_hold() {
    for six in [false, true] {
        let one = udp(six, 1, 2, (5, 6));
        let mut other = one.clone();
        // The payload, and of IP the identification or nothing, and the time to live.
        *other.last_mut().unwrap() ^= 0xff;
        other[18 + if six { 7 } else { 8 }] ^= 0xff;
        if !six {
            other[18 + 4] ^= 0xff;
        }
        assert_eq!(port(&one), port(&other));
        assert_eq!(port(&one), port(&[&one[..], &[0; 900]].concat()));
    }
}

/// The first fragment has ports, the others have something else there.
#[test]
fn fragments_stay_together() {
    let mut first = udp(false, 0, 2, (5, 6));
    first[20] = 0x20;
    let mut second = udp(false, 0, 2, (7, 8));
    second[21] = 100;
    assert_eq!(port(&first), port(&second));
    assert_ne!(port(&first), port(&udp(false, 0, 2, (5, 6))));
}

#[test]
fn what_has_no_flow_is_told_apart_by_its_stations() {
    let arp = |station: u8| [2, 0, 0, 0, 0, station, 2, 0, 0, 0, 0, 9, 8, 6, 0, 1, 8, 0];
    assert_eq!(port(&arp(1)), port(&arp(1)));
    let ports: BTreeSet<u16> = (0..=255).map(|station| port(&arp(station))).collect();
    assert!(ports.len() > 240);
}

proptest! {
    #[test]
    fn any_bytes_have_a_port_for_anyone(head in prop::collection::vec(any::<u8>(), 0..=HEAD_BYTES)) {
        prop_assert!(source_port(&head) >= 49152);
    }

    #[test]
    fn a_packet_that_is_cut_off_anywhere_has_one(six: bool, tags in 0u8..3, cut in 0usize..70) {
        let frame = udp(six, tags, 2, (5, 6));
        prop_assert!(source_port(&frame[..cut.min(frame.len())]) >= 49152);
    }
}
