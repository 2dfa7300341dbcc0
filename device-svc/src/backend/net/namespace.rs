//! A network namespace and the interfaces in it: what uplinks to the kernel's own network ask of it.
//!
//! A descriptor belongs to the namespace of the thread that opened it. So what is opened in another namespace is opened by a thread
//! that lives for just that, and questions about interfaces go through a socket that was opened there.
#![expect(unsafe_code, reason = "ioctl")]

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::backend::BackendError;

/// Where `ip netns` keeps the names of namespaces.
const NAMES: &str = "/run/netns";
/// The name of a network namespace that has none.
const OWN: &str = "/proc/thread-self/ns/net";
/// `struct ethtool_drvinfo`, and where it has the name of the driver and of the bus.
const DRIVER_INFO_BYTES: usize = 196;
const DRIVER: usize = 4;
const BUS: usize = 4 + 3 * 32;
/// `struct ethtool_channels`, and where it has how many queues are in use.
const CHANNELS_WORDS: usize = 9;
const RECEIVE_COUNT: usize = 5;
const COMBINED_COUNT: usize = 8;
/// `ETHTOOL_GCHANNELS`.
const GET_CHANNELS: u32 = 0x3c;
/// `ETHTOOL_GDRVINFO`.
const GET_DRIVER_INFO: u32 = 3;

/// A network namespace.
#[derive(Debug)]
pub(super) struct Namespace {
    /// `None`: the one that we are in.
    name: Option<String>,
    file: File,
    /// A socket in it, for questions about interfaces.
    socket: OwnedFd,
}

