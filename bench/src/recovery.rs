//! `bench recovery`: what it takes to lose nothing when the card's service dies.
//!
//! ```text
//!   kill     from SIGKILL to the first request that completes
//!   record   instructions of each request, with the record of what is in flight and without
//! ```

mod kill;
mod record;

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::RecoveryArguments;
use crate::machine::{Cpus, load_average, processor};
use crate::report::{Report, Row};

/// What can be measured by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Part {
    /// The time from SIGKILL to the first request that completes
    Kill,
    /// Instructions of each request, with the record and without; wants valgrind
    Record,
}

/// How long and how often.
#[derive(Clone, Copy, Debug)]
struct Pace {
    kills: usize,
    /// Windows in which instructions are counted, and how long each is.
    windows: usize,
    window: Duration,
}

/// All that the parts need.
struct Run {
    cpus: Cpus,
    pace: Pace,
    folder: tempfile::TempDir,
    rows: Vec<Row>,
    start: Instant,
}

/// How a part is measured.
type Measure = fn(&mut Run) -> Result<()>;

impl Run {
    fn say(&self, what: &str) {
        eprintln!("bench: {:4.0} s  {what}", self.start.elapsed().as_secs_f64());
    }
}

/// Measures the parts asked for.
pub(crate) fn measure(arguments: &RecoveryArguments) -> Result<Report> {
    let cpus = Cpus::find()?;
    let pace = if arguments.quick {
        Pace { kills: 10, windows: 3, window: Duration::from_millis(700) }
    } else {
        Pace { kills: 50, windows: 7, window: Duration::from_secs(2) }
    };
    let folder = tempfile::Builder::new().prefix("dray-bench").tempdir()?;
    let mut run = Run { cpus, pace, folder, rows: Vec::new(), start: Instant::now() };
    let parts: [(Part, Measure); 2] = [(Part::Kill, kill::measure), (Part::Record, record::measure)];
    let before = load_average();
    for (part, measure) in parts {
        if arguments.only.is_empty() || arguments.only.contains(&part) {
            cpus.on_load(|| measure(&mut run)).with_context(|| format!("{part:?}"))?;
        }
    }
    let about = format!(
        "{}, CPU {} serves, CPU {} loads; {} kills, {} windows of {} ms; {:.0} s; load average {before} before, {} after",
        processor(),
        cpus.server,
        cpus.load,
        pace.kills,
        pace.windows,
        pace.window.as_millis(),
        run.start.elapsed().as_secs_f64(),
        load_average()
    );
    Ok(Report { about, rows: run.rows })
}
