//! Doorbell and interrupt of a ring: the two eventfds that a front end hands over.
//!
//! Only eventfds are taken: a pipe or a socket could block the reactor that writes to it. The front end may have them in
//! blocking mode, and the mode belongs to both sides, so it is set to non-blocking here: a write to a counter at its maximum
//! then fails, and the interrupt is pending anyway.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::link::QueuePort;

/// An eventfd of the front end's.
#[derive(Debug)]
pub(super) struct Event(File);

impl Event {
    /// Takes the descriptor if it is an eventfd.
    pub(super) fn new(file: File) -> Result<Self, String> {
        let link =
            std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(|error| error.to_string())?;
        if link.as_os_str() != "anon_inode:[eventfd]" {
            return Err(format!("{} is not an eventfd", link.display()));
        }
        let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(|error| error.to_string())?;
        let flags = OFlag::from_bits_truncate(flags) | OFlag::O_NONBLOCK;
        fcntl(&file, FcntlArg::F_SETFL(flags)).map_err(|error| error.to_string())?;
        Ok(Self(file))
    }

    /// A second handle of the same event.
    pub(super) fn again(&self) -> std::io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Signals it.
    pub(super) fn signal(&self) {
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }
}

/// The port of a running ring.
#[derive(Debug)]
pub(super) struct EventPort {
    pub(super) kick: Option<Event>,
    pub(super) call: Option<Event>,
}

impl QueuePort for EventPort {
    fn doorbell_fd(&self) -> Option<RawFd> {
        self.kick.as_ref().map(|kick| kick.0.as_raw_fd())
    }

    fn take_doorbell(&mut self) -> bool {
        let mut count = [0; 8];
        self.kick.as_mut().is_some_and(|kick| kick.0.read(&mut count).is_ok())
    }

    fn raise_interrupt(&mut self) {
        if let Some(call) = &self.call {
            call.signal();
        }
    }
}
