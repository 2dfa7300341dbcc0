//! What the inventory asks of a function that runs, so that the control interface can be tested without a data path.

use std::sync::Arc;

use crate::config::{FunctionConfig, LimitConfig, LimitGroupConfig};
use crate::metrics::{QueueCounters, ReactorCounters};
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
}

/// Is told of each change of a function's standing, from any thread; never blocks for long.
pub type Notify = Box<dyn Fn(Standing) + Send + Sync>;

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

/// One function while it exists.
pub trait FunctionRun: Send + Sync {
    /// How it stands now.
    fn standing(&self) -> Standing;

    /// What its queues count, by the queue's number.
    fn counters(&self) -> &[Arc<QueueCounters>];

    /// Its volume has this size now, bytes: the guest is told.
    fn resized(&self, size_bytes: u64);

    /// Changes its own limit while it runs.
    fn set_limit(&self, limit: &LimitConfig);

    /// Ends it: the link is closed, the queues are stopped, nothing touches the VM's memory or the volume any more. Takes
    /// a bounded time, whatever the VMM and the storage server do.
    fn stop(&self);
}

/// Starts functions.
pub trait FunctionStarter: Send + Sync {
    /// Starts the function of `config` on `volume`; it shares the limit of `group` with the group's others.
    ///
    /// # Errors
    /// When the link or the volume refuses.
    fn start(
        &self,
        config: &FunctionConfig,
        group: Option<&LimitGroupConfig>,
        volume: Arc<Volume>,
        notify: Notify,
    ) -> Result<Arc<dyn FunctionRun>, StartError>;

    /// What the reactors count, by the reactor's number.
    fn reactors(&self) -> Vec<Arc<ReactorCounters>>;
}
