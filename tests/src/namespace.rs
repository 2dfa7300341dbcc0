//! A network namespace of a test's own: what traffic a test makes stays in it, and nothing of it outlives the test.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sched::{CloneFlags, setns};

use crate::Process;

/// What the names of all our namespaces start with; the id of the test's process follows.
const PREFIX: &str = "dray-test-";

/// A network namespace. With it go its interfaces, and the programs that still run in it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    rig: PathBuf,
}

impl Namespace {
    /// Makes one, with its loopback interface up; `label` makes it known to people.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new(rig: impl Into<PathBuf>, label: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        static CLEARED: Once = Once::new();
        let rig = rig.into();
        CLEARED.call_once(|| clear(&rig));
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let namespace = Self { name: format!("{PREFIX}{}-{label}-{number}", std::process::id()), rig };
        namespace.tool("ip", &["netns", "add", &namespace.name]);
        // Not one frame but those that a test sends: no router solicitations, no reports of multicast groups.
        namespace.run("sh", &["-c", "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6"]);
        namespace.ip(&["link", "set", "lo", "up"]);
        namespace
    }

    /// Its name, as `ip netns` knows it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A command that will run in it: a program of the rig where the rig has one of this name.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let of_rig = self.rig.join("bin").join(program);
        let mut command = Command::new(self.rig.join("bin/ip"));
        command.args(["netns", "exec", &self.name]);
        if of_rig.exists() {
            command.arg(of_rig)
        } else {
            command.arg(program)
        };
        command
    }

    /// Runs a command in it, which must succeed; returns what it said.
    ///
    /// # Panics
    /// When it fails.
    pub fn run(&self, program: &str, arguments: &[&str]) -> String {
        Process::start(self.command(program).args(arguments)).succeed()
    }

    /// Runs `ip` on it, which must succeed; returns what it said.
    ///
    /// # Panics
    /// When it fails.
    pub fn ip(&self, arguments: &[&str]) -> String {
        self.tool("ip", &[&["-n", &self.name], arguments].concat())
    }

    /// Joins it to `peer` by a pair of virtual Ethernet interfaces, named `own` here and `other` there; both are up.
    ///
    /// # Panics
    /// When one of these names is taken.
    pub fn join(&self, own: &str, peer: &Self, other: &str) {
        self.ip(&["link", "add", own, "type", "veth", "peer", "name", other, "netns", &peer.name]);
        self.ip(&["link", "set", own, "up"]);
        peer.ip(&["link", "set", other, "up"]);
    }

    /// Makes a tap in it, up, for a program that opens it by its name.
    ///
    /// # Panics
    /// When the name is taken.
    pub fn tap(&self, name: &str, flags: &[&str]) {
        self.ip(&[&["tuntap", "add", name, "mode", "tap"], flags].concat());
        self.ip(&["link", "set", name, "up"]);
    }

    /// Makes a bridge in it, up, with these interfaces as its ports.
    ///
    /// # Panics
    /// When the name is taken, or an interface does not exist.
    pub fn bridge(&self, name: &str, ports: &[&str]) {
        self.ip(&["link", "add", name, "type", "bridge", "forward_delay", "0"]);
        for port in ports {
            self.ip(&["link", "set", port, "master", name]);
        }
        self.ip(&["link", "set", name, "up"]);
    }

    /// Gives an interface an address, as `192.0.2.1/24` or `2001:db8::1/64`, that can be used at once.
    ///
    /// # Panics
    /// When the kernel refuses it.
    pub fn address(&self, interface: &str, address: &str) {
        if address.contains(':') {
            let path = format!("echo 0 >/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
            self.run("sh", &["-c", &path]);
        }
        let nodad: &[&str] = if address.contains(':') { &["nodad"] } else { &[] };
        self.ip(&[&["address", "add", address, "dev", interface], nodad].concat());
    }

    /// Does `work` in it, on a thread of its own: the sockets that it opens belong to this namespace.
    ///
    /// # Panics
    /// When `work` does, or the namespace cannot be entered.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = File::open(format!("/run/netns/{}", self.name)).expect("the namespace has a name");
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(file, CloneFlags::CLONE_NEWNET).expect("root may enter a namespace");
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn tool(&self, program: &str, arguments: &[&str]) -> String {
        Process::start(Command::new(self.rig.join("bin").join(program)).args(arguments)).succeed()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        remove(&self.rig, &self.name);
    }
}

/// Ends what runs in a namespace, and removes it. It says nothing: a test that fails has said why.
fn remove(rig: &Path, name: &str) {
    let ip = |arguments: &[&str]| Command::new(rig.join("bin/ip")).args(arguments).output();
    if let Ok(output) = ip(&["netns", "pids", name]) {
        for id in String::from_utf8_lossy(&output.stdout).lines().filter_map(|line| line.trim().parse().ok()) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), nix::sys::signal::Signal::SIGKILL);
        }
    }
    let _ = ip(&["netns", "delete", name]);
}

/// Removes what tests left behind that were killed: namespaces of processes that are gone.
fn clear(rig: &Path) {
    let Ok(names) = std::fs::read_dir("/run/netns") else { return };
    for name in names.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let id = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if id.is_some_and(|id| !PathBuf::from(format!("/proc/{id}")).exists()) {
            remove(rig, &name);
        }
    }
}
