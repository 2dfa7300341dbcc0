//! One virtqueue of a virtio-blk function: the pipeline from popped chain to used entry.
//!
//! ```text
//!   turn      fetch ─► header lands ─► decode ─► (limit) ─► (payload lands) ─► submit
//!   complete  ─► (submit the next part) ─► data and status to the host ─► stage used
//!   finish    publish ─► rows are free ─► interrupt
//! ```
//!
//! The lane stops popping while a request waits for a channel that is full or for card memory: back-pressure ends in the
//! guest's queue. A request that waits for a server that is away has given the VM's memory back.
#![expect(unsafe_code, reason = "hands the addresses of a request's payload to a channel")]

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use super::BlkShared;
use super::request::{HEADER_BYTES, Header, ID_BYTES, RANGE_BYTES, Range, Request, Status};
use super::row::{Row, Rows, Stage};
use crate::address::{CardAddress, Iova};
use crate::backend::{BlockChannel, BlockFault, BlockOperation, BlockRequest, PayloadPlace, Segments, Tag};
use crate::clock::Moment;
use crate::device::limit::Way;
use crate::device::pages::PAGE_BYTES;
use crate::device::{FaultReport, Lane, Pages, QueueFault};
use crate::dma::{Direction, DmaEngine, HostMemory};
use crate::link::{QueuePort, QueuePosition, QueueStart};
use crate::metrics::QueueCounters;
use crate::mirror::{CardLayout, Fetched, Mirror};
use crate::virtqueue::{Chain, Segment, features};

/// Requests under way at most, in a queue that is larger: more does not make storage faster, and each costs memory.
const ROWS_MAX: u16 = 1024;
/// Card memory of one row: header, then the answer to get id, then the status byte.
const ROW_BYTES: u32 = 64;
const ROW_ID_AT: u32 = 16;
const ROW_STATUS_AT: u32 = 40;
/// Card pages for payload that is copied: two of the largest requests, so that one can be fetched while one is written.
const COPY_PAGES: u32 = 2048;
/// Card pages for ranges of discards, where payload stays in place.
const RANGE_PAGES: u32 = 64;
/// How long a held request waits before it is submitted again.
const RETRY_AFTER: Duration = Duration::from_millis(20);
/// How long a stopping queue waits for what the storage server has not answered yet.
const STOP_PATIENCE: Duration = Duration::from_millis(500);

// SAFETY: the addresses in a row's vectors mean memory that is shared with a VM or belongs to the lane's card memory, and
// both move with the lane; no other thread has them but the channel on the same reactor.
unsafe impl Send for Row {}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Fetching and completing.
    Running,
    /// Completing; told to stop at a moment, by which it stops waiting for the server.
    Stopping(Moment),
    /// The guest's ring is broken: completing what can be, fetching nothing.
    Failed,
    /// Reset: what comes back from the channel is dropped.
    Abandoned,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Doorbell {
    /// The ring is polled.
    Polled,
    /// The driver was asked to ring.
    Armed,
}

/// One virtqueue of a virtio-blk function.
pub struct BlkLane<E> {
    mirror: Mirror<E>,
    queue: u16,
    number: u32,
    state: State,
    doorbell: Doorbell,
    /// The ring itself cannot be reached: nothing can be published any more.
    ring_gone: bool,
    features: u64,
    in_order: bool,
    shared: Arc<BlkShared>,
    counters: Arc<QueueCounters>,
    report: Arc<dyn FaultReport>,
    port: Box<dyn QueuePort>,
    rows: Rows,
    row_memory: CardAddress,
    pages: Pages,
    /// Rows whose copies to the card are on their way, in the order queued.
    landing: VecDeque<u16>,
    /// Rows to be submitted.
    ready: VecDeque<u16>,
    /// Rows that wait for a limit, reads and writes apart, so that one kind does not hold up the other.
    throttled: [VecDeque<u16>; 2],
    throttled_until: Option<Moment>,
    /// Rows that wait to be submitted again.
    held: Vec<u16>,
    /// Rows in the order popped, where the driver wants them back in order.
    order: VecDeque<u16>,
    /// Rows whose used entries are staged, and how many of them the publication under way covers.
    retiring: VecDeque<u16>,
    publishing: usize,
    sequence: u64,
}

