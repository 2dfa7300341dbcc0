//! The hot half of a file: each request is a row of a fixed slab, and one entry of the ring at a time.
//!
//! Reads and writes name the VM's own memory. It is not registered with the ring: every change of a VM's memory would have
//! to pass through here first.
//!
//! A file in memory (tmpfs) is read and written by plain system calls in `poll`. The kernel does not know whether such a
//! file would block and hands each request to a worker thread: 3300 ns a request where everything shares one core, against
//! 900 ns for the call itself, which only copies. So there a turn makes one call per request, and a bounded number of
//! them; the ring does what may take long (holes, zeroes).
//!
//! A request that the kernel did only in part goes on where it stopped, as one more entry. When a channel is dropped,
//! what the kernel has is waited for: a ring that is closed ends its requests later, in the background, and by then the
//! memory may be somebody else's.
#![expect(unsafe_code, reason = "the kernel reads and writes the memory of requests under way")]

mod transfer;

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::{opcode, squeue, types};

use self::transfer::{call, transfer};
use super::super::ring::{Ring, Users};
use super::super::{BackendError, BlockChannel, BlockFault, BlockOperation, BlockRequest, Completion, Segments, Tag};
use super::RING_USER;
use super::bounce::{self, Bounce, PART_BYTES};
use super::open::{DirectAlignment, OpenFile};
use crate::clock::Moment;

/// Requests under way at a time: enough for a fast disk, few enough that slab and ring stay under 64 KiB.
pub(super) const DEPTH: u32 = 256;

/// The volume's place among the ring's files.
const FILE: types::Fixed = types::Fixed(0);

/// Bytes that one poll copies by itself, before it lets the reactor turn its other lanes; the rest waits for the next turn.
const COPY_BYTES_MAX: u64 = 1 << 20;

/// Zeroes to write where a file system cannot make them itself.
#[repr(align(4096))]
struct Zeroes([u8; ZEROES_BYTES]);
const ZEROES_BYTES: usize = 64 << 10;
static ZEROES: Zeroes = Zeroes([0; ZEROES_BYTES]);

/// The zeroes, this often in one entry.
const ZEROES_COUNT: usize = 16;

const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// How a write-zeroes request is being done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Zeroing {
    Punch,
    ZeroRange,
    Write,
}

/// One request under way.
#[derive(Clone, Copy)]
struct Row {
    request: BlockRequest,
    /// Bytes of it that are done.
    done: u64,
    zeroing: Zeroing,
    /// The aligned memory it goes through.
    bounce: Option<u8>,
}

/// What to do with a request after the kernel has answered.
enum Next {
    End(Result<(), BlockFault>),
    Again,
}

/// A reactor's half of a file.
pub(super) struct FileChannel {
    ring: Ring,
    rows: Rows,
    /// Rows that need one more entry; a buffer of `poll`.
    again: Vec<u32>,
    /// Whether reads and writes are done by this thread; see the head.
    copies: bool,
    /// Rows that are.
    waiting: VecDeque<u32>,
}

/// The slab, and what all requests share.
struct Rows {
    rows: Box<[Row]>,
    free: Vec<u32>,
    file: Arc<OpenFile>,
    direct: Option<DirectAlignment>,
    bounce: Option<Bounce>,
    zeroes: Box<[libc::iovec; ZEROES_COUNT]>,
    /// What the file was found not to do.
    no_punch: bool,
    no_zero_range: bool,
    faults: u64,
}

// SAFETY: the pointers are to a static, and to memory of requests, whose protocol `Segments` states.
unsafe impl Send for Rows {}

