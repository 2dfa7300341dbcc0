//! What a table of very many ranges costs: pages that are found, and pages that are mapped.
//!
//! Behind a guest's IOMMU every page of a buffer is a range of its own. A card that slows down with their number slows down the
//! guest, and a VMM that maps them one by one waits for each.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use device_svc::address::Iova;
use device_svc::dma::{Access, Direction, HostMemory, MemoryFiles, PAGE_BYTES, Region};
use device_svc::driver::GuestMemory;
use device_svc::driver::vfio_user::{Sharing, VfioUserDevice};

use crate::DmaMapArguments;
use crate::blk::Link;
use crate::machine::{Cpus, load_average, pin, processor};
use crate::peers::{DrayOptions, dray};
use crate::points::{Pairs, alternate};
use crate::report::{Beside, Goal, Report, Row, Unit};

const FEW: u64 = 10;
const MANY: u64 = 50_000;
/// The maps that the last ones are compared with.
const FIRST: usize = 1_000;
const LOOKUPS: u64 = 2_000_000;

/// Goals: what the medians are held against.
const LOOKUP_RATIO: f64 = 3.0;
const MAP_RATIO: f64 = 2.0;

/// Where page `number` is mapped: apart, so that no two are neighbours, and in no order.
const fn address(number: u64) -> Iova {
    Iova((number * 40_503 % 65_536 + 1) * 2 * PAGE_BYTES)
}

/// Measures both.
pub(crate) fn measure(arguments: &DmaMapArguments) -> Result<Report> {
    let cpus = Cpus::find()?;
    pin(cpus.load);
    let alternations = if arguments.quick { 3 } else { 9 };
    let (start, before) = (Instant::now(), load_average());
    let memory = GuestMemory::new(0, MANY * PAGE_BYTES)?;
    let mut rows = Vec::new();

    let (few, many) = (table(&memory, FEW)?.0, table(&memory, MANY)?.0);
    let pairs = alternate(cpus, alternations, || Ok(lookup_ns(&many, MANY)), || Ok(lookup_ns(&few, FEW)))?;
    rows.push(row("a page found among 50,000", &pairs, "among 10", LOOKUP_RATIO));

    let maps = maps(alternations, || Ok(table(&memory, MANY)?.1))?;
    rows.push(row("mapped in the table, 50,000 in a row", &maps, "the first 1,000", MAP_RATIO));

    let folder = tempfile::Builder::new().prefix("dray-bench").tempdir()?;
    let backends = vec!["{ type = \"null\", size = \"1G\" }".to_owned()];
    let options = DrayOptions { link: Link::VfioUser, poll: "adaptive", payload: "in-place", backends, keeper: false };
    let server = dray(cpus, folder.path(), "maps", &options)?;
    let (socket, memory) = (server.socket(0), Arc::new(memory));
    let maps = self::maps(alternations.min(5), || server.awake(|| over_socket(&socket, &memory)))?;
    rows.push(row("mapped over a socket, 50,000 in a row", &maps, "the first 1,000", MAP_RATIO));

    let about = format!(
        "{}; {alternations} repeats; {:.0} s; load average {before} before, {} after",
        processor(),
        start.elapsed().as_secs_f64(),
        load_average()
    );
    Ok(Report { about, rows })
}

fn row(name: &str, pairs: &Pairs<f64>, peer: &'static str, goal: f64) -> Row {
    let beside = Beside {
        name: peer,
        values: pairs.theirs(|ns| *ns),
        ratios: pairs.ratios(|ns| *ns),
        round_trips: pairs.round_trips(),
        spoiled: pairs.spoiled,
    };
    let (name, values) = (name.to_owned(), pairs.ours(|ns| *ns));
    Row { name, values, unit: Unit::Nanoseconds, beside: Some(beside), goal: Some(Goal::AtMost(goal)) }
}

/// Maps so many pages; returns the table, and when each was done, ns from the beginning.
fn table(memory: &GuestMemory, count: u64) -> Result<(Arc<HostMemory>, Vec<u64>)> {
    let table = HostMemory::default();
    let mut files = MemoryFiles::default();
    let mut done_ns = Vec::with_capacity(count as usize);
    let start = Instant::now();
    for number in 0..count {
        let (mapping, at) = files.map(memory.file().as_fd(), number * PAGE_BYTES, PAGE_BYTES, Access::Both)?;
        table.insert(Region::new(address(number), PAGE_BYTES, mapping, at)?)?;
        done_ns.push(start.elapsed().as_nanos() as u64);
    }
    Ok((Arc::new(table), done_ns))
}

/// What it takes to find a page at random, ns. Each lookup waits for the one before, so that nothing hides behind another.
fn lookup_ns(table: &HostMemory, count: u64) -> f64 {
    let mut seed = 1_u64;
    let mut found = 0_u64;
    let start = Instant::now();
    for _ in 0..LOOKUPS {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // What was found decides nothing, but the processor does not know that.
        let number = ((seed >> 32) * count + (found & (1 << 63))) >> 32;
        let at = Iova(address(number).0 + 512);
        found += table.resolve(at, 512, Direction::ToHost).map_or(1 << 63, |(pointer, _)| pointer.addr() as u64 & 1);
    }
    let took = start.elapsed();
    assert_eq!(std::hint::black_box(found), 0, "every page is found");
    took.as_nanos() as f64 / LOOKUPS as f64
}

/// The mean of all maps beside that of the first, from runs that say when each was done.
fn maps(repeats: usize, mut run: impl FnMut() -> Result<Vec<u64>>) -> Result<Pairs<f64>> {
    let mut pairs = Vec::new();
    for _ in 0..repeats {
        let done_ns = run()?;
        let mean = |count: usize| done_ns.get(count - 1).map(|ns| *ns as f64 / count as f64).context("all were mapped");
        pairs.push(crate::points::Pair { ours: mean(done_ns.len())?, theirs: mean(FIRST)?, round_trip_ns: f64::NAN });
    }
    Ok(Pairs { pairs, spoiled: 0 })
}

/// The same by messages to the card.
fn over_socket(socket: &Path, memory: &Arc<GuestMemory>) -> Result<Vec<u64>> {
    let mut device = VfioUserDevice::connect(socket, 0, Arc::clone(memory), Sharing::Nothing)?;
    let mut done_ns = Vec::with_capacity(MANY as usize);
    let start = Instant::now();
    for number in 0..MANY {
        device.map(address(number), PAGE_BYTES, number * PAGE_BYTES, true)?;
        done_ns.push(start.elapsed().as_nanos() as u64);
    }
    Ok(done_ns)
}
