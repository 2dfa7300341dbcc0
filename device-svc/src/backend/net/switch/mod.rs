//! A switch on the card: functions reach each other, and an uplink of any other kind.
//!
//! ```text
//!   VM ─ channel ─┬─► inbox of another port's channel ─► VM
//!                 └─► uplink's channel ─► network
//!   network ─► uplink's channel ─► (whichever reactor turns first) ─► inbox of a port's channel ─► VM
//! ```
//!
//! It learns where stations are from what they send ([`Stations`]), and sends to all ports of the VLAN what is for a group or for nobody
//! known. A port with a VLAN is an access port: what its VM sends is in that VLAN, with a tag of another it is dropped, and it is
//! brought no other's frames and no tags. A port without one is a trunk, and so is the uplink: all VLANs, tagged, and what has no tag
//! is in a VLAN of its own.
//!
//! There is no thread for it. A frame is copied once, by the reactor of the VM that sends it, into an [`Inbox`](super::inbox::Inbox) of
//! the port it is for, or sent by that reactor through the uplink's one channel, which they share ([`uplink`]). What a frame left
//! undone stays undone, and is done where it is needed, after the switch.
//!
//! A VM that takes nothing loses what does not fit into its inbox, and holds up nobody.

mod channel;
mod frame;
mod uplink;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::channel::SwitchChannel;
use self::uplink::UplinkSide;
use super::inbox::Inbox;
use super::stations::{Place, Stations};
use super::{Carrier, NetBackend, NetChannel, NetInfo, Offloads, PortSettings};
use crate::backend::BackendError;

/// The number of a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct PortNumber(u16);

impl Place for PortNumber {
    #[inline]
    fn bits(self) -> u128 {
        self.0.into()
    }

    #[inline]
    fn from_bits(bits: u128) -> Self {
        Self(bits as u16)
    }
}

impl PortNumber {
    /// Its place in the list of ports.
    #[inline]
    const fn index(self) -> usize {
        self.0 as usize
    }
}

/// The uplink's number among the ports.
const UPLINK: PortNumber = PortNumber(0);
/// Functions on one switch at most.
const PORTS_MAX: usize = 4096;
/// Queue pairs of a port at most.
const CHANNELS_MAX: u16 = 128;

/// One port, as those who send to it see it.
#[derive(Clone, Debug)]
struct Port {
    vlan: Option<u16>,
    /// One for each of its channels.
    inboxes: Vec<Arc<Inbox>>,
}

/// The ports at their numbers; the uplink's place is empty.
type Ports = Vec<Option<Port>>;

/// What all channels of a switch share.
struct Shared {
    /// Channels keep the list that they saw last, and look again when the epoch has changed.
    ports: Mutex<Arc<Ports>>,
    epoch: AtomicU32,
    stations: Stations<PortNumber>,
    uplink: Option<UplinkSide>,
}

impl Shared {
    fn ports(&self) -> MutexGuard<'_, Arc<Ports>> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the list of ports.
    fn change<T>(&self, change: impl FnOnce(&mut Ports) -> T) -> T {
        let mut ports = self.ports();
        let mut new = Ports::clone(&ports);
        let result = change(&mut new);
        *ports = Arc::new(new);
        drop(ports);
        // Release: whoever sees the new epoch sees the new list behind the lock.
        self.epoch.fetch_add(1, Ordering::Release);
        result
    }

    /// Wakes all reactors that have a channel here, so that they look again at what all share.
    fn wake_all(&self) {
        let ports = Arc::clone(&self.ports());
        ports.iter().flatten().flat_map(|port| &port.inboxes).for_each(|inbox| inbox.ring());
    }
}

/// The switch.
pub struct SwitchBackend {
    shared: Arc<Shared>,
    info: NetInfo,
    carrier: Arc<Carrier>,
}

