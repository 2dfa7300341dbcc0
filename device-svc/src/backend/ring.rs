//! One io_uring with one file in it, used by one reactor: what the channels of files and of taps have in common.
//!
//! The ring is made by the control thread and switched on by the reactor's, on its first turn: a ring with
//! `SINGLE_ISSUER` belongs to the thread that enables it. `DEFER_TASKRUN` keeps the kernel from interrupting the reactor:
//! what has ended waits until `exchange` asks for it. Older kernels get the same ring without what they do not know, and so do
//! several threads that use one ring in turns ([`Users::Several`]).
//!
//! A reactor that sleeps is woken by an eventfd: the ring's own descriptor is pollable, but deferred work wakes nobody who
//! sleeps on it (tried on Linux 6.18). A signalled eventfd costs a system call to quiet, so the kernel may signal it only
//! while it is *armed*, which is after some polls in a row have found nothing.
#![expect(unsafe_code, reason = "hands addresses to the kernel")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use io_uring::{EnterFlags, IoUring, cqueue, squeue};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::BackendError;

/// Polls that find nothing before the eventfd is armed. Arming and quieting cost two system calls, about half a
/// microsecond; by then some microseconds have been waited, and a disk that is faster than that is never slowed down.
const IDLE_POLLS: u32 = 64;

/// Who uses a ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Users {
    /// One thread, the first that does.
    One,
    /// Several threads, one at a time.
    Several,
}

/// A ring whose file number 0 is the channel's.
pub(super) struct Ring {
    ring: IoUring,
    enabled: bool,
    /// Pushed and not yet taken by the kernel.
    unsubmitted: u32,
    /// Whether the kernel says in shared memory that `exchange` has something to collect.
    tells_work: bool,
    /// Signalled by the kernel when something has ended, while armed.
    wake: Arc<EventFd>,
    armed: bool,
    /// Polls in a row that found nothing.
    idle_polls: u32,
    /// Where the kernel's worker threads for this ring may run.
    worker_cpus: Option<libc::cpu_set_t>,
}

