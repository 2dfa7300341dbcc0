//! The slab of requests: one row per request under way, each with an explicit stage.
//!
//! ```text
//!   Free ─► Header ─► (Payload) ─► Ready ─► InChannel ─► Done ─► Free
//!                        │          ▲ ▲         │
//!                        └──────────┘ └─ Held ◄─┘ the server is away
//!                              Throttled ┘
//! ```
//!
//! Rows and their lists keep their memory: after the first requests nothing is allocated.

use crate::address::Iova;
use crate::clock::Moment;
use crate::device::PageRun;
use crate::dma::Ticket;
use crate::metrics::RequestKind;
use crate::virtqueue::Segment;

use super::request::{Request, Status};

/// Requests under way at most, in a queue that is larger: more does not make storage faster, and each costs memory. A power of
/// two.
pub(super) const ROWS_MAX: u16 = 1024;

/// Where a request stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    /// No request.
    Free,
    /// Its header is on its way to the card.
    Header,
    /// Its payload is on its way to the card.
    Payload,
    /// It waits for a limit.
    Throttled,
    /// It waits to be submitted.
    Ready,
    /// The channel has it.
    InChannel,
    /// It waits to be submitted again.
    Held,
    /// It has ended, and waits for its place in order or to be published.
    Done,
}

/// One request. Its size is a power of two, so that its place is found by a shift.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Row {
    pub(super) stage: Stage,
    /// The chain's id and slots.
    pub(super) id: u16,
    pub(super) slots: u16,
    /// What the record of requests in flight calls it.
    pub(super) entry: u16,
    /// It was in flight when the service before this one died.
    pub(super) again: bool,
    /// Where the status byte goes.
    pub(super) status_at: Iova,
    pub(super) status: Status,
    /// Data bytes the driver can read and write.
    pub(super) readable: u32,
    pub(super) writable: u32,
    /// Bytes written to the guest, for the used entry.
    pub(super) written: u32,
    pub(super) kind: RequestKind,
    pub(super) request: Request,
    /// When the copies that the stage waits for have landed.
    pub(super) ticket: Ticket,
    /// The data buffers.
    pub(super) data: Vec<Segment>,
    /// Where the data is for the channel: lent or in card memory.
    pub(super) vectors: Vec<libc::iovec>,
    pub(super) pages: Option<PageRun>,
    /// Requests that the channel has of it: one, or one per range.
    pub(super) outstanding: u32,
    /// Ranges submitted so far.
    pub(super) next_range: u32,
    /// A write: it is in the cache, and a flush must follow before it is done. Ranges: one of them met a server that is away.
    pub(super) flushing: bool,
    pub(super) popped_at: Moment,
    /// When a held request is submitted again.
    pub(super) retry_at: Moment,
    /// A number that grows with each request: held requests go out again in the order in which they came.
    pub(super) sequence: u64,
}

impl Row {
    fn new() -> Self {
        Self {
            stage: Stage::Free,
            id: 0,
            slots: 0,
            entry: 0,
            again: false,
            status_at: Iova(0),
            status: Status::Ok,
            readable: 0,
            writable: 0,
            written: 0,
            kind: RequestKind::Other,
            request: Request::Flush,
            ticket: Ticket(0),
            data: Vec::with_capacity(2),
            vectors: Vec::with_capacity(2),
            pages: None,
            outstanding: 0,
            next_range: 0,
            flushing: false,
            popped_at: Moment(0),
            retry_at: Moment(0),
            sequence: 0,
        }
    }
}

/// Rows in the order in which they wait for something. It never grows: there is room for each row once.
#[derive(Debug)]
pub(super) struct RowQueue {
    rows: Box<[u16; ROWS_MAX as usize]>,
    /// Counts of rows taken and put; they run freely and are taken modulo the size.
    head: u16,
    tail: u16,
}

impl RowQueue {
    const MASK: u16 = ROWS_MAX - 1;

    pub(super) fn new() -> Self {
        Self { rows: Box::new([0; ROWS_MAX as usize]), head: 0, tail: 0 }
    }

    #[inline]
    pub(super) const fn is_empty(&self) -> bool {
        self.head == self.tail
    }

    #[inline]
    pub(super) const fn len(&self) -> u16 {
        self.tail.wrapping_sub(self.head)
    }

    #[inline]
    pub(super) fn front(&self) -> Option<u16> {
        (!self.is_empty()).then(|| self.rows[usize::from(self.head & Self::MASK)])
    }

    #[inline]
    pub(super) fn pop_front(&mut self) -> Option<u16> {
        let row = self.front()?;
        self.head = self.head.wrapping_add(1);
        Some(row)
    }

    #[inline]
    pub(super) fn push_back(&mut self, row: u16) {
        debug_assert!(self.len() < ROWS_MAX, "a row waits in one place once");
        self.rows[usize::from(self.tail & Self::MASK)] = row;
        self.tail = self.tail.wrapping_add(1);
    }

    pub(super) fn push_front(&mut self, row: u16) {
        debug_assert!(self.len() < ROWS_MAX, "a row waits in one place once");
        self.head = self.head.wrapping_sub(1);
        self.rows[usize::from(self.head & Self::MASK)] = row;
    }

    pub(super) const fn clear(&mut self) {
        self.head = self.tail;
    }
}

/// All rows of a lane, and which are free.
#[derive(Debug)]
pub(super) struct Rows {
    rows: Box<[Row]>,
    free: Vec<u16>,
}

impl Rows {
    pub(super) fn new(count: u16) -> Self {
        Self { rows: (0..count).map(|_| Row::new()).collect(), free: (0..count).rev().collect() }
    }

    #[inline]
    pub(super) const fn free_count(&self) -> u16 {
        self.free.len() as u16
    }

    #[inline]
    pub(super) const fn in_use(&self) -> u16 {
        (self.rows.len() - self.free.len()) as u16
    }

    /// Takes a free row; the caller has seen that there is one.
    #[inline]
    pub(super) fn take(&mut self) -> u16 {
        let row = self.free.pop().expect("the fetch budget is at most the number of free rows");
        debug_assert_eq!(self.rows[usize::from(row)].stage, Stage::Free);
        row
    }

    #[inline]
    pub(super) fn give_back(&mut self, row: u16) {
        debug_assert_ne!(self.rows[usize::from(row)].stage, Stage::Free, "a row ends once");
        self.rows[usize::from(row)].stage = Stage::Free;
        self.free.push(row);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| row.stage != Stage::Free)
    }
}

impl std::ops::Index<u16> for Rows {
    type Output = Row;
    #[inline]
    fn index(&self, row: u16) -> &Row {
        &self.rows[usize::from(row)]
    }
}

impl std::ops::IndexMut<u16> for Rows {
    #[inline]
    fn index_mut(&mut self, row: u16) -> &mut Row {
        &mut self.rows[usize::from(row)]
    }
}
