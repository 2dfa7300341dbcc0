//! The hot half of a tunnel, for one queue pair.
//!
//! A burst is one `sendmmsg`, or one `recvmmsg`, whatever ports and end points are in it. These stop at the first message that does
//! not go, which is then either put off (no room: its frame is not taken, and a poll tells when there is some) or lost, and the call
//! is made again behind it. An io_uring only watches: that something has come it says in shared memory, so that a channel to which
//! nothing comes costs no system call, and it wakes a reactor that sleeps.
//!
//! A frame that goes to many is described once: all copies share its ranges and its header, and only the addresses differ.
#![expect(unsafe_code, reason = "hands addresses of frames to the kernel, and looks at the front of a VM's frames")]

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use nix::errno::Errno;

use super::super::polled_ring::PolledRing;
use super::super::slab::{PLACE_BYTES, Slab};
use super::super::{
    BURST, ETHERNET_BYTES, FRAME_BYTES_MAX, Incoming, Missed, NetChannel, NetHeader, Offloads, Outgoing, Sent,
};
use super::endpoint::Receiver;
use super::flow::{self, HEAD_BYTES};
use super::outer::{OuterAddress, SocketAddress};
use super::wire::{OUTER_HEADER_BYTES, OuterHeader};
use super::{Tunnel, socket};
use crate::backend::BackendError;
use crate::backend::ring::Users;
use crate::clock::Moment;

/// Two polls, and room to spare.
const ENTRIES: u32 = 8;
/// Ranges of a burst at first: it may grow.
const RANGES: usize = BURST * 8;

/// A datagram that holds no frame.
const BAD: Missed = Missed { bad_header: 1, ..Missed::NONE };
/// Bursts of a backlog until the socket is asked in the middle of it.
const FULL_BURSTS_MAX: u32 = 4096;

/// Messages of a burst, and the end points that they come from or go to.
struct Messages {
    messages: Box<[libc::mmsghdr; BURST]>,
    addresses: Box<[SocketAddress; BURST]>,
}

impl Messages {
    fn new() -> Self {
        // SAFETY: a message's description is plain data.
        let message: libc::mmsghdr = unsafe { std::mem::zeroed() };
        Self { messages: Box::new([message; BURST]), addresses: Box::new([SocketAddress::empty(); BURST]) }
    }

    /// Describes one message.
    #[inline]
    fn describe(&mut self, number: usize, address_bytes: libc::socklen_t, ranges: *mut libc::iovec, count: usize) {
        let message = &mut self.messages[number].msg_hdr;
        message.msg_name = self.addresses[number].as_mut_ptr();
        message.msg_namelen = address_bytes;
        message.msg_iov = ranges;
        message.msg_iovlen = count as _;
        message.msg_flags = 0;
    }
}

/// A frame's ranges in the list of its burst, and what has become of its copies.
#[derive(Clone, Copy, Default)]
struct Described {
    first_range: usize,
    ranges: usize,
    /// To how many it goes, and to how many it went.
    copies: usize,
    went: usize,
}

/// One channel.
pub(super) struct TunnelChannel {
    tunnel: Arc<Tunnel>,
    receiver: Receiver,
    sender: OwnedFd,
    ring: PolledRing,
    header: OuterHeader,
    enabled: bool,
    slab: Slab,
    places: Box<[libc::iovec; BURST]>,
    incoming: Messages,
    /// What was read, and how much of that is done with.
    frames: Vec<Incoming>,
    released: usize,
    outgoing: Messages,
    headers: Box<[OuterHeader; BURST]>,
    ranges: Vec<libc::iovec>,
    described: [Described; BURST],
    /// Copies that were lost of frames of which another went.
    lost_copies: u64,
    /// Datagrams that were no frames for us, by reason; bursts that came in full since the kernel was asked what it had no room for, and
    /// its answer then.
    missed: Missed,
    full_bursts: u32,
    overflows: u32,
    /// Of which frame each message is a copy, and to whom it goes.
    copies: Vec<(usize, OuterAddress)>,
}

// SAFETY: the pointers lead to memory of this channel, or are only looked at while `transmit` runs.
unsafe impl Send for TunnelChannel {}

impl TunnelChannel {
    pub(super) fn new(tunnel: Arc<Tunnel>, users: Users) -> Result<Self, BackendError> {
        let receiver = tunnel.network.open_receiver()?;
        let sender = tunnel.network.open_sender()?;
        let ring = PolledRing::new(receiver.socket.as_fd(), ENTRIES, "a tunnel", users)?;
        let header = tunnel.kind.header(tunnel.vni, tunnel.port);
        let nowhere = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        Ok(Self {
            receiver,
            sender,
            ring,
            header,
            enabled: false,
            slab: Slab::new(),
            places: Box::new([nowhere; BURST]),
            incoming: Messages::new(),
            frames: Vec::with_capacity(BURST),
            released: 0,
            outgoing: Messages::new(),
            headers: Box::new([header; BURST]),
            ranges: Vec::with_capacity(RANGES),
            described: [Described::default(); BURST],
            lost_copies: 0,
            missed: Missed::NONE,
            full_bursts: 0,
            overflows: 0,
            copies: Vec::with_capacity(BURST),
            tunnel,
        })
    }

