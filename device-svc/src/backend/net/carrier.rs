//! Whether a network is there: an interface that was deleted, or has been taken down, carries nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Who follows a carrier.
pub trait CarrierWatcher: Send + Sync {
    /// It has come or gone.
    fn carrier_changed(&self, up: bool);
}

/// The state of an uplink's carrier, which the backend's control half sets and functions follow.
#[derive(Default)]
pub struct Carrier {
    up: AtomicBool,
    /// Those that are gone stay until the next one comes, or the carrier changes.
    watchers: Mutex<Vec<Weak<dyn CarrierWatcher>>>,
}

impl Carrier {
    /// A carrier that is there, or is not yet.
    #[must_use]
    pub fn new(up: bool) -> Self {
        Self { up: AtomicBool::new(up), watchers: Mutex::default() }
    }

    /// Whether it is there.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// Those who watch, without those that are gone.
    fn watchers(&self) -> MutexGuard<'_, Vec<Weak<dyn CarrierWatcher>>> {
        let mut watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        watchers.retain(|watcher| watcher.strong_count() > 0);
        watchers
    }

    /// It is there, or is gone. Those who watch are told of changes, on this thread. One thread sets a carrier.
    pub fn set(&self, up: bool) {
        if self.up.swap(up, Ordering::AcqRel) == up {
            return;
        }
        // Told without the lock: one that goes meanwhile is dropped here, with all that it has.
        let present: Vec<Arc<dyn CarrierWatcher>> = self.watchers().iter().filter_map(Weak::upgrade).collect();
        present.iter().for_each(|watcher| watcher.carrier_changed(up));
    }

    /// From now on `watcher` is told of each change, as long as it is there.
    pub fn watch(&self, watcher: Weak<dyn CarrierWatcher>) {
        self.watchers().push(watcher);
    }
}

impl std::fmt::Debug for Carrier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Carrier").field("up", &self.is_up()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
