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
#![expect(unsafe_code, reason = "moves the addresses of a request's payload between threads")]

mod end;
mod fetch;
mod submit;

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use super::BlkShared;
use super::row::{ROWS_MAX, Row, RowQueue, Rows, Stage};
use crate::address::CardAddress;
use crate::backend::{BlockChannel, BlockFault, PayloadPlace};
use crate::clock::Moment;
use crate::device::pages::PAGE_BYTES;
use crate::device::{FaultReport, Lane, Pages, QueueFault};
use crate::dma::{Direction, DmaCounters, DmaEngine, HostMemory, Removed};
use crate::link::{QueuePort, QueuePosition, QueueStart};
use crate::metrics::{QueueCounters, RequestKind};
use crate::mirror::{CardLayout, Mirror};
use crate::virtqueue::{Segment, features};

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
    /// The driver is being asked to ring.
    Arming,
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
    /// It rang, and what for has not been found yet.
    rung: bool,
    /// The ring itself cannot be reached: nothing can be published any more.
    ring_gone: bool,
    features: u64,
    in_order: bool,
    payload: PayloadPlace,
    shared: Arc<BlkShared>,
    counters: Arc<QueueCounters>,
    /// What the engine had counted when it was last added to the counters.
    counted: DmaCounters,
    report: Arc<dyn FaultReport>,
    port: Box<dyn QueuePort>,
    rows: Rows,
    row_memory: CardAddress,
    pages: Pages,
    /// Rows whose copies to the card are on their way, in the order queued.
    landing: RowQueue,
    /// Rows to be submitted.
    ready: RowQueue,
    /// Rows that wait for a limit, reads and writes apart, so that one kind does not hold up the other.
    throttled: [RowQueue; 2],
    throttled_until: Option<Moment>,
    /// Whether there is a limit, as of this turn.
    limited: bool,
    /// Rows that wait to be submitted again.
    held: Vec<u16>,
    /// Rows in the order popped, where the driver wants them back in order.
    order: RowQueue,
    /// Rows whose used entries are staged, and how many of them the publication under way covers.
    retiring: RowQueue,
    publishing: u16,
    sequence: u64,
}

/// The card memory that a lane needs beside its mirror's: rows and payload.
#[must_use]
pub fn lane_card_layout(queue_size: u16, payload: PayloadPlace) -> (CardLayout, CardAddress, Pages) {
    let mut layout = CardLayout::default();
    let row_memory = layout.take(u32::from(queue_size.min(ROWS_MAX)) * ROW_BYTES);
    let pages = if payload == PayloadPlace::Card { COPY_PAGES } else { RANGE_PAGES };
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
        let payload = if E::LENDS { shared.payload } else { PayloadPlace::Card };
        let (layout, row_memory, pages) = lane_card_layout(start.size, payload);
        let mirror = Mirror::new(&start, layout, engine)?;
        let count = start.size.min(ROWS_MAX);
        let rows = usize::from(count);
        Ok(Self {
            mirror,
            queue: start.index,
            number: 0,
            state: State::Running,
            doorbell: Doorbell::Polled,
            rung: false,
            ring_gone: false,
            features: start.features,
            in_order: start.features & features::IN_ORDER != 0,
            payload,
            shared,
            counters,
            counted: DmaCounters::default(),
            report,
            port: start.port,
            rows: Rows::new(count),
            row_memory,
            pages,
            landing: RowQueue::new(),
            ready: RowQueue::new(),
            throttled: [RowQueue::new(), RowQueue::new()],
            throttled_until: None,
            limited: false,
            held: Vec::with_capacity(rows),
            order: RowQueue::new(),
            retiring: RowQueue::new(),
            publishing: 0,
            sequence: 0,
        })
    }

    #[cold]
    fn fail(&mut self, fault: QueueFault) {
        // Said once; a queue that is stopping goes on to stop.
        if self.state == State::Running {
            self.state = State::Failed;
            // Lost memory reads as zeroes, and what they seem to say is nobody's fault.
            let fault = if self.mirror.engine_ref().memory().is_lost() { QueueFault::MemoryLost } else { fault };
            self.report.queue_failed(self.queue, fault);
        }
    }

    const fn row_place(&self, row: u16) -> CardAddress {
        self.row_memory.add(row as u32 * ROW_BYTES)
    }

    fn drop_row(&mut self, number: u16) {
        if let Some(run) = self.rows[number].pages.take() {
            self.pages.give_back(run);
        }
        self.rows.give_back(number);
    }

    fn work(&mut self, now: Moment, chains_max: u16, channel: &mut dyn BlockChannel) -> Result<bool, QueueFault> {
        let mut did = false;
        self.limited = self.shared.limits.iter().any(|limit| limit.is_limited());
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
        if (self.state == State::Running && self.ready.is_empty() && !self.is_quiet()) || unfinished {
            did |= self.fetch(now, chains_max)?;
        }
        // Twice: where copies land at once, a write's header and then its payload are here in the same turn.
        for _ in 0..2 {
            if self.land(now, channel)? {
                did = true;
                self.submit_ready(now, channel)?;
            }
        }
        Ok(did)
    }

    /// Whether there is no reason to look at the ring. Where copies are late a look takes turns, and the lane could never sleep
    /// between two: so once it wants a doorbell it relies on that.
    fn is_quiet(&self) -> bool {
        E::LATE && self.doorbell != Doorbell::Polled && !self.rung && !self.mirror.is_fetching()
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

    /// Adds what has crossed since the last time. Counters live longer than lanes: a queue that starts again goes on counting.
    /// (An engine takes back the read of a poll that found nothing, so a difference may be negative.)
    #[inline]
    fn count(&mut self) {
        let dma = self.mirror.engine_ref().counters();
        let before = std::mem::replace(&mut self.counted, dma);
        let counters = &self.counters;
        counters.in_flight.set(u64::from(self.rows.in_use()));
        counters.dma_reads.add(dma.reads.wrapping_sub(before.reads));
        counters.dma_writes.add(dma.writes.wrapping_sub(before.writes));
        counters.dma_read_bytes.add(dma.read_bytes.wrapping_sub(before.read_bytes));
        counters.dma_write_bytes.add(dma.write_bytes.wrapping_sub(before.write_bytes));
        counters.dma_empty_polls.add(dma.empty_polls.wrapping_sub(before.empty_polls));
        counters.dma_lent.add(dma.lent.wrapping_sub(before.lent));
        counters.dma_lent_bytes.add(dma.lent_bytes.wrapping_sub(before.lent_bytes));
    }

    /// Whether the channel has requests of this lane.
    fn in_channel(&self) -> bool {
        self.rows.iter().any(|row| row.outstanding > 0)
    }
}

