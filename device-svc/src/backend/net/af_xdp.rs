//! An interface that is there, past the kernel's stack: frames go between the VM and the driver, in memory that both sides share.
//!
//! ```text
//!   AfXdpBackend ── Device: the interface, watched                       ../watch.rs, ../namespace.rs, ../packet_socket.rs
//!        │            └─ the program that parts its frames               program.rs
//!        └─ XdpChannel, for each queue pair                              channel.rs
//!             └─ XdpSocket, for one queue: memory and four rings         socket.rs, ring.rs
//! ```
//!
//! While a queue pair is in use, all that comes by its queue of the interface is the VM's; otherwise the card's stack has it. A
//! driver without support of its own runs nothing of this, and the kernel does it in its place, with copies.
//!
//! There is no header: a frame is as it is on a wire, and whatever a VM leaves undone, software offload does. What the far end of a veth
//! leaves undone is lost on the way, so there the far end must leave nothing (`ethtool -K … tx off`). A driver must leave VLAN tags where
//! they are (`rxvlan off`).
//!
//! When the interface is deleted its sockets are dead for good; as soon as there is one of its name each channel is given a new one,
//! as a tap's are.

mod channel;
mod program;
mod ring;
mod socket;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use self::channel::{Slot, XdpChannel};
use self::program::{Attached, Mode, Program};
use self::socket::{MTU_MAX, XdpSocket};
use super::namespace::{InterfaceName, Namespace};
use super::watch::{Watch, Watched};
use super::{Carrier, NetBackend, NetChannel, NetInfo, Offloads, packet_socket};
use crate::backend::BackendError;

/// The least that IPv4 allows (RFC 791).
const MTU_MIN: u16 = 68;
/// The kernel takes this long at most to let go of a queue whose socket was closed.
const LET_GO: Duration = Duration::from_secs(2);

/// Which interface it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AfXdpSettings {
    /// Its name: 1 to 15 bytes. It must be there, and carry Ethernet.
    pub interface: String,
    /// The network namespace that it is in, as `ip netns` names it; none: the one of this process.
    pub netns: Option<String>,
    /// Its first so many queues: 1 or more.
    pub queues: u16,
}

/// The control half.
#[derive(Debug)]
pub struct AfXdpBackend {
    device: Arc<Device>,
    info: NetInfo,
}

impl AfXdpBackend {
    /// Opens the interface and puts the program on it.
    ///
    /// # Errors
    /// `Refused` when we may not, the kernel has no AF_XDP, the interface carries no Ethernet, has fewer queues or another's program;
    /// `Unavailable` when it or its namespace is not there.
    pub fn new(settings: &AfXdpSettings) -> Result<Self, BackendError> {
        let name = InterfaceName::new(&settings.interface)?;
        let watch = Watch::open(settings.netns.as_deref())?;
        let namespace = Arc::clone(watch.namespace());
        let place = namespace.describe();
        let Some(index) = namespace.index(&name) else {
            return Err(BackendError::Unavailable(format!(
                "there is no interface {name}{place}: make it, or name one of those that `ip link` shows there"
            )));
        };
        let explain = |errno| explain(&name, &namespace, errno);
        let keeper = namespace.run(|| packet_socket::open(index))?.map_err(explain)?;
        if !packet_socket::has_ethernet(&keeper).map_err(explain)? {
            let what = format!("the interface {name}{place} carries no Ethernet frames: choose another");
            return Err(BackendError::Refused(what));
        }
        check_queues(&namespace, &name, settings.queues)?;
        let interface_mtu = namespace.mtu(&name).map_err(explain)?.max(MTU_MIN);
        if interface_mtu > MTU_MAX {
            tracing::warn!("the interface {name}{place} has an MTU of {interface_mtu}; AF_XDP carries {MTU_MAX} bytes");
        }
        let mtu_max = interface_mtu.min(MTU_MAX);
        let program = Program::load(settings.queues.into()).map_err(explain)?;
        let attached = namespace.run(|| program.attach(index))?.map_err(explain)?;
        packet_socket::make_promiscuous(&keeper, index).map_err(explain)?;
        let info = NetInfo {
            mtu_max,
            transmit: Offloads::NONE,
            receive: Offloads::NONE,
            channels_max: settings.queues,
            functions_max: 1,
        };
        let slots = (0..settings.queues).map(|_| Weak::new()).collect();
        let device = Arc::new(Device {
            carrier: Arc::new(Carrier::new(namespace.is_running(&name).unwrap_or(false))),
            watch,
            name,
            mtu: mtu_max,
            program,
            state: Mutex::new(State { keeper, attached: Some(attached), said: false, slots }),
        });
        let user: Weak<Device> = Arc::downgrade(&device);
        device.watch.follow(user);
        Ok(Self { device, info })
    }
}

