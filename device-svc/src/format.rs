//! The format of what outlives the service: the state folder, and what a keeper keeps of functions.
//!
//! It goes up when something written changes its meaning. Each version reads its own, the one before and the one after, so that an update
//! can be taken back.

use std::ops::RangeInclusive;

/// The format that this version writes. A build with `state-next` writes the next one, with which tests go to and fro.
pub const FORMAT: u32 = if cfg!(feature = "state-next") { 2 } else { 1 };

/// The formats that it reads; the first there ever was is 1.
pub const READ: RangeInclusive<u32> = (if FORMAT > 1 { FORMAT - 1 } else { 1 })..=FORMAT + 1;
