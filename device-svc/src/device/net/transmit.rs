//! The transmitting queue of a pair: a VM's frames, sent in order.
//!
//! ```text
//!   rows:   popped ────── asked ─────────── sent ────────── retired
//!           │ wait for    │ first bytes     │ used entries  │ free
//!           │ card memory │ on their way    │ staged        │
//! ```
//!
//! The first bytes of a frame, its header and the headers of its protocols, are copied into the row and read there only: the VM may
//! change its memory at any time. What is behind them stays where it is until the channel takes the frame, or, where memory is not
//! lent, is copied as well.
#![expect(unsafe_code, reason = "hands the addresses of frames to a channel")]

use std::sync::Arc;

use super::anti_spoofing::JUDGED_BYTES;
use super::filter::{BROADCAST, Octets};
use super::offered::{HASH_HEADER_BYTES, header_bytes, transmit_offloads};
use super::tally::Tally;
use super::{NetShared, ROWS_MAX};
use crate::address::{CardAddress, Iova};
use crate::backend::Segments;
use crate::backend::net::header::HEADER_BYTES;
use crate::backend::net::{
    BURST, Checksum, ETHERNET_BYTES, FRAME_BYTES_MAX, NetChannel, NetHeader, Offloads, Outgoing, RawNetHeader,
    VLAN_TAG_BYTES,
};
use crate::clock::Moment;
use crate::device::limit::Way;
use crate::device::pages::{PAGE_BYTES, PageRun, Pages};
use crate::device::queue::{Published, Queue};
use crate::device::{FaultReport, Lane, LaneQueue, NetLane, NetRole, QueueFault};
use crate::dma::{CardMemory, Direction, DmaEngine, Ticket};
use crate::link::{QueuePosition, QueueStart};
use crate::metrics::{DropReason, QueueCounters};
use crate::mirror::{CardLayout, FETCH_MAX};
use crate::virtqueue::{Chain, Segment};

/// Rows at most where copies land at once: two turns' frames, whose memory stays in the nearest cache.
const ROWS_AT_ONCE: u16 = 2 * FETCH_MAX;
/// Card memory of one row: the virtio header, and the first bytes of the frame.
const ROW_BYTES: u32 = 256;
const _: () = assert!(JUDGED_BYTES as u32 + HASH_HEADER_BYTES <= ROW_BYTES);
/// Card pages for frames that are copied as a whole: sixteen of the longest.
const COPY_PAGES: u32 = 272;

/// A frame of the VM's.
#[derive(Debug, Default)]
struct Row {
    id: u16,
    slots: u16,
    /// What the record of what is in flight calls it.
    entry: u16,
    /// Bytes of header and frame.
    bytes: u32,
    /// When its first bytes, or all, are here.
    ticket: Ticket,
    /// Its buffers behind what is in the row.
    rest: Vec<Segment>,
    /// Where the rest is, if it was copied.
    pages: Option<PageRun>,
}

/// A transmitting queue.
pub struct TransmitLane<E> {
    queue: Queue<E>,
    pair: u16,
    shared: Arc<NetShared>,
    rows: Box<[Row]>,
    row_memory: CardAddress,
    pages: Option<Pages>,
    /// How many rows have come this far; the counts run freely, and are taken modulo the number of rows.
    popped: u16,
    asked: u16,
    sent: u16,
    retired: u16,
    publishing: u16,
    header_bytes: u32,
    allowed: Offloads,
    /// What a burst is made of: ranges of memory, and how many of them each frame has.
    vectors: Vec<libc::iovec>,
    frames: Vec<Outgoing>,
    /// What holds as of this epoch; nothing before the first turn.
    epoch: Option<u32>,
    /// The channel took less than it was given.
    full: bool,
    throttled_until: Option<Moment>,
}

// SAFETY: the addresses in `vectors` and `frames` are used only within one turn.
unsafe impl<E: Send> Send for TransmitLane<E> {}

