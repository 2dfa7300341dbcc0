//! The volumes and functions of a card: what exists, and the only way to change it.
//!
//! Changes happen one at a time and wholly or not at all. What asks (a list, a scrape) never waits for a change, which
//! may itself wait for a storage server.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::events::{EventKind, EventLog};
use super::seam::{FunctionRun, FunctionStarter, Standing, StartError};
use super::standing::StandingSink;
use crate::backend::{BackendError, BlockBackend, BlockInfo};
use crate::config::{BackendConfig, Config, FunctionConfig, LimitConfig, LimitGroupConfig, VolumeConfig};
use crate::metrics::{QueueCounters, ReactorCounters};
use crate::volume::Volume;

/// Turns a volume's settings into its storage; [`super::open_backend::open_backend`] but in tests.
pub type OpenBackend = Box<dyn Fn(&VolumeConfig) -> Result<Arc<dyn BlockBackend>, BackendError> + Send + Sync>;

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
    /// It is in use, or the storage or the link refuses.
    #[error("{0}")]
    Refused(String),
    /// Not now: the storage cannot be reached, or the card is stopping.
    #[error("{0}")]
    Unavailable(String),
}

/// A volume as it is now.
#[derive(Clone, Debug)]
pub struct VolumeState {
    /// Its settings.
    pub config: VolumeConfig,
    /// What it can do.
    pub info: BlockInfo,
    /// The functions that use it.
    pub functions: Vec<String>,
}

/// A function as it is now.
#[derive(Clone, Debug)]
pub struct FunctionState {
    /// Its settings.
    pub config: FunctionConfig,
    /// How it stands.
    pub standing: Standing,
    /// Its volume.
    pub volume: VolumeConfig,
    /// Its volume's size, bytes.
    pub size_bytes: u64,
}

struct VolumeEntry {
    config: VolumeConfig,
    volume: Arc<Volume>,
}

struct FunctionEntry {
    config: FunctionConfig,
    run: Arc<dyn FunctionRun>,
    sink: Arc<StandingSink>,
}

#[derive(Default)]
struct Tables {
    volumes: BTreeMap<String, VolumeEntry>,
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
}

