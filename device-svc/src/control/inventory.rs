//! The volumes, uplinks and functions of a card: what exists, and the only way to change it.
//!
//! ```text
//!   this file        all of it: starting, stopping, who uses what
//!     ├► volume.rs     one volume: created, resized, deleted
//!     ├► uplink.rs     one uplink: created, deleted
//!     ├► function.rs   one function: created on a volume or uplink, changed, deleted
//!     ├► restore.rs    a start: what the configuration file names beside what is remembered; what failed is tried again
//!     └► keep.rs       what is remembered, before a change is answered
//! ```
//!
//! Changes happen one at a time and wholly or not at all. What asks (a list, a scrape) never waits for a change, which
//! may itself wait for a storage server.
//!
//! What was there before a restart and cannot be opened after it is there all the same, with the reason: it has failed.

mod function;
mod keep;
mod restore;
mod uplink;
mod volume;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

pub use function::{BackingState, FunctionChange, FunctionCounters, FunctionState};
pub use uplink::UplinkState;
pub use volume::VolumeState;

use super::events::EventLog;
use super::seam::{FunctionRun, FunctionStarter};
use super::standing::StandingSink;
use crate::backend::net::NetBackend;
use crate::backend::{BackendError, BlockBackend};
use crate::config::{FunctionConfig, LimitGroupConfig, UplinkConfig, VolumeConfig};
use crate::metrics::ReactorCounters;
use crate::state::{CardState, Origin, StateFolder};
use crate::uplink::Uplink;
use crate::volume::Volume;

/// Turns a volume's settings into its storage; [`super::open_backend::open_backend`] but in tests.
pub type OpenBackend = Box<dyn Fn(&VolumeConfig) -> Result<Arc<dyn BlockBackend>, BackendError> + Send + Sync>;

/// Turns an uplink's settings, and the network that it uses itself, into its network; [`super::open_backend::open_uplink`] but in
/// tests.
pub type OpenUplink =
    Box<dyn Fn(&UplinkConfig, Option<&dyn NetBackend>) -> Result<Arc<dyn NetBackend>, BackendError> + Send + Sync>;

/// How many functions are stopped at once: each may wait for its link for a moment.
const STOPPED_AT_ONCE: usize = 32;

/// Why a change was not made. Everything is as before.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InventoryError {
    /// A setting is wrong.
    #[error("{0}")]
    Invalid(String),
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// It is there with other settings, or something else stands against it.
    #[error("{0}")]
    Exists(String),
    /// It is in use, or the storage, the network or the link refuses.
    #[error("{0}")]
    Refused(String),
    /// Not now: the storage or the network cannot be reached, or the card is stopping.
    #[error("{0}")]
    Unavailable(String),
}

/// What is there, or why it has failed.
type Open<T> = Result<T, String>;

struct VolumeEntry {
    config: VolumeConfig,
    origin: Origin,
    volume: Open<Arc<Volume>>,
}

struct UplinkEntry {
    config: UplinkConfig,
    origin: Origin,
    uplink: Open<Arc<Uplink>>,
}

struct FunctionEntry {
    config: FunctionConfig,
    origin: Origin,
    /// Of a network interface: whether its link shall be up.
    link_up: bool,
    running: Open<Running>,
}

/// A function that runs.
#[derive(Clone)]
struct Running {
    run: Arc<dyn FunctionRun>,
    sink: Arc<StandingSink>,
}

#[derive(Default)]
struct Tables {
    volumes: BTreeMap<String, VolumeEntry>,
    uplinks: BTreeMap<String, UplinkEntry>,
    functions: BTreeMap<String, FunctionEntry>,
    groups: BTreeMap<String, LimitGroupConfig>,
    stopping: bool,
}

/// What outlives the service.
#[derive(Default)]
struct Memory {
    /// Where everything is kept, if it is.
    folder: Option<StateFolder>,
    /// What the service before this one had, until it is there again.
    before: CardState,
}

/// The inventory. Its methods block; none is to be called on an asynchronous thread.
pub struct Inventory {
    /// Held during a change.
    change: Mutex<Memory>,
    /// Held for moments.
    tables: RwLock<Tables>,
    events: Arc<EventLog>,
    starter: Arc<dyn FunctionStarter>,
    open_backend: OpenBackend,
    open_uplink: OpenUplink,
}

impl Inventory {
    /// An empty inventory.
    #[must_use]
    pub fn new(starter: Arc<dyn FunctionStarter>, open_backend: OpenBackend, open_uplink: OpenUplink) -> Self {
        Self {
            change: Mutex::default(),
            tables: RwLock::default(),
            events: Arc::new(EventLog::default()),
            starter,
            open_backend,
            open_uplink,
        }
    }

    /// What happens to functions.
    #[must_use]
    pub const fn events(&self) -> &Arc<EventLog> {
        &self.events
    }

    // A panic in one change leaves the tables as they were between two steps, and each step is whole.
    fn changing(&self) -> MutexGuard<'_, Memory> {
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.tables.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops every function and lets go of every volume and uplink. Nothing can be created afterwards. That is remembered as an end
    /// by itself, unless another program goes on with it (`handed_over`): then VMs hold on to what they were shown.
    pub fn stop_all(&self, handed_over: bool) {
        let memory = self.changing();
        let last = CardState { running: handed_over, ..self.read().state() };
        self.let_go_of_all();
        if let Some(folder) = &memory.folder
            && let Err(error) = folder.write(&last)
        {
            tracing::error!(%error, "that the card has ended by itself is not remembered");
        }
    }

