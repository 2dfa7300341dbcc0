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

use io_uring::{cqueue, opcode, types};
use nix::errno::Errno;

use super::super::slab::{PLACE_BYTES, Slab};
use super::super::{BURST, ETHERNET_BYTES, FRAME_BYTES_MAX, Incoming, NetChannel, NetHeader, Offloads, Outgoing, Sent};
use super::endpoint::Receiver;
use super::flow::{self, HEAD_BYTES};
use super::outer::{OuterAddress, SocketAddress};
use super::wire::{OUTER_HEADER_BYTES, OuterHeader};
use super::{Tunnel, socket};
use crate::backend::BackendError;
use crate::backend::ring::{Ring, Users};
use crate::clock::Moment;

/// Two polls, and room to spare.
const ENTRIES: u32 = 8;
const FILE: types::Fixed = types::Fixed(0);
const POLL_IN: u64 = 1;
const POLL_OUT: u64 = 2;
/// Ranges of a burst at first: it may grow.
const RANGES: usize = BURST * 8;

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
    went: bool,
}

/// One channel.
pub(super) struct TunnelChannel {
    tunnel: Arc<Tunnel>,
    receiver: Receiver,
    sender: OwnedFd,
    ring: Ring,
    header: OuterHeader,
    enabled: bool,
    /// Whether the kernel's poll stands.
    polled: bool,
    /// There may be datagrams to read.
    readable: bool,
    /// A frame was not taken, and a poll tells when there is room.
    waits_for_room: bool,
    /// It has told, and whoever gave that frame may not know yet: they have their turn before their reactor sleeps.
    room_came: bool,
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
    /// Of which frame each message is a copy, and to whom it goes.
    copies: Vec<(usize, OuterAddress)>,
}

// SAFETY: the pointers lead to memory of this channel, or are only looked at while `transmit` runs.
unsafe impl Send for TunnelChannel {}

impl TunnelChannel {
    pub(super) fn new(tunnel: Arc<Tunnel>, users: Users) -> Result<Self, BackendError> {
        let receiver = tunnel.network.open_receiver()?;
        let sender = tunnel.network.open_sender()?;
        let ring = Ring::new(receiver.socket.as_fd(), ENTRIES, "a tunnel", users)?;
        let header = tunnel.kind.header(tunnel.vni, tunnel.port);
        let nowhere = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        Ok(Self {
            receiver,
            sender,
            ring,
            header,
            enabled: false,
            polled: false,
            readable: false,
            waits_for_room: false,
            room_came: false,
            slab: Slab::new(),
            places: Box::new([nowhere; BURST]),
            incoming: Messages::new(),
            frames: Vec::with_capacity(BURST),
            released: 0,
            outgoing: Messages::new(),
            headers: Box::new([header; BURST]),
            ranges: Vec::with_capacity(RANGES),
            described: [Described::default(); BURST],
            copies: Vec::with_capacity(BURST),
            tunnel,
        })
    }

    /// The clock of stations, where any are told apart.
    #[inline]
    fn now_seconds(&self) -> u32 {
        if self.tunnel.remotes.learns() { (Moment::now().0 / 1_000_000_000) as u32 } else { 0 }
    }

    /// The ring was made with all that it is asked for, so a refusal is a fault of ours.
    #[cold]
    fn broken(&self, error: &std::io::Error) -> ! {
        panic!("io_uring of the tunnel at {}: {error}", self.tunnel.network.describe());
    }

    /// Takes what the polls have noted.
    #[inline]
    fn take(&mut self) {
        let Self { ring, polled, readable, waits_for_room, room_came, .. } = self;
        for entry in ring.ended() {
            match entry.user_data() {
                POLL_IN => {
                    *readable = true;
                    *polled = cqueue::more(entry.flags());
                }
                _ => (*waits_for_room, *room_came) = (false, true),
            }
        }
    }

    #[inline]
    fn exchange(&mut self) {
        if let Err(error) = self.ring.exchange() {
            self.broken(&error);
        }
        self.take();
        if self.waits_for_room && !self.ring.armed() {
            self.arm_for_room();
        }
    }

