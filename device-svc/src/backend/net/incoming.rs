//! A frame that has come: a borrowed range whose lifetime is a protocol, not a scope.
//!
//! A channel keeps the bytes where they arrived and describes a burst of them in a list that it keeps as well; a list of slices into
//! itself is what Rust has no type for.
#![expect(
    unsafe_code,
    reason = "a frame's bytes belong to the channel that hands it over; the protocol is stated here"
)]

use super::NetHeader;

/// One frame that a channel hands over, valid from `receive` until `release`.
#[derive(Clone, Copy, Debug)]
pub struct Incoming {
    /// What was left undone.
    pub header: NetHeader,
    start: *const u8,
    length: u32,
}

// SAFETY: the bytes belong to the channel that has the description, and both move between threads together.
unsafe impl Send for Incoming {}

impl Incoming {
    /// Describes `length` bytes at `start`.
    ///
    /// # Safety
    /// The bytes must be initialised, and neither move nor change until the channel that hands this over is told that the frame is
    /// done with.
    #[inline]
    #[must_use]
    pub const unsafe fn new(header: NetHeader, start: *const u8, length: u32) -> Self {
        Self { header, start, length }
    }

    /// Its bytes, from the Ethernet header on.
    #[inline]
    #[must_use]
    pub const fn bytes(&self) -> &[u8] {
        // SAFETY: `new` promised that they are there and do not change while the frame is handed over. A copy of the description that
        // is looked at later would break the protocol; the lanes of this crate keep none.
        unsafe { std::slice::from_raw_parts(self.start, self.length as usize) }
    }

    /// How many bytes it has.
    #[inline]
    #[must_use]
    pub const fn length(&self) -> u32 {
        self.length
    }
}
