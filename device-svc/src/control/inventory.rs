//! The volumes, uplinks and functions of a card: what exists, and the only way to change it.
//!
//! ```text
//!   this file        all of it: starting, stopping, who uses what
//!     ├► volume.rs     one volume: created, resized, deleted
//!     ├► uplink.rs     one uplink: created, deleted
//!     └► function.rs   one function: created on a volume or uplink, changed, deleted
//! ```
//!
//! Changes happen one at a time and wholly or not at all. What asks (a list, a scrape) never waits for a change, which
//! may itself wait for a storage server.

mod function;
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
use crate::config::{Config, FunctionConfig, LimitGroupConfig, UplinkConfig, VolumeConfig};
use crate::metrics::ReactorCounters;
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

struct VolumeEntry {
    config: VolumeConfig,
    volume: Arc<Volume>,
}

struct UplinkEntry {
    config: UplinkConfig,
    uplink: Arc<Uplink>,
}

struct FunctionEntry {
    config: FunctionConfig,
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

/// The inventory. Its methods block; none is to be called on an asynchronous thread.
pub struct Inventory {
    /// Held during a change.
    change: Mutex<()>,
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
            change: Mutex::new(()),
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
    fn changing(&self) -> MutexGuard<'_, ()> {
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.tables.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts everything of a configuration; on the first error stops again what it started.
    ///
    /// # Errors
    /// Why one volume, uplink or function could not be started.
    pub fn start_all(&self, config: &Config) -> Result<(), InventoryError> {
        for group in &config.limit_groups {
            self.write().groups.insert(group.name.clone(), group.clone());
        }
        // One that uses another comes after it.
        let (alone, on_others): (Vec<_>, Vec<_>) =
            config.uplinks.iter().partition(|uplink| uplink.backend.uplink().is_none());
        let mut uplinks = alone.into_iter().chain(on_others);
        let started = config
            .volumes
            .iter()
            .try_for_each(|volume| self.create_volume(volume.clone()).map(|_| ()))
            .and_then(|()| uplinks.try_for_each(|u| self.create_uplink(u.clone()).map(|_| ())))
            .and_then(|()| config.functions.iter().try_for_each(|f| self.create_function(f.clone()).map(|_| ())));
        started.inspect_err(|_| self.stop_all())
    }

    /// Stops every function and lets go of every volume and uplink. Nothing can be created afterwards.
    pub fn stop_all(&self) {
        let _changing = self.changing();
        let functions: Vec<FunctionEntry> = {
            let mut tables = self.write();
            tables.stopping = true;
            std::mem::take(&mut tables.functions).into_values().collect()
        };
        for some in functions.chunks(STOPPED_AT_ONCE) {
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

    /// Whether one more can use an uplink.
    fn check_room(&self, place: &str, key: &str, uplink: &Uplink) -> Result<(), InventoryError> {
        let users = self.users_of(&uplink.name);
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

fn from_backend(place: &str, error: BackendError) -> InventoryError {
    match error {
        BackendError::Refused(message) => InventoryError::Refused(format!("{place}: {message}")),
        BackendError::Unavailable(message) => InventoryError::Unavailable(format!("{place}: {message}")),
    }
}

#[cfg(test)]
mod tests;
