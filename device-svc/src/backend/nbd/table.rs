//! Requests under way and the parts they are cut into, in rows that exist from the start: no request allocates.
//!
//! A *request* is the lane's; a *part* is one NBD command with its own cookie. A request has several parts where it is
//! longer than the server takes at once.

use std::collections::VecDeque;

use super::payload::Place;
use super::wire::{self, ProtocolError, RequestHeader};
use crate::backend::{BlockFault, BlockOperation, BlockRequest};

/// Requests under way at most, and parts at most. Enough for a queue of 256 that is full, and that four times over;
/// beyond it the lane waits, as with a full queue.
pub(super) const ROWS: usize = 1024;

/// How many gaps a reply's chunks may leave before they fill. A server that sends more of them out of order than this is
/// treated as broken, because what it makes us remember must have a bound.
const GAPS_MAX: usize = 1024;

/// Whose request it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Purpose {
    /// The row is free.
    Free,
    /// The lane's: its end is a completion.
    Lane,
    /// The channel's own flush, to empty the replay log.
    Flush,
    /// A record of the replay log, written again.
    Replay,
}

/// A request under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) purpose: Purpose,
    pub(super) request: BlockRequest,
    /// Bytes for which parts have been made.
    pub(super) issued: u64,
    /// Parts that have not ended.
    pub(super) parts: u32,
    /// The gravest fault of its parts so far.
    pub(super) fault: Option<BlockFault>,
    /// Whether room is reserved in the replay log.
    pub(super) reserved: bool,
    /// A write too large for the log: it is followed by a flush, and complete only after that.
    pub(super) flush_after: bool,
    /// For a flush: the log's mark when it was submitted.
    pub(super) mark: u64,
}

/// One NBD command.
#[derive(Debug)]
pub(super) struct Part {
    /// As it goes out.
    pub(super) header: RequestHeader,
    /// The row of its request.
    pub(super) request: u32,
    /// The connection it goes over.
    pub(super) connection: u32,
    /// Where in the request's segments its payload starts.
    pub(super) place: Place,
    /// Whether it has left in full, so that a reply may come.
    pub(super) sent: bool,
    /// `NBD_E*` of its reply, or 0.
    pub(super) error: u32,
    /// What of a read has arrived: ranges in order, apart from one another.
    arrived: Vec<(u32, u32)>,
    generation: u32,
    busy: bool,
}

impl Part {
    /// Bytes of payload that follow the header.
    pub(super) fn payload_bytes(&self) -> usize {
        if self.header.command.get() == wire::COMMAND_WRITE { self.header.length.get() as usize } else { 0 }
    }

    /// Whether it is a read.
    pub(super) fn reads(&self) -> bool {
        self.header.command.get() == wire::COMMAND_READ
    }

    /// Notes that `offset` and `length` of the export are about to arrive. Returns where they belong.
    pub(super) fn arrive(&mut self, offset: u64, length: u32) -> Result<Place, ProtocolError> {
        if !self.reads() {
            return Err(ProtocolError("there is data in the reply to a command that reads none"));
        }
        let start = offset.checked_sub(self.header.offset.get()).and_then(|start| u32::try_from(start).ok());
        let range = start.and_then(|start| Some((start, start.checked_add(length)?)));
        let Some((start, end)) = range.filter(|(_, end)| *end <= self.header.length.get()) else {
            return Err(ProtocolError("a chunk lies outside the read it answers"));
        };
        let next = self.arrived.partition_point(|(first, _)| *first < start);
        let overlaps = self.arrived.get(next).is_some_and(|(first, _)| *first < end)
            || next.checked_sub(1).is_some_and(|before| self.arrived[before].1 > start);
        if overlaps {
            return Err(ProtocolError("chunks of a read overlap"));
        }
        let joins_next = self.arrived.get(next).is_some_and(|(first, _)| *first == end);
        match next.checked_sub(1).filter(|before| self.arrived[*before].1 == start) {
            Some(before) if joins_next => self.arrived[before].1 = self.arrived.remove(next).1,
            Some(before) => self.arrived[before].1 = end,
            None if joins_next => self.arrived[next].0 = start,
            None if self.arrived.len() == GAPS_MAX => {
                return Err(ProtocolError("chunks of a read are scattered beyond measure"));
            }
            None => self.arrived.insert(next, (start, end)),
        }
        let mut place = self.place;
        place.skip(start as usize);
        Ok(place)
    }

    /// Whether all of a read has arrived.
    pub(super) fn is_whole(&self) -> bool {
        !self.reads() || self.arrived.as_slice() == [(0, self.header.length.get())]
    }
}