impl NetBackend for AfXdpBackend {
    fn info(&self) -> NetInfo {
        self.info
    }

    fn carrier(&self) -> &Arc<Carrier> {
        &self.device.carrier
    }

    fn open_channel(&self) -> Result<Box<dyn NetChannel>, BackendError> {
        let device = &self.device;
        let mut state = device.state();
        let namespace = device.namespace();
        let explain = |errno| explain(&device.name, namespace, errno);
        let index = namespace.index(&device.name);
        // Where it is another one by now, the watch takes that first.
        let index = index.filter(|index| packet_socket::bound_to(&state.keeper) == Ok(*index));
        let (Some(index), Some(Attached { mode, .. })) = (index, &state.attached) else {
            return Err(BackendError::Unavailable(format!("{device} was deleted: make it again, or wait a moment")));
        };
        let Some(queue) = state.slots.iter().position(|slot| slot.strong_count() == 0) else {
            return Err(BackendError::Unavailable(format!("all queues of {device} are in use")));
        };
        let (queue_id, mode) = (queue as u32, *mode);
        let socket = namespace.run(|| device.open_socket(index, queue_id, mode))?.map_err(explain)?;
        tracing::info!(
            queue,
            "{device}: AF_XDP in the {}, {}",
            if mode == Mode::Driver { "driver" } else { "kernel, since the driver cannot" },
            if socket.copies() { "with copies" } else { "without copies" }
        );
        let slot = Arc::new(Slot::new().map_err(explain)?);
        let channel = XdpChannel::new(Arc::clone(device), Arc::clone(&slot), queue_id, socket).map_err(explain)?;
        state.slots[queue] = Arc::downgrade(&slot);
        Ok(Box::new(channel))
    }
}

fn explain(name: &InterfaceName, namespace: &Namespace, errno: Errno) -> BackendError {
    let place = namespace.describe();
    match errno {
        Errno::EPERM | Errno::EACCES => BackendError::Refused(format!(
            "the interface {name}{place} may not be used by AF_XDP: that needs CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF, or run as root"
        )),
        Errno::EAFNOSUPPORT | Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::ENOPROTOOPT => BackendError::Refused(format!(
            "this kernel has no AF_XDP as the interface {name}{place} needs it ({errno}): use Linux 5.9 or later with \
             CONFIG_XDP_SOCKETS, or an af-packet uplink"
        )),
        Errno::EBUSY | Errno::EEXIST => BackendError::Refused(format!(
            "the interface {name}{place} is in use by another XDP program or AF_XDP socket: end that, or `ip link set dev {name} \
             xdp off`"
        )),
        Errno::ENOBUFS | Errno::ENOMEM => BackendError::Unavailable(format!(
            "no memory for the frames of the interface {name}{place}: raise the limit of locked memory (RLIMIT_MEMLOCK)"
        )),
        Errno::ENODEV | Errno::ENXIO => {
            BackendError::Unavailable(format!("the interface {name}{place} is gone again: wait until it stays"))
        }
        errno => BackendError::Unavailable(format!("the interface {name}{place} cannot be opened for AF_XDP: {errno}")),
    }
}