    /// The clock of stations, where any are told apart.
    #[inline]
    fn now_seconds(&self) -> u32 {
        if self.tunnel.remotes.learns() { (Moment::now().0 / 1_000_000_000) as u32 } else { 0 }
    }

    #[inline]
    fn read(&mut self, most: usize) {
        self.ring.poll_for_frames();
        self.ring.look();
        let count = most.min(BURST);
        if !self.ring.readable || count == 0 {
            return;
        }
        self.frames.clear();
        self.released = 0;
        let address_bytes = size_of::<SocketAddress>() as libc::socklen_t;
        for number in 0..count {
            let base = self.slab.place(number).cast();
            self.places[number] = libc::iovec { iov_base: base, iov_len: PLACE_BYTES };
            let place = &raw mut self.places[number];
            self.incoming.describe(number, address_bytes, place, 1);
        }
        // SAFETY: places, ranges and addresses are this channel's, and no frame that is in a place is still handed over.
        let result = unsafe { socket::receive_messages(&self.receiver.socket, &mut self.incoming.messages[..count]) };
        let come = match result {
            Ok(come) => come,
            Err(Errno::EINTR) => return,
            Err(_) => 0,
        };
        self.ring.readable = come == count;
        self.full_bursts += u32::from(come == BURST);
        let now_seconds = self.now_seconds();
        for number in 0..come {
            self.accept(number, now_seconds);
        }
    }

    /// Takes what was read to a place, if it is a frame of our network from somebody who is believed; if not, that is counted.
    #[inline]
    fn accept(&mut self, number: usize, now_seconds: u32) {
        match self.frame(number, now_seconds) {
            Ok(frame) => self.frames.push(frame),
            Err(missed) => self.missed += missed,
        }
    }

    #[inline]
    fn frame(&self, number: usize, now_seconds: u32) -> Result<Incoming, Missed> {
        let message = &self.incoming.messages[number];
        let whole = message.msg_hdr.msg_flags & libc::MSG_TRUNC == 0;
        let from = self.incoming.addresses[number].address().filter(|_| whole).ok_or(BAD)?;
        let place = self.slab.place(number).cast_const();
        let length = (message.msg_len as usize).min(PLACE_BYTES);
        // SAFETY: the kernel wrote so many bytes, and nobody writes them now.
        let datagram = unsafe { std::slice::from_raw_parts(place, length) };
        let encapsulated = self.tunnel.kind.parse(datagram).map_err(|_| BAD)?;
        if encapsulated.vni != self.tunnel.vni {
            return Err(Missed { not_for_us: 1, ..Missed::NONE });
        }
        if !self.tunnel.remotes.takes(from) {
            return Err(Missed { spoofed: 1, ..Missed::NONE });
        }
        let frame = &datagram[encapsulated.frame_at..];
        if !(ETHERNET_BYTES as usize..=FRAME_BYTES_MAX as usize).contains(&frame.len()) {
            return Err(BAD);
        }
        if let [_, source, ..] = frame.as_chunks::<6>().0 {
            self.tunnel.remotes.hear(*source, from, now_seconds);
        }
        // SAFETY: it lies in the place, which is written again only when all frames are released.
        Ok(unsafe { Incoming::new(NetHeader::DONE, frame.as_ptr(), frame.len() as u32) })
    }

    /// Describes one frame and finds out to whom it goes. Its copies are sent when there are as many as a call takes. Returns false when
    /// there was no room for one: nothing more can be sent.
    #[inline]
    fn give(&mut self, number: usize, frame: &Outgoing, now_seconds: u32) -> bool {
        let mut head = [0; HEAD_BYTES];
        let head = copy_head(frame, &mut head);
        self.described[number] = Described::default();
        let [destination, ..] = head.as_chunks::<6>().0 else { return true };
        let header = self.header.of_frame(flow::source_port(head), frame.bytes);
        let Some(header) = header.filter(|_| frame.bytes >= ETHERNET_BYTES) else { return true };
        self.headers[number] = header;
        let first_range = self.ranges.len();
        let base = std::ptr::from_mut(&mut self.headers[number]).cast();
        self.ranges.push(libc::iovec { iov_base: base, iov_len: OUTER_HEADER_BYTES });
        self.ranges.extend_from_slice(frame.segments.as_slice());
        let address = self.tunnel.remotes.find(*destination, now_seconds);
        let copies = if address.is_some() { 1 } else { self.tunnel.remotes.named().len() };
        self.described[number] = Described { first_range, ranges: self.ranges.len() - first_range, copies, went: 0 };
        if let Some(address) = address {
            return self.copy_to(number, address);
        }
        for remote in 0..copies {
            if !self.copy_to(number, self.tunnel.remotes.named()[remote]) {
                return false;
            }
        }
        true
    }