/// All rows of a channel.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) requests: Vec<Request>,
    pub(super) parts: Vec<Part>,
    free_requests: Vec<u32>,
    free_parts: Vec<u32>,
    /// Requests for which parts are still to be made, oldest first.
    pub(super) waiting: VecDeque<u32>,
    /// Parts whose reply is complete.
    pub(super) ended: Vec<u32>,
    /// Requests of the lane under way.
    pub(super) in_flight: usize,
}

impl Table {
    /// All rows free.
    pub(super) fn new() -> Self {
        let nothing = BlockRequest {
            tag: crate::backend::Tag { lane: 0, row: 0 },
            operation: BlockOperation::Flush,
            offset: 0,
            length: 0,
            segments: crate::backend::Segments::NONE,
        };
        let request = Request {
            purpose: Purpose::Free,
            request: nothing,
            issued: 0,
            parts: 0,
            fault: None,
            reserved: false,
            flush_after: false,
            mark: 0,
        };
        let part = |_| Part {
            header: RequestHeader::default(),
            request: 0,
            connection: 0,
            place: Place::new(crate::backend::Segments::NONE, 0),
            sent: false,
            error: 0,
            // Enough for nearly every reply; it keeps what it grows to.
            arrived: Vec::with_capacity(4),
            generation: 0,
            busy: false,
        };
        Self {
            requests: vec![request; ROWS],
            parts: (0..ROWS).map(part).collect(),
            free_requests: (0..ROWS as u32).rev().collect(),
            free_parts: (0..ROWS as u32).rev().collect(),
            waiting: VecDeque::with_capacity(ROWS),
            ended: Vec::with_capacity(ROWS),
            in_flight: 0,
        }
    }

    /// Whether `count` more requests fit.
    pub(super) fn has_room(&self, count: usize) -> bool {
        self.free_requests.len() >= count
    }

    /// Whether one more part fits.
    pub(super) fn has_part(&self) -> bool {
        !self.free_parts.is_empty()
    }

    /// Takes a row for a request and lets it wait for its parts. `None` when full.
    pub(super) fn add(&mut self, purpose: Purpose, request: BlockRequest, mark: u64) -> Option<u32> {
        let row = self.free_requests.pop()?;
        self.requests[row as usize] =
            Request { purpose, request, issued: 0, parts: 0, fault: None, reserved: false, flush_after: false, mark };
        self.in_flight += usize::from(purpose == Purpose::Lane);
        self.waiting.push_back(row);
        Some(row)
    }

    /// Frees the row of a request.
    pub(super) fn remove(&mut self, row: u32) {
        let request = &mut self.requests[row as usize];
        self.in_flight -= usize::from(request.purpose == Purpose::Lane);
        request.purpose = Purpose::Free;
        self.free_requests.push(row);
    }

    /// Takes a row for a part of request `request`. `None` when full.
    pub(super) fn add_part(
        &mut self,
        request: u32,
        connection: u32,
        place: Place,
        mut header: RequestHeader,
    ) -> Option<u32> {
        let row = self.free_parts.pop()?;
        let part = &mut self.parts[row as usize];
        // A new generation makes a late or invented reply to the row's earlier command fail.
        part.generation = part.generation.wrapping_add(1);
        header.cookie = (u64::from(part.generation) << 32 | u64::from(row)).into();
        part.header = header;
        part.request = request;
        part.connection = connection;
        part.place = place;
        part.sent = false;
        part.error = 0;
        part.arrived.clear();
        part.busy = true;
        self.requests[request as usize].parts += 1;
        Some(row)
    }

    /// Frees the row of a part.
    pub(super) fn remove_part(&mut self, row: u32) {
        self.parts[row as usize].busy = false;
        self.free_parts.push(row);
    }

    /// The part that a reply on `connection` with `cookie` belongs to.
    pub(super) fn find(&mut self, cookie: u64, connection: u32) -> Result<(u32, &mut Part), ProtocolError> {
        let row = cookie as u32;
        match self.parts.get_mut(row as usize) {
            Some(part)
                if part.busy && part.sent && part.connection == connection && part.header.cookie.get() == cookie =>
            {
                Ok((row, part))
            }
            _ => Err(ProtocolError("a reply's cookie belongs to no request on this connection")),
        }
    }

    /// Frees every row but the lane's requests', which the caller completes: the connections are gone.
    pub(super) fn drop_parts(&mut self) {
        self.waiting.clear();
        self.ended.clear();
        self.free_parts.clear();
        for (row, part) in self.parts.iter_mut().enumerate().rev() {
            part.busy = false;
            self.free_parts.push(row as u32);
        }
    }
}

#[cfg(test)]
mod tests;