/// The card memory that a lane needs beside its mirror's: rows and payload.
#[must_use]
pub fn lane_card_layout(queue_size: u16, shared: &BlkShared) -> (CardLayout, CardAddress, Pages) {
    let mut layout = CardLayout::default();
    let row_memory = layout.take(u32::from(queue_size.min(ROWS_MAX)) * ROW_BYTES);
    let pages = if shared.payload == PayloadPlace::Card { COPY_PAGES } else { RANGE_PAGES };
    let pages = Pages::new(layout.take_pages(pages * PAGE_BYTES), pages);
    (layout, row_memory, pages)
}

impl<E: DmaEngine> BlkLane<E> {
    /// A lane for the queue of `start`, whose addresses have been checked against the engine's memory.
    ///
    /// # Errors
    /// When there is no card memory.
    pub fn new(
        start: QueueStart,
        shared: Arc<BlkShared>,
        counters: Arc<QueueCounters>,
        report: Arc<dyn FaultReport>,
        engine: impl FnOnce(crate::dma::CardMemory) -> E,
    ) -> std::io::Result<Self> {
        let (layout, row_memory, pages) = lane_card_layout(start.size, &shared);
        let mirror = Mirror::new(&start, layout, engine)?;
        let count = start.size.min(ROWS_MAX);
        let rows = usize::from(count);
        Ok(Self {
            mirror,
            queue: start.index,
            number: 0,
            state: State::Running,
            doorbell: Doorbell::Polled,
            ring_gone: false,
            features: start.features,
            in_order: start.features & features::IN_ORDER != 0,
            shared,
            counters,
            report,
            port: start.port,
            rows: Rows::new(count),
            row_memory,
            pages,
            landing: VecDeque::with_capacity(rows),
            ready: VecDeque::with_capacity(rows),
            throttled: [VecDeque::with_capacity(rows), VecDeque::with_capacity(rows)],
            throttled_until: None,
            held: Vec::with_capacity(rows),
            order: VecDeque::with_capacity(rows),
            retiring: VecDeque::with_capacity(rows),
            publishing: 0,
            sequence: 0,
        })
    }

    #[cold]
    fn fail(&mut self, fault: QueueFault) {
        // Said once; a queue that is stopping goes on to stop.
        if self.state == State::Running {
            self.state = State::Failed;
            self.report.queue_failed(self.queue, fault);
        }
    }

    const fn row_place(&self, row: u16) -> CardAddress {
        self.row_memory.add(row as u32 * ROW_BYTES)
    }

    /// Pops what is there, as far as rows are free, and asks for the headers.
    #[inline]
    fn fetch(&mut self, now: Moment) -> Result<bool, QueueFault> {
        let budget = self.rows.free_count();
        let Self { mirror, rows, landing, order, row_memory, in_order, sequence, .. } = self;
        let mut bad = None;
        let first_new = landing.len();
        let fetched = mirror.fetch(budget, |engine, chain| {
            let number = rows.take();
            let row = &mut rows[number];
            row.stage = Stage::Header;
            if let Err(fault) = split_chain(row, chain, engine, row_memory.add(u32::from(number) * ROW_BYTES)) {
                bad.get_or_insert(fault);
                rows.give_back(number);
                return;
            }
            *sequence += 1;
            row.sequence = *sequence;
            row.popped_at = now;
            landing.push_back(number);
            if *in_order {
                order.push_back(number);
            }
        });
        let ticket = self.mirror.engine().submit();
        for index in first_new..self.landing.len() {
            self.rows[self.landing[index]].ticket = ticket;
        }
        // The chains before a bad one are carried out; the queue stops all the same.
        let fetched = fetched?;
        if let Some(fault) = bad {
            return Err(fault);
        }
        if matches!(fetched, Fetched::Chains(_)) && self.doorbell == Doorbell::Armed {
            self.doorbell = Doorbell::Polled;
            self.mirror.disarm_doorbell()?;
        }
        Ok(fetched != Fetched::Nothing)
    }

