//! Frames as they are on a wire: tcpdump takes them down while a test runs, and tshark judges them.

use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;

use crate::{Namespace, Process, wait_for};

/// The options that make tshark check what it otherwise believes.
const CHECK: [&str; 6] =
    ["-o", "ip.check_checksum:TRUE", "-o", "tcp.check_checksum:TRUE", "-o", "udp.check_checksum:TRUE"];

/// A protocol's checksum, as tshark names its verdict on it; ICMP's is always checked.
const VERDICTS: [&str; 5] = [
    "ip.checksum.status",
    "tcp.checksum.status",
    "udp.checksum.status",
    "icmp.checksum.status",
    "icmpv6.checksum.status",
];

/// A capture that goes on.
#[derive(Debug)]
pub struct Capture {
    process: Process,
    folder: tempfile::TempDir,
    rig: PathBuf,
}

impl Capture {
    /// Takes down whole frames on an interface of `namespace` from now on.
    ///
    /// # Panics
    /// When there is no such interface.
    #[must_use]
    pub fn start(rig: &Path, namespace: &Namespace, interface: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("dray-test").tempdir().expect("there is a temporary folder");
        let mut command = namespace.command("tcpdump");
        command.args(["-i", interface, "-n", "-U", "--immediate-mode", "-s", "0", "-B", "65536", "-Z", "root", "-w"]);
        let mut process = Process::start(command.arg(folder.path().join("frames.pcap")));
        process.wait_for_output("listening on");
        Self { process, folder, rig: rig.to_owned() }
    }

    /// Ends it.
    ///
    /// # Panics
    /// When frames were missed: no verdict would hold.
    #[must_use]
    pub fn stop(self) -> Captured {
        // Frames that the kernel has but tcpdump has not read would be lost with it: it tells of both when asked.
        wait_for("tcpdump's last frame", || {
            let before = self.process.output().len();
            self.process.signal(Signal::SIGUSR1);
            wait_for("tcpdump's counts", || self.process.output().len() > before);
            let counts = self.process.output()[before..].to_owned();
            let numbers: Vec<u64> = counts.split_whitespace().filter_map(|word| word.parse().ok()).collect();
            let [captured, received, dropped] = numbers[..] else { panic!("no counts in {counts}") };
            assert_eq!(dropped, 0, "{counts}");
            captured == received
        });
        let Self { process, folder, rig } = self;
        process.signal(Signal::SIGINT);
        let _counts = process.succeed();
        Captured { folder, rig }
    }
}

/// Frames that were taken down.
#[derive(Debug)]
pub struct Captured {
    folder: tempfile::TempDir,
    rig: PathBuf,
}

impl Captured {
    /// What tshark says of the frames that a display filter of its own lets through, all if it is empty: a line each, of these
    /// fields, separated by tabs.
    ///
    /// # Panics
    /// When tshark knows no such filter or field.
    #[must_use]
    pub fn fields(&self, filter: &str, fields: &[&str]) -> Vec<String> {
        let mut command = Command::new(self.rig.join("bin/tshark"));
        // Its standard error has only remarks, such as that it runs as root.
        command.args(["-n", "-r"]).arg(self.folder.path().join("frames.pcap")).args(CHECK).args(["-T", "fields"]);
        for field in fields {
            command.args(["-e", field]);
        }
        if !filter.is_empty() {
            command.args(["-Y", filter]);
        }
        let output = command.output().expect("tshark is in the rig");
        let remarks = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "tshark -Y {filter:?}: {remarks}");
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
    }

    /// How many frames a display filter lets through.
    ///
    /// # Panics
    /// When tshark knows no such filter.
    #[must_use]
    pub fn count(&self, filter: &str) -> usize {
        self.fields(filter, &["frame.number"]).len()
    }

    /// The frames with a bad checksum of IPv4, TCP, UDP or ICMP, a line each that says what they are. Frames whose checksum was
    /// not judged (a fragment, a UDP checksum of 0) are not among them: see `good_checksums`.
    ///
    /// # Panics
    /// When tshark fails.
    #[must_use]
    pub fn bad_checksums(&self) -> Vec<String> {
        // A kernel that completes TCP's checksum writes all ones for zero; they count the same, and tshark finds fault with them.
        let bad =
            any("0").replace("tcp.checksum.status == 0", "(tcp.checksum.status == 0 && !(tcp.checksum == 0xffff))");
        self.fields(&bad, &["frame.number", "frame.len", "frame.protocols", "_ws.col.info"])
    }

    /// How many frames have a checksum that was judged and found good.
    ///
    /// # Panics
    /// When tshark fails.
    #[must_use]
    pub fn good_checksums(&self) -> usize {
        self.count(&any("1"))
    }

    /// The file of frames, in the format of pcap.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("frames.pcap")
    }
}

/// A filter for frames of which any checksum has this verdict: 0 is bad, 1 is good.
fn any(verdict: &str) -> String {
    VERDICTS.map(|field| format!("{field} == {verdict}")).join(" || ")
}
