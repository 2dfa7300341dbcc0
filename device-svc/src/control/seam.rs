//! What the inventory asks of a function that runs, so that the control interface can be tested without a data path.

use std::sync::Arc;

use crate::config::{FunctionConfig, LimitConfig, LimitGroupConfig, NetChange};
use crate::metrics::{QueueCounters, ReactorCounters};
use crate::uplink::Uplink;
use crate::volume::Volume;

/// How a function stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Nobody is attached.
    Waiting,
    /// Somebody is attached, and so many queues run.
    Attached {
        /// Queues that run.
        running: u16,
    },
    /// A fault of the guest stopped it; it needs a reset.
    NeedsReset {
        /// What the guest did.
        reason: String,
    },
    /// It was there before a restart and could not be started after it; nobody can attach. It is tried again.
    Failed {
        /// What stands against it.
        reason: String,
    },
}

/// Is told of each change of a function's standing, from any thread; never blocks for long.
pub type Notify = Box<dyn Fn(Standing) + Send + Sync>;

/// What a function carries its requests or frames to.
#[derive(Clone)]
pub enum Backing {
    /// A disk's.
    Volume(Arc<Volume>),
    /// A network interface's.
    Uplink(Arc<Uplink>),
}

/// Why a function could not be started. Nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its settings cannot be served here (a socket in use, a volume that cannot do it): somebody has to change them.
    #[error("{0}")]
    Refused(String),
    /// The storage cannot be reached now; trying again may help.
    #[error("{0}")]
    Unavailable(String),
}

/// Why a function that runs was not changed. Everything is as before.
#[derive(Debug, thiserror::Error)]
pub enum SetError {
    /// It cannot be changed so: somebody has to ask for something else.
    #[error("{0}")]
    Refused(String),
}

/// One function while it exists.
pub trait FunctionRun: Send + Sync {
    /// How it stands now.
    fn standing(&self) -> Standing;

    /// What its queues count, by the queue's number.
    fn counters(&self) -> &[Arc<QueueCounters>];

    /// A disk's volume has this size now, bytes: the guest is told.
    fn resized(&self, size_bytes: u64);

    /// Changes a disk's own limit while it runs.
    fn set_limit(&self, limit: &LimitConfig);

    /// Changes a network interface while it runs, wholly or not at all; the guest is told of what it can be told. The uplink has been
    /// asked whether it carries the MTU. A function starts with its link up, as far as its uplink has a carrier, which the function
    /// follows by itself.
    ///
    /// # Errors
    /// When it cannot be changed so.
    fn set_net(&self, change: &NetChange) -> Result<(), SetError>;

    /// Ends it: the link is closed, the queues are stopped, nothing touches the VM's memory or the volume any more. Takes
    /// a bounded time, whatever the VMM and the storage server do.
    fn stop(&self);
}

/// Starts functions.
pub trait FunctionStarter: Send + Sync {
    /// Starts the function of `config` on `backing`, which suits its type; it shares the limit of `group` with the group's others.
    ///
    /// # Errors
    /// When the link, the volume or the uplink refuses.
    fn start(
        &self,
        config: &FunctionConfig,
        group: Option<&LimitGroupConfig>,
        backing: Backing,
        notify: Notify,
    ) -> Result<Arc<dyn FunctionRun>, StartError>;

    /// What the reactors count, by the reactor's number.
    fn reactors(&self) -> Vec<Arc<ReactorCounters>>;
}