impl FileChannel {
    pub(super) fn new(file: Arc<OpenFile>) -> Result<Self, BackendError> {
        let ring = Ring::new(file.as_fd(), DEPTH, RING_USER, Users::One)?;
        let nothing = BlockRequest {
            tag: Tag { lane: 0, row: 0 },
            operation: BlockOperation::Flush,
            offset: 0,
            length: 0,
            segments: Segments::NONE,
        };
        let row = Row { request: nothing, done: 0, zeroing: Zeroing::Write, bounce: None };
        let zeroes = libc::iovec { iov_base: (&raw const ZEROES).cast_mut().cast(), iov_len: ZEROES_BYTES };
        let direct = file.geometry().direct.filter(|direct| direct.address_mask | direct.length_mask != 0);
        Ok(Self {
            ring,
            copies: !file.geometry().volatile_cache,
            waiting: VecDeque::with_capacity(DEPTH as usize),
            rows: Rows {
                rows: vec![row; DEPTH as usize].into_boxed_slice(),
                free: (0..DEPTH).rev().collect(),
                file,
                direct,
                bounce: None,
                zeroes: Box::new([zeroes; ZEROES_COUNT]),
                no_punch: false,
                no_zero_range: false,
                faults: 0,
            },
            again: Vec::with_capacity(DEPTH as usize),
        })
    }

    /// Does what waits for this thread.
    fn copy(&mut self, completions: &mut Vec<Completion>) {
        let file = self.rows.file.as_fd().as_raw_fd();
        let mut bytes = 0;
        while bytes < COPY_BYTES_MAX {
            let Some(row) = self.waiting.pop_front() else { return };
            let Row { request, done, .. } = self.rows.rows[row as usize];
            // SAFETY: the request is under way, so its memory is valid; nothing but raw bytes goes to or comes from it.
            let result = unsafe { call(file, &request, done) };
            // Each call counts for something, or one that is interrupted over and over would hold the turn.
            bytes += (result.max(0) as u64).max(512);
            match self.rows.next(row, result) {
                Next::End(result) => completions.push(Completion { tag: self.rows.release(row), result }),
                Next::Again => self.waiting.push_front(row),
            }
        }
    }

    /// A descriptor gone bad, or a channel on two threads: a broken invariant of ours.
    #[cold]
    fn broken(&self, error: &std::io::Error) -> ! {
        panic!("io_uring of {}: {error}", self.rows.file.path().display());
    }

    #[inline]
    fn push(&mut self, row: u32) {
        let entry = self.rows.entry(row).user_data(u64::from(row));
        // SAFETY: the request's memory is valid until its completion has been polled or this channel has been dropped
        // (`Segments::new`); the completion follows that of the entry, and `drop` waits for all entries. Zeroes and bounce
        // memory live in `self.rows`, which is dropped after that.
        unsafe { self.ring.push(&entry) };
    }
}

impl BlockChannel for FileChannel {
    #[inline]
    fn submit(&mut self, request: BlockRequest) -> Result<(), BlockRequest> {
        let row = self.rows.take(request)?;
        let is_transfer = matches!(request.operation, BlockOperation::Read | BlockOperation::Write);
        if self.copies && is_transfer && self.rows.rows[row as usize].bounce.is_none() {
            self.waiting.push_back(row);
        } else {
            self.push(row);
        }
        Ok(())
    }

    fn poll(&mut self, _now: Moment, completions: &mut Vec<Completion>) {
        if !self.waiting.is_empty() {
            self.copy(completions);
        }
        if self.in_flight() == self.waiting.len() {
            return;
        }
        let before = completions.len();
        if let Err(error) = self.ring.exchange() {
            self.broken(&error);
        }
        for entry in self.ring.ended() {
            let row = entry.user_data() as u32;
            match self.rows.next(row, entry.result()) {
                Next::End(result) => {
                    completions.push(Completion { tag: self.rows.release(row), result });
                }
                Next::Again => self.again.push(row),
            }
        }
        if completions.len() > before || !self.again.is_empty() {
            self.ring.busy();
            while let Some(row) = self.again.pop() {
                self.push(row);
            }
        } else if let Err(error) = self.ring.idle() {
            self.broken(&error);
        }
    }

    #[inline]
    fn in_flight(&self) -> usize {
        DEPTH as usize - self.rows.free.len()
    }

    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.ring.fd())
    }

    /// What `poll` could not submit, or has to submit again, is due at once; and a reactor sleeps only when it will be
    /// woken.
    #[inline]
    fn deadline(&self) -> Option<Moment> {
        let may_sleep =
            self.waiting.is_empty() && self.ring.unsubmitted() == 0 && (self.ring.armed() || self.in_flight() == 0);
        (!may_sleep).then_some(Moment(0))
    }
}

