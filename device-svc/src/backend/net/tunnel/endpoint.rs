//! One address and port on which tunnels end: all uplinks of a card that have it share it, told apart by the numbers of their networks.
//!
//! Each channel has a socket of its own on the port, and the kernel puts a datagram into the right one (see `steering`): no frame
//! passes from one reactor to another. The program names sockets by their places in the kernel's group. Those must not change under
//! it, so a socket stays in the group as long as the end point does; a channel that goes leaves its own for the next one. The first
//! socket takes what is for nobody.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use nix::errno::Errno;

use super::super::namespace::Namespace;
use super::outer::OuterAddress;
use super::socket;
use super::steering::{self, SOCKETS_MAX, Wanted};
use super::wire::TunnelKind;
use crate::backend::BackendError;

/// What tells one end point from another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    /// Of the network namespace.
    namespace: (u64, u64),
    local: OuterAddress,
    port: u16,
}

static ENDPOINTS: Mutex<Vec<(Place, Weak<Endpoint>)>> = Mutex::new(Vec::new());

/// The kernel lets go of a port some moments after the last channel has: its io_uring is torn down at the kernel's leisure.
const BIND_TRIES: u32 = 40;
const BIND_PAUSE: Duration = Duration::from_millis(25);

/// An end point that is in use.
pub(super) struct Endpoint {
    namespace: Arc<Namespace>,
    kind: TunnelKind,
    local: OuterAddress,
    port: u16,
    group: Mutex<Group>,
}

struct Group {
    /// Of the uplinks.
    networks: BTreeSet<u32>,
    _first: OwnedFd,
    /// Those behind the first one, in their order in the kernel's group.
    members: Vec<Member>,
}

struct Member {
    socket: Arc<OwnedFd>,
    vni: u32,
    in_use: bool,
    enabled: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An uplink's network on an end point; no other uplink can have it.
pub(super) struct Network {
    endpoint: Arc<Endpoint>,
    vni: u32,
}

impl Network {
    /// Takes the network `vni` of an end point, which is opened if nobody has it.
    pub(super) fn open(
        namespace: &Arc<Namespace>,
        kind: TunnelKind,
        local: OuterAddress,
        port: u16,
        vni: u32,
    ) -> Result<Self, BackendError> {
        let place = Place { namespace: namespace.identity()?, local, port };
        let mut endpoints = lock(&ENDPOINTS);
        endpoints.retain(|(_, endpoint)| endpoint.strong_count() > 0);
        let known = endpoints.iter().find(|(of, _)| *of == place).and_then(|(_, endpoint)| endpoint.upgrade());
        let endpoint = match known {
            Some(endpoint) => endpoint,
            None => {
                let endpoint = Arc::new(Endpoint::open(namespace, kind, local, port)?);
                endpoints.push((place, Arc::downgrade(&endpoint)));
                endpoint
            }
        };
        drop(endpoints);
        if endpoint.kind != kind {
            return Err(BackendError::Refused(format!(
                "{} has a {} uplink already, and datagrams do not say of which type they are: choose another `port`",
                endpoint.describe(),
                endpoint.kind.name()
            )));
        }
        if !endpoint.group().networks.insert(vni) {
            return Err(BackendError::Refused(format!(
                "{} has an uplink for VNI {vni} already: choose another `vni`",
                endpoint.describe()
            )));
        }
        Ok(Self { endpoint, vni })
    }

    /// A socket for one more channel. It is not enabled.
    pub(super) fn open_receiver(self: &Arc<Self>) -> Result<Receiver, BackendError> {
        let Endpoint { namespace, local, port, .. } = &*self.endpoint;
        let (local, port) = (*local, *port);
        let mut group = self.endpoint.group();
        let number = match group.members.iter().position(|member| !member.in_use) {
            Some(number) => number,
            None if group.members.len() + 1 >= SOCKETS_MAX => {
                return Err(BackendError::Unavailable(format!(
                    "{} has all the channels that it can have: give further uplinks another `port`",
                    self.endpoint.describe()
                )));
            }
            None => {
                let opened = namespace.run(|| socket::open_next_receiver(local, port))?;
                let socket = opened.map_err(|errno| explain(&self.endpoint.describe(), local, errno))?;
                group.members.push(Member { socket: Arc::new(socket), vni: self.vni, in_use: false, enabled: false });
                // Without a program the kernel would choose by itself.
                self.endpoint.steer(&group).map_err(|errno| explain(&self.endpoint.describe(), local, errno))?;
                group.members.len() - 1
            }
        };
        let member = &mut group.members[number];
        (member.vni, member.in_use, member.enabled) = (self.vni, true, false);
        Ok(Receiver { socket: Arc::clone(&member.socket), network: Arc::clone(self), number })
    }

