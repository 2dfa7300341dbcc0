//! An AF_XDP socket on one queue of an interface: memory for frames, and the rings by which it goes to and fro.
//!
//! ```text
//!                 chunks to receive into ──► fill ring ──► kernel ──► receive ring ──► frames
//!                 frames in chunks ────► transmit ring ──► kernel ──► completion ring ──► free chunks
//! ```
//!
//! Memory is cut into chunks, one for each frame. The first ones are for receiving: each is with the kernel, in a ring or lent to whoever
//! reads the frame. The others are for sending: each is free or with the kernel.
#![expect(unsafe_code, reason = "options of sockets that have no wrapper, and memory that is shared with the kernel")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

use super::super::{BURST, ETHERNET_BYTES, Outgoing, VLAN_TAG_BYTES};
use super::program::Mode;
use super::ring::{Mapping, Ring};

/// Chunks for receiving: what a burst at 10 Gbit/s brings in a millisecond or two. A driver without copies has some hundreds of them
/// in its own ring all the time.
const RECEIVE_CHUNKS: u32 = 2048;
const TRANSMIT_CHUNKS: u32 = 1024;
/// Before each frame that is received the kernel keeps this much of its chunk for programs (`XDP_PACKET_HEADROOM`).
const HEADROOM_BYTES: u32 = 256;
const CHUNK_BYTES_MIN: u32 = 2048;
/// Bursts of a backlog until the kernel is asked in the middle of it.
const FULL_BURSTS_MAX: u32 = 4096;
/// The kernel takes no chunk of more than a page.
const CHUNK_BYTES_MAX: u32 = 4096;
/// What a frame has beside its IP packet.
const AROUND_BYTES: u32 = ETHERNET_BYTES + VLAN_TAG_BYTES;
/// The largest IP packet that a chunk holds.
pub(super) const MTU_MAX: u16 = (CHUNK_BYTES_MAX - HEADROOM_BYTES - AROUND_BYTES) as u16;

/// Bytes of a chunk for frames with IP packets of so many bytes.
const fn chunk_bytes(mtu: u16) -> u32 {
    if mtu as u32 + AROUND_BYTES + HEADROOM_BYTES <= CHUNK_BYTES_MIN { CHUNK_BYTES_MIN } else { CHUNK_BYTES_MAX }
}

/// A frame in a chunk that the kernel has lent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lent {
    /// Where it begins in the memory.
    pub(super) at: u64,
    pub(super) bytes: u32,
}

/// One socket.
pub(super) struct XdpSocket {
    // The rings go before the memory, and that before the descriptor: nothing is left that leads into what is gone.
    fill: Ring<u64>,
    receive: Ring<libc::xdp_desc>,
    transmit: Ring<libc::xdp_desc>,
    completion: Ring<u64>,
    free: Vec<u64>,
    memory: Mapping,
    chunk_bytes: u32,
    file: OwnedFd,
    copies: bool,
    /// Bursts that came in full since the kernel was asked what it had no chunk for, and its answer then.
    full_bursts: u32,
    missed: u64,
}

impl XdpSocket {
    /// Opens one, in the namespace of the interface, for packets of `mtu` bytes. No frame comes: no program knows it yet.
    pub(super) fn open(index: i32, queue: u32, mtu: u16, mode: Mode) -> Result<Self, Errno> {
        let chunk_bytes = chunk_bytes(mtu);
        let chunks = RECEIVE_CHUNKS + TRANSMIT_CHUNKS;
        let bytes = chunks as usize * chunk_bytes as usize;
        let memory = Mapping::pages(bytes)?;
        let file = raw_socket()?;
        let start = memory.start().addr() as u64;
        let region = libc::xdp_umem_reg_v1 { addr: start, len: bytes as u64, chunk_size: chunk_bytes, headroom: 0 };
        set(&file, libc::XDP_UMEM_REG, &region)?;
        let sizes = [
            (libc::XDP_UMEM_FILL_RING, RECEIVE_CHUNKS),
            (libc::XDP_UMEM_COMPLETION_RING, TRANSMIT_CHUNKS),
            (libc::XDP_RX_RING, RECEIVE_CHUNKS),
            (libc::XDP_TX_RING, TRANSMIT_CHUNKS),
        ];
        for (option, size) in sizes {
            set(&file, option, &size)?;
        }
        let offsets = offsets(&file)?;
        let mut fill = Ring::map(&file, libc::XDP_UMEM_PGOFF_FILL_RING as libc::off_t, offsets.fr, RECEIVE_CHUNKS)?;
        let completion =
            Ring::map(&file, libc::XDP_UMEM_PGOFF_COMPLETION_RING as libc::off_t, offsets.cr, TRANSMIT_CHUNKS)?;
        let receive = Ring::map(&file, libc::XDP_PGOFF_RX_RING, offsets.rx, RECEIVE_CHUNKS)?;
        let transmit = Ring::map(&file, libc::XDP_PGOFF_TX_RING, offsets.tx, TRANSMIT_CHUNKS)?;
        let address = |chunk: u32| u64::from(chunk) * u64::from(chunk_bytes);
        for chunk in 0..RECEIVE_CHUNKS {
            fill.push(address(chunk));
        }
        fill.publish();
        let free = (RECEIVE_CHUNKS..chunks).map(address).collect();
        bind(&file, index, queue, mode)?;
        let copies = copies(&file)?;
        let (full_bursts, missed) = (0, 0);
        Ok(Self { fill, receive, transmit, completion, free, memory, chunk_bytes, file, copies, full_bursts, missed })
    }