impl Inventory {
    /// An empty inventory.
    #[must_use]
    pub fn new(starter: Arc<dyn FunctionStarter>, open_backend: OpenBackend) -> Self {
        Self {
            change: Mutex::new(()),
            tables: RwLock::default(),
            events: Arc::new(EventLog::default()),
            starter,
            open_backend,
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
    /// Why one volume or function could not be started.
    pub fn start_all(&self, config: &Config) -> Result<(), InventoryError> {
        for group in &config.limit_groups {
            self.write().groups.insert(group.name.clone(), group.clone());
        }
        let started = config
            .volumes
            .iter()
            .try_for_each(|volume| self.create_volume(volume.clone()).map(|_| ()))
            .and_then(|()| config.functions.iter().try_for_each(|f| self.create_function(f.clone()).map(|_| ())));
        started.inspect_err(|_| self.stop_all())
    }

    /// Stops every function and lets go of every volume. Nothing can be created afterwards.
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
        let volumes = std::mem::take(&mut self.write().volumes);
        drop(volumes);
    }

    /// Creates a volume. Returns whether it was not there before.
    ///
    /// # Errors
    /// When it stands against another or its storage refuses.
    pub fn create_volume(&self, config: VolumeConfig) -> Result<bool, InventoryError> {
        let _changing = self.changing();
        let place = format!("volume {:?}", config.name);
        {
            let tables = self.read();
            tables.check_running()?;
            if let Some(entry) = tables.volumes.get(&config.name) {
                return same_or_exists(&place, entry.config.first_difference(&config));
            }
            for other in tables.volumes.values() {
                config.check_beside(&other.config).map_err(|(key, m)| exists(&place, key, &m))?;
            }
        }
        let backend = (self.open_backend)(&config).map_err(|error| from_backend(&place, error))?;
        let volume = Arc::new(Volume::new(&config, backend));
        tracing::info!(volume = %config.name, uuid = %config.uuid, serial = config.serial_text(), "volume created");
        self.write().volumes.insert(config.name.clone(), VolumeEntry { config, volume });
        Ok(true)
    }

    /// Deletes a volume that no function uses.
    ///
    /// # Errors
    /// When it is not there or in use.
    pub fn delete_volume(&self, name: &str) -> Result<(), InventoryError> {
        let _changing = self.changing();
        let entry = {
            let mut tables = self.write();
            tables.volume(name)?;
            let users = tables.users(name);
            if !users.is_empty() {
                let users = users.join(", ");
                let message = format!("volume {name:?} is used by function {users}; delete that first");
                return Err(InventoryError::Refused(message));
            }
            tables.volumes.remove(name)
        };
        // Outside of the lock: closing storage may take a moment.
        drop(entry);
        tracing::info!(volume = name, "volume deleted");
        Ok(())
    }

    /// Sets a volume's size and tells its functions. Returns the volume as it is now.
    ///
    /// # Errors
    /// When it is not there, the size is not one, would lose data without `shrink`, or the storage refuses.
    pub fn resize_volume(&self, name: &str, size_bytes: u64, shrink: bool) -> Result<VolumeState, InventoryError> {
        let _changing = self.changing();
        let place = format!("volume {name:?}");
        let volume = Arc::clone(&self.read().volume(name)?.volume);
        let info = volume.info();
        // A guest that was told of 4096-byte blocks cannot be given half a one.
        let shown = self
            .read()
            .functions
            .values()
            .filter(|f| f.config.volume == name)
            .filter_map(|f| f.config.block_bytes)
            .max();
        let block_bytes = u64::from(info.block_bytes.max(shown.unwrap_or(0)));
        if size_bytes == 0 || !size_bytes.is_multiple_of(block_bytes) {
            let message =
                format!("{place}: a size of {size_bytes} bytes is not a multiple of its {block_bytes}-byte blocks");
            return Err(InventoryError::Invalid(message));
        }
        if size_bytes < info.size_bytes && !shrink {
            let message = format!(
                "{place} has {} bytes; making it smaller loses what lies beyond: ask for that with --shrink",
                info.size_bytes
            );
            return Err(InventoryError::Refused(message));
        }
        let size_bytes = volume.backend.resize(size_bytes).map_err(|error| from_backend(&place, error))?;
        let mut tables = self.write();
        if let Some(entry) = tables.volumes.get_mut(name) {
            // For these the size is a setting, and the one that a later creation is compared with.
            if let BackendConfig::Null { size_bytes: size } | BackendConfig::Ram { size_bytes: size } =
                &mut entry.config.backend
            {
                *size = size_bytes;
            }
        }
        drop(tables);
        if size_bytes != info.size_bytes {
            let users: Vec<(String, Arc<dyn FunctionRun>)> = {
                let tables = self.read();
                let users = tables.functions.values().filter(|function| function.config.volume == name);
                users.map(|function| (function.config.name.clone(), Arc::clone(&function.run))).collect()
            };
            // Outside of the lock: telling a host may take a moment.
            for (function, run) in users {
                run.resized(size_bytes);
                self.events.push(&function, volume.uuid, EventKind::Resized { size_bytes });
            }
        }
        self.volume(name)
    }

    /// One volume.
    ///
    /// # Errors
    /// When it is not there.
    pub fn volume(&self, name: &str) -> Result<VolumeState, InventoryError> {
        let tables = self.read();
        let entry = tables.volume(name)?;
        let functions = tables.users(name).into_iter().map(str::to_owned).collect();
        Ok(VolumeState { config: entry.config.clone(), info: entry.volume.info(), functions })
    }

    /// All volumes, by name.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeState> {
        let tables = self.read();
        let state = |entry: &VolumeEntry| VolumeState {
            config: entry.config.clone(),
            info: entry.volume.info(),
            functions: tables.users(&entry.config.name).into_iter().map(str::to_owned).collect(),
        };
        tables.volumes.values().map(state).collect()
    }

