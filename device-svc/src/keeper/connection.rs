//! One VMM's connection to a function: messages in from the VMM, on to whichever service there is, and back.
//!
//! Two threads, each the only writer to one side:
//!
//! ```text
//!   VMM ──► inward ──► service      keeps each command until it is answered; tells a new service what it must know
//!   VMM ◄── outward ◄── service     settles what is answered; ends with its service
//! ```
//!
//! A command that was read from the VMM is kept until its whole answer is here. If the service dies before, the next one gets it
//! again, behind all that was settled and in its old order; if it dies after, the answer goes to the VMM and nobody hears the command
//! again. So no command is lost and none is answered twice, whatever the moment.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::kept::{Awaited, Files, Questions, Said, Settled, is_success, weight};
use crate::link::vfio_user::framing::{
    DESCRIPTORS_MAX, FLAG_KEEPER, FLAG_NO_REPLY, FLAG_TYPE, Framing, FramingError, Header, Message, TYPE_COMMAND,
};
use crate::link::vfio_user::message::{BODY_BYTES_MAX, command::kept};

/// Commands that wait for their answer at most, and bytes of them: beyond that a VMM is not heard.
const AWAITED_MAX: usize = 64;
const AWAITED_BYTES_MAX: usize = 4 << 20;
/// Services that may die over one command before it is not given to another: it must be what kills them, and all other VMs wait.
const DEATHS_MAX: u32 = 5;
/// Threads here do little, and there are two for each function.
const STACK_BYTES: usize = 128 << 10;

/// A service that takes a connection up.
#[derive(Debug)]
struct Fresh {
    stream: UnixStream,
    has_claimed: bool,
}

/// What both threads share.
#[derive(Debug, Default)]
struct Inner {
    settled: Settled,
    awaited: VecDeque<Awaited>,
    questions: Questions,
    /// What the function becomes with the next reply.
    state: Option<Vec<u8>>,
    /// A service that was told nothing yet; one that has claimed the connection must hear of all that was before it.
    fresh: Option<Fresh>,
    /// The service that is there, to hang up on it.
    service: Option<UnixStream>,
    ended: bool,
}

/// The connection.
#[derive(Debug)]
pub(super) struct Connection {
    function: String,
    vmm: UnixStream,
    wake: EventFd,
    inner: Mutex<Inner>,
    /// There may be room for a command, or a fresh service.
    changed: Condvar,
}

fn framing(stream: &UnixStream) -> io::Result<Framing> {
    Ok(Framing::new(stream.try_clone()?, BODY_BYTES_MAX, DESCRIPTORS_MAX))
}

fn spawn(name: &str, function: &str, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let name = format!("{name} {function}").chars().take(15).collect();
    std::thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(run)
}

