//! The receiving queue of a pair: a VM's empty buffers, filled with what comes from the network.
//!
//! ```text
//!   rows:   popped ──────── filled ──────── retired
//!           │ buffers       │ used entries  │ free
//!           │ that wait     │ staged        │
//! ```
#![expect(unsafe_code, reason = "promises that frames stay until their bytes are copied")]

use std::sync::Arc;

use virtio_bindings::virtio_net as spec;

use super::hashing::FrameHash;
use super::offered::{HASH_HEADER_BYTES, header_bytes, receive_offloads};
use super::staging::Staging;
use super::tally::Tally;
use super::{Chosen, NetShared, ROWS_MAX};
use crate::backend::net::header::HEADER_BYTES;
use crate::backend::net::{Checksum, ETHERNET_BYTES, Incoming, NetChannel, Offloads, VLAN_TAG_BYTES};
use crate::clock::Moment;
use crate::device::limit::Way;
use crate::device::queue::{Published, Queue, State};
use crate::device::{FaultReport, Lane, LaneQueue, NetLane, NetRole, QueueFault};
use crate::dma::{CardMemory, DmaEngine};
use crate::link::{QueuePosition, QueueStart};
use crate::metrics::{DropReason, QueueCounters};
use crate::mirror::CardLayout;
use crate::virtqueue::Segment;

/// Buffers that are fetched ahead: a turn's frames need no more, unless they are long.
const BUFFERS_AHEAD: u16 = 64;
/// Bytes of a buffer whose cache lines are asked for ahead: the header and the shortest frame. What follows in a longer one is written
/// in whole lines, several at once.
const BYTES_AHEAD: u32 = HEADER_BYTES + 64;

/// A chain of buffers.
#[derive(Clone, Debug, Default)]
struct Row {
    id: u16,
    slots: u16,
    /// What the record of what is in flight calls it.
    entry: u16,
    /// Bytes that it holds.
    writable: u32,
    /// Nearly all chains have one buffer.
    first: Segment,
    more: Vec<Segment>,
}

/// A receiving queue.
pub struct ReceiveLane<E> {
    queue: Queue<E>,
    pair: u16,
    shared: Arc<NetShared>,
    staging: Staging,
    rows: Box<[Row]>,
    /// How many rows have come this far; the counts run freely, and are taken modulo the number of rows.
    popped: u16,
    filled: u16,
    retired: u16,
    publishing: u16,
    /// A frame may take several chains.
    merges: bool,
    header_bytes: u32,
    negotiated: Offloads,
    /// What holds as of this epoch; nothing before the first turn.
    epoch: Option<u32>,
    chosen: Arc<Chosen>,
    undone: Offloads,
    /// Frames are brought: the link is up, and the driver uses the pair.
    open: bool,
    throttled_until: Option<Moment>,
}