impl Drop for FileChannel {
    fn drop(&mut self) {
        while self.in_flight() > self.waiting.len() + self.ring.unsubmitted() as usize {
            if let Err(error) = self.ring.wait() {
                // On the wrong thread nothing can be waited for, and going on would let the kernel write to memory that
                // is no longer ours.
                tracing::error!(path = %self.rows.file.path().display(), "cannot wait for requests under way: {error}");
                std::process::abort();
            }
            for entry in self.ring.ended() {
                self.rows.release(entry.user_data() as u32);
            }
        }
    }
}

impl Rows {
    /// A row for a request, or the request back.
    #[inline]
    fn take(&mut self, request: BlockRequest) -> Result<u32, BlockRequest> {
        let Some(&row) = self.free.last() else { return Err(request) };
        debug_assert!(
            !matches!(request.operation, BlockOperation::Read | BlockOperation::Write)
                || request.segments.as_slice().iter().map(|segment| segment.iov_len as u64).sum::<u64>()
                    == request.length,
            "a length that is not that of its segments"
        );
        let mut bounce = None;
        if let Some(direct) = self.direct
            && !is_aligned(direct, &request)
        {
            bounce = self.bounce.get_or_insert_with(Bounce::new).take();
            if bounce.is_none() {
                return Err(request);
            }
        }
        let zeroing = match request.operation {
            BlockOperation::WriteZeroes { unmap: true } if !self.no_punch => Zeroing::Punch,
            _ if !self.no_zero_range => Zeroing::ZeroRange,
            _ => Zeroing::Write,
        };
        self.free.pop();
        self.rows[row as usize] = Row { request, done: 0, zeroing, bounce };
        Ok(row)
    }

    /// Ends a row: its tag.
    #[inline]
    fn release(&mut self, row: u32) -> Tag {
        let ended = &mut self.rows[row as usize];
        if let (Some(part), Some(bounce)) = (ended.bounce.take(), &mut self.bounce) {
            bounce.give_back(part);
        }
        self.free.push(row);
        ended.request.tag
    }

    /// What the kernel shall do next for a row.
    #[inline]
    fn entry(&mut self, row: u32) -> squeue::Entry {
        let row = &self.rows[row as usize];
        let request = &row.request;
        let offset = request.offset + row.done;
        let left = request.length - row.done;
        match request.operation {
            BlockOperation::Read | BlockOperation::Write => match row.bounce {
                None => transfer(request, row.done),
                Some(part) => {
                    let memory = self.bounce.as_ref().expect("made before a part was taken").pointer(part);
                    let length = left.min(PART_BYTES as u64) as usize;
                    if request.operation == BlockOperation::Read {
                        opcode::Read::new(FILE, memory, length as u32).offset(offset).build()
                    } else {
                        // SAFETY: the request is under way, and the part has room for `length` bytes.
                        unsafe { bounce::gather(request.segments.as_slice(), row.done, length, memory) };
                        opcode::Write::new(FILE, memory, length as u32).offset(offset).build()
                    }
                }
            },
            // What is in memory alone is as durable as it gets.
            BlockOperation::Flush if !self.file.geometry().volatile_cache => opcode::Nop::new().build(),
            BlockOperation::Flush => opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(),
            // `fallocate` takes no length of 0; there is nothing to do.
            _ if left == 0 => opcode::Nop::new().build(),
            BlockOperation::Discard => allocate(offset, left, PUNCH_HOLE),
            BlockOperation::WriteZeroes { .. } => match row.zeroing {
                Zeroing::Punch => allocate(offset, left, PUNCH_HOLE),
                Zeroing::ZeroRange => allocate(offset, left, ZERO_RANGE),
                Zeroing::Write if left >= (ZEROES_COUNT * ZEROES_BYTES) as u64 => {
                    opcode::Writev::new(FILE, self.zeroes.as_ptr(), ZEROES_COUNT as u32).offset(offset).build()
                }
                Zeroing::Write => {
                    let length = left.min(ZEROES_BYTES as u64) as u32;
                    opcode::Write::new(FILE, ZEROES.0.as_ptr(), length).offset(offset).build()
                }
            },
        }
    }