impl Connection {
    /// Keeps the connection of a VMM to `function`, whose session has the other end of `service`.
    ///
    /// # Errors
    /// When the system has no thread or descriptor for it.
    pub(super) fn start(function: String, vmm: UnixStream, service: UnixStream) -> io::Result<Arc<Self>> {
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let inner =
            Mutex::new(Inner { fresh: Some(Fresh { stream: service, has_claimed: false }), ..Inner::default() });
        let mut from_vmm = framing(&vmm)?;
        let connection = Arc::new(Self { function, vmm, wake, inner, changed: Condvar::new() });
        let own = Arc::clone(&connection);
        spawn("in", &connection.function, move || {
            let end = Inward { connection: &own, outward: None, to_service: None, files: Files::default() }
                .run(&mut from_vmm);
            if let FramingError::Closed | FramingError::Truncated = end {
                tracing::debug!(function = own.function, "a VMM is gone");
            } else {
                tracing::warn!(function = own.function, error = %end, "a VMM's connection ends");
            }
            own.end();
        })?;
        Ok(connection)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A handle of the VMM's socket.
    pub(super) fn vmm(&self) -> io::Result<UnixStream> {
        self.vmm.try_clone()
    }

    pub(super) fn is_ended(&self) -> bool {
        self.lock().ended
    }

    /// A service takes it up: it has the other end of the stream.
    pub(super) fn offer(&self, service: UnixStream) {
        let mut inner = self.lock();
        if inner.ended {
            // The VMM hung up just now.
            let _ = service.shutdown(Shutdown::Both);
            return;
        }
        inner.fresh = Some(Fresh { stream: service, has_claimed: true });
        drop(inner);
        self.changed.notify_all();
        // A full counter wakes just as well.
        let _ = self.wake.write(1);
    }

    /// Hangs up on both sides.
    pub(super) fn end(&self) {
        let mut inner = self.lock();
        inner.ended = true;
        let fresh = inner.fresh.take().map(|fresh| fresh.stream);
        for service in [inner.service.take(), fresh].into_iter().flatten() {
            let _ = service.shutdown(Shutdown::Both);
        }
        drop(inner);
        // Whoever is gone already needs no end.
        let _ = self.vmm.shutdown(Shutdown::Both);
        self.changed.notify_all();
    }

    /// Service to VMM, until the service is gone.
    fn outward(&self, service: &mut Framing, vmm: &Framing) {
        let mut message = Message::default();
        while service.receive(&mut message).is_ok() {
            let Some(header) = self.take_up(&mut message) else { continue };
            let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
            if vmm.send(header, &[&message.body], &fds).is_err() {
                // At once, and not when the other thread hears of it: that may wait for a service that waits for us.
                self.end();
                return;
            }
        }
        let mut inner = self.lock();
        inner.state = None;
        inner.questions.forget();
    }

    /// Settles what the service says. Returns what the VMM gets of it.
    fn take_up(&self, message: &mut Message) -> Option<Header> {
        let header = message.header;
        let mut inner = self.lock();
        let inner = &mut *inner;
        if header.flags & FLAG_TYPE == TYPE_COMMAND {
            if header.flags & FLAG_KEEPER == 0 {
                return inner.questions.ask(header.id).map(|id| Header { id, ..header });
            }
            if header.command == kept::STATE {
                inner.state = Some(std::mem::take(&mut message.body));
                if !message.fds.is_empty() {
                    inner.settled.set_files(std::mem::take(&mut message.fds));
                }
            }
            return None;
        }
        // Answers come in the order of commands.
        let Awaited { said, .. } = inner.awaited.pop_front()?;
        self.changed.notify_all();
        if said.header.flags & FLAG_KEEPER != 0 {
            return None;
        }
        if let Some(state) = inner.state.take() {
            inner.settled.set_state(state);
        }
        if is_success(header) {
            inner.settled.settle(&said);
        }
        (said.header.flags & FLAG_NO_REPLY == 0).then_some(header)
    }
}

/// The thread that hears the VMM.
struct Inward<'a> {
    connection: &'a Arc<Connection>,
    outward: Option<JoinHandle<()>>,
    to_service: Option<Framing>,
    files: Files,
}

