//! DPDK's testpmd: a virtio-net driver without a VM (virtio-user), a vhost-user back end that is not ours (net_vhost), and a
//! source and sink of frames on an interface of the kernel (af_packet).
//!
//! It needs no huge pages: `--no-huge` puts its memory into one memory file, which a vhost-user back end can map.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::{Namespace, Process, wait_for_or};

/// Memory of one testpmd, in MiB; all of it is touched at the start.
const MEMORY_MIB: &str = "192";

/// How a virtio-user port drives its queues.
#[derive(Clone, Copy, Debug)]
pub struct Driver {
    /// Offer packed rings, not split ones.
    pub packed: bool,
    /// Offer mergeable receive buffers.
    pub mergeable: bool,
    /// Offer in-order use of buffers.
    pub in_order: bool,
    /// Use vector instructions where DPDK has them; split rings always do when neither mergeable nor held back.
    pub vectorized: bool,
    /// Queue pairs.
    pub queue_pairs: u16,
    /// Descriptors of each queue.
    pub queue_size: u16,
}

impl Default for Driver {
    /// What DPDK does unasked: a split ring of 256, mergeable, in order.
    fn default() -> Self {
        Self { packed: false, mergeable: true, in_order: true, vectorized: false, queue_pairs: 1, queue_size: 256 }
    }
}

/// One port.
#[derive(Clone, Debug)]
pub enum Port {
    /// The driver of a virtio-net device behind this vhost-user socket.
    VirtioUser(PathBuf, Driver),
    /// A vhost-user back end that listens on this socket, with so many queue pairs.
    Vhost(PathBuf, u16),
    /// An interface of the kernel, by its name.
    AfPacket(String),
}

impl Port {
    fn argument(&self, number: usize) -> String {
        match self {
            Self::VirtioUser(socket, driver) => {
                let flag = |flag: bool| u8::from(flag);
                format!(
                    "net_virtio_user{number},path={},queues={},queue_size={},packed_vq={},mrg_rxbuf={},in_order={},\
                     vectorized={}",
                    socket.display(),
                    driver.queue_pairs,
                    driver.queue_size,
                    flag(driver.packed),
                    flag(driver.mergeable),
                    flag(driver.in_order),
                    flag(driver.vectorized),
                )
            }
            Self::Vhost(socket, queue_pairs) => {
                format!("net_vhost{number},iface={},queues={queue_pairs}", socket.display())
            }
            Self::AfPacket(interface) => format!("net_af_packet{number},iface={interface},blocksz=65536,framesz=2048"),
        }
    }

    const fn queue_pairs(&self) -> u16 {
        match self {
            Self::VirtioUser(_, driver) => driver.queue_pairs,
            Self::Vhost(_, queue_pairs) => *queue_pairs,
            Self::AfPacket(_) => 1,
        }
    }
}

/// How a testpmd is started.
#[derive(Clone, Debug)]
pub struct TestpmdSettings<'a> {
    /// The CPU that it polls on.
    pub cpu: usize,
    /// What it does with frames: `txonly`, `rxonly`, `io`, `mac`, `macswap`, `flowgen`, `csum`, `icmpecho`.
    pub forward: &'a str,
    /// Bytes of each frame that `txonly` and `Testpmd::go` make, without its checksum; more than 2048 bytes go out as several
    /// segments. Frames of `flowgen` have 60 bytes, always.
    pub frame_bytes: u16,
    /// The namespace that it runs in, if not the machine's own.
    pub namespace: Option<&'a Namespace>,
    /// A program that runs testpmd, with its arguments: one that counts, or traces.
    pub under: &'a [&'a str],
    /// Further arguments of testpmd itself, such as `--txonly-multi-flow`.
    pub arguments: &'a [&'a str],
}

impl Default for TestpmdSettings<'_> {
    fn default() -> Self {
        Self { cpu: 0, forward: "io", frame_bytes: 64, namespace: None, under: &[], arguments: &[] }
    }
}

/// What one port counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortCounts {
    /// Frames that came in.
    pub received: u64,
    /// Bytes that came in.
    pub received_bytes: u64,
    /// Frames that were lost for want of a buffer, or came broken.
    pub received_errors: u64,
    /// Frames that went out.
    pub sent: u64,
    /// Bytes that went out.
    pub sent_bytes: u64,
    /// Frames that the port refused, or sent wrongly.
    pub sent_errors: u64,
}

/// A running testpmd. It forwards from `go` on, until `stop`.
#[derive(Debug)]
pub struct Testpmd {
    process: Process,
    commands: u32,
}

