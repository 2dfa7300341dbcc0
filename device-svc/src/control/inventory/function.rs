//! Functions: created on a volume or an uplink, changed while they run, and deleted.

use std::sync::Arc;

use uuid::Uuid;

use super::{FunctionEntry, Inventory, InventoryError, Tables, VolumeEntry, exists, same_or_exists};
use crate::backend::BlockInfo;
use crate::config::{BlkConfig, DeviceConfig, FunctionConfig, LimitConfig, NetChange, NetConfig};
use crate::control::seam::{Backing, SetError, Standing, StartError};
use crate::control::standing::{LinkState, StandingSink};
use crate::metrics::QueueCounters;
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
    /// Creates a function. Returns whether it was not there before.
    ///
    /// # Errors
    /// When it stands against another, or its volume, uplink or link refuses.
    pub fn create_function(&self, config: FunctionConfig) -> Result<bool, InventoryError> {
        let _changing = self.changing();
        let place = format!("function {:?}", config.name);
        let (backing, sink, group) = {
            let tables = self.read();
            tables.check_running()?;
            if let Some(entry) = tables.functions.get(&config.name) {
                return same_or_exists(&place, entry.config.first_difference(&config));
            }
            let (backing, sink) = match &config.device {
                DeviceConfig::Blk(blk) => {
                    let VolumeEntry { config: settings, volume } = tables.volume(&blk.volume)?;
                    tables.check_beside(&place, &config, settings.read_only)?;
                    check_blocks(&place, blk, &volume.info())?;
                    let sink = StandingSink::of_disk(Arc::clone(&self.events), &config.name, volume.uuid);
                    (Backing::Volume(Arc::clone(volume)), sink)
                }
                DeviceConfig::Net(net) => {
                    let uplink = &tables.uplink(&net.uplink)?.uplink;
                    tables.check_beside(&place, &config, false)?;
                    tables.check_room(&place, "uplink", uplink)?;
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
        let run = self.starter.start(&config, group.as_ref(), backing, notify).map_err(|error| match error {
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

    /// Changes a function while it runs.
    ///
    /// # Errors
    /// When it is not there, is of another type, or cannot be changed so.
    pub fn set_function(&self, name: &str, change: &FunctionChange) -> Result<FunctionState, InventoryError> {
        let _changing = self.changing();
        let place = format!("function {name:?}");
        let (run, sink, changed) = {
            let tables = self.read();
            let entry = tables.function(name)?;
            let changed = tables.changed(&place, &entry.config, change)?;
            (Arc::clone(&entry.run), Arc::clone(&entry.sink), changed)
        };
        // Outside of the lock: telling a host may take a moment.
        match change {
            FunctionChange::Blk(limit) => run.set_limit(limit),
            FunctionChange::Net(change) => {
                let refused = |SetError::Refused(message)| InventoryError::Refused(format!("{place}: {message}"));
                run.set_net(change).map_err(refused)?;
                if let Some(up) = change.link_up {
                    sink.set_link(up);
                }
            }
        }
        if let Some(entry) = self.write().functions.get_mut(name) {
            entry.config = changed;
        }
        self.function(name)
    }

    /// One function.
    ///
    /// # Errors
    /// When it is not there.
    pub fn function(&self, name: &str) -> Result<FunctionState, InventoryError> {
        let tables = self.read();
        tables.function_state(tables.function(name)?)
    }

    /// All functions, by name.
    #[must_use]
    pub fn functions(&self) -> Vec<FunctionState> {
        let tables = self.read();
        // A function's volume is always there, so none is left out.
        tables.functions.values().filter_map(|entry| tables.function_state(entry).ok()).collect()
    }

    /// What each function's queues count, by the function's name.
    #[must_use]
    pub fn queue_counters(&self) -> Vec<FunctionCounters> {
        let counters = |entry: &FunctionEntry| FunctionCounters {
            config: entry.config.clone(),
            queues: entry.run.counters().to_vec(),
        };
        self.read().functions.values().map(counters).collect()
    }
}

impl Tables {
    fn function_state(&self, entry: &FunctionEntry) -> Result<FunctionState, InventoryError> {
        let backing = match &entry.config.device {
            DeviceConfig::Blk(blk) => {
                let VolumeEntry { config, volume } = self.volume(&blk.volume)?;
                BackingState::Volume {
                    uuid: config.uuid,
                    serial: config.serial_text(),
                    size_bytes: volume.info().size_bytes,
                }
            }
            DeviceConfig::Net(_) => BackingState::Uplink { link: entry.sink.link_state() },
        };
        Ok(FunctionState { config: entry.config.clone(), standing: entry.run.standing(), backing })
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
                check_network(place, &net, &self.uplink(&net.uplink)?.uplink)?;
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