impl<E: DmaEngine> ReceiveLane<E> {
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
        let mut layout = CardLayout::default();
        let staging = Staging::new::<E>(&mut layout);
        let accepted = start.features;
        let rows = start.size.min(ROWS_MAX).next_power_of_two();
        Ok(Self {
            queue: Queue::new(start, layout, counters, report, engine)?,
            pair,
            staging,
            rows: vec![Row::default(); usize::from(rows)].into_boxed_slice(),
            popped: 0,
            filled: 0,
            retired: 0,
            publishing: 0,
            merges: accepted & 1 << spec::VIRTIO_NET_F_MRG_RXBUF != 0,
            header_bytes: header_bytes(accepted),
            negotiated: receive_offloads(accepted),
            epoch: None,
            chosen: shared.chosen(),
            undone: Offloads::NONE,
            open: false,
            throttled_until: None,
            shared,
        })
    }

    const fn waiting(&self) -> u16 {
        self.popped.wrapping_sub(self.filled)
    }

    const fn in_use(&self) -> u16 {
        self.popped.wrapping_sub(self.retired)
    }

    #[inline]
    fn row(&self, number: u16) -> &Row {
        &self.rows[usize::from(number) & (self.rows.len() - 1)]
    }

    /// Follows what the driver chose, and the link.
    #[cold]
    fn follow(&mut self, epoch: u32, channel: &mut dyn NetChannel) {
        if self.epoch.replace(epoch).is_none() {
            // What has come for an earlier driver is not for this one.
            channel.enable(false);
        }
        self.chosen = self.shared.chosen();
        self.undone = self.chosen.undone.map_or(self.negotiated, |chosen| chosen.and(self.negotiated));
        self.open = self.shared.is_link_up() && self.pair < self.chosen.pairs;
        channel.leave_undone(self.undone);
        channel.enable(self.open);
    }

    fn work(&mut self, chains_max: u16) -> Result<bool, QueueFault> {
        let free = self.rows.len() as u16 - self.in_use();
        let full = self.waiting() >= BUFFERS_AHEAD && !self.queue.mirror.is_fetching();
        if full || !self.queue.wants_fetch() {
            return Ok(false);
        }
        let Self { queue, rows, popped, header_bytes, .. } = self;
        let mask = rows.len() - 1;
        let mut bad = None;
        let fetched = queue.mirror.fetch(free.min(chains_max), |engine, chain| {
            if chain.readable_bytes > 0 || chain.writable_bytes < *header_bytes {
                bad.get_or_insert(QueueFault::Request("a receive buffer is no place for a frame's header"));
                return;
            }
            let row = &mut rows[usize::from(*popped) & mask];
            row.id = chain.id;
            row.slots = chain.slots;
            row.entry = chain.entry;
            row.writable = chain.writable_bytes;
            row.first = chain.segments[0];
            row.more.clear();
            row.more.extend_from_slice(&chain.segments[1..]);
            // A frame comes soon, and its first bytes go here.
            engine.expect_write(row.first.address, BYTES_AHEAD.min(row.first.length));
            *popped = popped.wrapping_add(1);
        });
        queue.mirror.engine().submit();
        let fetched = fetched?;
        if let Some(fault) = bad {
            return Err(fault);
        }
        // Empty buffers are no work: what comes wakes the lane.
        self.queue.fetched(fetched)?;
        Ok(false)
    }

    /// Whether a frame may pass the limits; if not, until when it waits.
    #[cold]
    fn pass_limits(&mut self, now: Moment, bytes: u32) -> bool {
        match self.shared.pass_limits(now, Way::Read, bytes) {
            Ok(()) => true,
            Err(later) => {
                self.throttled_until = Some(later);
                self.queue.counters.throttled.add(1);
                false
            }
        }
    }

    /// Why a frame is not brought, if it is not; whole ones have `most` bytes.
    #[inline]
    fn refuses(&self, frame: &Incoming, most: u32) -> Option<DropReason> {
        if !self.open {
            return Some(DropReason::LinkDown);
        }
        if !self.chosen.filter.brings(frame.bytes()) {
            return Some(DropReason::NotForUs);
        }
        if !self.undone.cover(&frame.header) {
            return Some(DropReason::Offload);
        }
        (frame.header.segmentation.is_none() && frame.length() > most).then_some(DropReason::TooLong)
    }

    /// Chains that a frame needs of those that wait: none if they do not suffice.
    #[inline]
    fn chains_for(&self, bytes: u32) -> Option<u16> {
        if self.waiting() > 0 && self.row(self.filled).writable >= bytes {
            return Some(1);
        }
        let mut room = 0_u32;
        let most = if self.merges { self.waiting() } else { self.waiting().min(1) };
        for count in 0..most {
            // Each chain may say that it has nearly 4 GiB.
            room = room.saturating_add(self.row(self.filled.wrapping_add(count)).writable);
            if room >= bytes {
                return Some(count + 1);
            }
        }
        None
    }

    /// Whether a frame that finds no room now will never find any: all that the driver can add is here.
    fn never_fits(&self) -> bool {
        if self.merges { usize::from(self.in_use()) == self.rows.len() } else { self.waiting() > 0 }
    }

    /// Puts a frame into `chains` chains; it is there once the staging has been flushed.
    #[inline]
    fn fill(&mut self, frame: &Incoming, chains: u16) -> Result<(), QueueFault> {
        let mut undone = frame.header;
        if !self.undone.checksum {
            // To a driver that has not negotiated checksums the flag that says they are right means nothing.
            undone.checksum = Checksum::Unknown;
        }
        let raw = undone.to_raw(chains).to_bytes();
        let mut whole = [0; HASH_HEADER_BYTES as usize];
        let mut header = &raw[..];
        if self.header_bytes == HASH_HEADER_BYTES {
            whole[..raw.len()].copy_from_slice(&raw);
            if let Some(hashing) = &self.chosen.hashing {
                let FrameHash { value, report } = hashing.of(frame.bytes());
                whole[12..16].copy_from_slice(&value.to_le_bytes());
                whole[16..18].copy_from_slice(&report.to_le_bytes());
            }
            header = &whole;
        }
        header = &header[..self.header_bytes as usize];
        let mut bytes = frame.bytes();
        let Self { queue, staging, rows, filled, .. } = self;
        let mask = rows.len() - 1;
        let row = &rows[usize::from(*filled) & mask];
        let all = header.len() + bytes.len();
        // Nearly all frames fit one buffer.
        if chains == 1 && row.first.length as usize >= all {
            // SAFETY: the caller flushes before it returns the frames.
            unsafe { staging.put(queue.mirror.engine(), [header, bytes], row.first.address)? };
            queue.mirror.stage_used(row.id, row.slots, all as u32, row.entry);
            *filled = filled.wrapping_add(1);
            return Ok(());
        }
        for _ in 0..chains {
            let row = &rows[usize::from(*filled) & mask];
            let mut written = 0;
            for segment in std::iter::once(&row.first).chain(&row.more) {
                let room = segment.length as usize;
                let (first, header_left) = header.split_at(header.len().min(room));
                let (second, bytes_left) = bytes.split_at(bytes.len().min(room - first.len()));
                // SAFETY: as above.
                unsafe { staging.put(queue.mirror.engine(), [first, second], segment.address)? };
                written += (first.len() + second.len()) as u32;
                (header, bytes) = (header_left, bytes_left);
                if bytes.is_empty() {
                    break;
                }
            }
            queue.mirror.stage_used(row.id, row.slots, written, row.entry);
            *filled = filled.wrapping_add(1);
        }
        Ok(())
    }

    #[inline]
    fn take(&mut self, now: Moment, frames: &[Incoming]) -> Result<usize, QueueFault> {
        let mut tally = Tally::default();
        let taken = self.take_frames(now, frames, &mut tally);
        self.staging.flush(self.queue.mirror.engine());
        tally.add_to(&self.queue.counters.net);
        taken
    }

    #[inline]
    fn take_frames(&mut self, now: Moment, frames: &[Incoming], tally: &mut Tally) -> Result<usize, QueueFault> {
        let is_limited = self.shared.is_limited();
        let most = u32::from(self.shared.mtu()) + ETHERNET_BYTES + VLAN_TAG_BYTES;
        for (number, frame) in frames.iter().enumerate() {
            if let Some(reason) = self.refuses(frame, most) {
                self.queue.counters.net.drops.add(reason, 1);
                continue;
            }
            let needed = frame.length() + self.header_bytes;
            let Some(chains) = self.chains_for(needed) else {
                if self.never_fits() {
                    self.queue.counters.net.drops.add(DropReason::TooLong, 1);
                    continue;
                }
                return Ok(number);
            };
            if !self.staging.has_room(self.queue.mirror.engine(), needed)?
                || (is_limited && !self.pass_limits(now, frame.length()))
            {
                return Ok(number);
            }
            self.fill(frame, chains)?;
            // The filter brings nothing shorter than a destination.
            tally.frame(&frame.header, frame.bytes().first_chunk().copied().unwrap_or_default(), frame.length());
        }
        Ok(frames.len())
    }
}

