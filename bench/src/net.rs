//! `bench net`: packets per second through a network function, beside DPDK's own vhost-user back end.
//!
//! The load is DPDK's virtio-user driver, the same for both: frames go round between it and a back end that swaps their addresses, or
//! only to it. Driver and back end have a CPU each, and those of the other side are stopped meanwhile.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use tests::{Driver, Port, Testpmd, TestpmdSettings};

use crate::NetArguments;
use crate::machine::{Cpus, load_average, pin, processor};
use crate::peers::{self, Server, rig};
use crate::points::alternate;
use crate::report::{Beside, Goal, Report, Row, Unit};

/// Goal: what the medians at 64 bytes are held against.
const PACKET_RATIO: f64 = 0.8;
/// Frames of 32 that go round: half a queue.
const BURSTS: u32 = 4;

/// One way in which frames go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// From the driver and back.
    Round,
    /// From the driver only.
    Out,
}

impl Way {
    const fn name(self) -> &'static str {
        match self {
            Self::Round => "bounced",
            Self::Out => "from the VM",
        }
    }

    /// What the driver does, and what a peer does.
    const fn forward(self) -> (&'static str, &'static str) {
        match self {
            Self::Round => ("io", "macswap"),
            Self::Out => ("txonly", "rxonly"),
        }
    }

    /// The uplink of Dray's function.
    const fn uplink(self) -> &'static str {
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
        let server = peers::dray_net(cpus, folder, way.uplink())?;
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

/// The rig's folder, as the tests know it.
fn rig_folder() -> Result<PathBuf> {
    let program = rig("testpmd")?;
    Ok(program.parent().and_then(Path::parent).context("the rig's programs are in its folder `bin`")?.to_owned())
}

/// Measures all points.
pub(crate) fn measure(arguments: &NetArguments) -> Result<Report> {
    let cpus = Cpus::find()?;
    pin(cpus.load);
    let (alternations, duration) =
        if arguments.quick { (3, Duration::from_millis(300)) } else { (7, Duration::from_millis(1000)) };
    let (start, load_before) = (Instant::now(), load_average());
    let mut rows = Vec::new();
    for way in [Way::Round, Way::Out] {
        for frame_bytes in [64, 1500] {
            for packed in [false, true] {
                let ring = if packed { "packed" } else { "split" };
                let name = format!("{frame_bytes} bytes {}, {ring}", way.name());
                eprintln!("bench: {:4.0} s  {name}", start.elapsed().as_secs_f64());
                let folder = tempfile::Builder::new().prefix("dray-bench").tempdir()?;
                let driver = Driver { packed, ..Driver::default() };
                let mut ours = Side::ours(cpus, folder.path(), way, driver, frame_bytes)?;
                let mut theirs = Side::theirs(cpus, folder.path(), way, driver, frame_bytes)?;
                let pairs = alternate(
                    cpus,
                    alternations,
                    || ours.packets_per_second(duration),
                    || theirs.packets_per_second(duration),
                )?;
                let beside = Beside {
                    name: "net_vhost",
                    values: pairs.theirs(|rate| *rate),
                    ratios: pairs.ratios(|rate| *rate),
                    round_trips: pairs.round_trips(),
                    spoiled: pairs.spoiled,
                };
                let goal = (frame_bytes == 64 && way == Way::Round).then_some(Goal::AtLeast(PACKET_RATIO));
                let values = pairs.ours(|rate| *rate);
                rows.push(Row { name, values, unit: Unit::PerSecond, beside: Some(beside), goal });
            }
        }
    }
    let about = format!(
        "{}, CPU {} serves, CPU {} loads; {alternations} alternations of {} ms; {:.0} s; load average {load_before} before, \
         {} after",
        processor(),
        cpus.server,
        cpus.load,
        duration.as_millis(),
        start.elapsed().as_secs_f64(),
        load_average()
    );
    Ok(Report { about, rows })
}