impl Testpmd {
    /// Starts one with these ports; returns when its ports are started. A back end is there before its driver starts.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start(rig: &Path, ports: &[Port], settings: &TestpmdSettings<'_>) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let testpmd = rig.join("bin/testpmd");
        let mut words = settings.under.iter().map(std::ffi::OsStr::new).chain([testpmd.as_os_str()]);
        let first = words.next().unwrap_or_default();
        let mut command = match settings.namespace {
            None => Command::new(first),
            Some(namespace) => namespace.command(first.to_str().expect("the rig's path is text")),
        };
        command.args(words);
        let cpu = settings.cpu;
        // One thread takes commands and sleeps, the other polls; both on the one CPU.
        command.arg("--lcores").arg(format!("0@{cpu},1@{cpu}"));
        command.args(["--no-huge", "--no-shconf", "--no-pci", "--no-telemetry", "-m", MEMORY_MIB]);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        command.arg("--file-prefix").arg(format!("dray-test-{}-{number}", std::process::id()));
        let mut queue_pairs = 1;
        for (number, port) in ports.iter().enumerate() {
            command.arg("--vdev").arg(port.argument(number));
            queue_pairs = queue_pairs.max(port.queue_pairs());
        }
        command.args(["--", "--interactive", "--disable-link-check", "--no-mlockall", "--total-num-mbufs=16384"]);
        command.arg(format!("--rxq={queue_pairs}")).arg(format!("--txq={queue_pairs}"));
        command.arg(format!("--forward-mode={}", settings.forward));
        command.arg(format!("--txpkts={}", segments(settings.frame_bytes)));
        if settings.frame_bytes > 1514 {
            command.arg(format!("--max-pkt-len={}", settings.frame_bytes + 4));
            // A driver must be asked to spread a frame over its buffers; a back end does so unasked, and refuses to be asked.
            if ports.iter().any(|port| matches!(port, Port::VirtioUser(..))) {
                command.arg("--enable-scatter");
            }
        }
        command.args(settings.arguments);
        let mut testpmd = Self { process: Process::start_with_input(&mut command), commands: 0 };
        // The first prompt comes when the ports are started.
        let _prompt = testpmd.tell("");
        let said = testpmd.process.output();
        assert!(said.contains("\nDone\n") && !said.contains("Fail"), "the ports did not start: {said}");
        testpmd
    }

    /// Tells it a command; returns all that it said until it had carried it out.
    ///
    /// # Panics
    /// When it ends, or does not answer.
    pub fn tell(&mut self, command: &str) -> String {
        self.commands += 1;
        // A remark, which it repeats and ignores, shows that it is done with all before.
        let mark = format!("# {} #", self.commands);
        let before = self.process.output().len();
        self.process.input(&format!("{command}\n{mark}\n"));
        self.process.wait_for_output(&mark);
        self.process.output().get(before..).unwrap_or_default().to_owned()
    }

    /// Lets it forward; `bursts` of 32 frames are sent first, for modes that only return what comes.
    ///
    /// # Panics
    /// When it does not.
    pub fn go(&mut self, bursts: u32) {
        let output = if bursts == 0 { self.tell("start") } else { self.tell(&format!("start tx_first {bursts}")) };
        assert!(output.contains("packet forwarding"), "{output}");
    }

    /// Stops forwarding.
    ///
    /// # Panics
    /// When it does not.
    pub fn stop(&mut self) {
        let output = self.tell("stop");
        assert!(output.contains("Done"), "{output}");
    }

    /// What a port counted since the start, or since `clear`.
    ///
    /// # Panics
    /// When there is no such port.
    pub fn counts(&mut self, port: u16) -> PortCounts {
        port_counts(&self.tell(&format!("show port stats {port}")))
    }

    /// Forgets what all ports counted.
    pub fn clear(&mut self) {
        let _ = self.tell("clear port stats all");
    }

    /// Waits until `port` has received at least so many frames.
    ///
    /// # Panics
    /// When they never come.
    pub fn wait_for_received(&mut self, port: u16, frames: u64) {
        let mut last = PortCounts::default();
        let seen = std::cell::Cell::new(last);
        wait_for_or(
            || {
                last = self.counts(port);
                seen.set(last);
                last.received >= frames
            },
            || format!("{frames} frames at port {port} of testpmd, which has {:?}", seen.get()),
        );
    }

    /// Ends it as a user does; its devices are closed in order.
    ///
    /// # Panics
    /// When it does not end well.
    pub fn quit(mut self) -> String {
        self.process.input("quit\n");
        self.process.succeed()
    }

    /// Its process.
    pub const fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// The sizes of the segments of a frame, none larger than a buffer of testpmd.
fn segments(bytes: u16) -> String {
    let mut text = String::new();
    let mut left = bytes;
    while left > 0 {
        let segment = left.min(2048);
        let comma = if text.is_empty() { "" } else { "," };
        write!(text, "{comma}{segment}").expect("a string takes all");
        left -= segment;
    }
    text
}

/// Reads what `show port stats` says: pairs of a name and a number.
fn port_counts(output: &str) -> PortCounts {
    let words: Vec<&str> = output.split_whitespace().collect();
    let number = |name: &str| {
        words
            .windows(2)
            .find_map(|pair| if pair[0] == name { pair[1].parse::<u64>().ok() } else { None })
            .unwrap_or_else(|| panic!("no {name} in {output}"))
    };
    PortCounts {
        received: number("RX-packets:"),
        received_bytes: number("RX-bytes:"),
        received_errors: number("RX-missed:") + number("RX-errors:") + number("RX-nombuf:"),
        sent: number("TX-packets:"),
        sent_bytes: number("TX-bytes:"),
        sent_errors: number("TX-errors:"),
    }
}
