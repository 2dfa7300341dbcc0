//! Packets per second: DPDK's virtio-user driver with Dray as its back end, beside the same with DPDK's own.
//!
//! The load is the same for both: frames go round between driver and a back end that swaps their addresses, or only to it. Driver and
//! back end have a CPU each, and those of the other side are stopped meanwhile.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::signal::Signal;
use tests::{Driver, Port, Testpmd, TestpmdSettings};

use super::{Run, rig_folder};
use crate::blk::Link;
use crate::machine::Cpus;
use crate::peers::{self, NetOptions, Server};
use crate::points::alternate;
use crate::report::{Goal, Unit};

/// Goal: what the medians at 64 bytes are held against.
const PACKET_RATIO: f64 = 0.8;
/// Frames of 32 that go round: half a queue.
pub(super) const BURSTS: u32 = 4;

/// One way in which frames go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// From the driver and back.
    Round,
    /// From the driver only.
    Out,
}

impl Way {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Round => "bounced",
            Self::Out => "from the VM",
        }
    }

    /// What the driver does, and what a peer does.
    pub(super) const fn forward(self) -> (&'static str, &'static str) {
        match self {
            Self::Round => ("io", "macswap"),
            Self::Out => ("txonly", "rxonly"),
        }
    }

    /// The uplink of Dray's function.
    pub(super) const fn uplink(self) -> &'static str {
        match self {
            Self::Round => "{ type = \"loopback\" }",
            Self::Out => "{ type = \"null\" }",
        }
    }
}

/// A driver with its back end, stopped but while it is measured.
struct Side {
    driver: Testpmd,
    back_end: BackEnd,
    way: Way,
}

enum BackEnd {
    Dray(Server),
    Peer(Box<Testpmd>),
}

impl Side {
    fn ours(cpus: Cpus, folder: &Path, way: Way, driver: Driver, frame_bytes: u16) -> Result<Self> {
        let options = NetOptions { link: Link::VhostUser, poll: "always", uplink: way.uplink(), under: &[] };
        let server = peers::dray_net(cpus, folder, &options)?;
        server.wake();
        let socket = server.socket(0);
        Self::start(cpus, socket, way, driver, frame_bytes, BackEnd::Dray(server))
    }

    fn theirs(cpus: Cpus, folder: &Path, way: Way, driver: Driver, frame_bytes: u16) -> Result<Self> {
        let socket = folder.join("peer.sock");
        let forward = way.forward().1;
        let settings = TestpmdSettings { cpu: cpus.server, forward, frame_bytes, ..TestpmdSettings::default() };
        let mut peer = Testpmd::start(&rig_folder()?, &[Port::Vhost(socket.clone(), 1)], &settings);
        peer.go(0);
        Self::start(cpus, socket, way, driver, frame_bytes, BackEnd::Peer(Box::new(peer)))
    }

    fn start(
        cpus: Cpus,
        socket: PathBuf,
        way: Way,
        driver: Driver,
        frame_bytes: u16,
        back_end: BackEnd,
    ) -> Result<Self> {
        let forward = way.forward().0;
        let settings = TestpmdSettings { cpu: cpus.load, forward, frame_bytes, ..TestpmdSettings::default() };
        let mut testpmd = Testpmd::start(&rig_folder()?, &[Port::VirtioUser(socket, driver)], &settings);
        testpmd.go(if way == Way::Round { BURSTS } else { 0 });
        let mut side = Self { driver: testpmd, back_end, way };
        side.signal(Signal::SIGSTOP);
        Ok(side)
    }

    fn signal(&mut self, signal: Signal) {
        self.driver.process().signal(signal);
        match &mut self.back_end {
            BackEnd::Dray(server) => server.signal(signal),
            BackEnd::Peer(peer) => peer.process().signal(signal),
        }
    }

    /// Frames per second that went all the way.
    fn packets_per_second(&mut self, duration: Duration) -> Result<f64> {
        self.signal(Signal::SIGCONT);
        let way = self.way;
        // What is counted is what has arrived: at the driver, or at the back end.
        let mut count = || -> Result<(f64, Instant)> {
            let frames = match (way, &mut self.back_end) {
                (Way::Round, _) => self.driver.counts(0).received as f64,
                (Way::Out, BackEnd::Peer(peer)) => peer.counts(0).received as f64,
                (Way::Out, BackEnd::Dray(server)) => server.figure(&["transmit", "packets"])?,
            };
            Ok((frames, Instant::now()))
        };
        let before = count()?;
        std::thread::sleep(duration);
        let after = count()?;
        self.signal(Signal::SIGSTOP);
        Ok((after.0 - before.0) / (after.1 - before.1).as_secs_f64())
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // What is stopped cannot end.
        self.signal(Signal::SIGCONT);
    }
}

/// Measures all points.
pub(super) fn measure(run: &mut Run) -> Result<()> {
    let (cpus, pace) = (run.cpus, run.pace);
    for way in [Way::Round, Way::Out] {
        for frame_bytes in [64, 1500] {
            for packed in [false, true] {
                let ring = if packed { "packed" } else { "split" };
                let name = format!("{frame_bytes} bytes {}, {ring}", way.name());
                run.say(&name);
                let folder = tempfile::Builder::new().prefix("dray-bench").tempdir()?;
                let driver = Driver { packed, ..Driver::default() };
                let mut ours = Side::ours(cpus, folder.path(), way, driver, frame_bytes)?;
                let mut theirs = Side::theirs(cpus, folder.path(), way, driver, frame_bytes)?;
                let pairs = alternate(
                    cpus,
                    pace.alternations,
                    || ours.packets_per_second(pace.duration),
                    || theirs.packets_per_second(pace.duration),
                )?;
                let goal = (frame_bytes == 64 && way == Way::Round).then_some(Goal::AtLeast(PACKET_RATIO));
                run.add(name, &pairs, "net_vhost", Unit::PerSecond, goal);
            }
        }
    }
    Ok(())
}