    pub(super) const fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Whether the kernel copies frames; else the driver reads and writes them where they are.
    pub(super) const fn copies(&self) -> bool {
        self.copies
    }

    /// Whether there is something to receive. Reads shared memory only.
    #[inline]
    pub(super) fn is_readable(&self) -> bool {
        self.receive.waiting() > 0
    }

    /// Takes up to `most` frames, oldest first. Their chunks are given back by `give_back`.
    #[inline]
    pub(super) fn receive(&mut self, most: usize, mut take: impl FnMut(Lent, *const u8)) {
        let count = (self.receive.waiting() as usize).min(most);
        if count == 0 {
            return;
        }
        for _ in 0..count {
            let libc::xdp_desc { addr: at, len: bytes, .. } = self.receive.pop();
            let chunk = u64::from(self.chunk_bytes);
            let inside = at < u64::from(RECEIVE_CHUNKS) * chunk && at % chunk + u64::from(bytes) <= chunk;
            debug_assert!(inside, "the kernel hands over what it was given");
            if inside {
                // SAFETY: it is inside.
                take(Lent { at, bytes }, unsafe { self.memory.start().add(at as usize) });
            }
        }
        self.receive.finish();
        self.full_bursts += u32::from(count == BURST);
    }

    /// Frames that the kernel had no chunk for, since this was last asked. A backlog is asked about once when all of it has come, or after
    /// so many bursts that never end.
    #[inline]
    pub(super) fn missed(&mut self) -> u64 {
        if self.full_bursts == 0 || self.is_readable() && self.full_bursts < FULL_BURSTS_MAX {
            return 0;
        }
        self.full_bursts = 0;
        let before = self.missed;
        self.missed = missed(&self.file).unwrap_or(before);
        self.missed.saturating_sub(before)
    }

    /// The chunks of these frames are the kernel's again.
    #[inline]
    pub(super) fn give_back(&mut self, frames: &[Lent]) {
        for frame in frames {
            // There is room for as many as there are chunks.
            self.fill.push(frame.at - frame.at % u64::from(self.chunk_bytes));
        }
        self.fill.publish();
        if self.fill.needs_wakeup() {
            // Without a buffer: it only wakes the driver.
            let _ = recv(self.file.as_raw_fd(), &mut [], MsgFlags::MSG_DONTWAIT);
        }
    }

    /// Takes back what has been sent.
    #[inline]
    fn reap(&mut self) {
        let count = self.completion.waiting();
        for _ in 0..count {
            let at = self.completion.pop();
            if self.free.len() < self.free.capacity() {
                self.free.push(at);
            }
        }
        if count > 0 {
            self.completion.finish();
        }
    }

    /// Puts frames into the ring and has them sent. Returns how many it took, and how many of those are too long.
    #[inline]
    pub(super) fn transmit(&mut self, frames: &[Outgoing]) -> (usize, usize) {
        self.reap();
        let mut room = (self.transmit.room() as usize).min(self.free.len());
        let (mut taken, mut lost) = (0, 0);
        for frame in frames {
            if frame.bytes > self.chunk_bytes - HEADROOM_BYTES {
                lost += 1;
            } else if room == 0 {
                break;
            } else if let Some(at) = self.free.pop() {
                room -= 1;
                self.copy(frame, at);
                self.transmit.push(libc::xdp_desc { addr: at, len: frame.bytes, options: 0 });
            }
            taken += 1;
        }
        if taken > lost {
            self.transmit.publish();
        }
        self.kick();
        (taken, lost)
    }