    /// Reactors are told of room even when they do not ask for frames.
    #[cold]
    fn arm_for_room(&mut self) {
        while self.waits_for_room && !self.ring.armed() {
            if let Err(error) = self.ring.arm() {
                self.broken(&error);
            }
            self.take();
        }
    }

    #[cold]
    fn poll_for_frames(&mut self) {
        self.polled = true;
        let poll = opcode::PollAdd::new(FILE, libc::POLLIN as u32).multi(true).build().user_data(POLL_IN);
        // SAFETY: a poll points nowhere.
        unsafe { self.ring.push(&poll) };
    }

    #[cold]
    fn poll_for_room(&mut self) {
        self.waits_for_room = true;
        let file = types::Fd(self.sender.as_raw_fd());
        let poll = opcode::PollAdd::new(file, libc::POLLOUT as u32).build().user_data(POLL_OUT);
        // SAFETY: a poll points nowhere.
        unsafe { self.ring.push(&poll) };
        self.exchange();
    }

    #[inline]
    fn read(&mut self, most: usize) {
        if !self.polled {
            self.poll_for_frames();
            self.readable = true;
            self.exchange();
        } else if !self.readable {
            if !self.ring.has_work() {
                return;
            }
            self.exchange();
        }
        let count = most.min(BURST);
        if !self.readable || count == 0 {
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
        self.readable = come == count;
        let now_seconds = self.now_seconds();
        for number in 0..come {
            self.accept(number, now_seconds);
        }
    }

    /// Takes what was read to a place, if it is a frame of our network from somebody who is believed.
    #[inline]
    fn accept(&mut self, number: usize, now_seconds: u32) {
        let message = &self.incoming.messages[number];
        let whole = message.msg_hdr.msg_flags & libc::MSG_TRUNC == 0;
        let Some(from) = self.incoming.addresses[number].address().filter(|_| whole) else { return };
        let place = self.slab.place(number).cast_const();
        let length = (message.msg_len as usize).min(PLACE_BYTES);
        // SAFETY: the kernel wrote so many bytes, and nobody writes them now.
        let datagram = unsafe { std::slice::from_raw_parts(place, length) };
        let Ok(encapsulated) = self.tunnel.kind.parse(datagram) else { return };
        if encapsulated.vni != self.tunnel.vni || !self.tunnel.remotes.takes(from) {
            return;
        }
        let frame = &datagram[encapsulated.frame_at..];
        if !(ETHERNET_BYTES as usize..=FRAME_BYTES_MAX as usize).contains(&frame.len()) {
            return;
        }
        if let [_, source, ..] = frame.as_chunks::<6>().0 {
            self.tunnel.remotes.hear(*source, from, now_seconds);
        }
        // SAFETY: it lies in the place, which is written again only when all frames are released.
        self.frames.push(unsafe { Incoming::new(NetHeader::DONE, frame.as_ptr(), frame.len() as u32) });
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
        self.described[number] = Described { first_range, ranges: self.ranges.len() - first_range, went: false };
        if let Some(address) = self.tunnel.remotes.find(*destination, now_seconds) {
            return self.copy_to(number, address);
        }
        for remote in 0..self.tunnel.remotes.named().len() {
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
                        self.described[*frame].went = true;
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
            self.readable = enabled;
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
        if self.waits_for_room && self.ring.has_work() {
            self.exchange();
        }
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
            taken += usize::from(self.described[..count].get(taken).is_some_and(|frame| frame.went));
            if !self.waits_for_room {
                self.poll_for_room();
            }
        }
        Sent { taken, lost: self.described[..taken].iter().filter(|frame| !frame.went).count() }
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
        if self.readable || std::mem::take(&mut self.room_came) || self.ring.has_work() {
            return false;
        }
        if !self.ring.armed() {
            if let Err(error) = self.ring.arm() {
                self.broken(&error);
            }
            self.take();
        }
        !self.readable && !self.room_came && self.polled && self.ring.armed()
    }
}
