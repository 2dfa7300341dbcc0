//! A tap: an interface of the kernel whose far end is a VM. The kernel's network stack is the network: it routes, bridges, and does
//! the offloads that a VM left to be done.
//!
//! ```text
//!   TapBackend ── Device: the interface, made or found, watched        tap.rs, ../watch.rs, ../namespace.rs
//!        │            └─ queues opened, and why not                    device.rs
//!        └─ KernelQueue, one for each queue pair: one descriptor       ../kernel_queue.rs
//! ```
//!
//! A tap that nobody made before is made here and goes with the last descriptor. When it is deleted meanwhile its descriptors are
//! dead for good; as soon as an interface of its name is there again, or after a pause one that we make, each channel is given a
//! new one: it is left in the channel's [`Slot`], and a number there says that it was.

mod device;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use nix::errno::Errno;

use self::device::QueueFile;
use super::kernel_queue::{KernelQueue, Kind, Port, Slot};
use super::namespace::{InterfaceName, Namespace};
use super::watch::{LOOK_AGAIN, Watch, Watched};
use super::{Carrier, NetBackend, NetChannel, NetInfo, Offloads};
use crate::backend::BackendError;
use crate::backend::ring::Users;

/// Queues of one tap: of the kernel's 256, so that others can have some too.
const QUEUES_MAX: u16 = 128;
/// The least that IPv4 allows (RFC 791).
const MTU_MIN: u16 = 68;

/// What a tap is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TapSettings {
    /// The interface's name: 1 to 15 bytes. It is made if it is not there. If it is, it must be a tap with `multi_queue`.
    pub name: String,
    /// The network namespace that it is in, as `ip netns` names it; none: the one of this process.
    pub netns: Option<String>,
    /// Its MTU, bytes, from 68; none: as it is, or 1500 if it is made.
    pub mtu: Option<u16>,
}

/// The control half.
#[derive(Debug)]
pub struct TapBackend {
    device: Arc<Device>,
    info: NetInfo,
}

impl TapBackend {
    /// Opens the tap, makes it if need be, and sets it up.
    ///
    /// # Errors
    /// `Refused` when there is no `/dev/net/tun`, we may not use it or the tap, the name is taken by something else or the tap is not
    /// made for many queues; `Unavailable` when the namespace is not there, or all queues are in use.
    pub fn new(settings: TapSettings) -> Result<Self, BackendError> {
        let name = InterfaceName::new(&settings.name)?;
        let watch = Watch::open(settings.netns.as_deref())?;
        let namespace = Arc::clone(watch.namespace());
        let made = namespace.run(|| make(&namespace, &name, settings.mtu, Offloads::NONE))??;
        let all = Offloads::ALL;
        let uso = device::set_offloads(&made.holder.file, all).is_ok();
        let offloads = Offloads { uso, ..all };
        let failed = |errno: Errno| {
            BackendError::Unavailable(format!("the tap {name}{} is gone again: {errno}", namespace.describe()))
        };
        device::set_offloads(&made.holder.file, Offloads::NONE).map_err(failed)?;
        let info = NetInfo {
            mtu_max: namespace.mtu(&name).map_err(failed)?.max(MTU_MIN),
            // Whatever a header asks for, the kernel does when the frame needs it.
            transmit: offloads,
            receive: offloads,
            channels_max: QUEUES_MAX,
            functions_max: 1,
        };
        let device = Arc::new(Device {
            carrier: Arc::new(Carrier::new(namespace.is_up(&name).unwrap_or(false))),
            watch,
            name,
            mtu: settings.mtu,
            state: Mutex::new(State { made, gone_since: None, said: false, undone: Offloads::NONE, slots: Vec::new() }),
        });
        let user: Weak<Device> = Arc::downgrade(&device);
        device.watch.follow(user);
        Ok(Self { device, info })
    }
}