    /// A socket that sends.
    pub(super) fn open_sender(&self) -> Result<OwnedFd, BackendError> {
        let Endpoint { namespace, local, .. } = &*self.endpoint;
        namespace.run(|| socket::open_sender(*local))?.map_err(|errno| match errno {
            Errno::EPERM | Errno::EACCES => BackendError::Refused(format!(
                "{}: to send from many ports needs CAP_NET_RAW: run as root, or give the card that capability",
                self.endpoint.describe()
            )),
            errno => explain(&self.endpoint.describe(), *local, errno),
        })
    }

    /// For people.
    pub(super) fn describe(&self) -> String {
        format!("{}: VNI {}", self.endpoint.describe(), self.vni)
    }
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Network").field("endpoint", &self.endpoint.describe()).field("vni", &self.vni).finish()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.endpoint.group().networks.remove(&self.vni);
    }
}

/// One channel's socket.
pub(super) struct Receiver {
    pub(super) socket: Arc<OwnedFd>,
    network: Arc<Network>,
    number: usize,
}

impl Receiver {
    /// Has datagrams come, or not: then what waits is thrown away.
    pub(super) fn enable(&self, enabled: bool) {
        let endpoint = &self.network.endpoint;
        let mut group = endpoint.group();
        if enabled {
            socket::drain(&self.socket);
        }
        group.members[self.number].enabled = enabled;
        if let Err(errno) = endpoint.steer(&group) {
            tracing::error!("{}: the kernel cannot be told who takes which datagrams: {errno}", endpoint.describe());
        }
        if !enabled {
            socket::drain(&self.socket);
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.enable(false);
        self.network.endpoint.group().members[self.number].in_use = false;
    }
}

impl Endpoint {
    fn open(
        namespace: &Arc<Namespace>,
        kind: TunnelKind,
        local: OuterAddress,
        port: u16,
    ) -> Result<Self, BackendError> {
        let describe = describe(namespace, local, port);
        let mut tries = 0;
        let first = loop {
            match namespace.run(|| socket::open_first_receiver(local, port))? {
                Err(Errno::EADDRINUSE) if tries < BIND_TRIES => {
                    tries += 1;
                    std::thread::sleep(BIND_PAUSE);
                }
                opened => break opened.map_err(|errno| explain(&describe, local, errno))?,
            }
        };
        let group = Group { networks: BTreeSet::new(), _first: first, members: Vec::new() };
        Ok(Self { namespace: Arc::clone(namespace), kind, local, port, group: Mutex::new(group) })
    }

    fn group(&self) -> MutexGuard<'_, Group> {
        lock(&self.group)
    }

    fn describe(&self) -> String {
        describe(&self.namespace, self.local, self.port)
    }

    fn steer(&self, group: &Group) -> Result<(), Errno> {
        let Some(any) = group.members.first() else { return Ok(()) };
        let wanted = group.members.iter().enumerate().filter(|(_, member)| member.enabled).map(|(number, member)| {
            // The first one of the group is no member.
            Wanted { vni: member.vni, place: number as u32 + 1 }
        });
        socket::steer(&any.socket, &steering::program(wanted, socket::ip_header_bytes(self.local)))
    }
}

fn describe(namespace: &Namespace, local: OuterAddress, port: u16) -> String {
    format!("port {port} of {local:?}{}", namespace.describe())
}

fn explain(what: &str, local: OuterAddress, errno: Errno) -> BackendError {
    match errno {
        Errno::EADDRNOTAVAIL => BackendError::Unavailable(format!(
            "{what}: no interface has the address {local:?}, or it is not ready yet: add it (`ip address add`), or correct `local`"
        )),
        Errno::EADDRINUSE => BackendError::Unavailable(format!(
            "{what} is in use by another program, or by a tunnel of the kernel: end that, or choose another `port`"
        )),
        Errno::EACCES => {
            BackendError::Refused(format!("{what} may not be used: ports below 1024 need CAP_NET_BIND_SERVICE"))
        }
        errno => BackendError::Unavailable(format!("{what} cannot be opened: {errno}")),
    }
}