    #[inline]
    fn copy(&self, frame: &Outgoing, at: u64) {
        let mut to = at as usize;
        let end = to + frame.bytes as usize;
        for segment in frame.segments.as_slice() {
            let length = segment.iov_len.min(end - to);
            // SAFETY: the chunk is inside and free, holds as much as the frame has, and the frame's memory is readable while `transmit`
            // runs. (A VM may write to it meanwhile: then it sends what it wrote.)
            unsafe {
                std::ptr::copy_nonoverlapping(segment.iov_base.cast::<u8>(), self.memory.start().add(to), length)
            };
            to += length;
        }
    }

    /// Whether frames wait to be taken out of the ring.
    #[inline]
    pub(super) fn has_unsent(&self) -> bool {
        self.transmit.room() < TRANSMIT_CHUNKS
    }

    /// Whether another frame could be sent.
    #[inline]
    pub(super) fn has_room(&mut self) -> bool {
        self.reap();
        !self.free.is_empty() && self.transmit.room() > 0
    }

    /// Has the kernel send what is in the ring, if it wants to be told. What it has no room for stays there.
    #[inline]
    pub(super) fn kick(&mut self) {
        if self.has_unsent() && self.transmit.needs_wakeup() {
            let _ = send(self.file.as_raw_fd(), &[], MsgFlags::MSG_DONTWAIT);
        }
    }
}

fn missed(file: &OwnedFd) -> Result<u64, Errno> {
    // SAFETY: it is plain data.
    let counts: libc::xdp_statistics = get(file, libc::XDP_STATISTICS, unsafe { std::mem::zeroed() })?;
    // Without a chunk; without a place in the ring.
    Ok(counts.rx_dropped + counts.rx_ring_full)
}

fn raw_socket() -> Result<OwnedFd, Errno> {
    // SAFETY: no address is passed.
    let fd = Errno::result(unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: it is new, so nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bind(file: &OwnedFd, index: i32, queue: u32, mode: Mode) -> Result<(), Errno> {
    // In the driver the kernel tries without copies first, and copies where it must.
    let copy = if mode == Mode::Generic { libc::XDP_COPY } else { 0 };
    let address = libc::sockaddr_xdp {
        sxdp_family: libc::AF_XDP as u16,
        sxdp_flags: copy | libc::XDP_USE_NEED_WAKEUP,
        sxdp_ifindex: index as u32,
        sxdp_queue_id: queue,
        sxdp_shared_umem_fd: 0,
    };
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address is as long as said.
    Errno::result(unsafe { libc::bind(file.as_raw_fd(), (&raw const address).cast(), length) }).map(|_| ())
}

fn offsets(file: &OwnedFd) -> Result<libc::xdp_mmap_offsets, Errno> {
    // SAFETY: it is plain data.
    get(file, libc::XDP_MMAP_OFFSETS, unsafe { std::mem::zeroed() })
}

fn copies(file: &OwnedFd) -> Result<bool, Errno> {
    let options = get(file, libc::XDP_OPTIONS, libc::xdp_options { flags: 0 })?;
    Ok(options.flags & libc::XDP_OPTIONS_ZEROCOPY == 0)
}

/// Reads an option; it is plain data.
fn get<T: Copy>(file: &OwnedFd, option: libc::c_int, mut value: T) -> Result<T, Errno> {
    let mut length = size_of::<T>() as libc::socklen_t;
    let to: *mut T = &raw mut value;
    // SAFETY: the kernel writes as many bytes as said at most.
    Errno::result(unsafe { libc::getsockopt(file.as_raw_fd(), libc::SOL_XDP, option, to.cast(), &raw mut length) })?;
    // Before Linux 5.4 it was shorter.
    if (length as usize) < size_of::<T>() { Err(Errno::EOPNOTSUPP) } else { Ok(value) }
}

/// Sets an option; `value` is what the kernel reads for it.
fn set<T>(file: &OwnedFd, option: libc::c_int, value: &T) -> Result<(), Errno> {
    let value: *const T = value;
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the value is as long as said.
    Errno::result(unsafe { libc::setsockopt(file.as_raw_fd(), libc::SOL_XDP, option, value.cast(), length) })
        .map(|_| ())
}