impl Namespace {
    /// The namespace that `ip netns` knows by this name, or the one that the calling thread is in.
    pub(super) fn open(name: Option<&str>) -> Result<Self, BackendError> {
        let path = match name {
            None => OWN.to_owned(),
            Some(name) if name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) => {
                return Err(BackendError::Refused(format!("{name:?} is no name of a network namespace")));
            }
            Some(name) => format!("{NAMES}/{name}"),
        };
        let what = name.unwrap_or("of this process");
        let file = File::open(&path).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT) => BackendError::Unavailable(format!(
                "there is no network namespace {what}: make it with `ip netns add {what}` (looked for {path})"
            )),
            _ => BackendError::Unavailable(format!("the network namespace {what} cannot be opened ({path}): {error}")),
        })?;
        let open_socket = || socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None);
        let in_it = name.map(|_| &file);
        let socket = run_in(in_it, what, open_socket)?.map_err(|errno| {
            BackendError::Unavailable(format!("no socket in the network namespace {what}: {errno}"))
        })?;
        Ok(Self { name: name.map(str::to_owned), file, socket })
    }

    /// For people.
    pub(super) fn describe(&self) -> String {
        self.name.as_ref().map_or_else(String::new, |name| format!(" in the network namespace {name}"))
    }

    /// What tells it from every other: device and inode.
    pub(super) fn identity(&self) -> Result<(u64, u64), BackendError> {
        let metadata = self.file.metadata().map_err(|error| {
            BackendError::Unavailable(format!("a network namespace{} cannot be looked at: {error}", self.describe()))
        })?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// Does something in it, and waits for that.
    pub(super) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, BackendError> {
        run_in(self.name.as_ref().map(|_| &self.file), self.name.as_deref().unwrap_or_default(), work)
    }

    /// Takes the calling thread into it, for good.
    pub(super) fn enter(&self) -> Result<(), Errno> {
        if self.name.is_some() { setns(&self.file, CloneFlags::CLONE_NEWNET) } else { Ok(()) }
    }

    /// The number of an interface; `None` if there is none of this name.
    pub(super) fn index(&self, interface: &InterfaceName) -> Option<i32> {
        let mut request = interface.request();
        self.ask(libc::SIOCGIFINDEX, &mut request).ok()?;
        // SAFETY: the kernel has filled this member.
        Some(unsafe { request.ifr_ifru.ifru_ifindex })
    }

    /// Whether it has been set up (`IFF_UP`), whatever its own carrier is.
    pub(super) fn is_up(&self, interface: &InterfaceName) -> Result<bool, Errno> {
        Ok(self.flags(interface)? & libc::IFF_UP as libc::c_short != 0)
    }

    /// Whether it has been set up and has a carrier of its own, as far as its driver knows (`IFF_RUNNING`).
    pub(super) fn is_running(&self, interface: &InterfaceName) -> Result<bool, Errno> {
        let wanted = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        Ok(self.flags(interface)? & wanted == wanted)
    }

    /// Sets it up.
    pub(super) fn set_up(&self, interface: &InterfaceName) -> Result<(), Errno> {
        let flags = self.flags(interface)?;
        if flags & libc::IFF_UP as libc::c_short != 0 {
            return Ok(());
        }
        let mut request = interface.request();
        request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
        self.ask(libc::SIOCSIFFLAGS, &mut request)
    }

    fn flags(&self, interface: &InterfaceName) -> Result<libc::c_short, Errno> {
        let mut request = interface.request();
        self.ask(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the kernel has filled this member.
        Ok(unsafe { request.ifr_ifru.ifru_flags })
    }

    /// The largest IP packet of an interface, bytes.
    pub(super) fn mtu(&self, interface: &InterfaceName) -> Result<u16, Errno> {
        let mut request = interface.request();
        self.ask(libc::SIOCGIFMTU, &mut request)?;
        // SAFETY: the kernel has filled this member.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        Ok(mtu.clamp(0, i32::from(u16::MAX)) as u16)
    }

    /// How many queues an interface receives by, as `ethtool -l` shows them; an error where its driver does not say.
    pub(super) fn receive_queues(&self, interface: &InterfaceName) -> Result<u32, Errno> {
        let mut channels = [0u32; CHANNELS_WORDS];
        channels[0] = GET_CHANNELS;
        let mut request = interface.request();
        request.ifr_ifru.ifru_data = channels.as_mut_ptr().cast();
        self.ask(libc::SIOCETHTOOL as _, &mut request)?;
        Ok(channels[RECEIVE_COUNT].saturating_add(channels[COMBINED_COUNT]))
    }

    /// Sets that.
    pub(super) fn set_mtu(&self, interface: &InterfaceName, mtu: u16) -> Result<(), Errno> {
        let mut request = interface.request();
        request.ifr_ifru.ifru_mtu = mtu.into();
        self.ask(libc::SIOCSIFMTU, &mut request)
    }

    /// The driver of an interface and its bus, as `ethtool -i` shows them.
    pub(super) fn driver(&self, interface: &InterfaceName) -> Result<(String, String), Errno> {
        let mut info = [0u8; DRIVER_INFO_BYTES];
        info[..4].copy_from_slice(&GET_DRIVER_INFO.to_ne_bytes());
        let mut request = interface.request();
        request.ifr_ifru.ifru_data = info.as_mut_ptr().cast();
        self.ask(libc::SIOCETHTOOL as _, &mut request)?;
        let text =
            |at: usize| info[at..at + 32].iter().take_while(|byte| **byte != 0).map(|byte| *byte as char).collect();
        Ok((text(DRIVER), text(BUS)))
    }

    fn ask(&self, question: libc::c_ulong, request: &mut libc::ifreq) -> Result<(), Errno> {
        // SAFETY: each question that is asked here reads and writes one `ifreq`, and what that points to is as long as asked for.
        Errno::result(unsafe { libc::ioctl(self.socket.as_raw_fd(), question as _, std::ptr::from_mut(request)) })
            .map(|_| ())
    }
}

/// Runs `work` on a thread of its own in the namespace, or here if none is given.
fn run_in<T: Send>(file: Option<&File>, what: &str, work: impl FnOnce() -> T + Send) -> Result<T, BackendError> {
    let Some(file) = file else { return Ok(work()) };
    let done =
        std::thread::scope(|scope| scope.spawn(|| setns(file, CloneFlags::CLONE_NEWNET).map(|()| work())).join());
    match done {
        Ok(Ok(result)) => Ok(result),
        Ok(Err(errno)) => Err(BackendError::Refused(format!(
            "the network namespace {what} cannot be entered: {errno}; that needs CAP_SYS_ADMIN"
        ))),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// The name of an interface, which the kernel would take.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct InterfaceName(String);

impl InterfaceName {
    /// Checks it: 1 to 15 bytes, and nothing that the kernel gives a meaning (a `%d` would be a number of its choice).
    pub(super) fn new(name: &str) -> Result<Self, BackendError> {
        let good = (1..libc::IFNAMSIZ).contains(&name.len())
            && name != "."
            && name != ".."
            && name.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%'));
        if good {
            Ok(Self(name.to_owned()))
        } else {
            Err(BackendError::Refused(format!(
                "{name:?} is no name of an interface: 1 to {} letters and digits",
                libc::IFNAMSIZ - 1
            )))
        }
    }

    /// A request about this interface.
    pub(super) fn request(&self) -> libc::ifreq {
        // SAFETY: an `ifreq` is plain data.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(self.0.bytes()) {
            *to = from as libc::c_char;
        }
        request
    }
}

impl std::fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}