impl SwitchBackend {
    /// A switch without ports, with this uplink, if any.
    ///
    /// # Errors
    /// When the uplink refuses.
    pub fn new(uplink: Option<&dyn NetBackend>) -> Result<Self, BackendError> {
        let info = NetInfo {
            mtu_max: uplink.map_or(u16::MAX, |uplink| uplink.info().mtu_max),
            transmit: Offloads::ALL,
            // It hands over what the sender left undone, whatever it is told: it is for whoever stands around it to do that.
            receive: Offloads::NONE,
            channels_max: CHANNELS_MAX,
            functions_max: PORTS_MAX,
        };
        let uplink = uplink.map(UplinkSide::open).transpose()?;
        let shared = Shared {
            // The uplink's place.
            ports: Mutex::new(Arc::new(vec![None])),
            epoch: AtomicU32::new(0),
            stations: Stations::default(),
            uplink,
        };
        // Functions reach each other whether the uplink is there or not.
        Ok(Self { shared: Arc::new(shared), info, carrier: Arc::new(Carrier::new(true)) })
    }
}

impl NetBackend for SwitchBackend {
    fn info(&self) -> NetInfo {
        self.info
    }

    fn carrier(&self) -> &Arc<Carrier> {
        &self.carrier
    }

    fn open_channel(&self) -> Result<Box<dyn NetChannel>, BackendError> {
        Err(BackendError::Refused("a switch has channels of its ports alone".to_owned()))
    }

    fn port(&self, settings: PortSettings) -> Result<Option<Arc<dyn NetBackend>>, BackendError> {
        let number = self.shared.change(|ports| {
            let free = (1..ports.len()).find(|number| ports[*number].is_none()).unwrap_or(ports.len());
            if free > PORTS_MAX {
                return None;
            }
            ports.resize_with(ports.len().max(free + 1), || None);
            ports[free] = Some(Port { vlan: settings.vlan, inboxes: Vec::new() });
            Some(PortNumber(free as u16))
        });
        let number = number.ok_or_else(|| {
            BackendError::Refused(format!("a switch has no more than {PORTS_MAX} ports; delete a function first"))
        })?;
        let plug = Arc::new(Plug { shared: Arc::clone(&self.shared), number, vlan: settings.vlan });
        Ok(Some(Arc::new(SwitchPort { plug, info: self.info, carrier: Arc::clone(&self.carrier) })))
    }

    fn has_ports(&self) -> bool {
        true
    }
}

/// What keeps a port in the list.
struct Plug {
    shared: Arc<Shared>,
    number: PortNumber,
    vlan: Option<u16>,
}

impl Plug {
    fn add(&self, inbox: &Arc<Inbox>) {
        self.shared.change(|ports| {
            if let Some(Some(port)) = ports.get_mut(self.number.index()) {
                port.inboxes.push(Arc::clone(inbox));
            }
        });
    }

    fn remove(&self, inbox: &Arc<Inbox>) {
        self.shared.change(|ports| {
            if let Some(Some(port)) = ports.get_mut(self.number.index()) {
                port.inboxes.retain(|other| !Arc::ptr_eq(other, inbox));
            }
        });
    }
}

impl Drop for Plug {
    fn drop(&mut self) {
        self.shared.change(|ports| {
            if let Some(port) = ports.get_mut(self.number.index()) {
                *port = None;
            }
        });
        self.shared.stations.forget(self.number);
        if let Some(uplink) = &self.shared.uplink {
            // Not the next one's at this number.
            uplink.lost_of(self.number);
        }
    }
}

/// A switch as the function on one of its ports sees it.
struct SwitchPort {
    plug: Arc<Plug>,
    info: NetInfo,
    carrier: Arc<Carrier>,
}

impl NetBackend for SwitchPort {
    fn info(&self) -> NetInfo {
        self.info
    }

    fn carrier(&self) -> &Arc<Carrier> {
        &self.carrier
    }

    fn open_channel(&self) -> Result<Box<dyn NetChannel>, BackendError> {
        Ok(Box::new(SwitchChannel::open(Arc::clone(&self.plug))?))
    }
}

#[cfg(test)]
mod tests;
