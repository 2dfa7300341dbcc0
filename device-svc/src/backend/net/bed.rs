//! Where networks of the kernel's are tried: a network namespace of the test's own.
#![expect(unsafe_code, reason = "sets options of sockets, and lends frames to a channel")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod frames;

use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

pub(super) use self::frames::{
    EXPERIMENT, Sleeper, all_sent, frame, give, is_valid, number, plain, received, tagged, take, transmit, transport,
};
use super::namespace::{InterfaceName, Namespace};

/// The near end of a wire, and the far one.
pub(super) const OWN: &str = "wire0";
pub(super) const FAR: &str = "far0";
/// How long a test waits for what must come.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// A network namespace that goes with it.
pub(super) struct Bed {
    name: String,
    pub(super) namespace: Namespace,
}

impl Bed {
    /// `None` where the test cannot run.
    pub(super) fn new() -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let usable = nix::unistd::geteuid().is_root()
            && std::fs::File::open("/dev/net/tun").is_ok()
            && io_uring::IoUring::new(2).is_ok();
        if !usable {
            eprintln!("skipped: networks of the kernel's need root, /dev/net/tun and io_uring");
            return None;
        }
        let name = format!("dray-bed-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name]);
        // Nobody but the test speaks: no router solicitation.
        ip(&["netns", "exec", &name, "sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1"]);
        Some(Self { namespace: Namespace::open(Some(&name)).unwrap(), name })
    }

    pub(super) fn ip(&self, arguments: &[&str]) {
        ip(&[&["-n", &self.name], arguments].concat());
    }

    /// Runs `tc`. Returns whether that went well.
    pub(super) fn tc(&self, arguments: &str) -> bool {
        let status = Command::new("tc").args(["-n", &self.name]).args(arguments.split(' ')).status();
        status.is_ok_and(|status| status.success())
    }

    /// Makes two ends of a wire; both are up.
    pub(super) fn wire(&self) {
        self.ip(&["link", "add", OWN, "type", "veth", "peer", "name", FAR]);
        self.ip(&["link", "set", FAR, "up"]);
        self.ip(&["link", "set", OWN, "up"]);
        self.settle();
    }

    /// Waits until both ends of the wire carry frames.
    pub(super) fn settle(&self) {
        self.settle_all([OWN, FAR]);
    }

    /// Waits until interfaces carry frames: after they are up the kernel drops them for a while, and calls it success.
    pub(super) fn settle_all<const COUNT: usize>(&self, interfaces: [&str; COUNT]) {
        let names = interfaces.map(|name| InterfaceName::new(name).unwrap());
        until(|| names.iter().all(|name| self.namespace.is_running(name) == Ok(true)));
        // Whoever changes a link waits until the kernel is done with the last change.
        interfaces.iter().for_each(|name| self.ip(&["link", "set", name, "up"]));
    }

    /// Has an interface leave nothing undone of what it sends, as `ethtool -K … tx off` does.
    pub(super) fn leave_nothing_undone(&self, interface: &str) {
        let interface = InterfaceName::new(interface).unwrap();
        let open = || socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None);
        let asker = self.namespace.run(open).unwrap().unwrap();
        // `ETHTOOL_STXCSUM`, `ETHTOOL_STSO` and `ETHTOOL_SGSO`, each with a `struct ethtool_value`.
        for command in [0x17u32, 0x1f, 0x24] {
            let mut value = [command, 0];
            let mut request = interface.request();
            request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
            // SAFETY: the call reads an `ifreq`, and the value that it leads to.
            let result = unsafe { libc::ioctl(asker.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) };
            // What it cannot do it does not leave undone.
            assert!([Ok(0), Err(Errno::EOPNOTSUPP)].contains(&Errno::result(result)), "{command:#x}");
        }
    }

    /// Whether there is an interface of this name.
    pub(super) fn has(&self, interface: &str) -> bool {
        self.namespace.index(&InterfaceName::new(interface).unwrap()).is_some()
    }

    /// Its name, as `ip netns` knows it.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// A packet socket on an interface; with virtio-net headers or without.
    pub(super) fn packets(&self, interface: &str, headers: bool) -> OwnedFd {
        let index = self.namespace.index(&InterfaceName::new(interface).unwrap()).unwrap();
        let open =
            || socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None);
        let packets = self.namespace.run(open).unwrap().unwrap();
        let set = |option: libc::c_int, value: libc::c_int| {
            // SAFETY: the option is an `int`.
            Errno::result(unsafe {
                libc::setsockopt(packets.as_raw_fd(), libc::SOL_PACKET, option, (&raw const value).cast(), 4)
            })
            .unwrap();
        };
        set(libc::PACKET_IGNORE_OUTGOING, 1);
        if headers {
            set(libc::PACKET_VNET_HDR, 1);
        }
        // A reader that waits for something else meanwhile loses nothing.
        let room: libc::c_int = 32 << 20;
        // SAFETY: the option is an `int`.
        let result = unsafe {
            libc::setsockopt(packets.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, (&raw const room).cast(), 4)
        };
        Errno::result(result).unwrap();
        // SAFETY: an address is plain data, and as long as said.
        unsafe {
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
            address.sll_ifindex = index;
            let length = size_of_val(&address) as libc::socklen_t;
            Errno::result(libc::bind(packets.as_raw_fd(), (&raw const address).cast(), length)).unwrap();
        }
        packets
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

fn ip(arguments: &[&str]) {
    let done = Command::new("ip").args(arguments).output().unwrap();
    assert!(done.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
}

#[track_caller]
pub(super) fn until(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited in vain");
        std::thread::sleep(Duration::from_millis(2));
    }
}
