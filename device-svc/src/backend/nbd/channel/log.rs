//! What the server may lose: flushed before there is too much of it, written again when the server is back, or given up.

use super::super::connection::Loss;
use super::super::replay::{REPLAY_DEPTH, Record};
use super::super::table::Purpose;
use super::{NbdChannel, State};
use crate::backend::{BlockOperation, BlockRequest, Segments, Tag};

impl NbdChannel {
    /// Nothing of the log is written again.
    pub(super) fn give_log_up(&mut self) {
        if let Some(log) = self.log.as_mut().filter(|log| log.len() > 0) {
            tracing::warn!(
                uri = %self.uri,
                writes = log.len(),
                "the storage server was away when the queues were handed over: what it had not made durable is not written again"
            );
            log.forget_before(log.mark());
        }
    }

    /// Writes the next round of the log again: records that do not overlap, since a server may reorder what it has at
    /// once.
    pub(super) fn replay(&mut self) -> Result<(), Loss> {
        let State::Replaying { next, under_way: 0 } = self.state else { return Ok(()) };
        let Some(log) = &mut self.log else { return Ok(()) };
        let mut round = 0;
        let mut number = next;
        let mut list: [Option<Record>; REPLAY_DEPTH] = [None; REPLAY_DEPTH];
        while round < REPLAY_DEPTH {
            let Some(record) = log.get(number) else { break };
            let overlaps = list[..round].iter().flatten().any(|other| {
                record.offset < other.offset + other.length && other.offset < record.offset + record.length
            });
            if overlaps {
                break;
            }
            list[round] = Some(record);
            let request = BlockRequest {
                tag: Tag { lane: u32::MAX, row: u32::MAX },
                operation: record.operation,
                offset: record.offset,
                length: record.length,
                segments: log.segments(round, &record),
            };
            // Every row is free: the lane's requests ended when the connections did.
            if self.table.add(Purpose::Replay, request, 0).is_none() {
                break;
            }
            round += 1;
            number += 1;
        }
        if round == 0 {
            self.get_ready();
        } else {
            self.state = State::Replaying { next: number, under_way: round };
        }
        Ok(())
    }

    /// Flushes when the log fills.
    pub(super) fn flush_log(&mut self) {
        let Some(log) = &self.log else { return };
        if self.state != State::Ready || self.flushing || !(log.is_filling() || self.flush_wanted && log.len() > 0) {
            return;
        }
        let flush = BlockRequest {
            tag: Tag { lane: u32::MAX, row: u32::MAX },
            operation: BlockOperation::Flush,
            offset: 0,
            length: 0,
            segments: Segments::NONE,
        };
        if self.table.add(Purpose::Flush, flush, log.mark()).is_some() {
            self.flushing = true;
            self.flush_wanted = false;
        }
    }
}
