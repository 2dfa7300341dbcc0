//! The protocol by which a reactor goes to sleep without losing a wake-up: of its mailbox, and of what other reactors put in for its
//! network channels.
//!
//! ```text
//!   poster                      reactor
//!   put the message             say "asleep"
//!   full fence                  full fence
//!   asleep? then ring the bell  anything there? then stay awake
//! ```
//!
//! Each side stores, then looks at what the other stores. With a full fence between, at least one of the two sees the
//! other's store; the tests model that with every interleaving that the memory model allows.

use std::sync::atomic::{AtomicBool, Ordering, fence};

/// The flag and the fence, as an interface, so that a model checker can stand in for the real ones.
pub(crate) trait Flag {
    /// Stores it.
    fn set(&self, value: bool);
    /// Loads it.
    fn get(&self) -> bool;
    /// What was stored before is seen by whoever does not see what is loaded after.
    fn full_fence();
}

impl Flag for AtomicBool {
    #[inline]
    fn set(&self, value: bool) {
        self.store(value, Ordering::Relaxed);
    }

    #[inline]
    fn get(&self) -> bool {
        self.load(Ordering::Relaxed)
    }

    #[inline]
    fn full_fence() {
        fence(Ordering::SeqCst);
    }
}

/// Whether a reactor is asleep.
#[derive(Debug, Default)]
pub(crate) struct Asleep<F = AtomicBool>(F);

impl<F: Flag> Asleep<F> {
    #[cfg(test)]
    const fn with(flag: F) -> Self {
        Self(flag)
    }

    /// The reactor wants to sleep: says so, then asks `is_idle` once more. Returns whether it may sleep.
    pub(crate) fn prepare(&self, is_idle: impl FnOnce() -> bool) -> bool {
        self.0.set(true);
        F::full_fence();
        if is_idle() {
            return true;
        }
        self.0.set(false);
        false
    }

    /// The reactor is awake again. Nobody else says so, and a look costs those who put nothing.
    #[inline]
    pub(crate) fn awake(&self) {
        if self.0.get() {
            self.0.set(false);
        }
    }

    /// Somebody has put something where the reactor looks. Returns whether its bell must be rung; two posters may both ring
    /// it, which costs less than an exchange that every poster would fight over.
    pub(crate) fn must_ring(&self) -> bool {
        F::full_fence();
        self.0.get()
    }
}

#[cfg(test)]
mod tests;
