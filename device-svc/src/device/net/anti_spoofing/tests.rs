//! Frames made by `etherparse`, judged.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use etherparse::{Icmpv6Type, PacketBuilder};

use super::*;

const MAC: Octets = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const OTHER: Octets = [0x52, 0x54, 0, 0x12, 0x34, 0x57];
const PEER: Octets = [0x52, 0x54, 0, 0xaa, 0, 1];

impl AntiSpoofing {
    fn passes(&self, mac: Octets, frame: &[u8]) -> bool {
        self.judge(mac, frame).is_some()
    }
}

fn any() -> AntiSpoofing {
    AntiSpoofing { mac: true, vlans: None, addresses: None }
}

fn only(addresses: &[&str]) -> AntiSpoofing {
    AntiSpoofing { addresses: Some(addresses.iter().map(|text| text.parse().unwrap()).collect()), ..any() }
}

fn v4(mac: Octets, source: [u8; 4], ports: (u16, u16)) -> Vec<u8> {
    let mut frame = Vec::new();
    let packet = PacketBuilder::ethernet2(mac, PEER).ipv4(source, [10, 0, 0, 9], 64).udp(ports.0, ports.1);
    packet.write(&mut frame, b"what it says").unwrap();
    frame
}

fn v6(source: &str, kind: Icmpv6Type, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    let source: Ipv6Addr = source.parse().unwrap();
    let packet = PacketBuilder::ethernet2(MAC, PEER).ipv6(source.octets(), Ipv6Addr::LOCALHOST.octets(), 255);
    packet.icmpv6(kind).write(&mut frame, payload).unwrap();
    frame
}

fn advertisement(source: &str, target: &str) -> Vec<u8> {
    let target: Ipv6Addr = target.parse().unwrap();
    let kind = Icmpv6Type::Unknown { type_u8: NEIGHBOUR_ADVERTISEMENT, code_u8: 0, bytes5to8: [0x60, 0, 0, 0] };
    v6(source, kind, &target.octets())
}

fn arp(hardware: Octets, sender: [u8; 4]) -> Vec<u8> {
    let head = [&[0xff; 6][..], &MAC, &ARP, &ARP_HEAD, &[0, 1]].concat();
    [&head[..], &hardware, &sender, &[0; 6], &[10, 0, 0, 9]].concat()
}

fn tagged(frame: &[u8], tags: &[u16]) -> Vec<u8> {
    let tags: Vec<u8> = tags.iter().flat_map(|tag| [TAGS[0], tag.to_be_bytes()].concat()).collect();
    [&frame[..12], &tags, &frame[12..]].concat()
}

#[test]
fn the_source_must_be_the_functions_own() {
    let frame = |mac| v4(mac, [1, 2, 3, 4], (5, 6));
    assert!(any().passes(MAC, &frame(MAC)));
    assert!(!any().passes(MAC, &frame(OTHER)));
    assert!(AntiSpoofing { mac: false, ..any() }.passes(MAC, &frame(OTHER)));
    assert!(!any().passes(MAC, &frame(MAC)[..13]), "no whole header");
}

#[test]
fn a_tag_may_name_certain_vlans_and_stands_alone() {
    let judge = AntiSpoofing { vlans: Some(vec![10, 20]), ..any() };
    let frame = v4(MAC, [1, 2, 3, 4], (5, 6));
    for (tags, passes) in [
        (&[][..], true),
        (&[10], true),
        (&[0xe000 | 20], true),
        (&[0xe000], true),
        (&[30], false),
        (&[10, 20], false),
        (&[0, 10], false),
    ] {
        assert_eq!(judge.passes(MAC, &tagged(&frame, tags)), passes, "{tags:?}");
    }
    let none = AntiSpoofing { vlans: Some(Vec::new()), ..any() };
    assert!(none.passes(MAC, &frame));
    assert!(!none.passes(MAC, &tagged(&frame, &[10])));
    assert!(any().passes(MAC, &tagged(&frame, &[10, 20])), "any tags, where VLANs are not restricted");
}

#[test]
fn ipv4_comes_from_the_functions_addresses() {
    let judge = only(&["10.0.0.5", "fd00::5"]);
    assert!(judge.passes(MAC, &v4(MAC, [10, 0, 0, 5], (1, 2))));
    assert!(judge.passes(MAC, &tagged(&v4(MAC, [10, 0, 0, 5], (1, 2)), &[7])));
    assert!(!judge.passes(MAC, &v4(MAC, [10, 0, 0, 6], (1, 2))));
    assert!(!judge.passes(MAC, &tagged(&v4(MAC, [10, 0, 0, 6], (1, 2)), &[7, 8])), "behind tags");
    assert!(judge.passes(MAC, &v4(MAC, [0; 4], (68, 67))), "it asks for an address");
    assert!(!judge.passes(MAC, &v4(MAC, [0; 4], (68, 68))));
    let mut fragment = v4(MAC, [0; 4], (68, 67));
    fragment[14 + 7] = 1;
    assert!(!judge.passes(MAC, &fragment), "what looks like ports is payload");
    assert!(!judge.passes(MAC, &v4(MAC, [10, 0, 0, 5], (1, 2))[..14 + 19]), "no whole header");
}

