//! Volumes on an NBD server: over TCP or a Unix socket, with or without TLS, on one or several connections.
//!
//! The control half, [`NbdBackend`], reads the settings and makes the first connection, which shows what the server can
//! do. The hot half ([`channel`]) keeps nonblocking connections; when they are lost, a thread ([`bridge`]) makes new ones
//! for as long as it takes, and what the server had acknowledged but not flushed is written again ([`replay`]). There is
//! one channel at a time, because the order of that log needs one owner.

mod bridge;
mod channel;
mod connection;
mod handshake;
mod payload;
mod replay;
mod stream;
mod table;
mod tls;
mod transport;
mod uri;
mod wire;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use self::bridge::{Bridge, Target};
use self::channel::NbdChannel;
use self::handshake::{Established, Export, HandshakeError};
use self::replay::ReplayLog;
use self::tls::Tls;
pub use self::tls::TlsSettings;
pub use self::uri::{EXPORT_NAME_BYTES_MAX, NbdAddress, NbdUri, UriError};
use super::{BackendError, BlockBackend, BlockChannel, BlockInfo, PayloadPlace};

/// Most connections that a volume may have.
pub const CONNECTIONS_MAX: usize = 16;

/// How to reach a volume on an NBD server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdSettings {
    /// Where the server is; `nbds` asks for TLS.
    pub uri: NbdUri,
    /// Connections, 1 to [`CONNECTIONS_MAX`]; more than 1 are made only if the server keeps them coherent.
    pub connections: usize,
    /// For `nbds`: what to trust and what to show.
    pub tls: Option<TlsSettings>,
    /// How long one attempt to connect and shake hands may last.
    pub connect_timeout: Duration,
    /// Size of the replay log, bytes: how much may be written between two flushes before the channel flushes by itself.
    pub replay_bytes: u32,
    /// Whether the volume must not be written, even if the server lets us.
    pub read_only: bool,
}

impl NbdSettings {
    /// The settings that fit most: one connection, 10 s to connect, a replay log of 8 MiB.
    #[must_use]
    pub const fn new(uri: NbdUri) -> Self {
        Self {
            uri,
            connections: 1,
            tls: None,
            connect_timeout: Duration::from_secs(10),
            replay_bytes: 8 << 20,
            read_only: false,
        }
    }
}

/// A volume on an NBD server.
#[derive(Debug)]
pub struct NbdBackend {
    target: Arc<Target>,
    export: Mutex<Export>,
    read_only: bool,
    replay_bytes: u32,
    left: Arc<Left>,
}

/// What lies between two channels.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// A connection that no channel uses yet: the one with which the backend was opened. Kept rather than made again,
    /// because some servers end when their first client leaves.
    spare: Mutex<Option<Established>>,
    /// What an earlier channel had not flushed.
    log: Mutex<Option<ReplayLog>>,
    /// Whether a channel is open.
    open: AtomicBool,
}

impl NbdBackend {
    /// Connects, and finds out what the server can do.
    ///
    /// # Errors
    /// `Refused` when settings or server cannot be served as they are; `Unavailable` when the server does not answer.
    pub fn open(settings: NbdSettings) -> Result<Self, BackendError> {
        let uri = settings.uri;
        if !(1..=CONNECTIONS_MAX).contains(&settings.connections) {
            return Err(BackendError::Refused(format!("{uri}: connections must be 1 to {CONNECTIONS_MAX}")));
        }
        let tls = match (uri.tls, &settings.tls) {
            (true, tls) => Some(Tls::new(&tls.clone().unwrap_or_default(), &uri).map_err(BackendError::Refused)?),
            (false, None) => None,
            (false, Some(_)) => {
                return Err(BackendError::Refused(format!("{uri}: TLS is set up; write nbds instead of nbd")));
            }
        };
        let target = Target {
            uri,
            tls,
            timeout: settings.connect_timeout,
            connections: settings.connections,
            size_bytes: 0.into(),
        };
        let first = target.connect().map_err(|error| failed(&target.uri, error))?;
        let export = first.export;
        target.size_bytes.store(export.size_bytes, Ordering::Relaxed);
        if export.block_bytes_min > 4096 {
            return Err(BackendError::Refused(format!(
                "{}: the server takes no requests below {} bytes; 4096 is the most that a virtio-blk device can ask of \
                 its driver",
                target.uri, export.block_bytes_min
            )));
        }
        if target.connections > target.connections(&export) {
            tracing::warn!(
                uri = %target.uri,
                "the server does not keep several connections coherent (no CAN_MULTI_CONN): one is used"
            );
        }
        if !export.has(wire::FLAG_SEND_FLUSH) && !export.has(wire::FLAG_READ_ONLY) {
            tracing::warn!(uri = %target.uri, "the server knows no flush: its writes are taken to be durable at once");
        }
        let left = Left { spare: Mutex::new(Some(first)), ..Left::default() };
        Ok(Self {
            target: Arc::new(target),
            export: Mutex::new(export),
            read_only: settings.read_only,
            replay_bytes: settings.replay_bytes.max(64 << 10),
            left: Arc::new(left),
        })
    }