    /// Creates a function. Returns whether it was not there before.
    ///
    /// # Errors
    /// When it stands against another, or its volume or link refuses.
    pub fn create_function(&self, config: FunctionConfig) -> Result<bool, InventoryError> {
        let _changing = self.changing();
        let place = format!("function {:?}", config.name);
        let (volume, group) = {
            let tables = self.read();
            tables.check_running()?;
            if let Some(entry) = tables.functions.get(&config.name) {
                return same_or_exists(&place, entry.config.first_difference(&config));
            }
            let volume = tables.volume(&config.volume)?;
            for other in tables.functions.values() {
                config.check_beside(&other.config, &volume.config).map_err(|(key, m)| exists(&place, key, &m))?;
            }
            let group = config.limit_group.as_ref().map(|name| {
                let none =
                    || InventoryError::NotFound(format!("{place}: `limit-group`: there is no limit group {name:?}"));
                tables.groups.get(name).cloned().ok_or_else(none)
            });
            (Arc::clone(&volume.volume), group.transpose()?)
        };
        check_blocks(&place, &config, &volume.info())?;
        let sink = Arc::new(StandingSink::new(Arc::clone(&self.events), &config.name, volume.uuid));
        let told = Arc::clone(&sink);
        let notify = Box::new(move |standing| told.changed(standing));
        let run = self.starter.start(&config, group.as_ref(), volume, notify).map_err(|error| match error {
            StartError::Refused(message) => InventoryError::Refused(format!("{place}: {message}")),
            StartError::Unavailable(message) => InventoryError::Unavailable(format!("{place}: {message}")),
        })?;
        self.write().functions.insert(config.name.clone(), FunctionEntry { config, run, sink: Arc::clone(&sink) });
        sink.create();
        Ok(true)
    }

    /// Stops and deletes a function.
    ///
    /// # Errors
    /// When it is not there.
    pub fn delete_function(&self, name: &str) -> Result<(), InventoryError> {
        let _changing = self.changing();
        let run = Arc::clone(&self.read().function(name)?.run);
        run.stop();
        let entry = self.write().functions.remove(name);
        if let Some(entry) = entry {
            entry.sink.delete();
        }
        Ok(())
    }

    /// Changes a function's limit while it runs.
    ///
    /// # Errors
    /// When it is not there.
    pub fn set_function_limit(&self, name: &str, limit: LimitConfig) -> Result<FunctionState, InventoryError> {
        let _changing = self.changing();
        let mut tables = self.write();
        let entry = tables.functions.get_mut(name).ok_or_else(|| no_function(name))?;
        entry.run.set_limit(&limit);
        entry.config.limit = limit;
        drop(tables);
        self.function(name)
    }

    /// One function.
    ///
    /// # Errors
    /// When it is not there.
    pub fn function(&self, name: &str) -> Result<FunctionState, InventoryError> {
        let tables = self.read();
        tables.state(tables.function(name)?)
    }

    /// All functions, by name.
    #[must_use]
    pub fn functions(&self) -> Vec<FunctionState> {
        let tables = self.read();
        // A function's volume is always there, so none is left out.
        tables.functions.values().filter_map(|entry| tables.state(entry).ok()).collect()
    }

    /// What each function's queues count, by the function's name.
    #[must_use]
    pub fn queue_counters(&self) -> Vec<(String, Vec<Arc<QueueCounters>>)> {
        let tables = self.read();
        tables.functions.iter().map(|(name, entry)| (name.clone(), entry.run.counters().to_vec())).collect()
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

    fn function(&self, name: &str) -> Result<&FunctionEntry, InventoryError> {
        self.functions.get(name).ok_or_else(|| no_function(name))
    }

    fn users(&self, volume: &str) -> Vec<&str> {
        let users = self.functions.values().filter(|function| function.config.volume == volume);
        users.map(|function| function.config.name.as_str()).collect()
    }

    fn state(&self, entry: &FunctionEntry) -> Result<FunctionState, InventoryError> {
        let volume = self.volume(&entry.config.volume)?;
        Ok(FunctionState {
            config: entry.config.clone(),
            standing: entry.run.standing(),
            volume: volume.config.clone(),
            size_bytes: volume.volume.info().size_bytes,
        })
    }
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

/// A function can show larger blocks than its volume has, if they fit, but not smaller ones.
fn check_blocks(place: &str, config: &FunctionConfig, info: &BlockInfo) -> Result<(), InventoryError> {
    let Some(block_bytes) = config.block_bytes else { return Ok(()) };
    if block_bytes < info.block_bytes {
        let message = format!("the volume's blocks have {} bytes; leave the key out", info.block_bytes);
        return Err(InventoryError::Invalid(format!("{place}: `block-size`: {message}")));
    }
    if !info.size_bytes.is_multiple_of(u64::from(block_bytes)) {
        let message =
            format!("the volume's {} bytes are no multiple of {block_bytes}; resize it first", info.size_bytes);
        return Err(InventoryError::Invalid(format!("{place}: `block-size`: {message}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
