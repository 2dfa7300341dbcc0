//! What channels of the kernel's descriptors have in common: an io_uring that tells in shared memory that something has come, and that
//! there is room again, and by which a reactor sleeps. While nothing comes that costs no system call.
//!
//! The poll for what comes stays as long as the kernel lets it. That for room is made when a frame found none, and ends when it has
//! told; whoever gave that frame may not know yet, so a channel that was told has its turn before its reactor sleeps.
#![expect(unsafe_code, reason = "hands polls to the kernel")]

use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;

use io_uring::{cqueue, opcode, squeue, types};
use nix::sys::eventfd::EventFd;

use super::BURST;
use crate::backend::BackendError;
use crate::backend::ring::{Ring, Users};

/// The channel's descriptor, as entries name it.
pub(super) const FILE: types::Fixed = types::Fixed(0);

/// What an entry is; those of a burst are their numbers in it. A poll has the descriptor's number above it: of one that was replaced
/// nothing is believed.
const POLL_IN: u64 = 1 << 8;
const POLL_OUT: u64 = 2 << 8;
const REMOVAL: u64 = 3 << 8;
const KIND: u64 = 0xff << 8;
const FILE_SHIFT: u32 = 16;

/// The ring.
pub(super) struct PolledRing {
    ring: Ring,
    /// Who needs it, for people.
    user: &'static str,
    /// How many descriptors there were before.
    file: u64,
    /// Whether the poll for what comes stands.
    polled: bool,
    /// There may be something to read.
    pub(super) readable: bool,
    /// Something was not taken, and a poll tells when there is room.
    waits_for_room: bool,
    /// It has told.
    room_came: bool,
    /// The kernel's answers to a burst, and how many are still to come.
    results: [i32; BURST],
    under_way: usize,
}

impl PolledRing {
    /// A ring for so many entries, of which three may be polls, on `file`. `user` is who needs it, for people: "a tap".
    pub(super) fn new(
        file: BorrowedFd<'_>,
        entries: u32,
        user: &'static str,
        users: Users,
    ) -> Result<Self, BackendError> {
        Ok(Self {
            ring: Ring::new(file, entries, user, users)?,
            user,
            file: 0,
            polled: false,
            readable: false,
            waits_for_room: false,
            room_came: false,
            results: [0; BURST],
            under_way: 0,
        })
    }

    /// What a reactor waits on.
    pub(super) fn fd(&self) -> RawFd {
        self.ring.fd()
    }

    /// Wakes the reactor that waits.
    pub(super) fn wake(&self) -> Arc<EventFd> {
        self.ring.wake()
    }

    /// The ring was made with all that it is asked for, so a refusal is a fault of ours.
    #[cold]
    fn broken(&self, error: &io::Error) -> ! {
        panic!("io_uring of {}: {error}", self.user);
    }

    /// Takes what has ended.
    #[inline]
    fn take(&mut self) {
        let Self { ring, file, polled, readable, waits_for_room, room_came, results, under_way, .. } = self;
        for entry in ring.ended() {
            let tag = entry.user_data();
            let current = tag >> FILE_SHIFT == *file;
            match tag & KIND {
                0 => {
                    if let Some(result) = results.get_mut(tag as usize) {
                        *result = entry.result();
                    }
                    *under_way = under_way.saturating_sub(1);
                }
                POLL_IN if current => {
                    *readable = true;
                    *polled = cqueue::more(entry.flags());
                }
                POLL_OUT if current => (*waits_for_room, *room_came) = (false, true),
                _ => {}
            }
        }
    }

    /// Hands the kernel what was pushed and takes what has ended.
    #[inline]
    fn exchange(&mut self) {
        if let Err(error) = self.ring.exchange() {
            self.broken(&error);
        }
        self.take();
        // Reactors are told of room even when they do not ask for frames.
        while self.waits_for_room && !self.ring.armed() {
            self.arm();
        }
    }

    #[cold]
    fn arm(&mut self) {
        if let Err(error) = self.ring.arm() {
            self.broken(&error);
        }
        self.take();
    }

