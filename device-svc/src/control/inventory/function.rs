//! Functions: created on a volume or an uplink, changed while they run, and deleted.

use std::sync::Arc;

use uuid::Uuid;

use super::{
    FunctionEntry, Inventory, InventoryError, Open, Running, Tables, VolumeEntry, exists, failed, same_or_exists,
};
use crate::backend::BlockInfo;
use crate::config::{BlkConfig, DeviceConfig, FunctionConfig, LimitConfig, NetChange, NetConfig};
use crate::control::seam::{Backing, SetError, Standing, StartError};
use crate::control::standing::{LinkState, StandingSink};
use crate::metrics::QueueCounters;
use crate::state::{Kept, KeptFunction, Origin};
use crate::uplink::Uplink;

/// A function as it is now.
#[derive(Clone, Debug)]
pub struct FunctionState {
    /// Its settings.
    pub config: FunctionConfig,
    /// How it stands.
    pub standing: Standing,
    /// What it is on.
    pub backing: BackingState,
}

/// What a function is on, as it is now.
#[derive(Clone, Debug)]
pub enum BackingState {
    /// A disk's volume.
    Volume {
        /// Its identity.
        uuid: Uuid,
        /// What the guest sees as the disk's serial.
        serial: String,
        /// Its size, bytes.
        size_bytes: u64,
    },
    /// A network interface's uplink.
    Uplink {
        /// How the function's link stands.
        link: LinkState,
    },
}

/// What changes of a function that runs.
#[derive(Clone, Debug)]
pub enum FunctionChange {
    /// Of a disk: its limit.
    Blk(LimitConfig),
    /// Of a network interface.
    Net(NetChange),
}

/// What a function's queues count.
pub struct FunctionCounters {
    /// The function's settings.
    pub config: FunctionConfig,
    /// By the queue's number.
    pub queues: Vec<Arc<QueueCounters>>,
}

impl Inventory {
    /// Creates a function by command. Returns whether it was not there before.
    ///
    /// # Errors
    /// When it stands against another, its volume, uplink or link refuses, or it cannot be kept.
    pub fn create_function(&self, config: FunctionConfig) -> Result<bool, InventoryError> {
        let memory = self.changing();
        let place = format!("function {:?}", config.name);
        {
            let tables = self.read();
            tables.check_running()?;
            if let Some(entry) = tables.functions.get(&config.name) {
                same_or_exists(&place, entry.config.first_difference(&config))?;
                return entry.running().map(|_| false);
            }
        }
        let running = self.run_function(&config, true)?;
        let kept = Kept { config: config.clone(), origin: Origin::Command };
        if let Err(error) = self.keep(&memory, |state| state.functions.push(KeptFunction { kept, link_up: true })) {
            running.run.stop();
            return Err(error);
        }
        self.insert_function(config, Origin::Command, true, Ok(running));
        Ok(true)
    }

    /// Starts a function beside those that are there, with its link up or down.
    pub(super) fn run_function(&self, config: &FunctionConfig, link_up: bool) -> Result<Running, InventoryError> {
        let place = format!("function {:?}", config.name);
        let (backing, sink, group) = {
            let tables = self.read();
            let (backing, sink) = match &config.device {
                DeviceConfig::Blk(blk) => {
                    let entry = tables.volume(&blk.volume)?;
                    tables.check_beside(&place, config, entry.config.read_only)?;
                    let volume = entry.open()?;
                    check_blocks(&place, blk, &volume.info())?;
                    let sink = StandingSink::of_disk(Arc::clone(&self.events), &config.name, volume.uuid);
                    (Backing::Volume(Arc::clone(volume)), sink)
                }
                DeviceConfig::Net(net) => {
                    let uplink = tables.uplink(&net.uplink)?.open()?;
                    tables.check_beside(&place, config, false)?;
                    tables.check_room(&place, "uplink", uplink, &place)?;
                    check_network(&place, net, uplink)?;
                    let carrier = Arc::clone(uplink.backend.carrier());
                    let sink = StandingSink::of_net(Arc::clone(&self.events), &config.name, carrier);
                    (Backing::Uplink(Arc::clone(uplink)), sink)
                }
            };
            let group = config.device.limit_group().map(|name| {
                let none =
                    || InventoryError::NotFound(format!("{place}: `limit-group`: there is no limit group {name:?}"));
                tables.groups.get(name).cloned().ok_or_else(none)
            });
            (backing, sink, group.transpose()?)
        };
        let told = Arc::clone(&sink);
        let notify = Box::new(move |standing| told.changed(standing));
        let run = self.starter.start(config, group.as_ref(), backing, notify).map_err(|error| match error {
            StartError::Refused(message) => InventoryError::Refused(format!("{place}: {message}")),
            StartError::Unavailable(message) => InventoryError::Unavailable(format!("{place}: {message}")),
        })?;
        if !link_up && matches!(config.device, DeviceConfig::Net(_)) {
            let down = NetChange { link_up: Some(false), ..NetChange::default() };
            if let Err(SetError::Refused(message)) = run.set_net(&down) {
                run.stop();
                return Err(InventoryError::Refused(format!("{place}: {message}")));
            }
            sink.set_link(false);
        }
        Ok(Running { run, sink })
    }

