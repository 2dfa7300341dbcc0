//! The hot half: cuts requests into commands, spreads them over the connections, and brings everything back together.
//!
//! It is in one of three states. *Ready*: requests go out. *Away*: the connections are gone, every request in flight has
//! been completed with [`BlockFault::Away`], and new ones are handed back. *Replaying*: new connections are there, and
//! what the server may have lost is written again before anything else goes out.

mod commands;
mod log;

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use super::bridge::Bridge;
use super::connection::{Connection, Loss};
use super::handshake::{Established, Export};
use super::payload::Iovecs;
use super::replay::ReplayLog;
use super::table::{Purpose, Table};
use super::{Left, lock};
use crate::backend::{BlockChannel, BlockFault, BlockOperation, BlockRequest, Completion};
use crate::clock::Moment;

/// How often connections without requests are looked at, in case the server has closed one.
const IDLE_LOOK: Duration = Duration::from_micros(200);

/// A connection that lived for less was no success: the back-off goes on where it was.
const STEADY: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Without connections.
    Away,
    /// Writing the log again; `next` is the number of the record to go out next.
    Replaying { next: u64, under_way: usize },
    /// Open for requests.
    Ready,
}

/// A volume's channel.
#[derive(Debug)]
pub(super) struct NbdChannel {
    uri: String,
    export: Export,
    state: State,
    /// Whether the loss of the connections has been told.
    told: bool,
    connected: Moment,
    looked: Moment,
    connections: Vec<Connection>,
    /// Which connections wait to become writable, as the epoll descriptor knows it.
    watched: Vec<bool>,
    payload_bytes_max: u64,
    table: Table,
    iovecs: Iovecs,
    log: Option<ReplayLog>,
    /// Whether a flush of our own is under way, and whether one is wanted because a write found no room in the log.
    flushing: bool,
    flush_wanted: bool,
    /// Whether a request was handed back for a reason whose end no completion tells of, and whether the event descriptor
    /// has been rung because that reason is gone: a reactor that sleeps must learn to submit again.
    refused: bool,
    rung: bool,
    /// Its queues have handed over: what it wrote may be written over by somebody else, and is not written again.
    handed_over: bool,
    bridge: Bridge,
    epoll: Epoll,
    left: Arc<Left>,
}

impl NbdChannel {
    /// A channel on connections that are there.
    pub(super) fn new(
        uri: String,
        export: Export,
        list: Vec<Established>,
        bridge: Bridge,
        log: Option<ReplayLog>,
        left: Arc<Left>,
    ) -> std::io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(bridge.event(), EpollEvent::new(EpollFlags::EPOLLIN, u64::MAX))?;
        let mut channel = Self {
            uri,
            export,
            state: State::Away,
            told: false,
            connected: Moment::default(),
            looked: Moment::default(),
            connections: Vec::new(),
            watched: Vec::new(),
            payload_bytes_max: 0,
            table: Table::new(),
            iovecs: Iovecs::new(),
            log,
            flushing: false,
            flush_wanted: false,
            refused: false,
            rung: false,
            handed_over: false,
            bridge,
            epoll,
            left,
        };
        channel.adopt(list, Moment::now())?;
        Ok(channel)
    }

    /// Starts to use new connections.
    fn adopt(&mut self, list: Vec<Established>, now: Moment) -> std::io::Result<()> {
        self.payload_bytes_max = u64::MAX;
        for (index, established) in list.into_iter().enumerate() {
            let (connection, export) = Connection::new(established, index as u32);
            self.payload_bytes_max = self.payload_bytes_max.min(u64::from(export.payload_bytes_max));
            self.epoll.add(connection.socket(), EpollEvent::new(EpollFlags::EPOLLIN, index as u64))?;
            self.connections.push(connection);
            self.watched.push(false);
        }
        self.connected = now;
        self.looked = now;
        if self.handed_over {
            self.give_log_up();
        }
        match &self.log {
            Some(log) if log.len() > 0 => {
                tracing::info!(uri = %self.uri, writes = log.len(), "writing again what was not flushed");
                self.state = State::Replaying { next: log.first(), under_way: 0 };
            }
            _ => self.get_ready(),
        }
        Ok(())
    }

    fn get_ready(&mut self) {
        self.state = State::Ready;
        self.ring();
        if self.told {
            self.told = false;
            tracing::info!(uri = %self.uri, "connection to the storage server restored");
        }
    }

    /// Wakes a reactor that was handed a request back.
    fn ring(&mut self) {
        if std::mem::take(&mut self.refused) && !self.rung {
            self.rung = true;
            self.bridge.ring();
        }
    }

    fn silence(&mut self) {
        if std::mem::take(&mut self.rung) {
            self.bridge.silence();
        }
    }

    /// Drops all connections and completes what is in flight: the lane submits it again when we are back.
    fn lose(&mut self, loss: &Loss, now: Moment, completions: &mut Vec<Completion>) {
        if !self.told {
            self.told = true;
            tracing::warn!(
                uri = %self.uri,
                in_flight = self.table.in_flight,
                "connection to the storage server lost, requests are held: {loss}"
            );
        }
        self.state = State::Away;
        // Closing a socket takes it out of the epoll set.
        self.connections.clear();
        self.watched.clear();
        self.flushing = false;
        self.flush_wanted = false;
        self.table.drop_parts();
        for row in 0..self.table.requests.len() {
            let request = self.table.requests[row];
            if request.purpose == Purpose::Free {
                continue;
            }
            if request.reserved
                && let Some(log) = &mut self.log
            {
                log.release(request.request.operation, request.request.length);
            }
            if request.purpose == Purpose::Lane {
                completions.push(Completion { tag: request.request.tag, result: Err(BlockFault::Away) });
            }
            self.table.remove(row as u32);
        }
        self.silence();
        self.bridge.ask(now.ns_since(self.connected) < STEADY.as_nanos() as u64);
    }

    /// One turn with connections.
    fn turn(&mut self, now: Moment, completions: &mut Vec<Completion>) -> Result<(), Loss> {
        let look = now.ns_since(self.looked) >= IDLE_LOOK.as_nanos() as u64;
        if look {
            self.looked = now;
        }
        for connection in &mut self.connections {
            if look || connection.in_flight() > 0 {
                connection.receive(&mut self.table, &mut self.iovecs)?;
            }
        }
        while let Some(row) = self.table.ended.pop() {
            self.end_part(row, completions)?;
        }
        self.replay()?;
        self.flush_log();
        self.issue(completions)?;
        for connection in &mut self.connections {
            if connection.in_flight() > 0 || connection.is_blocked() {
                connection.send(&mut self.table, &mut self.iovecs)?;
            }
        }
        self.watch()
    }

    /// Has the epoll descriptor tell of sockets that become writable, where something waits for that.
    fn watch(&mut self) -> Result<(), Loss> {
        for (index, connection) in self.connections.iter().enumerate() {
            if self.watched[index] != connection.is_blocked() {
                let mut flags = EpollFlags::EPOLLIN;
                flags.set(EpollFlags::EPOLLOUT, connection.is_blocked());
                let mut event = EpollEvent::new(flags, index as u64);
                self.epoll.modify(connection.socket(), &mut event).map_err(std::io::Error::from)?;
                self.watched[index] = connection.is_blocked();
            }
        }
        Ok(())
    }
}