    #[inline]
    fn copy_to(&mut self, frame: usize, address: OuterAddress) -> bool {
        if self.copies.len() == BURST && !self.send() {
            return false;
        }
        self.copies.push((frame, address));
        true
    }

    /// Sends the copies that were described. Returns false when there was no room for one: it and those behind it were not sent.
    #[inline]
    fn send(&mut self) -> bool {
        let count = self.copies.len();
        for (message, (frame, address)) in self.copies.iter().enumerate() {
            let Described { first_range, ranges, .. } = self.described[*frame];
            let (socket_address, address_bytes) = SocketAddress::new(*address, 0);
            self.outgoing.addresses[message] = socket_address;
            // SAFETY: the frame's ranges begin there: nothing was taken out since.
            let list = unsafe { self.ranges.as_mut_ptr().add(first_range) };
            self.outgoing.describe(message, address_bytes, list, ranges);
        }
        let mut done = 0;
        while done < count {
            // SAFETY: addresses, headers and the list are ours, and the frames' memory is readable while `transmit` runs.
            match unsafe { socket::send_messages(&self.sender, &mut self.outgoing.messages[done..count]) } {
                Ok(went) => {
                    for (frame, _) in &self.copies[done..done + went] {
                        self.described[*frame].went += 1;
                    }
                    done += went;
                }
                Err(Errno::EINTR) => {}
                // What a raw socket says of a full buffer, and what others say.
                Err(Errno::ENOBUFS | Errno::EAGAIN) => {
                    self.copies.drain(..done);
                    return false;
                }
                // Too long for the route, no route, the address is gone, forbidden: that copy is lost.
                Err(_) => done += 1,
            }
        }
        self.copies.clear();
        true
    }
}

/// The front of a frame, copied: a VM may write there meanwhile.
#[inline]
fn copy_head<'a>(frame: &Outgoing, head: &'a mut [u8; HEAD_BYTES]) -> &'a [u8] {
    let mut filled = 0;
    for range in frame.segments.as_slice() {
        let bytes = range.iov_len.min(HEAD_BYTES - filled);
        // SAFETY: the ranges of a frame that a channel is given are readable while `transmit` runs, and are not our own memory.
        unsafe {
            std::ptr::copy_nonoverlapping(range.iov_base.cast::<u8>().cast_const(), head[filled..].as_mut_ptr(), bytes)
        };
        filled += bytes;
        if filled == HEAD_BYTES {
            break;
        }
    }
    &head[..filled]
}

impl NetChannel for TunnelChannel {
    fn enable(&mut self, enabled: bool) {
        if enabled != self.enabled {
            self.enabled = enabled;
            self.receiver.enable(enabled);
            self.ring.readable = enabled;
            self.full_bursts = 0;
            self.overflows = socket::overflows(&self.receiver.socket).unwrap_or(self.overflows);
            self.frames.clear();
            self.released = 0;
        }
    }

    fn leave_undone(&mut self, _offloads: Offloads) {}

    #[inline]
    fn transmit(&mut self, frames: &[Outgoing]) -> Sent {
        let count = frames.len().min(BURST);
        if !self.enabled {
            return Sent { taken: count, lost: count };
        }
        self.ring.look_for_room();
        self.ranges.clear();
        self.copies.clear();
        let now_seconds = self.now_seconds();
        let mut described = 0;
        let has_room = frames[..count].iter().enumerate().all(|(number, frame)| {
            described = number + 1;
            self.give(number, frame, now_seconds)
        }) && self.send();
        let mut taken = described;
        if !has_room {
            // The first copy that did not go is still there. If others of its frame did, the frame is not given again.
            taken = self.copies.first().map_or(described, |(frame, _)| *frame);
            taken += usize::from(self.described[..count].get(taken).is_some_and(|frame| frame.went > 0));
            self.ring.poll_for_room(Some(self.sender.as_raw_fd()));
        }
        let mut lost = 0;
        for Described { copies, went, .. } in &self.described[..taken] {
            if *went == 0 {
                lost += 1;
            } else {
                self.lost_copies += (copies - went) as u64;
            }
        }
        Sent { taken, lost }
    }

    #[inline]
    fn receive(&mut self, most: usize) -> &[Incoming] {
        if self.released == self.frames.len() && self.enabled {
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
        let mut missed = std::mem::take(&mut self.missed);
        if self.full_bursts > 0 && (!self.ring.readable || self.full_bursts >= FULL_BURSTS_MAX) {
            self.full_bursts = 0;
            let overflows = socket::overflows(&self.receiver.socket).unwrap_or(self.overflows);
            missed.no_buffers += u64::from(overflows.wrapping_sub(std::mem::replace(&mut self.overflows, overflows)));
        }
        missed
    }

    #[inline]
    fn lost_later(&mut self) -> u64 {
        std::mem::replace(&mut self.lost_copies, 0)
    }

    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.ring.fd())
    }

    fn arm(&mut self) -> bool {
        if self.released < self.frames.len() {
            return false;
        }
        if !self.enabled {
            return true;
        }
        self.ring.may_sleep()
    }
}
