//! The way from the world that may block to the channel that must not: a thread that connects and shakes hands, and
//! hands connections over through a queue and an event descriptor.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::Thread;
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::handshake::{self, Established, Export, HandshakeError};
use super::tls::Tls;
use super::uri::NbdUri;
use super::wire;

/// The first wait before a new attempt, and the longest; each is twice the one before.
const BACK_OFF_MIN: Duration = Duration::from_millis(50);
const BACK_OFF_MAX: Duration = Duration::from_secs(1);

/// Where and how to connect.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) uri: NbdUri,
    pub(super) tls: Option<Tls>,
    pub(super) timeout: Duration,
    /// Connections wanted; the server may allow one only.
    pub(super) connections: usize,
    /// The size that the guest has been told, bytes: the server must not come back with less.
    pub(super) size_bytes: AtomicU64,
}

impl Target {
    /// Makes one connection.
    pub(super) fn connect(&self) -> Result<Established, HandshakeError> {
        handshake::establish(&self.uri, self.tls.as_ref(), self.timeout)
    }

    /// How many connections an export is served by: more than one only where a flush on one covers writes on all.
    pub(super) fn connections(&self, export: &Export) -> usize {
        if export.has(wire::FLAG_CAN_MULTI_CONN) { self.connections } else { 1 }
    }

    /// Makes all connections that a channel wants; `first` is used for one of them.
    pub(super) fn connect_all(
        &self,
        expected: &Export,
        first: Option<Established>,
    ) -> Result<Vec<Established>, HandshakeError> {
        let first = first.map_or_else(|| self.connect(), Ok)?;
        self.check_same(expected, &first.export)?;
        let wanted = self.connections(&first.export);
        let mut list = Vec::with_capacity(wanted);
        list.push(first);
        while list.len() < wanted {
            let next = self.connect()?;
            self.check_same(expected, &next.export)?;
            list.push(next);
        }
        Ok(list)
    }

    /// Whether a server that has come back still serves what the guest was promised.
    fn check_same(&self, expected: &Export, found: &Export) -> Result<(), HandshakeError> {
        const PROMISED: [(u16, &str); 4] = [
            (wire::FLAG_SEND_FLUSH, "flush"),
            (wire::FLAG_SEND_TRIM, "trim"),
            (wire::FLAG_SEND_WRITE_ZEROES, "write zeroes"),
            (wire::FLAG_SEND_FUA, "FUA"),
        ];
        let size_bytes = self.size_bytes.load(Ordering::Relaxed);
        if found.size_bytes < size_bytes {
            return Err(HandshakeError::Refused(format!(
                "the export has shrunk from {size_bytes} to {} bytes",
                found.size_bytes
            )));
        }
        if found.has(wire::FLAG_READ_ONLY) && !expected.has(wire::FLAG_READ_ONLY) {
            return Err(HandshakeError::Refused("the export has become read-only".to_owned()));
        }
        if found.block_bytes_min > expected.block_bytes_min.max(512) {
            return Err(HandshakeError::Refused("the export's minimum block size has grown".to_owned()));
        }
        for (flag, name) in PROMISED {
            if expected.has(flag) && !found.has(flag) {
                return Err(HandshakeError::Refused(format!("the server no longer does {name}")));
            }
        }
        Ok(())
    }
}

/// The channel's end of the bridge; dropping it ends the thread.
#[derive(Debug)]
pub(super) struct Bridge {
    shared: Arc<Shared>,
    thread: Thread,
}

#[derive(Debug)]
struct Shared {
    wanted: AtomicBool,
    /// Whether the next attempt follows a success so short that the back-off must go on.
    flapping: AtomicBool,
    closed: AtomicBool,
    /// At most one set of connections is ever asked for.
    ready: ArrayQueue<Vec<Established>>,
    event: EventFd,
}

impl Bridge {
    /// Starts the thread.
    pub(super) fn start(target: Arc<Target>, expected: Export) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            wanted: AtomicBool::new(false),
            flapping: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            ready: ArrayQueue::new(1),
            event: EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
        });
        let builder = std::thread::Builder::new().name("nbd-connect".to_owned()).stack_size(512 << 10);
        let theirs = Arc::clone(&shared);
        let handle = builder.spawn(move || run(&theirs, &target, &expected))?;
        Ok(Self { shared, thread: handle.thread().clone() })
    }

    /// Asks for new connections, until there are some.
    pub(super) fn ask(&self, flapping: bool) {
        self.shared.flapping.store(flapping, Ordering::Relaxed);
        // Release: the thread that sees the wish sees `flapping` too.
        self.shared.wanted.store(true, Ordering::Release);
        self.thread.unpark();
    }

    /// Takes the connections that were asked for, once they are there.
    pub(super) fn take(&self) -> Option<Vec<Established>> {
        let list = self.shared.ready.pop()?;
        // There is a ring to read: it came before the list.
        let _ = self.shared.event.read();
        Some(list)
    }

    /// Makes the event descriptor readable: the channel takes requests again, and nothing else would tell.
    pub(super) fn ring(&self) {
        // Fails only if 2^64 - 2 rings were never read.
        let _ = self.shared.event.write(1);
    }

    /// Ends what [`Self::ring`] began. Only while nothing is asked for: it would swallow the thread's ring.
    pub(super) fn silence(&self) {
        let _ = self.shared.event.read();
    }

    /// Readable when [`Self::take`] has something.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        // Not joined: an attempt under way may last as long as its timeout, and the thread owns all it touches.
        self.shared.closed.store(true, Ordering::Relaxed);
        self.thread.unpark();
    }
}

fn run(shared: &Shared, target: &Target, expected: &Export) {
    let mut back_off = BACK_OFF_MIN;
    loop {
        // Acquire: pairs with `ask`.
        while !shared.wanted.swap(false, Ordering::Acquire) {
            if shared.closed.load(Ordering::Relaxed) {
                return;
            }
            std::thread::park();
        }
        if !shared.flapping.load(Ordering::Relaxed) {
            back_off = BACK_OFF_MIN;
        }
        let mut told = String::new();
        loop {
            if !wait(shared, jitter(back_off)) {
                return;
            }
            back_off = (back_off * 2).min(BACK_OFF_MAX);
            match target.connect_all(expected, None) {
                Ok(list) => {
                    // Rung before the list is there: the channel takes list and ring together, and a ring after that
                    // would never be read. Fails only if 2^64 - 2 rings were never read.
                    let _ = shared.event.write(1);
                    // The queue has room: a channel asks again only after it has taken what it asked for.
                    let _ = shared.ready.push(list);
                    break;
                }
                Err(error) => {
                    let text = error.to_string();
                    if text != told {
                        tracing::warn!(uri = %target.uri, "cannot reconnect, still trying: {text}");
                        told = text;
                    }
                }
            }
        }
    }
}

/// Waits for `duration`; `false` when the channel has gone.
fn wait(shared: &Shared, duration: Duration) -> bool {
    let until = Instant::now() + duration;
    loop {
        if shared.closed.load(Ordering::Relaxed) {
            return false;
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        std::thread::park_timeout(left);
    }
}

/// Spreads `duration` by a quarter either way, so that many volumes do not call on a server that restarts in step.
fn jitter(duration: Duration) -> Duration {
    let share = (crate::clock::Moment::now().0 / 1000 % 512) as u32;
    duration * (768 + share) / 1024
}