impl<E: DmaEngine> TransmitLane<E> {
    /// A lane for the queue of `start`, whose addresses have been checked.
    ///
    /// # Errors
    /// When there is no card memory.
    pub fn new(
        start: QueueStart,
        pair: u16,
        shared: Arc<NetShared>,
        counters: Arc<QueueCounters>,
        report: Arc<dyn FaultReport>,
        engine: impl FnOnce(CardMemory) -> E,
    ) -> std::io::Result<Self> {
        let accepted = start.features;
        let rows_max = if E::LATE { ROWS_MAX } else { ROWS_AT_ONCE };
        let rows = start.size.min(rows_max).next_power_of_two();
        let mut layout = CardLayout::default();
        let row_memory = layout.take(u32::from(rows) * ROW_BYTES);
        let copies = !E::LENDS || shared.settings.copy_payload;
        let pages = copies.then(|| Pages::new(layout.take_pages(COPY_PAGES * PAGE_BYTES), COPY_PAGES));
        let mut queue = Queue::new(start, layout, counters, report, engine)?;
        queue.mirror.only_reads();
        Ok(Self {
            queue,
            pair,
            shared,
            rows: (0..rows).map(|_| Row::default()).collect(),
            row_memory,
            pages,
            popped: 0,
            asked: 0,
            sent: 0,
            retired: 0,
            publishing: 0,
            header_bytes: header_bytes(accepted),
            allowed: transmit_offloads(accepted),
            vectors: Vec::with_capacity(4 * BURST),
            frames: Vec::with_capacity(BURST),
            epoch: None,
            full: false,
            throttled_until: None,
        })
    }

    const fn in_use(&self) -> u16 {
        self.popped.wrapping_sub(self.retired)
    }

    const fn is_landing(&self) -> bool {
        self.popped != self.sent
    }

    #[inline]
    const fn slot(&self, number: u16) -> usize {
        number as usize & (self.rows.len() - 1)
    }

    #[inline]
    const fn place(&self, number: u16) -> CardAddress {
        self.row_memory.add(self.slot(number) as u32 * ROW_BYTES)
    }

    fn work(&mut self, now: Moment, chains_max: u16, channel: &mut dyn NetChannel) -> Result<bool, QueueFault> {
        let mut did = false;
        if self.throttled_until.is_some_and(|until| until <= now) {
            self.throttled_until = None;
        }
        let free = self.rows.len() as u16 - self.in_use();
        // What is blocked goes first, and while it is blocked nothing more is popped.
        if !self.full && self.throttled_until.is_none() && self.queue.wants_fetch() {
            did |= self.fetch(free.min(chains_max))?;
        }
        if self.pages.is_some() {
            self.ask_for_all()?;
        }
        while self.asked != self.sent && self.throttled_until.is_none() {
            let before = self.sent;
            self.send(now, channel)?;
            did |= self.sent != before;
            if self.sent == before || self.full {
                break;
            }
        }
        Ok(did)
    }

    #[inline]
    fn fetch(&mut self, budget: u16) -> Result<bool, QueueFault> {
        let first = self.row_memory;
        let Self { queue, rows, popped, asked, header_bytes, pages, .. } = self;
        let mask = rows.len() - 1;
        let copies = pages.is_some();
        let mut bad = None;
        let fetched = queue.mirror.fetch(budget, |engine, chain| {
            let slot = usize::from(*popped) & mask;
            let row = &mut rows[slot];
            if chain.readable_bytes < *header_bytes {
                bad.get_or_insert(QueueFault::Request("a frame has no header"));
                return;
            }
            let taken = take_chain(row, chain, engine, first.add(slot as u32 * ROW_BYTES));
            if let Err(fault) = taken {
                bad.get_or_insert(fault);
                return;
            }
            *popped = popped.wrapping_add(1);
            if !copies {
                *asked = *popped;
            }
        });
        queue.mirror.engine().submit();
        let fetched = fetched?;
        // The frames before a bad one are sent; the queue stops all the same.
        if let Some(fault) = bad {
            return Err(fault);
        }
        queue.fetched(fetched)
    }

