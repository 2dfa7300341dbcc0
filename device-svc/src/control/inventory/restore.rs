//! A start: what the configuration file names, beside what is remembered of the service before.
//!
//! - What the file names, the file decides. After a service that died, VMs may still be there and hold on to what they were shown: a
//!   changed key that they would not notice is applied, another is refused by name before anything is started.
//! - What a command made stays as it was.
//! - What was there when the service died, or was made by a command, and cannot be opened now, does not keep the rest: it has failed,
//!   its VMs wait, and it is tried again. A file that was a volume is never made anew: an empty disk is worse than none.
//! - All else starts as a whole or not at all.

use super::{Inventory, InventoryError, Origin};
use crate::config::{BackendConfig, Config, FunctionConfig, UplinkConfig, VolumeConfig};
use crate::state::{CardState, Kept, KeptFunction};

/// What is known of a thing that is started.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Past {
    /// Nothing.
    New,
    /// It was there when the service ended.
    Ended,
    /// It was there when the service died, or a command made it: it may fail.
    Missed,
}

impl Past {
    const fn of(known: bool, died: bool) -> Self {
        match (known, died) {
            (false, _) => Self::New,
            (true, false) => Self::Ended,
            (true, true) => Self::Missed,
        }
    }
}

impl Inventory {
    /// Starts everything of a configuration, and what commands had made before; on the first error stops again what it started.
    ///
    /// # Errors
    /// Why one volume, uplink or function could not be started, or a key cannot be changed.
    pub fn start_all(&self, config: &Config) -> Result<(), InventoryError> {
        let mut memory = self.changing();
        let before = std::mem::take(&mut memory.before);
        if before.running {
            check_changes(config, &before)?;
        }
        say_changes(config, &before);
        for group in &config.limit_groups {
            self.write().groups.insert(group.name.clone(), group.clone());
        }
        let started = self
            .start_named(config, &before)
            .and_then(|()| self.start_made(config, &before))
            .and_then(|()| self.keep(&memory, |_| {}));
        started.inspect_err(|_| self.let_go_of_all())
    }

    /// What the file names.
    fn start_named(&self, config: &Config, before: &CardState) -> Result<(), InventoryError> {
        for volume in &config.volumes {
            let known = before.volumes.iter().any(|kept| kept.config.name == volume.name);
            self.start_volume(volume, Origin::File, Past::of(known, before.running))?;
        }
        for uplink in in_order(&config.uplinks) {
            let known = before.uplinks.iter().any(|kept| kept.config.name == uplink.name);
            self.start_uplink(uplink, Origin::File, Past::of(known, before.running))?;
        }
        for function in &config.functions {
            let known = before.functions.iter().find(|known| known.kept.config.name == function.name);
            let link_up = known.is_none_or(|known| known.link_up);
            self.start_function(function, link_up, Origin::File, Past::of(known.is_some(), before.running))?;
        }
        Ok(())
    }

    /// What commands had made, but for what the file names now.
    fn start_made(&self, config: &Config, before: &CardState) -> Result<(), InventoryError> {
        let (made, past) = (Origin::Command, Past::Missed);
        for Kept { config: volume, .. } in before.volumes.iter().filter(|kept| kept.origin == made) {
            if config.volumes.iter().all(|named| named.name != volume.name) {
                self.start_volume(volume, made, past)?;
            }
        }
        let uplinks: Vec<UplinkConfig> =
            before.uplinks.iter().filter(|kept| kept.origin == made).map(|kept| kept.config.clone()).collect();
        for uplink in in_order(&uplinks) {
            if config.uplinks.iter().all(|named| named.name != uplink.name) {
                self.start_uplink(uplink, made, past)?;
            }
        }
        for KeptFunction { kept, link_up } in before.functions.iter().filter(|known| known.kept.origin == made) {
            if config.functions.iter().all(|named| named.name != kept.config.name) {
                self.start_function(&kept.config, *link_up, made, past)?;
            }
        }
        Ok(())
    }

    fn start_volume(&self, config: &VolumeConfig, origin: Origin, past: Past) -> Result<(), InventoryError> {
        let volume = match (&config.backend, past) {
            (_, Past::New) => self.open_volume(config),
            // Its file may have another size by now than the one it was made with.
            (BackendConfig::File { path, .. }, Past::Ended) if !path.exists() => self.open_volume(config),
            _ => self.open_volume(&as_it_is(config)),
        };
        let volume = may_fail(volume, past)?;
        self.insert_volume(config.clone(), origin, volume);
        Ok(())
    }

    fn start_uplink(&self, config: &UplinkConfig, origin: Origin, past: Past) -> Result<(), InventoryError> {
        let uplink = may_fail(self.open_network(config), past)?;
        self.insert_uplink(config.clone(), origin, uplink);
        Ok(())
    }

    fn start_function(
        &self,
        config: &FunctionConfig,
        link_up: bool,
        origin: Origin,
        past: Past,
    ) -> Result<(), InventoryError> {
        let running = may_fail(self.run_function(config, link_up), past)?;
        self.insert_function(config.clone(), origin, link_up, running);
        Ok(())
    }