impl Inward<'_> {
    fn run(&mut self, vmm: &mut Framing) -> FramingError {
        let mut message = Message::default();
        loop {
            if let Err(error) = self.await_room() {
                return error;
            }
            match vmm.try_receive(&mut message) {
                Ok(true) => {
                    if let Err(error) = self.pass_on(&mut message) {
                        return error;
                    }
                }
                Ok(false) => self.wait(),
                Err(error) => return error,
            }
        }
    }

    /// Waits for the VMM, or a fresh service.
    fn wait(&self) {
        let Connection { vmm, wake, .. } = self.connection.as_ref();
        let mut fds = [PollFd::new(vmm.as_fd(), PollFlags::POLLIN), PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
        // An interrupted wait is waited again.
        let _ = poll(&mut fds, PollTimeout::NONE);
        let _ = wake.read();
    }

    /// Waits until another command may be kept, and meanwhile tells a fresh service what it must know.
    fn await_room(&mut self) -> Result<(), FramingError> {
        loop {
            let mut inner = self.connection.lock();
            if inner.ended {
                return Err(FramingError::Closed);
            }
            if let Some(fresh) = inner.fresh.take() {
                drop(inner);
                self.follow(fresh)?;
                continue;
            }
            if inner.awaited.len() < AWAITED_MAX && weight(&inner.awaited) < AWAITED_BYTES_MAX {
                return Ok(());
            }
            drop(self.connection.changed.wait(inner).unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// From now on this is the service.
    fn follow(&mut self, Fresh { stream: service, has_claimed }: Fresh) -> Result<(), FramingError> {
        let system = |error: io::Error| FramingError::System(Errno::from_raw(error.raw_os_error().unwrap_or(0)));
        // All that the one before has answered counts; it is dead, so this ends.
        self.to_service = None;
        if let Some(outward) = self.outward.take() {
            let _ = outward.join();
        }
        let (mut from_service, to_vmm) =
            (framing(&service).map_err(system)?, framing(&self.connection.vmm).map_err(system)?);
        self.to_service = Some(framing(&service).map_err(system)?);
        let mut inner = self.connection.lock();
        inner.service = Some(service);
        // What it was told before it died, the one before never told us the end of.
        inner.awaited.retain(|awaited| awaited.said.header.flags & FLAG_KEEPER == 0);
        if has_claimed && let Some(first) = inner.awaited.front_mut() {
            first.deaths += 1;
            if first.deaths > DEATHS_MAX {
                return Err(FramingError::Kept(format!(
                    "{DEATHS_MAX} services died over command {}",
                    first.said.header.command
                )));
            }
        }
        let unanswered = inner.awaited.iter().map(|awaited| awaited.said.clone()).collect::<Vec<_>>();
        let mut said = if has_claimed { inner.settled.say_again() } else { Vec::new() };
        for again in said.iter().rev() {
            inner.awaited.push_front(Awaited::new(again.clone()));
        }
        drop(inner);
        said.extend(unanswered);
        let connection = Arc::clone(self.connection);
        self.outward = Some(
            spawn("out", &self.connection.function, move || connection.outward(&mut from_service, &to_vmm))
                .map_err(system)?,
        );
        said.iter().try_for_each(|again| self.tell(again))
    }

    fn pass_on(&mut self, message: &mut Message) -> Result<(), FramingError> {
        let is_command = message.header.flags & FLAG_TYPE == TYPE_COMMAND;
        let Some(mut said) = Said::by_vmm(message, &mut self.files) else {
            return Err(FramingError::Kept("the VMM has more files than are kept for it".to_owned()));
        };
        let mut inner = self.connection.lock();
        if is_command {
            inner.awaited.push_back(Awaited::new(said.clone()));
        } else {
            let Some(id) = inner.questions.answered(said.header.id) else { return Ok(()) };
            said.header.id = id;
        }
        drop(inner);
        self.tell(&said)
    }

    /// A service that is gone is told nothing: commands are kept for the next one. One that is there and cannot be told makes no sense
    /// of what comes after.
    fn tell(&mut self, said: &Said) -> Result<(), FramingError> {
        let Some(service) = &self.to_service else { return Ok(()) };
        match service.send(said.header, &[&said.body], &said.borrowed()) {
            Ok(()) => Ok(()),
            Err(FramingError::Closed) => {
                self.to_service = None;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

impl Drop for Inward<'_> {
    fn drop(&mut self) {
        self.connection.end();
        self.to_service = None;
        if let Some(outward) = self.outward.take() {
            let _ = outward.join();
        }
    }
}

/// A stream of which one end is kept and the other handed out.
pub(super) fn pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair()?;
    Ok((ours, theirs.into()))
}

#[cfg(test)]
mod tests;