#[test]
fn arp_tells_of_the_functions_addresses() {
    let judge = only(&["10.0.0.5"]);
    assert!(judge.passes(MAC, &arp(MAC, [10, 0, 0, 5])));
    assert!(judge.passes(MAC, &arp(MAC, [0; 4])), "it asks whether an address is free");
    assert!(!judge.passes(MAC, &arp(MAC, [10, 0, 0, 6])));
    assert!(!judge.passes(MAC, &arp(OTHER, [10, 0, 0, 5])));
    let mut other_kind = arp(MAC, [10, 0, 0, 5]);
    other_kind[14] = 9;
    assert!(!judge.passes(MAC, &other_kind));
}

#[test]
fn ipv6_comes_from_and_tells_of_the_functions_addresses() {
    let judge = only(&["fd00::5"]);
    let own = "fe80::5054:ff:fe12:3456";
    let echo = Icmpv6Type::Unknown { type_u8: 128, code_u8: 0, bytes5to8: [0; 4] };
    for (source, passes) in [("fd00::5", true), (own, true), ("::", true), ("fd00::6", false), ("fe80::1", false)] {
        assert_eq!(judge.passes(MAC, &v6(source, echo, b"")), passes, "{source}");
    }
    let mut datagram = v6("::", echo, b"");
    datagram[14 + 6] = UDP;
    assert!(!judge.passes(MAC, &datagram), "no question");
    assert!(judge.passes(MAC, &advertisement(own, "fd00::5")));
    assert!(judge.passes(MAC, &advertisement("fd00::5", own)));
    assert!(!judge.passes(MAC, &advertisement(own, "fd00::1")), "another's address");
}

#[test]
fn extension_headers_hide_nothing() {
    let judge = only(&["fd00::5"]);
    for (target, passes) in [("fd00::5", true), ("fd00::1", false)] {
        let frame = advertisement("fd00::5", target);
        let mut with = frame.clone();
        with[14 + 6] = 60;
        with.splice(14 + 40..14 + 40, [0, 0, 1, 4, 0, 0, 0, 0]);
        // Destination options, then hop-by-hop options, then what it is.
        with.splice(14 + 48..14 + 48, [ICMPV6, 0, 1, 4, 0, 0, 0, 0]);
        assert_eq!(judge.passes(MAC, &with), passes, "{target}");
        let mut far = with.clone();
        far[14 + 49] = 200;
        assert!(!judge.passes(MAC, &far), "beyond what can be seen");
    }
}

#[test]
fn other_protocols_do_not_pass_where_addresses_are_restricted() {
    let frame = [&[0xff; 6][..], &MAC, &[0x88, 0xcc], &[0; 46]].concat();
    assert!(any().passes(MAC, &frame));
    assert!(!only(&["10.0.0.5"]).passes(MAC, &frame));
    assert!(!only(&[]).passes(MAC, &v4(MAC, [10, 0, 0, 5], (1, 2))));
}

#[test]
fn what_a_frame_is_judged_by_is_known() {
    let judge = only(&["10.0.0.5", "fd00::5"]);
    let udp = v4(MAC, [10, 0, 0, 5], (1, 2));
    assert_eq!(any().judge(MAC, &udp), Some(14));
    assert_eq!(any().judge(MAC, &tagged(&udp, &[1])), Some(18));
    assert_eq!(judge.judge(MAC, &udp), Some(14 + 20));
    assert_eq!(judge.judge(MAC, &v4(MAC, [0; 4], (68, 67))), Some(14 + 24), "its ports as well");
    assert_eq!(judge.judge(MAC, &arp(MAC, [10, 0, 0, 5])), Some(14 + 18));
    let echo = Icmpv6Type::Unknown { type_u8: 128, code_u8: 0, bytes5to8: [0; 4] };
    assert_eq!(judge.judge(MAC, &v6("fd00::5", echo, b"")), Some(14 + 40 + 1), "what kind of message it is");
    assert_eq!(
        judge.judge(MAC, &advertisement("fd00::5", "fd00::5")),
        Some(14 + 40 + 24),
        "and whose address it tells of"
    );
}
