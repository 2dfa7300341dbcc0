//! Tunnels between addresses of a network namespace that the test makes. They need root: without it, or where there is no io_uring
//! (user-mode emulation), they say so and pass over.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bed;
mod sharing;

use std::collections::BTreeSet;

use etherparse::{NetHeaders, PacketHeaders, TransportHeader};

use self::bed::{Bed, address, came, channel, frame, received, sent, station, take, transmit, until};
use super::super::bed::Sleeper;
use super::super::{BURST, Missed, NetBackend, NetChannel};
use super::remotes::Learning;
use super::wire::{TUNNEL_HEADER_BYTES, TunnelKind};
use super::{TunnelBackend, TunnelSettings};
use crate::backend::BackendError;

const BROADCAST: [u8; 6] = [0xff; 6];
const KINDS: [TunnelKind; 2] = [TunnelKind::Vxlan, TunnelKind::Geneve];

#[test]
fn frames_travel_between_two_end_points_in_order_and_as_they_were() {
    let Some(bed) = Bed::new() else { return };
    for (kind, six) in KINDS.into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
        let tunnel = |local, remote| {
            let settings = TunnelSettings { kind, port: kind.port(), ..bed.settings(six, 42, local, &[remote]) };
            TunnelBackend::new(&settings).unwrap()
        };
        let (one, other) = (tunnel(1, 2), tunnel(2, 1));
        let (mut from, mut to) = (channel(&one), channel(&other));
        for (round, bytes) in [60, 1400, 61, 18].into_iter().enumerate() {
            let frames: Vec<_> =
                (0..BURST).map(|number| frame(station(2), station(1), round * BURST + number, bytes)).collect();
            assert_eq!(transmit(&mut *from, &frames), sent(BURST, 0), "{kind:?}, {six}");
            assert_eq!(take(&mut *to, BURST), frames);
            assert_eq!(transmit(&mut *to, &frames[..1]), sent(1, 0));
            assert_eq!(take(&mut *from, 1), frames[..1]);
        }
    }
}

/// As somebody else reads what is on the wire.
#[test]
fn datagrams_are_as_the_specifications_have_them() {
    let Some(bed) = Bed::new() else { return };
    let wire = bed.packets("lo");
    for (kind, six) in KINDS.into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
        let settings = TunnelSettings { kind, port: kind.port(), ..bed.settings(six, 0xabcdef, 1, &[2]) };
        let tunnel = TunnelBackend::new(&settings).unwrap();
        let mut channel = channel(&tunnel);
        let frames: Vec<_> = (0..BURST).map(|number| frame(station(2), station(number as u8), number, 501)).collect();
        assert_eq!(transmit(&mut *channel, &frames), sent(BURST, 0));
        // What comes of a datagram that nobody takes is none of ours.
        let is_udp = |packet: &Vec<u8>| {
            matches!(PacketHeaders::from_ethernet_slice(packet).unwrap().transport, Some(TransportHeader::Udp(_)))
        };
        let packets: Vec<_> = received(&wire).into_iter().filter(is_udp).collect();
        assert_eq!(packets.len(), BURST);
        let mut ports = BTreeSet::new();
        for (packet, frame) in packets.iter().zip(&frames) {
            let headers = PacketHeaders::from_ethernet_slice(packet).unwrap();
            let Some(TransportHeader::Udp(udp)) = headers.transport else { panic!("{headers:?}") };
            assert_eq!((udp.destination_port, usize::from(udp.length)), (kind.port(), 16 + frame.len()));
            assert!(udp.source_port >= 49152);
            ports.insert(udp.source_port);
            let payload = headers.payload.slice();
            match headers.net {
                Some(NetHeaders::Ipv4(ip, _)) => {
                    assert_eq!((ip.source, ip.destination), ([10, 9, 0, 1], [10, 9, 0, 2]));
                    assert!(ip.dont_fragment && ip.header_checksum == ip.calc_header_checksum());
                    assert_eq!(udp.checksum, 0);
                }
                Some(NetHeaders::Ipv6(ip, _)) => {
                    assert_eq!((ip.source_addr(), ip.destination_addr()), {
                        let (std::net::IpAddr::V6(from), std::net::IpAddr::V6(to)) =
                            (address(true, 1), address(true, 2))
                        else {
                            unreachable!()
                        };
                        (from, to)
                    });
                    assert_eq!(udp.checksum, udp.calc_checksum_ipv6(&ip, payload).unwrap());
                }
                other => panic!("{other:?}"),
            }
            let header: &[u8] = match kind {
                TunnelKind::Vxlan => &[8, 0, 0, 0, 0xab, 0xcd, 0xef, 0],
                TunnelKind::Geneve => &[0, 0, 0x65, 0x58, 0xab, 0xcd, 0xef, 0],
            };
            assert_eq!(&payload[..TUNNEL_HEADER_BYTES], header);
            assert_eq!(&payload[TUNNEL_HEADER_BYTES..], frame);
        }
        assert!(ports.len() > BURST / 2, "{ports:?}");
    }
}

