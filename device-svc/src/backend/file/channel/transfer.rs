//! A read or write of what is left of a request: as an entry of the ring, or as a system call.
#![expect(unsafe_code, reason = "the kernel reads and writes the memory of requests under way")]

use std::os::fd::RawFd;

use io_uring::{opcode, squeue};

use super::FILE;
use crate::backend::{BlockOperation, BlockRequest};

/// Most bytes in one entry: its length has 32 bits, and the kernel does at most 2 GiB at a time.
const TRANSFER_BYTES_MAX: u64 = 1 << 30;

/// Most segments in one entry (`UIO_MAXIOV`).
const SEGMENTS_MAX: usize = 1024;

/// The memory of what is left of a request, or of as much as the kernel takes at a time.
enum Piece {
    None,
    One(*mut u8, u32),
    Many(*const libc::iovec, u32),
}

#[inline]
fn piece(request: &BlockRequest, done: u64) -> Piece {
    let segments = request.segments.as_slice();
    let (mut first, mut inside) = (0, done);
    while first < segments.len() && inside >= segments[first].iov_len as u64 {
        inside -= segments[first].iov_len as u64;
        first += 1;
    }
    let rest = &segments[first..];
    match rest {
        [] => Piece::None,
        // From the middle of a segment: to its end first, the whole ones behind it next.
        [segment, following @ ..] if inside > 0 || following.is_empty() => {
            let memory = segment.iov_base.cast::<u8>().wrapping_add(inside as usize);
            let length = (segment.iov_len as u64 - inside).min(request.length - done).min(TRANSFER_BYTES_MAX);
            Piece::One(memory, length as u32)
        }
        _ => Piece::Many(rest.as_ptr(), rest.len().min(SEGMENTS_MAX) as u32),
    }
}

/// A read or write as an entry of the ring.
#[inline]
pub(super) fn transfer(request: &BlockRequest, done: u64) -> squeue::Entry {
    let offset = request.offset + done;
    match (piece(request, done), request.operation == BlockOperation::Read) {
        // Less memory than the request says: a broken promise of the lane. Nothing transferred ends the request.
        (Piece::None, _) => opcode::Nop::new().build(),
        (Piece::One(memory, length), true) => opcode::Read::new(FILE, memory, length).offset(offset).build(),
        (Piece::One(memory, length), false) => opcode::Write::new(FILE, memory, length).offset(offset).build(),
        (Piece::Many(list, count), true) => opcode::Readv::new(FILE, list, count).offset(offset).build(),
        (Piece::Many(list, count), false) => opcode::Writev::new(FILE, list, count).offset(offset).build(),
    }
}

/// A read or write as a system call; the answer is as the ring's would be.
///
/// # Safety
/// The request is under way.
#[inline]
pub(super) unsafe fn call(file: RawFd, request: &BlockRequest, done: u64) -> i32 {
    let offset = (request.offset + done) as libc::off_t;
    // SAFETY: the pieces are parts of the request's segments, which the caller vouches for; the kernel checks the rest.
    let result = unsafe {
        match (piece(request, done), request.operation == BlockOperation::Read) {
            (Piece::None, _) => 0,
            (Piece::One(memory, length), true) => libc::pread(file, memory.cast(), length as usize, offset),
            (Piece::One(memory, length), false) => libc::pwrite(file, memory.cast(), length as usize, offset),
            (Piece::Many(list, count), true) => libc::preadv(file, list, count as i32, offset),
            (Piece::Many(list, count), false) => libc::pwritev(file, list, count as i32, offset),
        }
    };
    // At most 2 GiB are done at a time, so the count fits.
    if result < 0 { -nix::errno::Errno::last_raw() } else { result as i32 }
}
