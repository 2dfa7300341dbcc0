#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::AtomicBool;

use super::*;
use crate::backend::net::tunnel::outer::OuterAddress;

fn station(number: u32) -> [u8; 6] {
    let [a, b, c, d] = number.to_be_bytes();
    [2, 0, a, b, c, d]
}

fn end_point(number: u8) -> OuterAddress {
    IpAddr::from(Ipv4Addr::new(10, 9, 0, number)).into()
}

#[test]
fn a_station_is_where_it_was_heard_last() {
    let stations = Stations::default();
    assert_eq!(stations.find(station(1), 0, 0), None);
    stations.hear(station(1), 0, end_point(2), 0);
    stations.hear(station(2), 0, end_point(3), 0);
    assert_eq!(stations.find(station(1), 0, 1), Some(end_point(2)));
    assert_eq!(stations.find(station(2), 0, 1), Some(end_point(3)));
    // It moves, to the other version of IP.
    let six = OuterAddress::from(IpAddr::from(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7)));
    stations.hear(station(1), 0, six, 1);
    assert_eq!(stations.find(station(1), 0, 1), Some(six));
}

#[test]
fn in_another_vlan_it_is_another_station() {
    let stations = Stations::default();
    stations.hear(station(1), 10, end_point(2), 0);
    assert_eq!(stations.find(station(1), 0, 0), None);
    stations.hear(station(1), 20, end_point(3), 0);
    assert_eq!(stations.find(station(1), 10, 0), Some(end_point(2)));
    assert_eq!(stations.find(station(1), 20, 0), Some(end_point(3)));
    stations.forget(end_point(2));
    assert_eq!(stations.find(station(1), 10, 0), None);
    assert_eq!(stations.find(station(1), 20, 0), Some(end_point(3)));
}

#[test]
fn one_that_is_silent_is_forgotten() {
    let stations = Stations::default();
    stations.hear(station(1), 0, end_point(2), 100);
    assert!(stations.find(station(1), 0, 100 + FORGET_SECONDS).is_some());
    assert_eq!(stations.find(station(1), 0, 101 + FORGET_SECONDS), None);
    stations.hear(station(1), 0, end_point(2), 101 + FORGET_SECONDS);
    assert!(stations.find(station(1), 0, 101 + FORGET_SECONDS * 2).is_some());
    // A channel whose clock is a little behind.
    assert!(stations.find(station(1), 0, 50).is_some());
}

/// However many are invented, the table stays as it is; those that were heard last are known.
#[test]
fn there_is_room_for_so_many_and_no_more() {
    let stations = Stations::default();
    for number in 0..10 * STATIONS_MAX as u32 {
        stations.hear(station(number), 0, end_point(1), number);
        assert_eq!(stations.find(station(number), 0, number), Some(end_point(1)), "the newest one is known");
    }
    let now = 10 * STATIONS_MAX as u32;
    let known =
        (0..now).filter(|number| stations.find(station(*number), 0, *number + FORGET_SECONDS).is_some()).count();
    assert!(known <= STATIONS_MAX, "{known}");
    // The silent one goes, not the one that speaks.
    let stations = Stations::default();
    let talker = station(7);
    for number in 0..STATIONS_MAX as u32 * 2 {
        stations.hear(talker, 0, end_point(1), number);
        stations.hear(station(number + 100), 0, end_point(2), number);
    }
    assert_eq!(stations.find(talker, 0, STATIONS_MAX as u32 * 2), Some(end_point(1)));
}

/// Whoever reads while others write gets one of the addresses that were written, never half of each.
#[test]
fn an_address_is_never_torn() {
    let stations = Stations::default();
    let done = AtomicBool::new(false);
    let address = |number: u64| OuterAddress::from_bits(u128::from(number) << 64 | u128::from(!number));
    std::thread::scope(|scope| {
        for writer in 1..=2u64 {
            let (stations, done) = (&stations, &done);
            scope.spawn(move || {
                // All in one set or not: the same few stations, always somewhere else.
                for round in 0.. {
                    stations.hear(station(round % 3), 0, address(u64::from(round) * 2 + writer), round);
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
        let mut found = 0;
        while found < 100_000 {
            for number in 0..3 {
                if let Some(at) = stations.find(station(number), 0, 0) {
                    found += 1;
                    assert_eq!((at.bits() >> 64) as u64, !(at.bits() as u64));
                }
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}
