//! Measurements as ratios within one run: Dray beside its peers on the same machine, in the same minutes.
//!
//! ```text
//!   main     what is asked for
//!   blk      a subject: which points, which goals
//!   dma_map  another: what a table of very many ranges costs
//!   net      another: network functions
//!   recovery another: what it takes to lose nothing when the service dies
//!   points   alternation, repeats, medians and spread
//!   peers    the servers, each on a CPU of its own and stopped while another is measured
//!   load     the load on the other CPU
//!   callgrind  instructions of a running server
//!   machine  CPUs, a cache line's round trip, what a process uses
//!   report   table and JSON; chart: SVG
//! ```

mod blk;
mod callgrind;
mod chart;
mod dma_map;
mod load;
mod machine;
mod net;
mod peers;
mod points;
mod recovery;
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
    /// Block functions, beside qemu-storage-daemon and fio
    ///
    /// The server has the first CPU, the load the second; nothing else should run. The peers come from the rig
    /// (tests/rig/make; another place with $DRAY_RIG), device-svc from beside this program.
    Blk(BlkArguments),
    /// Memory that is mapped page by page, as behind a guest's IOMMU
    ///
    /// How long a page takes to be found among 50,000 beside among 10, and to be mapped as the 50,000th beside as one of the
    /// first 1,000: in the table itself, and over a socket with everything that belongs to it.
    DmaMap(DmaMapArguments),
    /// Network functions, beside DPDK's vhost-user back end, QEMU's tap, passt and plain virtual Ethernet
    ///
    /// The load is DPDK's virtio-user driver on the second CPU, the back end has the first; or iperf3 and echo requests, of a Linux
    /// guest and between two network namespaces that are made for it, as root. The rig has all of it (tests/rig/make); instructions
    /// are counted by valgrind.
    Net(NetArguments),
    /// What it takes to lose nothing when the card's service is killed
    ///
    /// The time from SIGKILL to the first request that completes, of a driver that keeps the record of what is in flight; and the
    /// instructions that the record costs each request at depth 32 on the null backend, counted by callgrind in this program, with the
    /// record and without: one lane and its driver in one thread, so two runs count the same.
    Recovery(RecoveryArguments),
    /// What `recovery` counts the instructions of
    #[command(hide = true)]
    Lane(recovery::Lane),
}

/// What becomes of the results.
#[derive(Args)]
struct Output {
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the ratios as SVG
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// How `bench dma-map` runs.
#[derive(Args)]
pub(crate) struct DmaMapArguments {
    /// Fewer repeats, with more spread
    #[arg(long)]
    quick: bool,
    #[command(flatten)]
    output: Output,
}

/// How `bench recovery` runs.
#[derive(Args)]
pub(crate) struct RecoveryArguments {
    /// Fewer kills
    #[arg(long)]
    quick: bool,
    #[command(flatten)]
    output: Output,
    /// Measure only these parts
    #[arg(long, value_name = "PART", value_delimiter = ',')]
    only: Vec<recovery::Part>,
}

/// How `bench net` runs.
#[derive(Args)]
pub(crate) struct NetArguments {
    /// Fewer and shorter points: a few minutes, with more spread
    #[arg(long)]
    quick: bool,
    #[command(flatten)]
    output: Output,
    /// Measure only these parts
    #[arg(long, value_name = "PART", value_delimiter = ',')]
    only: Vec<net::Part>,
}

/// How `bench blk` runs.
#[derive(Args)]
pub(crate) struct BlkArguments {
    /// Fewer and shorter points: about a minute, with more spread
    #[arg(long)]
    quick: bool,
    /// How Dray's functions are reached
    #[arg(long, value_name = "LINK", default_value = "vhost-user")]
    link: blk::Link,
    #[command(flatten)]
    output: Output,
    /// Measure only these parts
    #[arg(long, value_name = "PART", value_delimiter = ',')]
    only: Vec<blk::Part>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse().subject) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(subject: &Subject) -> Result<()> {
    let (report, output) = match subject {
        Subject::Blk(arguments) => (blk::measure(arguments)?, &arguments.output),
        Subject::DmaMap(arguments) => (dma_map::measure(arguments)?, &arguments.output),
        Subject::Net(arguments) => (net::measure(arguments)?, &arguments.output),
        Subject::Lane(lane) => return recovery::run_lane(*lane),
        Subject::Recovery(arguments) => (recovery::measure(arguments)?, &arguments.output),
    };
    print!("{}", report.table());
    if let Some(path) = &output.json {
        std::fs::write(path, report.json()).with_context(|| path.display().to_string())?;
    }
    if let Some(path) = &output.svg {
        std::fs::write(path, chart::draw(&report)).with_context(|| path.display().to_string())?;
    }
    Ok(())
}
