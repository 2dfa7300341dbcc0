//! `bench net`: network functions, beside DPDK's vhost-user back end, QEMU's own tap, passt, and plain virtual Ethernet.
//!
//! ```text
//!   rates         packets per second of a driver without a VM
//!   instructions  what each of those packets costs, counted by callgrind
//!   guests        iperf3 and round trips of a Linux guest
//!   wire          the same between two namespaces, through the driver without a VM
//!   ping          round trips of echo requests
//! ```

mod guests;
mod instructions;
mod ping;
mod rates;
mod wire;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::NetArguments;
use crate::machine::{Cpus, load_average, processor};
use crate::peers::rig;
use crate::points::{Pairs, Values};
use crate::report::{Beside, Goal, Report, Row, Unit};

/// What can be measured by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(crate) enum Part {
    /// Packets per second beside DPDK's back end
    Rates,
    /// Instructions of each of those packets; wants valgrind
    Instructions,
    /// A Linux guest beside QEMU's own tap and passt; wants root
    Guests,
    /// Two namespaces beside plain virtual Ethernet; wants root
    Wire,
}

/// How long and how often.
#[derive(Clone, Copy, Debug)]
struct Pace {
    alternations: usize,
    /// Of a point of packets per second.
    duration: Duration,
    /// Of a window in which instructions are counted.
    window: Duration,
    /// Of each run of iperf3, seconds.
    iperf_seconds: u32,
    /// Echo requests in a row.
    echoes: usize,
}

/// All that the parts need.
struct Run {
    cpus: Cpus,
    quick: bool,
    pace: Pace,
    rig: PathBuf,
    rows: Vec<Row>,
    start: Instant,
}

/// How a part is measured.
type Measure = fn(&mut Run) -> Result<()>;

impl Run {
    fn say(&self, what: &str) {
        eprintln!("bench: {:4.0} s  {what}", self.start.elapsed().as_secs_f64());
    }

    /// A row of two sides that were measured in turn.
    fn add(&mut self, name: String, pairs: &Pairs<f64>, peer: &'static str, unit: Unit, goal: Option<Goal>) {
        let beside = Beside {
            name: peer,
            values: pairs.theirs(|value| *value),
            ratios: pairs.ratios(|value| *value),
            round_trips: pairs.round_trips(),
            spoiled: pairs.spoiled,
        };
        let values = pairs.ours(|value| *value);
        self.rows.push(Row { name, values, unit, beside: Some(beside), goal });
    }

    /// A row of two sides that were measured in turn on more than two CPUs' worth of threads: how far two CPUs stand apart says
    /// nothing there.
    fn add_turns(&mut self, name: String, ours: &[f64], peer: &'static str, theirs: &[f64], unit: Unit) {
        let ratios = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
        let beside = Beside {
            name: peer,
            values: Values(theirs.to_vec()),
            ratios: Values(ratios),
            round_trips: Values(Vec::new()),
            spoiled: 0,
        };
        self.rows.push(Row { name, values: Values(ours.to_vec()), unit, beside: Some(beside), goal: None });
    }

    /// A row of how much one side has more than the other.
    fn add_difference(&mut self, name: String, ours: &[f64], theirs: &[f64], unit: Unit) {
        let values = Values(ours.iter().zip(theirs).map(|(ours, theirs)| ours - theirs).collect());
        self.rows.push(Row { name, values, unit, beside: None, goal: None });
    }
}

/// The rig's folder, as the tests know it.
fn rig_folder() -> Result<PathBuf> {
    let program = rig("testpmd")?;
    Ok(program.parent().and_then(Path::parent).context("the rig's programs are in its folder `bin`")?.to_owned())
}

/// Measures the parts asked for.
pub(crate) fn measure(arguments: &NetArguments) -> Result<Report> {
    let cpus = Cpus::find()?;
    let milliseconds = Duration::from_millis;
    let (quick, rig) = (arguments.quick, rig_folder()?);
    let pace = if quick {
        Pace { alternations: 3, duration: milliseconds(300), window: milliseconds(700), iperf_seconds: 1, echoes: 500 }
    } else {
        Pace {
            alternations: 7,
            duration: milliseconds(1000),
            window: milliseconds(2000),
            iperf_seconds: 3,
            echoes: 3000,
        }
    };
    let mut run = Run { cpus, quick, pace, rig, rows: Vec::new(), start: Instant::now() };
    let parts: [(Part, Measure); 4] = [
        (Part::Rates, rates::measure),
        (Part::Instructions, instructions::measure),
        (Part::Guests, guests::measure),
        (Part::Wire, wire::measure),
    ];
    let before = load_average();
    for (part, measure) in parts {
        if !arguments.only.is_empty() && !arguments.only.contains(&part) {
            continue;
        }
        // Kernel and guests run where there is room; only a driver and its back end have a CPU each.
        let done = match part {
            Part::Rates | Part::Instructions => cpus.on_load(|| measure(&mut run)),
            Part::Guests | Part::Wire => measure(&mut run),
        };
        done.with_context(|| format!("{part:?}"))?;
    }
    let about = format!(
        "{}, CPU {} serves, CPU {} loads; {} alternations of {} ms; {:.0} s; load average {before} before, {} after",
        processor(),
        cpus.server,
        cpus.load,
        pace.alternations,
        pace.duration.as_millis(),
        run.start.elapsed().as_secs_f64(),
        load_average()
    );
    Ok(Report { about, rows: run.rows })
}
