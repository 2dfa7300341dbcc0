//! Instructions per packet, counted by callgrind: Dray's and those of DPDK's back end.
//!
//! The back end runs under valgrind, some fifty times slower than by itself, so its driver, which does not, keeps the queues full. What
//! it turns in vain is counted all the same: where the driver has a CPU for itself that is next to nothing, and where it has not the
//! least of several windows is nearest to the truth.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use tests::{Driver, Port, Testpmd, TestpmdSettings};

use super::Run;
use super::rates::{BURSTS, Way};
use crate::blk::Link;
use crate::peers::{self, NetOptions};
use crate::report::Unit;

/// A program that callgrind counts.
struct Counted {
    process: u32,
    /// What its files begin with.
    prefix: PathBuf,
    dumps: u32,
}

/// Words that run a program under callgrind, which does not count before it is told to.
fn callgrind(prefix: &Path) -> Vec<String> {
    let mut words = vec!["valgrind".to_owned()];
    // The rig's programs are scripts that become the program.
    words.extend(["-q", "--tool=callgrind", "--trace-children=yes", "--separate-threads=yes"].map(str::to_owned));
    words.extend(["--fair-sched=yes", "--instr-atstart=no"].map(str::to_owned));
    words.push(format!("--callgrind-out-file={}", prefix.display()));
    words
}

impl Counted {
    fn tell(&self, words: &[&str]) -> Result<()> {
        let output = Command::new("vgdb").arg(format!("--pid={}", self.process)).args(words).output()?;
        ensure!(output.status.success(), "vgdb {words:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Instructions of each packet of those that `packets` counts, in several windows.
    fn windows(&mut self, count: usize, window: Duration, mut packets: impl FnMut() -> u64) -> Result<Vec<f64>> {
        self.tell(&["instrumentation", "on"])?;
        let mut figures = Vec::new();
        for _ in 0..count {
            self.tell(&["zero"])?;
            let before = packets();
            std::thread::sleep(window);
            let passed = packets() - before;
            self.tell(&["dump"])?;
            self.dumps += 1;
            ensure!(passed > 0, "no packet passed in {} ms", window.as_millis());
            figures.push(self.instructions()? / passed as f64);
        }
        self.tell(&["instrumentation", "off"])?;
        Ok(figures)
    }

    /// Instructions of the busiest thread in the last window: the one that polls.
    fn instructions(&self) -> Result<f64> {
        let folder = self.prefix.parent().context("the files are in a folder")?;
        let start = format!("{}.{}-", self.prefix.file_name().context("files have names")?.display(), self.dumps);
        let mut most = 0.0f64;
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&start) {
                let text = std::fs::read_to_string(entry.path())?;
                let totals = text.lines().find_map(|line| line.strip_prefix("totals: ")?.parse().ok());
                most = most.max(totals.unwrap_or_default());
            }
        }
        ensure!(most > 0.0, "callgrind counted nothing");
        Ok(most)
    }
}

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
    let found = Command::new("valgrind").arg("--version").output();
    ensure!(found.is_ok_and(|output| output.status.success()), "valgrind is not there: run tests/rig/make");
    let folder = tempfile::Builder::new().prefix("dray-bench").tempdir()?;
    let socket = folder.path().join("peer.sock");
    let prefix = folder.path().join("peer.count");
    let under = callgrind(&prefix);
    let under: Vec<&str> = under.iter().map(String::as_str).collect();
    let settings = TestpmdSettings { cpu: run.cpus.server, under: &under, ..TestpmdSettings::default() };
    let mut peer = Testpmd::start(&run.rig, &[Port::Vhost(socket.clone(), 1)], &settings);
    let mut their_count = Counted { process: peer.process().id(), prefix, dumps: 0 };
    let rings: &[bool] = if run.quick { &[false] } else { &[false, true] };
    for way in [Way::Round, Way::Out] {
        let prefix = folder.path().join(format!("dray.count.{}", way.forward().1));
        let under = callgrind(&prefix);
        let under: Vec<&str> = under.iter().map(String::as_str).collect();
        let options = NetOptions { link: Link::VhostUser, poll: "always", uplink: way.uplink(), under: &under };
        let parent = tempfile::Builder::new().prefix("dray-bench").tempdir()?;
        peer.process().signal(Signal::SIGSTOP);
        let server = peers::dray_net(run.cpus, parent.path(), &options)?;
        let mut our_count = Counted { process: server.id(), prefix, dumps: 0 };
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
