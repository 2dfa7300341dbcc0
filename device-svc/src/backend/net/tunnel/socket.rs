//! The sockets of a tunnel, and what the kernel is asked of them.
//!
//! **Sent** is through a raw socket for UDP, whose header we write: so the source port can be another one for each frame, all 2^14 of
//! them, from one descriptor, and a burst to many ports and many end points is one `sendmmsg`. A pool of ordinary sockets, each with
//! a port of its own, would need no privilege (this needs `CAP_NET_RAW`), but a descriptor for each port and channel and a call for
//! each of them. A raw socket would be given a copy of every datagram that comes in; it is connected to its own address, from which
//! none comes, and that keeps the kernel from even looking.
//!
//! The kernel adds IP's header: it forbids fragments (RFC 7348, 4.3: end points must not fragment), and refuses what is longer than the
//! route takes. What a router on the way says by ICMP does not reach a socket that is connected elsewhere: that the underlay takes
//! enough all the way is the operator's to see to (RFC 7348, 4.3). Over IPv4 the checksum of UDP is 0, as both specifications advise;
//! over IPv6 the kernel computes it.
//!
//! **Received** is through ordinary sockets that share the address and port.
#![expect(unsafe_code, reason = "options of sockets, and bursts of messages, which hold addresses")]

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, SockaddrLike, SockaddrStorage, bind, connect, setsockopt, socket,
    sockopt,
};

use super::outer::OuterAddress;
use super::steering;

/// Bytes that may wait to be sent and to be received, before the kernel doubles them for its own account (and takes that twice for what
/// is sent raw): a burst of the longest frames, and what comes while a reactor does something else.
const SEND_BUFFER_BYTES: usize = 512 << 10;
const RECEIVE_BUFFER_BYTES: usize = 2 << 20;
/// Where the checksum is in UDP's header.
const CHECKSUM_AT: libc::c_int = 6;
/// Which count of `SO_MEMINFO` is of what was dropped: the last.
const MEMORY_DROPS: usize = libc::SK_MEMINFO_DROPS as usize;
/// `IPV6_CHECKSUM` of linux/in6.h.
const IPV6_CHECKSUM: libc::c_int = 7;

const FLAGS: SockFlag = SockFlag::SOCK_CLOEXEC.union(SockFlag::SOCK_NONBLOCK);

fn storage(address: OuterAddress, port: u16) -> SockaddrStorage {
    std::net::SocketAddr::new(address.ip(), port).into()
}

fn family(address: OuterAddress) -> AddressFamily {
    if address.ip().is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// Bytes of the underlay's IP header.
pub(super) fn ip_header_bytes(address: OuterAddress) -> u32 {
    if address.ip().is_ipv4() { 20 } else { 40 }
}

fn set(socket: &impl AsRawFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> Result<(), Errno> {
    let bytes = size_of_val(&value) as libc::socklen_t;
    // SAFETY: each option that is set with this reads an `int`.
    Errno::result(unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), bytes) })
        .map(|_| ())
}

fn set_program(socket: &impl AsRawFd, option: libc::c_int, program: &[libc::sock_filter]) -> Result<(), Errno> {
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    let bytes = size_of_val(&filter) as libc::socklen_t;
    // SAFETY: these options read a `sock_fprog` and as many instructions as it says, and write neither.
    Errno::result(unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const filter).cast(), bytes)
    })
    .map(|_| ())
}

/// The larger of two ways: without privilege the machine's limits (`net.core.rmem_max`) hold.
fn set_buffers(socket: &OwnedFd) -> Result<(), Errno> {
    if setsockopt(socket, sockopt::SndBufForce, &SEND_BUFFER_BYTES).is_err() {
        setsockopt(socket, sockopt::SndBuf, &SEND_BUFFER_BYTES)?;
    }
    if setsockopt(socket, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES).is_err() {
        setsockopt(socket, sockopt::RcvBuf, &RECEIVE_BUFFER_BYTES)?;
    }
    Ok(())
}

/// A socket that sends from `local` whatever has a header of UDP.
pub(super) fn open_sender(local: OuterAddress) -> Result<OwnedFd, Errno> {
    let sender = socket(family(local), SockType::Raw, FLAGS, SockProtocol::Udp)?;
    set_program(&sender, libc::SO_ATTACH_FILTER, &steering::NOTHING)?;
    set_buffers(&sender)?;
    if local.ip().is_ipv4() {
        set(&sender, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)?;
    } else {
        set(&sender, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO)?;
        set(&sender, libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, 1)?;
        set(&sender, libc::IPPROTO_IPV6, IPV6_CHECKSUM, CHECKSUM_AT)?;
    }
    bind(sender.as_raw_fd(), &storage(local, 0))?;
    // The filter alone would do; this saves the kernel a copy of each datagram.
    let _ = connect(sender.as_raw_fd(), &storage(local, 0));
    Ok(sender)
}