    /// Has the rest of each frame copied, as far as there is card memory.
    fn ask_for_all(&mut self) -> Result<(), QueueFault> {
        while self.asked != self.popped {
            let slot = self.slot(self.asked);
            let Self { queue, rows, pages, .. } = self;
            let row = &mut rows[slot];
            if !row.rest.is_empty()
                && let Some(pages) = pages
            {
                let bytes = row.rest.iter().map(|segment| segment.length).sum();
                if bytes > FRAME_BYTES_MAX {
                    // It will be dropped as too long, unseen.
                    row.rest.clear();
                } else {
                    let Some(run) = pages.take(bytes) else { break };
                    row.pages = Some(run);
                    let mut at = run.at;
                    for segment in row.rest.drain(..) {
                        queue.mirror.engine().read(segment.address, at, segment.length)?;
                        at = at.add(segment.length);
                    }
                }
                row.ticket = queue.mirror.engine().submit();
            }
            self.asked = self.asked.wrapping_add(1);
        }
        Ok(())
    }

    /// Sends the frames that are here, at most a burst.
    #[inline]
    fn send(&mut self, now: Moment, channel: &mut dyn NetChannel) -> Result<(), QueueFault> {
        let landed = self.queue.mirror.engine().landed()?;
        let link_up = self.shared.is_link_up();
        let whole_bytes_max = u32::from(self.shared.mtu()) + ETHERNET_BYTES + VLAN_TAG_BYTES;
        let is_limited = self.shared.is_limited();
        self.vectors.clear();
        self.frames.clear();
        // Where a list of ranges grows it moves, so frames get theirs when all are in it.
        let mut counts = [0u16; BURST];
        let mut number = self.sent;
        while number != self.asked && self.frames.len() < BURST {
            if self.rows[self.slot(number)].ticket > landed {
                break;
            }
            match self.frame(number, link_up, whole_bytes_max) {
                Ok((header, bytes)) => {
                    if is_limited && let Err(later) = self.shared.pass_limits(now, Way::Write, bytes) {
                        self.throttled_until = Some(later);
                        self.queue.counters.throttled.add(1);
                        break;
                    }
                    let before = self.vectors.len();
                    self.gather(number, bytes)?;
                    counts[self.frames.len()] = (self.vectors.len() - before) as u16;
                    self.frames.push(Outgoing { header, segments: Segments::NONE, bytes });
                }
                // Alone at the front it ends; otherwise the burst ends before it.
                Err(reason) if self.frames.is_empty() => {
                    self.queue.counters.net.drops.add(reason, 1);
                    self.end(number);
                    self.sent = number.wrapping_add(1);
                }
                Err(_) => break,
            }
            number = number.wrapping_add(1);
        }
        if self.frames.is_empty() {
            return Ok(());
        }
        let mut first = 0;
        for (frame, count) in self.frames.iter_mut().zip(counts) {
            let ranges = &self.vectors[first..first + usize::from(count)];
            // SAFETY: the list stays as it is until the next burst, and the ranges are card memory of this row or lent by the VM until
            // `transmit` has returned, which is as long as a channel looks at them.
            frame.segments = unsafe { Segments::new(ranges.as_ptr(), u32::from(count)) };
            first += usize::from(count);
        }
        let sent = channel.transmit(&self.frames);
        self.full = sent.taken < self.frames.len();
        let mut tally = Tally::default();
        if sent.lost > 0 {
            self.queue.counters.net.drops.add(DropReason::UplinkFull, sent.lost as u64);
        }
        let first = self.sent;
        for index in 0..self.frames.len() {
            let number = first.wrapping_add(index as u16);
            self.give_back(number);
            if index >= sent.taken {
                continue;
            }
            if index + sent.lost < sent.taken {
                let start = self.place(number).add(self.header_bytes);
                let destination = self.queue.mirror.engine_ref().card().get::<Octets>(start);
                let frame = &self.frames[index];
                tally.frame(&frame.header, destination, frame.bytes);
            }
            self.end(number);
            self.sent = number.wrapping_add(1);
        }
        tally.add_to(&self.queue.counters.net);
        Ok(())
    }