    fn export(&self) -> Export {
        *lock(&self.export)
    }
}

/// A panic while one of these locks was held leaves a whole value behind it: each holds for one assignment.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(uri: &NbdUri, error: HandshakeError) -> BackendError {
    match error {
        HandshakeError::Unreachable(error) => BackendError::Unavailable(format!("{uri}: {error}")),
        error => BackendError::Refused(format!("{uri}: {error}")),
    }
}

impl BlockBackend for NbdBackend {
    fn info(&self) -> BlockInfo {
        let export = self.export();
        let block_bytes = export.block_bytes_min.max(512);
        // Larger hints than this say more about the server's network than about its disk.
        let preferred = export.block_bytes_preferred.clamp(block_bytes, 1 << 16);
        let read_only = self.read_only || export.has(wire::FLAG_READ_ONLY);
        BlockInfo {
            size_bytes: export.size_bytes - export.size_bytes % u64::from(block_bytes),
            block_bytes,
            physical_block_bytes: preferred,
            read_only,
            volatile_cache: export.has(wire::FLAG_SEND_FLUSH) && !read_only,
            discard: export.has(wire::FLAG_SEND_TRIM) && !read_only,
            write_zeroes: export.has(wire::FLAG_SEND_WRITE_ZEROES) && !read_only,
            discard_alignment_bytes: preferred,
            payload: PayloadPlace::Card,
            channels_max: 1,
        }
    }

    fn open_channel(&self) -> Result<Box<dyn BlockChannel>, BackendError> {
        let uri = &self.target.uri;
        // Acquire: pairs with the release at the end of the earlier channel, which has put its log down before.
        if self.left.open.swap(true, Ordering::Acquire) {
            return Err(BackendError::Refused(format!("{uri}: its one channel is open already")));
        }
        let open = || {
            let export = self.export();
            let first = lock(&self.left.spare).take();
            let list = self.target.connect_all(&export, first).map_err(|error| failed(uri, error))?;
            let failed = |error: std::io::Error| BackendError::Unavailable(format!("{uri}: {error}"));
            let bridge = Bridge::start(Arc::clone(&self.target), export).map_err(failed)?;
            let log = match lock(&self.left.log).take() {
                Some(log) => Some(log),
                None if export.has(wire::FLAG_SEND_FLUSH) && !export.has(wire::FLAG_READ_ONLY) => {
                    Some(ReplayLog::new(self.replay_bytes).map_err(failed)?)
                }
                None => None,
            };
            NbdChannel::new(uri.to_string(), export, list, bridge, log, Arc::clone(&self.left)).map_err(failed)
        };
        match open() {
            Ok(channel) => Ok(Box::new(channel)),
            Err(error) => {
                self.left.open.store(false, Ordering::Release);
                Err(error)
            }
        }
    }

    fn resize(&self, size_bytes: u64) -> Result<u64, BackendError> {
        let uri = &self.target.uri;
        let found = self.target.connect().map_err(|error| failed(uri, error))?;
        let size = found.export.size_bytes;
        lock(&self.export).size_bytes = size;
        self.target.size_bytes.store(size, Ordering::Relaxed);
        let now = self.info().size_bytes;
        if now != size_bytes {
            tracing::info!(%uri, asked = size_bytes, now, "only the server can set an NBD volume's size");
        }
        Ok(now)
    }
}

#[cfg(test)]
mod tests;
