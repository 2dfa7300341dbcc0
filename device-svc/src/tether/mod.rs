//! How the service holds on to its keeper, the process that owns what a restart must not lose.
//!
//! ```text
//!   keeper (a process) ── socket ── Tether (in the service)          questions and answers, below
//!          └── a stream for each vfio-user connection ── its session     ../link/vfio_user, ../keeper/connection.rs
//! ```
//!
//! Each question is one datagram of JSON, with descriptors beside it, and gets one answer. The service trusts its keeper, which is
//! of the same program, or of a version next to it.
#![expect(unsafe_code, reason = "takes ownership of descriptors that the kernel has just made for us")]

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The variable of the environment by which a keeper tells a service what it understands beside what every keeper does: a number.
pub const LANGUAGE: &str = "DRAY_KEEPER_LANGUAGE";
/// With this it keeps files.
pub const LANGUAGE_FILES: u32 = 1;

/// Bytes of a datagram at most.
const DATAGRAM_BYTES_MAX: usize = 16 << 10;
/// Descriptors with a datagram at most.
const DESCRIPTORS_MAX: usize = 4;

/// What a service asks of its keeper.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    /// Keep this connection of a VMM to a function. Beside it: the VMM's socket, and the keeper's end of a stream to the session.
    Keep {
        /// The function.
        function: String,
    },
    /// Is there a connection to this function? Answered with the session's end of a new stream, and the VMM's socket.
    Claim {
        /// The function.
        function: String,
    },
    /// End a connection.
    End {
        /// The connection's number.
        number: u64,
    },
    /// Keep this file, which is a function's, instead of one before. Beside it: the file.
    KeepFile {
        /// The function.
        function: String,
    },
    /// Is there a file of this function? Answered with the file.
    ClaimFile {
        /// The function.
        function: String,
    },
    /// The file of this function is of no use any more.
    DropFile {
        /// The function.
        function: String,
    },
    /// This function has failed, and will claim its connection, or its file, when it runs again.
    Await {
        /// The function.
        function: String,
    },
    /// The service serves: connections that it has not named are of no use.
    Ready,
    /// Another program shall take over. Answered when it stands by; then this service lets go and ends.
    Update {
        /// The program.
        program: PathBuf,
    },
    /// This service stands by to take over. Answered when it is to begin.
    StandBy,
}

/// What the keeper answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It is done.
    Done,
    /// The connection has this number.
    Kept {
        /// Its number.
        number: u64,
    },
    /// There is none.
    Nothing,
    /// It cannot be done.
    Refused {
        /// Why.
        why: String,
    },
}