    /// Sends a frame of the card's own: the reverse address request that switches learn a station's place from.
    #[cold]
    fn announce(&self, channel: &mut dyn NetChannel) {
        let Some(address) = self.shared.take_announcement() else { return };
        let frame = announcement(address);
        let range = libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() };
        // SAFETY: the list and the frame outlive the call, which is as long as a channel looks at them.
        let segments = unsafe { Segments::new(&raw const range, 1) };
        channel.transmit(&[Outgoing { header: NetHeader::DONE, segments, bytes: frame.len() as u32 }]);
    }

    /// What a row's frame asks for, and how long it is; or why it is not sent. One that is not to be cut has at most
    /// `whole_bytes_max` bytes.
    #[inline]
    fn frame(&self, number: u16, link_up: bool, whole_bytes_max: u32) -> Result<(NetHeader, u32), DropReason> {
        let row = &self.rows[self.slot(number)];
        let bytes = row.bytes - self.header_bytes;
        if !link_up {
            return Err(DropReason::LinkDown);
        }
        if bytes < ETHERNET_BYTES {
            return Err(DropReason::BadHeader);
        }
        let mut judged = 0;
        if let Some(rules) = &self.shared.settings.anti_spoofing {
            let start = self.place(number).add(self.header_bytes);
            let first = self.queue.mirror.engine_ref().card().get::<[u8; JUDGED_BYTES]>(start);
            let first = &first[..JUDGED_BYTES.min(bytes as usize)];
            judged = rules.judge(self.shared.mac(), first).ok_or(DropReason::Spoofed)?;
        }
        // A header that is shorter has its last field left out, and that one means nothing here.
        let raw = self.queue.mirror.engine_ref().card().get::<RawNetHeader>(self.place(number));
        let header = NetHeader::parse(&raw, bytes, self.allowed).map_err(|_| DropReason::BadHeader)?;
        if let Checksum::Needed { start, offset } = header.checksum
            && usize::from(start) + usize::from(offset) < judged
        {
            return Err(DropReason::Spoofed);
        }
        let most = if header.segmentation.is_some() { FRAME_BYTES_MAX } else { whole_bytes_max };
        if bytes > most { Err(DropReason::TooLong) } else { Ok((header, bytes)) }
    }

    /// Appends the ranges of a row's frame.
    #[inline]
    fn gather(&mut self, number: u16, bytes: u32) -> Result<(), QueueFault> {
        let at = self.place(number).add(self.header_bytes);
        let slot = self.slot(number);
        let Self { queue, rows, vectors, header_bytes, .. } = self;
        let row = &rows[slot];
        let here = bytes.min(ROW_BYTES - *header_bytes);
        let engine = queue.mirror.engine();
        let start = engine.card().pointer(at, here as usize);
        vectors.push(libc::iovec { iov_base: start.cast(), iov_len: here as usize });
        if let Some(run) = row.pages {
            let rest = (bytes - here) as usize;
            let start = engine.card().pointer(run.at, rest);
            vectors.push(libc::iovec { iov_base: start.cast(), iov_len: rest });
        }
        for segment in &row.rest {
            engine.lend(segment.address, segment.length, Direction::FromHost, vectors)?;
        }
        Ok(())
    }

    /// The channel does not look at a row's frame any more.
    #[inline]
    fn give_back(&mut self, number: u16) {
        let slot = self.slot(number);
        for segment in &self.rows[slot].rest {
            self.queue.mirror.engine().give_back(segment.address, segment.length, false);
        }
    }

    /// A row's frame is done with.
    #[inline]
    fn end(&mut self, number: u16) {
        let slot = self.slot(number);
        let Self { queue, rows, pages, .. } = self;
        let row = &mut rows[slot];
        if let Some(pages) = pages
            && let Some(run) = row.pages.take()
        {
            pages.give_back(run);
        }
        queue.mirror.stage_used(row.id, row.slots, 0, row.entry);
    }
}

/// A request by RARP (RFC 903) to everybody, which says nothing but where it comes from.
fn announcement(address: Octets) -> [u8; 60] {
    const HEAD: [u8; 10] = [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3];
    let mut frame = [0; 60];
    frame[..6].copy_from_slice(&BROADCAST);
    frame[6..12].copy_from_slice(&address);
    frame[12..22].copy_from_slice(&HEAD);
    frame[22..28].copy_from_slice(&address);
    frame[32..38].copy_from_slice(&address);
    frame
}