    fn let_go_of_all(&self) {
        let functions: Vec<FunctionEntry> = {
            let mut tables = self.write();
            tables.stopping = true;
            std::mem::take(&mut tables.functions).into_values().collect()
        };
        let running: Vec<&Running> = functions.iter().filter_map(|function| function.running.as_ref().ok()).collect();
        for some in running.chunks(STOPPED_AT_ONCE) {
            std::thread::scope(|scope| {
                for function in some {
                    scope.spawn(|| function.run.stop());
                }
            });
            for function in some {
                function.sink.delete();
            }
        }
        drop(functions);
        let (volumes, uplinks) = {
            let mut tables = self.write();
            (std::mem::take(&mut tables.volumes), std::mem::take(&mut tables.uplinks))
        };
        drop((volumes, uplinks));
    }

    /// What each reactor counts.
    #[must_use]
    pub fn reactor_counters(&self) -> Vec<Arc<ReactorCounters>> {
        self.starter.reactors()
    }
}

impl Tables {
    fn check_running(&self) -> Result<(), InventoryError> {
        if self.stopping {
            return Err(InventoryError::Unavailable("the card is stopping; try again when it is back".to_owned()));
        }
        Ok(())
    }

    fn volume(&self, name: &str) -> Result<&VolumeEntry, InventoryError> {
        let none =
            || InventoryError::NotFound(format!("there is no volume {name:?}; `device-svc volume list` shows all"));
        self.volumes.get(name).ok_or_else(none)
    }

    fn uplink(&self, name: &str) -> Result<&UplinkEntry, InventoryError> {
        let none =
            || InventoryError::NotFound(format!("there is no uplink {name:?}; `device-svc uplink list` shows all"));
        self.uplinks.get(name).ok_or_else(none)
    }

    fn function(&self, name: &str) -> Result<&FunctionEntry, InventoryError> {
        self.functions.get(name).ok_or_else(|| no_function(name))
    }

    /// The functions on a volume.
    fn volume_users<'a>(&'a self, volume: &'a str) -> impl Iterator<Item = &'a FunctionEntry> {
        self.functions.values().filter(move |function| function.config.device.volume() == Some(volume))
    }

    /// The functions on an uplink.
    fn functions_on<'a>(&'a self, uplink: &'a str) -> impl Iterator<Item = &'a FunctionEntry> {
        self.functions.values().filter(move |function| function.config.device.uplink() == Some(uplink))
    }

    /// The uplinks that use this one.
    fn uplinks_on<'a>(&'a self, uplink: &'a str) -> impl Iterator<Item = &'a UplinkEntry> {
        self.uplinks.values().filter(move |other| other.config.backend.uplink() == Some(uplink))
    }

    /// All that use an uplink: `function "vm1-net0"`.
    fn users_of(&self, uplink: &str) -> Vec<String> {
        let functions = self.functions_on(uplink).map(|function| format!("function {:?}", function.config.name));
        functions.chain(self.uplinks_on(uplink).map(|other| format!("uplink {:?}", other.config.name))).collect()
    }

    /// Whether `user`, as [`users_of`](Self::users_of) calls it, can use an uplink beside the others.
    fn check_room(&self, place: &str, key: &str, uplink: &Uplink, user: &str) -> Result<(), InventoryError> {
        let mut users = self.users_of(&uplink.name);
        users.retain(|other| other != user);
        let most = uplink.backend.info().functions_max;
        if users.len() < most {
            return Ok(());
        }
        let message = format!(
            "uplink {:?} serves {most} at most, and has {}; delete one of them first, or give this one another uplink",
            uplink.name,
            users.join(", ")
        );
        Err(InventoryError::Refused(format!("{place}: `{key}`: {message}")))
    }
}

fn names<'a>(functions: impl Iterator<Item = &'a FunctionEntry>) -> Vec<String> {
    functions.map(|function| function.config.name.clone()).collect()
}

fn no_function(name: &str) -> InventoryError {
    InventoryError::NotFound(format!("there is no function {name:?}; `device-svc function list` shows all"))
}

fn exists(place: &str, key: &str, message: &str) -> InventoryError {
    InventoryError::Exists(format!("{place}: `{key}`: {message}"))
}

/// Creating what is there with the same settings succeeds, so that a script can be run twice.
fn same_or_exists(place: &str, difference: Option<&'static str>) -> Result<bool, InventoryError> {
    match difference {
        None => Ok(false),
        Some(key) => Err(exists(
            place,
            key,
            "it exists with another value; delete it first, or ask for the settings that it has",
        )),
    }
}

/// What has failed can be asked for nothing.
fn failed(place: &str, why: &str) -> InventoryError {
    InventoryError::Unavailable(format!("{place} has failed, and is tried again until it is there or deleted: {why}"))
}

fn from_backend(place: &str, error: BackendError) -> InventoryError {
    match error {
        BackendError::Refused(message) => InventoryError::Refused(format!("{place}: {message}")),
        BackendError::Unavailable(message) => InventoryError::Unavailable(format!("{place}: {message}")),
    }
}

#[cfg(test)]
mod tests;
