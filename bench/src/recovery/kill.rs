//! From SIGKILL to the first request that completes: what a VM waits when the service dies under load.
//!
//! The moment that is measured begins before the signal is sent, and ends when the driver sees a used entry of the new process. What
//! the dead one had completed is taken off first.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::Run;
use super::driver::{Driver, PATIENCE, SPAN_BYTES};
use crate::blk::Link;
use crate::peers::{DrayOptions, Server, dray};

/// How long the load runs before each kill.
const LOAD: Duration = Duration::from_millis(30);

/// How a driver comes through the death of its service: what waits for it, ms, each time that it is killed.
type Survive = fn(&Run, &mut Server, &mut Driver) -> Result<()>;

/// Ways to come through, each with the link that its function has, and whether there is a keeper.
const WAYS: [(&str, Link, bool, Survive); 2] = [
    ("vhost-user, the driver connects again", Link::VhostUser, false, reconnecting),
    ("vfio-user, the keeper has the connection", Link::VfioUser, true, kept),
];

/// Measures all ways.
pub(super) fn measure(run: &mut Run) -> Result<()> {
    for (number, (name, link, keeper, survive)) in WAYS.into_iter().enumerate() {
        run.say(&format!("SIGKILL to the first completion, {name}"));
        let disk = run.folder.path().join(format!("disk{number}"));
        let backend = format!("{{ type = \"file\", path = \"{}\", create = \"{SPAN_BYTES}\" }}", disk.display());
        let options = DrayOptions { link, poll: "adaptive", payload: "in-place", backends: vec![backend], keeper };
        let mut server = dray(run.cpus, run.folder.path(), &format!("kill{number}"), &options)?;
        server.wake();
        let waits = waits(run, &mut server, link, survive)?;
        run.report(&format!("SIGKILL to the first completion, {name}"), waits);
    }
    Ok(())
}

/// The service is started again at once, and the driver connects again and hands its record back.
fn reconnecting(run: &Run, server: &mut Server, driver: &mut Driver) -> Result<()> {
    server.kill_and_start(run.cpus)?;
    while driver.replace_ended()? > 0 {}
    driver.reconnect(&server.socket(0))
}

/// The keeper starts the service again, and the driver notices nothing but a pause.
fn kept(_run: &Run, server: &mut Server, driver: &mut Driver) -> Result<()> {
    server.kill_service()?;
    // What the dead one had completed: nothing of the next one can come as soon as this.
    while driver.replace_ended()? > 0 {}
    Ok(())
}

/// Kills the service again and again, under load. Returns what the driver waits for its next completion each time, ms.
fn waits(run: &Run, server: &mut Server, link: Link, survive: Survive) -> Result<Vec<f64>> {
    let mut driver = Driver::connect(&server.socket(0), link)?;
    let mut waits_ms = Vec::new();
    for _ in 0..run.kills {
        let (load, mut replaced) = (Instant::now(), 0);
        while load.elapsed() < LOAD {
            replaced += driver.replace_ended()?;
        }
        ensure!(replaced > 0, "nothing completes before the kill");
        let start = Instant::now();
        survive(run, server, &mut driver)?;
        while driver.replace_ended()? == 0 {
            ensure!(start.elapsed() < PATIENCE, "nothing completes after the kill");
            std::hint::spin_loop();
        }
        waits_ms.push(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(waits_ms)
}
