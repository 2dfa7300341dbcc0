//! What outlives the service: everything that is there is written down before a change of it is answered.

use super::{FunctionEntry, Inventory, InventoryError, Memory, Tables};
use crate::state::{CardState, Kept, KeptFunction, StateFolder};

impl Inventory {
    /// From now on everything is kept in `folder`; `before` is what the service before this one had, for the start.
    pub fn keep_in(&self, folder: StateFolder, before: CardState) {
        *self.changing() = Memory { folder: Some(folder), before };
    }

    /// Keeps what is there, with a change that is still to be made, or was just made.
    ///
    /// # Errors
    /// When it cannot be kept; what was kept before still is.
    pub(super) fn keep(&self, memory: &Memory, change: impl FnOnce(&mut CardState)) -> Result<(), InventoryError> {
        let Some(folder) = &memory.folder else { return Ok(()) };
        let mut state = CardState { running: true, ..self.read().state() };
        change(&mut state);
        let unkept = |error| InventoryError::Unavailable(format!("it could not be remembered: {error}"));
        folder.write(&state).map_err(unkept)
    }

    /// The change was not made after all.
    pub(super) fn keep_unchanged(&self, memory: &Memory) {
        if let Err(error) = self.keep(memory, |_| {}) {
            tracing::error!(%error, "a change that was not made is remembered, until the next one is");
        }
    }
}

impl Tables {
    /// Everything, as it is kept.
    pub(super) fn state(&self) -> CardState {
        let volumes = self.volumes.values().map(|entry| Kept { config: entry.config.clone(), origin: entry.origin });
        let uplinks = self.uplinks.values().map(|entry| Kept { config: entry.config.clone(), origin: entry.origin });
        CardState {
            running: true,
            volumes: volumes.collect(),
            uplinks: uplinks.collect(),
            functions: self.functions.values().map(kept_function).collect(),
        }
    }
}

fn kept_function(entry: &FunctionEntry) -> KeptFunction {
    let kept = Kept { config: entry.config.clone(), origin: entry.origin };
    KeptFunction { kept, link_up: entry.link_up }
}
