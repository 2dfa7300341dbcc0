//! Volumes: created, resized and deleted.

use std::sync::Arc;

use super::{
    FunctionEntry, Inventory, InventoryError, Open, Running, Tables, VolumeEntry, exists, failed, from_backend, names,
    same_or_exists,
};
use crate::backend::BlockInfo;
use crate::config::{BackendConfig, DeviceConfig, VolumeConfig};
use crate::control::events::EventKind;
use crate::state::{Kept, Origin};
use crate::volume::Volume;

/// A volume as it is now.
#[derive(Clone, Debug)]
pub struct VolumeState {
    /// Its settings.
    pub config: VolumeConfig,
    /// What it can do, or why it has failed.
    pub info: Result<BlockInfo, String>,
    /// The functions that use it.
    pub functions: Vec<String>,
}

impl Inventory {
    /// Creates a volume by command. Returns whether it was not there before.
    ///
    /// # Errors
    /// When it stands against another, its storage refuses, or it cannot be kept.
    pub fn create_volume(&self, config: VolumeConfig) -> Result<bool, InventoryError> {
        let memory = self.changing();
        let place = format!("volume {:?}", config.name);
        {
            let tables = self.read();
            tables.check_running()?;
            if let Some(entry) = tables.volumes.get(&config.name) {
                same_or_exists(&place, entry.config.first_difference(&config))?;
                return entry.open().map(|_| false);
            }
        }
        let volume = self.open_volume(&config)?;
        let kept = Kept { config: config.clone(), origin: Origin::Command };
        self.keep(&memory, |state| state.volumes.push(kept))?;
        self.insert_volume(config, Origin::Command, Ok(volume));
        Ok(true)
    }

    /// Opens a volume beside those that are there.
    pub(super) fn open_volume(&self, config: &VolumeConfig) -> Result<Arc<Volume>, InventoryError> {
        let place = format!("volume {:?}", config.name);
        for other in self.read().volumes.values().filter(|other| other.config.name != config.name) {
            config.check_beside(&other.config).map_err(|(key, m)| exists(&place, key, &m))?;
        }
        let backend = (self.open_backend)(config).map_err(|error| from_backend(&place, error))?;
        Ok(Arc::new(Volume::new(config, backend)))
    }

    pub(super) fn insert_volume(&self, config: VolumeConfig, origin: Origin, volume: Open<Arc<Volume>>) {
        match &volume {
            Ok(_) => {
                tracing::info!(volume = %config.name, uuid = %config.uuid, serial = config.serial_text(), "volume created");
            }
            Err(why) => tracing::error!(volume = %config.name, "volume failed: {why}"),
        }
        self.write().volumes.insert(config.name.clone(), VolumeEntry { config, origin, volume });
    }

    /// Deletes a volume that no function uses.
    ///
    /// # Errors
    /// When it is not there or in use.
    pub fn delete_volume(&self, name: &str) -> Result<(), InventoryError> {
        let memory = self.changing();
        {
            let tables = self.read();
            tables.volume(name)?;
            let users = names(tables.volume_users(name)).join(", ");
            if !users.is_empty() {
                let message = format!("volume {name:?} is used by function {users}; delete that first");
                return Err(InventoryError::Refused(message));
            }
        }
        self.keep(&memory, |state| state.volumes.retain(|volume| volume.config.name != name))?;
        let entry = self.write().volumes.remove(name);
        // Outside of the lock: closing storage may take a moment.
        drop(entry);
        tracing::info!(volume = name, "volume deleted");
        Ok(())
    }

    /// Sets a volume's size and tells its functions. Returns the volume as it is now.
    ///
    /// # Errors
    /// When it is not there, the size is not one, would lose data without `shrink`, or the storage refuses; or when it cannot be kept,
    /// and then it has its new size until a restart.
    pub fn resize_volume(&self, name: &str, size_bytes: u64, shrink: bool) -> Result<VolumeState, InventoryError> {
        let memory = self.changing();
        let place = format!("volume {name:?}");
        let volume = Arc::clone(self.read().volume(name)?.open()?);
        let info = volume.info();
        // A guest that was told of 4096-byte blocks cannot be given half a one.
        let shown = self.read().volume_users(name).filter_map(|user| shown_blocks(&user.config.device)).max();
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
            let users: Vec<(String, Running)> = {
                let tables = self.read();
                let running = |function: &FunctionEntry| {
                    Some((function.config.name.clone(), function.running.as_ref().ok()?.clone()))
                };
                tables.volume_users(name).filter_map(running).collect()
            };
            // Outside of the lock: telling a host may take a moment.
            for (function, Running { run, .. }) in users {
                run.resized(size_bytes);
                self.events.push(&function, Some(volume.uuid), EventKind::Resized { size_bytes });
            }
        }
        self.keep(&memory, |_| {})?;
        self.volume(name)
    }

    /// One volume.
    ///
    /// # Errors
    /// When it is not there.
    pub fn volume(&self, name: &str) -> Result<VolumeState, InventoryError> {
        let tables = self.read();
        Ok(tables.volume_state(tables.volume(name)?))
    }

    /// All volumes, by name.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeState> {
        let tables = self.read();
        tables.volumes.values().map(|entry| tables.volume_state(entry)).collect()
    }
}

impl Tables {
    fn volume_state(&self, entry: &VolumeEntry) -> VolumeState {
        VolumeState {
            config: entry.config.clone(),
            info: entry.volume.as_ref().map(|volume| volume.info()).map_err(Clone::clone),
            functions: names(self.volume_users(&entry.config.name)),
        }
    }
}

impl VolumeEntry {
    /// The volume, if it has not failed.
    pub(super) fn open(&self) -> Result<&Arc<Volume>, InventoryError> {
        self.volume.as_ref().map_err(|why| failed(&format!("volume {:?}", self.config.name), why))
    }
}

/// The size of a disk's blocks, if it was set.
const fn shown_blocks(device: &DeviceConfig) -> Option<u32> {
    match device {
        DeviceConfig::Blk(blk) => blk.block_bytes,
        DeviceConfig::Net(_) => None,
    }
}
