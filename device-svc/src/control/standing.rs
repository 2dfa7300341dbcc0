//! Turns what a function says about its standing into events.
//!
//! A function may be attached while it is still being created, and may speak from several threads; followers see it
//! created first, deleted last, and each change once.

use std::sync::{Arc, Mutex, PoisonError};

use uuid::Uuid;

use super::events::{EventKind, EventLog};
use super::seam::Standing;

/// One function's way into the log.
pub(super) struct StandingSink {
    log: Arc<EventLog>,
    function: String,
    volume: Uuid,
    seen: Mutex<Seen>,
}

struct Seen {
    life: Life,
    standing: Standing,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    /// Not created yet: only the last standing is remembered.
    Coming,
    Here,
    Gone,
}

impl StandingSink {
    pub(super) fn new(log: Arc<EventLog>, function: &str, volume: Uuid) -> Self {
        let seen = Mutex::new(Seen { life: Life::Coming, standing: Standing::Waiting });
        Self { log, function: function.to_owned(), volume, seen }
    }

    fn push(&self, kind: EventKind) {
        self.log.push(&self.function, self.volume, kind);
    }

    /// The function says that it stands so now.
    pub(super) fn changed(&self, standing: Standing) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.life == Life::Here
            && let Some(kind) = change(&seen.standing, &standing)
        {
            self.push(kind);
        }
        seen.standing = standing;
    }

    /// The function is there.
    pub(super) fn create(&self) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.life = Life::Here;
        self.push(EventKind::Created);
        if let Some(kind) = change(&Standing::Waiting, &seen.standing) {
            self.push(kind);
        }
    }

    /// The function is gone.
    pub(super) fn delete(&self) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut seen.life, Life::Gone) == Life::Here {
            self.push(EventKind::Deleted);
        }
    }
}

/// The event between two standings, if it is one.
fn change(from: &Standing, to: &Standing) -> Option<EventKind> {
    match (from, to) {
        (Standing::NeedsReset { .. }, Standing::NeedsReset { .. }) => None,
        (_, Standing::NeedsReset { reason }) => Some(EventKind::NeedsReset { reason: reason.clone() }),
        (Standing::Waiting, Standing::Attached { .. }) => Some(EventKind::Attached),
        (Standing::NeedsReset { .. }, Standing::Attached { .. }) => Some(EventKind::Recovered),
        (Standing::Waiting, Standing::Waiting) | (Standing::Attached { .. }, Standing::Attached { .. }) => None,
        (_, Standing::Waiting) => Some(EventKind::Detached),
    }
}