impl<E: DmaEngine> NetLane for ReceiveLane<E> {
    fn role(&self) -> NetRole {
        NetRole::Receive(self.pair)
    }

    #[inline]
    fn turn(&mut self, now: Moment, chains_max: u16, channel: Option<&mut (dyn NetChannel + 'static)>) -> bool {
        if !self.queue.begin_turn() {
            return false;
        }
        let epoch = self.shared.epoch();
        if let Some(channel) = channel {
            if self.epoch != Some(epoch) {
                self.follow(epoch, channel);
            }
            channel.missed().add_to(&self.queue.counters.net.drops);
        }
        if self.throttled_until.is_some_and(|until| until <= now) {
            self.throttled_until = None;
        }
        let worked = self.work(chains_max);
        self.queue.end_turn(worked)
    }

    #[inline]
    fn takes_frames(&self) -> bool {
        self.queue.state == State::Running
            && self.throttled_until.is_none()
            && self.epoch.is_some()
            && (self.waiting() > 0 || !self.open)
    }

    #[inline]
    fn deliver(&mut self, now: Moment, frames: &[Incoming]) -> usize {
        match self.take(now, frames) {
            Ok(count) => count,
            Err(fault) => {
                self.queue.fail(fault);
                // Nobody will take them.
                frames.len()
            }
        }
    }
}

impl<E: DmaEngine> Lane for ReceiveLane<E> {
    fn queue(&self) -> &dyn LaneQueue {
        &self.queue
    }

    fn queue_mut(&mut self) -> &mut dyn LaneQueue {
        &mut self.queue
    }

    #[inline]
    fn finish_turn(&mut self, _now: Moment) -> bool {
        if self.publishing == 0 && self.queue.is_publishing() {
            self.publishing = self.filled.wrapping_sub(self.retired);
        }
        let published = self.queue.publish();
        if published == Published::Batch {
            self.retired = self.retired.wrapping_add(std::mem::take(&mut self.publishing));
        }
        let did = published != Published::Nothing;
        if did {
            let waiting = self.waiting();
            self.queue.count(waiting);
        }
        did
    }

    fn arm(&mut self) -> Option<bool> {
        // With buffers at hand it needs no doorbell: the network wakes it.
        let blocked = self.waiting() > 0;
        let waiting = self.waiting();
        self.queue.arm(false, blocked, waiting)
    }

    fn deadline(&self) -> Option<Moment> {
        self.throttled_until
    }

    fn is_stopped(&mut self, _now: Moment) -> bool {
        self.queue.is_stopped(true)
    }

    fn position(&self) -> QueuePosition {
        // Buffers that were fetched and not filled are fetched again.
        self.queue.mirror.position_before(self.waiting())
    }

    fn abandon(&mut self) {
        (self.filled, self.retired) = (self.popped, self.popped);
        self.publishing = 0;
        self.queue.abandon();
    }
}
