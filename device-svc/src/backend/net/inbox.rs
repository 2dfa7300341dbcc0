//! Frames that other reactors put in for one channel, oldest first.
//!
//! ```text
//!   bytes    released ░░░░░ waiting frames ░░░░░ reserved
//!   entries  a number and a place each; an entry is valid when its number is stored
//! ```
//!
//! Anybody puts in, one takes out, nobody waits. A place in both rings is reserved by one exchange of a word that has both positions,
//! so frames are taken in the order in which places were reserved; one that is still being copied holds back those after it for as
//! long as a copy takes. A frame is never split: what is left before the end of the bytes is passed over. What finds no room is dropped
//! and counted, because whoever puts in must not wait for a VM that takes nothing out.
#![expect(unsafe_code, reason = "a ring of bytes that several threads write, each its own stretch")]

use std::cell::UnsafeCell;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{BURST, FRAME_BYTES_MAX, Incoming, Missed, NetHeader};
use crate::asleep::Asleep;
use crate::backend::BackendError;

/// Frames that wait at most.
const FRAMES: u32 = 512;
/// Bytes of them: two of the longest at least. A page is taken from the machine when a frame first reaches it.
const BYTES: u32 = 256 << 10;
const _: () = assert!(FRAMES.is_power_of_two() && BYTES.is_power_of_two() && BYTES >= 2 * FRAME_BYTES_MAX);

/// How many frames there have been, and how many bytes with what was passed over; both run freely.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Position {
    frames: u32,
    bytes: u32,
}

impl Position {
    const fn from_word(word: u64) -> Self {
        Self { frames: (word >> 32) as u32, bytes: word as u32 }
    }

    const fn word(self) -> u64 {
        (self.frames as u64) << 32 | self.bytes as u64
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    header: NetHeader,
    at: u32,
    bytes: u32,
    /// Where the next frame's place begins.
    end: u32,
    /// Who put it in, as a number that those who use the inbox agree on.
    from: u16,
}

#[derive(Debug)]
struct Slot {
    /// One more than the number of the frame whose entry is here.
    number: AtomicU32,
    entry: UnsafeCell<Entry>,
}

/// A word on a cache line of its own.
#[derive(Debug)]
#[repr(align(128))]
struct Apart(AtomicU64);

/// The frames, for those who put in.
pub(crate) struct Inbox {
    bytes: Box<[UnsafeCell<u8>]>,
    slots: Box<[Slot]>,
    reserved: Apart,
    released: Apart,
    /// Frames that found no room, or nobody who takes them.
    missed: Apart,
    /// Frames that could not be put in as they were.
    refused: Apart,
    /// Whether somebody takes frames out.
    open: AtomicBool,
    asleep: Asleep,
    bell: EventFd,
}

// SAFETY: the bytes and the entry of a reserved place are written by the one who reserved it, until its number is stored, and read
// by the one `Outbox` from then until it has released the place, after which it can be reserved again.
unsafe impl Send for Inbox {}
// SAFETY: as above.
unsafe impl Sync for Inbox {}

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let position = Position::from_word(self.reserved.0.load(Ordering::Relaxed));
        f.debug_struct("Inbox").field("reserved", &position).finish_non_exhaustive()
    }
}