impl<E: DmaEngine> Lane for BlkLane<E> {
    fn set_number(&mut self, number: u32) {
        self.number = number;
    }

    #[inline]
    fn turn(&mut self, now: Moment, chains_max: u16, channel: &mut dyn BlockChannel) -> bool {
        if self.state == State::Abandoned {
            return false;
        }
        if self.state == State::Running && self.mirror.engine_ref().memory().is_lost() {
            self.fail(QueueFault::MemoryLost);
        }
        match self.work(now, chains_max, channel) {
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
        // Lost while the last turn looked at it: the next turn says so.
        if self.mirror.engine_ref().memory().is_lost() {
            return Some(false);
        }
        if self.doorbell == Doorbell::Armed {
            // Armed since it last found something; the driver rings for whatever came since.
            return Some(!E::LATE || self.is_quiet());
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
            Ok(None) => {
                self.doorbell = Doorbell::Arming;
                None
            }
            Ok(Some(false)) => {
                // A look is under way; it shall be the last before the doorbell is asked for.
                self.doorbell = if self.mirror.is_fetching() { Doorbell::Arming } else { Doorbell::Polled };
                Some(false)
            }
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
            self.rung = true;
            self.counters.doorbells.add(1);
        }
    }

    fn deadline(&self) -> Option<Moment> {
        let held = self.held.iter().map(|row| self.rows[*row].retry_at).min();
        let blocked = self.ready.front().map(|row| self.rows[row].popped_at.after(self.shared.io_timeout));
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
        !self.in_channel() || (self.payload == PayloadPlace::Card && now >= until)
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
        self.rung = false;
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
        self.throttled.iter_mut().for_each(RowQueue::clear);
        self.held.clear();
        self.mirror.engine().abandon();
        self.counters.in_flight.set(0);
        self.counters.held.set(0);
    }

    fn is_let_go(&mut self) -> bool {
        (self.payload == PayloadPlace::Card || !self.in_channel()) && self.mirror.engine().is_idle()
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
        if self.payload == PayloadPlace::InPlace {
            let old = self.mirror.engine_ref().memory();
            let unchanged = |row: &Row| {
                let way = if row.kind == RequestKind::Write { Direction::FromHost } else { Direction::ToHost };
                row.data.iter().all(|Segment { address, length, .. }| {
                    old.runs(*address, *length, way).eq(memory.runs(*address, *length, way))
                })
            };
            if self.rows.iter().any(|row| row.outstanding > 0 && !unchanged(row)) {
                return false;
            }
        }
        self.mirror.set_memory(Arc::clone(memory));
        true
    }

    fn let_go(&mut self, removed: &Removed) -> bool {
        let in_place = self.payload == PayloadPlace::InPlace;
        let touches =
            |row: &Row| row.data.iter().any(|segment| removed.touches(segment.address, segment.length.into()));
        // What is lent; copies are the engine's affair.
        let lent = in_place && self.rows.iter().any(|row| row.outstanding > 0 && touches(row));
        !lent && self.mirror.engine().let_go(removed)
    }
}

#[cfg(test)]
mod tests;