    /// Takes the rows whose copies have landed one stage further.
    #[inline]
    fn land(&mut self, now: Moment) -> Result<bool, QueueFault> {
        if self.landing.is_empty() {
            return Ok(false);
        }
        let landed = self.mirror.engine().landed()?;
        while let Some(&number) = self.landing.front() {
            if self.rows[number].ticket > landed {
                break;
            }
            self.landing.pop_front();
            match self.rows[number].stage {
                Stage::Header => self.decode(now, number)?,
                Stage::Payload => {
                    self.rows[number].stage = Stage::Ready;
                    self.ready.push_back(number);
                }
                // Copies of a request that was dropped in the meantime.
                _ => {}
            }
        }
        Ok(true)
    }

    /// The header is here: what is asked for?
    #[inline]
    fn decode(&mut self, now: Moment, number: u16) -> Result<(), QueueFault> {
        let at = self.row_place(number);
        let header = self.mirror.engine().card().get::<Header>(at);
        let row = &mut self.rows[number];
        row.kind = header.counted_as();
        match header.parse(&self.shared, row.readable, row.writable) {
            Ok(request) => row.request = request,
            Err(status) => return self.end(now, number, status, 0),
        }
        match row.request {
            Request::GetId => {
                let at = self.row_place(number).add(ROW_ID_AT);
                self.mirror.engine().card().put(at, self.shared.serial);
                let copied = self.copy_to_host(number, at, ID_BYTES);
                self.end(now, number, if copied.is_ok() { Status::Ok } else { Status::IoError }, ID_BYTES)?;
                copied
            }
            Request::Flush if !self.shared.volatile_cache => self.end(now, number, Status::Ok, 0),
            _ => {
                self.rows[number].outstanding = 0;
                self.rows[number].next_range = 0;
                self.rows[number].flushing = false;
                self.admit(now, number);
                Ok(())
            }
        }
    }

    /// Lets a request through its limits, or puts it in their queue.
    #[inline]
    fn admit(&mut self, now: Moment, number: u16) {
        if self.shared.limits.iter().any(|limit| limit.is_limited())
            && let Some((way, bytes)) = cost(&self.rows[number])
        {
            let queue = way as usize;
            if !self.throttled[queue].is_empty() || !self.pass_limits(now, way, bytes) {
                self.counters.throttled.add(1);
                self.rows[number].stage = Stage::Throttled;
                self.throttled[queue].push_back(number);
                return;
            }
        }
        self.rows[number].stage = Stage::Ready;
        self.ready.push_back(number);
    }

