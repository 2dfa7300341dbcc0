//! The last part of a lane's pipeline: from a completion to a staged used entry, or to another attempt.

use super::super::request::{Request, Status};
use super::super::row::Stage;
use super::{BlkLane, RETRY_AFTER, ROW_STATUS_AT, State};
use crate::address::CardAddress;
use crate::backend::{BlockFault, PayloadPlace};
use crate::clock::Moment;
use crate::device::QueueFault;
use crate::dma::DmaEngine;

impl<E: DmaEngine> BlkLane<E> {
    /// The channel has no range of the request any more.
    pub(super) fn end_ranges(&mut self, now: Moment, number: u16) -> Result<(), QueueFault> {
        let row = &mut self.rows[number];
        if std::mem::take(&mut row.flushing) && row.status == Status::Ok {
            // A range was not done because the server is away: all go out again.
            row.next_range = 0;
            return self.failed(now, number, BlockFault::Away);
        }
        let status = row.status;
        self.end(now, number, status, 0)
    }

    /// Takes lent memory back.
    #[inline]
    pub(super) fn give_back(&mut self, number: u16, written: bool) {
        let row = &mut self.rows[number];
        for segment in &row.data {
            self.queue.mirror.engine().give_back(segment.address, segment.length, written);
        }
        row.vectors.clear();
    }

    /// Copies `bytes` of card memory into a request's writable data buffers.
    pub(super) fn copy_to_host(&mut self, number: u16, from: CardAddress, bytes: u32) -> Result<(), QueueFault> {
        let mut left = bytes;
        let mut at = from;
        for segment in &self.rows[number].data {
            let length = segment.length.min(left);
            if length == 0 {
                break;
            }
            self.queue.mirror.engine().write(at, segment.address, length)?;
            at = at.add(length);
            left -= length;
        }
        Ok(())
    }

    /// A request has ended: its status goes to the host, and its used entry is staged, behind those before it where order
    /// matters.
    pub(super) fn end(&mut self, now: Moment, number: u16, status: Status, written: u32) -> Result<(), QueueFault> {
        self.end_inline(now, number, status, written)
    }

    /// [`end`](Self::end) for the one place that nearly all requests pass.
    #[inline(always)]
    fn end_inline(&mut self, now: Moment, number: u16, status: Status, written: u32) -> Result<(), QueueFault> {
        let at = self.row_place(number).add(ROW_STATUS_AT);
        let row = &mut self.rows[number];
        row.stage = Stage::Done;
        row.written = written + 1;
        let kind = row.kind as usize;
        self.queue.counters.requests[kind].add(1);
        if status == Status::Ok {
            if let Request::Transfer { bytes, .. } = row.request {
                self.queue.counters.bytes[kind].add(u64::from(bytes));
            }
        } else {
            self.queue.counters.errors.add(1);
        }
        self.queue.counters.latency.record(now.ns_since(row.popped_at));
        let engine = self.queue.mirror.engine();
        engine.card().put(at, status as u8);
        let result = engine.write(at, row.status_at, 1);
        if self.in_order {
            while let Some(first) = self.order.front() {
                if self.rows[first].stage != Stage::Done {
                    break;
                }
                self.order.pop_front();
                self.stage_used(first);
            }
        } else {
            self.stage_used(number);
        }
        Ok(result?)
    }

    #[inline(always)]
    fn stage_used(&mut self, number: u16) {
        let row = &self.rows[number];
        self.queue.mirror.stage_used(row.id, row.slots, row.written, row.entry);
        self.retiring.push_back(number);
    }

    /// The row's request has ended in the channel with this result.
    #[inline(always)]
    pub(super) fn completed(
        &mut self,
        now: Moment,
        number: u16,
        result: Result<(), BlockFault>,
    ) -> Result<(), QueueFault> {
        debug_assert!(self.rows[number].outstanding > 0, "a completion without a request");
        if matches!(self.queue.state, State::Stopped | State::Abandoned) {
            self.ended_late(number, result);
            return Ok(());
        }
        let row = &mut self.rows[number];
        row.outstanding -= 1;
        let in_place = self.payload == PayloadPlace::InPlace;
        match row.request {
            Request::Transfer { write, bytes, .. } => {
                if in_place && !row.flushing {
                    self.give_back(number, !write && result.is_ok());
                }
                match result {
                    Ok(()) if write && !self.rows[number].flushing && self.shared.writes_through(self.features) => {
                        // The driver counts on a completed write to be durable.
                        self.rows[number].flushing = true;
                        self.rows[number].stage = Stage::Ready;
                        self.ready.push_back(number);
                        Ok(())
                    }
                    Ok(()) => {
                        let written = if write { 0 } else { bytes };
                        if let (false, Some(run)) = (write, self.rows[number].pages)
                            && let Err(fault) = self.copy_to_host(number, run.at, bytes)
                        {
                            self.end(now, number, Status::IoError, 0)?;
                            return Err(fault);
                        }
                        self.end_inline(now, number, Status::Ok, written)
                    }
                    Err(fault) => self.failed(now, number, fault),
                }
            }
            Request::Flush => match result {
                Ok(()) => self.end(now, number, Status::Ok, 0),
                Err(fault) => self.failed(now, number, fault),
            },
            Request::Ranges { .. } => {
                match result {
                    Ok(()) => {}
                    Err(BlockFault::Away) => row.flushing = true,
                    Err(fault) => row.status = status_of(fault),
                }
                // While some are still to be submitted, `submit_ranges` has the last word.
                if row.outstanding > 0 || row.stage == Stage::Ready { Ok(()) } else { self.end_ranges(now, number) }
            }
            Request::GetId => Ok(()),
        }
    }

    /// The channel could not do it: held while the server is away, within the volume's time limit, and an error after that.
    #[cold]
    pub(super) fn failed(&mut self, now: Moment, number: u16, fault: BlockFault) -> Result<(), QueueFault> {
        let row = &mut self.rows[number];
        if fault == BlockFault::Away && now < row.popped_at.after(self.shared.io_timeout) {
            row.stage = Stage::Held;
            row.retry_at = now.after(RETRY_AFTER);
            self.held.push(number);
            self.queue.counters.held.set(self.held.len() as u64);
            return Ok(());
        }
        self.end(now, number, status_of(fault), 0)
    }

    /// Ends requests that wait for a server that has been away for longer than the volume's time limit.
    #[cold]
    pub(super) fn expire(&mut self, now: Moment) -> Result<(), QueueFault> {
        while let Some(number) = self.ready.front() {
            if now < self.rows[number].popped_at.after(self.shared.io_timeout) || self.rows[number].outstanding > 0 {
                break;
            }
            self.ready.pop_front();
            self.end(now, number, Status::IoError, 0)?;
        }
        Ok(())
    }
}

const fn status_of(fault: BlockFault) -> Status {
    match fault {
        BlockFault::Away | BlockFault::Io => Status::IoError,
        BlockFault::Unsupported => Status::Unsupported,
    }
}
