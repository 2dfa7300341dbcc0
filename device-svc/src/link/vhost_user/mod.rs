//! The vhost-user link: any VMM, and programs that drive virtqueues without one, over a Unix socket.
//!
//! ```text
//!   server.rs / client.rs   one connection after another
//!        └► session.rs      one front end's conversation: messages in, answers out
//!             ├► regions.rs the memory that it shares
//!             ├► ring.rs    each ring's parameters, and when it runs
//!             ├► own_record.rs  the record of requests in flight for a front end that keeps none
//!             ├► resume.rs  where a packed ring goes on whose card died
//!             ├► port.rs    doorbell and interrupt of a running ring
//!             └► channel.rs what the card tells the front end
//! ```
//!
//! A connection's messages are read on a thread of its own, so half a message stalls nobody. Framing is the `vhost` crate's; a
//! message that breaks the protocol ends the connection, never the service. `VIRTIO_F_ACCESS_PLATFORM` is not offered on this
//! link, so there are no IOTLB messages: rings and buffers are named by guest-physical addresses.

mod channel;
mod client;
mod own_record;
mod port;
mod regions;
mod resume;
mod ring;
mod server;
mod session;

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use self::own_record::OwnRecord;
use super::listening::Listening;
use super::{FunctionSide, LinkError, drain};
use crate::tether::Tether;

/// Where and how a link meets its front end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VhostUserSettings {
    /// The function's name, for messages to people.
    pub function: String,
    /// The socket.
    pub socket: PathBuf,
    /// Who listens on it.
    pub role: Role,
}

/// Who listens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// The card does, on a socket with these permissions.
    Server {
        /// Permission bits, 0 to 0o777.
        mode: u32,
    },
    /// The VMM does; the card connects, and again whenever the connection ends.
    Client,
}

/// What the link's threads and its owner share.
struct Shared {
    settings: VhostUserSettings,
    function: Arc<dyn FunctionSide>,
    /// For a front end that keeps no record of requests in flight.
    own_record: Option<Arc<OwnRecord>>,
    stopping: AtomicBool,
    /// The connection that is served, so that its owner can end a read that blocks.
    connection: Mutex<Option<UnixStream>>,
}

impl Shared {
    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Serves one front end until it goes away.
    fn serve(&self, stream: UnixStream) {
        let held = match stream.try_clone() {
            Ok(held) => held,
            Err(error) => {
                tracing::warn!(function = %self.settings.function, %error, "a front end could not be served");
                return;
            }
        };
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = Some(held);
        // The owner may have looked for a connection just before there was one.
        if !self.is_stopping() {
            session::run(stream, &self.settings.function, &self.function, self.own_record.as_ref(), &self.stopping);
        }
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Ends the connection. What is in flight completes before the front end sees the end: a VMM that sees it takes stock of
    /// the rings at once, and would make requests again that complete a moment later.
    fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        let connection =
            self.connection.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(UnixStream::try_clone);
        // A connection that is gone already needs no end.
        if let Some(Ok(connection)) = connection {
            let _ = connection.shutdown(Shutdown::Read);
            // Here and not only where the session ends: that may be stuck in an answer that the front end does not read.
            drain(self.function.as_ref(), 0..self.function.queue_count());
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

/// A function's vhost-user link. Dropping it ends the connection and removes the socket.
pub struct VhostUserLink {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    waker: Arc<nix::sys::eventfd::EventFd>,
}

impl VhostUserLink {
    /// Starts to listen, or to connect, for `function`. What is in flight is recorded in a file that `tether` leads to, if there is one
    /// and the front end keeps no record itself.
    ///
    /// # Errors
    /// When the socket is in use or cannot be made.
    pub fn start(
        settings: VhostUserSettings,
        function: Arc<dyn FunctionSide>,
        tether: Option<&Arc<Tether>>,
    ) -> Result<Self, LinkError> {
        let path = settings.socket.clone();
        let system = |error| LinkError::System { path: path.clone(), error };
        let waker = Arc::new(
            nix::sys::eventfd::EventFd::from_value_and_flags(
                0,
                nix::sys::eventfd::EfdFlags::EFD_NONBLOCK | nix::sys::eventfd::EfdFlags::EFD_CLOEXEC,
            )
            .map_err(|error| system(error.into()))?,
        );
        let listening = match settings.role {
            Role::Server { mode } => Some(Listening::open(&settings.socket, mode)?),
            Role::Client => None,
        };
        let name = format!("link {}", settings.function);
        let own_record = own_record(&settings.function, function.as_ref(), tether);
        let (stopping, connection) = (AtomicBool::new(false), Mutex::new(None));
        let shared = Arc::new(Shared { settings, function, own_record, stopping, connection });
        let (theirs, wake) = (Arc::clone(&shared), Arc::clone(&waker));
        // The kernel keeps 15 bytes of a thread's name.
        let thread = std::thread::Builder::new()
            .name(name.chars().take(15).collect())
            .spawn(move || match listening {
                Some(listening) => server::run(&theirs, &listening, &wake),
                None => client::run(&theirs, &wake),
            })
            .map_err(system)?;
        Ok(Self { shared, thread: Some(thread), waker })
    }

    /// Ends the connection, removes the socket and waits for the link's thread.
    pub fn stop(&mut self) {
        self.shared.stop();
        // A full counter rings just as well.
        let _ = self.waker.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(function = %self.shared.settings.function, "the link's thread panicked");
        }
    }
}

/// A record of ours, where it is of use. Without one the function serves all the same.
fn own_record(name: &str, function: &dyn FunctionSide, tether: Option<&Arc<Tether>>) -> Option<Arc<OwnRecord>> {
    let tether = tether.filter(|tether| tether.keeps_files() && function.network().is_none())?;
    match OwnRecord::open(tether, name, function.queue_count(), function.queue_size_max()) {
        Ok(record) => Some(Arc::new(record)),
        Err(error) => {
            tracing::warn!(function = name, %error, "what is in flight can only be recorded by the front end");
            None
        }
    }
}

impl Drop for VhostUserLink {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests;
