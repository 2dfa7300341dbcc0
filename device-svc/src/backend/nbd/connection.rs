//! One connection on the data path: the commands that wait to go out, and the replies as they come in, wherever the
//! socket happens to cut them.
//!
//! Sending: all that waits goes out in as few calls as the socket takes, headers and payload in one list. Receiving: a
//! call fills a buffer, and where a large payload is under way, first its own place; so small replies cost one call for
//! many, and large ones are not copied.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use zerocopy::IntoBytes;

use super::handshake::{Established, Export};
use super::payload::{Iovecs, Place};
use super::table::{ROWS, Table};
use super::transport::Transport;
use super::wire::{self, ChunkBody, ProtocolError, Reply, RequestHeader};

/// Size of the receive buffer. Seven 4 KiB reads with their headers fit; what is larger mostly goes around it.
const INPUT_BYTES: usize = 32 << 10;

/// How many full buffers one turn takes from one connection, so that a fast server does not starve other queues.
const RECEIVES_PER_TURN: usize = 16;

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum Loss {
    /// The server ended it.
    #[error("the server closed the connection")]
    Closed,
    /// The network did.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The server broke the protocol.
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    /// A flush failed, so what was acknowledged before it must be written again.
    #[error("the server could not flush")]
    Flush,
    /// A record of the replay log could not be written again.
    #[error("the server did not take unflushed writes again")]
    Replay,
    /// It did not answer in time, and somebody else may write now.
    #[error("the queues were handed over, and the server had not answered")]
    HandedOver,
}

/// What the next byte from the server is.
#[derive(Debug)]
enum State {
    /// The start of a reply, or of a chunk.
    Head,
    /// Payload of a read.
    Payload { part: u32, place: Place, left: usize, done: bool },
    /// An error's text.
    Skip { part: u32, left: usize, done: bool },
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    transport: Transport,
    index: u32,
    structured: bool,
    /// Parts to send, oldest first.
    waiting: VecDeque<u32>,
    /// Bytes of the oldest one that have gone.
    gone: usize,
    /// Whether the socket took less than there was, so that its becoming writable matters.
    blocked: bool,
    /// Parts sent or to send, and not answered.
    in_flight: usize,
    input: Box<[u8]>,
    start: usize,
    end: usize,
    state: State,
}

impl Connection {
    /// Takes a connection whose handshake is done.
    pub(super) fn new(established: Established, index: u32) -> (Self, Export) {
        let connection = Self {
            transport: Transport::new(established.socket, established.tls),
            index,
            structured: established.export.structured,
            waiting: VecDeque::with_capacity(ROWS),
            gone: 0,
            blocked: false,
            in_flight: 0,
            input: vec![0; INPUT_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            state: State::Head,
        };
        (connection, established.export)
    }

    /// The socket, to wait on.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.transport.socket()
    }

    /// What the system has not sent yet shall not be sent any more when the connection is dropped.
    pub(super) fn forget_unsent(&self) {
        let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
        // A Unix socket knows none of it: what was written is the server's already.
        let _ = nix::sys::socket::setsockopt(&self.socket(), nix::sys::socket::sockopt::Linger, &at_once);
    }

    /// Parts sent or to send, and not answered.
    pub(super) const fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether something waits for the socket to become writable.
    pub(super) const fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// Lets a part wait for the next [`Self::send`].
    pub(super) fn queue(&mut self, part: u32) {
        self.waiting.push_back(part);
        self.in_flight += 1;
    }

    /// Sends what waits, as far as the socket takes it.
    pub(super) fn send(&mut self, table: &mut Table, iovecs: &mut Iovecs) -> Result<(), Loss> {
        if self.transport.is_plain() { self.send_plain(table, iovecs) } else { self.send_tls(table) }
    }

