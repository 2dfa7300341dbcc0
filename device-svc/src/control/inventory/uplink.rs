//! Uplinks: created and deleted.

use std::sync::Arc;

use super::{
    Inventory, InventoryError, Open, Tables, UplinkEntry, exists, failed, from_backend, names, same_or_exists,
};
use crate::backend::net::NetInfo;
use crate::config::UplinkConfig;
use crate::state::{Kept, Origin};
use crate::uplink::Uplink;

/// An uplink as it is now.
#[derive(Clone, Debug)]
pub struct UplinkState {
    /// Its settings.
    pub config: UplinkConfig,
    /// What its network can do, or why it has failed.
    pub info: Result<NetInfo, String>,
    /// Whether its network is there.
    pub carrier: bool,
    /// The functions that use it.
    pub functions: Vec<String>,
    /// The uplinks that use it.
    pub uplinks: Vec<String>,
}

impl Inventory {
    /// Creates an uplink by command. Returns whether it was not there before.
    ///
    /// # Errors
    /// When it stands against another, its network refuses, or it cannot be kept.
    pub fn create_uplink(&self, config: UplinkConfig) -> Result<bool, InventoryError> {
        let memory = self.changing();
        let place = format!("uplink {:?}", config.name);
        {
            let tables = self.read();
            tables.check_running()?;
            if let Some(entry) = tables.uplinks.get(&config.name) {
                same_or_exists(&place, entry.config.first_difference(&config))?;
                return entry.open().map(|_| false);
            }
        }
        let uplink = self.open_network(&config)?;
        let kept = Kept { config: config.clone(), origin: Origin::Command };
        self.keep(&memory, |state| state.uplinks.push(kept))?;
        self.insert_uplink(config, Origin::Command, Ok(uplink));
        Ok(true)
    }

    /// Opens an uplink beside those that are there.
    pub(super) fn open_network(&self, config: &UplinkConfig) -> Result<Arc<Uplink>, InventoryError> {
        let place = format!("uplink {:?}", config.name);
        let on = {
            let tables = self.read();
            for other in tables.uplinks.values().filter(|other| other.config.name != config.name) {
                config.check_beside(&other.config).map_err(|(key, m)| exists(&place, key, &m))?;
            }
            let on = config.backend.uplink().map(|name| tables.uplink(name)).transpose()?;
            if let Some(on) = on {
                config.check_on(&on.config).map_err(|(key, m)| exists(&place, key, &m))?;
                tables.check_room(&place, "backend", on.open()?, &place)?;
            }
            on.map(|on| on.open().cloned()).transpose()?
        };
        let on = on.as_ref().map(|on| on.backend.as_ref());
        let backend = (self.open_uplink)(config, on).map_err(|error| from_backend(&place, error))?;
        Ok(Arc::new(Uplink { name: config.name.clone(), backend }))
    }

    pub(super) fn insert_uplink(&self, config: UplinkConfig, origin: Origin, uplink: Open<Arc<Uplink>>) {
        match &uplink {
            Ok(_) => tracing::info!(uplink = %config.name, backend = %config.backend, "uplink created"),
            Err(why) => tracing::error!(uplink = %config.name, backend = %config.backend, "uplink failed: {why}"),
        }
        self.write().uplinks.insert(config.name.clone(), UplinkEntry { config, origin, uplink });
    }

    /// Deletes an uplink that no function uses.
    ///
    /// # Errors
    /// When it is not there or in use.
    pub fn delete_uplink(&self, name: &str) -> Result<(), InventoryError> {
        let memory = self.changing();
        {
            let tables = self.read();
            tables.uplink(name)?;
            let users = tables.users_of(name).join(", ");
            if !users.is_empty() {
                let message = format!("uplink {name:?} is used by {users}; delete that first");
                return Err(InventoryError::Refused(message));
            }
        }
        self.keep(&memory, |state| state.uplinks.retain(|uplink| uplink.config.name != name))?;
        let entry = self.write().uplinks.remove(name);
        // Outside of the lock: closing a network may take a moment.
        drop(entry);
        tracing::info!(uplink = name, "uplink deleted");
        Ok(())
    }

    /// One uplink.
    ///
    /// # Errors
    /// When it is not there.
    pub fn uplink(&self, name: &str) -> Result<UplinkState, InventoryError> {
        let tables = self.read();
        Ok(tables.uplink_state(tables.uplink(name)?))
    }

    /// All uplinks, by name.
    #[must_use]
    pub fn uplinks(&self) -> Vec<UplinkState> {
        let tables = self.read();
        tables.uplinks.values().map(|entry| tables.uplink_state(entry)).collect()
    }
}

impl UplinkEntry {
    /// The uplink, if it has not failed.
    pub(super) fn open(&self) -> Result<&Arc<Uplink>, InventoryError> {
        self.uplink.as_ref().map_err(|why| failed(&format!("uplink {:?}", self.config.name), why))
    }
}

impl Tables {
    fn uplink_state(&self, entry: &UplinkEntry) -> UplinkState {
        UplinkState {
            config: entry.config.clone(),
            info: entry.uplink.as_ref().map(|uplink| uplink.backend.info()).map_err(Clone::clone),
            carrier: entry.uplink.as_ref().is_ok_and(|uplink| uplink.backend.carrier().is_up()),
            functions: names(self.functions_on(&entry.config.name)),
            uplinks: self.uplinks_on(&entry.config.name).map(|other| other.config.name.clone()).collect(),
        }
    }
}
