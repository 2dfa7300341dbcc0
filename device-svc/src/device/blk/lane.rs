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
mod stop;
mod submit;

use std::sync::Arc;
use std::time::Duration;

use super::BlkShared;
use super::row::{ROWS_MAX, Row, RowQueue, Rows};
use crate::address::CardAddress;
use crate::backend::{BlockChannel, BlockFault, PayloadPlace};
use crate::clock::Moment;
use crate::device::pages::PAGE_BYTES;
use crate::device::queue::{Published, Queue, State};
use crate::device::{BlockLane, FaultReport, Lane, LaneQueue, Pages, QueueFault};
use crate::dma::{Direction, DmaEngine, HostMemory, Removed};
use crate::link::{QueuePosition, QueueStart};
use crate::metrics::{QueueCounters, RequestKind};
use crate::mirror::CardLayout;
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

// SAFETY: the addresses in a row's vectors mean memory that is shared with a VM or belongs to the lane's card memory, and
// both move with the lane; no other thread has them but the channel on the same reactor.
unsafe impl Send for Row {}

/// One virtqueue of a virtio-blk function.
pub struct BlkLane<E> {
    queue: Queue<E>,
    number: u32,
    features: u64,
    in_order: bool,
    payload: PayloadPlace,
    shared: Arc<BlkShared>,
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
    /// What the channel ended while the lane was still: see `stop`.
    late: Vec<(u16, Result<(), BlockFault>)>,
    /// It was still, and has not had a turn since it goes on.
    goes_on: bool,
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
        let count = start.size.min(ROWS_MAX);
        let rows = usize::from(count);
        let accepted = start.features;
        Ok(Self {
            queue: Queue::new(start, layout, counters, report, engine)?,
            number: 0,
            features: accepted,
            in_order: accepted & features::IN_ORDER != 0,
            payload,
            shared,
            rows: Rows::new(count),
            row_memory,
            pages,
            landing: RowQueue::new(),
            ready: RowQueue::new(),
            throttled: [RowQueue::new(), RowQueue::new()],
            throttled_until: None,
            limited: false,
            held: Vec::with_capacity(rows),
            late: Vec::new(),
            goes_on: false,
            order: RowQueue::new(),
            retiring: RowQueue::new(),
            publishing: 0,
            sequence: 0,
        })
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
        if self.goes_on {
            self.go_on(now)?;
            did = true;
        }
        if let State::HandingOver(_) = self.queue.state {
            return Ok(self.hand_on(now, chains_max)? || did);
        }
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
        if self.queue.wants_fetch() && (self.queue.state != State::Running || self.ready.is_empty()) {
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

    fn throttled_in_the_way(&self) -> bool {
        self.queue.state != State::Running && self.throttled.iter().any(|queue| !queue.is_empty())
    }

    /// Whether the channel has requests of this lane.
    fn in_channel(&self) -> bool {
        // What it ended while the lane was still has come back already.
        let outstanding: usize = self.rows.iter().map(|row| row.outstanding as usize).sum();
        outstanding > self.late.len()
    }
}

impl<E: DmaEngine> BlockLane for BlkLane<E> {
    fn set_number(&mut self, number: u32) {
        self.number = number;
    }

    #[inline]
    fn turn(&mut self, now: Moment, chains_max: u16, channel: &mut dyn BlockChannel) -> bool {
        if !self.queue.begin_turn() {
            return false;
        }
        let worked = self.work(now, chains_max, channel);
        self.queue.end_turn(worked)
    }

    #[inline]
    fn complete(&mut self, now: Moment, row: u32, result: Result<(), BlockFault>) {
        if let Err(fault) = self.completed(now, row as u16, result) {
            self.queue.fail(fault);
        }
    }
}

impl<E: DmaEngine> Lane for BlkLane<E> {
    fn queue(&self) -> &dyn LaneQueue {
        &self.queue
    }

    fn queue_mut(&mut self) -> &mut dyn LaneQueue {
        &mut self.queue
    }

    #[inline]
    fn finish_turn(&mut self, _now: Moment) -> bool {
        if self.publishing == 0 && self.queue.is_publishing() {
            self.publishing = self.retiring.len();
        }
        let published = self.queue.publish();
        if published == Published::Batch {
            // Their rows are free: the driver can see that they have ended.
            for _ in 0..std::mem::take(&mut self.publishing) {
                if let Some(number) = self.retiring.pop_front() {
                    self.drop_row(number);
                }
            }
        }
        let did = published != Published::Nothing;
        if did {
            self.queue.count(self.rows.in_use());
        }
        did
    }

    fn arm(&mut self) -> Option<bool> {
        let blocked = !self.ready.is_empty() || self.rows.free_count() == 0;
        self.queue.arm(!self.landing.is_empty(), blocked, self.rows.in_use())
    }

    fn deadline(&self) -> Option<Moment> {
        match self.queue.state {
            State::Stopped | State::Abandoned => return None,
            // Payload in the VM's memory is waited for as long as it takes, which the channel ends.
            State::HandingOver(until) => return Some(until).filter(|_| self.payload == PayloadPlace::Card),
            State::Running | State::Stopping(_) | State::Failed => {}
        }
        let held = self.held.iter().map(|row| self.rows[*row].retry_at).min();
        let blocked = self.ready.front().map(|row| self.rows[row].popped_at.after(self.shared.io_timeout));
        [held, blocked, self.queue.stopping_until(), self.throttled_until].into_iter().flatten().min()
    }

    fn hand_over(&mut self, now: Moment) {
        self.queue.hand_over(now);
    }

    fn is_stopped(&mut self, now: Moment) -> bool {
        let is_done = self.has_come_to_rest(now);
        self.queue.is_stopped(is_done)
    }

    fn position(&self) -> QueuePosition {
        self.queue.mirror.position()
    }

    fn has_parked(&self) -> bool {
        !self.queue.ring_gone && (self.rows.in_use() > 0 || self.queue.mirror.is_resuming())
    }

    fn resume(&mut self, start: QueueStart) {
        self.queue.resume(start.port);
        self.goes_on = true;
    }

    fn abandon(&mut self) {
        self.drop_rows();
        for queue in [&mut self.landing, &mut self.ready, &mut self.order, &mut self.retiring] {
            queue.clear();
        }
        self.throttled.iter_mut().for_each(RowQueue::clear);
        self.held.clear();
        self.queue.abandon();
        self.queue.counters.held.set(0);
    }

    fn is_let_go(&mut self) -> bool {
        (self.payload == PayloadPlace::Card || !self.in_channel()) && self.queue.mirror.engine().is_idle()
    }

    fn is_drained(&mut self) -> bool {
        !self.in_channel() && self.queue.mirror.engine().is_idle()
    }

    fn offer_memory(&mut self, memory: &Arc<HostMemory>) -> bool {
        if !self.queue.may_change_memory(!self.landing.is_empty()) {
            return false;
        }
        if self.payload == PayloadPlace::InPlace {
            let old = self.queue.mirror.engine_ref().memory();
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
        self.queue.mirror.set_memory(Arc::clone(memory));
        true
    }

    fn let_go(&mut self, removed: &Removed) -> bool {
        let in_place = self.payload == PayloadPlace::InPlace;
        let touches =
            |row: &Row| row.data.iter().any(|segment| removed.touches(segment.address, segment.length.into()));
        // What is lent; copies are the engine's affair.
        let lent = in_place && self.rows.iter().any(|row| row.outstanding > 0 && touches(row));
        !lent && self.queue.mirror.engine().let_go(removed)
    }
}

#[cfg(test)]
mod tests;
