//! The hot half of networks of the kernel's: one descriptor that carries frames behind a virtio header, of a tap or a packet socket.
//!
//! A burst of frames is one system call: an io_uring takes a write for each frame, or a read, and since none may wait (`RWF_NOWAIT`:
//! that the descriptor does not block is not enough, the ring would wait in its place) all of them have ended when the call returns. Measured against one `writev` or `read` a frame (Linux 6.18, one core, frames of
//! 64 bytes that the stack drops; ns a frame): in bursts of 32 writing 960 against 1253 and reading 678 against 775; in bursts of 8
//! 1047 against 1277 and 720 against 743; alone 1783 against 1442 and 1353 against 882. So few frames are written by `writev`. They
//! are read through the ring all the same: that something has come the ring tells in shared memory (a poll that stays), and to take that
//! note is a system call anyhow, which the reads share. While nothing comes there is none.
//!
//! What was read lies in memory of ours, one place for each frame of a burst, and the next burst is read when all of it is done with.
//! The header is the short one, without the count of buffers, which means nothing here: every kernel has it for both.
//!
//! A packet socket differs in two things. It hands over a VLAN tag beside the frame (`PACKET_AUXDATA`), so there the read is a message
//! with a control part, and the tag is put back before the frame is handed over. And its room for what is sent is given back by the
//! driver while a burst is under way, so that a frame may find none and the next one some: there a burst goes by `sendmmsg`, which
//! stops at the first that finds none.
#![expect(unsafe_code, reason = "hands addresses of frames to the kernel")]

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use io_uring::opcode;
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use zerocopy::IntoBytes;

use super::polled_ring::{FILE, PolledRing};
use super::slab::Slab;
use super::{
    BURST, ETHERNET_BYTES, FRAME_BYTES_MAX, Incoming, Missed, NetChannel, NetHeader, Offloads, Outgoing, RawNetHeader,
    Sent, VLAN_TAG_BYTES, packet_socket,
};
use crate::backend::BackendError;
use crate::backend::ring::Users;

mod place;

pub(super) use place::HEADER_BYTES;
use place::{Beside, FRAME_AT, Message, READ_BYTES, messages, move_behind_tag, put_tag_back, read_place};

/// Reads, writes, two polls and their two removals.
const ENTRIES: u32 = 128;
/// From so many frames on a burst goes through the ring.
const RING_FRAMES: usize = 4;
/// Bursts of a backlog until a socket is asked in the middle of it.
const FULL_BURSTS_MAX: u32 = 4096;
/// Ranges of a burst at first: it may grow.
const RANGES: usize = BURST * 8;

/// What a queue needs of the interface that it belongs to.
pub(super) trait Port: Send + Sync {
    /// For people: "the tap dray0".
    fn describe(&self) -> String;

    /// Has frames come to a descriptor, or not: then what waits in it is thrown away. It may be called again when it failed.
    fn attach(&self, file: &Arc<OwnedFd>, attached: bool) -> Result<(), Errno>;

    /// From now on the kernel leaves no more undone, if it can be told so.
    fn leave_undone(&self, offloads: Offloads);
}

/// Where a channel finds a new descriptor, if its old one is dead.
pub(super) struct Slot {
    /// Goes up when there is one.
    epoch: AtomicU32,
    fresh: Mutex<Option<OwnedFd>>,
    /// Wakes its reactor.
    wake: Arc<EventFd>,
}

impl Slot {
    fn fresh(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.fresh.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn give(&self, file: OwnedFd) {
        *self.fresh() = Some(file);
        self.epoch.fetch_add(1, Ordering::Release);
        let _ = self.wake.write(1);
    }
}

/// What kind of descriptor it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// A queue of a tap.
    Tap,
    /// A packet socket.
    Socket,
}

/// One queue.
pub(super) struct KernelQueue {
    port: Arc<dyn Port>,
    slot: Arc<Slot>,
    /// The slot's number when its descriptor was taken.
    epoch: u32,
    file: Arc<OwnedFd>,
    ring: PolledRing,
    /// `RWF_NOWAIT`, where a tap knows it. Where it does not, the ring does not wait for a descriptor that does not block.
    nowait: i32,
    /// Whether frames shall come and go, and whether they do.
    enabled: bool,
    attached: bool,
    slab: Slab,
    /// Reads of a burst of a socket; a tap has none.
    messages: Box<[Message]>,
    /// What a socket sends in one burst; a tap has none.
    sends: Box<[libc::mmsghdr]>,
    /// What was read, and how much of that is done with.
    frames: Vec<Incoming>,
    released: usize,
    /// Frames that the next read asks for.
    burst: usize,
    /// Bursts that a socket had in full since it was asked what it had no memory for: before such a backlog it had enough.
    full_bursts: u32,
    /// What was read and was no frame.
    bad: u64,
    headers: Box<[RawNetHeader; BURST]>,
    ranges: Vec<libc::iovec>,
    /// What became of the frames of a burst.
    results: [i32; BURST],
}