impl Ring {
    /// A ring for `entries` requests, not yet switched on. To be called on a thread that is not pinned: the kernel's
    /// workers may run where this thread may, or they would all share the reactor's core. `user` is who needs it, for people:
    /// "a tap".
    pub(super) fn new(file: BorrowedFd<'_>, entries: u32, user: &str, users: Users) -> Result<Self, BackendError> {
        let explain = |error: &io::Error| explain(error, user);
        let (mut ring, tells_work) = build(entries, users).map_err(|error| explain(&error))?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| explain(&errno.into()))?;
        ring.completion().disable_eventfd();
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd()]).map_err(|error| explain(&error))?;
        submitter.register_eventfd(wake.as_raw_fd()).map_err(|error| explain(&error))?;
        Ok(Self {
            ring,
            enabled: false,
            unsubmitted: 0,
            tells_work,
            wake: Arc::new(wake),
            armed: false,
            idle_polls: 0,
            worker_cpus: cpus(),
        })
    }

    /// Queues an entry for the next `exchange`. There is always room for as many as the ring was made for.
    ///
    /// # Safety
    /// What the entry points to stays valid until its completion has been taken, or `wait` has returned it.
    #[inline]
    pub(super) unsafe fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the caller's promise.
        let result = unsafe { self.ring.submission().push(entry) };
        assert!(result.is_ok(), "more requests than the ring was made for");
        self.unsubmitted += 1;
    }

    /// Pushed and not yet taken by the kernel.
    #[inline]
    pub(super) const fn unsubmitted(&self) -> u32 {
        self.unsubmitted
    }

    /// Submits what was pushed and has the kernel post what has ended, in at most one system call; none if there is
    /// nothing of either.
    #[inline]
    pub(super) fn exchange(&mut self) -> io::Result<()> {
        if !self.enabled {
            self.enable()?;
        }
        if self.unsubmitted > 0 || self.must_collect() {
            // Before the kernel runs what it deferred: that may signal without anything having ended for us, and a signal
            // that stayed would keep the reactor awake.
            self.disarm();
            return self.enter(0);
        }
        Ok(())
    }

    /// Whether what has ended waits for an `exchange` that enters the kernel. Reads shared memory only.
    #[inline]
    fn must_collect(&mut self) -> bool {
        let queue = self.ring.submission();
        (self.tells_work && queue.taskrun()) || queue.cq_overflow()
    }

    /// Whether something has ended, or may have. Reads shared memory only.
    #[inline]
    pub(super) fn has_work(&mut self) -> bool {
        self.must_collect() || !self.ring.completion().is_empty()
    }

    /// The poll found something.
    #[inline]
    pub(super) fn busy(&mut self) {
        self.idle_polls = 0;
        self.disarm();
    }

    /// The poll found nothing, though requests are under way: after some such polls the eventfd is armed.
    #[inline]
    pub(super) fn idle(&mut self) -> io::Result<()> {
        self.idle_polls = self.idle_polls.saturating_add(1);
        if self.armed || self.idle_polls < IDLE_POLLS { Ok(()) } else { self.arm() }
    }

    /// Whether a reactor may sleep on `fd`.
    #[inline]
    pub(super) const fn armed(&self) -> bool {
        self.armed
    }

    /// Arms the eventfd, unless something has ended meanwhile: see `armed`.
    #[cold]
    pub(super) fn arm(&mut self) -> io::Result<()> {
        if !self.enabled {
            self.enable()?;
        }
        self.armed = true;
        self.ring.completion().enable_eventfd();
        // What ended before the kernel could see that, it did not signal. Entering it runs what it has deferred; what it
        // defers from now on finds the eventfd enabled (the call is a barrier between our store and its look).
        self.enter(0)?;
        if !self.ring.completion().is_empty() {
            self.busy();
        }
        Ok(())
    }

    #[inline]
    fn disarm(&mut self) {
        if self.armed {
            self.quiet();
        }
    }

    #[cold]
    fn quiet(&mut self) {
        self.armed = false;
        self.idle_polls = 0;
        self.ring.completion().disable_eventfd();
        // Not readable is the usual case. A signal that comes after this is harmless: it wakes once too often.
        let _ = self.wake.read();
    }

    /// Submits nothing and waits until at least one request has ended.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        // SAFETY: no argument is passed.
        let result = unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 1, EnterFlags::GETEVENTS.bits(), None) };
        passing(result.map(|_| ()))
    }

    /// What has ended.
    #[inline]
    pub(super) fn ended(&mut self) -> cqueue::CompletionQueue<'_> {
        self.ring.completion()
    }

    /// Readable, while `armed`, whenever `exchange` or `ended` has something to take.
    pub(super) fn fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// Signals it from elsewhere.
    pub(super) fn wake(&self) -> Arc<EventFd> {
        Arc::clone(&self.wake)
    }

    /// Puts another file in the place of its file. What is under way stays with the old one.
    pub(super) fn replace_file(&mut self, file: BorrowedFd<'_>) -> io::Result<()> {
        if !self.enabled {
            self.enable()?;
        }
        self.ring.submitter().register_files_update(0, &[file.as_raw_fd()]).map(|_| ())
    }

    fn enter(&mut self, wanted: u32) -> io::Result<()> {
        // SAFETY: no argument is passed, and every entry in the queue came with the promise of `push`.
        let result = unsafe {
            self.ring.submitter().enter::<libc::sigset_t>(self.unsubmitted, wanted, EnterFlags::GETEVENTS.bits(), None)
        };
        passing(result.map(|taken| self.unsubmitted -= taken as u32))
    }

    #[cold]
    fn enable(&mut self) -> io::Result<()> {
        let submitter = self.ring.submitter();
        submitter.register_enable_rings()?;
        if let Some(cpus) = &self.worker_cpus {
            // Advice: on a kernel before 5.14 the workers stay on the reactor's core.
            let _ = submitter.register_iowq_aff(cpus);
        }
        self.enabled = true;
        Ok(())
    }
}

/// A busy kernel is no error: the next turn tries again.
fn passing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => Ok(()),
        result => result,
    }
}

/// The best ring that this kernel makes, and whether it tells of deferred work.
fn build(entries: u32, users: Users) -> io::Result<(IoUring, bool)> {
    // Newest first: Linux 6.6, 6.1, 5.19, 5.10. From 6.1 on a ring belongs to one thread.
    let levels = if users == Users::One { 4 } else { 2 };
    for level in (0..levels).rev() {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_r_disabled();
        if level >= 1 {
            builder.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
        }
        if level >= 2 {
            builder.setup_single_issuer().setup_defer_taskrun();
        }
        if level >= 3 {
            builder.setup_no_sqarray();
        }
        match builder.build(entries) {
            Ok(ring) => return Ok((ring, level >= 1)),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && level > 0 => {}
            Err(error) => return Err(error),
        }
    }
    unreachable!("level 0 returns")
}

fn cpus() -> Option<libc::cpu_set_t> {
    // SAFETY: a set of CPUs is plain data.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is as long as said; 0 is this thread.
    let result = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) };
    (result == 0).then_some(set)
}

fn explain(error: &io::Error, user: &str) -> BackendError {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => BackendError::Refused(format!(
            "this kernel has no io_uring, which {user} needs: use Linux 5.10 or later, and not under user-mode emulation"
        )),
        Some(libc::EPERM | libc::EACCES) => BackendError::Refused(format!(
            "io_uring, which {user} needs, is forbidden here: set /proc/sys/kernel/io_uring_disabled to 0, and in a container \
             allow io_uring_setup, io_uring_enter and io_uring_register in its seccomp profile"
        )),
        Some(libc::ENOMEM) => BackendError::Unavailable(
            "no memory for an io_uring: raise the limit of locked memory (RLIMIT_MEMLOCK)".to_owned(),
        ),
        _ => BackendError::Unavailable(format!("io_uring cannot be set up: {error}")),
    }
}
