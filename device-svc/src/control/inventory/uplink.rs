//! Uplinks: created and deleted.

use std::sync::Arc;

use super::{Inventory, InventoryError, Tables, UplinkEntry, exists, from_backend, names, same_or_exists};
use crate::backend::net::NetInfo;
use crate::config::UplinkConfig;
use crate::uplink::Uplink;

/// An uplink as it is now.
#[derive(Clone, Debug)]
pub struct UplinkState {
    /// Its settings.
    pub config: UplinkConfig,
    /// What its network can do.
    pub info: NetInfo,
    /// Whether its network is there.
    pub carrier: bool,
    /// The functions that use it.
    pub functions: Vec<String>,
    /// The uplinks that use it.
    pub uplinks: Vec<String>,
}

impl Inventory {
    /// Creates an uplink. Returns whether it was not there before.
    ///
    /// # Errors
    /// When it stands against another or its network refuses.
    pub fn create_uplink(&self, config: UplinkConfig) -> Result<bool, InventoryError> {
        let _changing = self.changing();
        let place = format!("uplink {:?}", config.name);
        let on = {
            let tables = self.read();
            tables.check_running()?;
            if let Some(entry) = tables.uplinks.get(&config.name) {
                return same_or_exists(&place, entry.config.first_difference(&config));
            }
            for other in tables.uplinks.values() {
                config.check_beside(&other.config).map_err(|(key, m)| exists(&place, key, &m))?;
            }
            let on = config.backend.uplink().map(|name| tables.uplink(name)).transpose()?;
            if let Some(on) = on {
                config.check_on(&on.config).map_err(|(key, m)| exists(&place, key, &m))?;
                tables.check_room(&place, "backend", &on.uplink)?;
            }
            on.map(|on| Arc::clone(&on.uplink))
        };
        let on = on.as_ref().map(|on| on.backend.as_ref());
        let backend = (self.open_uplink)(&config, on).map_err(|error| from_backend(&place, error))?;
        let uplink = Arc::new(Uplink { name: config.name.clone(), backend });
        tracing::info!(uplink = %config.name, backend = %config.backend, "uplink created");
        self.write().uplinks.insert(config.name.clone(), UplinkEntry { config, uplink });
        Ok(true)
    }

    /// Deletes an uplink that no function uses.
    ///
    /// # Errors
    /// When it is not there or in use.
    pub fn delete_uplink(&self, name: &str) -> Result<(), InventoryError> {
        let _changing = self.changing();
        let entry = {
            let mut tables = self.write();
            tables.uplink(name)?;
            let users = tables.users_of(name).join(", ");
            if !users.is_empty() {
                let message = format!("uplink {name:?} is used by {users}; delete that first");
                return Err(InventoryError::Refused(message));
            }
            tables.uplinks.remove(name)
        };
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

impl Tables {
    fn uplink_state(&self, entry: &UplinkEntry) -> UplinkState {
        UplinkState {
            config: entry.config.clone(),
            info: entry.uplink.backend.info(),
            carrier: entry.uplink.backend.carrier().is_up(),
            functions: names(self.functions_on(&entry.config.name)),
            uplinks: self.uplinks_on(&entry.config.name).map(|other| other.config.name.clone()).collect(),
        }
    }
}