// SAFETY: the pointers lead to memory of this channel, or are only looked at while `transmit` runs.
unsafe impl Send for KernelQueue {}

impl KernelQueue {
    /// A queue of `port` on a descriptor that does not block and is not attached.
    pub(super) fn new(port: Arc<dyn Port>, file: OwnedFd, kind: Kind, users: Users) -> Result<Self, BackendError> {
        let user = if kind == Kind::Tap { "a tap" } else { "an af-packet uplink" };
        let ring = PolledRing::new(file.as_fd(), ENTRIES, user, users)?;
        let slab = Slab::new();
        let (messages, sends) = match kind {
            Kind::Tap => Default::default(),
            // SAFETY: a message's header is plain data.
            Kind::Socket => (messages(&slab), vec![unsafe { std::mem::zeroed() }; BURST].into()),
        };
        let nowait = if knows_nowait(&file) { libc::RWF_NOWAIT } else { 0 };
        let slot = Slot { epoch: AtomicU32::new(0), fresh: Mutex::new(None), wake: ring.wake() };
        Ok(Self {
            port,
            slot: Arc::new(slot),
            epoch: 0,
            file: Arc::new(file),
            ring,
            nowait,
            enabled: false,
            attached: false,
            slab,
            messages,
            sends,
            frames: Vec::with_capacity(BURST),
            released: 0,
            burst: 1,
            full_bursts: 0,
            bad: 0,
            headers: Box::new([RawNetHeader::default(); BURST]),
            ranges: Vec::with_capacity(RANGES),
            results: [0; BURST],
        })
    }

