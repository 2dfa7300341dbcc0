//! Behind which end point a station is: a table that all channels of an uplink share, read for each frame that is sent and written
//! when a station is new, moves, or is heard again after a second.
//!
//! Nothing waits: an entry has a version that is odd while it is written (a sequence lock). A reader that meets a writer takes the
//! station as unknown, and a writer that meets another lets it pass; the station's next frame tells the same. The table has a fixed
//! size, in sets of four as a processor's cache: a new station takes the place of the one of its set that has been silent longest, so
//! whoever invents stations can make others unknown (their frames then go to all remotes), and nothing worse.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::outer::OuterAddress;

/// After so many seconds of silence a station is forgotten, as bridges do (IEEE 802.1Q, 8.8.3).
pub const FORGET_SECONDS: u32 = 300;
/// Entries of a set.
const WAYS: usize = 4;
/// A power of two.
const SETS: usize = 1024;
/// Stations that are known at most.
pub const STATIONS_MAX: usize = SETS * WAYS;
/// Tells a station's address from an empty entry's 0.
const USED: u64 = 1 << 48;

#[derive(Default)]
struct Entry {
    version: AtomicU32,
    /// When it was heard last, in seconds.
    heard: AtomicU32,
    station: AtomicU64,
    /// The end point's address.
    high: AtomicU64,
    low: AtomicU64,
}

impl Entry {
    /// The address, if the entry is this station's and nobody writes it.
    #[inline]
    fn read(&self, station: u64) -> Option<OuterAddress> {
        let version = self.version.load(Ordering::Acquire);
        if version & 1 != 0 || self.station.load(Ordering::Relaxed) != station {
            return None;
        }
        let (high, low) = (self.high.load(Ordering::Relaxed), self.low.load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        (self.version.load(Ordering::Relaxed) == version)
            .then(|| OuterAddress::from_bits(u128::from(high) << 64 | u128::from(low)))
    }

    fn write(&self, station: u64, at: OuterAddress, now_seconds: u32) {
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
        self.high.store((at.bits() >> 64) as u64, Ordering::Relaxed);
        self.low.store(at.bits() as u64, Ordering::Relaxed);
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
pub struct Stations {
    sets: Box<[[Entry; WAYS]]>,
}

impl std::fmt::Debug for Stations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stations").finish_non_exhaustive()
    }
}

impl Default for Stations {
    fn default() -> Self {
        Self { sets: (0..SETS).map(|_| Default::default()).collect() }
    }
}

#[inline]
fn number(station: [u8; 6]) -> u64 {
    let [a, b, c, d, e, f] = station;
    u64::from_be_bytes([0, 0, a, b, c, d, e, f]) | USED
}

impl Stations {
    #[inline]
    fn set(&self, station: u64) -> &[Entry; WAYS] {
        let hash = station.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - SETS.trailing_zeros());
        &self.sets[hash as usize]
    }

    /// Behind which end point a station is, if it has been heard within the last [`FORGET_SECONDS`].
    #[inline]
    #[must_use]
    pub fn find(&self, station: [u8; 6], now_seconds: u32) -> Option<OuterAddress> {
        let station = number(station);
        let heard = |entry: &&Entry| entry.silence(now_seconds) <= FORGET_SECONDS;
        self.set(station).iter().filter(heard).find_map(|entry| entry.read(station))
    }

    /// A station has been heard from behind this end point.
    #[inline]
    pub fn hear(&self, station: [u8; 6], at: OuterAddress, now_seconds: u32) {
        let station = number(station);
        let set = self.set(station);
        match set.iter().find(|entry| entry.station.load(Ordering::Relaxed) == station) {
            Some(entry) if entry.read(station) == Some(at) => {
                if entry.silence(now_seconds) > 0 {
                    entry.heard.store(now_seconds, Ordering::Relaxed);
                }
            }
            Some(entry) => entry.write(station, at, now_seconds),
            None => self.add(set, station, at, now_seconds),
        }
    }

    #[cold]
    fn add(&self, set: &[Entry; WAYS], station: u64, at: OuterAddress, now_seconds: u32) {
        let is_empty = |entry: &&Entry| entry.station.load(Ordering::Relaxed) == 0;
        let silent = || set.iter().max_by_key(|entry| entry.silence(now_seconds));
        if let Some(entry) = set.iter().find(is_empty).or_else(silent) {
            entry.write(station, at, now_seconds);
        }
    }
}

#[cfg(test)]
mod tests;
