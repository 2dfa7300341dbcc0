//! Frames from a network that were lost on their way to a function, by reason.

use std::ops::AddAssign;

use crate::metrics::{DropReason, Drops};

/// How many there were.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Missed {
    /// The function did not take frames in time, and what waits for it was full.
    pub no_buffers: u64,
    /// They were no frames: without a whole Ethernet header, behind a header that cannot be right, or with VLAN tags that the port
    /// cannot have.
    pub bad_header: u64,
    /// By a tunnel: of another network.
    pub not_for_us: u64,
    /// By a tunnel: from an end point that is not believed.
    pub spoofed: u64,
}

impl Missed {
    /// Not one.
    pub const NONE: Self = Self { no_buffers: 0, bad_header: 0, not_for_us: 0, spoofed: 0 };

    /// Counts them. Only the thread that owns the counters may call this.
    #[inline]
    pub fn add_to(self, drops: &Drops) {
        if self != Self::NONE {
            self.count(drops);
        }
    }

    #[cold]
    fn count(self, drops: &Drops) {
        drops.add(DropReason::NoBuffers, self.no_buffers);
        drops.add(DropReason::BadHeader, self.bad_header);
        drops.add(DropReason::NotForUs, self.not_for_us);
        drops.add(DropReason::Spoofed, self.spoofed);
    }
}

impl AddAssign for Missed {
    #[inline]
    fn add_assign(&mut self, other: Self) {
        self.no_buffers += other.no_buffers;
        self.bad_header += other.bad_header;
        self.not_for_us += other.not_for_us;
        self.spoofed += other.spoofed;
    }
}
