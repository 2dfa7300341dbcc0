//! A point: two sides measured in turn, several times, between looks at how far the two CPUs stand apart.
//!
//! A pair counts only when the machine stood the same way before, between and after its two halves. What a flip spoiled is
//! measured again, a bounded number of times.

use anyhow::Result;

use crate::machine::{Cpus, round_trip_ns};

/// A round trip that differs by more than this factor is another state of the machine.
const FLIP: f64 = 1.6;

/// Several values of one thing.
#[derive(Clone, Debug)]
pub(crate) struct Values(pub(crate) Vec<f64>);

impl Values {
    /// The middle one.
    pub(crate) fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted.len() {
            0 => f64::NAN,
            count if count % 2 == 1 => sorted[count / 2],
            count => f64::midpoint(sorted[count / 2 - 1], sorted[count / 2]),
        }
    }

    /// The smallest.
    pub(crate) fn least(&self) -> f64 {
        self.0.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// The largest.
    pub(crate) fn most(&self) -> f64 {
        self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }
}

/// Both sides, measured in one state of the machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pair<T> {
    pub(crate) ours: T,
    pub(crate) theirs: T,
    pub(crate) round_trip_ns: f64,
}

/// All pairs of a point.
#[derive(Clone, Debug)]
pub(crate) struct Pairs<T> {
    pub(crate) pairs: Vec<Pair<T>>,
    /// How many a flip spoiled.
    pub(crate) spoiled: usize,
}

impl<T> Pairs<T> {
    /// One figure of our side.
    pub(crate) fn ours(&self, figure: impl Fn(&T) -> f64) -> Values {
        Values(self.pairs.iter().map(|pair| figure(&pair.ours)).collect())
    }

    /// The same of theirs.
    pub(crate) fn theirs(&self, figure: impl Fn(&T) -> f64) -> Values {
        Values(self.pairs.iter().map(|pair| figure(&pair.theirs)).collect())
    }

    /// Ours over theirs, pair by pair.
    pub(crate) fn ratios(&self, figure: impl Fn(&T) -> f64) -> Values {
        Values(self.pairs.iter().map(|pair| figure(&pair.ours) / figure(&pair.theirs)).collect())
    }

    /// How the machine stood.
    pub(crate) fn round_trips(&self) -> Values {
        Values(self.pairs.iter().map(|pair| pair.round_trip_ns).collect())
    }
}

/// Measures both sides in turn until `wanted` pairs are good; after twice as many tries, what is good must do.
pub(crate) fn alternate<T>(
    cpus: Cpus,
    wanted: usize,
    mut ours: impl FnMut() -> Result<T>,
    mut theirs: impl FnMut() -> Result<T>,
) -> Result<Pairs<T>> {
    let mut pairs = Vec::new();
    let mut spoiled = 0;
    let mut before = round_trip_ns(cpus);
    let mut last = None;
    while pairs.len() < wanted && pairs.len() + spoiled < 2 * wanted + 1 {
        // Who goes first changes, so that a drift favours nobody.
        let (first, between, second);
        if (pairs.len() + spoiled).is_multiple_of(2) {
            first = ours()?;
            between = round_trip_ns(cpus);
            second = theirs()?;
        } else {
            let they = theirs()?;
            between = round_trip_ns(cpus);
            first = ours()?;
            second = they;
        }
        let after = round_trip_ns(cpus);
        let trips = Values(vec![before, between, after]);
        before = after;
        let pair = Pair { ours: first, theirs: second, round_trip_ns: trips.median() };
        if trips.most() > FLIP * trips.least() {
            spoiled += 1;
            last = Some(pair);
        } else {
            pairs.push(pair);
        }
    }
    if pairs.is_empty() {
        // The machine never stood still: say something, and that it was spoiled.
        pairs.extend(last);
    }
    Ok(Pairs { pairs, spoiled })
}