/// Broadcast and what is for unknown stations goes to each remote, once; a burst of it in several calls.
#[test]
fn what_is_for_everybody_goes_to_every_remote() {
    let Some(bed) = Bed::new() else { return };
    let numbers: Vec<u8> = (2..=50).collect();
    let tunnel = bed.tunnel(7, 1, &numbers);
    let mut channel = channel(&tunnel);
    let remotes: Vec<_> = numbers.iter().map(|number| bed.stranger(*number)).collect();
    let frames: Vec<_> = [BROADCAST, [1, 0, 0x5e, 0, 0, 1], station(9)]
        .into_iter()
        .cycle()
        .take(BURST)
        .enumerate()
        .map(|(number, to)| frame(to, station(1), number, 60 + number))
        .collect();
    assert_eq!(transmit(&mut *channel, &frames), sent(BURST, 0));
    for remote in &remotes {
        let come: Vec<_> = received(remote).iter().map(|datagram| datagram[TUNNEL_HEADER_BYTES..].to_vec()).collect();
        assert_eq!(come, frames);
    }
}

/// A datagram of VXLAN around a frame.
fn datagram(vni: u32, frame: &[u8]) -> Vec<u8> {
    let [_, high, middle, low] = vni.to_be_bytes();
    [&[8, 0, 0, 0, high, middle, low, 0], frame].concat()
}

#[test]
fn a_station_that_was_heard_is_sent_to_alone() {
    let Some(bed) = Bed::new() else { return };
    let tunnel = bed.tunnel(7, 1, &[2, 3, 4]);
    let mut channel = channel(&tunnel);
    let remotes = [2, 3, 4].map(|number| bed.stranger(number));
    let own = (address(false, 1), 4789);
    let counts = |frames: &[Vec<u8>], channel: &mut dyn NetChannel| {
        assert_eq!(transmit(channel, frames), sent(frames.len(), 0));
        [0, 1, 2].map(|remote| received(&remotes[remote]).len())
    };
    let to_it = vec![frame(station(9), station(1), 0, 60)];
    assert_eq!(counts(&to_it, &mut *channel), [1, 1, 1], "nobody knows where it is");
    remotes[1].send_to(&datagram(7, &frame(station(1), station(9), 1, 60)), own).unwrap();
    assert_eq!(take(&mut *channel, 1).len(), 1);
    assert_eq!(counts(&to_it, &mut *channel), [0, 1, 0]);
    // It moves.
    remotes[2].send_to(&datagram(7, &frame(BROADCAST, station(9), 2, 60)), own).unwrap();
    assert_eq!(take(&mut *channel, 1).len(), 1);
    assert_eq!(counts(&to_it, &mut *channel), [0, 0, 1]);
    assert_eq!(counts(&[frame(BROADCAST, station(1), 0, 60)], &mut *channel), [1, 1, 1]);
}

