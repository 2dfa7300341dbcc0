//! `/dev/net/tun`: opens queues of a tap, and says in people's words why it could not.
#![expect(unsafe_code, reason = "ioctl")]

use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;

use super::super::Offloads;
use super::super::kernel_queue::HEADER_BYTES;
use super::super::namespace::{InterfaceName, Namespace};
use crate::backend::BackendError;

const PATH: &str = "/dev/net/tun";
const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;

/// One queue of a tap.
pub(super) struct QueueFile {
    /// The descriptor, which does not block.
    pub(super) file: OwnedFd,
    /// Whether the tap stays when nobody has it open: then somebody else made it.
    pub(super) persistent: bool,
}

/// Opens one more queue of the tap of this name, which is made if there is none. It is not attached: no frame comes. To be called
/// in the namespace.
pub(super) fn open_queue(namespace: &Namespace, name: &InterfaceName) -> Result<QueueFile, BackendError> {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(PATH);
    let file: OwnedFd = opened.map_err(|error| explain_open(&error))?.into();
    let mut request = name.request();
    request.ifr_ifru.ifru_flags = FLAGS as libc::c_short;
    // SAFETY: the call reads and writes an `ifreq`.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })
        .map_err(|errno| explain_queue(namespace, name, errno))?;
    let failed = |what: &'static str| {
        move |errno: Errno| {
            BackendError::Unavailable(format!("the tap {name}{}: {what} failed: {errno}", namespace.describe()))
        }
    };
    attach(&file, false).map_err(failed("to detach a queue"))?;
    let flags = flags(&file).map_err(failed("to ask for its flags"))?;
    // Of several that have a tap open, the first one has said whether frames have headers; the others were not listened to.
    if flags & libc::IFF_VNET_HDR == 0 {
        return Err(BackendError::Unavailable(format!(
            "the tap {name}{} is in use by a program that reads its frames without headers: end that program",
            namespace.describe()
        )));
    }
    let persistent = flags & libc::IFF_PERSIST != 0;
    set(&file, libc::TUNSETVNETHDRSZ as _, HEADER_BYTES as i32).map_err(failed("to set the length of its header"))?;
    // Both say how frames' headers are read from here on: as virtio 1 has them, little-endian.
    set(&file, libc::TUNSETVNETLE as _, 1).map_err(failed("to set the order of bytes in its header"))?;
    Ok(QueueFile { file, persistent })
}

/// Whether a tap stays when nobody has it open.
pub(super) fn is_persistent(file: &OwnedFd) -> Result<bool, Errno> {
    Ok(flags(file)? & libc::IFF_PERSIST != 0)
}

fn flags(file: &OwnedFd) -> Result<i32, Errno> {
    // SAFETY: an `ifreq` is plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the call writes an `ifreq`.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) })?;
    // SAFETY: the kernel has filled this member.
    Ok(i32::from(unsafe { request.ifr_ifru.ifru_flags }))
}

/// Has frames come to a queue, or not: then what waits in it is thrown away.
pub(super) fn attach(file: &OwnedFd, attached: bool) -> Result<(), Errno> {
    // SAFETY: an `ifreq` is plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let flag = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    request.ifr_ifru.ifru_flags = flag as libc::c_short;
    // SAFETY: the call reads an `ifreq`.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETQUEUE as _, &raw mut request) }).map(|_| ())
}

/// From now on the kernel leaves no more undone of what it hands over.
pub(super) fn set_offloads(file: &OwnedFd, offloads: Offloads) -> Result<(), Errno> {
    let mut flags = 0;
    // The kernel refuses all others without the first, and of the last one without the other.
    if offloads.checksum {
        flags = libc::TUN_F_CSUM;
        for (wanted, flag) in [
            (offloads.tso4, libc::TUN_F_TSO4),
            (offloads.tso6, libc::TUN_F_TSO6),
            (offloads.ecn && (offloads.tso4 || offloads.tso6), libc::TUN_F_TSO_ECN),
            (offloads.uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
        ] {
            flags |= if wanted { flag } else { 0 };
        }
    }
    // SAFETY: this one takes the flags themselves.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(flags)) })
        .map(|_| ())
}

fn set(file: &OwnedFd, what: libc::c_ulong, value: i32) -> Result<(), Errno> {
    // SAFETY: what is set with this reads an `int`.
    Errno::result(unsafe { libc::ioctl(file.as_fd().as_raw_fd(), what as _, &raw const value) }).map(|_| ())
}

fn explain_open(error: &std::io::Error) -> BackendError {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => BackendError::Refused(format!(
            "there is no {PATH}, which a tap needs: `modprobe tun`, and in a container pass the device in"
        )),
        Some(libc::EACCES | libc::EPERM) => BackendError::Refused(format!(
            "{PATH} may not be opened: run as root, or allow the device to this user (and to this container)"
        )),
        _ => BackendError::Unavailable(format!("{PATH} cannot be opened: {error}")),
    }
}

fn explain_queue(namespace: &Namespace, name: &InterfaceName, errno: Errno) -> BackendError {
    let place = namespace.describe();
    match errno {
        Errno::EPERM | Errno::EACCES => BackendError::Refused(format!(
            "the tap {name}{place} may not be used: that needs CAP_NET_ADMIN, or a tap made for this user (`ip tuntap add dev \
             {name} mode tap multi_queue user NAME`)"
        )),
        Errno::EINVAL => match namespace.driver(name) {
            Ok((driver, bus)) if driver == "tun" && bus == "tap" => BackendError::Refused(format!(
                "the tap {name}{place} is there, but not for many queues: delete it (`ip link delete {name}`) and have it made \
                 here, or by `ip tuntap add dev {name} mode tap multi_queue`"
            )),
            Ok((driver, _)) => BackendError::Refused(format!(
                "the interface {name}{place} is there and no tap (its driver is {driver}): choose another name"
            )),
            Err(_) => BackendError::Refused(format!("the tap {name}{place} cannot be made: {errno}")),
        },
        Errno::EBUSY | Errno::E2BIG => BackendError::Unavailable(format!(
            "the tap {name}{place} has all the queues that it can have ({errno}): end the program that uses it"
        )),
        _ => BackendError::Unavailable(format!("the tap {name}{place} cannot be opened: {errno}")),
    }
}