impl Inbox {
    /// An empty one that is closed, and what takes out of it.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub(crate) fn pair() -> Result<(Arc<Self>, Outbox), BackendError> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let bell = EventFd::from_value_and_flags(0, flags).map_err(|errno| {
            BackendError::Unavailable(format!("no event descriptor for a network channel: {errno}"))
        })?;
        let entry = Entry { header: NetHeader::DONE, at: 0, bytes: 0, end: 0, from: 0 };
        let slot = || Slot { number: AtomicU32::new(0), entry: UnsafeCell::new(entry) };
        let inbox = Arc::new(Self {
            bytes: zeroed_bytes(),
            slots: (0..FRAMES).map(|_| slot()).collect(),
            reserved: Apart(AtomicU64::new(0)),
            released: Apart(AtomicU64::new(0)),
            missed: Apart(AtomicU64::new(0)),
            refused: Apart(AtomicU64::new(0)),
            open: AtomicBool::new(false),
            asleep: Asleep::default(),
            bell,
        });
        let handed = Vec::with_capacity(BURST);
        let outbox = Outbox { inbox: Arc::clone(&inbox), next: 0, handed, missed: 0, refused: 0 };
        Ok((inbox, outbox))
    }

    /// Whether somebody takes frames out.
    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    /// Puts a frame in: `fill` writes its bytes, all of them. Returns whether there was room. The one who takes out is told by
    /// [`ring`](Self::ring), once for as many as there are.
    #[inline]
    pub(crate) fn put(&self, header: NetHeader, bytes: u32, fill: impl FnOnce(&mut [u8])) -> bool {
        self.put_from(0, header, bytes, fill)
    }

    /// The same where it matters who puts it in.
    #[inline]
    pub(crate) fn put_from(&self, from: u16, header: NetHeader, bytes: u32, fill: impl FnOnce(&mut [u8])) -> bool {
        let Some((number, at, end)) = self.reserve(bytes) else {
            self.missed.0.fetch_add(1, Ordering::Relaxed);
            return false;
        };
        let slot = &self.slots[(number & (FRAMES - 1)) as usize];
        // SAFETY: `reserve` gave this stretch and this slot to this call alone, and the reader looks at them when the number below is
        // stored. A stretch does not reach beyond the end.
        let room = unsafe {
            slot.entry.get().write(Entry { header, at, bytes, end, from });
            std::slice::from_raw_parts_mut(self.bytes[at as usize].get(), bytes as usize)
        };
        fill(room);
        // Release: whoever sees the number sees what was written before.
        slot.number.store(number.wrapping_add(1), Ordering::Release);
        true
    }

    /// A place for a frame: its number, where it is, and where the next one begins.
    #[inline]
    fn reserve(&self, bytes: u32) -> Option<(u32, u32, u32)> {
        if bytes == 0 || bytes > FRAME_BYTES_MAX || !self.is_open() {
            return None;
        }
        loop {
            // In this order: a release that is missed makes the ring look fuller than it is, never emptier. Acquire: what the reader
            // read there it has read.
            let released = Position::from_word(self.released.0.load(Ordering::Acquire));
            let word = self.reserved.0.load(Ordering::Relaxed);
            let reserved = Position::from_word(word);
            let offset = reserved.bytes & (BYTES - 1);
            let passed_over = if offset + bytes > BYTES { BYTES - offset } else { 0 };
            let start = reserved.bytes.wrapping_add(passed_over);
            let end = start.wrapping_add(bytes);
            let is_full =
                reserved.frames.wrapping_sub(released.frames) >= FRAMES || end.wrapping_sub(released.bytes) > BYTES;
            if is_full {
                return None;
            }
            let next = Position { frames: reserved.frames.wrapping_add(1), bytes: end };
            let exchanged =
                self.reserved.0.compare_exchange_weak(word, next.word(), Ordering::Relaxed, Ordering::Relaxed);
            if exchanged.is_ok() {
                return Some((reserved.frames, start & (BYTES - 1), end));
            }
        }
    }

    /// Wakes the one who takes out, if it sleeps.
    #[inline]
    pub(crate) fn ring(&self) {
        if self.asleep.must_ring() {
            // The only failure is a counter at its maximum, and then the bell rings already.
            let _ = self.bell.write(1);
        }
    }

    /// A frame cannot be put in as it is.
    #[cold]
    pub(crate) fn refuse(&self) {
        self.refused.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn zeroed_bytes() -> Box<[UnsafeCell<u8>]> {
    let bytes = vec![0_u8; BYTES as usize].into_boxed_slice();
    // SAFETY: a cell of a byte is laid out as the byte, and the box is the only way to these.
    unsafe { Box::from_raw(Box::into_raw(bytes) as *mut [UnsafeCell<u8>]) }
}

/// The one who takes out.
#[derive(Debug)]
pub(crate) struct Outbox {
    inbox: Arc<Inbox>,
    /// The number of the next frame.
    next: u32,
    handed: Vec<Incoming>,
    /// How many had been missed and refused when that was last asked.
    missed: u64,
    refused: u64,
}

impl Outbox {
    /// The way in.
    pub(crate) const fn inbox(&self) -> &Arc<Inbox> {
        &self.inbox
    }

    /// Whether frames are let in. What waits when it is closed is dropped.
    pub(crate) fn open(&mut self, open: bool) {
        self.inbox.open.store(open, Ordering::Relaxed);
        if !open {
            while self.entry(self.next).is_some() {
                self.release(1);
            }
        }
    }

    /// The entry of a frame, if it is there.
    #[inline]
    fn entry(&self, number: u32) -> Option<Entry> {
        let slot = &self.inbox.slots[(number & (FRAMES - 1)) as usize];
        // Acquire: with the number comes what was written before it.
        if slot.number.load(Ordering::Acquire) != number.wrapping_add(1) {
            return None;
        }
        // SAFETY: the entry is complete, and stays until this reader has released it.
        Some(unsafe { *slot.entry.get() })
    }

    /// Whether no frame waits.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.entry(self.next).is_none()
    }

    /// Whether no frame waits, nor is being put in: what is put in by somebody else behind one that is still being copied cannot be
    /// seen yet, and comes before whatever comes now.
    #[inline]
    pub(crate) fn is_drained(&self) -> bool {
        Position::from_word(self.inbox.reserved.0.load(Ordering::Relaxed)).frames == self.next
    }

    /// The oldest frames, at most `most`.
    #[inline]
    pub(crate) fn frames(&mut self, most: usize) -> &[Incoming] {
        self.hand_over(most, |_| true);
        &self.handed
    }

    /// The oldest frames that the same one put in, at most `most`, and who that is.
    #[inline]
    pub(crate) fn frames_of_one(&mut self, most: usize) -> (u16, &[Incoming]) {
        let first = self.entry(self.next).map_or(0, |entry| entry.from);
        self.hand_over(most, |from| from == first);
        (first, &self.handed)
    }

    #[inline]
    fn hand_over(&mut self, most: usize, takes: impl Fn(u16) -> bool) {
        self.handed.clear();
        let mut number = self.next;
        while self.handed.len() < most.min(BURST) {
            let Some(Entry { header, at, bytes, .. }) = self.entry(number).filter(|entry| takes(entry.from)) else {
                break;
            };
            let start = self.inbox.bytes[at as usize].get().cast_const();
            // SAFETY: whoever put it in has written so many bytes there, and nobody writes them before they are released.
            self.handed.push(unsafe { Incoming::new(header, start, bytes) });
            number = number.wrapping_add(1);
        }
    }

    /// The `count` oldest are done with.
    #[inline]
    pub(crate) fn release(&mut self, count: usize) {
        let Some(last) = (count as u32).checked_sub(1) else { return };
        let Some(Entry { end, .. }) = self.entry(self.next.wrapping_add(last)) else { return };
        self.next = self.next.wrapping_add(count as u32);
        let position = Position { frames: self.next, bytes: end };
        // Release: what was read there has been read.
        self.inbox.released.0.store(position.word(), Ordering::Release);
    }

    /// Frames that found no room, or could not be put in as they were, since this was last asked.
    #[inline]
    pub(crate) fn missed(&mut self) -> Missed {
        let since = |now: &Apart, before: &mut u64| {
            let now = now.0.load(Ordering::Relaxed);
            now.wrapping_sub(std::mem::replace(before, now))
        };
        let Self { inbox, missed, refused, .. } = self;
        Missed { no_buffers: since(&inbox.missed, missed), bad_header: since(&inbox.refused, refused), ..Missed::NONE }
    }

    /// Whether its reactor may sleep: nothing waits, and the bell rings for the next.
    pub(crate) fn arm(&self) -> bool {
        self.inbox.asleep.prepare(|| self.is_empty())
    }

    /// From now on the bell rings, whatever waits: for a reactor that sleeps until somebody else has done something.
    pub(crate) fn expect_bell(&self) {
        self.inbox.asleep.prepare(|| true);
    }

    /// Its reactor turns: nobody need ring, which is a system call.
    #[inline]
    pub(crate) fn awake(&self) {
        self.inbox.asleep.awake();
    }

    /// The bell has rung.
    pub(crate) fn silence(&self) {
        self.inbox.asleep.awake();
        let _ = self.inbox.bell.read();
    }

    /// The bell.
    pub(crate) fn bell_fd(&self) -> RawFd {
        self.inbox.bell.as_fd().as_raw_fd()
    }
}

