//! An interface that is there, a physical one or one end of a veth: the VM's frames go out by it as they are, and what comes in by it
//! is the VM's.
//!
//! ```text
//!   AfPacketBackend ── Device: the interface, watched                       ../watch.rs, ../namespace.rs
//!        │               └─ sockets, and which frames are whose             ../packet_socket.rs, share.rs
//!        └─ SoftwareOffloadChannel ── KernelQueue, for each queue pair      ../offload, ../kernel_queue.rs
//! ```
//!
//! A packet socket stands beside the card's own stack: it gets every frame that comes in by the interface, and so does the stack, which
//! passes over those for the VM's address. So that these come at all the interface is promiscuous while the uplink exists; who gets
//! what then is the filter's of the function. What the stack sends by the interface, no VM sees.
//!
//! The frames have virtio headers, both ways. The kernel does whatever a VM left undone, but it cannot be told what to do of what
//! comes: it leaves undone what the interface, or the far end of a veth, left undone. That is why software offload stands around each
//! channel, which does it where the VM does not.
//!
//! Several channels share what comes by filters of their sockets (`share.rs`). The kernel has fan-out groups for this, but a member
//! gets its share whether or not its queue pair is in use, and leaves only when it is closed; a filter changes at once, without
//! waiting for anything. (The price: each frame meets each channel's filter, about 50 ns.)
//!
//! Frames wait for the interface's queueing discipline as all others do: past it (`PACKET_QDISC_BYPASS`) the kernel drops what it
//! would have to cut, and what the driver has no room for.
//!
//! When the interface is deleted its sockets stay, bound to nothing; as soon as there is one of its name they are bound to that.

mod share;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nix::errno::Errno;

use self::share::{Share, filter};
use super::kernel_queue::{KernelQueue, Kind, Port};
use super::namespace::{InterfaceName, Namespace};
use super::offload::SoftwareOffloadChannel;
use super::packet_socket as socket;
use super::watch::{Watch, Watched};
use super::{Carrier, NetBackend, NetChannel, NetInfo, Offloads};
use crate::backend::BackendError;
use crate::backend::ring::Users;

/// Channels of one interface: each costs a little for each frame.
const CHANNELS_MAX: u16 = 16;
/// The least that IPv4 allows (RFC 791).
const MTU_MIN: u16 = 68;

/// Which interface it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AfPacketSettings {
    /// Its name: 1 to 15 bytes. It must be there, and carry Ethernet.
    pub interface: String,
    /// The network namespace that it is in, as `ip netns` names it; none: the one of this process.
    pub netns: Option<String>,
}

/// The control half.
#[derive(Debug)]
pub struct AfPacketBackend {
    device: Arc<Device>,
    mtu_max: u16,
    /// What the kernel does of what it is given.
    transmit: Offloads,
}

impl AfPacketBackend {
    /// Opens the interface.
    ///
    /// # Errors
    /// `Refused` when we may not, or it carries no Ethernet; `Unavailable` when it or its namespace is not there.
    pub fn new(settings: &AfPacketSettings) -> Result<Self, BackendError> {
        let name = InterfaceName::new(&settings.interface)?;
        if cfg!(target_endian = "big") {
            return Err(BackendError::Refused(format!(
                "the interface {name}: on this machine packet sockets have headers that are not those of virtio 1; use a tap"
            )));
        }
        let watch = Watch::open(settings.netns.as_deref())?;
        let namespace = Arc::clone(watch.namespace());
        let Some(index) = namespace.index(&name) else {
            return Err(BackendError::Unavailable(format!(
                "there is no interface {name}{}: make it, or name one of those that `ip link` shows there",
                namespace.describe()
            )));
        };
        let explain = |errno| explain(&name, &namespace, errno);
        let keeper = namespace.run(|| socket::open(index))?.map_err(explain)?;
        if !socket::has_ethernet(&keeper).map_err(explain)? {
            return Err(BackendError::Refused(format!(
                "the interface {name}{} carries no Ethernet frames: choose another",
                namespace.describe()
            )));
        }
        socket::make_promiscuous(&keeper, index).map_err(explain)?;
        let mtu_max = namespace.mtu(&name).map_err(explain)?.max(MTU_MIN);
        let transmit = Offloads { uso: socket::cuts_datagrams(&keeper), ..Offloads::ALL };
        let device = Arc::new(Device {
            carrier: Arc::new(Carrier::new(namespace.is_running(&name).unwrap_or(false))),
            watch,
            name,
            state: Mutex::new(State { keeper, members: Vec::new(), said: false }),
        });
        let user: Weak<Device> = Arc::downgrade(&device);
        device.watch.follow(user);
        Ok(Self { device, mtu_max, transmit })
    }
}

