//! Eventfds that a VMM hands over, and how they are signalled and read from threads that must not block.
//!
//! Only eventfds are taken: a pipe or a socket could block the reactor that writes to it. An eventfd can block as well: a write to
//! a counter at its maximum, a read of one at zero. Non-blocking mode does not help, for it belongs to both sides, and the front
//! end may take it away at any moment. So the doorbell is read by a call that never blocks whatever the mode, and the interrupt is
//! raised by the kernel itself: as the completion event of an io_uring that does nothing else. Where there is no io_uring, or an
//! old kernel, the mode is all there is.
#![expect(unsafe_code, reason = "system calls that no safe wrapper has")]

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use io_uring::{IoUring, opcode};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};

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

    /// An event of our own.
    pub(super) fn make() -> std::io::Result<Self> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Self(File::from(OwnedFd::from(EventFd::from_value_and_flags(0, flags)?))))
    }

    /// Its descriptor, to wait for.
    pub(super) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Signals an event of our own, whose counter nobody else can fill.
    pub(super) fn signal_own(&self) {
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }

    /// A second handle of the same event.
    pub(super) fn again(&self) -> std::io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Signals it, for threads that signal many events, each of them rarely. Never blocks.
    pub(super) fn signal_once(&self) {
        // One for each thread: to make one for each signal would let a VMM that tries out its vectors keep the kernel busy with
        // rings that are made and taken apart.
        thread_local!(static CHIME: RefCell<Option<Chime>> = RefCell::new(Chime::new().ok()));
        CHIME.with_borrow_mut(|chime| {
            let signalled = chime.as_mut().is_some_and(|chime| {
                let signalled = chime.follow(&self.0).is_ok() && chime.signal();
                chime.unfollow();
                signalled
            });
            if !signalled {
                let _ = (&self.0).write(&1u64.to_ne_bytes());
            }
        });
    }

    /// Takes off what was signalled; returns whether there was anything. Never blocks.
    pub(super) fn take(&mut self) -> bool {
        let mut count = [0u8; 8];
        let part = libc::iovec { iov_base: count.as_mut_ptr().cast(), iov_len: count.len() };
        // SAFETY: one vector of eight bytes that outlive the call; the descriptor is ours. An offset of -1 is that of `read`.
        let taken = unsafe { libc::preadv2(self.0.as_raw_fd(), &raw const part, 1, -1, libc::RWF_NOWAIT) };
        if taken >= 0 {
            return taken == 8;
        }
        // Eventfds know this flag since Linux 5.8.
        let unknown = matches!(nix::Error::last(), nix::Error::EOPNOTSUPP | nix::Error::ENOSYS);
        unknown && self.0.read(&mut count).is_ok()
    }
}

/// An io_uring whose completions the kernel tells an eventfd.
struct Chime(IoUring);

impl Chime {
    fn new() -> std::io::Result<Self> {
        IoUring::new(2).map(Self)
    }

    /// From now on this is the event that is signalled; there must be none.
    fn follow(&self, event: &File) -> std::io::Result<()> {
        self.0.submitter().register_eventfd(event.as_raw_fd())
    }

    fn unfollow(&self) {
        let _ = self.0.submitter().unregister_eventfd();
    }

    /// Signals the event: at its maximum it is signalled already. Returns whether that was possible. Never blocks.
    fn signal(&mut self) -> bool {
        // The completions of earlier signals.
        self.0.completion().for_each(drop);
        // SAFETY: this entry refers to no memory. There is room: each is consumed before the next is made.
        let pushed = unsafe { self.0.submission().push(&opcode::Nop::new().build()) };
        pushed.is_ok() && matches!(self.0.submit(), Ok(1))
    }
}

/// An eventfd that is signalled from threads which must not block.
pub(super) struct Bell {
    event: Event,
    chime: Option<Chime>,
}

impl std::fmt::Debug for Bell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bell({:?})", self.event)
    }
}

impl Bell {
    pub(super) fn new(event: Event) -> Self {
        let chime = Chime::new().and_then(|chime| {
            chime.follow(&event.0)?;
            Ok(chime)
        });
        Self { event, chime: chime.ok() }
    }

    /// Signals it: at its maximum it is signalled already. Never blocks.
    pub(super) fn signal(&mut self) {
        if !self.chime.as_mut().is_some_and(Chime::signal) {
            let _ = (&self.event.0).write(&1u64.to_ne_bytes());
        }
    }
}

#[cfg(test)]
mod tests;
