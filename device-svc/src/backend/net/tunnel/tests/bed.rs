//! Where tunnels are tried: a network namespace of the test's own, with some addresses between which datagrams travel.
#![expect(unsafe_code, reason = "lends frames to a channel, and binds packet sockets")]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, setsockopt, socket, sockopt};

use super::super::super::namespace::Namespace;
use super::super::super::{NetBackend, NetChannel, NetHeader, Outgoing, Sent};
use super::super::remotes::Learning;
use super::super::wire::TunnelKind;
use super::super::{TunnelBackend, TunnelSettings};
use crate::backend::Segments;

const PATIENCE: Duration = Duration::from_secs(30);
/// Addresses of a bed: 10.9.0.1 and 2001:db8::1 to .60 and ::3c.
const ADDRESSES: u8 = 60;

/// A network namespace that goes with it.
pub(super) struct Bed {
    pub(super) name: String,
    pub(super) namespace: Namespace,
}

/// One of the addresses.
pub(super) fn address(six: bool, number: u8) -> IpAddr {
    if six { IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, number.into()]) } else { IpAddr::from([10, 9, 0, number]) }
}

impl Bed {
    /// `None` where the test cannot run.
    pub(super) fn new() -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let usable = nix::unistd::geteuid().is_root() && io_uring::IoUring::new(2).is_ok();
        if !usable {
            eprintln!("skipped: tunnels need root and io_uring");
            return None;
        }
        let name = format!("dray-tunnel-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name]);
        let bed = Self { namespace: Namespace::open(Some(&name)).unwrap(), name };
        // The underlay: what is for these addresses goes by the loopback interface, which answers no ping and asks for nothing.
        bed.ip("link add under0 type veth peer name under1");
        for interface in ["under0", "under1", "lo"] {
            bed.ip(&format!("link set {interface} mtu 1500 up"));
        }
        let lines = (1..=ADDRESSES).flat_map(|number| {
            [(false, 24, ""), (true, 64, " nodad")]
                .map(|(six, bits, how)| format!("address add {}/{bits} dev under0{how}\n", address(six, number)))
        });
        let batch = std::env::temp_dir().join(format!("{}.batch", bed.name));
        std::fs::write(&batch, lines.collect::<String>()).unwrap();
        bed.ip(&format!("-batch {}", batch.display()));
        std::fs::remove_file(batch).unwrap();
        Some(bed)
    }

    pub(super) fn ip(&self, line: &str) {
        ip(&[&["-n", &self.name][..], &line.split_whitespace().collect::<Vec<_>>()].concat());
    }

    /// Runs `tc`. Returns whether that went well.
    pub(super) fn tc(&self, line: &str) -> bool {
        let status = Command::new("tc").args(["-n", &self.name]).args(line.split(' ')).status();
        status.is_ok_and(|status| status.success())
    }

    /// The settings of a tunnel between address `local` and those of `remotes`.
    pub(super) fn settings(&self, six: bool, vni: u32, local: u8, remotes: &[u8]) -> TunnelSettings {
        TunnelSettings {
            kind: TunnelKind::Vxlan,
            vni,
            local: address(six, local),
            remotes: remotes.iter().map(|number| address(six, *number)).collect(),
            learning: Learning::Listed,
            port: TunnelKind::Vxlan.port(),
            mtu: None,
            netns: Some(self.name.clone()),
        }
    }

    pub(super) fn tunnel(&self, vni: u32, local: u8, remotes: &[u8]) -> TunnelBackend {
        TunnelBackend::new(&self.settings(false, vni, local, remotes)).unwrap()
    }

    /// An end point that is none of ours: it takes datagrams and sends what it is told.
    pub(super) fn stranger(&self, number: u8) -> UdpSocket {
        let place = SocketAddr::new(address(false, number), TunnelKind::Vxlan.port());
        let stranger = self.namespace.run(|| UdpSocket::bind(place)).unwrap().unwrap();
        setsockopt(&stranger, sockopt::RcvBufForce, &(32 << 20)).unwrap();
        stranger.set_nonblocking(true).unwrap();
        stranger
    }

    /// A packet socket on an interface.
    pub(super) fn packets(&self, interface: &str) -> OwnedFd {
        let open = || {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let packets = socket(AddressFamily::Packet, SockType::Raw, flags, None).unwrap();
            let index = nix::net::if_::if_nametoindex(interface).unwrap();
            // SAFETY: an address is plain data, and as long as said.
            unsafe {
                let mut address: libc::sockaddr_ll = std::mem::zeroed();
                address.sll_family = libc::AF_PACKET as u16;
                address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
                address.sll_ifindex = index as i32;
                let length = size_of_val(&address) as libc::socklen_t;
                Errno::result(libc::bind(packets.as_raw_fd(), (&raw const address).cast(), length)).unwrap();
                let on: libc::c_int = 1;
                let option = libc::PACKET_IGNORE_OUTGOING;
                let set = libc::setsockopt(packets.as_raw_fd(), libc::SOL_PACKET, option, (&raw const on).cast(), 4);
                Errno::result(set).unwrap();
            }
            packets
        };
        self.namespace.run(open).unwrap()
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

/// What has come to a socket.
pub(super) fn received(socket: &impl AsRawFd) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let mut buffer = vec![0; 70000];
    while let Ok(bytes) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
        all.push(buffer[..bytes].to_vec());
    }
    all
}

/// A station.
pub(super) fn station(number: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, number]
}

/// A frame with a number in it.
pub(super) fn frame(to: [u8; 6], from: [u8; 6], number: usize, bytes: usize) -> Vec<u8> {
    let mut frame = vec![0x5a; bytes];
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&from);
    // An EtherType for experiments.
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame[14..18].copy_from_slice(&(number as u32).to_le_bytes());
    frame
}

/// Gives frames to a channel, each in two ranges.
pub(super) fn transmit(channel: &mut dyn NetChannel, frames: &[Vec<u8>]) -> Sent {
    let ranges: Vec<[libc::iovec; 2]> = frames
        .iter()
        .map(|bytes| {
            let (first, rest) = bytes.split_at(bytes.len() / 2);
            [first, rest].map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() })
        })
        .collect();
    let outgoing: Vec<Outgoing> = frames
        .iter()
        .zip(&ranges)
        .map(|(bytes, ranges)| Outgoing {
            header: NetHeader::DONE,
            // SAFETY: the ranges outlive the call.
            segments: unsafe { Segments::new(ranges.as_ptr(), 2) },
            bytes: bytes.len() as u32,
        })
        .collect();
    channel.transmit(&outgoing)
}

/// What a channel has now.
pub(super) fn came(channel: &mut dyn NetChannel) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    loop {
        let frames = channel.receive(usize::MAX);
        if frames.is_empty() {
            return all;
        }
        all.extend(frames.iter().map(|frame| frame.bytes().to_vec()));
        let count = frames.len();
        channel.release(count);
    }
}

/// Waits until a channel has brought so many frames.
#[track_caller]
pub(super) fn take(channel: &mut dyn NetChannel, count: usize) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    until(|| {
        all.extend(came(channel));
        all.len() >= count
    });
    all
}

/// A channel that is enabled.
pub(super) fn channel(tunnel: &TunnelBackend) -> Box<dyn NetChannel> {
    let mut channel = tunnel.open_channel().unwrap();
    channel.enable(true);
    channel
}

pub(super) const fn sent(taken: usize, lost: usize) -> Sent {
    Sent { taken, lost }
}