fn open_receiver(local: OuterAddress) -> Result<OwnedFd, Errno> {
    let receiver = socket(family(local), SockType::Datagram, FLAGS, None)?;
    if local.ip().is_ipv6() {
        set(&receiver, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
        // A checksum of 0 is allowed to tunnels (RFC 6935), and we are to take it (RFC 7348, section 5).
        set(&receiver, libc::IPPROTO_UDP, libc::UDP_NO_CHECK6_RX, 1)?;
    }
    Ok(receiver)
}

/// The first socket of a group, which takes what is for nobody, and drops it. It fails with `EADDRINUSE` when anybody else has the port.
pub(super) fn open_first_receiver(local: OuterAddress, port: u16) -> Result<OwnedFd, Errno> {
    let receiver = open_receiver(local)?;
    set_program(&receiver, libc::SO_ATTACH_FILTER, &steering::NOTHING)?;
    bind(receiver.as_raw_fd(), &storage(local, port))?;
    // Not before: only so it was alone.
    setsockopt(&receiver, sockopt::ReusePort, &true)?;
    Ok(receiver)
}

/// One more socket of the group.
pub(super) fn open_next_receiver(local: OuterAddress, port: u16) -> Result<OwnedFd, Errno> {
    let receiver = open_receiver(local)?;
    setsockopt(&receiver, sockopt::ReusePort, &true)?;
    set_buffers(&receiver)?;
    bind(receiver.as_raw_fd(), &storage(local, port))?;
    Ok(receiver)
}

/// Has the group that a socket belongs to choose by this program.
pub(super) fn steer(receiver: &OwnedFd, program: &[libc::sock_filter]) -> Result<(), Errno> {
    set_program(receiver, libc::SO_ATTACH_REUSEPORT_CBPF, program)
}

/// Throws away what waits in a socket. What comes meanwhile may stay.
pub(super) fn drain(receiver: &OwnedFd) {
    // The kernel doubles the buffer for its own account, of which the smallest datagram costs more than this.
    for _ in 0..RECEIVE_BUFFER_BYTES * 2 / 512 {
        // SAFETY: nothing is written: there is no buffer. A datagram that is cut short is gone all the same.
        let result = unsafe { libc::recv(receiver.as_raw_fd(), std::ptr::null_mut(), 0, libc::MSG_DONTWAIT) };
        if result < 0 && Errno::last() != Errno::EINTR {
            return;
        }
    }
}

/// Datagrams for which the socket had no room, since it was made; the count wraps.
pub(super) fn overflows(receiver: &OwnedFd) -> Result<u32, Errno> {
    let mut counts = [0_u32; MEMORY_DROPS + 1];
    let mut bytes = size_of_val(&counts) as libc::socklen_t;
    let to = counts.as_mut_ptr().cast();
    // SAFETY: the kernel writes as many bytes as said at most.
    let result =
        unsafe { libc::getsockopt(receiver.as_raw_fd(), libc::SOL_SOCKET, libc::SO_MEMINFO, to, &raw mut bytes) };
    Errno::result(result)?;
    Ok(counts[MEMORY_DROPS])
}

/// The interface that has an address, and whether it can carry anything: it is set up, and so is the wire behind it. In the
/// namespace.
pub(super) fn find_interface(local: OuterAddress) -> Result<Option<(String, bool)>, Errno> {
    let carries = InterfaceFlags::IFF_UP | InterfaceFlags::IFF_RUNNING;
    let found = getifaddrs()?.find(|interface| {
        interface.address.and_then(|address| of_storage(&address)).is_some_and(|address| address == local)
    });
    Ok(found.map(|interface| (interface.interface_name, interface.flags.contains(carries))))
}

fn of_storage(address: &SockaddrStorage) -> Option<OuterAddress> {
    match address.family()? {
        AddressFamily::Inet => address.as_sockaddr_in().map(|address| IpAddr::from(address.ip()).into()),
        AddressFamily::Inet6 => address.as_sockaddr_in6().map(|address| IpAddr::from(address.ip()).into()),
        _ => None,
    }
}

/// The longest IP packet that the route from `local` to `remote` takes, bytes, as far as is known now. In the namespace.
pub(super) fn path_mtu(local: OuterAddress, remote: OuterAddress) -> Result<u32, Errno> {
    let probe = socket(family(local), SockType::Datagram, FLAGS, None)?;
    bind(probe.as_raw_fd(), &storage(local, 0))?;
    // Nothing is sent by this: any port will do.
    connect(probe.as_fd().as_raw_fd(), &storage(remote, 9))?;
    let (level, option) =
        if local.ip().is_ipv4() { (libc::IPPROTO_IP, libc::IP_MTU) } else { (libc::IPPROTO_IPV6, libc::IPV6_MTU) };
    let mut mtu: libc::c_int = 0;
    let mut bytes = size_of_val(&mtu) as libc::socklen_t;
    // SAFETY: the option writes an `int`.
    Errno::result(unsafe {
        libc::getsockopt(probe.as_raw_fd(), level, option, (&raw mut mtu).cast(), &raw mut bytes)
    })?;
    Ok(u32::try_from(mtu).unwrap_or(0))
}

/// Sends messages in order until one fails. Returns how many went; an error is the first one's.
///
/// # Safety
/// All that the messages point to is valid for the call.
#[inline]
pub(super) unsafe fn send_messages(sender: &OwnedFd, messages: &mut [libc::mmsghdr]) -> Result<usize, Errno> {
    let count = messages.len() as libc::c_uint;
    // SAFETY: the list is as long as said; the rest is the caller's promise.
    Errno::result(unsafe { libc::sendmmsg(sender.as_raw_fd(), messages.as_mut_ptr(), count, libc::MSG_DONTWAIT) })
        .map(|count| count as usize)
}

/// Takes what has come. Returns how many messages were filled; an error is the first one's.
///
/// # Safety
/// All that the messages point to is valid for the call, and may be written.
#[inline]
pub(super) unsafe fn receive_messages(receiver: &OwnedFd, messages: &mut [libc::mmsghdr]) -> Result<usize, Errno> {
    let count = messages.len() as libc::c_uint;
    // SAFETY: the list is as long as said; the rest is the caller's promise.
    Errno::result(unsafe {
        libc::recvmmsg(receiver.as_raw_fd(), messages.as_mut_ptr(), count, libc::MSG_DONTWAIT, std::ptr::null_mut())
    })
    .map(|count| count as usize)
}
