//! The first part of a lane's pipeline: from a popped chain to a request that is understood.

use super::super::request::{HEADER_BYTES, Header, ID_BYTES, Request, Status};
use super::super::row::{Row, Stage};
use super::{BlkLane, ROW_BYTES, ROW_ID_AT};
use crate::address::{CardAddress, Iova};
use crate::backend::BlockChannel;
use crate::clock::Moment;
use crate::device::QueueFault;
use crate::dma::DmaEngine;
use crate::virtqueue::{Chain, Segment};

impl<E: DmaEngine> BlkLane<E> {
    /// Pops what is there, as far as rows are free, and asks for the headers.
    #[inline]
    pub(super) fn fetch(&mut self, now: Moment, chains_max: u16) -> Result<bool, QueueFault> {
        let budget = self.rows.free_count().min(chains_max);
        let Self { queue, rows, landing, order, row_memory, in_order, sequence, .. } = self;
        let mut bad = None;
        let fetched = queue.mirror.fetch(budget, |engine, chain| {
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
            row.ticket = engine.queued();
            landing.push_back(number);
            if *in_order {
                order.push_back(number);
            }
        });
        self.queue.mirror.engine().submit();
        // The chains before a bad one are carried out; the queue stops all the same.
        let fetched = fetched?;
        if let Some(fault) = bad {
            return Err(fault);
        }
        self.queue.fetched(fetched)
    }

    /// Takes the rows whose copies have landed one stage further.
    #[inline(always)]
    pub(super) fn land(&mut self, now: Moment, channel: &mut dyn BlockChannel) -> Result<bool, QueueFault> {
        if self.landing.is_empty() {
            return Ok(false);
        }
        let landed = self.queue.mirror.engine().landed()?;
        while let Some(number) = self.landing.front() {
            if self.rows[number].ticket > landed {
                break;
            }
            self.landing.pop_front();
            let row = &mut self.rows[number];
            match row.stage {
                Stage::Header => self.decode(now, number, channel)?,
                Stage::Payload => {
                    row.stage = Stage::Ready;
                    self.ready.push_back(number);
                }
                // Copies of a request that was dropped in the meantime.
                _ => {}
            }
        }
        Ok(true)
    }

    /// The header is here: what is asked for?
    #[inline(always)]
    fn decode(&mut self, now: Moment, number: u16, channel: &mut dyn BlockChannel) -> Result<(), QueueFault> {
        let at = self.row_place(number);
        let header = self.queue.mirror.engine().card().get::<Header>(at);
        let row = &mut self.rows[number];
        row.kind = header.counted_as();
        if row.again && !self.shared.reissue {
            // Whether it was carried out nobody knows; the guest shall decide.
            return self.end(now, number, Status::IoError, 0);
        }
        match header.parse(&self.shared, row.readable, row.writable) {
            Ok(request) => row.request = request,
            Err(status) => return self.end(now, number, status, 0),
        }
        (row.outstanding, row.next_range, row.flushing) = (0, 0, false);
        match row.request {
            Request::GetId => {
                let at = self.row_place(number).add(ROW_ID_AT);
                self.queue.mirror.engine().card().put(at, self.shared.serial);
                let copied = self.copy_to_host(number, at, ID_BYTES);
                self.end(now, number, if copied.is_ok() { Status::Ok } else { Status::IoError }, ID_BYTES)?;
                copied
            }
            Request::Flush if !self.shared.volatile_cache => self.end(now, number, Status::Ok, 0),
            _ => self.admit(now, number, channel),
        }
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
    row.entry = chain.entry;
    row.again = chain.again;
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
    // The status is the last writable byte. Its line is asked for first: mostly the header is in it too.
    if let Some(last) = writable.last() {
        row.status_at = Iova(last.address.0.wrapping_add(u64::from(last.length) - 1));
        engine.expect_write(row.status_at, 1);
    }
    // The header is the first 16 readable bytes, in however many buffers (virtio 1.3, 2.7.4.1: no framing may be assumed).
    let mut left = HEADER_BYTES;
    let mut readable = readable;
    if let [header, data @ ..] = readable
        && header.length == HEADER_BYTES
    {
        // As nearly every driver has it.
        engine.read(header.address, header_at, HEADER_BYTES)?;
        (left, readable) = (0, data);
    }
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
    // A request has data one way at most; the other way is refused in `decode`, and get id alone writes what is here.
    if let [before @ .., last] = writable
        && row.readable == 0
    {
        for segment in before {
            row.data.push(*segment);
        }
        if last.length > 1 {
            row.data.push(Segment { address: last.address, length: last.length - 1 });
        }
    }
    Ok(())
}
