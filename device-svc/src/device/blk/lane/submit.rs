//! The second part of a lane's pipeline: through the limits and into the channel, with the payload where the channel can take it.
#![expect(unsafe_code, reason = "hands the addresses of a request's payload to a channel")]

use super::super::request::{RANGE_BYTES, Range, Request, Status};
use super::super::row::{Row, Stage};
use super::{BlkLane, State};
use crate::address::CardAddress;
use crate::backend::{BlockChannel, BlockOperation, BlockRequest, PayloadPlace, Segments, Tag};
use crate::clock::Moment;
use crate::device::QueueFault;
use crate::device::limit::Way;
use crate::dma::{Direction, DmaEngine};

impl<E: DmaEngine> BlkLane<E> {
    /// Lets a request through its limits, or puts it in their queue; what came through goes to the channel at once where
    /// nothing waits before it.
    #[inline(always)]
    pub(super) fn admit(&mut self, now: Moment, number: u16, channel: &mut dyn BlockChannel) -> Result<(), QueueFault> {
        if self.limited
            && let Some((way, bytes)) = cost(&self.rows[number])
        {
            let queue = way as usize;
            if !self.throttled[queue].is_empty() || !self.pass_limits(now, way, bytes) {
                self.queue.counters.throttled.add(1);
                self.rows[number].stage = Stage::Throttled;
                self.throttled[queue].push_back(number);
                return Ok(());
            }
        }
        self.rows[number].stage = Stage::Ready;
        if !self.ready.is_empty() || !self.submit(now, number, channel)? {
            self.ready.push_back(number);
        }
        Ok(())
    }

    pub(super) fn pass_limits(&mut self, now: Moment, way: Way, bytes: u64) -> bool {
        for limit in &self.shared.limits {
            if let Err(later) = limit.ready(now, way) {
                self.throttled_until = Some(self.throttled_until.map_or(later, |until| until.min(later)));
                return false;
            }
        }
        for limit in &self.shared.limits {
            limit.pay(now, way, bytes);
        }
        true
    }

    #[cold]
    pub(super) fn release_throttled(&mut self, now: Moment) {
        let stopping = self.queue.state != State::Running;
        self.throttled_until = None;
        for way in [Way::Read, Way::Write] {
            while let Some(number) = self.throttled[way as usize].front() {
                let bytes = cost(&self.rows[number]).map_or(0, |(_, bytes)| bytes);
                // A queue that is to stop does not wait for its limit.
                if !stopping && !self.pass_limits(now, way, bytes) {
                    break;
                }
                self.throttled[way as usize].pop_front();
                self.rows[number].stage = Stage::Ready;
                self.ready.push_back(number);
            }
        }
    }

    #[cold]
    pub(super) fn release_held(&mut self, now: Moment) {
        let rows = &self.rows;
        let mut due: Vec<u16> = self.held.iter().copied().filter(|row| rows[*row].retry_at <= now).collect();
        self.held.retain(|row| rows[*row].retry_at > now);
        due.sort_by_key(|row| self.rows[*row].sequence);
        for number in due.into_iter().rev() {
            self.rows[number].stage = Stage::Ready;
            self.ready.push_front(number);
        }
        self.queue.counters.held.set(self.held.len() as u64);
    }

    /// Submits what is ready, until something must wait.
    #[inline]
    pub(super) fn submit_ready(&mut self, now: Moment, channel: &mut dyn BlockChannel) -> Result<bool, QueueFault> {
        let mut did = false;
        while let Some(number) = self.ready.front() {
            let going = self.submit(now, number, channel);
            if going == Ok(false) {
                break;
            }
            self.ready.pop_front();
            going?;
            did = true;
        }
        Ok(did)
    }

    /// Submits one request, which is in no queue or stays in front of the ready queue for the caller to take off. Returns false
    /// if it must wait there; where it has failed or waits for copies it need not.
    #[inline(always)]
    fn submit(&mut self, now: Moment, number: u16, channel: &mut dyn BlockChannel) -> Result<bool, QueueFault> {
        match self.rows[number].request {
            Request::Transfer { write, offset, bytes } => {
                self.submit_transfer(now, number, write, offset, bytes, channel)
            }
            Request::Flush => Ok(self.submit_one(number, BlockOperation::Flush, 0, 0, channel)),
            Request::Ranges { zero, count } => self.submit_ranges(now, number, zero, count, channel),
            // Answered in `decode`.
            Request::GetId => Ok(true),
        }
    }

    /// Hands one request to the channel. Returns whether it was taken.
    #[inline(always)]
    pub(super) fn submit_one(
        &mut self,
        number: u16,
        operation: BlockOperation,
        offset: u64,
        length: u64,
        channel: &mut dyn BlockChannel,
    ) -> bool {
        let row = &mut self.rows[number];
        let segments = if length == 0 || row.vectors.is_empty() {
            Segments::NONE
        } else {
            // SAFETY: the vectors belong to the row, which is not freed, and is not given other vectors, before this
            // request's completion; they name memory of the VM, which stays mapped while the row is in the channel (see
            // `offer_memory` and `is_let_go`), or of the lane's card memory, which lives as long as the lane; a lane is
            // dropped only after its channel has no request of it (see `is_drained`).
            unsafe { Segments::new(row.vectors.as_ptr(), row.vectors.len() as u32) }
        };
        let tag = Tag { lane: self.number, row: u32::from(number) };
        if channel.submit(BlockRequest { tag, operation, offset, length, segments }).is_err() {
            return false;
        }
        row.outstanding += 1;
        row.stage = Stage::InChannel;
        true
    }