/// Whoever is not named is not heard, unless nobody is named or it was said.
#[test]
fn strangers_are_believed_only_where_it_was_said() {
    let Some(bed) = Bed::new() else { return };
    let stranger = bed.stranger(9);
    let own = (address(false, 1), 4789);
    for (remotes, learning, believed) in [
        (&[2, 3][..], Learning::Listed, false),
        (&[2, 3], Learning::Nothing, false),
        (&[2, 3], Learning::Any, true),
        (&[], Learning::Listed, true),
    ] {
        let settings = TunnelSettings { learning, ..bed.settings(false, 7, 1, remotes) };
        let tunnel = TunnelBackend::new(&settings).unwrap();
        let mut channel = channel(&tunnel);
        let from_stranger = frame(station(1), station(9), 1, 60);
        stranger.send_to(&datagram(7, &from_stranger), own).unwrap();
        // Datagrams to one socket come in order: when the second is there, the first has been.
        let friend = remotes.first().map(|number| bed.stranger(*number));
        let second = frame(station(1), station(8), 2, 60);
        friend.as_ref().unwrap_or(&stranger).send_to(&datagram(7, &second), own).unwrap();
        let come = take(&mut *channel, 1 + usize::from(believed));
        assert_eq!(come.contains(&from_stranger), believed, "{remotes:?}, {learning:?}");
        assert_eq!(come.last(), Some(&second));
        assert_eq!(channel.missed(), Missed { spoofed: u64::from(!believed), ..Missed::NONE });
        drop(friend);
        let answer = transmit(&mut *channel, &[frame(station(9), station(1), 3, 60)]);
        assert_eq!((answer, received(&stranger).len()), (sent(1, 0), usize::from(believed)), "{remotes:?}");
    }
}

#[test]
fn what_nobody_can_send_is_lost_and_counted() {
    let Some(bed) = Bed::new() else { return };
    let tunnel = bed.tunnel(7, 1, &[2]);
    assert_eq!(tunnel.info().mtu_max, 1450);
    let mut channel = channel(&tunnel);
    let remote = bed.stranger(2);
    let fits = frame(station(2), station(1), 1, 1464);
    let frames = [fits.clone(), frame(station(2), station(1), 2, 1465), vec![0; 70_000], vec![0; 13], vec![], fits];
    assert_eq!(transmit(&mut *channel, &frames), sent(6, 4));
    assert_eq!(received(&remote).len(), 2, "those behind it go all the same");
    // No route.
    let far = TunnelSettings { remotes: vec![[192, 0, 2, 1].into()], ..bed.settings(false, 8, 1, &[]) };
    let mut far = self::channel(&TunnelBackend::new(&far).unwrap());
    assert_eq!(transmit(&mut *far, &frames[..1]), sent(1, 1));
    // Nobody was heard, and nobody is named.
    let mut alone = self::channel(&bed.tunnel(9, 1, &[]));
    assert_eq!(transmit(&mut *alone, &frames[..1]), sent(1, 1));
    // Nobody listens: that is not ours to know.
    drop(remote);
    for _ in 0..5 {
        assert_eq!(transmit(&mut *channel, &frames[..1]), sent(1, 0));
    }
    channel.enable(false);
    assert_eq!(transmit(&mut *channel, &frames[..1]), sent(1, 1));
}

#[test]
fn the_underlay_says_how_long_a_packet_may_be() {
    let Some(bed) = Bed::new() else { return };
    let mtu = |settings: &TunnelSettings| TunnelBackend::new(settings).unwrap().info().mtu_max;
    assert_eq!(mtu(&bed.settings(false, 1, 1, &[2])), 1450);
    assert_eq!(mtu(&bed.settings(true, 1, 1, &[2])), 1430);
    assert_eq!(mtu(&bed.settings(false, 1, 1, &[])), 1450, "without remotes the interface says it");
    let far = TunnelSettings { remotes: vec![[192, 0, 2, 1].into()], ..bed.settings(false, 1, 1, &[]) };
    assert_eq!(mtu(&far), 1450, "so it does without a route");
    assert_eq!(mtu(&TunnelSettings { mtu: Some(9000), ..bed.settings(false, 1, 1, &[2]) }), 9000);
    bed.ip("route add 192.0.2.1 dev under0 mtu 1280");
    assert_eq!(mtu(&far), 1230);
    bed.ip("link set lo mtu 65536");
    assert_eq!(mtu(&bed.settings(false, 1, 1, &[2])), u16::MAX - 50);
}

/// Bytes of any kind come to the port.
#[test]
fn what_is_no_frame_of_ours_is_dropped() {
    let Some(bed) = Bed::new() else { return };
    let tunnel = bed.tunnel(7, 1, &[2]);
    let mut channel = channel(&tunnel);
    let remote = bed.stranger(2);
    let own = (address(false, 1), 4789);
    let good = datagram(7, &frame(station(1), station(9), 1, 60));
    let mut no_network = good.clone();
    no_network[0] = 0;
    let bad = [vec![], vec![8], vec![0xff; 7], vec![8; 8], datagram(7, &[0; 13]), datagram(8, &good[8..]), no_network];
    for datagram in bad {
        remote.send_to(&datagram, own).unwrap();
    }
    bed.ip("link set lo mtu 65536");
    let longest = datagram(7, &frame(station(1), station(9), 2, 65507 - 8));
    for datagram in [&good, &longest, &good] {
        remote.send_to(datagram, own).unwrap();
    }
    let come = take(&mut *channel, 3);
    assert_eq!(come, [&good[8..], &longest[8..], &good[8..]]);
    // Those that name this network; the others are nobody's, and the kernel does not bring them here.
    assert_eq!(channel.missed(), Missed { bad_header: 2, ..Missed::NONE });
    assert_eq!(channel.missed(), Missed::NONE);
}