impl NetBackend for AfPacketBackend {
    fn info(&self) -> NetInfo {
        NetInfo {
            mtu_max: self.mtu_max,
            transmit: Offloads::ALL,
            receive: Offloads::ALL,
            channels_max: CHANNELS_MAX,
            functions_max: 1,
        }
    }

    fn carrier(&self) -> &Arc<Carrier> {
        &self.device.carrier
    }

    fn open_channel(&self) -> Result<Box<dyn NetChannel>, BackendError> {
        self.open(Users::One)
    }

    fn open_shared_channel(&self) -> Result<Box<dyn NetChannel>, BackendError> {
        self.open(Users::Several)
    }
}

impl AfPacketBackend {
    fn open(&self, users: Users) -> Result<Box<dyn NetChannel>, BackendError> {
        let device = &self.device;
        let mut state = device.state();
        let namespace = device.namespace();
        let Some(index) = namespace.index(&device.name) else {
            return Err(BackendError::Unavailable(format!("{} was deleted: make it again", device.describe())));
        };
        let open = || socket::open_channel(index, &filter(Share::Nothing));
        let file = namespace.run(open)?.map_err(|errno| explain(&device.name, namespace, errno))?;
        let port: Arc<dyn Port> = Arc::<Device>::clone(device);
        let queue = KernelQueue::new(port, file, Kind::Socket, users)?;
        state.members.retain(|member| member.file.strong_count() > 0);
        state.members.push(Member { file: Arc::downgrade(queue.file()), attached: false });
        // What the kernel cannot do is done before a frame reaches it, whatever functions were promised.
        let does = NetInfo { transmit: self.transmit, ..self.info() };
        Ok(Box::new(SoftwareOffloadChannel::new(Box::new(queue), does)))
    }
}

fn explain(name: &InterfaceName, namespace: &Namespace, errno: Errno) -> BackendError {
    let place = namespace.describe();
    match errno {
        Errno::EPERM | Errno::EACCES => BackendError::Refused(format!(
            "the interface {name}{place} may not be used: a packet socket needs CAP_NET_RAW, or run as root"
        )),
        Errno::EAFNOSUPPORT => BackendError::Refused(format!(
            "this kernel has no packet sockets, which the interface {name}{place} needs: `modprobe af_packet`"
        )),
        Errno::ENODEV | Errno::ENXIO => {
            BackendError::Unavailable(format!("the interface {name}{place} is gone again: wait until it stays"))
        }
        errno => BackendError::Unavailable(format!("the interface {name}{place} cannot be opened: {errno}")),
    }
}

/// What the control half and the channels share.
struct Device {
    watch: Arc<Watch>,
    name: InterfaceName,
    carrier: Arc<Carrier>,
    state: Mutex<State>,
}

struct State {
    /// Keeps the interface promiscuous, and knows which one it was. No frame comes to it.
    keeper: OwnedFd,
    members: Vec<Member>,
    /// Whether it was said why the interface cannot be used.
    said: bool,
}

