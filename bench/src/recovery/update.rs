//! `device-svc update` under load: how long a VM waits while another program takes over the whole card.
//!
//! A card is updated as a whole: everything of it, its reactors, uplinks and control socket, goes over at once, so that there are never
//! two programs that poll on the same processors, and one that fails leaves all of it with the one before. What that costs a VM is
//! measured here, beside how many others are on the card: the longest time in which one of its drivers sees nothing complete.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::Run;
use super::driver::{Driver, PATIENCE, SPAN_BYTES};
use crate::blk::Link;
use crate::peers::{DrayOptions, Server, dray};

/// Functions of the card, each with a driver that always has requests under way.
const FUNCTIONS: [usize; 2] = [1, 32];
/// How long the load runs before each update.
const LOAD: Duration = Duration::from_millis(100);

/// A driver, and when it last saw something complete.
struct Watched {
    driver: Driver,
    last: Instant,
}

/// Measures cards of few and of many functions.
pub(super) fn measure(run: &mut Run) -> Result<()> {
    for functions in FUNCTIONS {
        run.say(&format!("update of a card with {functions} functions on vfio-user"));
        let disk = |number| run.folder.path().join(format!("update{functions}-{number}"));
        let backends = (0..functions).map(|number| {
            format!("{{ type = \"file\", path = \"{}\", create = \"{SPAN_BYTES}\" }}", disk(number).display())
        });
        let backends = backends.collect();
        let options =
            DrayOptions { link: Link::VfioUser, poll: "adaptive", payload: "in-place", backends, keeper: true };
        let server = dray(run.cpus, run.folder.path(), &format!("update{functions}"), &options)?;
        server.wake();
        let waits = waits(run, &server, functions)?;
        run.report(&format!("update of a card with {functions} on vfio-user, the longest wait of any"), waits);
    }
    Ok(())
}

/// Updates the card again and again, under load. Returns the longest wait of any driver each time, ms.
fn waits(run: &Run, server: &Server, functions: usize) -> Result<Vec<f64>> {
    let connect = |number| {
        let driver = Driver::connect(&server.socket(number), Link::VfioUser)?;
        Ok(Watched { driver, last: Instant::now() })
    };
    let mut watched = (0..functions).map(connect).collect::<Result<Vec<_>>>()?;
    let mut waits_ms = Vec::new();
    for _ in 0..run.kills {
        let load = Instant::now();
        while load.elapsed() < LOAD {
            look(&mut watched)?;
        }
        let mut update = server.update(run.cpus)?;
        let mut longest = Duration::ZERO;
        let status = loop {
            longest = longest.max(look(&mut watched)?);
            if let Some(status) = update.try_wait()? {
                break status;
            }
        };
        ensure!(status.success(), "the update failed");
        // Until each has seen the new program at work.
        let served = Instant::now();
        while watched.iter().any(|watched| watched.last < served) {
            longest = longest.max(look(&mut watched)?);
            ensure!(served.elapsed() < PATIENCE, "a function does not go on after the update");
        }
        waits_ms.push(longest.as_secs_f64() * 1e3);
    }
    Ok(waits_ms)
}

/// Replaces what has ended. Returns the longest time that one of those drivers had waited which have seen something now.
fn look(watched: &mut [Watched]) -> Result<Duration> {
    let mut longest = Duration::ZERO;
    for Watched { driver, last } in watched {
        if driver.replace_ended()? > 0 {
            let now = Instant::now();
            longest = longest.max(now - std::mem::replace(last, now));
        }
    }
    Ok(longest)
}
