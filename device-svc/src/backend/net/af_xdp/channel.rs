//! The hot half: the socket of one queue of the interface, for one queue pair.
//!
//! A frame that has come is lent where the kernel put it, and its chunk goes back when it is released. A frame to be sent is copied into
//! a chunk. Nothing is asked of the kernel but what its rings say that it wants to be told: where it copies, one call for each burst that
//! is sent, and none for what comes.
//!
//! Who sleeps waits on a set of descriptors: of the socket, and of the event that tells of a new one. A frame that found no room is rare
//! (the kernel takes a burst when it is told of it), and whoever waits for room is told by the socket as well.
#![expect(unsafe_code, reason = "hands over addresses of memory that is shared with the kernel")]

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Device;
use super::socket::{Lent, XdpSocket};
use crate::backend::net::{BURST, ETHERNET_BYTES, Incoming, Missed, NetChannel, NetHeader, Offloads, Outgoing, Sent};

/// Tries to send a burst before the rest of it is given back.
const TRIES: usize = 4;

/// Where a channel finds a new socket, when the interface is there again.
pub(super) struct Slot {
    /// Goes up when there is one.
    epoch: AtomicU32,
    fresh: Mutex<Option<XdpSocket>>,
    /// Wakes its reactor.
    wake: EventFd,
}

impl Slot {
    pub(super) fn new() -> Result<Self, Errno> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self { epoch: AtomicU32::new(0), fresh: Mutex::new(None), wake: EventFd::from_flags(flags)? })
    }

    fn fresh(&self) -> MutexGuard<'_, Option<XdpSocket>> {
        self.fresh.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn give(&self, socket: XdpSocket) {
        *self.fresh() = Some(socket);
        self.epoch.fetch_add(1, Ordering::Release);
        let _ = self.wake.write(1);
    }
}

/// One queue.
pub(super) struct XdpChannel {
    device: Arc<Device>,
    slot: Arc<Slot>,
    queue: u32,
    /// The slot's number when its socket was taken.
    epoch: u32,
    socket: XdpSocket,
    epoll: Epoll,
    /// Whether frames shall come and go.
    enabled: bool,
    /// Frames were not taken: the set tells of room, too.
    waits_for_room: bool,
    /// What has come, where, and how much of that is done with.
    frames: Vec<Incoming>,
    lent: Vec<Lent>,
    released: usize,
    /// What has come and was no frame.
    bad: u64,
}

impl XdpChannel {
    pub(super) fn new(device: Arc<Device>, slot: Arc<Slot>, queue: u32, socket: XdpSocket) -> Result<Self, Errno> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&slot.wake, events(false))?;
        epoll.add(socket.file(), events(false))?;
        Ok(Self {
            device,
            slot,
            queue,
            epoch: 0,
            socket,
            epoll,
            enabled: false,
            waits_for_room: false,
            frames: Vec::with_capacity(BURST),
            lent: Vec::with_capacity(BURST),
            released: 0,
            bad: 0,
        })
    }

    /// Takes a new socket if there is one. Not while anything of the old one is handed over.
    #[inline]
    fn follow(&mut self) {
        let epoch = self.slot.epoch.load(Ordering::Acquire);
        if epoch != self.epoch && self.released == self.frames.len() {
            self.change(epoch);
        }
    }

    #[cold]
    fn change(&mut self, epoch: u32) {
        self.epoch = epoch;
        let Some(fresh) = self.slot.fresh().take() else { return };
        let _ = self.slot.wake.read();
        self.frames.clear();
        self.lent.clear();
        self.released = 0;
        self.waits_for_room = false;
        let _ = self.epoll.delete(self.socket.file());
        self.socket = fresh;
        if let Err(errno) = self.epoll.add(self.socket.file(), events(false)) {
            tracing::warn!("{}: a channel cannot sleep any more: {errno}", self.device);
        }
        if self.enabled {
            self.attach(true);
        }
    }

    #[cold]
    fn attach(&mut self, attached: bool) {
        // What came in just when it was detached.
        self.throw_away();
        let fd = attached.then(|| self.socket.file().as_raw_fd());
        match self.device.program.set(self.queue, fd) {
            Ok(()) => {}
            // Its interface was deleted: whoever watches that brings a new socket.
            Err(errno) if attached => tracing::debug!("{}: queue {} gets no frames: {errno}", self.device, self.queue),
            Err(errno) => tracing::warn!("{}: queue {} keeps its frames: {errno}", self.device, self.queue),
        }
        if !attached {
            self.throw_away();
        }
    }

    /// Gives back all that has come.
    fn throw_away(&mut self) {
        self.socket.give_back(&self.lent[self.released..]);
        self.frames.clear();
        self.lent.clear();
        self.released = 0;
        while self.socket.is_readable() {
            self.socket.receive(BURST, |lent, _| self.lent.push(lent));
            self.socket.give_back(&self.lent);
            self.lent.clear();
        }
    }

    #[inline]
    fn fetch(&mut self) {
        let Self { socket, frames, lent, released, .. } = self;
        frames.clear();
        lent.clear();
        *released = 0;
        let mut has_short = false;
        socket.receive(BURST, |frame, start| {
            has_short |= frame.bytes < ETHERNET_BYTES;
            // SAFETY: the kernel wrote so many bytes there, and does not touch the chunk until it is given back.
            frames.push(unsafe { Incoming::new(NetHeader::DONE, start, frame.bytes) });
            lent.push(frame);
        });
        if has_short {
            self.pass_over();
        }
    }

    /// Gives back what is no frame.
    #[cold]
    fn pass_over(&mut self) {
        let Self { socket, frames, lent, bad, .. } = self;
        for frame in lent.iter().filter(|frame| frame.bytes < ETHERNET_BYTES) {
            socket.give_back(std::slice::from_ref(frame));
            *bad += 1;
        }
        frames.retain(|frame| frame.length() >= ETHERNET_BYTES);
        lent.retain(|frame| frame.bytes >= ETHERNET_BYTES);
    }

    /// Whether the set tells of room from now on.
    #[cold]
    fn wait_for_room(&mut self, waits: bool) {
        self.waits_for_room = waits;
        let _ = self.epoll.modify(self.socket.file(), &mut events(waits));
    }
}

