//! Turns what a function says about its standing, and what becomes of its link, into events.
//!
//! A function may be attached while it is still being created, and may speak from several threads; followers see it
//! created first, deleted last, and each change once.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use uuid::Uuid;

use super::events::{EventKind, EventLog};
use super::seam::Standing;
use crate::backend::net::{Carrier, CarrierWatcher};

/// One function's way into the log.
pub(super) struct StandingSink {
    log: Arc<EventLog>,
    function: String,
    volume: Option<Uuid>,
    /// A network interface's: its uplink's.
    carrier: Option<Arc<Carrier>>,
    seen: Mutex<Seen>,
}

struct Seen {
    life: Life,
    standing: Standing,
    link: Link,
}

/// A network interface's link.
#[derive(Clone, Copy)]
struct Link {
    /// What was asked for.
    set_up: bool,
    /// What was said last.
    said_up: bool,
}

/// How a network interface's link stands: up as long as both are true.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinkState {
    /// What was asked for.
    pub set_up: bool,
    /// Whether the uplink is there.
    pub carrier: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    /// Not created yet: only the last standing is remembered.
    Coming,
    Here,
    Gone,
}

impl CarrierWatcher for StandingSink {
    fn carrier_changed(&self, _up: bool) {
        self.say_link(&mut self.seen());
    }
}

impl StandingSink {
    /// Of a disk on `volume`.
    pub(super) fn of_disk(log: Arc<EventLog>, function: &str, volume: Uuid) -> Arc<Self> {
        Arc::new(Self::new(log, function, Some(volume), None))
    }

    /// Of a network interface whose uplink has `carrier`.
    pub(super) fn of_net(log: Arc<EventLog>, function: &str, carrier: Arc<Carrier>) -> Arc<Self> {
        let sink = Arc::new(Self::new(log, function, None, Some(Arc::clone(&carrier))));
        let watcher: Weak<Self> = Arc::downgrade(&sink);
        carrier.watch(watcher);
        sink
    }

    fn new(log: Arc<EventLog>, function: &str, volume: Option<Uuid>, carrier: Option<Arc<Carrier>>) -> Self {
        let link = Link { set_up: true, said_up: true };
        let seen = Mutex::new(Seen { life: Life::Coming, standing: Standing::Waiting, link });
        Self { log, function: function.to_owned(), volume, carrier, seen }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        // Each change under the lock is whole, so a panic elsewhere leaves nothing to repair.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, kind: EventKind) {
        self.log.push(&self.function, self.volume, kind);
    }

    /// The function says that it stands so now.
    pub(super) fn changed(&self, standing: Standing) {
        let mut seen = self.seen();
        if seen.life == Life::Here
            && let Some(kind) = change(&seen.standing, &standing)
        {
            self.push(kind);
        }
        seen.standing = standing;
    }

    /// The function is there.
    pub(super) fn create(&self) {
        let mut seen = self.seen();
        seen.life = Life::Here;
        self.push(EventKind::Created);
        if let Some(kind) = change(&Standing::Waiting, &seen.standing) {
            self.push(kind);
        }
        self.say_link(&mut seen);
    }

    /// Whether its link shall be up.
    pub(super) fn set_link(&self, up: bool) {
        let mut seen = self.seen();
        seen.link.set_up = up;
        self.say_link(&mut seen);
    }

    /// How its link stands. A disk has no carrier.
    pub(super) fn link_state(&self) -> LinkState {
        let carrier = self.carrier.as_ref().is_some_and(|carrier| carrier.is_up());
        LinkState { set_up: self.seen().link.set_up, carrier }
    }

    /// Says whether the link is up, if that is news. The carrier is looked at under the lock, so that whoever comes last says what
    /// holds.
    fn say_link(&self, seen: &mut Seen) {
        let Some(carrier) = &self.carrier else { return };
        let is_up = seen.link.set_up && carrier.is_up();
        if seen.life == Life::Here && std::mem::replace(&mut seen.link.said_up, is_up) != is_up {
            self.push(if is_up { EventKind::LinkUp } else { EventKind::LinkDown });
        }
    }

    /// The function is gone.
    pub(super) fn delete(&self) {
        let mut seen = self.seen();
        if std::mem::replace(&mut seen.life, Life::Gone) == Life::Here {
            self.push(EventKind::Deleted);
        }
    }
}

/// The event between two standings, if it is one.
fn change(from: &Standing, to: &Standing) -> Option<EventKind> {
    match (from, to) {
        (Standing::NeedsReset { .. }, Standing::NeedsReset { .. }) => None,
        // One that has failed does not run, and says nothing.
        (Standing::Failed { .. }, _) | (_, Standing::Failed { .. }) => None,
        (_, Standing::NeedsReset { reason }) => Some(EventKind::NeedsReset { reason: reason.clone() }),
        (Standing::Waiting, Standing::Attached { .. }) => Some(EventKind::Attached),
        (Standing::NeedsReset { .. }, Standing::Attached { .. }) => Some(EventKind::Recovered),
        (Standing::Waiting, Standing::Waiting) | (Standing::Attached { .. }, Standing::Attached { .. }) => None,
        (_, Standing::Waiting) => Some(EventKind::Detached),
    }
}
