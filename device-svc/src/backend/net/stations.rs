//! Where stations are, behind an end point of a tunnel or a port of a switch: a table that all channels share, read for each frame that
//! is sent and written when a station is new, moves, or is heard again after a second.
//!
//! Nothing waits: an entry has a version that is odd while it is written (a sequence lock). A reader that meets a writer takes the
//! station as unknown, and a writer that meets another lets it pass; the station's next frame tells the same. The table has a fixed
//! size, in sets of four as a processor's cache: a new station takes the place of the one of its set that has been silent longest, so
//! whoever invents stations can make others unknown (their frames then go everywhere), and nothing worse.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::Octets;

/// After so many seconds of silence a station is forgotten, as bridges do (IEEE 802.1Q, 8.8.3).
pub const FORGET_SECONDS: u32 = 300;
/// Entries of a set.
const WAYS: usize = 4;
/// A power of two.
const SETS: usize = 1024;
/// Stations that are known at most.
pub const STATIONS_MAX: usize = SETS * WAYS;
/// Tells a station from an empty entry's 0.
const USED: u64 = 1 << 63;

/// Where a station can be, as a number.
pub trait Place: Copy + PartialEq {
    /// The number.
    fn bits(self) -> u128;

    /// The place with this number.
    fn from_bits(bits: u128) -> Self;
}

#[derive(Default)]
struct Entry {
    version: AtomicU32,
    /// When it was heard last, in seconds.
    heard: AtomicU32,
    station: AtomicU64,
    /// The place.
    high: AtomicU64,
    low: AtomicU64,
}

impl Entry {
    /// The place, if the entry is this station's and nobody writes it.
    #[inline]
    fn read(&self, station: u64) -> Option<u128> {
        let version = self.version.load(Ordering::Acquire);
        if version & 1 != 0 || self.station.load(Ordering::Relaxed) != station {
            return None;
        }
        let (high, low) = (self.high.load(Ordering::Relaxed), self.low.load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        (self.version.load(Ordering::Relaxed) == version).then(|| u128::from(high) << 64 | u128::from(low))
    }

    fn write(&self, station: u64, at: u128, now_seconds: u32) {
        let version = self.version.load(Ordering::Relaxed);
        let odd = version.wrapping_add(1);
        if version & 1 != 0
            || self.version.compare_exchange(version, odd, Ordering::Acquire, Ordering::Relaxed).is_err()
        {
            return;
        }
        // What is written becomes visible after the odd version, and before the even one.
        fence(Ordering::Release);
        self.station.store(station, Ordering::Relaxed);
        self.high.store((at >> 64) as u64, Ordering::Relaxed);
        self.low.store(at as u64, Ordering::Relaxed);
        self.heard.store(now_seconds, Ordering::Relaxed);
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }

    /// Seconds of silence. A clock that another channel read a moment later counts as now.
    #[inline]
    fn silence(&self, now_seconds: u32) -> u32 {
        now_seconds.saturating_sub(self.heard.load(Ordering::Relaxed))
    }
}

/// The table.
pub struct Stations<P> {
    sets: Box<[[Entry; WAYS]]>,
    places: PhantomData<P>,
}

impl<P> std::fmt::Debug for Stations<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stations").finish_non_exhaustive()
    }
}

impl<P> Default for Stations<P> {
    fn default() -> Self {
        Self { sets: (0..SETS).map(|_| Default::default()).collect(), places: PhantomData }
    }
}

/// A station in a VLAN, 0 to 4095: the same address in another is another station.
#[inline]
const fn number(station: Octets, vlan: u16) -> u64 {
    let [a, b, c, d, e, f] = station;
    u64::from_be_bytes([0, 0, a, b, c, d, e, f]) | (vlan as u64 & 0xfff) << 48 | USED
}

impl<P: Place> Stations<P> {
    #[inline]
    fn set(&self, station: u64) -> &[Entry; WAYS] {
        let hash = station.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - SETS.trailing_zeros());
        &self.sets[hash as usize]
    }

    /// Where a station is, if it has been heard within the last [`FORGET_SECONDS`].
    #[inline]
    #[must_use]
    pub fn find(&self, station: Octets, vlan: u16, now_seconds: u32) -> Option<P> {
        let station = number(station, vlan);
        let heard = |entry: &&Entry| entry.silence(now_seconds) <= FORGET_SECONDS;
        self.set(station).iter().filter(heard).find_map(|entry| entry.read(station)).map(P::from_bits)
    }

    /// A station has been heard from there.
    #[inline]
    pub fn hear(&self, station: Octets, vlan: u16, at: P, now_seconds: u32) {
        let (station, at) = (number(station, vlan), at.bits());
        let set = self.set(station);
        match set.iter().find(|entry| entry.station.load(Ordering::Relaxed) == station) {
            Some(entry) if entry.read(station) == Some(at) => {
                if entry.silence(now_seconds) > 0 {
                    entry.heard.store(now_seconds, Ordering::Relaxed);
                }
            }
            Some(entry) => entry.write(station, at, now_seconds),
            None => Self::add(set, station, at, now_seconds),
        }
    }

    #[cold]
    fn add(set: &[Entry; WAYS], station: u64, at: u128, now_seconds: u32) {
        let is_empty = |entry: &&Entry| entry.station.load(Ordering::Relaxed) == 0;
        let silent = || set.iter().max_by_key(|entry| entry.silence(now_seconds));
        if let Some(entry) = set.iter().find(is_empty).or_else(silent) {
            entry.write(station, at, now_seconds);
        }
    }

    /// Forgets all stations at a place. One that is heard there meanwhile may stay.
    pub fn forget(&self, place: P) {
        for entry in self.sets.iter().flatten() {
            let station = entry.station.load(Ordering::Relaxed);
            if station != 0 && entry.read(station) == Some(place.bits()) {
                entry.write(0, 0, 0);
            }
        }
    }
}

#[cfg(test)]
mod tests;
