//! Starts functions on the reactors: a function's queues and channels, then its link.

use std::collections::HashMap;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::function::{CardFunction, FaultNotice, FunctionPlace, rates_of, start_courier};
use super::seam::{Backing, FunctionRun, FunctionStarter, Notify, SetError, Standing, StartError};
use crate::backend::BackendError;
use crate::config::{
    DeviceConfig, FunctionConfig, LimitConfig, LimitGroupConfig, LinkConfig, LinkKind, NetChange, NotifyConfig,
    ReactorsConfig, SocketMode,
};
use crate::device::limit::Limit;
use crate::link::vfio_user::{VfioUserLink, VfioUserSettings};
use crate::link::vhost_user::{Role, VhostUserLink, VhostUserSettings};
use crate::link::{FunctionSide, LinkError};
use crate::metrics::{QueueCounters, ReactorCounters};
use crate::pci::Identity;
use crate::reactor::Reactors;
use crate::tether::Tether;

/// Starts the reactors of `config` and returns what starts functions on them; their connections are kept by whoever `tether` leads to.
///
/// # Errors
/// When the reactors cannot be started.
pub fn start_reactors(
    config: &ReactorsConfig,
    tether: Option<Arc<Tether>>,
) -> Result<Arc<dyn FunctionStarter>, StartError> {
    let refused = |error: &dyn std::fmt::Display| StartError::Refused(error.to_string());
    let courier = start_courier().map_err(|error| refused(&error))?;
    let reactors = Arc::new(Reactors::start(config).map_err(|error| refused(&error))?);
    for (number, reactor) in reactors.handles().iter().enumerate() {
        tracing::info!(reactor = number, cpu = reactor.cpu(), "a reactor turns");
    }
    Ok(Arc::new(OnReactors { config: *config, reactors, courier, tether, groups: Mutex::default() }))
}

struct OnReactors {
    config: ReactorsConfig,
    reactors: Arc<Reactors>,
    courier: Sender<FaultNotice>,
    tether: Option<Arc<Tether>>,
    /// The limits of groups that have functions.
    groups: Mutex<HashMap<String, Weak<Limit>>>,
}

impl OnReactors {
    /// The one limit that all functions of a group share.
    fn limit_of(&self, group: &LimitGroupConfig) -> Arc<Limit> {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(limit) = groups.get(&group.name).and_then(Weak::upgrade) {
            limit.set(&rates_of(&group.limit));
            return limit;
        }
        let limit = Arc::new(Limit::new(&rates_of(&group.limit)));
        groups.insert(group.name.clone(), Arc::downgrade(&limit));
        limit
    }
}

impl FunctionStarter for OnReactors {
    fn start(
        &self,
        config: &FunctionConfig,
        group: Option<&LimitGroupConfig>,
        backing: Backing,
        notify: Notify,
    ) -> Result<Arc<dyn FunctionRun>, StartError> {
        config.check_reactors(&self.config).map_err(|(key, why)| StartError::Refused(format!("`{key}`: {why}")))?;
        let group = group.map(|group| self.limit_of(group));
        let place = FunctionPlace { reactors: Arc::clone(&self.reactors), courier: self.courier.clone(), notify };
        let (function, identity) = match (&config.device, &backing) {
            (DeviceConfig::Blk(blk), Backing::Volume(volume)) => {
                (CardFunction::blk(config, blk, volume, group, place), Identity::BLK)
            }
            (DeviceConfig::Net(net), Backing::Uplink(uplink)) => {
                (CardFunction::net(config, net, uplink, place), Identity::NET)
            }
            _ => return Err(StartError::Refused("a disk is on a volume, a network interface on an uplink".to_owned())),
        };
        let function = function.map_err(|error| match error {
            BackendError::Refused(why) => StartError::Refused(why),
            BackendError::Unavailable(why) => StartError::Unavailable(why),
        })?;
        match start_link(config, identity, Arc::new(Arc::clone(&function)), self.tether.clone()) {
            Ok(link) => Ok(Arc::new(Running { function, link: Mutex::new(Some(link)), _backing: backing })),
            Err(error) => {
                function.close();
                Err(StartError::Refused(error.to_string()))
            }
        }
    }

    fn reactors(&self) -> Vec<Arc<ReactorCounters>> {
        self.reactors.handles().iter().map(|reactor| Arc::clone(reactor.counters())).collect()
    }
}

/// What keeps a function reachable; dropping it ends the connection.
enum Link {
    VhostUser { _link: VhostUserLink },
    VfioUser { _link: VfioUserLink },
}

fn start_link(
    config: &FunctionConfig,
    identity: Identity,
    side: Arc<dyn FunctionSide>,
    tether: Option<Arc<Tether>>,
) -> Result<Link, LinkError> {
    let LinkConfig { socket, socket_mode, kind, .. } = &config.link;
    let (function, socket, mode) = (config.name.clone(), socket.clone(), *socket_mode);
    match *kind {
        LinkKind::VhostUser { mode: who } => {
            let role = match who {
                SocketMode::Server => Role::Server { mode },
                SocketMode::Client => Role::Client,
            };
            let settings = VhostUserSettings { function, socket, role };
            VhostUserLink::start(settings, side, tether.as_ref()).map(|link| Link::VhostUser { _link: link })
        }
        LinkKind::VfioUser { notify, msix } => {
            let mapped = notify == NotifyConfig::Mapped;
            let settings = VfioUserSettings { function, socket, mode, identity, mapped, msix };
            VfioUserLink::start(settings, side, tether).map(|link| Link::VfioUser { _link: link })
        }
    }
}

/// A function and its link.
struct Running {
    function: Arc<CardFunction>,
    link: Mutex<Option<Link>>,
    /// Lives at least as long as its channels.
    _backing: Backing,
}

impl FunctionRun for Running {
    fn standing(&self) -> Standing {
        self.function.standing()
    }

    fn counters(&self) -> &[Arc<QueueCounters>] {
        self.function.counters()
    }

    fn resized(&self, size_bytes: u64) {
        self.function.resized(size_bytes);
    }

    fn set_limit(&self, limit: &LimitConfig) {
        self.function.set_limit(limit);
    }

    fn set_net(&self, change: &NetChange) -> Result<(), SetError> {
        self.function.set_net(change)
    }

    fn stop(&self) {
        // The link first: it is what starts queues.
        drop(self.link.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.function.close();
    }
}