/// Edges of what comes, and of room if that is waited for.
fn events(room: bool) -> EpollEvent {
    let mut flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
    flags.set(EpollFlags::EPOLLOUT, room);
    EpollEvent::new(flags, 0)
}

impl NetChannel for XdpChannel {
    fn enable(&mut self, enabled: bool) {
        self.follow();
        if enabled != self.enabled {
            self.enabled = enabled;
            self.attach(enabled);
        }
    }

    /// Nothing is left undone, ever.
    fn leave_undone(&mut self, _: Offloads) {}

    #[inline]
    fn transmit(&mut self, frames: &[Outgoing]) -> Sent {
        self.follow();
        let count = frames.len().min(BURST);
        // Where there is no interface nobody would take anything out of the ring.
        if !self.enabled || !self.device.carrier.is_up() {
            return Sent { taken: count, lost: count };
        }
        let mut sent = Sent::default();
        for _ in 0..TRIES {
            let (taken, lost) = self.socket.transmit(&frames[sent.taken..count]);
            sent.taken += taken;
            sent.lost += lost;
            if sent.taken == count {
                break;
            }
        }
        let waits = sent.taken < count;
        if waits != self.waits_for_room {
            self.wait_for_room(waits);
        }
        sent
    }

    #[inline]
    fn receive(&mut self, most: usize) -> &[Incoming] {
        self.follow();
        if self.socket.has_unsent() {
            self.socket.kick();
        }
        if self.released == self.frames.len() && self.enabled && self.socket.is_readable() {
            self.fetch();
        }
        let end = self.frames.len().min(self.released.saturating_add(most));
        &self.frames[self.released..end]
    }

    #[inline]
    fn release(&mut self, count: usize) {
        let end = self.frames.len().min(self.released.saturating_add(count));
        self.socket.give_back(&self.lent[self.released..end]);
        self.released = end;
    }

    #[inline]
    fn missed(&mut self) -> Missed {
        let bad_header = std::mem::replace(&mut self.bad, 0);
        Missed { no_buffers: self.socket.missed(), bad_header, ..Missed::NONE }
    }

    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.epoll.0.as_raw_fd())
    }

    /// The set is quiet again only when its edges have been taken.
    fn woken(&mut self) {
        let _ = self.epoll.wait(&mut [EpollEvent::empty(); 2], EpollTimeout::ZERO);
    }

    fn arm(&mut self) -> bool {
        self.follow();
        if self.released < self.frames.len() || self.slot.epoch.load(Ordering::Acquire) != self.epoch {
            return false;
        }
        if !self.enabled || !self.device.carrier.is_up() {
            return true;
        }
        // What waits to be sent is tried again and again: a driver that was busy tells nobody that it is not any more.
        if self.socket.has_unsent() {
            self.socket.kick();
        }
        let has_to_do = self.socket.has_unsent() || self.waits_for_room && self.socket.has_room();
        // An edge that came before this look has been seen; one that comes after it wakes.
        !has_to_do && !self.socket.is_readable()
    }
}