impl BlockChannel for NbdChannel {
    fn submit(&mut self, request: BlockRequest) -> Result<(), BlockRequest> {
        // One row stays for the channel's own flush.
        if self.state != State::Ready || !self.table.has_room(2) {
            self.refused = true;
            return Err(request);
        }
        let writes = !matches!(request.operation, BlockOperation::Read | BlockOperation::Flush);
        let mut reserved = false;
        let mut flush_after = false;
        let mut mark = 0;
        if let Some(log) = &mut self.log {
            mark = if request.operation == BlockOperation::Flush { log.mark() } else { 0 };
            if writes && request.length > 0 {
                flush_after = request.operation == BlockOperation::Write && request.length > log.data_bytes_max();
                reserved = !flush_after;
                if reserved && !log.reserve(request.operation, request.length) {
                    self.flush_wanted = true;
                    self.refused = true;
                    return Err(request);
                }
            }
        }
        // A flush on a server that knows none goes the same way, and ends in the next poll as a request without
        // commands: everything completed is durable there.
        let Some(row) = self.table.add(Purpose::Lane, request, mark) else { return Err(request) };
        let row = &mut self.table.requests[row as usize];
        row.reserved = reserved;
        row.flush_after = flush_after;
        Ok(())
    }

    fn poll(&mut self, now: Moment, completions: &mut Vec<Completion>) {
        self.silence();
        if self.state == State::Away {
            let Some(list) = self.bridge.take() else { return };
            if let Err(error) = self.adopt(list, now) {
                self.lose(&Loss::Io(error), now, completions);
                return;
            }
        }
        if let Err(loss) = self.turn(now, completions) {
            self.lose(&loss, now, completions);
        }
    }

    fn in_flight(&self) -> usize {
        self.table.in_flight
    }

    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.epoll.0.as_raw_fd())
    }

    fn hand_over(&mut self) -> bool {
        self.handed_over = true;
        let has_written = self.log.as_ref().is_some_and(|log| log.len() > 0);
        match self.state {
            // Its log goes when the server is there again, if nobody has taken the queues back by then.
            State::Away => true,
            // Flushed after that.
            State::Replaying { .. } => false,
            State::Ready => {
                self.flush_wanted |= has_written;
                !has_written
            }
        }
    }

    fn cut_off(&mut self, now: Moment, completions: &mut Vec<Completion>) {
        if self.state != State::Away {
            for connection in &self.connections {
                connection.forget_unsent();
            }
            self.lose(&Loss::HandedOver, now, completions);
        }
    }

    fn take_back(&mut self, unchanged: bool) {
        if std::mem::take(&mut self.handed_over) && !unchanged {
            self.give_log_up();
        }
    }
}

impl Drop for NbdChannel {
    fn drop(&mut self) {
        for connection in &mut self.connections {
            connection.say_goodbye(&mut self.iovecs);
        }
        if self.handed_over {
            self.give_log_up();
        }
        // A request that ends with the channel has its room in the log given back; its outcome nobody learns.
        if let Some(mut log) = self.log.take().filter(|log| log.len() > 0) {
            for request in self.table.requests.iter().filter(|row| row.purpose != Purpose::Free && row.reserved) {
                log.release(request.request.operation, request.request.length);
            }
            *lock(&self.left.log) = Some(log);
        }
        // Release: whoever opens the next channel finds the log.
        self.left.open.store(false, Ordering::Release);
    }
}