    pub(super) fn insert_function(
        &self,
        config: FunctionConfig,
        origin: Origin,
        link_up: bool,
        running: Open<Running>,
    ) {
        let sink = match &running {
            Ok(running) => Some(Arc::clone(&running.sink)),
            Err(why) => {
                tracing::error!(function = %config.name, "function failed: {why}");
                None
            }
        };
        self.write().functions.insert(config.name.clone(), FunctionEntry { config, origin, link_up, running });
        if let Some(sink) = sink {
            sink.create();
        }
    }

    /// Stops and deletes a function.
    ///
    /// # Errors
    /// When it is not there.
    pub fn delete_function(&self, name: &str) -> Result<(), InventoryError> {
        let memory = self.changing();
        let running = self.read().function(name)?.running.as_ref().ok().cloned();
        self.keep(&memory, |state| state.functions.retain(|function| function.kept.config.name != name))?;
        if let Some(Running { run, .. }) = &running {
            run.stop();
        }
        self.write().functions.remove(name);
        if let Some(Running { sink, .. }) = running {
            sink.delete();
        }
        Ok(())
    }

    /// Changes a function while it runs.
    ///
    /// # Errors
    /// When it is not there, is of another type, cannot be changed so, or the change cannot be kept.
    pub fn set_function(&self, name: &str, change: &FunctionChange) -> Result<FunctionState, InventoryError> {
        let memory = self.changing();
        let place = format!("function {name:?}");
        let (Running { run, sink }, changed, link_up) = {
            let tables = self.read();
            let entry = tables.function(name)?;
            let running = entry.running()?.clone();
            let link_up = match change {
                FunctionChange::Net(NetChange { link_up: Some(up), .. }) => *up,
                _ => entry.link_up,
            };
            (running, tables.changed(&place, &entry.config, change)?, link_up)
        };
        self.keep(&memory, |state| {
            if let Some(function) = state.functions.iter_mut().find(|function| function.kept.config.name == name) {
                (function.kept.config, function.link_up) = (changed.clone(), link_up);
            }
        })?;
        // Outside of the lock: telling a host may take a moment.
        match change {
            FunctionChange::Blk(limit) => run.set_limit(limit),
            FunctionChange::Net(change) => {
                if let Err(SetError::Refused(message)) = run.set_net(change) {
                    self.keep_unchanged(&memory);
                    return Err(InventoryError::Refused(format!("{place}: {message}")));
                }
                if let Some(up) = change.link_up {
                    sink.set_link(up);
                }
            }
        }
        if let Some(entry) = self.write().functions.get_mut(name) {
            (entry.config, entry.link_up) = (changed, link_up);
        }
        self.function(name)
    }

    /// One function.
    ///
    /// # Errors
    /// When it is not there.
    pub fn function(&self, name: &str) -> Result<FunctionState, InventoryError> {
        let tables = self.read();
        Ok(tables.function_state(tables.function(name)?))
    }

    /// All functions, by name.
    #[must_use]
    pub fn functions(&self) -> Vec<FunctionState> {
        let tables = self.read();
        tables.functions.values().map(|entry| tables.function_state(entry)).collect()
    }

