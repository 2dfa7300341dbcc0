//! Starts functions on the reactors: a function's queues and channels, then its link.

use std::collections::HashMap;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::function::{BlkFunction, FaultNotice, rates_of, start_courier};
use super::seam::{FunctionRun, FunctionStarter, Notify, Standing, StartError};
use crate::backend::BackendError;
use crate::config::{FunctionConfig, LimitConfig, LimitGroupConfig, LinkConfig, ReactorsConfig, SocketMode};
use crate::device::limit::Limit;
use crate::link::FunctionSide;
use crate::link::vhost_user::{Role, VhostUserLink, VhostUserSettings};
use crate::metrics::{QueueCounters, ReactorCounters};
use crate::reactor::Reactors;
use crate::volume::Volume;

/// Starts the reactors of `config` and returns what starts functions on them.
///
/// # Errors
/// When the reactors cannot be started.
pub fn start_reactors(config: &ReactorsConfig) -> Result<Arc<dyn FunctionStarter>, StartError> {
    let refused = |error: &dyn std::fmt::Display| StartError::Refused(error.to_string());
    let courier = start_courier().map_err(|error| refused(&error))?;
    let reactors = Arc::new(Reactors::start(config).map_err(|error| refused(&error))?);
    for (number, reactor) in reactors.handles().iter().enumerate() {
        tracing::info!(reactor = number, cpu = reactor.cpu(), "a reactor turns");
    }
    Ok(Arc::new(OnReactors { reactors, courier, groups: Mutex::default() }))
}

struct OnReactors {
    reactors: Arc<Reactors>,
    courier: Sender<FaultNotice>,
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
        volume: Arc<Volume>,
        notify: Notify,
    ) -> Result<Arc<dyn FunctionRun>, StartError> {
        let group = group.map(|group| self.limit_of(group));
        let reactors = Arc::clone(&self.reactors);
        let function = BlkFunction::new(config, &volume, group, reactors, self.courier.clone(), notify);
        let function = function.map_err(|error| match error {
            BackendError::Refused(why) => StartError::Refused(why),
            BackendError::Unavailable(why) => StartError::Unavailable(why),
        })?;
        let LinkConfig::VhostUser { socket, mode, socket_mode, .. } = &config.link;
        let role = match mode {
            SocketMode::Server => Role::Server { mode: *socket_mode },
            SocketMode::Client => Role::Client,
        };
        let settings = VhostUserSettings { function: config.name.clone(), socket: socket.clone(), role };
        let side: Arc<dyn FunctionSide> = Arc::new(Arc::clone(&function));
        match VhostUserLink::start(settings, side) {
            Ok(link) => Ok(Arc::new(Running { function, link: Mutex::new(Some(link)), _volume: volume })),
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

/// A function and its link.
struct Running {
    function: Arc<BlkFunction>,
    link: Mutex<Option<VhostUserLink>>,
    /// Lives at least as long as its channels.
    _volume: Arc<Volume>,
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

    fn stop(&self) {
        // The link first: it is what starts queues.
        drop(self.link.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.function.close();
    }
}
