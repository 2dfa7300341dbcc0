//! Where stations are: which port a frame last came from, by its source address and VLAN.
//!
//! All reactors read and write this table, and nobody waits for anybody: a station is two words, and one who reads while another writes
//! takes it for unknown, so its frame goes to all ports of the VLAN, as a switch does with a station that it has not heard. A place
//! that is reused between two looks can at worst send one frame to another port, whose VLAN decides whether it is let out there.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::backend::net::Octets;

/// Sets of places, by the address's hash.
const SETS: usize = 1024;
/// Places of a set.
const WAYS: usize = 4;
/// A station that was not heard for so long is unknown (IEEE 802.1Q, 8.8.3), seconds.
const AGE_S_MAX: u32 = 300;

/// The number of a port; 0 is the uplink's.
pub(super) type PortNumber = u16;

/// One station. A key of 0 is none: a station has an address.
#[derive(Debug, Default)]
struct Station {
    /// Address, then VLAN.
    key: AtomicU64,
    /// Port, then the second in which it was heard.
    place: AtomicU64,
}

/// The table.
#[derive(Debug)]
pub(super) struct Stations(Box<[[Station; WAYS]]>);

const fn key_of(address: Octets, vlan: u16) -> u64 {
    let [a, b, c, d, e, f] = address;
    u64::from_be_bytes([a, b, c, d, e, f, 0, 0]) | vlan as u64
}

const fn place_of(port: PortNumber, second: u32) -> u64 {
    (port as u64) << 32 | second as u64
}

impl Stations {
    pub(super) fn new() -> Self {
        Self((0..SETS).map(|_| std::array::from_fn(|_| Station::default())).collect())
    }

    #[inline]
    fn set(&self, key: u64) -> &[Station; WAYS] {
        let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        &self.0[(mixed >> 54) as usize % SETS]
    }

    /// A frame has come from this station by this port, in this second.
    #[inline]
    pub(super) fn learn(&self, address: Octets, vlan: u16, port: PortNumber, second: u32) {
        let key = key_of(address, vlan);
        let set = self.set(key);
        let place = place_of(port, second);
        match set.iter().find(|station| station.key.load(Ordering::Relaxed) == key) {
            // Written when it moves, and once a second: the line stays shared between reactors meanwhile.
            Some(station) if station.place.load(Ordering::Relaxed) == place => {}
            Some(station) => station.place.store(place, Ordering::Relaxed),
            None => Self::insert(set, key, place),
        }
    }

    #[cold]
    fn insert(set: &[Station; WAYS], key: u64, place: u64) {
        let rank = |station: &&Station| match station.key.load(Ordering::Relaxed) {
            0 => 0,
            _ => 1 + (station.place.load(Ordering::Relaxed) & 0xffff_ffff),
        };
        let Some(station) = set.iter().min_by_key(rank) else { return };
        station.key.store(0, Ordering::Relaxed);
        // Whoever sees the new place sees the key gone, or the new one.
        fence(Ordering::Release);
        station.place.store(place, Ordering::Relaxed);
        station.key.store(key, Ordering::Release);
    }

    /// The port of a station, if it was heard lately.
    #[inline]
    pub(super) fn port_of(&self, address: Octets, vlan: u16, second: u32) -> Option<PortNumber> {
        let key = key_of(address, vlan);
        let station = self.set(key).iter().find(|station| station.key.load(Ordering::Acquire) == key)?;
        let place = station.place.load(Ordering::Relaxed);
        // If the place was reused meanwhile, so the key shows.
        fence(Ordering::Acquire);
        let is_same = station.key.load(Ordering::Relaxed) == key;
        let is_young = second.wrapping_sub(place as u32) <= AGE_S_MAX;
        (is_same && is_young).then_some((place >> 32) as PortNumber)
    }

    /// Forgets all stations of a port.
    pub(super) fn forget(&self, port: PortNumber) {
        for station in self.0.iter().flatten() {
            if station.place.load(Ordering::Relaxed) >> 32 == u64::from(port) {
                station.key.store(0, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests;
