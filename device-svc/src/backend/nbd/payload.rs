//! The one place where NBD touches payload memory: walking a request's segments, copying and zeroing them, and handing
//! them to the kernel. Segments are raw ranges whose validity is the seam's protocol ([`Segments`]), so everything here
//! works by address and makes no reference to a byte of them.
#![expect(unsafe_code, reason = "segments are raw memory, lent for the time of a request")]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::address::CardAddress;
use crate::backend::Segments;
use crate::dma::CardMemory;

/// A position in a request's segments.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    segments: Segments,
    index: usize,
    offset: usize,
}

impl Place {
    /// `at` bytes after the start of `segments`.
    pub(super) fn new(segments: Segments, at: u64) -> Self {
        let mut place = Self { segments, index: 0, offset: 0 };
        place.skip(at as usize);
        place
    }

    /// Goes on by `bytes`, at most to the end.
    pub(super) fn skip(&mut self, mut bytes: usize) {
        while bytes > 0 {
            let Some((_, length)) = self.next(bytes) else { return };
            bytes -= length;
        }
    }

    /// Takes the next contiguous range of at most `limit` bytes; `None` at the end.
    fn next(&mut self, limit: usize) -> Option<(*mut u8, usize)> {
        loop {
            let segment = self.segments.as_slice().get(self.index)?;
            let length = (segment.iov_len - self.offset).min(limit);
            let start = segment.iov_base.cast::<u8>().wrapping_add(self.offset);
            self.offset += length;
            if self.offset == segment.iov_len {
                self.index += 1;
                self.offset = 0;
            }
            if length > 0 || limit == 0 {
                return Some((start, length));
            }
        }
    }

    /// Copies `from` to here and goes on behind it.
    pub(super) fn fill(&mut self, mut from: &[u8]) {
        while !from.is_empty() {
            let Some((to, length)) = self.next(from.len()) else { return };
            // SAFETY: `to` and `length` lie in a segment of a request under way, which `Segments::new` promised to be
            // valid and not referenced; `length` is at most `from.len()`; card memory and our buffers are apart.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, length) };
            from = &from[length..];
        }
    }

    /// Zeroes `bytes` from here.
    pub(super) fn zero(&mut self, mut bytes: usize) {
        while bytes > 0 {
            let Some((to, length)) = self.next(bytes) else { return };
            // SAFETY: as in `fill`.
            unsafe { to.write_bytes(0, length) };
            bytes -= length;
        }
    }

    /// Copies what is here to `to`; returns how much there was.
    pub(super) fn take(&mut self, to: &mut [u8]) -> usize {
        let mut done = 0;
        while done < to.len() {
            let Some((from, length)) = self.next(to.len() - done) else { break };
            // SAFETY: as in `fill`, the other way; `done + length` is at most `to.len()`.
            unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr().add(done), length) };
            done += length;
        }
        done
    }

    /// Copies `bytes` from here to card memory at `to`.
    pub(super) fn take_to_card(&mut self, card: &CardMemory, mut to: usize, mut bytes: usize) {
        while bytes > 0 {
            let Some((from, length)) = self.next(bytes) else { return };
            let target = card.pointer(CardAddress(to as u32), length);
            // SAFETY: the source as in `fill`; `pointer` has checked that the target range is inside the mapping. The
            // log's memory belongs to no lane, so the two do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(from, target, length) };
            to += length;
            bytes -= length;
        }
    }
}

/// Lists of ranges in card memory that stand in for a request's segments: how the replay log submits what it holds.
#[derive(Debug)]
pub(super) struct CardRanges {
    lists: Box<[[libc::iovec; 2]]>,
}

// SAFETY: the addresses are those of a card memory that moves together with these lists (both belong to the log).
unsafe impl Send for CardRanges {}

impl CardRanges {
    /// Room for `count` lists.
    pub(super) fn new(count: usize) -> Self {
        let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        Self { lists: vec![[empty; 2]; count].into_boxed_slice() }
    }

