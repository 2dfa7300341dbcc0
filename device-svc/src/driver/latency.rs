//! How long requests took, counted in buckets: a value is known to 1.6 %, whatever its size, and recording it costs a few
//! instructions and no allocation.

/// Linear buckets in each power of two, as a power of two.
const STEPS_LOG2: u32 = 6;
const STEPS: u64 = 1 << STEPS_LOG2;
/// Values of 2^40 ns (18 minutes) and above share the last bucket.
const POWERS: u64 = 40 - STEPS_LOG2 as u64 + 1;

/// A distribution of latencies, ns.
#[derive(Clone, Debug)]
pub struct Latencies {
    buckets: Box<[u64]>,
    count: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { buckets: vec![0; (POWERS * STEPS) as usize].into_boxed_slice(), count: 0 }
    }
}

impl Latencies {
    /// Counts one.
    #[inline]
    pub fn record(&mut self, latency_ns: u64) {
        let bucket = Self::bucket_of(latency_ns).min(self.buckets.len() - 1);
        self.buckets[bucket] += 1;
        self.count += 1;
    }

    const fn bucket_of(latency_ns: u64) -> usize {
        if latency_ns < STEPS {
            return latency_ns as usize;
        }
        let power = latency_ns.ilog2() - STEPS_LOG2;
        ((power as u64 + 1) * STEPS + (latency_ns >> power) - STEPS) as usize
    }

    /// Counts all of another distribution too.
    pub fn add(&mut self, other: &Self) {
        for (sum, count) in self.buckets.iter_mut().zip(&other.buckets) {
            *sum += count;
        }
        self.count += other.count;
    }

    /// How many were counted.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// The value that `share` (0 to 1) of the requests did not exceed, ns; 0 if there were none.
    #[must_use]
    pub fn at_share(&self, share: f64) -> u64 {
        let wanted = ((self.count as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (bucket, count) in (0u64..).zip(&self.buckets) {
            seen += count;
            if seen >= wanted {
                let (power, step) = (bucket / STEPS, bucket % STEPS);
                // The middle of the bucket.
                return if power == 0 { step } else { ((STEPS + step) << (power - 1)) + (1 << (power - 1)) / 2 };
            }
        }
        0
    }
}

#[cfg(test)]
mod tests;