    /// Whether anything has failed.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        let tables = self.read();
        tables.volumes.values().any(|entry| entry.volume.is_err())
            || tables.uplinks.values().any(|entry| entry.uplink.is_err())
            || tables.functions.values().any(|entry| entry.running.is_err())
    }

    /// Functions that have failed, by their names.
    #[must_use]
    pub fn failed_functions(&self) -> Vec<String> {
        let tables = self.read();
        let failed = tables.functions.values().filter(|entry| entry.running.is_err());
        failed.map(|entry| entry.config.name.clone()).collect()
    }

    /// Tries again to open what has failed, and what is on it.
    pub fn try_failed_again(&self) {
        let failed: Vec<VolumeConfig> = {
            let tables = self.read();
            tables.volumes.values().filter(|entry| entry.volume.is_err()).map(|entry| entry.config.clone()).collect()
        };
        for config in failed {
            // Other changes do not wait for it: a server that is away may take its time to say nothing.
            let volume = self.open_volume(&as_it_is(&config));
            let _changing = self.changing();
            let mut tables = self.write();
            // It may have been deleted since, or made anew.
            let same =
                tables.volumes.get_mut(&config.name).filter(|entry| entry.volume.is_err() && entry.config == config);
            let Some(entry) = same else { continue };
            match volume {
                Ok(volume) => {
                    tracing::info!(volume = %config.name, "the volume that had failed is there again");
                    entry.volume = Ok(volume);
                }
                Err(error) => entry.volume = Err(error.to_string()),
            }
        }
        let _changing = self.changing();
        self.try_uplinks_again();
        self.try_functions_again();
    }

    fn try_uplinks_again(&self) {
        let failed: Vec<UplinkConfig> = {
            let tables = self.read();
            tables.uplinks.values().filter(|entry| entry.uplink.is_err()).map(|entry| entry.config.clone()).collect()
        };
        for config in in_order(&failed) {
            let uplink = self.open_network(config);
            if let Some(entry) = self.write().uplinks.get_mut(&config.name) {
                if uplink.is_ok() {
                    tracing::info!(uplink = %config.name, "the uplink that had failed is there again");
                }
                entry.uplink = uplink.map_err(|error| error.to_string());
            }
        }
    }

    fn try_functions_again(&self) {
        let failed: Vec<(FunctionConfig, bool)> = {
            let tables = self.read();
            let failed = tables.functions.values().filter(|entry| entry.running.is_err());
            failed.map(|entry| (entry.config.clone(), entry.link_up)).collect()
        };
        for (config, link_up) in failed {
            let running = self.run_function(&config, link_up);
            let sink = running.as_ref().ok().map(|running| running.sink.clone());
            if let Some(entry) = self.write().functions.get_mut(&config.name) {
                entry.running = running.map_err(|error| error.to_string());
            }
            if let Some(sink) = sink {
                tracing::info!(function = %config.name, "the function that had failed runs again");
                sink.create();
            }
        }
    }
}

/// What may fail is there with the reason; all else keeps the card from starting.
fn may_fail<T>(opened: Result<T, InventoryError>, past: Past) -> Result<super::Open<T>, InventoryError> {
    match (opened, past) {
        (Err(error), Past::Missed) => Ok(Err(error.to_string())),
        (opened, _) => opened.map(Ok),
    }
}

/// A volume that is opened and not made.
fn as_it_is(config: &VolumeConfig) -> VolumeConfig {
    let mut config = config.clone();
    if let BackendConfig::File { create_bytes, .. } = &mut config.backend {
        *create_bytes = None;
    }
    config
}

/// One that uses another comes after it.
fn in_order(uplinks: &[UplinkConfig]) -> impl Iterator<Item = &UplinkConfig> {
    let (alone, on_others): (Vec<_>, Vec<_>) = uplinks.iter().partition(|uplink| uplink.backend.uplink().is_none());
    alone.into_iter().chain(on_others)
}

/// Refuses what VMs that are still there would not survive.
fn check_changes(config: &Config, before: &CardState) -> Result<(), InventoryError> {
    let refused = |kind: &str, name: &str, key: Option<&str>| match key {
        None => Ok(()),
        Some(key) => Err(InventoryError::Refused(format!(
            "{kind} {name:?}: `{key}`: the configuration file changes it, but the service died, and a VM may still hold on to what it \
             was; put it back and start the card, end it by SIGTERM, and change it then"
        ))),
    };
    for new in &config.volumes {
        let old = before.volumes.iter().find(|old| old.config.name == new.name);
        refused("volume", &new.name, old.and_then(|old| old.config.fixed_difference(new)))?;
    }
    for new in &config.functions {
        let old = before.functions.iter().find(|old| old.kept.config.name == new.name);
        refused("function", &new.name, old.and_then(|old| old.kept.config.fixed_difference(new)))?;
    }
    Ok(())
}

/// Says what the configuration file changes of what was there.
fn say_changes(config: &Config, before: &CardState) {
    let say = |kind: &str, name: &str, origin: Origin, key: Option<&str>| {
        if origin == Origin::Command {
            tracing::info!("{kind} {name:?} was made by a command; the configuration file names it now, and decides");
        }
        if let Some(key) = key {
            tracing::info!("{kind} {name:?}: `{key}` has changed in the configuration file, and is applied");
        }
    };
    for new in &config.volumes {
        if let Some(old) = before.volumes.iter().find(|old| old.config.name == new.name) {
            say("volume", &new.name, old.origin, old.config.first_difference(new));
        }
    }
    for new in &config.uplinks {
        if let Some(old) = before.uplinks.iter().find(|old| old.config.name == new.name) {
            say("uplink", &new.name, old.origin, old.config.first_difference(new));
        }
    }
    for new in &config.functions {
        if let Some(old) = before.functions.iter().find(|old| old.kept.config.name == new.name) {
            say("function", &new.name, old.kept.origin, old.kept.config.first_difference(new));
        }
    }
}

#[cfg(test)]
mod tests;
