//! The signals of a card's process: they reach it through the control thread alone, between two steps of its work.
//!
//! On every thread all signals are blocked that others can send and that would end or interrupt it; so no turn of a reactor is cut
//! between its three steps, whoever sends what to which thread. A fault of the processor (SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP) is
//! the thread's own and is not blocked, nor is the end that the process gives itself (SIGABRT, SIGSYS). SIGKILL and SIGSTOP
//! cannot be.
//!
//! - SIGTERM, SIGINT: the card stops when what is in flight has completed. Again: SIGINT ends the process at once, for a person who
//!   waits; SIGTERM changes nothing, since the stop is bounded and a service manager follows it by SIGKILL.
//! - SIGHUP: changes nothing. There is no terminal to lose and no log to open anew; the configuration file is read at the start.

#![expect(unsafe_code, reason = "hands a descriptor to tokio, which wants to be told that it stays open")]

use std::io::{Error, ErrorKind};
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

/// Signals that are never blocked.
const OWN: [Signal; 7] =
    [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGFPE, Signal::SIGILL, Signal::SIGTRAP, Signal::SIGABRT, Signal::SIGSYS];

/// Signals that are acted upon.
const TAKEN: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];

/// Blocks signals on this thread and on all that it starts. To be called before any other thread is there.
///
/// # Errors
/// Never in practice.
pub(crate) fn block() -> Result<()> {
    let mut blocked = SigSet::all();
    for signal in OWN {
        blocked.remove(signal);
    }
    blocked.thread_block().context("block signals")
}

/// Where signals arrive that were [blocked](block).
pub(crate) struct Signals {
    descriptor: AsyncFd<SignalFd>,
}

impl Signals {
    /// Takes signals on the runtime of this thread.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub(crate) fn new() -> Result<Self> {
        let set: SigSet = TAKEN.into_iter().collect();
        let descriptor = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC);
        let descriptor = descriptor.context("take signals")?;
        // SAFETY: a `SignalFd` owns its descriptor, is never given another, and closes it when it is dropped: with the `AsyncFd`, which
        // alone has it.
        let descriptor = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) };
        Ok(Self { descriptor: descriptor.context("wait for signals")? })
    }

    /// The next signal; waits for as long as none comes.
    async fn next(&self) -> std::io::Result<Signal> {
        let number = self
            .descriptor
            .async_io(Interest::READABLE, |taken| match taken.read_signal() {
                Ok(Some(signal)) => Ok(signal.ssi_signo),
                Ok(None) => Err(Error::from(ErrorKind::WouldBlock)),
                Err(errno) => Err(errno.into()),
            })
            .await?;
        Signal::try_from(number.cast_signed()).map_err(Error::from)
    }

    /// Acts upon each signal, for as long as the process lives.
    pub(crate) async fn act(self, stop: Arc<watch::Sender<bool>>) {
        loop {
            match self.next().await {
                Ok(Signal::SIGHUP) => tracing::info!("SIGHUP changes nothing; a start reads the configuration file"),
                Ok(Signal::SIGINT) if *stop.borrow() => {
                    tracing::warn!("SIGINT again: ending at once");
                    // As a shell reports a process that a signal ended.
                    std::process::exit(128 + Signal::SIGINT as i32);
                }
                Ok(signal) if *stop.borrow() => tracing::info!("{signal} again: stopping already"),
                Ok(signal) => {
                    tracing::info!("{signal}: stopping when what is in flight has completed");
                    stop.send_replace(true);
                }
                Err(error) => {
                    tracing::error!(%error, "signals cannot be taken");
                    return;
                }
            }
        }
    }
}