/// Why the keeper cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum TetherError {
    /// The system says so.
    #[error("the keeper cannot be reached: {0}")]
    System(#[from] Errno),
    /// It has said what no keeper of a version next to this one says.
    #[error("the keeper speaks another language: {0}")]
    Foreign(#[from] serde_json::Error),
    /// It refuses.
    #[error("the keeper refuses: {0}")]
    Refused(String),
    /// It is gone.
    #[error("the keeper is gone")]
    Gone,
}

/// Sends one datagram.
///
/// # Errors
/// When the other side is gone.
pub fn send(socket: &impl AsFd, what: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<(), TetherError> {
    let bytes = serde_json::to_vec(what)?;
    let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    loop {
        match sendmsg::<()>(socket.as_fd().as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None)
        {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN) => return Err(TetherError::Gone),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Waits for one datagram, and the descriptors with it.
///
/// # Errors
/// When the other side is gone, or says what is not understood.
pub fn receive<T: DeserializeOwned>(socket: &impl AsFd) -> Result<(T, Vec<OwnedFd>), TetherError> {
    let mut bytes = vec![0; DATAGRAM_BYTES_MAX];
    let mut control = nix::cmsg_space!([i32; DESCRIPTORS_MAX]);
    let (count, fds) = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received = match recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut parts, Some(&mut control), flags) {
            Err(Errno::EINTR) => continue,
            Err(Errno::ECONNRESET) => return Err(TetherError::Gone),
            received => received?,
        };
        let mut fds = Vec::new();
        for message in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = message {
                // SAFETY: the kernel has made these descriptors for us with this datagram, and nobody else knows them.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        break (received.bytes, fds);
    };
    if count == 0 {
        return Err(TetherError::Gone);
    }
    Ok((serde_json::from_slice(&bytes[..count])?, fds))
}

/// How long functions may take to go on where a service before has left them.
const RESTORE_TIME_MAX: Duration = Duration::from_secs(5);

/// The service's end.
#[derive(Debug)]
pub struct Tether {
    socket: Mutex<OwnedFd>,
    /// A program before this one goes on if this one cannot: then it must find every connection as it was.
    strict: bool,
    /// What the keeper understands.
    language: u32,
    /// All functions are there.
    serving: AtomicBool,
    /// The service makes room for another program: its connections go on without it.
    leaving: AtomicBool,
    restoring: Mutex<Restoring>,
    restored: Condvar,
}

/// Functions that go on where a service before has left them.
#[derive(Debug, Default)]
struct Restoring {
    /// Those that are not there yet.
    count: usize,
    /// Why one cannot.
    refused: Option<String>,
}

/// A VMM's connection that the keeper holds. Dropping it ends the connection; not so if the service makes room for another, or did not
/// get to serve.
#[derive(Debug)]
pub struct KeptConnection {
    tether: Arc<Tether>,
    number: u64,
    /// Its function is yet to go on where a service before has left it.
    is_restoring: AtomicBool,
    is_refused: AtomicBool,
}

/// A file that the keeper holds too, for a service that comes after this one. Dropping it has the keeper let go of it; not so if the
/// service makes room for another, or did not get to serve.
#[derive(Debug)]
pub struct KeptFile {
    tether: Arc<Tether>,
    function: String,
    file: File,
}

/// A connection that was there before this service was.
#[derive(Debug)]
pub struct Claimed {
    /// The connection.
    pub connection: KeptConnection,
    /// What its session reads and writes.
    pub stream: UnixStream,
    /// The VMM's socket, to see whether it is still there.
    pub vmm: UnixStream,
}

impl Tether {
    /// The service's end of `socket`; `strict`: a program before this one goes on if this one cannot; `language`: what the keeper
    /// [understands](LANGUAGE).
    #[must_use]
    pub fn new(socket: OwnedFd, strict: bool, language: u32) -> Self {
        Self {
            socket: Mutex::new(socket),
            strict,
            language,
            serving: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            restoring: Mutex::default(),
            restored: Condvar::new(),
        }
    }

    fn restoring(&self) -> MutexGuard<'_, Restoring> {
        self.restoring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connection(self: &Arc<Self>, number: u64, is_restoring: bool) -> KeptConnection {
        self.restoring().count += usize::from(is_restoring);
        let tether = Arc::clone(self);
        KeptConnection {
            tether,
            number,
            is_restoring: AtomicBool::new(is_restoring),
            is_refused: AtomicBool::new(false),
        }
    }

    fn ask(&self, question: &Question, fds: &[BorrowedFd<'_>]) -> Result<(Answer, Vec<OwnedFd>), TetherError> {
        // One question at a time: its answer comes next.
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        send(&*socket, question, fds)?;
        match receive(&*socket)? {
            (Answer::Refused { why }, _) => Err(TetherError::Refused(why)),
            answer => Ok(answer),
        }
    }

    /// Gives a VMM's connection to `function` to the keeper. Returns what the session reads and writes instead.
    ///
    /// # Errors
    /// When the keeper cannot take it.
    pub fn keep(
        self: &Arc<Self>,
        function: &str,
        vmm: &UnixStream,
    ) -> Result<(KeptConnection, UnixStream), TetherError> {
        let (ours, theirs) = UnixStream::pair().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
        let question = Question::Keep { function: function.to_owned() };
        match self.ask(&question, &[vmm.as_fd(), theirs.as_fd()])? {
            (Answer::Kept { number }, _) => Ok((self.connection(number, false), ours)),
            _ => Err(TetherError::Refused("without a reason".to_owned())),
        }
    }

    /// Takes up the connection to `function` that a service before has left, if there is one.
    ///
    /// # Errors
    /// When the keeper does not answer.
    pub fn claim(self: &Arc<Self>, function: &str) -> Result<Option<Claimed>, TetherError> {
        let (answer, fds) = self.ask(&Question::Claim { function: function.to_owned() }, &[])?;
        let (Answer::Kept { number }, Ok([stream, vmm])) = (answer, <[OwnedFd; 2]>::try_from(fds)) else {
            return Ok(None);
        };
        let connection = self.connection(number, true);
        Ok(Some(Claimed { connection, stream: stream.into(), vmm: vmm.into() }))
    }

    /// Whether the keeper keeps files: one of an earlier version, whose place a later program has taken, does not.
    #[must_use]
    pub const fn keeps_files(&self) -> bool {
        self.language >= LANGUAGE_FILES
    }

    /// The file of `function` that a service before has left, if it `fits`, or else the one that `make` makes.
    ///
    /// # Errors
    /// When the keeper does not take one, or none can be made.
    pub fn file(
        self: &Arc<Self>,
        function: &str,
        fits: impl FnOnce(&File) -> bool,
        make: impl FnOnce() -> std::io::Result<File>,
    ) -> Result<KeptFile, TetherError> {
        let function = function.to_owned();
        let (_, fds) = self.ask(&Question::ClaimFile { function: function.clone() }, &[])?;
        let claimed = fds.into_iter().next().map(File::from).filter(fits);
        let file = match claimed {
            Some(file) => file,
            None => {
                let file = make().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
                self.ask(&Question::KeepFile { function: function.clone() }, &[file.as_fd()])?;
                file
            }
        };
        Ok(KeptFile { tether: Arc::clone(self), function, file })
    }

    /// All functions are there; those of `failed` are not yet, and keep their VMMs. Waits until those that a service before has left go on.
    ///
    /// # Errors
    /// When the keeper does not answer; if a program before this one can go on, also when one of them cannot.
    pub fn ready(&self, failed: impl Iterator<Item = String>) -> Result<(), TetherError> {
        let restoring = self.restored.wait_timeout_while(self.restoring(), RESTORE_TIME_MAX, |now| now.count > 0);
        let (restoring, timeout) = restoring.unwrap_or_else(PoisonError::into_inner);
        if self.strict
            && let Some(why) =
                restoring.refused.clone().or_else(|| timeout.timed_out().then(|| "it takes too long".to_owned()))
        {
            return Err(TetherError::Refused(why));
        }
        drop(restoring);
        for function in failed {
            self.ask(&Question::Await { function }, &[])?;
        }
        self.serving.store(true, Ordering::Release);
        self.ask(&Question::Ready, &[]).map(drop)
    }

    /// Waits until it is this service's turn.
    ///
    /// # Errors
    /// When it never is.
    pub fn stand_by(&self) -> Result<(), TetherError> {
        self.ask(&Question::StandBy, &[]).map(drop)
    }

    /// Has another program stand by. When this returns well, the service must end, and it takes over.
    ///
    /// # Errors
    /// When it cannot; then nothing has changed.
    pub fn update(&self, program: PathBuf) -> Result<(), TetherError> {
        self.ask(&Question::Update { program }, &[])?;
        self.leaving.store(true, Ordering::Release);
        Ok(())
    }

    /// Whether what the service has is for another that comes after it: it makes room, or did not get to serve.
    #[must_use]
    pub fn is_for_another(&self) -> bool {
        self.leaving.load(Ordering::Acquire) || !self.serving.load(Ordering::Acquire)
    }
}

impl KeptConnection {
    /// The function goes on where a service before has left it, or cannot.
    pub fn restored(&self, done: Result<(), String>) {
        if !self.is_restoring.swap(false, Ordering::AcqRel) {
            return;
        }
        let mut restoring = self.tether.restoring();
        restoring.count = restoring.count.saturating_sub(1);
        if let Err(why) = done {
            self.is_refused.store(true, Ordering::Release);
            restoring.refused.get_or_insert(why);
        }
        self.tether.restored.notify_all();
    }
}

impl Drop for KeptConnection {
    fn drop(&mut self) {
        self.restored(Ok(()));
        let tether = &self.tether;
        // One that did not get to serve leaves all as it found it, but for what no other could go on with either.
        let is_of_no_use = self.is_refused.load(Ordering::Acquire) && !tether.strict;
        if (!tether.is_for_another() || is_of_no_use)
            && let Err(error) = tether.ask(&Question::End { number: self.number }, &[])
        {
            tracing::debug!(%error, "a connection ends without its keeper");
        }
    }
}

impl KeptFile {
    /// The file.
    #[must_use]
    pub const fn file(&self) -> &File {
        &self.file
    }
}

impl Drop for KeptFile {
    fn drop(&mut self) {
        let question = Question::DropFile { function: self.function.clone() };
        if !self.tether.is_for_another()
            && let Err(error) = self.tether.ask(&question, &[])
        {
            tracing::debug!(%error, "a file is dropped without its keeper");
        }
    }
}

#[cfg(test)]
mod tests;