    /// Submits a read or write: payload in place is lent for it, payload to be copied gets card memory first.
    #[inline(always)]
    pub(super) fn submit_transfer(
        &mut self,
        now: Moment,
        number: u16,
        write: bool,
        offset: u64,
        bytes: u32,
        channel: &mut dyn BlockChannel,
    ) -> Result<bool, QueueFault> {
        if self.rows[number].flushing {
            return Ok(self.submit_one(number, BlockOperation::Flush, 0, 0, channel));
        }
        let operation = if write { BlockOperation::Write } else { BlockOperation::Read };
        if self.payload == PayloadPlace::InPlace {
            let direction = if write { Direction::FromHost } else { Direction::ToHost };
            let row = &mut self.rows[number];
            row.vectors.clear();
            for segment in &row.data {
                if let Err(fault) =
                    self.queue.mirror.engine().lend(segment.address, segment.length, direction, &mut row.vectors)
                {
                    self.end(now, number, Status::IoError, 0)?;
                    return Err(fault.into());
                }
            }
            if self.submit_one(number, operation, offset, u64::from(bytes), channel) {
                return Ok(true);
            }
            self.give_back(number, false);
            return Ok(false);
        }
        if self.rows[number].pages.is_none() {
            let Some(run) = self.pages.take(bytes) else { return Ok(false) };
            let base = self.queue.mirror.engine().card().pointer(run.at, bytes as usize);
            let row = &mut self.rows[number];
            row.pages = Some(run);
            row.vectors.clear();
            row.vectors.push(libc::iovec { iov_base: base.cast(), iov_len: bytes as usize });
            if write {
                self.fetch_payload(now, number, run.at)?;
                // Where copies land at once, the row is back in the ready queue before the turn ends.
                return Ok(true);
            }
        }
        Ok(self.submit_one(number, operation, offset, u64::from(bytes), channel))
    }

    /// Copies the readable data of a request to card memory.
    pub(super) fn fetch_payload(&mut self, now: Moment, number: u16, to: CardAddress) -> Result<(), QueueFault> {
        let row = &mut self.rows[number];
        let mut at = to;
        for segment in &row.data {
            if let Err(fault) = self.queue.mirror.engine().read(segment.address, at, segment.length) {
                self.end(now, number, Status::IoError, 0)?;
                return Err(fault.into());
            }
            at = at.add(segment.length);
        }
        row.ticket = self.queue.mirror.engine().submit();
        row.stage = Stage::Payload;
        self.landing.push_back(number);
        Ok(())
    }

    /// Submits the ranges of a discard or write zeroes; they must be here first.
    pub(super) fn submit_ranges(
        &mut self,
        now: Moment,
        number: u16,
        zero: bool,
        count: u32,
        channel: &mut dyn BlockChannel,
    ) -> Result<bool, QueueFault> {
        let Some(run) = self.rows[number].pages else {
            let Some(run) = self.pages.take(count * RANGE_BYTES) else { return Ok(false) };
            self.rows[number].pages = Some(run);
            self.rows[number].vectors.clear();
            self.fetch_payload(now, number, run.at)?;
            return Ok(true);
        };
        // All are checked before the first is submitted: a request is refused whole.
        if self.rows[number].next_range == 0 {
            for index in 0..count {
                let range = self.queue.mirror.engine().card().get::<Range>(run.at.add(index * RANGE_BYTES));
                if let Err(status) = range.parse(&self.shared, zero) {
                    self.end(now, number, status, 0)?;
                    return Ok(true);
                }
            }
        }
        while self.rows[number].next_range < count {
            let at = run.at.add(self.rows[number].next_range * RANGE_BYTES);
            let range = self.queue.mirror.engine().card().get::<Range>(at);
            if let Ok((operation, offset, length)) = range.parse(&self.shared, zero) {
                let tag = Tag { lane: self.number, row: u32::from(number) };
                let request = BlockRequest { tag, operation, offset, length, segments: Segments::NONE };
                if length > 0 {
                    if channel.submit(request).is_err() {
                        return Ok(false);
                    }
                    self.rows[number].outstanding += 1;
                }
            } else {
                // The disk shrank in between.
                self.rows[number].status = Status::IoError;
            }
            self.rows[number].next_range += 1;
        }
        self.rows[number].stage = Stage::InChannel;
        if self.rows[number].outstanding == 0 {
            self.end_ranges(now, number)?;
        }
        Ok(true)
    }
}

/// What a request costs in its limits: flush and get id are free.
fn cost(row: &Row) -> Option<(Way, u64)> {
    match row.request {
        Request::Transfer { write: false, bytes, .. } => Some((Way::Read, u64::from(bytes))),
        Request::Transfer { write: true, bytes, .. } => Some((Way::Write, u64::from(bytes))),
        Request::Ranges { .. } => Some((Way::Write, 0)),
        Request::Flush | Request::GetId => None,
    }
}