    /// Takes the kernel's answer for a row.
    #[inline]
    fn next(&mut self, row: u32, result: i32) -> Next {
        let number = row as usize;
        let operation = self.rows[number].request.operation;
        if result < 0 {
            return self.refused(number, -result);
        }
        let transferred = match operation {
            BlockOperation::Read | BlockOperation::Write => true,
            BlockOperation::WriteZeroes { .. } => self.rows[number].zeroing == Zeroing::Write,
            BlockOperation::Flush | BlockOperation::Discard => false,
        };
        if !transferred {
            return Next::End(Ok(()));
        }
        self.transferred(number, result as u32)
    }

    /// `bytes` more of a row's bytes have been transferred.
    #[inline]
    fn transferred(&mut self, number: usize, bytes: u32) -> Next {
        let row = &mut self.rows[number];
        let request = &row.request;
        if let (BlockOperation::Read, Some(part)) = (request.operation, row.bounce) {
            let memory = self.bounce.as_ref().expect("made before a part was taken").pointer(part);
            let length = (bytes as usize).min(PART_BYTES);
            // SAFETY: the request is under way, and the part holds what was read.
            unsafe { bounce::scatter(memory.cast_const(), request.segments.as_slice(), row.done, length) };
        }
        // The kernel never transfers more than it was asked for; `min` keeps that from being a matter of trust.
        let done = (row.done + u64::from(bytes)).min(request.length);
        if done == request.length {
            row.done = done;
            return Next::End(Ok(()));
        }
        let block_bytes = u64::from(self.file.geometry().block_bytes);
        if request.operation == BlockOperation::Read {
            // Nothing more, or an end inside a block: the end of a file that is shorter than the volume. It reads as
            // zeroes, as the hole there would.
            if bytes == 0 || !done.is_multiple_of(block_bytes) {
                // SAFETY: the request is under way.
                unsafe { bounce::clear(request.segments.as_slice(), done) };
                return Next::End(Ok(()));
            }
            row.done = done;
            return Next::Again;
        }
        // Goes on at a whole block, as direct I/O wants it.
        let whole = done / block_bytes * block_bytes;
        if whole == row.done {
            return self.fault(number, libc::EIO);
        }
        row.done = whole;
        Next::Again
    }

    /// The kernel refused a row's entry.
    #[cold]
    fn refused(&mut self, number: usize, errno: i32) -> Next {
        let row = &mut self.rows[number];
        match (errno, row.request.operation) {
            (libc::EINTR | libc::EAGAIN, _) => Next::Again,
            (libc::EOPNOTSUPP, BlockOperation::WriteZeroes { .. }) if row.zeroing == Zeroing::Punch => {
                self.no_punch = true;
                row.zeroing = if self.no_zero_range { Zeroing::Write } else { Zeroing::ZeroRange };
                Next::Again
            }
            (libc::EOPNOTSUPP, BlockOperation::WriteZeroes { .. }) if row.zeroing == Zeroing::ZeroRange => {
                self.no_zero_range = true;
                row.zeroing = Zeroing::Write;
                Next::Again
            }
            (libc::EOPNOTSUPP, _) => Next::End(Err(BlockFault::Unsupported)),
            _ => self.fault(number, errno),
        }
    }

    #[cold]
    fn fault(&mut self, number: usize, errno: i32) -> Next {
        self.faults += 1;
        // Once per channel: a broken disk must not fill another one with logs.
        if self.faults == 1 {
            let request = &self.rows[number].request;
            tracing::warn!(
                path = %self.file.path().display(),
                operation = ?request.operation,
                offset = request.offset,
                length = request.length,
                "a request failed: {}; further failures of this channel are counted only",
                std::io::Error::from_raw_os_error(errno)
            );
        }
        Next::End(Err(BlockFault::Io))
    }
}

/// Whether direct I/O takes the request's memory as it is.
#[inline]
fn is_aligned(direct: DirectAlignment, request: &BlockRequest) -> bool {
    request.segments.as_slice().iter().all(|segment| {
        segment.iov_base as usize & direct.address_mask == 0 && segment.iov_len & direct.length_mask == 0
    })
}

fn allocate(offset: u64, length: u64, mode: i32) -> squeue::Entry {
    opcode::Fallocate::new(FILE, length).offset(offset).mode(mode).build()
}

#[cfg(test)]
mod tests;