    fn pass_limits(&mut self, now: Moment, way: Way, bytes: u64) -> bool {
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
    fn release_throttled(&mut self, now: Moment) {
        let stopping = self.state != State::Running;
        self.throttled_until = None;
        for way in [Way::Read, Way::Write] {
            while let Some(&number) = self.throttled[way as usize].front() {
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
    fn release_held(&mut self, now: Moment) {
        let rows = &self.rows;
        let mut due: Vec<u16> = self.held.iter().copied().filter(|row| rows[*row].retry_at <= now).collect();
        self.held.retain(|row| rows[*row].retry_at > now);
        due.sort_by_key(|row| self.rows[*row].sequence);
        for number in due.into_iter().rev() {
            self.rows[number].stage = Stage::Ready;
            self.ready.push_front(number);
        }
        self.counters.held.set(self.held.len() as u64);
    }

    /// Submits what is ready, until something must wait.
    #[inline]
    fn submit_ready(&mut self, now: Moment, channel: &mut dyn BlockChannel) -> Result<bool, QueueFault> {
        let mut did = false;
        while let Some(&number) = self.ready.front() {
            let going = match self.rows[number].request {
                Request::Transfer { write, offset, bytes } => {
                    self.submit_transfer(now, number, write, offset, bytes, channel)?
                }
                Request::Flush => self.submit_one(number, BlockOperation::Flush, 0, 0, channel),
                Request::Ranges { zero, count } => self.submit_ranges(now, number, zero, count, channel)?,
                // Answered in `decode`.
                Request::GetId => true,
            };
            if !going {
                break;
            }
            did = true;
        }
        Ok(did)
    }

    /// Hands one request to the channel. Returns whether it was taken; then the row is off the ready queue.
    #[inline]
    fn submit_one(
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
        self.ready.pop_front();
        true
    }

    /// Submits a read or write: payload in place is lent for it, payload to be copied gets card memory first.
    #[inline]
    fn submit_transfer(
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
        if self.shared.payload == PayloadPlace::InPlace {
            let direction = if write { Direction::FromHost } else { Direction::ToHost };
            let row = &mut self.rows[number];
            row.vectors.clear();
            for segment in &row.data {
                if let Err(fault) =
                    self.mirror.engine().lend(segment.address, segment.length, direction, &mut row.vectors)
                {
                    self.ready.pop_front();
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
            let base = self.mirror.engine().card().pointer(run.at, bytes as usize);
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

    /// Copies the readable data of the request in front of the ready queue to card memory, and takes it off the queue.
    fn fetch_payload(&mut self, now: Moment, number: u16, to: CardAddress) -> Result<(), QueueFault> {
        self.ready.pop_front();
        let row = &mut self.rows[number];
        let mut at = to;
        for segment in &row.data {
            if let Err(fault) = self.mirror.engine().read(segment.address, at, segment.length) {
                self.end(now, number, Status::IoError, 0)?;
                return Err(fault.into());
            }
            at = at.add(segment.length);
        }
        row.ticket = self.mirror.engine().submit();
        row.stage = Stage::Payload;
        self.landing.push_back(number);
        Ok(())
    }

    /// Submits the ranges of a discard or write zeroes; they must be here first.
    fn submit_ranges(
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
                let range = self.mirror.engine().card().get::<Range>(run.at.add(index * RANGE_BYTES));
                if let Err(status) = range.parse(&self.shared, zero) {
                    self.ready.pop_front();
                    self.end(now, number, status, 0)?;
                    return Ok(true);
                }
            }
        }
        while self.rows[number].next_range < count {
            let at = run.at.add(self.rows[number].next_range * RANGE_BYTES);
            let range = self.mirror.engine().card().get::<Range>(at);
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
        self.ready.pop_front();
        self.rows[number].stage = Stage::InChannel;
        if self.rows[number].outstanding == 0 {
            self.end_ranges(now, number)?;
        }
        Ok(true)
    }

    /// The channel has no range of the request any more.
    fn end_ranges(&mut self, now: Moment, number: u16) -> Result<(), QueueFault> {
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
    fn give_back(&mut self, number: u16, written: bool) {
        let row = &mut self.rows[number];
        for segment in &row.data {
            self.mirror.engine().give_back(segment.address, segment.length, written);
        }
        row.vectors.clear();
    }

    /// Copies `bytes` of card memory into a request's writable data buffers.
    fn copy_to_host(&mut self, number: u16, from: CardAddress, bytes: u32) -> Result<(), QueueFault> {
        let mut left = bytes;
        let mut at = from;
        for segment in &self.rows[number].data {
            let length = segment.length.min(left);
            if length == 0 {
                break;
            }
            self.mirror.engine().write(at, segment.address, length)?;
            at = at.add(length);
            left -= length;
        }
        Ok(())
    }

    /// A request has ended: its status goes to the host, and its used entry is staged, behind those before it where order
    /// matters.
    #[inline]
    fn end(&mut self, now: Moment, number: u16, status: Status, written: u32) -> Result<(), QueueFault> {
        let at = self.row_place(number).add(ROW_STATUS_AT);
        let row = &mut self.rows[number];
        row.stage = Stage::Done;
        row.written = written + 1;
        let kind = row.kind as usize;
        self.counters.requests[kind].add(1);
        if status == Status::Ok {
            if let Request::Transfer { bytes, .. } = row.request {
                self.counters.bytes[kind].add(u64::from(bytes));
            }
        } else {
            self.counters.errors.add(1);
        }
        self.counters.latency.record(now.ns_since(row.popped_at));
        let engine = self.mirror.engine();
        engine.card().put(at, status as u8);
        let result = engine.write(at, row.status_at, 1);
        if self.in_order {
            while let Some(&first) = self.order.front() {
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

    #[inline]
    fn stage_used(&mut self, number: u16) {
        let row = &self.rows[number];
        self.mirror.stage_used(row.id, row.slots, row.written);
        self.retiring.push_back(number);
    }

    /// The row's request has ended in the channel with this result.
    #[inline]
    fn completed(&mut self, now: Moment, number: u16, result: Result<(), BlockFault>) -> Result<(), QueueFault> {
        let row = &mut self.rows[number];
        debug_assert!(row.outstanding > 0, "a completion without a request");
        row.outstanding -= 1;
        if self.state == State::Abandoned {
            if row.outstanding == 0 {
                self.drop_row(number);
            }
            return Ok(());
        }
        let in_place = self.shared.payload == PayloadPlace::InPlace;
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
                        self.end(now, number, Status::Ok, written)
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
    fn failed(&mut self, now: Moment, number: u16, fault: BlockFault) -> Result<(), QueueFault> {
        let row = &mut self.rows[number];
        if fault == BlockFault::Away && now < row.popped_at.after(self.shared.io_timeout) {
            row.stage = Stage::Held;
            row.retry_at = now.after(RETRY_AFTER);
            self.held.push(number);
            self.counters.held.set(self.held.len() as u64);
            return Ok(());
        }
        self.end(now, number, status_of(fault), 0)
    }

    /// Ends requests that wait for a server that has been away for longer than the volume's time limit.
    #[cold]
    fn expire(&mut self, now: Moment) -> Result<(), QueueFault> {
        while let Some(&number) = self.ready.front() {
            if now < self.rows[number].popped_at.after(self.shared.io_timeout) || self.rows[number].outstanding > 0 {
                break;
            }
            self.ready.pop_front();
            self.end(now, number, Status::IoError, 0)?;
        }
        Ok(())
    }

    fn drop_row(&mut self, number: u16) {
        if let Some(run) = self.rows[number].pages.take() {
            self.pages.give_back(run);
        }
        self.rows.give_back(number);
    }

    fn work(&mut self, now: Moment, channel: &mut dyn BlockChannel) -> Result<bool, QueueFault> {
        let mut did = false;
        if self.throttled_until.is_some_and(|until| until <= now) || self.throttled_in_the_way() {
            self.release_throttled(now);
            did = true;
        }
        if !self.held.is_empty() {
            self.release_held(now);
        }
        // What is blocked goes first, and while it is blocked nothing more is popped.
        if !self.ready.is_empty() {
            did |= self.submit_ready(now, channel)?;
            if !self.ready.is_empty() {
                self.expire(now)?;
            }
        }
        let unfinished = matches!(self.state, State::Stopping(_)) && self.mirror.is_fetching() && !self.ring_gone;
        if (self.state == State::Running && self.ready.is_empty()) || unfinished {
            did |= self.fetch(now)?;
        }
        // Twice: where copies land at once, a write's header and then its payload are here in the same turn.
        for _ in 0..2 {
            if self.land(now)? {
                did = true;
                self.submit_ready(now, channel)?;
            }
        }
        Ok(did)
    }

    fn throttled_in_the_way(&self) -> bool {
        self.state != State::Running && self.throttled.iter().any(|queue| !queue.is_empty())
    }

    /// Publishes what is staged; frees the rows of what has become visible.
    #[inline]
    fn publish(&mut self) -> Result<bool, QueueFault> {
        if self.ring_gone || !self.mirror.is_publishing() {
            return Ok(false);
        }
        if self.publishing == 0 {
            self.publishing = self.retiring.len();
        }
        if let Some(interrupt) = self.mirror.publish()? {
            for _ in 0..std::mem::take(&mut self.publishing) {
                if let Some(number) = self.retiring.pop_front() {
                    self.drop_row(number);
                }
            }
            if interrupt {
                self.port.raise_interrupt();
                self.counters.interrupts.add(1);
            }
        }
        Ok(true)
    }

    #[inline]
    fn count(&self) {
        let dma = self.mirror.engine_ref().counters();
        let counters = &self.counters;
        counters.in_flight.set(u64::from(self.rows.in_use()));
        counters.dma_reads.set(dma.reads);
        counters.dma_writes.set(dma.writes);
        counters.dma_read_bytes.set(dma.read_bytes);
        counters.dma_write_bytes.set(dma.write_bytes);
        counters.dma_empty_polls.set(dma.empty_polls);
        counters.dma_lent.set(dma.lent);
        counters.dma_lent_bytes.set(dma.lent_bytes);
    }

    /// Whether the channel has requests of this lane.
    fn in_channel(&self) -> bool {
        self.rows.iter().any(|row| row.outstanding > 0)
    }
}

/// Takes a chain apart into header, data and status, and asks for the header.
#[inline]
fn split_chain<E: DmaEngine>(
    row: &mut Row,
    chain: Chain<'_>,
    engine: &mut E,
    header_at: CardAddress,
) -> Result<(), QueueFault> {
    row.id = chain.id;
    row.slots = chain.slots;
    row.status = Status::Ok;
    row.data.clear();
    row.vectors.clear();
    if chain.readable_bytes < HEADER_BYTES {
        return Err(QueueFault::Request("a request has no room for its header"));
    }
    if chain.writable_bytes == 0 {
        return Err(QueueFault::Request("a request has no room for its status"));
    }
    let (readable, writable) = chain.segments.split_at(chain.readable);
    row.readable = chain.readable_bytes - HEADER_BYTES;
    row.writable = chain.writable_bytes - 1;
    // The header is the first 16 readable bytes, in however many buffers (virtio 1.3, 2.7.4.1: no framing may be assumed).
    let mut left = HEADER_BYTES;
    for segment in readable {
        let part = segment.length.min(left);
        if part > 0 {
            engine.read(segment.address, header_at.add(HEADER_BYTES - left), part)?;
            left -= part;
        }
        if segment.length > part {
            let address = Iova(segment.address.0.wrapping_add(u64::from(part)));
            row.data.push(Segment { address, length: segment.length - part });
        }
    }
    // The status is the last writable byte. A request has data one way at most; the other way is refused in `decode`, and
    // get id alone writes what is here.
    if let [before @ .., last] = writable {
        if row.readable == 0 {
            row.data.extend_from_slice(before);
            if last.length > 1 {
                row.data.push(Segment { address: last.address, length: last.length - 1 });
            }
        }
        row.status_at = Iova(last.address.0.wrapping_add(u64::from(last.length) - 1));
    }
    Ok(())
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

const fn status_of(fault: BlockFault) -> Status {
    match fault {
        BlockFault::Away | BlockFault::Io => Status::IoError,
        BlockFault::Unsupported => Status::Unsupported,
    }
}

impl<E: DmaEngine> Lane for BlkLane<E> {
    fn set_number(&mut self, number: u32) {
        self.number = number;
    }

    #[inline]
    fn turn(&mut self, now: Moment, channel: &mut dyn BlockChannel) -> bool {
        if self.state == State::Abandoned {
            return false;
        }
        if self.state == State::Running && self.mirror.engine_ref().memory().is_lost() {
            self.fail(QueueFault::MemoryLost);
        }
        match self.work(now, channel) {
            Ok(did) => did,
            Err(fault) => {
                // A ring that is broken while it stops is not fetched from again.
                self.ring_gone |= self.mirror.is_fetching() && self.state != State::Running;
                self.fail(fault);
                true
            }
        }
    }

    #[inline]
    fn complete(&mut self, now: Moment, row: u32, result: Result<(), BlockFault>) {
        if let Err(fault) = self.completed(now, row as u16, result) {
            self.fail(fault);
        }
    }

    #[inline]
    fn finish_turn(&mut self, _now: Moment) -> bool {
        if self.state == State::Abandoned {
            return false;
        }
        let did = match self.publish() {
            Ok(did) => did,
            Err(fault) => {
                self.ring_gone = true;
                self.fail(fault);
                true
            }
        };
        if did {
            self.count();
        }
        did
    }

    fn arm(&mut self) -> Option<bool> {
        if self.state != State::Running {
            return Some(self.landing.is_empty() && (self.ring_gone || !self.mirror.is_publishing()));
        }
        if self.doorbell == Doorbell::Armed {
            // Armed since it last found something; the driver rings for whatever came since.
            return Some(true);
        }
        if self.mirror.is_publishing() || !self.landing.is_empty() {
            return Some(false);
        }
        // A lane that is blocked or full fetches nothing, so it need not look; completions will wake it.
        if !self.ready.is_empty() || self.rows.free_count() == 0 {
            return Some(true);
        }
        match self.mirror.arm_doorbell() {
            Ok(Some(true)) => {
                self.doorbell = Doorbell::Armed;
                self.count();
                Some(true)
            }
            Ok(waiting) => waiting,
            Err(fault) => {
                self.fail(fault);
                Some(false)
            }
        }
    }

    fn doorbell_fd(&self) -> Option<RawFd> {
        self.port.doorbell_fd()
    }

    fn take_doorbell(&mut self) {
        if self.port.take_doorbell() {
            self.counters.doorbells.add(1);
        }
    }

    fn deadline(&self) -> Option<Moment> {
        let held = self.held.iter().map(|row| self.rows[*row].retry_at).min();
        let blocked = self.ready.front().map(|row| self.rows[*row].popped_at.after(self.shared.io_timeout));
        let stopping = match self.state {
            State::Stopping(until) => Some(until),
            _ => None,
        };
        [held, blocked, stopping, self.throttled_until].into_iter().flatten().min()
    }

    fn stop(&mut self, now: Moment) {
        if matches!(self.state, State::Running | State::Failed) {
            self.state = State::Stopping(now.after(STOP_PATIENCE));
        }
    }

    fn is_stopped(&mut self, now: Moment) -> bool {
        let State::Stopping(until) = self.state else { return true };
        let ring_busy = self.mirror.is_publishing() || self.mirror.is_fetching();
        if !self.landing.is_empty() || (ring_busy && !self.ring_gone) || !self.mirror.engine().is_idle() {
            return false;
        }
        !self.in_channel() || (self.shared.payload == PayloadPlace::Card && now >= until)
    }

    fn position(&self) -> QueuePosition {
        self.mirror.position()
    }

    fn has_parked(&self) -> bool {
        self.rows.in_use() > 0
    }

    fn resume(&mut self, start: QueueStart) {
        self.port = start.port;
        self.state = State::Running;
        self.doorbell = Doorbell::Polled;
    }

    fn abandon(&mut self) {
        self.state = State::Abandoned;
        let idle: Vec<u16> = (0..self.rows.in_use() + self.rows.free_count())
            .filter(|row| self.rows[*row].stage != Stage::Free && self.rows[*row].outstanding == 0)
            .collect();
        for number in idle {
            self.drop_row(number);
        }
        for queue in [&mut self.landing, &mut self.ready, &mut self.order, &mut self.retiring] {
            queue.clear();
        }
        self.throttled.iter_mut().for_each(VecDeque::clear);
        self.held.clear();
        self.counters.in_flight.set(0);
        self.counters.held.set(0);
    }

    fn is_let_go(&mut self) -> bool {
        (self.shared.payload == PayloadPlace::Card || !self.in_channel()) && self.mirror.engine().is_idle()
    }

    fn is_drained(&mut self) -> bool {
        !self.in_channel() && self.mirror.engine().is_idle()
    }

    fn offer_memory(&mut self, memory: &Arc<HostMemory>) -> bool {
        let running = matches!(self.state, State::Running | State::Stopping(_)) && !self.ring_gone;
        if running && (self.mirror.is_fetching() || self.mirror.is_publishing() || !self.landing.is_empty()) {
            return false;
        }
        if !self.mirror.engine().is_idle() {
            return false;
        }
        if self.shared.payload == PayloadPlace::InPlace {
            let old = self.mirror.engine_ref().memory();
            let unchanged = |segment: &Segment| {
                let (was, is) =
                    (old.runs(segment.address, segment.length), memory.runs(segment.address, segment.length));
                was.eq(is)
            };
            if self.rows.iter().any(|row| row.outstanding > 0 && !row.data.iter().all(unchanged)) {
                return false;
            }
        }
        self.mirror.set_memory(Arc::clone(memory));
        true
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod simulation;