    /// Queues what points to no memory.
    #[cold]
    fn push_poll(&mut self, entry: squeue::Entry, tag: u64) {
        // SAFETY: a poll and its removal point nowhere.
        unsafe { self.ring.push(&entry.user_data(tag)) };
    }

    /// The tag of a poll of the descriptor that there is now.
    const fn tag(&self, kind: u64) -> u64 {
        kind | self.file << FILE_SHIFT
    }

    /// Has the kernel tell what comes, if it does not: with the next burst, or the next look.
    #[inline]
    pub(super) fn poll_for_frames(&mut self) {
        if !self.polled {
            self.polled = true;
            self.readable = true;
            let poll = opcode::PollAdd::new(FILE, libc::POLLIN as u32).multi(true).build();
            self.push_poll(poll, self.tag(POLL_IN));
        }
    }

    /// Has the kernel tell of room, where `sender` is another descriptor than the channel's if it is named.
    pub(super) fn poll_for_room(&mut self, sender: Option<RawFd>) {
        if self.waits_for_room {
            return;
        }
        self.waits_for_room = true;
        let poll = match sender {
            None => opcode::PollAdd::new(FILE, libc::POLLOUT as u32).build(),
            Some(fd) => opcode::PollAdd::new(types::Fd(fd), libc::POLLOUT as u32).build(),
        };
        self.push_poll(poll, self.tag(POLL_OUT));
        self.exchange();
    }

    /// Takes note of room, if that is waited for.
    #[inline]
    pub(super) fn look_for_room(&mut self) {
        if self.waits_for_room && self.ring.has_work() {
            self.exchange();
        }
    }

    /// Whether there may be something to read. Where nothing has come this is a look at shared memory.
    #[inline]
    pub(super) fn may_read(&mut self) -> bool {
        self.readable || self.ring.has_work()
    }

    /// Takes note of what has come.
    #[inline]
    pub(super) fn look(&mut self) {
        if self.ring.unsubmitted() > 0 || self.ring.has_work() {
            self.exchange();
        }
    }

    /// Queues an entry of a burst, with its number in the burst as its data.
    ///
    /// # Safety
    /// What it points to stays valid until [`run`](Self::run) has returned.
    #[inline]
    pub(super) unsafe fn push(&mut self, entry: squeue::Entry, number: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.ring.push(&entry.user_data(number as u64)) };
    }

    /// Has the kernel do the burst of `count` entries that was pushed. Returns its answers.
    #[inline]
    pub(super) fn run(&mut self, count: usize) -> &[i32] {
        self.under_way = count;
        self.exchange();
        // They end at once, unless the kernel had no memory to take them all.
        while self.under_way > 0 {
            self.finish();
        }
        &self.results[..count]
    }

    #[cold]
    fn finish(&mut self) {
        if self.ring.unsubmitted() == 0
            && let Err(error) = self.ring.wait()
        {
            self.broken(&error);
        }
        self.exchange();
    }

    /// From now on the channel's descriptor is another one, which nobody polls yet.
    #[cold]
    pub(super) fn replace_file(&mut self, fresh: BorrowedFd<'_>) {
        // What polls the old one would keep it open.
        for kind in [POLL_IN, POLL_OUT] {
            let removal = opcode::PollRemove::new(self.tag(kind)).build();
            self.push_poll(removal, REMOVAL);
        }
        self.exchange();
        if let Err(error) = self.ring.replace_file(fresh) {
            self.broken(&error);
        }
        self.file += 1;
        self.polled = false;
        self.readable = false;
        self.room_came |= std::mem::take(&mut self.waits_for_room);
    }

    /// Whether a reactor may sleep: there is nothing to read, nobody is to be told of room, and the kernel wakes it for either.
    pub(super) fn may_sleep(&mut self) -> bool {
        if self.readable || std::mem::take(&mut self.room_came) || self.ring.has_work() {
            return false;
        }
        if !self.ring.armed() {
            self.arm();
        }
        !self.readable && !self.room_came && self.polled && self.ring.armed()
    }
}
