//! The switch's uplink: one channel, which all reactors with a port share.
//!
//! Whoever has something for it, or looks for what has come, takes it for the time of a burst if nobody has it, and goes on without if
//! somebody has: so nobody waits. What cannot be sent now, because somebody has the channel or because the network has no room, goes to
//! an inbox of the uplink's own, which whoever takes the channel next empties first, so that frames stay in order.
#![expect(unsafe_code, reason = "hands the addresses of frames to a channel")]

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use super::frame::{Frame, HEAD_BYTES, Tag, range_of};
use super::{PORTS_MAX, PortNumber};
use crate::backend::net::inbox::{Inbox, Outbox};
use crate::backend::net::{
    BURST, Incoming, Missed, NetBackend, NetChannel, NetHeader, Offloads, Outgoing, Sent, VLAN_TAG_BYTES,
};
use crate::backend::{BackendError, Segments};

/// The channel, while somebody has it.
pub(super) struct Held {
    channel: Box<dyn NetChannel>,
    /// What waits to be sent.
    waiting: Outbox,
    /// Not all that waited could be sent the last time, and channels may have been told so.
    is_full: bool,
    /// It was so, and is not any more: those channels are to be woken.
    room_came: bool,
    ranges: Vec<libc::iovec>,
    frames: Vec<Outgoing>,
    lost: Arc<[AtomicU64]>,
}

// SAFETY: the addresses in the lists are used only within one call.
unsafe impl Send for Held {}

/// The uplink.
pub(super) struct UplinkSide {
    held: Mutex<Held>,
    waiting: Arc<Inbox>,
    wake_fd: Option<RawFd>,
    /// Frames of each port that were taken and lost later.
    lost: Arc<[AtomicU64]>,
    /// Channels of the switch that carry frames.
    users: AtomicUsize,
}

impl UplinkSide {
    pub(super) fn open(uplink: &dyn NetBackend) -> Result<Self, BackendError> {
        let mut channel = uplink.open_shared_channel()?;
        // Each VM has other wishes; what one does not take undone is done for it after the switch.
        channel.leave_undone(Offloads::ALL);
        let (waiting, mut outbox) = Inbox::pair()?;
        outbox.open(true);
        let wake_fd = channel.wake_fd();
        let (ranges, frames) = (Vec::with_capacity(BURST), Vec::with_capacity(BURST));
        let lost: Arc<[AtomicU64]> = (0..=PORTS_MAX).map(|_| AtomicU64::new(0)).collect();
        let held = Held {
            channel,
            waiting: outbox,
            is_full: false,
            room_came: false,
            ranges,
            frames,
            lost: Arc::clone(&lost),
        };
        Ok(Self { held: Mutex::new(held), waiting, wake_fd, lost, users: AtomicUsize::new(0) })
    }

    /// The channel, if nobody has it.
    #[inline]
    pub(super) fn take(&self) -> Option<MutexGuard<'_, Held>> {
        match self.held.try_lock() {
            Ok(held) => Some(held),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    pub(super) const fn wake_fd(&self) -> Option<RawFd> {
        self.wake_fd
    }

    /// One more channel of the switch carries frames, or one fewer. The network sends as long as there is one.
    #[cold]
    pub(super) fn enable(&self, enabled: bool) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let before = if enabled {
            self.users.fetch_add(1, Ordering::Relaxed)
        } else {
            self.users.fetch_sub(1, Ordering::Relaxed) - 1
        };
        if before == 0 {
            held.channel.enable(enabled);
        }
    }

    /// Keeps a frame of a port's until it can be sent. Returns whether there was room.
    pub(super) fn keep(&self, port: PortNumber, frame: &Frame<'_>, tag: Tag) -> bool {
        let Some((header, bytes)) = frame.changed(tag) else { return false };
        self.waiting.put_from(port.0, header, bytes, |room| frame.write(tag, room))
    }

    /// Frames of a port that were taken and lost later, since this was last asked.
    #[inline]
    pub(super) fn lost_of(&self, port: PortNumber) -> u64 {
        let lost = &self.lost[port.index()];
        if lost.load(Ordering::Relaxed) == 0 { 0 } else { lost.swap(0, Ordering::Relaxed) }
    }
}

impl Held {
    /// Sends what waits. Returns whether nothing is left, nor is being put in: then what is sent next is next in order.
    #[inline]
    pub(super) fn send_waiting(&mut self) -> bool {
        let all = self.send_complete() && self.waiting.is_drained();
        if all {
            self.room_came |= std::mem::take(&mut self.is_full);
        } else {
            self.is_full = true;
        }
        all
    }

    /// Whether those who found the uplink full are to be woken now.
    #[inline]
    pub(super) const fn take_room_came(&mut self) -> bool {
        std::mem::replace(&mut self.room_came, false)
    }

