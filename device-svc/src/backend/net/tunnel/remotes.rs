//! To which end points a frame goes, and from which one is believed.
//!
//! The remotes that are named take what is for everybody (broadcast, multicast) and for stations that are not known, a copy each
//! (head-end replication). Where a station is, its own frames tell. A tunnel has no other guard than this list, and any machine of the
//! underlay can send a datagram: so while remotes are named, frames from elsewhere are dropped and teach nothing, unless the
//! configuration says [`Learning::Any`].

use super::outer::OuterAddress;
use crate::backend::net::stations::Stations;

/// Whose frames are taken, and what they teach.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Learning {
    /// Those of named remotes, or of anybody if none is named; they tell where stations are.
    #[default]
    Listed,
    /// Those of anybody; they tell where stations are.
    Any,
    /// Those of named remotes. Nothing is learned: every frame goes to all of them.
    Nothing,
}

/// The remotes of an uplink, shared by its channels.
#[derive(Debug)]
pub struct Remotes {
    /// Sorted.
    named: Box<[OuterAddress]>,
    takes_all: bool,
    /// `None` where there is nothing to learn.
    stations: Option<Stations<OuterAddress>>,
}

impl Remotes {
    /// These remotes; each is named once.
    #[must_use]
    pub fn new(named: impl IntoIterator<Item = OuterAddress>, learning: Learning) -> Self {
        let mut named: Vec<OuterAddress> = named.into_iter().collect();
        named.sort_unstable();
        named.dedup();
        let takes_all = learning == Learning::Any || named.is_empty() && learning == Learning::Listed;
        // Where there is only one way, stations need not be told apart.
        let learns = takes_all || learning == Learning::Listed && named.len() > 1;
        Self { named: named.into(), takes_all, stations: learns.then(Stations::default) }
    }

    /// Whether it matters when a station is heard.
    #[inline]
    #[must_use]
    pub const fn learns(&self) -> bool {
        self.stations.is_some()
    }

    /// Whether a frame that comes from `from` is taken.
    #[inline]
    #[must_use]
    pub fn takes(&self, from: OuterAddress) -> bool {
        self.takes_all || self.named.binary_search(&from).is_ok()
    }

    /// A frame with this source has come from an end point that is taken. A group is no source.
    #[inline]
    pub fn hear(&self, source: [u8; 6], from: OuterAddress, now_seconds: u32) {
        if let Some(stations) = &self.stations
            && source[0] & 1 == 0
        {
            stations.hear(source, 0, from, now_seconds);
        }
    }

    /// The end point that a station is behind. `None`: a frame for it goes to all that are [`named`](Self::named).
    #[inline]
    #[must_use]
    pub fn find(&self, destination: [u8; 6], now_seconds: u32) -> Option<OuterAddress> {
        self.stations.as_ref().filter(|_| destination[0] & 1 == 0)?.find(destination, 0, now_seconds)
    }

    /// The remotes that were named, sorted.
    #[inline]
    #[must_use]
    pub const fn named(&self) -> &[OuterAddress] {
        &self.named
    }
}

#[cfg(test)]
mod tests;