impl NetBackend for TapBackend {
    fn info(&self) -> NetInfo {
        self.info
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

impl TapBackend {
    fn open(&self, users: Users) -> Result<Box<dyn NetChannel>, BackendError> {
        let device = &self.device;
        let mut state = device.state();
        if state.gone_since.is_some() {
            return Err(BackendError::Unavailable(format!(
                "the tap {}{} was deleted: wait until it is there again, or make it",
                device.name,
                device.namespace().describe()
            )));
        }
        state.slots.retain(|slot| slot.strong_count() > 0);
        let namespace = device.namespace();
        let QueueFile { file, .. } = namespace.run(|| device::open_queue(namespace, &device.name))??;
        let port: Arc<dyn Port> = Arc::<Device>::clone(device);
        let queue = KernelQueue::new(port, file, Kind::Tap, users)?;
        state.slots.push(Arc::downgrade(queue.slot()));
        Ok(Box::new(queue))
    }
}

/// The interface as it is now.
struct Made {
    /// Keeps it alive while no channel is open. Not attached.
    holder: QueueFile,
    index: Option<i32>,
}

/// Makes or finds the interface and sets it up. In the namespace.
fn make(namespace: &Namespace, name: &InterfaceName, mtu: Option<u16>, undone: Offloads) -> Result<Made, BackendError> {
    let holder = device::open_queue(namespace, name)?;
    let failed = |what: String| {
        let place = namespace.describe();
        move |errno: Errno| match errno {
            Errno::EPERM => BackendError::Refused(format!(
                "the tap {name}{place}: {what} needs CAP_NET_ADMIN: do it for us, or run as root"
            )),
            Errno::EINVAL => BackendError::Refused(format!(
                "the tap {name}{place}: {what} is not possible: a tap has an MTU of 68 to 65521"
            )),
            errno => BackendError::Unavailable(format!("the tap {name}{place}: {what} failed: {errno}")),
        }
    };
    if let Some(mtu) = mtu
        && namespace.mtu(name) != Ok(mtu)
    {
        namespace.set_mtu(name, mtu).map_err(failed(format!("to set the MTU to {mtu}")))?;
    }
    namespace.set_up(name).map_err(failed("to set it up".to_owned()))?;
    device::set_offloads(&holder.file, undone).map_err(failed("to set its offloads".to_owned()))?;
    Ok(Made { holder, index: namespace.index(name) })
}

/// What the control half and the channels share.
struct Device {
    watch: Arc<Watch>,
    name: InterfaceName,
    mtu: Option<u16>,
    carrier: Arc<Carrier>,
    state: Mutex<State>,
}

struct State {
    made: Made,
    /// Since when there has been no interface of the name, or none that we could use.
    gone_since: Option<Instant>,
    /// Whether it was said why it cannot be used.
    said: bool,
    /// What the kernel may leave undone.
    undone: Offloads,
    slots: Vec<Weak<Slot>>,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
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

    /// Opens everything anew on the interface that is there, or on a new one. In the namespace.
    fn open_again(&self, state: &mut State) -> Result<(), BackendError> {
        let made = make(self.namespace(), &self.name, self.mtu, state.undone)?;
        state.slots.retain(|slot| slot.strong_count() > 0);
        let count = state.slots.len();
        let files: Vec<QueueFile> =
            (0..count).map(|_| device::open_queue(self.namespace(), &self.name)).collect::<Result<_, _>>()?;
        for (slot, queue) in state.slots.iter().filter_map(Weak::upgrade).zip(files) {
            slot.give(queue.file);
        }
        state.made = made;
        Ok(())
    }

    /// Finds out whether the interface is there and up. Returns that, and whether to look again later.
    fn find(&self, state: &mut State) -> (bool, bool) {
        let index = self.namespace().index(&self.name);
        if index.is_some() && index == state.made.index {
            // Whoever makes a tap makes it stay a moment later: here we may have been quicker.
            if let Ok(persistent) = device::is_persistent(&state.made.holder.file) {
                state.made.holder.persistent = persistent;
            }
            return (self.namespace().is_up(&self.name).unwrap_or(false), false);
        }
        let ours = !state.made.holder.persistent;
        let since = *state.gone_since.get_or_insert_with(|| {
            tracing::warn!(
                tap = %self.name,
                "the tap{} was deleted: its functions' links are down until it is there again{}",
                self.namespace().describe(),
                if ours { "; it is made again in a second" } else { "" }
            );
            Instant::now()
        });
        if index.is_none() && (!ours || since.elapsed() < LOOK_AGAIN) {
            return (false, ours);
        }
        match self.open_again(state) {
            Ok(()) => {
                tracing::info!(tap = %self.name, "the tap{} is there again", self.namespace().describe());
                state.gone_since = None;
                state.said = false;
                (self.namespace().is_up(&self.name).unwrap_or(false), true)
            }
            Err(error) => {
                if !std::mem::replace(&mut state.said, true) {
                    tracing::warn!("{error}");
                }
                (false, true)
            }
        }
    }
}

impl Port for Device {
    fn describe(&self) -> String {
        format!("the tap {}{}", self.name, self.namespace().describe())
    }

    fn attach(&self, file: &Arc<OwnedFd>, attached: bool) -> Result<(), Errno> {
        device::attach(file, attached)
    }

    /// All queues of a tap have the same offloads; all channels of a function ask for the same, one after the other.
    fn leave_undone(&self, offloads: Offloads) {
        let mut state = self.state();
        if state.undone != offloads {
            state.undone = offloads;
            if let Err(errno) = device::set_offloads(&state.made.holder.file, offloads)
                && state.gone_since.is_none()
            {
                tracing::debug!(tap = %self.name, "offloads wait until the tap is there again: {errno}");
            }
        }
    }
}

impl Watched for Device {
    fn look(&self) -> bool {
        let (up, again) = self.find(&mut self.state());
        self.carrier.set(up);
        again
    }
}

#[cfg(test)]
mod tests;
