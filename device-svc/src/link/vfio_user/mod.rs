//! The vfio-user link: a VMM plugs the socket in as a PCI device, and the guest's virtio-pci driver drives it.
//!
//! ```text
//!   mod.rs                  one VMM after another; a second one at a time is refused
//!     └► session.rs         one VMM's conversation: requests in, replies out
//!          ├► wire.rs       the connection, which lanes use too where the VMM shares no memory
//!          │    └► framing.rs   bytes and descriptors to messages
//!          ├► message.rs    messages to requests
//!          ├► dma_table.rs  the memory that it maps for us
//!          ├► function.rs   the function's registers, and what their writes do to queues
//!          ├► interrupts.rs which event is signalled when
//!          ├► lives.rs      how often queues were reset, for a service after this one
//!          └► port.rs       doorbell and interrupt of a running queue
//! ```
//!
//! The registers themselves are `crate::pci`'s. Where there is a keeper (`crate::keeper`), the session speaks with that instead of
//! the VMM, and goes on with a conversation that a service before it has left. A connection is served on a thread of its own, so that a VMM that stops in the
//! middle of a message, or does not read its replies, stalls nobody else.

mod dma_table;
pub mod framing;
mod function;
mod interrupts;
mod lives;
pub mod message;
mod port;
mod session;
mod wire;

use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::listening::Listening;
use super::{FunctionSide, LinkError, drain};
use crate::pci::Identity;
use crate::tether::{Claimed, KeptConnection, Tether};

/// How long a VMM that is refused may take to say its first word, so that it can be told why.
const REFUSAL_TIME_MAX: Duration = Duration::from_secs(1);
/// How many may be refused at a time; those beyond are not told why.
const REFUSALS_MAX: usize = 8;

/// A function's link as it is configured.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VfioUserSettings {
    /// The function's name, for messages to people.
    pub function: String,
    /// The socket.
    pub socket: PathBuf,
    /// Its permission bits, 0 to 0o777.
    pub mode: u32,
    /// What the registers say it is.
    pub identity: Identity,
    /// Whether the VMM may map the notify registers.
    pub mapped: bool,
    /// Whether it has MSI-X; without, it has INTx only.
    pub msix: bool,
}

/// What the link's threads and its owner share.
struct Shared {
    settings: VfioUserSettings,
    function: Arc<dyn FunctionSide>,
    /// Who keeps connections, if somebody does.
    tether: Option<Arc<Tether>>,
    stopping: AtomicBool,
    /// The connection that is served, so that its owner can end a read that blocks.
    connection: Mutex<Option<UnixStream>>,
}

/// A session and the thread that holds it.
struct Served {
    stream: UnixStream,
    /// The VMM's socket itself.
    vmm: UnixStream,
    /// Another VMM was refused meanwhile.
    has_refused: bool,
    thread: JoinHandle<()>,
}

impl Shared {
    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn run(self: &Arc<Self>, listening: &Listening, waker: &EventFd, mut served: Option<Served>) {
        // One count for each refusal that is under way, and ours.
        let refusals = Arc::new(());
        while !self.is_stopping() {
            let Some(stream) = listening.accept(&self.settings.function, waker) else { continue };
            if let Some(now) = served.take_if(|now| now.thread.is_finished() || has_hung_up(&now.vmm)) {
                now.join(&self.settings.function);
            }
            if let Some(now) = &mut served {
                // Said once for each VMM that is served: others could fill a disk with our words.
                if !std::mem::replace(&mut now.has_refused, true) {
                    tracing::warn!(function = %self.settings.function, "a second VMM was refused; the function has one");
                }
                if Arc::strong_count(&refusals) <= REFUSALS_MAX {
                    let counted = Arc::clone(&refusals);
                    // On a thread of its own: who says nothing must not keep the next one waiting.
                    let _ = std::thread::Builder::new().name("refusal".to_owned()).spawn(move || {
                        refuse(stream);
                        drop(counted);
                    });
                }
                continue;
            }
            match self.begin(stream) {
                Ok(new) => served = Some(new),
                Err(error) => {
                    tracing::warn!(function = %self.settings.function, %error, "a VMM could not be served");
                }
            }
        }
        if let Some(now) = served {
            now.join(&self.settings.function);
        }
    }

    /// Goes on with the VMM that a service before has left.
    fn claim(self: &Arc<Self>) -> Option<Served> {
        let function = &self.settings.function;
        let claimed = match self.tether.as_ref()?.claim(function) {
            Ok(claimed) => claimed?,
            Err(error) => {
                tracing::warn!(function, %error, "a VMM that a service before has left could not be taken up");
                return None;
            }
        };
        let Claimed { connection, stream, vmm } = claimed;
        let served = self.serve(stream, vmm, Some(connection));
        served.inspect_err(|error| tracing::warn!(function, %error, "a VMM could not be served")).ok()
    }

