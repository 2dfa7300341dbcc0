//! Tunnels: a VM's frames travel in UDP datagrams to other end points, of which each network has its number (VXLAN, RFC 7348; Geneve,
//! RFC 8926). The end points are the network servers, or other cards.
//!
//! ```text
//!   TunnelBackend ── Network: one number on one address and port, which uplinks share     endpoint.rs
//!        │            └─ which channel a datagram goes to: a program in the kernel        steering.rs, socket.rs
//!        └─ TunnelChannel, one for each queue pair                                        channel.rs
//!             ├─ headers                                                                  wire.rs
//!             ├─ the source port, by the flow inside                                      flow.rs
//!             └─ to whom: remotes, and stations that were heard                           remotes.rs, stations.rs, outer.rs
//! ```
//!
//! Datagrams are not authenticated. What guards a network is the list of its remotes (see `remotes`) and the underlay.
//!
//! **What the underlay takes.** Nothing is fragmented, so a VM's largest packet is the underlay's less the headers: 50 bytes over
//! IPv4 and 70 over IPv6. Of a frame with a VLAN tag the tag takes 4 more.

mod channel;
mod endpoint;
pub mod flow;
pub mod outer;
pub mod remotes;
mod socket;
mod steering;
pub mod wire;

use std::net::IpAddr;
use std::sync::{Arc, Weak};

use nix::errno::Errno;

use self::channel::TunnelChannel;
use self::endpoint::Network;
use self::outer::OuterAddress;
use self::remotes::{Learning, Remotes};
use self::steering::CHANNELS_MAX;
use self::wire::{OUTER_HEADER_BYTES, TunnelKind};
use super::namespace::{InterfaceName, Namespace};
use super::watch::{Watch, Watched};
use super::{Carrier, ETHERNET_BYTES, NetBackend, NetChannel, NetInfo, Offloads};
use crate::backend::BackendError;
use crate::backend::ring::Users;

/// The least that IPv4 allows (RFC 791).
const MTU_MIN: u32 = 68;

/// What a tunnel is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TunnelSettings {
    /// How frames are encapsulated.
    pub kind: TunnelKind,
    /// The number of the network: 24 bits.
    pub vni: u32,
    /// Our own address, which an interface of the namespace must have.
    pub local: IpAddr,
    /// The other end points; all of the same version of IP as `local`.
    pub remotes: Vec<IpAddr>,
    /// Whose frames are taken, and what they teach.
    pub learning: Learning,
    /// The UDP port on which all end points listen.
    pub port: u16,
    /// The VM's largest packet, bytes, from 68; none: what the underlay takes.
    pub mtu: Option<u16>,
    /// The network namespace of the underlay, as `ip netns` names it; none: the one of this process.
    pub netns: Option<String>,
}

/// The control half.
#[derive(Debug)]
pub struct TunnelBackend {
    tunnel: Arc<Tunnel>,
    underlay: Arc<Underlay>,
    info: NetInfo,
}

/// What all channels share.
#[derive(Debug)]
struct Tunnel {
    kind: TunnelKind,
    vni: u32,
    port: u16,
    remotes: Remotes,
    network: Arc<Network>,
}

/// The interface that has our address, watched.
struct Underlay {
    watch: Arc<Watch>,
    local: OuterAddress,
    carrier: Arc<Carrier>,
}

impl TunnelBackend {
    /// Opens a tunnel.
    ///
    /// # Errors
    /// `Unavailable` when the namespace or the address is not there, or the port is in use; `Refused` when another uplink has this
    /// network, or the other kind of tunnel has the port.
    pub fn new(settings: &TunnelSettings) -> Result<Self, BackendError> {
        let TunnelSettings { kind, vni, port, .. } = *settings;
        let local = OuterAddress::from(settings.local);
        let watch = Watch::open(settings.netns.as_deref())?;
        let namespace = watch.namespace();
        let network = Arc::new(Network::open(namespace, kind, local, port, vni)?);
        let remotes = Remotes::new(settings.remotes.iter().copied().map(OuterAddress::from), settings.learning);
        let fitting = mtu_that_fits(namespace, local, &remotes)?;
        let mtu_max = match (settings.mtu, fitting) {
            (Some(mtu), Some(fitting)) if mtu > fitting => {
                tracing::warn!(
                    "{}: packets of more than {fitting} bytes do not fit the underlay, and `mtu` is {mtu}: they will be lost; lower \
                     it, or raise the MTU of the underlay",
                    network.describe()
                );
                mtu
            }
            (Some(mtu), _) => mtu,
            (None, Some(fitting)) => fitting,
            (None, None) => {
                return Err(BackendError::Unavailable(format!(
                    "{}: what the underlay takes cannot be found out: give `mtu`",
                    network.describe()
                )));
            }
        };
        let info = NetInfo {
            mtu_max,
            transmit: Offloads::NONE,
            receive: Offloads::NONE,
            channels_max: CHANNELS_MAX,
            functions_max: 1,
        };
        let up = namespace.run(|| is_up(local))?;
        let underlay = Arc::new(Underlay { local, carrier: Arc::new(Carrier::new(up)), watch });
        let user: Weak<Underlay> = Arc::downgrade(&underlay);
        underlay.watch.follow(user);
        Ok(Self { tunnel: Arc::new(Tunnel { kind, vni, port, remotes, network }), underlay, info })
    }
}

/// The largest packet of a VM whose datagrams fit the routes to all remotes, or, where there are none, our interface.
fn mtu_that_fits(namespace: &Namespace, local: OuterAddress, remotes: &Remotes) -> Result<Option<u16>, BackendError> {
    let routes = || remotes.named().iter().filter_map(|remote| socket::path_mtu(local, *remote).ok()).min();
    let underlay = match namespace.run(routes)? {
        Some(mtu) => Some(mtu),
        None => interface_mtu(namespace, local)?,
    };
    let headers = socket::ip_header_bytes(local) + OUTER_HEADER_BYTES as u32 + ETHERNET_BYTES;
    // No datagram is longer than this, whatever its interface takes.
    let fitting = |mtu: u32| mtu.min(u16::MAX.into()).saturating_sub(headers).max(MTU_MIN) as u16;
    Ok(underlay.map(fitting))
}

fn interface_mtu(namespace: &Namespace, local: OuterAddress) -> Result<Option<u32>, BackendError> {
    let Ok(Some((name, _))) = namespace.run(|| socket::find_interface(local))? else { return Ok(None) };
    let mtu: Result<u16, Errno> = namespace.mtu(&InterfaceName::new(&name)?);
    Ok(mtu.ok().map(u32::from))
}

/// Whether an interface that carries something has the address. In the namespace.
fn is_up(local: OuterAddress) -> bool {
    matches!(socket::find_interface(local), Ok(Some((_, true))))
}

impl NetBackend for TunnelBackend {
    fn info(&self) -> NetInfo {
        self.info
    }

    fn carrier(&self) -> &Arc<Carrier> {
        &self.underlay.carrier
    }

    fn open_channel(&self) -> Result<Box<dyn NetChannel>, BackendError> {
        Ok(Box::new(TunnelChannel::new(Arc::clone(&self.tunnel), Users::One)?))
    }

    fn open_shared_channel(&self) -> Result<Box<dyn NetChannel>, BackendError> {
        Ok(Box::new(TunnelChannel::new(Arc::clone(&self.tunnel), Users::Several)?))
    }
}

impl Watched for Underlay {
    fn look(&self) -> bool {
        self.carrier.set(is_up(self.local));
        false
    }
}

impl std::fmt::Debug for Underlay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Underlay").field("local", &self.local).field("carrier", &self.carrier).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
