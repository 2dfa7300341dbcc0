//! Measurements as ratios within one run: Dray beside its peers on the same machine, in the same minutes.
//!
//! ```text
//!   main     what is asked for
//!   blk      the subject: which points, which goals
//!   points   alternation, repeats, medians and spread
//!   peers    the servers, each on a CPU of its own and stopped while another is measured
//!   load     the load on the other CPU
//!   machine  CPUs, a cache line's round trip, what a process uses
//!   report   table and JSON; chart: SVG
//! ```

mod blk;
mod chart;
mod load;
mod machine;
mod peers;
mod points;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};

/// Measures Dray beside its peers
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    subject: Subject,
}

#[derive(Subcommand)]
enum Subject {
    /// Block functions over vhost-user, beside qemu-storage-daemon and fio
    ///
    /// The server has the first CPU, the load the second; nothing else should run. The peers come from the rig
    /// (tests/rig/make; another place with $DRAY_RIG), device-svc from beside this program.
    Blk(BlkArguments),
}

/// How `bench blk` runs.
#[derive(Args)]
pub(crate) struct BlkArguments {
    /// Fewer and shorter points: about a minute, with more spread
    #[arg(long)]
    quick: bool,
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the ratios as SVG
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Measure only these parts
    #[arg(long, value_name = "PART", value_delimiter = ',')]
    only: Vec<blk::Part>,
}

fn main() -> ExitCode {
    let Subject::Blk(arguments) = Arguments::parse().subject;
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &BlkArguments) -> Result<()> {
    let report = blk::measure(arguments)?;
    print!("{}", report.table());
    if let Some(path) = &arguments.json {
        std::fs::write(path, report.json()).with_context(|| path.display().to_string())?;
    }
    if let Some(path) = &arguments.svg {
        std::fs::write(path, chart::draw(&report)).with_context(|| path.display().to_string())?;
    }
    Ok(())
}