/// Whether an interface has so many queues. A driver that does not say is believed.
fn check_queues(namespace: &Namespace, name: &InterfaceName, queues: u16) -> Result<(), BackendError> {
    let Ok(there) = namespace.receive_queues(name) else { return Ok(()) };
    let place = namespace.describe();
    if there < u32::from(queues) {
        return Err(BackendError::Refused(format!(
            "the interface {name}{place} has {there} queues in use, not {queues}: `ethtool -L {name} combined {queues}`, or take fewer"
        )));
    }
    if there > u32::from(queues) {
        tracing::warn!(
            "the interface {name}{place} spreads frames over {there} queues, and those of the first {queues} alone are taken: \
             `ethtool -L {name} combined {queues}`"
        );
    }
    Ok(())
}

/// What the control half and the channels share.
struct Device {
    watch: Arc<Watch>,
    name: InterfaceName,
    mtu: u16,
    carrier: Arc<Carrier>,
    program: Program,
    state: Mutex<State>,
}

struct State {
    /// Keeps the interface promiscuous, and knows which one it was. No frame comes to it.
    keeper: OwnedFd,
    /// The program on the interface that is there.
    attached: Option<Attached>,
    /// Whether it was said why the interface cannot be used.
    said: bool,
    /// The channel of each queue, if there is one.
    slots: Vec<Weak<Slot>>,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the interface {}{}", self.name, self.namespace().describe())
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("name", &self.name).field("carrier", &self.carrier).finish_non_exhaustive()
    }
}

impl Device {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn namespace(&self) -> &Namespace {
        self.watch.namespace()
    }

    /// Opens the socket of a queue. In the namespace.
    fn open_socket(&self, index: i32, queue: u32, mode: Mode) -> Result<XdpSocket, Errno> {
        let until = Instant::now() + LET_GO;
        loop {
            match XdpSocket::open(index, queue, self.mtu, mode) {
                // A socket that was closed lets go of its queue a moment later.
                Err(Errno::EBUSY) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
                result => return result,
            }
        }
    }

    /// Opens everything anew on the interface of this number, if it is another one. In the namespace. Returns whether it was.
    fn open_again(&self, state: &mut State, index: i32) -> Result<bool, Errno> {
        if packet_socket::bound_to(&state.keeper)? == index && state.attached.is_some() {
            return Ok(false);
        }
        state.attached = None;
        packet_socket::bind(&state.keeper, index, false)?;
        packet_socket::make_promiscuous(&state.keeper, index)?;
        let attached = self.program.attach(index)?;
        // All or none: a queue that has a socket takes no other.
        let slots: Vec<(u32, Arc<Slot>)> =
            (0u32..).zip(&state.slots).filter_map(|(queue, slot)| Some((queue, slot.upgrade()?))).collect();
        let open = |(queue, _): &(u32, Arc<Slot>)| self.open_socket(index, *queue, attached.mode);
        let sockets: Vec<XdpSocket> = slots.iter().map(open).collect::<Result<_, _>>()?;
        for ((_, slot), socket) in slots.iter().zip(sockets) {
            slot.give(socket);
        }
        // The last: what failed half way is done again.
        state.attached = Some(attached);
        Ok(true)
    }

    /// Finds out whether the interface is there and runs. Returns that, and whether to look again later.
    fn find(&self) -> (bool, bool) {
        let mut state = self.state();
        let Some(index) = self.namespace().index(&self.name) else {
            state.attached = None;
            if !std::mem::replace(&mut state.said, true) {
                tracing::warn!("{self} was deleted: its functions' links are down until it is there again");
            }
            return (false, false);
        };
        match self.open_again(&mut state, index) {
            Ok(again) => {
                if again {
                    tracing::info!("{self} is there again");
                }
                state.said = false;
                (self.namespace().is_running(&self.name).unwrap_or(false), false)
            }
            Err(errno) => {
                if !std::mem::replace(&mut state.said, true) {
                    tracing::warn!("{}", explain(&self.name, self.namespace(), errno));
                }
                (false, true)
            }
        }
    }
}

impl Watched for Device {
    fn look(&self) -> bool {
        let (running, again) = self.find();
        self.carrier.set(running);
        again
    }
}

#[cfg(test)]
mod tests;