/// One descriptor for a channel that has a bell and something else to wait on.
#[derive(Debug)]
pub(crate) struct Wakers(Epoll);

impl Wakers {
    /// The bell of `outbox`, and the descriptor of what the channel stands around, which counts by its edges as everywhere. Both must
    /// outlive this.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub(crate) fn new(outbox: &Outbox, other: Option<RawFd>) -> Result<Self, BackendError> {
        let failed = |errno| BackendError::Unavailable(format!("a network channel cannot be waited on: {errno}"));
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
        let other = other.map(|fd| (fd, EpollFlags::EPOLLIN | EpollFlags::EPOLLET));
        for (fd, flags) in std::iter::once((outbox.bell_fd(), EpollFlags::EPOLLIN)).chain(other) {
            // SAFETY: whoever calls this has both open.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            epoll.add(fd, EpollEvent::new(flags, 0)).map_err(failed)?;
        }
        Ok(Self(epoll))
    }

    /// The descriptor.
    pub(crate) fn fd(&self) -> RawFd {
        self.0.0.as_raw_fd()
    }

    /// It has become readable; after this the next wake-up is an edge again.
    pub(crate) fn drain(&self) {
        let _ = self.0.wait(&mut [EpollEvent::empty(); 2], EpollTimeout::ZERO);
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.open(false);
    }
}

#[cfg(test)]
mod tests;