/// A channel's socket, as long as the channel is there.
struct Member {
    file: Weak<OwnedFd>,
    attached: bool,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("name", &self.name).field("carrier", &self.carrier).finish_non_exhaustive()
    }
}

impl State {
    /// Whether the channel with this socket has a share.
    fn mark(&mut self, file: &Arc<OwnedFd>, attached: bool) {
        let is_it = |member: &&mut Member| std::ptr::eq(member.file.as_ptr(), &raw const **file);
        if let Some(member) = self.members.iter_mut().find(is_it) {
            member.attached = attached;
        }
    }

    /// Gives each attached channel its share of what comes, and the others nothing. Meanwhile nobody has anything: a frame shall
    /// rather be lost than come twice.
    fn share(&mut self) -> Result<(), Errno> {
        self.members.retain(|member| member.file.strong_count() > 0);
        let attached: Vec<Arc<OwnedFd>> =
            self.members.iter().filter(|member| member.attached).filter_map(|member| member.file.upgrade()).collect();
        for file in self.members.iter().filter_map(|member| member.file.upgrade()) {
            socket::set_filter(&file, &filter(Share::Nothing))?;
        }
        for (number, file) in attached.iter().enumerate() {
            let share = Share::Of { number: number as u32, count: attached.len() as u32 };
            socket::set_filter(file, &filter(share))?;
        }
        Ok(())
    }

    /// Binds all sockets to the interface of this number, if they are bound to none or another. Returns whether they were.
    fn bind_again(&self, index: i32) -> Result<bool, Errno> {
        if socket::bound_to(&self.keeper)? == index {
            return Ok(false);
        }
        for file in self.members.iter().filter_map(|member| member.file.upgrade()) {
            socket::bind(&file, index, true)?;
        }
        socket::make_promiscuous(&self.keeper, index)?;
        // The last: what failed half way is done again.
        socket::bind(&self.keeper, index, false)?;
        Ok(true)
    }
}

impl Device {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn namespace(&self) -> &Namespace {
        self.watch.namespace()
    }

    /// Finds out whether the interface is there and runs. Returns that, and whether to look again later.
    fn find(&self) -> (bool, bool) {
        let mut state = self.state();
        let Some(index) = self.namespace().index(&self.name) else {
            if !std::mem::replace(&mut state.said, true) {
                let who = self.describe();
                tracing::warn!("{who} was deleted: its functions' links are down until it is there again");
            }
            return (false, false);
        };
        match state.bind_again(index) {
            Ok(again) => {
                if again {
                    tracing::info!("{} is there again", self.describe());
                }
                state.said = false;
                let running = self.namespace().is_running(&self.name).unwrap_or(false);
                if running {
                    let files = state.members.iter().filter_map(|member| member.file.upgrade());
                    files.for_each(|file| socket::clear_error(&file));
                }
                (running, false)
            }
            Err(errno) => {
                if !std::mem::replace(&mut state.said, true) {
                    tracing::warn!("{} cannot be bound to: {errno}", self.describe());
                }
                (false, true)
            }
        }
    }
}

impl Port for Device {
    fn describe(&self) -> String {
        format!("the interface {}{}", self.name, self.namespace().describe())
    }

    fn attach(&self, file: &Arc<OwnedFd>, attached: bool) -> Result<(), Errno> {
        let mut state = self.state();
        state.mark(file, attached);
        if attached {
            // What came in just when it was detached the last time.
            socket::drain(file);
        }
        let shared = state.share();
        if shared.is_err() && attached {
            // It has nothing, then, and the others have their shares.
            state.mark(file, false);
            if let Err(errno) = state.share() {
                tracing::warn!("{}: frames are lost until a queue pair comes or goes: {errno}", self.describe());
            }
        }
        if !attached {
            socket::drain(file);
        }
        shared
    }

    /// A packet socket cannot be told: software offload does what the kernel leaves.
    fn leave_undone(&self, _: Offloads) {}
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
