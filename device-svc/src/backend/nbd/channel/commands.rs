//! Requests become commands, spread over the connections, and answers become completions.

use super::super::connection::Loss;
use super::super::payload::Place;
use super::super::table::{Purpose, Request};
use super::super::wire::{self, RequestHeader};
use super::{NbdChannel, State};
use crate::backend::{BlockFault, BlockOperation, Completion};

/// How much one trim or write zeroes covers at most, bytes: they carry no payload, so the server's limit on payload does
/// not bind them, but their length is a 32-bit field, and a server should not be held up by one for too long.
const RANGE_BYTES_MAX: u64 = 1 << 30;

impl NbdChannel {
    /// Makes commands of the requests that wait, oldest first.
    pub(super) fn issue(&mut self, completions: &mut Vec<Completion>) -> Result<(), Loss> {
        while let Some(row) = self.table.waiting.front().copied() {
            let request = self.table.requests[row as usize];
            let left = request.request.length - request.issued;
            let (command, flags, limit) = self.command(&request);
            let flushes = command == wire::COMMAND_FLUSH && self.export.has(wire::FLAG_SEND_FLUSH);
            let length = left.min(limit);
            if length > 0 || flushes {
                if !self.table.has_part() {
                    return Ok(());
                }
                let header = RequestHeader {
                    magic: wire::REQUEST_MAGIC.into(),
                    flags: flags.into(),
                    command: command.into(),
                    cookie: 0.into(),
                    offset: if length == 0 { 0 } else { request.request.offset + request.issued }.into(),
                    length: (length as u32).into(),
                };
                let place = Place::new(request.request.segments, request.issued);
                let Some(index) = (0..self.connections.len()).min_by_key(|index| self.connections[*index].in_flight())
                else {
                    return Err(Loss::Closed);
                };
                let Some(part) = self.table.add_part(row, index as u32, place, header) else { return Ok(()) };
                self.connections[index].queue(part);
                self.table.requests[row as usize].issued += length;
            }
            if command == wire::COMMAND_FLUSH || length == left {
                self.table.waiting.pop_front();
                if self.table.requests[row as usize].parts == 0 {
                    self.end_request(row, completions)?;
                }
            }
        }
        Ok(())
    }

    /// The command for a request, its flags, and the most that one of it may cover.
    fn command(&self, request: &Request) -> (u16, u16, u64) {
        // A write that is followed by a flush has its data out when all of it is issued: what comes now is the flush.
        if request.flush_after && request.issued == request.request.length {
            return (wire::COMMAND_FLUSH, 0, 0);
        }
        // A server without flush can still be told to write through.
        let through = !self.export.has(wire::FLAG_SEND_FLUSH) && self.export.has(wire::FLAG_SEND_FUA);
        let through = if through { wire::COMMAND_FLAG_FUA } else { 0 };
        match request.request.operation {
            BlockOperation::Read => (wire::COMMAND_READ, 0, self.payload_bytes_max),
            BlockOperation::Write => (wire::COMMAND_WRITE, through, self.payload_bytes_max),
            BlockOperation::Flush => (wire::COMMAND_FLUSH, 0, 0),
            BlockOperation::Discard => (wire::COMMAND_TRIM, through, RANGE_BYTES_MAX),
            BlockOperation::WriteZeroes { unmap: true } => (wire::COMMAND_WRITE_ZEROES, through, RANGE_BYTES_MAX),
            BlockOperation::WriteZeroes { unmap: false } => {
                (wire::COMMAND_WRITE_ZEROES, through | wire::COMMAND_FLAG_NO_HOLE, RANGE_BYTES_MAX)
            }
        }
    }

    /// A command has been answered.
    pub(super) fn end_part(&mut self, row: u32, completions: &mut Vec<Completion>) -> Result<(), Loss> {
        let part = &self.table.parts[row as usize];
        let fault = fault(part.error);
        let request_row = part.request;
        if fault == Some(BlockFault::Away) && part.header.command.get() == wire::COMMAND_FLUSH {
            // A server that failed to write its cache back may have dropped it: the next flush would then succeed
            // without the data. So the log is written again first.
            return Err(Loss::Flush);
        }
        self.table.remove_part(row);
        let request = &mut self.table.requests[request_row as usize];
        request.parts -= 1;
        request.fault = match (request.fault, fault) {
            // What is final outweighs what may pass.
            (None | Some(BlockFault::Away), Some(fault)) => Some(fault),
            (before, _) => before,
        };
        let all_issued = request.issued == request.request.length || request.request.operation == BlockOperation::Flush;
        if request.parts == 0 && all_issued { self.end_request(request_row, completions) } else { Ok(()) }
    }

    /// All commands of a request have been answered.
    fn end_request(&mut self, row: u32, completions: &mut Vec<Completion>) -> Result<(), Loss> {
        let request = self.table.requests[row as usize];
        let operation = request.request.operation;
        if request.flush_after && request.fault.is_none() && request.mark == 0 {
            // The data is there; now its flush. The mark also drops what the log holds of the same place, which a
            // replay would otherwise put over the newer data.
            self.table.requests[row as usize].mark = self.log.as_ref().map_or(1, |log| log.mark() + 1);
            self.table.waiting.push_back(row);
            return Ok(());
        }
        if let Some(log) = &mut self.log {
            match request.fault {
                None if request.reserved => {
                    log.append(operation, request.request.offset, request.request.length, request.request.segments);
                }
                Some(_) if request.reserved => log.release(operation, request.request.length),
                None if request.flush_after => log.forget_before(request.mark - 1),
                None if operation == BlockOperation::Flush => log.forget_before(request.mark),
                _ => {}
            }
        }
        self.table.remove(row);
        match request.purpose {
            Purpose::Free => {}
            Purpose::Lane => {
                let result = request.fault.map_or(Ok(()), Err);
                completions.push(Completion { tag: request.request.tag, result });
            }
            Purpose::Flush => {
                self.flushing = false;
                if request.fault.is_some() {
                    return Err(Loss::Flush);
                }
                self.ring();
            }
            Purpose::Replay => {
                // A trim that fails leaves what is undefined undefined.
                if request.fault.is_some() && operation != BlockOperation::Discard {
                    return Err(Loss::Replay);
                }
                if let State::Replaying { under_way, .. } = &mut self.state {
                    *under_way -= 1;
                }
            }
        }
        Ok(())
    }
}

/// What the lane does about an error of the server.
const fn fault(error: u32) -> Option<BlockFault> {
    /// Not in the protocol's list, but sent by servers that pass the system's numbers on.
    const EAGAIN: u32 = 11;
    match error {
        0 => None,
        // These may pass: the lane tries again within the volume's time limit.
        wire::ERROR_EIO | wire::ERROR_ENOMEM | wire::ERROR_ESHUTDOWN | EAGAIN => Some(BlockFault::Away),
        wire::ERROR_ENOTSUP => Some(BlockFault::Unsupported),
        // EPERM, EINVAL, ENOSPC, EOVERFLOW and what nobody has heard of: the same request would fail again.
        _ => Some(BlockFault::Io),
    }
}