/// Keeps a chain, and asks for its first bytes.
#[inline]
fn take_chain<E: DmaEngine>(
    row: &mut Row,
    chain: Chain<'_>,
    engine: &mut E,
    at: CardAddress,
) -> Result<(), QueueFault> {
    row.id = chain.id;
    row.slots = chain.slots;
    row.entry = chain.entry;
    row.bytes = chain.readable_bytes;
    row.rest.clear();
    let mut filled = 0;
    if let Some(Segment { address, length }) = chain.segments.first() {
        // Only read: but the driver has just written the header, writes the next one there before it reads it, and where the buffer
        // is one of ours to fill by then its line is here already.
        engine.expect_write(*address, HEADER_BYTES.min(*length));
    }
    for segment in chain.segments {
        let here = segment.length.min(ROW_BYTES - filled);
        if here > 0 {
            engine.read(segment.address, at.add(filled), here)?;
            filled += here;
        }
        if segment.length > here {
            let address = Iova(segment.address.0.wrapping_add(u64::from(here)));
            row.rest.push(Segment { address, length: segment.length - here });
        }
    }
    row.ticket = engine.queued();
    Ok(())
}

impl<E: DmaEngine> NetLane for TransmitLane<E> {
    fn role(&self) -> NetRole {
        NetRole::Transmit(self.pair)
    }

    #[inline]
    fn turn(&mut self, now: Moment, chains_max: u16, channel: Option<&mut (dyn NetChannel + 'static)>) -> bool {
        let (true, Some(channel)) = (self.queue.begin_turn(), channel) else { return false };
        let epoch = self.shared.epoch();
        if self.epoch.replace(epoch) != Some(epoch) && self.pair == 0 {
            self.announce(channel);
        }
        let lost = channel.lost_later();
        if lost > 0 {
            self.queue.counters.net.drops.add(DropReason::UplinkFull, lost);
        }
        // It may have room again: a channel that has none is asked once in a turn.
        self.full = false;
        let worked = self.work(now, chains_max, channel);
        self.queue.end_turn(worked)
    }

    fn takes_frames(&self) -> bool {
        false
    }

    fn deliver(&mut self, _now: Moment, _frames: &[crate::backend::net::Incoming]) -> usize {
        0
    }
}

impl<E: DmaEngine> Lane for TransmitLane<E> {
    fn queue(&self) -> &dyn LaneQueue {
        &self.queue
    }

    fn queue_mut(&mut self) -> &mut dyn LaneQueue {
        &mut self.queue
    }

    #[inline]
    fn finish_turn(&mut self, _now: Moment) -> bool {
        if self.publishing == 0 && self.queue.is_publishing() {
            self.publishing = self.sent.wrapping_sub(self.retired);
        }
        let published = self.queue.publish();
        if published == Published::Batch {
            self.retired = self.retired.wrapping_add(std::mem::take(&mut self.publishing));
        }
        let did = published != Published::Nothing;
        if did {
            let in_use = self.in_use();
            self.queue.count(in_use);
        }
        did
    }

    fn arm(&mut self) -> Option<bool> {
        // A frame that the channel does not take waits for its descriptor, one that is throttled for its time.
        let blocked = self.full || self.throttled_until.is_some() || usize::from(self.in_use()) == self.rows.len();
        let landing = self.is_landing() && !blocked;
        let in_use = self.in_use();
        self.queue.arm(landing, blocked, in_use)
    }

    fn deadline(&self) -> Option<Moment> {
        self.throttled_until
    }

    fn is_stopped(&mut self, _now: Moment) -> bool {
        // Frames that were fetched and not sent are fetched again; nothing of them was seen by anybody.
        self.queue.is_stopped(true)
    }

    fn position(&self) -> QueuePosition {
        self.queue.mirror.position_before(self.popped.wrapping_sub(self.sent))
    }

    fn abandon(&mut self) {
        (self.asked, self.sent, self.retired) = (self.popped, self.popped, self.popped);
        self.publishing = 0;
        self.queue.abandon();
    }
}
