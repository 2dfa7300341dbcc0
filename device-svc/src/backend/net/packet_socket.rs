//! Packet sockets: opens them on an interface, and has frames come to them or not.
#![expect(unsafe_code, reason = "addresses and options of sockets that the wrappers do not have")]

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::sockopt::SocketError;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, getsockopt, recv, socket};

use super::kernel_queue::HEADER_BYTES;

/// Memory for frames that wait to be read, bytes as the kernel counts them (a small frame is 768 or so): about 5 ms of small frames.
const RECEIVE_BYTES: libc::c_int = 4 << 20;
/// Memory for frames that wait to be sent: a dozen of the longest, which a driver without segmentation offload takes a while for.
const SEND_BYTES: libc::c_int = 1 << 20;
/// `PACKET_VNET_HDR_SZ` of `linux/if_packet.h`.
const PACKET_VNET_HDR_SZ: libc::c_int = 24;
/// Frames that are thrown away in one go, at most: more than a socket's memory holds.
const DRAINED_MAX: usize = 1 << 14;

/// A socket on an interface that no frame comes to.
pub(super) fn open(index: i32) -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    // Without a protocol nothing comes.
    let file = socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
    bind(&file, index, false)?;
    Ok(file)
}

/// A socket on an interface for frames with virtio headers, that has this filter.
pub(super) fn open_channel(index: i32, filter: &[libc::sock_filter]) -> Result<OwnedFd, Errno> {
    let file = open(index)?;
    for option in [libc::PACKET_VNET_HDR, libc::PACKET_AUXDATA, libc::PACKET_IGNORE_OUTGOING] {
        set(&file, libc::SOL_PACKET, option, &1)?;
    }
    let sizes =
        [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, RECEIVE_BYTES), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, SEND_BYTES)];
    for (forced, asked, bytes) in sizes {
        if set(&file, libc::SOL_SOCKET, forced, &bytes).is_err() {
            set(&file, libc::SOL_SOCKET, asked, &bytes)?;
        }
    }
    set_filter(&file, filter)?;
    bind(&file, index, true)?;
    Ok(file)
}

fn address() -> libc::sockaddr_ll {
    // SAFETY: an address is plain data.
    unsafe { std::mem::zeroed() }
}

/// Binds a socket to an interface: frames of all protocols come to it, or none.
pub(super) fn bind(file: &OwnedFd, index: i32, frames: bool) -> Result<(), Errno> {
    let protocol = if frames { (libc::ETH_P_ALL as u16).to_be() } else { 0 };
    let family = libc::AF_PACKET as u16;
    let address = libc::sockaddr_ll { sll_family: family, sll_protocol: protocol, sll_ifindex: index, ..address() };
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address is as long as said.
    Errno::result(unsafe { libc::bind(file.as_raw_fd(), (&raw const address).cast(), length) }).map(|_| ())
}

fn bound(file: &OwnedFd) -> Result<libc::sockaddr_ll, Errno> {
    let mut address = address();
    let mut length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address has room for as many bytes as said.
    Errno::result(unsafe { libc::getsockname(file.as_raw_fd(), (&raw mut address).cast(), &raw mut length) })?;
    Ok(address)
}

/// The number of the interface that it is bound to; none has -1.
pub(super) fn bound_to(file: &OwnedFd) -> Result<i32, Errno> {
    Ok(bound(file)?.sll_ifindex)
}

/// Whether the interface that it is bound to has frames with Ethernet headers.
pub(super) fn has_ethernet(file: &OwnedFd) -> Result<bool, Errno> {
    Ok([libc::ARPHRD_ETHER, libc::ARPHRD_LOOPBACK].contains(&bound(file)?.sll_hatype))
}

/// From now on the interface takes frames for every address, until the socket is closed or the interface deleted.
pub(super) fn make_promiscuous(file: &OwnedFd, index: i32) -> Result<(), Errno> {
    let mode = libc::PACKET_MR_PROMISC as libc::c_ushort;
    let request = libc::packet_mreq { mr_ifindex: index, mr_type: mode, mr_alen: 0, mr_address: [0; 8] };
    set(file, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &request)
}

/// Whether this kernel cuts UDP datagrams of packet sockets (Linux 6.2). It can only be asked for what came a little later, in 6.5.
pub(super) fn cuts_datagrams(file: &OwnedFd) -> bool {
    set(file, libc::SOL_PACKET, PACKET_VNET_HDR_SZ, &(HEADER_BYTES as libc::c_int)).is_ok()
}

/// From now on only frames that this filter lets through come to a socket.
pub(super) fn set_filter(file: &OwnedFd, filter: &[libc::sock_filter]) -> Result<(), Errno> {
    // The kernel copies the instructions, and does not write to them.
    let program = libc::sock_fprog { len: filter.len() as libc::c_ushort, filter: filter.as_ptr().cast_mut() };
    set(file, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

/// Forgets that the interface was down, which the next call would be told instead of being carried out.
pub(super) fn clear_error(file: &OwnedFd) {
    let _ = getsockopt(file, SocketError);
}

/// Frames that the kernel had no memory for since this was last asked.
pub(super) fn missed(file: &OwnedFd) -> Result<u64, Errno> {
    let mut counts = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut length = size_of_val(&counts) as libc::socklen_t;
    let (level, option) = (libc::SOL_PACKET, libc::PACKET_STATISTICS);
    let to = (&raw mut counts).cast();
    // SAFETY: the kernel writes as many bytes as said at most.
    Errno::result(unsafe { libc::getsockopt(file.as_raw_fd(), level, option, to, &raw mut length) })?;
    Ok(counts.tp_drops.into())
}

/// Throws away what waits in a socket.
pub(super) fn drain(file: &OwnedFd) {
    let mut header = [0; HEADER_BYTES as usize];
    for _ in 0..DRAINED_MAX {
        // What does not fit is cut off; an error other than that there is nothing ends with being told.
        if recv(file.as_raw_fd(), &mut header, MsgFlags::MSG_DONTWAIT) == Err(Errno::EAGAIN) {
            return;
        }
    }
}

/// Sets an option; `value` is what the kernel reads for it.
fn set<T>(file: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &T) -> Result<(), Errno> {
    let value: *const T = value;
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the value is as long as said, and the addresses in it (a filter's) are valid while the call runs.
    Errno::result(unsafe { libc::setsockopt(file.as_raw_fd(), level, option, value.cast(), length) }).map(|_| ())
}