    pub(super) const fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }

    pub(super) const fn file(&self) -> &Arc<OwnedFd> {
        &self.file
    }

    /// Takes a new descriptor if there is one.
    #[inline]
    fn follow(&mut self) {
        let epoch = self.slot.epoch.load(Ordering::Acquire);
        if epoch != self.epoch {
            self.change(epoch);
        }
    }

    #[cold]
    fn change(&mut self, epoch: u32) {
        let fresh = self.slot.fresh().take();
        let Some(fresh) = fresh else {
            self.epoch = epoch;
            return;
        };
        self.ring.replace_file(fresh.as_fd());
        self.epoch = epoch;
        self.file = Arc::new(fresh);
        self.attached = false;
        if self.enabled {
            self.attach();
        }
    }

    #[cold]
    fn attach(&mut self) {
        match self.port.attach(&self.file, true) {
            Ok(()) => {
                self.attached = true;
                self.ring.readable = true;
            }
            // It was deleted. Whoever watches it brings a new one.
            Err(errno) => tracing::debug!("a queue of {} cannot be attached: {errno}", self.port.describe()),
        }
    }

    #[inline]
    fn read(&mut self, most: usize) {
        if !self.ring.may_read() {
            return;
        }
        let count = self.burst.min(most).min(BURST);
        if count == 0 {
            return;
        }
        self.frames.clear();
        self.released = 0;
        self.ring.poll_for_frames();
        self.ring.readable = false;
        for number in 0..count {
            self.push_read(number);
        }
        self.results[..count].copy_from_slice(self.ring.run(count));
        let mut come = 0;
        for number in 0..count {
            let result = self.results[number];
            // What failed for another reason than that there was nothing may have others behind it; not so with a dead descriptor.
            come += usize::from(!matches!(-result, libc::EAGAIN | libc::EBADFD));
            if let Ok(bytes) = u32::try_from(result) {
                self.accept(number, bytes);
            }
        }
        if come == count {
            self.ring.readable = true;
            self.burst = (count * 2).min(BURST);
            self.full_bursts += u32::from(count == BURST);
        } else {
            self.burst = (come + 1).min(BURST);
        }
    }

    #[inline]
    fn push_read(&mut self, number: usize) {
        let entry = if let Some(message) = self.messages.get_mut(number) {
            message.header.msg_controllen = size_of::<Beside>();
            message.beside.length = 0;
            opcode::RecvMsg::new(FILE, &raw mut message.header).flags(libc::MSG_DONTWAIT as u32).build()
        } else {
            let place = read_place(&self.slab, number);
            opcode::Read::new(FILE, place, READ_BYTES as u32).rw_flags(self.nowait).build()
        };
        // SAFETY: the place and the message are ours, the place holds no frame that is still handed over, and `run` waits until the
        // read has ended.
        unsafe { self.ring.push(entry, number) };
    }

    /// Takes what was read to a place, if it is a frame; if not, that is counted.
    #[inline]
    fn accept(&mut self, number: usize, bytes: u32) {
        match self.frame(number, bytes) {
            Some(frame) => self.frames.push(frame),
            None => self.bad += 1,
        }
    }

    #[inline]
    fn frame(&self, number: usize, bytes: u32) -> Option<Incoming> {
        let read_bytes = bytes.checked_sub(HEADER_BYTES)?;
        let tag = self.messages.get(number).and_then(|message| message.beside.tag());
        let length = read_bytes + if tag.is_some() { VLAN_TAG_BYTES } else { 0 };
        if read_bytes < ETHERNET_BYTES || length > FRAME_BYTES_MAX {
            return None;
        }
        // SAFETY: the place has room for a header, which nobody writes now.
        let read = unsafe { std::slice::from_raw_parts(read_place(&self.slab, number), HEADER_BYTES as usize) };
        let mut raw = RawNetHeader::default();
        raw.as_mut_bytes()[..HEADER_BYTES as usize].copy_from_slice(read);
        if let Some(tag) = tag {
            put_tag_back(&self.slab, number, tag);
            move_behind_tag(&mut raw);
        }
        let start = FRAME_AT - (length - read_bytes) as usize;
        // All is allowed here: what a driver did not ask for may have waited since before it asked, and is its lane's to refuse.
        let header = NetHeader::parse(&raw, length, Offloads::ALL).ok()?;
        // SAFETY: the kernel wrote so many bytes, and the place is read to again only when all frames are released.
        Some(unsafe { Incoming::new(header, self.slab.place(number).add(start), length) })
    }

    /// The ranges of a burst, each frame's behind its header's; where each frame's begin.
    #[inline]
    fn describe(&mut self, frames: &[Outgoing]) -> [usize; BURST + 1] {
        let Self { headers, ranges, .. } = self;
        let mut starts = [0; BURST + 1];
        ranges.clear();
        for (number, frame) in frames.iter().enumerate() {
            headers[number] = frame.header.to_raw(0);
            let header = std::ptr::from_mut(&mut headers[number]).cast();
            ranges.push(libc::iovec { iov_base: header, iov_len: HEADER_BYTES as usize });
            ranges.extend_from_slice(frame.segments.as_slice());
            starts[number + 1] = ranges.len();
        }
        starts
    }

    /// Sends a burst by a socket: a frame that the kernel refuses is passed over, one that finds no room is the last one tried.
    #[inline]
    fn send(&mut self, count: usize, starts: &[usize; BURST + 1]) {
        for number in 0..count {
            let ranges = &mut self.ranges[starts[number]..starts[number + 1]];
            self.sends[number].msg_hdr.msg_iov = ranges.as_mut_ptr();
            self.sends[number].msg_hdr.msg_iovlen = ranges.len();
        }
        let mut done = 0;
        while done < count {
            let rest = &mut self.sends[done..count];
            let (list, length) = (rest.as_mut_ptr(), rest.len() as libc::c_uint);
            // SAFETY: the list, its lists and the headers are ours, and the frames' memory is readable while `transmit` runs.
            let sent = unsafe { libc::sendmmsg(self.file.as_raw_fd(), list, length, libc::MSG_DONTWAIT) };
            if let Ok(sent @ 1..) = usize::try_from(sent) {
                self.results[done..done + sent].fill(0);
                done += sent;
                continue;
            }
            let result = -Errno::last_raw();
            if is_full(result) {
                self.results[done..count].fill(result);
                return;
            }
            self.results[done] = result;
            done += 1;
        }
    }

    #[inline]
    fn write(&mut self, count: usize, starts: &[usize; BURST + 1]) {
        if !self.sends.is_empty() {
            return self.send(count, starts);
        }
        for number in 0..count {
            let list = self.ranges[starts[number]..starts[number + 1]].as_ptr();
            let length = starts[number + 1] - starts[number];
            if count < RING_FRAMES {
                // SAFETY: the list and the header are ours, and the frame's memory is readable while `transmit` runs.
                let result = unsafe { libc::writev(self.file.as_raw_fd(), list, length as libc::c_int) };
                self.results[number] = if result < 0 { -Errno::last_raw() } else { result as i32 };
            } else {
                let write = opcode::Writev::new(FILE, list, length as u32).rw_flags(self.nowait).build();
                // SAFETY: as above, and `run` waits until the write has ended.
                unsafe { self.ring.push(write, number) };
            }
        }
        if count >= RING_FRAMES {
            self.results[..count].copy_from_slice(self.ring.run(count));
        }
    }

    /// What became of a burst. Frames at its end that found no room are not taken. One that found none before another that did is
    /// lost: given again it would come too late.
    #[inline]
    fn tally(&self, count: usize) -> Sent {
        let results = &self.results[..count];
        let taken = results.iter().rposition(|result| !is_full(*result)).map_or(0, |last| last + 1);
        Sent { taken, lost: results[..taken].iter().filter(|result| **result < 0).count() }
    }
}

