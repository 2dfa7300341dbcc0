//! Bytes of frames on their way from a channel to a VM's buffers.
//!
//! Where the VM's memory is mapped they are copied straight into it. Where copies land late a frame may be gone from its channel by
//! then, so its bytes wait in card memory: a stretch that is filled from the front, and from the front again once all has landed.
#![expect(unsafe_code, reason = "copies bytes into memory that is lent by a VM")]

use crate::address::{CardAddress, Iova};
use crate::device::QueueFault;
use crate::dma::{Direction, DmaEngine, Ticket, copy};
use crate::mirror::CardLayout;

/// Card memory for what waits: four of the longest frames.
const STAGING_BYTES: u32 = 256 << 10;

/// The stretch of card memory, and what is lent at the moment.
#[derive(Debug)]
pub(super) struct Staging {
    start: CardAddress,
    bytes: u32,
    filled: u32,
    last: Ticket,
    lent: Vec<libc::iovec>,
}

// SAFETY: `lent` holds addresses only within one call of `put`.
unsafe impl Send for Staging {}

impl Staging {
    /// Takes what an engine of this kind needs from the card memory.
    pub(super) fn new<E: DmaEngine>(layout: &mut CardLayout) -> Self {
        let bytes = if direct::<E>() { 0 } else { STAGING_BYTES };
        let start = layout.take(bytes);
        Self { start, bytes, filled: 0, last: Ticket(0), lent: Vec::with_capacity(4) }
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

    /// Brings bytes to the VM, a header and what follows it in the same place, behind all that was brought before. There is room:
    /// see [`has_room`](Self::has_room).
    #[inline(always)]
    pub(super) fn put<E: DmaEngine>(
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
            // SAFETY: `length` mapped bytes of the VM's memory begin there, which `header` and `bytes` have together; they are given
            // back below. The VM's memory and the channel's never overlap.
            unsafe {
                copy(header.as_ptr(), start, header.len());
                copy(bytes.as_ptr(), start.add(header.len()), bytes.len());
            }
            engine.give_back(to, length, true);
            return Ok(());
        }
        self.put_runs(engine, [header, bytes], to)
    }

    /// The same by way of card memory.
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

    /// The same into memory that is mapped in several runs.
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
