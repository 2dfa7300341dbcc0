//! A process that serves: how it is started, how it ends, and when another is started.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::Pid;

use crate::tether::{LANGUAGE, LANGUAGE_FILES};

/// Deaths of services that had served which are answered at once, within [`REMEMBERED`]; those after them get a pause.
const AT_ONCE: usize = 64;
const REMEMBERED: Duration = Duration::from_secs(30);
/// The pause before a service that has served is started again, when that happens often.
const PAUSE: Duration = Duration::from_millis(100);
/// The first pause before one that did not get to serve, which doubles, and the last.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_LAST: Duration = Duration::from_secs(10);

/// A program, held open: it can be started even when its file was replaced or removed.
#[derive(Debug)]
pub(super) struct Program {
    path: PathBuf,
    file: File,
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

impl Program {
    /// This one.
    pub(super) fn own() -> io::Result<Self> {
        let path = std::env::current_exe()?;
        let file = File::open("/proc/self/exe")?;
        Ok(Self { path, file })
    }

    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC).open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("is not a program"));
        }
        Ok(Self { path: path.to_owned(), file })
    }
}

/// A process that serves, or stands by to.
#[derive(Debug)]
pub(super) struct Service {
    child: Child,
    socket: OwnedFd,
    talking: bool,
    started: Instant,
    ready: bool,
}

impl Service {
    /// Starts the program with our own arguments. It finds its end of the tether as its standard input.
    pub(super) fn start(program: &Program, stand_by: bool) -> io::Result<Self> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        // The new process has the descriptor too until it has become the program.
        let mut command = Command::new(format!("/proc/self/fd/{}", program.file.as_raw_fd()));
        command.env(LANGUAGE, LANGUAGE_FILES.to_string());
        command.arg0(&program.path).args(std::env::args_os().skip(1)).arg("--kept");
        if stand_by {
            command.arg("--stand-by");
        }
        // A group of its own: what a terminal sends to ours, it gets from us.
        let child = command.stdin(Stdio::from(theirs)).process_group(0).spawn()?;
        Ok(Self { child, socket: ours, talking: true, started: Instant::now(), ready: false })
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether it may still ask something.
    pub(super) const fn is_talking(&self) -> bool {
        self.talking
    }

    pub(super) const fn hang_up(&mut self) {
        self.talking = false;
    }

    pub(super) const fn set_ready(&mut self) {
        self.ready = true;
    }

    pub(super) const fn was_ready(&self) -> bool {
        self.ready
    }

    pub(super) fn lived(&self) -> Duration {
        self.started.elapsed()
    }

    /// With what it has ended, if it has.
    pub(super) fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    pub(super) fn signal(&self, signal: Signal) {
        // It has not been waited for, so the number is still its own; one that has ended needs no signal.
        let _ = kill(Pid::from_raw(self.child.id() as i32), signal);
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// When another service is started.
#[derive(Debug, Default)]
pub(super) struct Restarts {
    /// A service has served.
    served: bool,
    /// Deaths of those that had served.
    deaths: VecDeque<Instant>,
    /// Services since then that did not get to serve.
    failures: u32,
}

impl Restarts {
    pub(super) const fn served(&mut self) {
        self.served = true;
        self.failures = 0;
    }

    /// A service has died: how long to wait before the next. `None`: none was ever of use, so the next would not be either.
    pub(super) fn pause(&mut self, was_ready: bool) -> Option<Duration> {
        if !self.served {
            return None;
        }
        if !was_ready {
            let pause = PAUSE_FIRST.saturating_mul(1 << self.failures.min(16));
            self.failures += 1;
            return Some(pause.min(PAUSE_LAST));
        }
        let now = Instant::now();
        self.deaths.push_back(now);
        while self.deaths.front().is_some_and(|death| now - *death > REMEMBERED) {
            self.deaths.pop_front();
        }
        // The list is as long as there are pauses in the time.
        Some(if self.deaths.len() > AT_ONCE { PAUSE } else { Duration::ZERO })
    }
}

/// What became of a service, for people.
pub(super) fn describe(end: ExitStatus) -> String {
    match end.signal().map(Signal::try_from) {
        Some(Ok(signal)) => format!("killed by {signal}"),
        _ => end.to_string(),
    }
}

/// What the keeper ends with, as a shell reports it.
pub(super) fn exit_code(end: ExitStatus) -> ExitCode {
    let code = end.code().or_else(|| end.signal().map(|signal| 128 + signal)).unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

#[cfg(test)]
mod tests;
