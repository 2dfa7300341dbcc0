//! What happens to functions, in a numbered sequence that followers can take up again where they left it.
//!
//! The log keeps the last events in a ring. A follower that was away for longer than the ring reaches back is told how
//! many it missed, so that it lists the functions anew instead of going on with a wrong picture.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use uuid::Uuid;

/// Events kept; at one event per function and second of a busy card, a follower may be away for minutes.
pub const EVENTS_KEPT: usize = 4096;

/// What happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum EventKind {
    /// The function was created.
    Created,
    /// The function was deleted.
    Deleted,
    /// A VMM attached.
    Attached,
    /// The VMM went away.
    Detached,
    /// A fault of the guest stopped it.
    NeedsReset {
        /// What the guest did.
        reason: String,
    },
    /// It was reset and goes on.
    Recovered,
    /// Its volume has another size.
    Resized {
        /// The size now.
        size_bytes: u64,
    },
    /// A network interface's link is up again.
    LinkUp,
    /// A network interface's link is down: it was set so, or its uplink has no carrier.
    LinkDown,
}

/// One event.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    /// Counts from 1, without gaps.
    pub sequence: u64,
    /// Milliseconds since 1970.
    pub unix_ms: u64,
    /// What happened.
    pub kind: EventKind,
    /// To which function.
    pub function: String,
    /// On which volume, if it is a disk.
    pub volume: Option<Uuid>,
}

/// What there is after a position.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Batch {
    /// Events after the position that the ring no longer has.
    pub missed: u64,
    /// The events that follow, oldest first.
    pub events: Vec<Event>,
}

/// The log. Its instance is made anew with it, and sequence numbers count within the instance.
pub struct EventLog {
    instance: Uuid,
    ring: Mutex<Ring>,
    news: watch::Sender<News>,
}

/// What followers wait for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct News {
    /// The last event's number.
    pub last: u64,
    /// The card is stopping: followers end.
    pub closed: bool,
}

struct Ring {
    last: u64,
    kept: usize,
    events: VecDeque<Event>,
}

impl Default for EventLog {
    fn default() -> Self {
        Self::keeping(EVENTS_KEPT)
    }
}

impl EventLog {
    /// A log that keeps `kept` events.
    #[must_use]
    pub fn keeping(kept: usize) -> Self {
        Self {
            instance: Uuid::new_v4(),
            ring: Mutex::new(Ring { last: 0, kept, events: VecDeque::new() }),
            news: watch::Sender::new(News { last: 0, closed: false }),
        }
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        // Each change under the lock is whole, so a panic elsewhere leaves nothing to repair.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The log's instance.
    #[must_use]
    pub const fn instance(&self) -> Uuid {
        self.instance
    }

    /// The last event's number; 0 before the first.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.ring().last
    }

    /// Adds an event.
    pub fn push(&self, function: &str, volume: Option<Uuid>, kind: EventKind) {
        tracing::info!(function, ?kind, "event");
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64);
        let mut ring = self.ring();
        ring.last += 1;
        let sequence = ring.last;
        if ring.events.len() == ring.kept {
            ring.events.pop_front();
        }
        ring.events.push_back(Event { sequence, unix_ms, kind, function: function.to_owned(), volume });
        // Still under the lock: news are told in the order of their numbers.
        self.news.send_modify(|news| news.last = sequence);
    }

    /// What there is after event `after`. A number that was never given out counts as the last one.
    #[must_use]
    pub fn after(&self, after: u64) -> Batch {
        let ring = self.ring();
        let first_kept = ring.last + 1 - ring.events.len() as u64;
        let missed = first_kept.saturating_sub(after.saturating_add(1));
        let events = ring.events.iter().filter(|event| event.sequence > after).cloned().collect();
        Batch { missed, events }
    }

    /// Tells of new events and of the end.
    #[must_use]
    pub fn news(&self) -> watch::Receiver<News> {
        self.news.subscribe()
    }

    /// Ends all followers.
    pub fn close(&self) {
        self.news.send_modify(|news| news.closed = true);
    }
}