    fn send_plain(&mut self, table: &mut Table, iovecs: &mut Iovecs) -> Result<(), Loss> {
        self.blocked = false;
        while !self.waiting.is_empty() {
            let mut ranges = iovecs.begin();
            let mut gone = self.gone;
            for row in &self.waiting {
                let part = &table.parts[*row as usize];
                let header = part.header.as_bytes();
                if !ranges.has_room() {
                    break;
                }
                if gone < header.len() {
                    ranges.push_source(&header[gone..]);
                }
                let skipped = gone.saturating_sub(header.len());
                gone = 0;
                let left = part.payload_bytes() - skipped;
                if left > 0 {
                    let mut place = part.place;
                    place.skip(skipped);
                    if ranges.push_place(place, left, 0) < left {
                        break;
                    }
                }
            }
            let offered = ranges.bytes();
            match ranges.send(self.transport.socket()) {
                Ok(sent) => {
                    self.advance(table, sent);
                    if sent < offered {
                        self.blocked = true;
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.blocked = true;
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn send_tls(&mut self, table: &mut Table) -> Result<(), Loss> {
        // One TLS record's worth (RFC 8446, 5.1) at a time.
        let mut buffer = [0; 16 << 10];
        loop {
            self.blocked = !self.transport.push()?;
            let mut accepted = 0;
            while let Some(row) = self.waiting.front() {
                let part = &table.parts[*row as usize];
                let header = part.header.as_bytes();
                let taken = if self.gone < header.len() {
                    self.transport.write(&header[self.gone..])?
                } else {
                    let mut place = part.place;
                    let skipped = self.gone - header.len();
                    place.skip(skipped);
                    let want = (part.payload_bytes() - skipped).min(buffer.len());
                    let have = place.take(&mut buffer[..want]);
                    self.transport.write(&buffer[..have])?
                };
                if taken == 0 {
                    break;
                }
                accepted += taken;
                self.advance(table, taken);
            }
            if accepted == 0 || self.blocked {
                return Ok(());
            }
        }
    }

    /// Notes that `sent` more bytes have gone.
    fn advance(&mut self, table: &mut Table, sent: usize) {
        self.gone += sent;
        while let Some(row) = self.waiting.front() {
            let part = &mut table.parts[*row as usize];
            let whole = size_of::<RequestHeader>() + part.payload_bytes();
            if self.gone < whole {
                return;
            }
            self.gone -= whole;
            part.sent = true;
            self.waiting.pop_front();
        }
    }

    /// Takes what has come; parts that have ended are listed in the table.
    pub(super) fn receive(&mut self, table: &mut Table, iovecs: &mut Iovecs) -> Result<(), Loss> {
        let mut rounds = 0;
        loop {
            let full = match self.fill(iovecs) {
                Ok(full) => full,
                Err(Loss::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(Loss::Io(error)) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(loss) => return Err(loss),
            };
            self.parse(table)?;
            rounds += 1;
            // A plain socket that gave less than it could is empty, and wakes us when it is not; a TLS session may hold
            // plain text that no socket would tell of, so it is read until it says that there is none.
            if self.transport.is_plain() && (!full || rounds == RECEIVES_PER_TURN) {
                return Ok(());
            }
        }
    }

    /// Receives once. Returns whether there may be more.
    fn fill(&mut self, iovecs: &mut Iovecs) -> Result<bool, Loss> {
        // `parse` leaves less than one head, and nothing before a payload.
        self.input.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        if !self.transport.is_plain() {
            return match self.transport.read(&mut self.input[self.end..])? {
                0 => Err(Loss::Closed),
                taken => {
                    self.end += taken;
                    Ok(true)
                }
            };
        }
        let mut ranges = iovecs.begin();
        let direct = match &self.state {
            State::Payload { place, left, .. } => ranges.push_place(*place, *left, 1),
            _ => 0,
        };
        // Where the list has no room for the whole payload, nothing may land behind the part of it that had.
        let whole = !matches!(&self.state, State::Payload { left, .. } if direct < *left);
        if whole {
            ranges.push_target(&mut self.input[self.end..]);
        }
        let offered = ranges.bytes();
        let taken = match ranges.receive(self.transport.socket())? {
            0 => return Err(Loss::Closed),
            taken => taken,
        };
        let placed = taken.min(direct);
        if let State::Payload { place, left, .. } = &mut self.state {
            place.skip(placed);
            *left -= placed;
        }
        self.end += taken - placed;
        Ok(taken == offered)
    }

    /// Works through the buffer until too little is left for a decision.
    fn parse(&mut self, table: &mut Table) -> Result<(), ProtocolError> {
        loop {
            let have = self.end - self.start;
            match &mut self.state {
                State::Head => {
                    let Some((reply, taken)) = wire::parse_reply(&self.input[self.start..self.end])? else {
                        return Ok(());
                    };
                    self.start += taken;
                    self.reply(table, reply)?;
                }
                State::Payload { part, place, left, done } => {
                    let now = have.min(*left);
                    place.fill(&self.input[self.start..self.start + now]);
                    self.start += now;
                    *left -= now;
                    if *left > 0 {
                        return Ok(());
                    }
                    let (part, done) = (*part, *done);
                    self.chunk_end(table, part, done)?;
                }
                State::Skip { part, left, done } => {
                    let now = have.min(*left);
                    self.start += now;
                    *left -= now;
                    if *left > 0 {
                        return Ok(());
                    }
                    let (part, done) = (*part, *done);
                    self.chunk_end(table, part, done)?;
                }
            }
        }
    }

    fn reply(&mut self, table: &mut Table, reply: Reply) -> Result<(), ProtocolError> {
        match reply {
            Reply::Simple { cookie, error } => {
                let (row, part) = table.find(cookie, self.index)?;
                if error == 0 && part.reads() {
                    if self.structured {
                        return Err(ProtocolError("a read got a simple reply though structured ones were agreed"));
                    }
                    let (offset, length) = (part.header.offset.get(), part.header.length.get());
                    let place = part.arrive(offset, length)?;
                    self.state = State::Payload { part: row, place, left: length as usize, done: true };
                    return Ok(());
                }
                part.error = error;
                self.chunk_end(table, row, true)
            }
            Reply::Chunk { .. } if !self.structured => Err(ProtocolError("a structured reply though none were agreed")),
            Reply::Chunk { cookie, done, body } => {
                let (row, part) = table.find(cookie, self.index)?;
                match body {
                    ChunkBody::None => self.chunk_end(table, row, done),
                    ChunkBody::Data { offset, length } => {
                        let place = part.arrive(offset, length)?;
                        self.state = State::Payload { part: row, place, left: length as usize, done };
                        Ok(())
                    }
                    ChunkBody::Hole { offset, length } => {
                        part.arrive(offset, length)?.zero(length as usize);
                        self.chunk_end(table, row, done)
                    }
                    ChunkBody::Error { error, rest } => {
                        if part.error == 0 {
                            part.error = error;
                        }
                        self.state = State::Skip { part: row, left: rest as usize, done };
                        Ok(())
                    }
                }
            }
        }
    }

    /// A reply, or a chunk of one, has been taken in full.
    fn chunk_end(&mut self, table: &mut Table, row: u32, done: bool) -> Result<(), ProtocolError> {
        self.state = State::Head;
        if done {
            let part = &mut table.parts[row as usize];
            if part.error == 0 && !part.is_whole() {
                return Err(ProtocolError("a read's reply ended before all of it was there"));
            }
            // Its cookie is spent: a second reply to it finds no part.
            part.sent = false;
            table.ended.push(row);
            self.in_flight -= 1;
        }
        Ok(())
    }

    /// Tells the server that we leave, if the socket takes it at once and no command is half sent.
    pub(super) fn say_goodbye(&mut self, iovecs: &mut Iovecs) {
        if !self.waiting.is_empty() {
            return;
        }
        let header = RequestHeader {
            magic: wire::REQUEST_MAGIC.into(),
            command: wire::COMMAND_DISCONNECT.into(),
            ..RequestHeader::default()
        };
        // Whether it arrives changes nothing for us.
        if self.transport.is_plain() {
            let mut ranges = iovecs.begin();
            ranges.push_source(header.as_bytes());
            let _ = ranges.send(self.transport.socket());
        } else {
            let _ = self.transport.write(header.as_bytes());
            let _ = self.transport.push();
        }
    }
}