    fn begin(self: &Arc<Self>, vmm: UnixStream) -> std::io::Result<Served> {
        match &self.tether {
            None => self.serve(vmm.try_clone()?, vmm, None),
            Some(tether) => {
                let kept = tether.keep(&self.settings.function, &vmm).map_err(std::io::Error::other)?;
                self.serve(kept.1, vmm, Some(kept.0))
            }
        }
    }

    fn serve(
        self: &Arc<Self>,
        stream: UnixStream,
        vmm: UnixStream,
        kept: Option<KeptConnection>,
    ) -> std::io::Result<Served> {
        let watched = stream.try_clone()?;
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream.try_clone()?);
        let shared = Arc::clone(self);
        let name: String = format!("vmm {}", self.settings.function).chars().take(15).collect();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            // The owner may have looked for a connection just before there was one.
            if !shared.is_stopping() {
                session::run(stream, kept.as_ref(), &shared.settings, &shared.function, &shared.stopping);
            }
            // There are other handles of it: this is what a VMM sees whose conversation is over.
            if let Some(ended) = shared.connection.lock().unwrap_or_else(PoisonError::into_inner).take() {
                let _ = ended.shutdown(Shutdown::Both);
            }
            // The VMM's own end, where it is kept.
            drop(kept);
        })?;
        Ok(Served { stream: watched, vmm, has_refused: false, thread })
    }

    /// Ends the connection. What is in flight completes before the VMM sees the end.
    fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        let connection =
            self.connection.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(UnixStream::try_clone);
        // A connection that is gone already needs no end.
        if let Some(Ok(connection)) = connection {
            let _ = connection.shutdown(Shutdown::Read);
            // Here and not only where the session ends: that may be stuck in a reply that the VMM does not read.
            drain(self.function.as_ref(), 0..self.function.queue_count());
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

impl Served {
    fn join(self, function: &str) {
        // What it has not read any more is of no interest: its VMM is gone.
        let _ = self.stream.shutdown(Shutdown::Both);
        if self.thread.join().is_err() {
            tracing::error!(function, "the link's thread panicked");
        }
    }
}

/// Whether the peer has closed its end, whatever it has left to be read.
fn has_hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    // What is not asked for but always told: the end of the connection.
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|count| count > 0)
}

/// Answers the first request with "busy".
fn refuse(stream: UnixStream) {
    let timed =
        stream.set_read_timeout(Some(REFUSAL_TIME_MAX)).and_then(|()| stream.set_write_timeout(Some(REFUSAL_TIME_MAX)));
    // One that cannot even be told hangs up on its own account.
    let _ = timed.and_then(|()| session::refuse(stream));
}

/// A function's vfio-user link. Dropping it ends the connection and removes the socket.
pub struct VfioUserLink {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    waker: Arc<EventFd>,
}

impl VfioUserLink {
    /// Starts to listen for `function`; with a keeper, goes on with the VMM that it may have.
    ///
    /// # Errors
    /// When the socket is in use or cannot be made.
    pub fn start(
        settings: VfioUserSettings,
        function: Arc<dyn FunctionSide>,
        tether: Option<Arc<Tether>>,
    ) -> Result<Self, LinkError> {
        let path = settings.socket.clone();
        let system = |error| LinkError::System { path: path.clone(), error };
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let waker = Arc::new(EventFd::from_value_and_flags(0, flags).map_err(|error| system(error.into()))?);
        let listening = Listening::open(&settings.socket, settings.mode)?;
        let name: String = format!("link {}", settings.function).chars().take(15).collect();
        let shared = Arc::new(Shared {
            settings,
            function,
            tether,
            stopping: AtomicBool::new(false),
            connection: Mutex::new(None),
        });
        // Before the service says that all is there: what nobody has claimed by then ends.
        let claimed = shared.claim();
        let (theirs, wake) = (Arc::clone(&shared), Arc::clone(&waker));
        let run = move || theirs.run(&listening, &wake, claimed);
        let thread = std::thread::Builder::new().name(name).spawn(run).map_err(system)?;
        Ok(Self { shared, thread: Some(thread), waker })
    }

    /// Ends the connection, removes the socket and waits for the link's threads.
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

impl Drop for VfioUserLink {
    fn drop(&mut self) {
        self.stop();
    }
}