    /// Sends what waits and is complete. Returns whether the network had room for it.
    #[inline]
    fn send_complete(&mut self) -> bool {
        let Self { channel, waiting, ranges, frames, lost, .. } = self;
        while !waiting.is_empty() {
            ranges.clear();
            frames.clear();
            // A burst says how many it lost, not which: so that they are counted where they come from, it is one port's.
            let (port, kept) = waiting.frames_of_one(BURST);
            ranges.extend(kept.iter().map(range_of));
            for (frame, range) in kept.iter().zip(ranges.iter()) {
                // SAFETY: the list does not grow any more, and the frames stay until they are released, after `transmit`.
                let segments = unsafe { Segments::new(std::ptr::from_ref(range), 1) };
                frames.push(Outgoing { header: frame.header, segments, bytes: frame.length() });
            }
            let sent = channel.transmit(frames);
            let lost_now = sent.lost as u64 + channel.lost_later();
            if lost_now > 0 {
                lost[usize::from(port)].fetch_add(lost_now, Ordering::Relaxed);
            }
            let all = sent.taken == frames.len();
            waiting.release(sent.taken);
            if !all {
                return false;
            }
        }
        true
    }

    /// Sends a burst of a port's.
    #[inline]
    pub(super) fn send(&mut self, port: PortNumber, frames: &[Outgoing]) -> Sent {
        let sent = self.channel.transmit(frames);
        let lost_later = self.channel.lost_later();
        if lost_later > 0 {
            self.lost[port.index()].fetch_add(lost_later, Ordering::Relaxed);
        }
        sent
    }

    /// Hands what has come to `each`. Returns whether there was anything.
    #[inline]
    pub(super) fn receive(&mut self, mut each: impl FnMut(&Incoming)) -> bool {
        let frames = self.channel.receive(BURST);
        let count = frames.len();
        frames.iter().for_each(&mut each);
        if count > 0 {
            self.channel.release(count);
        }
        count > 0
    }

    /// Frames that were lost before anybody could see whom they were for.
    #[inline]
    pub(super) fn missed(&mut self) -> Missed {
        self.channel.missed()
    }

    pub(super) fn woken(&mut self) {
        self.channel.woken();
    }

    /// Whether a reactor may sleep: nothing has come, and what waits is told of when there is room.
    pub(super) fn arm(&mut self) -> bool {
        self.send_waiting();
        self.channel.arm()
    }
}

/// Frames on their way to the uplink: first bytes with the tag that they get, and the rest where it is.
pub(super) struct Burst {
    heads: Box<[[u8; HEAD_BYTES + VLAN_TAG_BYTES as usize]; BURST]>,
    ranges: Vec<libc::iovec>,
    /// What each is: header, length, and where its ranges begin.
    entries: Vec<(NetHeader, u32, usize)>,
    frames: Vec<Outgoing>,
}

// SAFETY: the addresses are used only within one `transmit`.
unsafe impl Send for Burst {}

impl Burst {
    pub(super) fn new() -> Self {
        Self {
            heads: Box::new([[0; HEAD_BYTES + VLAN_TAG_BYTES as usize]; BURST]),
            ranges: Vec::with_capacity(4 * BURST),
            entries: Vec::with_capacity(BURST),
            frames: Vec::with_capacity(BURST),
        }
    }

    pub(super) fn clear(&mut self) {
        self.ranges.clear();
        self.entries.clear();
    }

    /// Adds a frame. Returns whether it can be sent so.
    #[inline]
    pub(super) fn push(&mut self, frame: &Frame<'_>, tag: Tag) -> bool {
        let (Some((header, bytes)), Some(head)) = (frame.changed(tag), self.heads.get_mut(self.entries.len())) else {
            return false;
        };
        let count = frame.changed_head(tag, head);
        self.entries.push((header, bytes, self.ranges.len()));
        self.ranges.push(libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: count });
        frame.rest(&mut self.ranges);
        true
    }

    /// The frames from the `first` on.
    #[inline]
    pub(super) fn frames(&mut self, first: usize) -> &[Outgoing] {
        self.frames.clear();
        for (number, (header, bytes, start)) in self.entries.iter().enumerate().skip(first) {
            let end = self.entries.get(number + 1).map_or(self.ranges.len(), |(_, _, start)| *start);
            let list = &self.ranges[*start..end];
            // SAFETY: the list does not grow while the frames are looked at; heads are ours, and the rest is memory of the frame that
            // the channel of the switch was given, which it has until its own `transmit` returns.
            let segments = unsafe { Segments::new(list.as_ptr(), list.len() as u32) };
            self.frames.push(Outgoing { header: *header, segments, bytes: *bytes });
        }
        &self.frames
    }

    pub(super) const fn len(&self) -> usize {
        self.entries.len()
    }
}
