//! Instructions per packet, counted by callgrind: Dray's and those of DPDK's back end.
//!
//! The back end runs under valgrind, some fifty times slower than by itself, so its driver, which does not, keeps the queues full. What
//! it turns in vain is counted all the same: where the driver has a CPU for itself that is next to nothing, and where it has not the
//! least of several windows is nearest to the truth.

use std::path::PathBuf;

use anyhow::Result;
use nix::sys::signal::Signal;
use tests::{Driver, Port, Testpmd, TestpmdSettings};

use super::Run;
use super::rates::{BURSTS, Way};
use crate::blk::Link;
use crate::callgrind::{self, Counted};
use crate::peers::{self, NetOptions};
use crate::report::Unit;

/// Drives a back end that is counted, and stops again.
fn drive(
    run: &Run,
    socket: PathBuf,
    way: Way,
    driver: Driver,
    frame_bytes: u16,
    counted: &mut Counted,
) -> Result<Vec<f64>> {
    let forward = way.forward().0;
    let settings = TestpmdSettings { cpu: run.cpus.load, forward, frame_bytes, ..TestpmdSettings::default() };
    let mut testpmd = Testpmd::start(&run.rig, &[Port::VirtioUser(socket, driver)], &settings);
    testpmd.go(if way == Way::Round { BURSTS } else { 0 });
    let packets = || {
        let counts = testpmd.counts(0);
        if way == Way::Round { counts.received } else { counts.sent }
    };
    let figures = counted.windows(run.pace.alternations, run.pace.window, packets)?;
    testpmd.quit();
    Ok(figures)
}

/// Measures all points.
pub(super) fn measure(run: &mut Run) -> Result<()> {
    callgrind::find()?;
    let folder = tempfile::Builder::new().prefix("dray-bench").tempdir()?;
    let socket = folder.path().join("peer.sock");
    let prefix = folder.path().join("peer.count");
    let under = callgrind::words(&prefix);
    let under: Vec<&str> = under.iter().map(String::as_str).collect();
    let settings = TestpmdSettings { cpu: run.cpus.server, under: &under, ..TestpmdSettings::default() };
    let mut peer = Testpmd::start(&run.rig, &[Port::Vhost(socket.clone(), 1)], &settings);
    let mut their_count = Counted::new(peer.process().id(), prefix);
    let rings: &[bool] = if run.quick { &[false] } else { &[false, true] };
    for way in [Way::Round, Way::Out] {
        let prefix = folder.path().join(format!("dray.count.{}", way.forward().1));
        let under = callgrind::words(&prefix);
        let under: Vec<&str> = under.iter().map(String::as_str).collect();
        let options = NetOptions { link: Link::VhostUser, poll: "always", uplink: way.uplink(), under: &under };
        let parent = tempfile::Builder::new().prefix("dray-bench").tempdir()?;
        peer.process().signal(Signal::SIGSTOP);
        let server = peers::dray_net(run.cpus, parent.path(), &options)?;
        let mut our_count = Counted::new(server.id(), prefix);
        peer.process().signal(Signal::SIGCONT);
        peer.tell(&format!("set fwd {}", way.forward().1));
        for frame_bytes in [64, 1500] {
            for packed in rings {
                let ring = if *packed { "packed" } else { "split" };
                let name = format!("instructions, {frame_bytes} bytes {}, {ring}", way.name());
                run.say(&name);
                let driver = Driver { packed: *packed, ..Driver::default() };
                peer.process().signal(Signal::SIGSTOP);
                let ours = server.awake(|| drive(run, server.socket(0), way, driver, frame_bytes, &mut our_count))?;
                peer.process().signal(Signal::SIGCONT);
                peer.go(0);
                let theirs = drive(run, socket.clone(), way, driver, frame_bytes, &mut their_count)?;
                peer.stop();
                run.add_turns(name, &ours, "net_vhost", &theirs, Unit::PerPacket);
            }
        }
    }
    Ok(())
}
