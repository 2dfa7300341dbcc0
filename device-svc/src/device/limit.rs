//! Limits: requests and bytes per second, in all and for reads and writes apart, with a burst. A function has one; the
//! functions of a group share one more.
//!
//! Each rate is a "theoretical arrival time": the moment at which what was let through so far would be over if it had come
//! at exactly the rate. A request may pass while that moment is less than the burst ahead of now, and moves it on by what it
//! costs. One atomic per rate, so reactors share a limit without a lock; two that pass at the same instant overshoot by one
//! request, which the next then pays for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::Moment;

/// One rate.
#[derive(Debug, Default)]
struct Rate {
    /// Units per second; 0: not limited.
    per_second: AtomicU64,
    /// How far ahead of now the arrival time may run, nanoseconds.
    burst_ns: AtomicU64,
    arrival_ns: AtomicU64,
}

impl Rate {
    fn set(&self, per_second: u64, burst: Duration) {
        self.per_second.store(per_second, Ordering::Relaxed);
        self.burst_ns.store(u64::try_from(burst.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// When a request may pass: now, or the moment returned.
    fn ready(&self, now: Moment) -> Result<(), Moment> {
        if self.per_second.load(Ordering::Relaxed) == 0 {
            return Ok(());
        }
        let passes = self.arrival_ns.load(Ordering::Relaxed).saturating_sub(self.burst_ns.load(Ordering::Relaxed));
        if passes <= now.0 { Ok(()) } else { Err(Moment(passes)) }
    }

    fn pay(&self, now: Moment, units: u64) {
        let per_second = self.per_second.load(Ordering::Relaxed);
        if per_second == 0 {
            return;
        }
        let cost_ns = u64::try_from(u128::from(units) * 1_000_000_000 / u128::from(per_second)).unwrap_or(u64::MAX);
        // A rate that stood idle gives no credit beyond the burst: its arrival time starts at now.
        let _ = self.arrival_ns.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |arrival| {
            Some(arrival.max(now.0).saturating_add(cost_ns))
        });
    }
}

/// The rates of a limit, units per second; 0 means not limited.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rates {
    /// Requests, reads and writes together.
    pub iops: u64,
    /// Bytes, reads and writes together.
    pub bandwidth: u64,
    /// Read requests.
    pub read_iops: u64,
    /// Read bytes.
    pub read_bandwidth: u64,
    /// Write requests: writes, discards and write zeroes.
    pub write_iops: u64,
    /// Written bytes.
    pub write_bandwidth: u64,
    /// How much may pass at once after a pause: what the rate lets through in this time.
    pub burst: Duration,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            iops: 0,
            bandwidth: 0,
            read_iops: 0,
            read_bandwidth: 0,
            write_iops: 0,
            write_bandwidth: 0,
            burst: Duration::from_millis(100),
        }
    }
}

/// Which way a request counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// A read.
    Read,
    /// A write, discard or write zeroes.
    Write,
}

/// A limit, shared by the lanes of a function or of a group of functions.
#[derive(Debug, Default)]
pub struct Limit {
    /// In the order: all, reads, writes; requests and bytes of each.
    rates: [[Rate; 2]; 3],
    limited: AtomicU64,
}

impl Limit {
    /// A limit with these rates.
    #[must_use]
    pub fn new(rates: &Rates) -> Self {
        let limit = Self::default();
        limit.set(rates);
        limit
    }

    /// Changes the rates, while running.
    pub fn set(&self, rates: &Rates) {
        let values = [
            [rates.iops, rates.bandwidth],
            [rates.read_iops, rates.read_bandwidth],
            [rates.write_iops, rates.write_bandwidth],
        ];
        for (pair, values) in self.rates.iter().zip(values) {
            for (rate, value) in pair.iter().zip(values) {
                rate.set(value, rates.burst);
            }
        }
        let limited = values.iter().flatten().any(|value| *value != 0);
        self.limited.store(u64::from(limited), Ordering::Relaxed);
    }

    /// Whether anything is limited at all.
    #[inline]
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.limited.load(Ordering::Relaxed) != 0
    }

    fn concerned(&self, way: Way) -> [&[Rate; 2]; 2] {
        [&self.rates[0], &self.rates[if way == Way::Read { 1 } else { 2 }]]
    }

    /// Whether a request may pass now, or when to ask again.
    ///
    /// # Errors
    /// The moment at which to ask again.
    pub fn ready(&self, now: Moment, way: Way) -> Result<(), Moment> {
        let mut at = now;
        for rate in self.concerned(way).into_iter().flatten() {
            if let Err(later) = rate.ready(now) {
                at = at.max(later);
            }
        }
        if at == now { Ok(()) } else { Err(at) }
    }

    /// A request of `bytes` passes.
    pub fn pay(&self, now: Moment, way: Way, bytes: u64) {
        for pair in self.concerned(way) {
            pair[0].pay(now, 1);
            pair[1].pay(now, bytes);
        }
    }
}

#[cfg(test)]
mod tests;
