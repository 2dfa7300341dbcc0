//! Bytes of frames on their way from a channel to a VM's buffers.
//!
//! Where the VM's memory is mapped they are copied straight into it, those of a burst one after the other with nothing between: the
//! lines of its buffers lie in the caches of the VM's core as well, and only stores take them from there, as many at once as the
//! processor has such stores before it. Where copies land late a frame may be gone from its channel by then, so its bytes wait in card
//! memory: a stretch that is filled from the front, and from the front again once all has landed.
#![expect(unsafe_code, reason = "copies bytes into memory that is lent by a VM")]

use super::offered::HASH_HEADER_BYTES;
use crate::address::{CardAddress, Iova};
use crate::backend::net::BURST;

use crate::device::QueueFault;
use crate::dma::{Direction, DmaEngine, Ticket, copy};
use crate::mirror::CardLayout;

/// Card memory for what waits: four of the longest frames.
const STAGING_BYTES: u32 = 256 << 10;

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

/// A header, or none, and bytes that follow it, to be copied into memory that is lent.
#[derive(Clone, Copy, Debug)]
struct Put {
    header: [u8; HASH_HEADER_BYTES as usize],
    header_bytes: usize,
    bytes: *const u8,
    length: usize,
    start: *mut u8,
    to: Iova,
}

/// The stretch of card memory, and what is lent at the moment.
#[derive(Debug)]
pub(super) struct Staging {
    start: CardAddress,
    bytes: u32,
    filled: u32,
    last: Ticket,
    lent: Vec<libc::iovec>,
    puts: Vec<Put>,
}

// SAFETY: `lent` holds addresses only within one call of `put`, and `puts` only until `flush`, within one call of a lane.
unsafe impl Send for Staging {}

impl Staging {
    /// Takes what an engine of this kind needs from the card memory.
    pub(super) fn new<E: DmaEngine>(layout: &mut CardLayout) -> Self {
        let bytes = if direct::<E>() { 0 } else { STAGING_BYTES };
        let start = layout.take(bytes);
        let (lent, puts) = (Vec::with_capacity(4), Vec::with_capacity(BURST));
        Self { start, bytes, filled: 0, last: Ticket(0), lent, puts }
    }

    /// Whether so many bytes can be put now, as well as what was put before.
    pub(super) fn has_room<E: DmaEngine>(&mut self, engine: &mut E, bytes: u32) -> Result<bool, QueueFault> {
        if direct::<E>() {
            return Ok(true);
        }
        if self.filled > 0 && engine.landed()? >= self.last {
            self.filled = 0;
        }
        Ok(bytes <= self.bytes - self.filled)
    }

    /// Brings bytes to the VM, a header (or a part of one, or none) and what follows it in the same place. There is room: see
    /// [`has_room`](Self::has_room). They are there after [`flush`](Self::flush).
    ///
    /// # Safety
    /// `bytes` must stay as they are until then.
    #[inline]
    pub(super) unsafe fn put<E: DmaEngine>(
        &mut self,
        engine: &mut E,
        [header, bytes]: [&[u8]; 2],
        to: Iova,
    ) -> Result<(), QueueFault> {
        let length = (header.len() + bytes.len()) as u32;
        if !direct::<E>() {
            return self.stage(engine, [header, bytes], to);
        }
        if let Some(start) = engine.lend_whole(to, length, Direction::ToHost) {
            if self.puts.len() == BURST {
                self.flush(engine);
            }
            let (header_bytes, length) = (header.len(), bytes.len());
            assert!(header_bytes <= HASH_HEADER_BYTES as usize, "no header is longer");
            let mut kept = [0; HASH_HEADER_BYTES as usize];
            // SAFETY: as many bytes as the header has fit `kept`, as was checked just now.
            unsafe { copy(header.as_ptr(), kept.as_mut_ptr(), header_bytes) };
            self.puts.push(Put { header: kept, header_bytes, bytes: bytes.as_ptr(), length, start, to });
            return Ok(());
        }
        self.put_runs(engine, [header, bytes], to)
    }

    /// Copies what was put.
    #[inline]
    pub(super) fn flush<E: DmaEngine>(&mut self, engine: &mut E) {
        // One byte of each frame's first two lines: so few stores are all under way at once, and with them the lines. (A prefetch for
        // writing does not help with a line that both sides have.)
        for put in &self.puts {
            let line = LINE_BYTES - put.start as usize % LINE_BYTES;
            if let Some(inside) = line.checked_sub(put.header_bytes)
                && put.header_bytes > 0
                && inside < put.length
            {
                // SAFETY: the first byte and that at `line` are among those below, and get what they get there.
                unsafe {
                    put.start.write(put.header[0]);
                    put.start.add(line).write(put.bytes.add(inside).read());
                }
            }
        }
        for put in &self.puts {
            // SAFETY: as many mapped bytes of the VM's memory begin at `start` as header and bytes have together, lent by `put` and given
            // back below; the caller of `put` keeps `bytes` as they are. The VM's memory and the channel's never overlap.
            unsafe {
                copy(put.header.as_ptr(), put.start, put.header_bytes);
                copy(put.bytes, put.start.add(put.header_bytes), put.length);
            }
            engine.give_back(put.to, (put.header_bytes + put.length) as u32, true);
        }
        self.puts.clear();
    }

    /// Brings bytes by way of card memory.
    fn stage<E: DmaEngine>(&mut self, engine: &mut E, parts: [&[u8]; 2], to: Iova) -> Result<(), QueueFault> {
        let start = self.start.add(self.filled);
        let mut length = 0;
        for part in parts {
            engine.card().copy_in(start.add(length), part);
            length += part.len() as u32;
        }
        engine.write(start, to, length)?;
        self.filled += length;
        self.last = engine.queued();
        Ok(())
    }

    /// Brings bytes into memory that is mapped in several runs.
    #[cold]
    fn put_runs<E: DmaEngine>(&mut self, engine: &mut E, mut parts: [&[u8]; 2], to: Iova) -> Result<(), QueueFault> {
        let length = parts.iter().map(|part| part.len() as u32).sum();
        self.lent.clear();
        engine.lend(to, length, Direction::ToHost, &mut self.lent)?;
        for run in &self.lent {
            let mut done = 0;
            for part in &mut parts {
                let count = part.len().min(run.iov_len - done);
                // SAFETY: `lend` appended mapped ranges of the VM's memory, and `count` bytes of this one are left behind those that
                // are done; they are given back below. The VM's memory and the channel's never overlap.
                unsafe { copy(part.as_ptr(), run.iov_base.cast::<u8>().add(done), count) };
                *part = &part[count..];
                done += count;
            }
        }
        debug_assert!(parts.iter().all(|part| part.is_empty()), "what is lent is as long as was asked for");
        engine.give_back(to, length, true);
        Ok(())
    }
}

/// Whether bytes go straight to the VM.
const fn direct<E: DmaEngine>() -> bool {
    E::LENDS && !E::LATE
}
