//! Frames of a burst, counted apart from what other threads read.

use super::filter::{self, Octets};
use crate::backend::net::{Checksum, NetHeader};
use crate::metrics::NetCounters;

/// Frames of a burst that are carried, counted apart from what other threads read.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Tally {
    pub(super) packets: u64,
    pub(super) bytes: u64,
    pub(super) broadcasts: u64,
    pub(super) multicasts: u64,
    pub(super) undone_checksums: u64,
    pub(super) undone_segmentations: u64,
}

impl Tally {
    /// Counts a frame that is carried.
    #[inline]
    pub(super) fn frame(&mut self, header: &NetHeader, destination: Octets, bytes: u32) {
        self.packets += 1;
        self.bytes += u64::from(bytes);
        if filter::is_group(destination) {
            let is_broadcast = destination == filter::BROADCAST;
            self.broadcasts += u64::from(is_broadcast);
            self.multicasts += u64::from(!is_broadcast);
        }
        if *header != NetHeader::DONE {
            self.undone_checksums += u64::from(matches!(header.checksum, Checksum::Needed { .. }));
            self.undone_segmentations += u64::from(header.segmentation.is_some());
        }
    }

    /// The burst is over.
    #[inline]
    pub(super) fn add_to(self, counters: &NetCounters) {
        counters.packets.add(self.packets);
        counters.bytes.add(self.bytes);
        counters.broadcasts.add(self.broadcasts);
        counters.multicasts.add(self.multicasts);
        counters.undone_checksums.add(self.undone_checksums);
        counters.undone_segmentations.add(self.undone_segmentations);
    }
}