/// Whether a frame found no room.
const fn is_full(result: i32) -> bool {
    matches!(-result, libc::EAGAIN | libc::EINTR)
}

/// Whether a descriptor takes `RWF_NOWAIT`. It has no frame: the queue has not been attached yet.
fn knows_nowait(file: &OwnedFd) -> bool {
    let mut byte = 0u8;
    let range = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: one range of one byte of ours.
    let result = unsafe { libc::preadv2(file.as_raw_fd(), &raw const range, 1, -1, libc::RWF_NOWAIT) };
    result >= 0 || Errno::last() != Errno::EOPNOTSUPP
}

impl Drop for KernelQueue {
    fn drop(&mut self) {
        // What the ring still has under way keeps the descriptor open for a while.
        if self.attached {
            let _ = self.port.attach(&self.file, false);
        }
    }
}

impl NetChannel for KernelQueue {
    fn enable(&mut self, enabled: bool) {
        self.follow();
        self.enabled = enabled;
        if enabled && !self.attached {
            self.attach();
        } else if !enabled {
            if self.attached
                && let Err(errno) = self.port.attach(&self.file, false)
            {
                tracing::debug!("a queue of {} cannot be detached: {errno}", self.port.describe());
            }
            self.attached = false;
            self.frames.clear();
            self.released = 0;
        }
    }

    fn leave_undone(&mut self, offloads: Offloads) {
        self.port.leave_undone(offloads);
    }

    #[inline]
    fn transmit(&mut self, frames: &[Outgoing]) -> Sent {
        self.follow();
        let count = frames.len().min(BURST);
        if !self.attached {
            return Sent { taken: count, lost: count };
        }
        self.ring.look_for_room();
        let starts = self.describe(&frames[..count]);
        self.write(count, &starts);
        let sent = self.tally(count);
        if sent.taken < count {
            self.ring.poll_for_room(None);
        }
        sent
    }

    #[inline]
    fn receive(&mut self, most: usize) -> &[Incoming] {
        self.follow();
        if self.released == self.frames.len() && self.attached {
            self.read(most);
        }
        let end = self.frames.len().min(self.released.saturating_add(most));
        &self.frames[self.released..end]
    }

    #[inline]
    fn release(&mut self, count: usize) {
        self.released = self.frames.len().min(self.released.saturating_add(count));
    }

    /// A backlog is asked about once when all of it has been read, or after so many bursts that never end.
    #[inline]
    fn missed(&mut self) -> Missed {
        let bad_header = std::mem::replace(&mut self.bad, 0);
        let ask = self.full_bursts > 0 && (!self.ring.readable || self.full_bursts >= FULL_BURSTS_MAX);
        if !ask || self.messages.is_empty() {
            return Missed { bad_header, ..Missed::NONE };
        }
        self.full_bursts = 0;
        Missed { bad_header, no_buffers: packet_socket::missed(&self.file).unwrap_or(0), ..Missed::NONE }
    }

    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.ring.fd())
    }

    fn arm(&mut self) -> bool {
        self.follow();
        if self.released < self.frames.len() {
            return false;
        }
        if !self.attached {
            return true;
        }
        self.ring.may_sleep()
    }
}

#[cfg(test)]
mod tests;
