//! `bench recovery`: what it takes to lose nothing when the card's service dies.
//!
//! ```text
//!   kill     from SIGKILL to the first request that completes
//!   update   how long VMs wait while another program takes over the card
//!   record   instructions of each request, with the record of what is in flight and without
//!   lane     what they are counted of
//!   driver   what loads the card that is killed or updated
//! ```

mod driver;
mod kill;
mod lane;
mod record;
mod update;

use std::time::Instant;

use anyhow::{Context, Result};

use crate::RecoveryArguments;
use crate::machine::{Cpus, load_average, processor};
use crate::points::Values;
use crate::report::{Goal, Report, Row, Unit};

pub(crate) use lane::{Lane, run as run_lane};

/// What the worst wait should stay below, ms.
const WORST_MS: f64 = 100.0;

/// What can be measured by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Part {
    /// The time from SIGKILL to the first request that completes
    Kill,
    /// How long VMs wait while another program takes over the card
    Update,
    /// Instructions of each request, with the record and without; wants valgrind
    Record,
}

/// All that the parts need.
struct Run {
    cpus: Cpus,
    kills: usize,
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

    /// Two rows of how long something was waited for, ms: the median, and the worst with its goal.
    fn report(&mut self, what: &str, waits_ms: Vec<f64>) {
        let waits = Values(waits_ms);
        let worst = Values(vec![waits.most()]);
        let row = |which: &str, values, goal| Row {
            name: format!("{what}, {which}"),
            values,
            unit: Unit::Milliseconds,
            beside: None,
            goal,
        };
        let rows = [row("median", waits, None), row("worst", worst, Some(Goal::AtMost(WORST_MS)))];
        self.rows.extend(rows);
    }
}

/// Measures the parts asked for.
pub(crate) fn measure(arguments: &RecoveryArguments) -> Result<Report> {
    let cpus = Cpus::find()?;
    let kills = if arguments.quick { 10 } else { 50 };
    let folder = tempfile::Builder::new().prefix("dray-bench").tempdir()?;
    let mut run = Run { cpus, kills, folder, rows: Vec::new(), start: Instant::now() };
    let parts: [(Part, Measure); 3] =
        [(Part::Kill, kill::measure), (Part::Update, update::measure), (Part::Record, record::measure)];
    let before = load_average();
    for (part, measure) in parts {
        if arguments.only.is_empty() || arguments.only.contains(&part) {
            cpus.on_load(|| measure(&mut run)).with_context(|| format!("{part:?}"))?;
        }
    }
    let about = format!(
        "{}, CPU {} serves, CPU {} loads; {kills} kills, and as many updates; {:.0} s; load average {before} before, {} after",
        processor(),
        cpus.server,
        cpus.load,
        run.start.elapsed().as_secs_f64(),
        load_average()
    );
    Ok(Report { about, rows: run.rows })
}