    /// Makes list `index` name the ranges `first` and `second` (start, length) of `card`. The result is good until the
    /// list is set again or the log is dropped; the channel ends a replay before either.
    pub(super) fn set(&mut self, index: usize, card: &CardMemory, ranges: [(usize, usize); 2]) -> Segments {
        let list = &mut self.lists[index];
        *list = ranges.map(|(start, length)| libc::iovec {
            iov_base: card.pointer(CardAddress(start as u32), length).cast(),
            iov_len: length,
        });
        // SAFETY: the list is boxed and the card memory mapped, so neither moves; `pointer` has checked the ranges; no
        // reference to card memory is ever made; for how long they stay, see above.
        unsafe { Segments::new(list.as_ptr(), 2) }
    }
}

/// A list of ranges for the kernel, reused from call to call so that none allocates.
#[derive(Debug)]
pub(super) struct Iovecs(Vec<libc::iovec>);

// SAFETY: between two calls the list is empty (`Ranges` empties it), so no address moves between threads.
unsafe impl Send for Iovecs {}

/// How many ranges go into one call; the kernel takes 1024 (`UIO_MAXIOV`).
const IOVECS: usize = 256;

impl Iovecs {
    /// An empty list.
    pub(super) fn new() -> Self {
        Self(Vec::with_capacity(IOVECS))
    }

    /// Starts a call's list.
    pub(super) fn begin(&mut self) -> Ranges<'_> {
        self.0.clear();
        Ranges { list: &mut self.0, bytes: 0, buffers: PhantomData }
    }
}

/// The list of one call. Borrows what is pushed until the call has been made.
pub(super) struct Ranges<'a> {
    list: &'a mut Vec<libc::iovec>,
    bytes: usize,
    buffers: PhantomData<&'a mut [u8]>,
}

impl<'a> Ranges<'a> {
    /// Bytes in the list.
    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether there is room for one more range.
    pub(super) fn has_room(&self) -> bool {
        self.list.len() < IOVECS
    }

    fn push(&mut self, start: *mut u8, length: usize) {
        self.list.push(libc::iovec { iov_base: start.cast(), iov_len: length });
        self.bytes += length;
    }

    /// Adds bytes to send.
    pub(super) fn push_source(&mut self, bytes: &'a [u8]) {
        self.push(bytes.as_ptr().cast_mut(), bytes.len());
    }

    /// Adds a buffer to receive into.
    pub(super) fn push_target(&mut self, buffer: &'a mut [u8]) {
        self.push(buffer.as_mut_ptr(), buffer.len());
    }

    /// Adds `bytes` at `place`, as far as the list has room (`keep` entries are left free). Returns how many it took.
    pub(super) fn push_place(&mut self, mut place: Place, bytes: usize, keep: usize) -> usize {
        let mut done = 0;
        while done < bytes && self.list.len() + keep < IOVECS {
            let Some((start, length)) = place.next(bytes - done) else { break };
            self.push(start, length);
            done += length;
        }
        done
    }

    /// Sends the list on a nonblocking socket. Returns how much the kernel took.
    pub(super) fn send(self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut message = message(self.list);
        // SAFETY: the message names a list of valid ranges: pushed buffers are borrowed for 'a, and segments belong to
        // requests under way. The kernel only reads them, and only during the call.
        let result =
            unsafe { libc::sendmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Receives into the list from a nonblocking socket.
    pub(super) fn receive(self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut message = message(self.list);
        // SAFETY: as in `send`; targets were pushed as exclusive borrows, and nobody references bytes of segments.
        let result = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}

impl Drop for Ranges<'_> {
    fn drop(&mut self) {
        self.list.clear();
    }
}

fn message(list: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: `msghdr` is plain integers and pointers, for which zeroes are valid: no name, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = list.as_mut_ptr();
    message.msg_iovlen = list.len();
    message
}