    /// What each running function's queues count, by the function's name.
    #[must_use]
    pub fn queue_counters(&self) -> Vec<FunctionCounters> {
        let counters = |entry: &FunctionEntry| {
            let queues = entry.running.as_ref().ok()?.run.counters().to_vec();
            Some(FunctionCounters { config: entry.config.clone(), queues })
        };
        self.read().functions.values().filter_map(counters).collect()
    }
}

impl Tables {
    fn function_state(&self, entry: &FunctionEntry) -> FunctionState {
        let backing = match &entry.config.device {
            DeviceConfig::Blk(blk) => match self.volumes.get(&blk.volume) {
                Some(VolumeEntry { config, volume, .. }) => BackingState::Volume {
                    uuid: config.uuid,
                    serial: config.serial_text(),
                    size_bytes: volume.as_ref().map_or(0, |volume| volume.info().size_bytes),
                },
                // One that has failed because its volume is not there.
                None => BackingState::Volume { uuid: Uuid::nil(), serial: String::new(), size_bytes: 0 },
            },
            DeviceConfig::Net(_) => BackingState::Uplink {
                link: match &entry.running {
                    Ok(running) => running.sink.link_state(),
                    Err(_) => LinkState { set_up: entry.link_up, carrier: false },
                },
            },
        };
        let standing = match &entry.running {
            Ok(running) => running.run.standing(),
            Err(why) => Standing::Failed { reason: why.clone() },
        };
        FunctionState { config: entry.config.clone(), standing, backing }
    }

    /// The settings after `change` of `before`.
    fn changed(
        &self,
        place: &str,
        before: &FunctionConfig,
        change: &FunctionChange,
    ) -> Result<FunctionConfig, InventoryError> {
        let device = match (&before.device, change) {
            (DeviceConfig::Blk(blk), FunctionChange::Blk(limit)) => {
                DeviceConfig::Blk(BlkConfig { limit: limit.clone(), ..blk.clone() })
            }
            (DeviceConfig::Net(net), FunctionChange::Net(change)) => {
                let net = change.of(net);
                check_network(place, &net, self.uplink(&net.uplink)?.open()?)?;
                DeviceConfig::Net(net)
            }
            (device, _) => {
                let message = format!("{place} is of type {:?} now; ask again", device.type_name());
                return Err(InventoryError::Invalid(message));
            }
        };
        let changed = FunctionConfig { device, ..before.clone() };
        // Its volume stays, and so does the right to it.
        self.check_beside(place, &changed, true)?;
        Ok(changed)
    }

    /// Whether a function can be beside the others; `shared` says whether several may have its volume.
    fn check_beside(&self, place: &str, config: &FunctionConfig, shared: bool) -> Result<(), InventoryError> {
        let mut others = self.functions.values().filter(|other| other.config.name != config.name);
        others
            .try_for_each(|other| config.check_beside(&other.config, shared))
            .map_err(|(key, message)| exists(place, key, &message))
    }
}

impl FunctionEntry {
    /// What runs of it, if it has not failed.
    fn running(&self) -> Result<&Running, InventoryError> {
        self.running.as_ref().map_err(|why| failed(&format!("function {:?}", self.config.name), why))
    }
}

/// A function can show larger blocks than its volume has, if they fit, but not smaller ones.
fn check_blocks(place: &str, config: &BlkConfig, info: &BlockInfo) -> Result<(), InventoryError> {
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

/// A function can promise its guest no more than its uplink carries.
fn check_network(place: &str, config: &NetConfig, uplink: &Uplink) -> Result<(), InventoryError> {
    let (info, name) = (uplink.backend.info(), &uplink.name);
    if config.mtu > info.mtu_max {
        let message = format!("uplink {name:?} carries no more than {0} bytes; write `mtu = {0}`", info.mtu_max);
        return Err(InventoryError::Invalid(format!("{place}: `mtu`: {message}")));
    }
    if config.vlan.is_some() && !uplink.backend.has_ports() {
        let message = format!("uplink {name:?} is no switch, and has no ports with a VLAN; leave the key out");
        return Err(InventoryError::Invalid(format!("{place}: `vlan`: {message}")));
    }
    if config.queue_pairs > info.channels_max {
        let message = format!(
            "uplink {name:?} serves no more than {0} of a function; write `queue-pairs = {0}`",
            info.channels_max
        );
        return Err(InventoryError::Invalid(format!("{place}: `queue-pairs`: {message}")));
    }
    Ok(())
}
