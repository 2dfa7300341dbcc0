//! Whether a network is there: an interface that was deleted, or has been taken down, carries nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

type Watcher = Box<dyn Fn(bool) -> bool + Send + Sync>;

/// The state of an uplink's carrier, which the backend's control half sets and functions follow.
#[derive(Default)]
pub struct Carrier {
    up: AtomicBool,
    watchers: Mutex<Vec<Watcher>>,
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

    /// It is there, or is gone. Those who watch are told of changes, on this thread.
    pub fn set(&self, up: bool) {
        let mut watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        if self.up.swap(up, Ordering::AcqRel) != up {
            watchers.retain(|watcher| watcher(up));
        }
    }

    /// Calls `watcher` at each change, with the state from then on, until it answers false.
    pub fn watch(&self, watcher: impl Fn(bool) -> bool + Send + Sync + 'static) {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(watcher));
    }
}

impl std::fmt::Debug for Carrier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Carrier").field("up", &self.is_up()).finish_non_exhaustive()
    }
}
