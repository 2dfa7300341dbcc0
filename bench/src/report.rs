//! What came of it: rows with medians, spread and goals, as a table and as JSON.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::points::Values;

/// What a figure is counted in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unit {
    /// Requests (or copies) per second, shown in thousands.
    PerSecond,
    /// Nanoseconds.
    Nanoseconds,
    /// Microseconds.
    Microseconds,
    /// Milliseconds.
    Milliseconds,
    /// Bits per second, shown in millions.
    BitsPerSecond,
    /// Processor instructions of one packet.
    PerPacket,
    /// Processor instructions of one request.
    PerRequest,
    /// Bytes, shown in MiB.
    Bytes,
    /// A share of one core, 0 to 1.
    Core,
    /// Of one request.
    PerRead,
    /// How many.
    Count,
}

impl Unit {
    fn show(self, value: f64) -> String {
        match self {
            Self::PerSecond => format!("{:.0} k/s", value / 1e3),
            Self::Nanoseconds => format!("{value:.0} ns"),
            Self::Microseconds => format!("{value:.1} us"),
            Self::Milliseconds => format!("{value:.1} ms"),
            Self::BitsPerSecond => format!("{:.0} Mbit/s", value / 1e6),
            Self::PerPacket | Self::PerRequest => format!("{value:.0}"),
            Self::Bytes => format!("{:.2} MiB", value / f64::from(1 << 20)),
            Self::Core => format!("{:.2} %", value * 100.0),
            Self::PerRead => format!("{value:.2}"),
            Self::Count => format!("{value:.0}"),
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::PerSecond => "per-second",
            Self::Nanoseconds => "ns",
            Self::Microseconds => "us",
            Self::Milliseconds => "ms",
            Self::BitsPerSecond => "bits-per-second",
            Self::PerPacket => "instructions-per-packet",
            Self::PerRequest => "instructions-per-request",
            Self::Bytes => "bytes",
            Self::Core => "core",
            Self::PerRead => "per-read",
            Self::Count => "count",
        }
    }
}

/// What a row's ratio, or its figure if it stands alone, should reach.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Goal {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
}

impl Goal {
    /// Whether a median reaches it.
    pub(crate) fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }

    /// Where it lies.
    pub(crate) const fn bound(self) -> f64 {
        match self {
            Self::AtLeast(bound) | Self::AtMost(bound) => bound,
        }
    }
}

/// What Dray stands beside in a row.
#[derive(Clone, Debug)]
pub(crate) struct Beside {
    /// Its name.
    pub(crate) name: &'static str,
    /// Its figures.
    pub(crate) values: Values,
    /// Dray's over its own, pair by pair.
    pub(crate) ratios: Values,
    /// How the machine stood.
    pub(crate) round_trips: Values,
    /// Pairs that a flip spoiled.
    pub(crate) spoiled: usize,
}

/// One thing measured.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    /// What.
    pub(crate) name: String,
    /// Dray's figures.
    pub(crate) values: Values,
    /// Their unit.
    pub(crate) unit: Unit,
    /// What it stands beside.
    pub(crate) beside: Option<Beside>,
    /// What it should reach.
    pub(crate) goal: Option<Goal>,
}

impl Row {
    /// What the goal is held against.
    pub(crate) const fn judged(&self) -> &Values {
        match &self.beside {
            Some(beside) => &beside.ratios,
            None => &self.values,
        }
    }

    /// Whether the goal is met, if there is one.
    pub(crate) fn is_met(&self) -> Option<bool> {
        self.goal.map(|goal| goal.is_met(self.judged().median()))
    }

    fn cells(&self) -> [String; 7] {
        let (mut peer, mut theirs, mut ratio, mut state) = Default::default();
        if let Some(beside) = &self.beside {
            peer = beside.name.to_owned();
            theirs = self.unit.show(beside.values.median());
            let ratios = &beside.ratios;
            ratio = format!("{:.2} ({:.2}–{:.2})", ratios.median(), ratios.least(), ratios.most());
            let round_trip = beside.round_trips.median();
            // What one thread measures alone has none.
            state = if round_trip.is_nan() { String::new() } else { format!("{round_trip:.0} ns") };
            if beside.spoiled > 0 {
                let _ = write!(state, ", {} spoiled", beside.spoiled);
            }
        }
        let goal = self.goal.map_or_else(String::new, |goal| {
            let sign = if matches!(goal, Goal::AtLeast(_)) { "≥" } else { "≤" };
            let bound =
                if self.beside.is_some() { format!("{:.2}", goal.bound()) } else { self.unit.show(goal.bound()) };
            format!("{sign} {bound} {}", if self.is_met() == Some(true) { "met" } else { "MISSED" })
        });
        [self.name.clone(), self.unit.show(self.values.median()), peer, theirs, ratio, goal, state]
    }

    fn json(&self) -> Value {
        let values = |values: &Values| json!({ "median": values.median(), "least": values.least(), "most": values.most(), "all": values.0 });
        json!({
            "name": self.name,
            "unit": self.unit.name(),
            "dray": values(&self.values),
            "peer": self.beside.as_ref().map(|beside| json!({
                "name": beside.name,
                "values": values(&beside.values),
                "ratio": values(&beside.ratios),
                "round-trip-ns": values(&beside.round_trips),
                "spoiled": beside.spoiled,
            })),
            "goal": self.goal.map(|goal| match goal {
                Goal::AtLeast(bound) => json!({ "at-least": bound }),
                Goal::AtMost(bound) => json!({ "at-most": bound }),
            }),
            "met": self.is_met(),
        })
    }
}

/// All of a run.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    /// The processor, the length of the run, what else ran.
    pub(crate) about: String,
    /// What was measured.
    pub(crate) rows: Vec<Row>,
}

impl Report {
    /// Columns for people.
    pub(crate) fn table(&self) -> String {
        let head = ["", "Dray", "beside", "its own", "ratio (spread)", "goal", "round trip"].map(str::to_owned);
        let lines: Vec<[String; 7]> = std::iter::once(head).chain(self.rows.iter().map(Row::cells)).collect();
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; 7] = std::array::from_fn(width);
        let mut text = format!("{}\n\n", self.about);
        for line in &lines {
            let cells = line.iter().zip(widths).enumerate().map(|(column, (cell, width))| match column {
                // Figures to the right.
                1 | 3 => format!("{cell:>width$}"),
                _ => format!("{cell:<width$}"),
            });
            // Writing to a string does not fail.
            let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
        }
        let judged = self.rows.iter().filter_map(Row::is_met);
        let (met, all) = judged.fold((0, 0), |(met, all), is_met| (met + usize::from(is_met), all + 1));
        let _ = writeln!(text, "\n{met} of {all} goals met.");
        text
    }

    /// All figures for programs.
    pub(crate) fn json(&self) -> String {
        let rows: Vec<Value> = self.rows.iter().map(Row::json).collect();
        format!("{:#}\n", json!({ "about": self.about, "rows": rows }))
    }
}
