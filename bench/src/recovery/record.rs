//! What the record of requests in flight costs: instructions of each request at depth 32 on the null backend, with it and without.
//!
//! One service serves both in turn, under callgrind, so slowly that its driver always has the queue full: its batches are those of a
//! full queue.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use device_svc::driver::client::ClientSettings;
use device_svc::virtqueue::features;

use super::Run;
use crate::blk::Link;
use crate::callgrind::{self, Counted};
use crate::load::{REQUEST_BYTES, SPAN_BYTES, connect, settings};
use crate::peers::{DrayOptions, dray};
use crate::points::Values;
use crate::report::{Beside, Goal, Row, Unit};

const DEPTH: u32 = 32;
/// What the record should cost a request at most, instructions.
const COST: f64 = 40.0;

/// Reads without end until it is told to, and counts what has ended.
fn load(socket: &Path, settings: ClientSettings, ended: &AtomicU64, stop: &AtomicBool) -> Result<()> {
    let mut client = connect(socket, settings)?;
    let mut seed = 1u64;
    let mut sector = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (((seed >> 32) * (SPAN_BYTES / u64::from(REQUEST_BYTES))) >> 32) * u64::from(REQUEST_BYTES / 512)
    };
    for row in 0..DEPTH {
        client.queue().read(row, sector(), REQUEST_BYTES);
    }
    client.publish();
    while !stop.load(Ordering::Relaxed) {
        let mut next = Some(client.wait()?);
        let mut count = 0;
        while let Some(done) = next {
            ensure!(done.status == 0, "a read failed");
            client.queue().read(done.row, sector(), REQUEST_BYTES);
            count += 1;
            next = if count < DEPTH { client.queue().take_ended() } else { None };
        }
        client.publish();
        ended.fetch_add(count.into(), Ordering::Relaxed);
    }
    while client.queue().in_flight() > 0 {
        client.wait()?;
    }
    Ok(client.leave()?)
}

/// Instructions of each request, in several windows.
fn count(run: &Run, counted: &mut Counted, socket: &Path, settings: ClientSettings) -> Result<Vec<f64>> {
    let (ended, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let loading = scope.spawn(|| {
            let done = load(socket, settings, &ended, &stop);
            stop.store(true, Ordering::Relaxed);
            done
        });
        // What comes first fills the caches of valgrind.
        while ended.load(Ordering::Relaxed) < 1000 && !stop.load(Ordering::Relaxed) {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let figures = counted.windows(run.pace.windows, run.pace.window, || ended.load(Ordering::Relaxed));
        stop.store(true, Ordering::Relaxed);
        loading.join().ok().context("the load ends")??;
        figures
    })
}

/// Measures both kinds of ring, with requests of three descriptors and with those that lie in a table.
pub(super) fn measure(run: &mut Run) -> Result<()> {
    callgrind::find()?;
    let prefix = run.folder.path().join("dray.count");
    let under = callgrind::words(&prefix);
    let under: Vec<&str> = under.iter().map(String::as_str).collect();
    let backends = vec!["{ type = \"null\", size = \"1G\" }".to_owned()];
    let options = DrayOptions { link: Link::VhostUser, poll: "always", payload: "in-place", backends, under: &under };
    let server = dray(run.cpus, run.folder.path(), "record", &options)?;
    server.wake();
    let (socket, mut counted) = (server.socket(0), Counted::new(server.id(), prefix));
    for (ring, bits) in [("split", 0), ("packed", features::RING_PACKED)] {
        for (chains, indirect) in [("three descriptors", false), ("a table", true)] {
            let name = format!("instructions, {ring}, {chains}");
            run.say(&name);
            let settings = |recorded| {
                let features = features::EVENT_INDEX | features::INDIRECT | bits;
                ClientSettings { features, indirect, recorded, ..settings(DEPTH) }
            };
            let off = count(run, &mut counted, &socket, settings(false))?;
            let on = count(run, &mut counted, &socket, settings(true))?;
            let each =
                |figure: fn(f64, f64) -> f64| Values(on.iter().zip(&off).map(|(on, off)| figure(*on, *off)).collect());
            let beside = Beside {
                name: "no record",
                values: Values(off.clone()),
                ratios: each(|on, off| on / off),
                round_trips: Values(Vec::new()),
                spoiled: 0,
            };
            let row = |name, values, beside, goal| Row { name, values, unit: Unit::PerRequest, beside, goal };
            let cost = each(|on, off| on - off);
            run.rows.push(row(name.clone(), Values(on.clone()), Some(beside), None));
            run.rows.push(row(format!("{name}: the record"), cost, None, Some(Goal::AtMost(COST))));
        }
    }
    Ok(())
}