/// Of a frame that goes to several, each copy that is lost counts; the frame itself went.
#[test]
fn copies_that_are_lost_are_counted() {
    let Some(bed) = Bed::new() else { return };
    let settings = bed.settings(false, 7, 1, &[2, 3]);
    let far = [192, 0, 2, 1].into();
    let settings = TunnelSettings { remotes: [settings.remotes.clone(), vec![far]].concat(), ..settings };
    let mut channel = channel(&TunnelBackend::new(&settings).unwrap());
    let remotes = [2, 3].map(|number| bed.stranger(number));
    let to_all = vec![frame(BROADCAST, station(1), 1, 60); 5];
    assert_eq!(transmit(&mut *channel, &to_all), sent(5, 0));
    assert_eq!(remotes.map(|remote| received(&remote).len()), [5, 5]);
    assert_eq!((channel.lost_later(), channel.lost_later()), (5, 0));
}

#[test]
fn what_the_kernel_has_no_room_for_is_counted() {
    let Some(bed) = Bed::new() else { return };
    let tunnel = bed.tunnel(7, 1, &[2]);
    let mut channel = channel(&tunnel);
    let remote = bed.stranger(2);
    let own = (address(false, 1), 4789);
    let total = 20_000;
    let one = datagram(7, &frame(station(1), station(9), 1, 1000));
    for _ in 0..total {
        remote.send_to(&one, own).unwrap();
    }
    let (mut come, mut missed) = (0, Missed::NONE);
    until(|| {
        come += came(&mut *channel).len();
        missed += channel.missed();
        come + missed.no_buffers as usize >= total
    });
    assert!(come > BURST && missed.no_buffers > 0, "{come} and {missed:?}");
    assert_eq!(come + missed.no_buffers as usize, total);
    // What came before a driver is not its loss.
    channel.enable(false);
    channel.enable(true);
    assert_eq!(channel.missed(), Missed::NONE);
}

#[test]
fn a_frame_wakes_whoever_sleeps() {
    let Some(bed) = Bed::new() else { return };
    let tunnel = bed.tunnel(7, 1, &[2]);
    let mut channel = channel(&tunnel);
    let remote = bed.stranger(2);
    let sleeper = Sleeper::new(&*channel);
    for round in 0..20 {
        until(|| came(&mut *channel).is_empty() && channel.arm());
        while sleeper.is_woken(0) {}
        let frames: Vec<_> =
            (0..=round % 3).map(|number| frame(station(1), station(9), round * 3 + number, 60)).collect();
        for frame in &frames {
            remote.send_to(&datagram(7, frame), (address(false, 1), 4789)).unwrap();
        }
        assert!(sleeper.is_woken(30_000), "round {round}");
        channel.woken();
        assert!(!channel.arm(), "there is a frame");
        assert_eq!(take(&mut *channel, frames.len()), frames);
    }
}

/// When the kernel has no room, what did not go is given again when there is some, and nothing is lost or comes twice.
#[test]
fn a_full_wire_is_waited_for() {
    let Some(bed) = Bed::new() else { return };
    let mut channel = channel(&bed.tunnel(7, 1, &[2, 3]));
    let remotes = [2, 3].map(|number| bed.stranger(number));
    if !bed.tc("qdisc add dev lo root tbf rate 20mbit burst 20kb limit 100mb") {
        eprintln!("skipped: no tc with tbf here");
        return;
    }
    let sleeper = Sleeper::new(&*channel);
    let total = 3000;
    let (mut next, mut refused) = (0, 0);
    while next < total {
        let count = BURST.min(total - next);
        let frames: Vec<_> = (next..next + count).map(|number| frame(BROADCAST, station(1), number, 1400)).collect();
        let sent = transmit(&mut *channel, &frames);
        assert_eq!(sent.lost, 0, "nobody else takes room");
        next += sent.taken;
        if sent.taken < count {
            refused += 1;
            assert!(sleeper.is_woken(30_000), "nobody told of room");
            channel.woken();
        }
    }
    assert!(refused > 0, "the wire was never full");
    for remote in &remotes {
        let mut numbers = Vec::new();
        // The wire is slow. Where the last copy to one remote found no room, the frame was not given again.
        until(|| {
            numbers.extend(
                received(remote)
                    .iter()
                    .map(|datagram| u32::from_le_bytes(datagram[TUNNEL_HEADER_BYTES + 14..][..4].try_into().unwrap())),
            );
            numbers.last() == Some(&(total as u32 - 1)) && numbers.len() + refused >= total
        });
        assert!(numbers.is_sorted_by(|one, next| one < next), "once and in order");
    }
}

