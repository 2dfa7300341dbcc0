//! Moments on the monotonic clock. Only the edges read the clock; everything inside is handed a [`Moment`], so that a
//! test is a `for` loop.

use std::time::Duration;

/// Nanoseconds on the machine's monotonic clock.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Moment(pub u64);

impl Moment {
    /// The moment it is now, by `CLOCK_MONOTONIC`.
    #[inline]
    #[must_use]
    pub fn now() -> Self {
        match nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC) {
            Ok(time) => Self(time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64),
            Err(error) => unreachable!("CLOCK_MONOTONIC is always there: {error}"),
        }
    }

    /// This moment plus `duration`; the end of time (584 years of uptime) is never reached.
    #[inline]
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// How long ago `earlier` was, in nanoseconds; 0 if it is not earlier.
    #[inline]
    #[must_use]
    pub const fn ns_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// How long it is until this moment, seen from `now`; zero if it has passed.
    #[inline]
    #[must_use]
    pub fn until(self, now: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(now.0))
    }
}