#[test]
fn the_carrier_follows_the_address() {
    let Some(bed) = Bed::new() else { return };
    let tunnel = bed.tunnel(7, 1, &[2]);
    let mut channel = channel(&tunnel);
    let remote = bed.stranger(2);
    // The interface's own comes a moment after it was set up.
    until(|| tunnel.carrier().is_up());
    let own = (address(false, 1), 4789);
    let works = |channel: &mut dyn NetChannel| {
        let out = frame(station(9), station(1), 0, 60);
        assert_eq!(transmit(channel, std::slice::from_ref(&out)), sent(1, 0));
        assert_eq!(received(&remote).len(), 1);
        remote.send_to(&datagram(7, &out), own).unwrap();
        assert_eq!(take(channel, 1), [out]);
    };
    works(&mut *channel);
    for (away, back) in [
        ("address delete 10.9.0.1/24 dev under0", "address add 10.9.0.1/24 dev under0"),
        ("link set under0 down", "link set under0 up"),
    ] {
        bed.ip(away);
        until(|| !tunnel.carrier().is_up());
        // Deleting the first address of a network may take its others with it.
        bed.ip(back);
        let _ = std::process::Command::new("ip")
            .args(["-n", &bed.name, "address", "replace", "10.9.0.2/24", "dev", "under0"])
            .output();
        until(|| tunnel.carrier().is_up());
        works(&mut *channel);
    }
    bed.ip("address delete 10.9.0.1/24 dev under0");
    until(|| !tunnel.carrier().is_up());
    assert_eq!(transmit(&mut *channel, &[frame(station(9), station(1), 0, 60)]), sent(1, 1));
}

#[test]
fn what_cannot_be_opened_is_named() {
    let Some(bed) = Bed::new() else { return };
    let refused = |settings: &TunnelSettings| match TunnelBackend::new(settings) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("{settings:?} is taken"),
    };
    let namespace = format!(" in the network namespace {}", bed.name);
    let away = TunnelSettings { local: [192, 0, 2, 7].into(), ..bed.settings(false, 1, 1, &[]) };
    assert_eq!(
        refused(&away),
        format!(
            "port 4789 of 192.0.2.7{namespace}: no interface has the address 192.0.2.7, or it is not ready yet: add it (`ip address \
             add`), or correct `local`"
        )
    );
    let _other = bed.stranger(5);
    assert_eq!(
        refused(&bed.settings(false, 1, 5, &[])),
        format!(
            "port 4789 of 10.9.0.5{namespace} is in use by another program, or by a tunnel of the kernel: end that, or choose \
             another `port`"
        )
    );
    let _first = bed.tunnel(1, 1, &[2]);
    assert_eq!(
        refused(&bed.settings(false, 1, 1, &[3])),
        format!("port 4789 of 10.9.0.1{namespace} has an uplink for VNI 1 already: choose another `vni`")
    );
    let geneve = TunnelSettings { kind: TunnelKind::Geneve, ..bed.settings(false, 2, 1, &[]) };
    assert_eq!(
        refused(&geneve),
        format!(
            "port 4789 of 10.9.0.1{namespace} has a vxlan uplink already, and datagrams do not say of which type they are: choose \
             another `port`"
        )
    );
    assert!(matches!(TunnelBackend::new(&geneve), Err(BackendError::Refused(_))));
    let nowhere = TunnelSettings { netns: Some("dray-no-such".to_owned()), ..bed.settings(false, 1, 1, &[]) };
    assert!(refused(&nowhere).contains("there is no network namespace dray-no-such"));
}
